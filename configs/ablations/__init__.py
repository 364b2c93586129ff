"""One file an ablation: `get_config(arg)` is what the arms share, `sweep(arg)` yields what they
change. Run by launch/sweep.py.
"""
