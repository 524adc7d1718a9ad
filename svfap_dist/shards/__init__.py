"""Shards: the format of a data set on disk or in a store, and random access to its samples.

Start with `format` (tars, indexes, manifest); `reader` fetches samples and keeps copies of shards
on a node's disk. `data_sharding` writes what this room reads.
"""
