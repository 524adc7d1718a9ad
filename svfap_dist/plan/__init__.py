"""`svfap plan`: predict a run's speed, duration and memory before machines are rented.

Start with `planner`, which collects the numbers from `profiling` and `devices`; `limits` and
`memory` are pure arithmetic on them, and `plan.Plan` is the result.
"""
