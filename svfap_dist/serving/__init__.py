"""A page and a JSON endpoint to try a network on videos: `svfap serve`.

Start in `web`, which receives videos within limits and computes one at a time. `prepare` finds the
face and cuts clips, in a child process that can be killed; `analyze` runs the network on them.
"""
