"""The arms of an ablation file, and the processes that train and evaluate them."""

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imagen_jax import field, schema
from imagen_jax.object_storage import AnyPath
from imagen_jax.storage import as_path, exists, read_json, read_object
from launch.job import is_bucket_url, mounted

# Fields of `data` that are options of evaluate too.
SHARD_CACHE = ("shard_cache_dir", "shard_cache_gib")
FINISHED = "finished.json"  # the command of a finished process, in its directory


@dataclasses.dataclass(frozen=True)
class Arm:
    """One setting of an ablation: dotted config fields, without "config.", and their values."""

    name: str
    overrides: Mapping[str, Any]

    @property
    def training(self) -> dict[str, Any]:
        """The fields that the training depends on."""
        fields = self.overrides.items()
        return {name: value for name, value in fields if not name.startswith("sampling.")}

    @property
    def sampling(self) -> dict[str, Any]:
        """The fields of `sampling`, without "sampling."."""
        return sampling_of(self.overrides)


def sampling_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `sampling` among dotted fields, without "sampling."."""
    prefix = "sampling."
    return {
        field.removeprefix(prefix): value
        for field, value in fields.items()
        if field.startswith(prefix)
    }


@dataclasses.dataclass(frozen=True)
class Ablation:
    """A sweep's arms and settings, as the command line gives them.

    config: the ablation file, FILE.py or FILE.py:ARG.
    workdir: directory of all runs.
    seeds: each arm runs once per seed.
    shared: config fields of all arms, as text.
    checkpoint: a trained model that all arms evaluate; empty to train.
    measures: comma-separated names of measures; empty for all that apply.
    rows, samples: images per split to measure on and to sample for; 0 samples: as many as rows.
    """

    config: str
    workdir: AnyPath
    seeds: tuple[int, ...] = (0,)
    shared: Mapping[str, str] = dataclasses.field(default_factory=dict)
    checkpoint: str = ""
    measures: str = ""
    rows: int = 256
    samples: int = 0

    def evaluation(self, arm: Arm, seed: int) -> AnyPath:
        """The directory of the evaluation of an arm for one seed."""
        return self.workdir / arm.name / f"seed_{seed}" / "evaluation"


@dataclasses.dataclass(frozen=True)
class Task:
    """A process of a sweep, which trains or evaluates: display name, command, directory."""

    label: str
    command: tuple[str, ...]
    directory: AnyPath

    @property
    def trains(self) -> bool:
        """Whether the process trains; otherwise it evaluates."""
        return "imagen_jax.train" in self.command

    @property
    def finished(self) -> bool:
        """Whether the process is finished. Raises ValueError if another command wrote here."""
        marker = self.directory / FINISHED
        if not exists(marker):
            return False
        remedy = f"remove {self.directory}, and run the same command again"
        recorded, command = read_json(marker, remedy), list(self.command[1:])
        if not isinstance(recorded, list) or not all(isinstance(word, str) for word in recorded):
            raise ValueError(f"{marker} is damaged (it is not a list of words); {remedy}")
        # An earlier version of this sweep may have mounted what is now opened without a mount.
        recorded, command = list(map(mounted, recorded)), list(map(mounted, command))
        evaluation = self.directory / "evaluation.json"
        if recorded != command and not restates(recorded, command, evaluation):
            raise ValueError(
                f"{self.directory} was written by another command: give that command's options, or"
                " another --workdir"
            )
        return True


def restates(recorded: Sequence[str], command: Sequence[str], evaluation: AnyPath) -> bool:
    """Whether two commands differ only in sampling options that do not change the result.

    evaluation: evaluation.json of the recorded command; an option changes nothing if its value is
    the one that was used according to this file. So a sweep that is older than an option resumes,
    unless the option has another value now.
    """
    (rest, sampling), (new_rest, new_sampling) = split_sampling(recorded), split_sampling(command)
    if rest != new_rest or not sampling.keys() <= new_sampling.keys() or not exists(evaluation):
        return False
    remedy = f"remove {evaluation.parent}, and run the same command again"
    result = read_object(evaluation, {"provenance.sampling": dict}, remedy)
    used = result["provenance"]["sampling"]
    used = schema.complete_sampling(used, str(evaluation))
    parsed = {name: field.parse(text, schema.SAMPLING[name]) for name, text in new_sampling.items()}
    return all(used[name] == value for name, value in parsed.items())


def split_sampling(command: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(the command without its sampling options, these options as {field: text})."""
    prefixes = {f"--{flag}=": field for field, flag in schema.EVALUATE_FLAGS.items()}
    rest, sampling = [], {}
    for option in command:
        flag, equals, text = option.partition("=")
        if flag + equals in prefixes:
            sampling[prefixes[flag + equals]] = text
        else:
            rest.append(option)
    return rest, sampling


def load(config: str) -> tuple[Mapping[str, Any], list[Arm]]:
    """(flat config, arms) of an ablation file.

    Raises ValueError if the file has no sweep, or an arm sets a field that does not exist.
    """
    path, _, arg = config.partition(":")
    module = _module(path)
    fields = schema.flat(module.get_config(arg).to_dict())
    arms = []
    for content in module.sweep(arg):
        overrides = {key: value for key, value in content.items() if key != "name"}
        overrides = {key.removeprefix("config."): value for key, value in overrides.items()}
        arms.append(Arm(content["name"], overrides))
    names, counts = np.unique([arm.name for arm in arms], return_counts=True)
    if repeated := [name for name, count in zip(names, counts) if count > 1]:
        raise ValueError(f"{path}: several arms have the name {', '.join(repeated)}")
    for arm in arms:
        check_fields(arm.overrides, fields, f"arm {arm.name} of {path}")
    return fields, arms


