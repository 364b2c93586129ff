"""The settings of an evaluation of a cascade on a prompt suite, checked as far as files allow."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from imagen_jax import picture_set
from imagen_jax.evals import image_metrics
from imagen_jax.evals.networks import clip_text, network
from imagen_jax.evals.real_images import PreparedImages, RealImages
from imagen_jax.evals.suites import Suite

Identities = Mapping[str, Mapping[str, Any]]  # of networks, by name


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of an evaluation.

    config: a complete cascade config. stages: the stages to run, from base on.
    suite: the prompts. per_prompt: pictures per prompt. seed: of the first picture.
    networks: {name: path of its weights}. metrics: their names, [] for all that apply.
    images: size in pixels -> the real images; None without a reference. references: files of other
        references.
    gallery: size in pixels -> the images among which the captioned one is to be found; only for a
        suite of prepared data.
    requests: the pictures to draw. Raises ValueError if they need invalid seeds.
    """

    config: Mapping[str, Any]
    stages: Sequence[str]
    suite: Suite
    per_prompt: int
    seed: int
    networks: Mapping[str, str]
    metrics: Sequence[str]
    images: Callable[[int], RealImages] | None
    references: Sequence[str] = ()
    gallery: Callable[[int], PreparedImages] | None = None
    requests: picture_set.Requests = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        texts = [prompt.text for prompt in self.suite.prompts]
        requests = picture_set.Requests(texts, self.per_prompt, self.seed)
        object.__setattr__(self, "requests", requests)

    def facts(self) -> dict[str, Any]:
        """The settings that must be the same in all processes, by the names of the flags."""
        return {
            "--cascade": dict(self.config),
            "--stages": list(self.stages),
            "--suite": dict(self.suite.identity),
            "--per_prompt": self.per_prompt,
            "--seed": self.seed,
            "--network": list(self.networks),
            "--metrics": list(self.metrics),
            "real images": self.images is not None,
            "--reference": list(self.references),
        }

    @property
    def prompt_of_row(self) -> Int[np.ndarray, " n"]:
        """The index of the prompt of each picture."""
        return np.repeat(np.arange(len(self.suite.prompts)), self.per_prompt)


def check_networks(settings: Settings) -> Identities:
    """The identities of the networks, of a CLIP with that of its text tower as "captions".

    Raises ValueError for weights that do not fit, a metric without network, and the like.
    """
    found = {}
    for name, path in settings.networks.items():
        found[name] = dict(network.load(name, path).identity)
        if name in image_metrics.CLIP:
            found[name]["captions"] = dict(clip_text.load(name, path).identity)
    for metric in settings.metrics:
        if not set(image_metrics.METRICS[metric].networks) & set(settings.networks):
            raise ValueError(
                f"--metrics {metric} needs one of the networks"
                f" {', '.join(image_metrics.METRICS[metric].networks)}: give --network NAME=PATH"
            )
    return found
