"""The procedural talking face of the source `synthetic`.

Start with `render`, which makes the frames. It uses `identity` (how a person looks), `motion` (what
the face does in each frame) and `paint` (still pictures of the person).
"""