def columns_of(config: str) -> tuple[str, ...]:
    """The names in COLUMNS of an ablation file, see `measure.columns`; () for the default columns.

    Raises ValueError if COLUMNS is not a tuple of names.
    """
    path = config.partition(":")[0]
    names = getattr(_module(path), "COLUMNS", ())
    if not isinstance(names, (tuple, list)) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"COLUMNS of {path} is {names!r}; it must be a tuple of names, such as ('loss',)"
        )
    return tuple(names)


def _module(path: str) -> Any:
    """The module of an ablation file. Raises ValueError if the file has no sweep."""
    if not Path(path).is_file():
        raise ValueError(f"--config {path} does not exist")
    spec = importlib.util.spec_from_file_location("ablation", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "sweep"):
        raise ValueError(f"{path} has no sweep(arg): give it to imagen_jax.train, or add sweep")
    return module


def check_fields(overrides: Mapping[str, Any], fields: Mapping[str, Any], source: str) -> None:
    """Raises ValueError if `overrides` sets a field that the config does not have."""
    unknown = sorted(overrides.keys() - fields.keys())
    if unknown:
        raise ValueError(f"{source} sets {', '.join(unknown)}, which the config does not have")


def plan(ablation: Ablation) -> tuple[list[Arm], list[Task]]:
    """(arms, processes): seed by seed, each training before the evaluations that need it.

    Raises ValueError for an invalid combination of fields.
    """
    fields, arms = load(ablation.config)
    shared = ablation.shared
    check_fields(shared, fields, "the command line")
    _check_arms(ablation, arms)
    data = shared.get("data.path") or fields["data.path"]
    if not data:
        raise ValueError(
            "--config.data.path is needed: give a directory made by imagen_jax.prepare_data"
        )
    sampling = sampling_of(shared)
    if ablation.checkpoint:  # a model that is trained here already has the config's settings
        configured = schema.complete_sampling(sampling_of(fields), ablation.config)
        sampling = configured | sampling
    # The place of the shard cache, which is nothing to local data.
    cache = {f: shared.get(f"data.{f}", fields[f"data.{f}"]) for f in SHARD_CACHE}
    reading = {"data": data} | (cache if is_bucket_url(data) else {})
    tasks = []
    for seed in ablation.seeds:
        models: dict[str, AnyPath] = {}
        for arm in arms:
            key = json.dumps(arm.training, sort_keys=True)
            directory = ablation.workdir / arm.name / f"seed_{seed}"
            if ablation.checkpoint:
                models[key] = as_path("--checkpoint", ablation.checkpoint)
            elif key not in models:
                models[key] = directory / "train"
                tasks.append(train_task(ablation, seed, arm, models[key]))
            output = ablation.evaluation(arm, seed)
            tasks.append(evaluate_task(ablation, seed, arm, sampling, models[key], reading, output))
    return arms, tasks


def _check_arms(ablation: Ablation, arms: Sequence[Arm]) -> None:
    """Raises ValueError for fields that conflict, and for arms that --checkpoint excludes."""
    for arm in arms:
        own = arm.overrides.keys()
        if conflicts := sorted(own & ablation.shared.keys() | own & {"seed"}):
            raise ValueError(
                f"{', '.join(conflicts)}: set by arm {arm.name}, so it cannot be set for all arms"
            )
    if "seed" in ablation.shared:
        raise ValueError("give seeds as --seeds 0,1, not as --config.seed")
    if not ablation.checkpoint:
        return
    if any(arm.training for arm in arms):
        raise ValueError(
            "--checkpoint is for ablations of sampling, but the arms of this one are trained"
            " differently"
        )
    if ignored := [f for f in ablation.shared if not f.startswith(("sampling.", "data."))]:
        raise ValueError(
            f"{', '.join(ignored)} changes nothing with --checkpoint, which trains nothing: leave"
            " it out"
        )


def options_of(fields: Mapping[str, Any]) -> list[str]:
    """The fields as options of train."""
    return [f"--config.{field}={value}" for field, value in fields.items()]


def train_task(ablation: Ablation, seed: int, arm: Arm, workdir: AnyPath) -> Task:
    """The training of an arm for one seed."""
    options = options_of({**ablation.shared, **arm.training, "seed": seed})
    files = (f"--config={ablation.config}", f"--workdir={workdir}")
    command = (sys.executable, "-m", "imagen_jax.train", *files, *options)
    return Task(f"train {arm.name}, seed {seed}", command, workdir)


def evaluate_task(
    ablation: Ablation,
    seed: int,
    arm: Arm,
    sampling: Mapping[str, Any],
    checkpoint: AnyPath,
    reading: Mapping[str, Any],
    output: AnyPath,
) -> Task:
    """The evaluation of an arm for one seed.

    sampling: settings of all arms; the arm's own take precedence. reading: the options of evaluate
    that say where the data are. All arms and seeds are evaluated
    on the same rows with the same noise.
    """
    settings = {**sampling, **arm.sampling}
    options = [f"--{schema.EVALUATE_FLAGS[field]}={value}" for field, value in settings.items()]
    options += [f"--rows={ablation.rows}", f"--samples={ablation.samples}"]
    options += [f"--measures={ablation.measures}"] if ablation.measures else []
    paths = {"checkpoint": checkpoint, **reading, "output": output}
    files = [f"--{name}={path}" for name, path in paths.items()]
    command = (sys.executable, "-m", "imagen_jax.evaluate", *files, *options)
    return Task(f"evaluate {arm.name}, seed {seed}", command, output)
