"""Pictures and pages about runs: for people, not for programs.

Start with `page`, the HTML report of a run. `reconstruction` draws what a pre-trained network
predicts for masked patches, `token_maps` what its encoder attends to.
"""
