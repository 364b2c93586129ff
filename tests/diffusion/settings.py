"""Keyword arguments of `sampler.sample` for the tests, from config fields."""

from configs import defaults
from imagen_jax.diffusion.process import GaussianProcess
from imagen_jax.stage import sampling_rules

# The defaults of the configs, without guidance and threshold, with four deterministic steps.
PLAIN = defaults.sampling() | {
    "method": "ddim",
    "steps": 4,
    "gamma": 0.0,
    "w": 1.0,
    "threshold": "none",
}


def settings(schedule="cosine", prediction="x", process="vp", **sampling):
    """Keyword arguments of `sampler.sample`."""
    section = PLAIN | sampling
    assert section.keys() == PLAIN.keys()
    rules = sampling_rules(section, schedule)
    levels = rules.pop("grid")(section["steps"])
    return rules | {"levels": levels, "process": GaussianProcess(process, prediction)}
