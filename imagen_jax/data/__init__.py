"""Captioned images: where they come from (`sources/`), how they are prepared (`prepare/`), how they
lie on disk, how a step gets its batch.

It must not know networks, diffusion or meshes: a batch is a dict of host arrays, text features are
arrays of some width.
"""
