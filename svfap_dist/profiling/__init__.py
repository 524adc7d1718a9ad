"""Measure a training step, a loader, a decoder and a model's memory, once for all users.

`timing` has the clocks and rates. Start there, then `step`, `loader`, `decoder` and `memory`. Plans
(`plan`), benchmarks (`bench`) and the choice of a decoder (`train`) are made from these numbers.
"""
