"""The diffusion process as pure functions of arrays.

It defines the forward process and the prediction target (process), the distribution of noise
levels in training (density), the noise levels of sampling (grid), the loss and the samplers.

It must not depend on networks, parameters, devices or configs. A network is a callable
`denoise_fn(z, logsnr, cond)`.

Symbols (Appendix A of the paper): `x` clean image in [-1, 1], `z` noisy image, `eps` noise, `t`
time in [0, 1], `logsnr` = lambda_t = log(alpha_t^2 / sigma_t^2), one value per sample.
"""
