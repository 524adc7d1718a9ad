"""Pre-training and fine-tuning of one rank, by DeepSpeed.

Start at `loop`, the order of events of a run. `attempt` holds the parts of a run, `engine` does the
arithmetic of a step, `objective` and `labeled` are the losses of pre-training and fine-tuning,
`health` is the consensus of all ranks, `finetune` runs the folds of a task, `audit` checks a run.
"""
