"""Configs: Python files with `get_config(arg)`, and `sweep(arg)` in those of ablations.

They import nothing but each other and ml_collections. Each file's docstring gives the command, the
hardware, the expected loss and time, and where a result is recorded.
"""
