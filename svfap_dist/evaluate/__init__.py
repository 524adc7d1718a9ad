"""Evaluation: which samples are tested, how networks see them, and what the result is.

Start with `runner`, the one loop over the views of videos, which also serves prediction, feature
extraction and validation. `protocol` selects the samples of a fold, `metrics` has the table of
scores, `results` sums up predictions, and `command` is `svfap evaluate`.
"""
