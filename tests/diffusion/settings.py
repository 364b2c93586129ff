"""Settings of `sampler.sample` for the tests, from config fields."""

from imagen_jax.diffusion.process import Path
from imagen_jax.stage import drawing

PLAIN = {
    "method": "ddim", "steps": 4, "grid": "t", "grid_logsnr": (-8.764, 12.429), "grid_rho": 7.0, "gamma": 0.0,
    "w": 1.0, "w_interval": (-20.0, 20.0), "threshold": "none", "percentile": 99.5,
}  # fmt: skip


def settings(schedule="cosine", prediction="x", process="vp", **sampling):
    """Keyword arguments of `sampler.sample`."""
    section = PLAIN | sampling
    assert section.keys() == PLAIN.keys()
    rules = drawing(section, schedule)
    levels = rules.pop("grid")(section["steps"])
    return rules | {"levels": levels, "process": Path(process, prediction)}
