"""A copy of a training's log in Weights & Biases, if train.wandb asks for it.

No failure of W&B ends the training: it is a warning, and the log goes on without W&B. metrics.jsonl
and validation.jsonl are the record.
"""

import contextlib
import importlib.util
import json
import logging
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from imagen_jax.object_storage import AnyPath, in_bucket
from imagen_jax.storage import read_object, write_json

PROJECT = re.compile(r"(?:([^/\s]+)/)?([^/\s]+)")  # PROJECT or ENTITY/PROJECT
RUN = "wandb.json"  # in the workdir: the identifier of its run in W&B
INIT_S, FINISH_S = 60.0, 300.0  # the longest wait for W&B at the start and at the end
log = logging.getLogger(__name__)


def check(project: str) -> None:
    """Raises ValueError if train.wandb is not valid, or needs a package that is missing.

    project: train.wandb; "" for no W&B.
    """
    if not project:
        return
    if not PROJECT.fullmatch(project):
        raise ValueError(f"train.wandb is {project!r}; give PROJECT or ENTITY/PROJECT")
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"train.wandb is {project!r}, which needs the extra `wandb`: pip install -e"
            " '.[wandb]', or set train.wandb to ''"
        )


class WandbLog:
    """A run of W&B with the rows, pictures and config of a training. A context manager.

    Every process of a training continues the same run. Its charts have the row's "step" as x axis,
    not W&B's own counter, which never goes back: W&B would drop the rows that a resumed training
    writes again.
    """

    def __init__(self, workdir: AnyPath, project: str, config: Mapping[str, Any]):
        """project: train.wandb; "" makes every method do nothing, for all other processes too."""
        self._workdir, self._project, self._config = workdir, project, config
        self._run: Any = None
        self._local: tempfile.TemporaryDirectory | None = None

    def row(self, row: Mapping[str, float]) -> None:
        """Sends a row of metrics or of a validation."""
        self._try(lambda run: run.log(dict(row)))

    def image(self, step: int, name: str, image: Any) -> None:
        """Sends a picture, uint8 [h w 3]."""

        def send(run: Any) -> None:
            import wandb

            run.log({"step": step, name: wandb.Image(image)})

        self._try(send)

    def __enter__(self) -> "WandbLog":
        if self._project:
            with self._warnings():
                self._start()
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self._try(lambda run: run.finish(exit_code=0 if kind is None else 1))
        self._run = None
        if self._local:
            with contextlib.suppress(OSError):
                self._local.cleanup()

    def _start(self) -> None:
        import wandb

        if in_bucket(self._workdir):
            self._local = tempfile.TemporaryDirectory()
        entity, project = PROJECT.fullmatch(self._project).groups()
        run = wandb.init(
            entity=entity,
            project=project,
            id=run_id(self._workdir),
            name=self._workdir.name,
            resume="allow",
            config=json.loads(json.dumps(self._config)),
            dir=self._local.name if self._local else os.fspath(self._workdir),
            settings=wandb.Settings(console="off", init_timeout=INIT_S, finish_timeout=FINISH_S),
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        self._run = run

    def _try(self, call: Callable[[Any], Any]) -> None:
        """Calls a function with the run, if there is one; after an error, there is none."""
        if self._run is not None:
            with self._warnings():
                call(self._run)

    @contextlib.contextmanager
    def _warnings(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._run = None
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            log.warning("W&B: %s; the training goes on without it", reason)


def run_id(workdir: AnyPath) -> str:
    """The identifier of a workdir's run in W&B, made at the first call."""
    path = workdir / RUN
    with contextlib.suppress(FileNotFoundError):
        return read_object(path, {"id": str}, "delete it")["id"]
    made = secrets.token_hex(8)
    write_json(path, {"id": made})
    return made
