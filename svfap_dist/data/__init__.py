"""The data loader: from shards to batches of clips, deterministically.

Start with `loader` (a rank's batches), then `sample_order` (which sample comes when), `clips` (what
is cut from it) and `masking`; `batch` has the batch and the buffers, threads and workers that fill
it. `augment` and `selection` are for labeled sets.
"""
