"""Inference: load a network, extract features, predict, export.

Start with `load` (any kind of stored network becomes a `Network`), then `extract` and `predict`,
which run it over whole videos by `evaluate.runner`. `videos` lists and reads inputs; `export` and
`onnx` write networks for other programs. Nothing here needs DeepSpeed or Ray.
"""
