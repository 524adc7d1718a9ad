"""`svfap bench`: compare our implementations with the straightforward ones, on this machine.

One module per verb: `model`, `engine_step`, `decode`, `data`, `checkpoint`, `metrics`. Each has a
`run` function that returns a result with all figures and its text. Clocks and rates come from
`profiling`, data sets from `clip_sets`.
"""
