"""`svfap plan`: predict a run's speed, duration and memory before machines are rented.

Start with `planner`, which collects the numbers from `profiling` and `devices` into a `Plan`;
`limits` is pure arithmetic on them.
"""
