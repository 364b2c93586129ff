"""Distances between sets of image features: one module per family, in float64 on the host.

It must not know images, feature networks, files or jax: arrays in, numbers out. `samples` are the
features of generated images, `reference` those of real images. Each family has `score`, which
checks its input and returns a JSON-compatible result with standard errors and warnings.
"""
