"""Captioned images: sources (`sources/`), preparation (`prepare/`), the format on disk, batches.

It must not know networks, diffusion or meshes: a batch is a dict of host arrays, and text features
are arrays of some width.
"""
