"""Flax Linen networks, called as `model(z, logsnr, cond)`: `unet.UNet` (base stage) and
`efficient_unet.EfficientUNet` (super-resolution).

They must not know time steps, schedules or meshes: they get `logsnr` and, at the borders of blocks,
a `constrain` callable.
"""
