"""Weights on disk: checkpoints of the training state and which of them are kept, one-file exports,
readers of foreign files, name maps between a file and a parameter tree.

It must not know how a network is trained or sampled: it sees trees of arrays, their names and
shapes, never a `Stage` or a config's meaning.
"""
