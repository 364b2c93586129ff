"""Which checkpoints of a run stay: the newest, every K-th, and the best by a validation measure."""

import dataclasses
import datetime
import math
from collections.abc import Mapping, Sequence
from typing import Any

from orbax.checkpoint import v1 as ocp

from imagen_jax.object_storage import AnyPath
from imagen_jax.run_fields import MEASURES
from imagen_jax.weights import step_directories
from imagen_jax.weights.leaves import CheckpointError, read_document

policies = ocp.training.preservation_policies

META = "meta.json"


@dataclasses.dataclass(frozen=True)
class Retention:
    """The settings of these names in the config section `train`.

    keep: number of newest checkpoints to keep.
    keep_every: steps that are multiples of it stay for ever; 0: none.
    keep_best: number of checkpoints to keep with the lowest measure.
    best_by: this measure, one of MEASURES, as a checkpoint's meta has it.
    """

    keep: int
    keep_every: int = 0
    keep_best: int = 0
    best_by: str = MEASURES[0]

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(
                f"keep={self.keep} would delete every checkpoint; it must be at least 1"
            )

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Retention":
        """The retention of a config section `train`.

        Raises ValueError if no checkpoint could be permanent, or have a measure.
        """
        every, validate_every = settings["save_every"], settings["validate_every"]
        if settings["keep_every"] % every:
            raise ValueError(
                f"train.keep_every={settings['keep_every']} is not a multiple of"
                f" train.save_every={every}, so no checkpoint has such a step"
            )
        if settings["keep_best"] and (not validate_every or every % validate_every):
            raise ValueError(
                f"train.keep_best needs a validation at every checkpoint: train.save_every={every}"
                f" must be a multiple of train.validate_every={validate_every}"
            )
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: settings[name] for name in names})

    def to_delete(self, steps: Sequence[int], directory: AnyPath) -> list[int]:
        """The steps to delete, of all intact ones, oldest first. The newest always stays."""
        kinds = [policies.LatestN(self.keep)]
        if self.keep_every:
            kinds.append(policies.EveryNSteps(self.keep_every))
        if self.keep_best:
            best = policies.BestN(
                get_metric_fn=lambda metrics: metrics[self.best_by],
                n=self.keep_best,
                reverse=True,
                keep_checkpoints_without_metrics=False,
            )
            kinds.append(best)
        infos = [_Info(step, self._measure(directory, step)) for step in steps]
        kept = policies.AnyPreservationPolicy(kinds).should_preserve(
            infos, context=policies.PreservationContext()
        )
        return [step for step, stays in zip(steps, kept, strict=True) if not stays]

    def _measure(self, directory: AnyPath, step: int) -> dict[str, float] | None:
        """{measure: its value at a step}; None if it is not needed, unknown or not finite."""
        value = measures(directory, step).get(self.best_by) if self.keep_best else None
        return None if value is None or not math.isfinite(value) else {self.best_by: value}


@dataclasses.dataclass(frozen=True)
class _Info:
    """A checkpoint, as orbax's policies see it."""

    step: int
    metrics: dict[str, float] | None
    time: datetime.datetime = datetime.datetime.min


def measures(directory: AnyPath, step: int) -> dict[str, float]:
    """The validation measures in a checkpoint's meta; {} without a validation at its step."""
    return read_document(directory / str(step) / META)["meta"].get("measures", {})


def best_step(directory: AnyPath) -> int:
    """The step of a checkpoints directory with the lowest measure, train.best_by of its run.

    Raises CheckpointError if no step has a measure.
    """
    found = {}
    for step in step_directories.steps(directory):
        meta = read_document(directory / str(step) / META)["meta"]
        name = meta.get("config", {}).get("train", {}).get("best_by", MEASURES[0])
        value = meta.get("measures", {}).get(name, math.nan)
        if math.isfinite(value):
            found[step] = value
    if not found:
        raise CheckpointError(
            f"no checkpoint in {directory} has a validation measure: set train.validate_every, or"
            " name a step"
        )
    return min(found, key=lambda step: (found[step], -step))
