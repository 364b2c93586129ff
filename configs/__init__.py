"""Configs: Python files with `get_config(arg)`; those of ablations have `sweep(arg)` too. They
import nothing but each other and ml_collections.
"""
