"""The networks, in Flax Linen: `unet.UNet` (base stage) and `efficient_unet.EfficientUNet` (SR).

Both are called as `model(z, logsnr, cond)` and return an array of the shape of z. A network must
not depend on time steps, schedules or meshes: it receives `logsnr` and a callable `constrain`,
which it applies to activations at block boundaries.
"""
