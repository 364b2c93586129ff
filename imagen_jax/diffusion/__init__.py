"""The diffusion process as pure functions of arrays.

It defines how noise is added (process), which noise levels are trained on (density) and which ones
the sampler visits (grid), what the network predicts, and how samples are drawn.

It must not know networks, parameters, devices or configs. A network is a callable `denoise_fn(z,
logsnr, cond)`.

Symbols (Appendix A of the paper): `x` clean image in [-1, 1], `z` noisy image, `eps` noise, `t`
time in [0, 1], `logsnr` = lambda_t = log(alpha_t^2 / sigma_t^2), one value per sample.
"""
