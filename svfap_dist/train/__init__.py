"""Pre-training and fine-tuning of one rank, by DeepSpeed.

Start at `loop`, the order of events of a run. `attempt` holds the parts of a run, `engine` does the
arithmetic of a step, `objective` (pre-training) and `labelled` (fine-tuning) are what is trained,
`health` is the consensus of all ranks, `finetune` runs the folds of a task, `audit` checks a run.
"""
