"""Work done side by side: killable child processes, pools of them, and bounded ordered iteration.

Start with `processes`: calls that may hang, crash or exhaust memory, and results in order with a
bounded number in flight. `ray_connection` connects to a Ray cluster. Every room may import this
one.
"""
