"""`svfap doctor`: check whether a run would start here, and what to do if not.

Start with `examine`, which runs all checks; each returns a `finding.Finding`.
"""
