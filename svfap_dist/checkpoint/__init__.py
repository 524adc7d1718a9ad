"""Checkpoints of a run: written while training continues, found, verified, loaded, deleted.

Start at `store`: the layout on disk, the train state, the rules of what counts as committed and
what is kept. `saver` writes (and fences out older attempts), `load` reads the weights alone, `gc`
deletes, `reshard` converts for another number of ranks.
"""
