"""Clusters: ranks on a Ray cluster, and recipes as jobs of a scheduler.

Start in `ray_train` (the driver that starts, watches and restarts the ranks; their messages are in
`board`), `schedulers` (the table of Ray Jobs, Slurm and Kubernetes behind `svfap
launch`) or `sweep` (one run per combination).
"""
