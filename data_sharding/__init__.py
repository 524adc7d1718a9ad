"""Turn videos of any source into shards for training; verify and describe shards.

Start with `pipeline`, which runs all steps: `sources` names the videos, `plan` groups them,
`make_sample` probes and transcodes one, `make_shards` makes a shard of each group, `pack` writes a
tar, `markers` and `manifest` commit the results. `verify`, `show` and `contact_sheet` read a data
set back; `faces` crops faces beforehand. Of svfap_dist, this package imports only video, shards,
parallel, storage and errors. Whatever reads or writes raises `StorageError` where the store or the
temporary disk fails.
"""
