"""Generators of monitoring/: Grafana boards and Prometheus rules, from tables; build time only.

Start at `boards` (what the boards show) and `alerts` (when to notify, and why); `render` writes the
files.
"""
