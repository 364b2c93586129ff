"""Flax Linen networks: `unet.UNet` (base stage) and `efficient_unet.EfficientUNet` (super-resolution stages).

Both are called as `model(z, logsnr, cond)` and never see a time step, a schedule or a mesh.
"""
