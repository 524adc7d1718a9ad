"""Video: what a file holds, which frames a clip needs, and how they are decoded to RGB.

Used by data sharding and by training alike; imports neither shards nor config, and torch only where
it is used. Start with `info` (what a video is, and which part of it is used) and `frames` (the
contract of decode backends), then `backends` (their table), `pyav` (which frame is frame number i)
and `dali`. `probe` says whether a file can be used at all, `upright` gives frames as a viewer sees
them, and `image_grid` draws pictures.
"""
