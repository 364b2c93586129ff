"""One file for each ablation: `get_config(arg)` is shared by the arms, `sweep(arg)` yields their
changes. launch/sweep.py runs them.
"""
