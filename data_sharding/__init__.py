"""Turn videos of any source into shards for training, and look after them.

Start with `pipeline`, which runs all steps; `sources` names the videos, `plan` groups them,
`make_sample` probes and transcodes one, `make_shards` makes the shards of the groups, `pack` writes a
tar, `markers` and `manifest` keep account. `verify`, `show` and `contact_sheet` read a data set
back; `faces` crops faces beforehand. Of svfap_dist, this package imports only video, shards,
parallel, storage and errors.
"""
