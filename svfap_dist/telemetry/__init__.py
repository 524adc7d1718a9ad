"""Records of a run while it trains: files, metrics of each rank, and where the time went.

Start at `recorder`, which feeds all others: `meter` (times and counts of a rank), `metrics` (the
table of Prometheus series), `exporter` (/metrics of a rank, list of live ranks), `journal` (the
files of a run, written and read back), `tracking` (to the experiment trackers of `trackers`) and
`goodput` (classes of wall time).
"""
