"""Weights on disk: checkpoints, one-file exports, readers of foreign files, name maps.

This folder must not know how a network is trained or sampled: it sees trees of arrays with names
and shapes, never a `Stage` or the meaning of a config.
"""
