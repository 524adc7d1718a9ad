"""Parallel work: killable child processes, pools of them, and bounded ordered iteration.

Start with `ordered_map` (results in order, a bounded number in flight), then `processes` (calls
that may hang, crash or exhaust memory). `ray_connection` connects to a Ray cluster. Every room may
import this one.
"""
