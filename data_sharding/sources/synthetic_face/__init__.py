"""The procedural face behind the source `synthetic`.

In the order of the flow: `identity` (who it is), `skin`, `paint` (still pictures of the head and
what is behind it, made with `brushes`), `motion` (what the face does in each frame), `features`,
`render` (frames).
"""
