"""The diffusion process as pure functions of arrays: how noise enters, which noise levels are
trained on (density) and visited in sampling (grid), what a network predicts, how samples are drawn
from noise or an image.

It must not know networks, parameters, devices or configs: a network is a `denoise_fn(z, logsnr,
cond)`.

Symbols (Appendix A of the paper): `x` clean image in [-1, 1], `z` noisy image, `eps` noise, `t` in
[0, 1], `logsnr` = lambda_t = log(alpha_t^2 / sigma_t^2), one value a sample.
"""
