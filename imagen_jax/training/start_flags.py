"""The flags that choose the start of a new run. This module does not import jax."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from imagen_jax.object_storage import AnyPath
from imagen_jax.storage import as_path


@dataclasses.dataclass(frozen=True)
class Start:
    """The start of a new run: the command-line flags of these names.

    init_from: weights, as for `cascade.resolve`, copied to parameters and every EMA; "" for random
        ones.
    init_part: regular expression. Only the weights of `init_from` whose paths it matches somewhere
        are taken; all others are initialised.
    fork: WORKDIR@STEP, or WORKDIR for its newest step: the whole state is copied, with optimizer
        and EMAs. The run continues at that step.
    """

    init_from: str = ""
    init_part: str = ""
    fork: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError for flags that exclude each other, and an invalid `init_part`."""
        if self.fork and self.init_from:
            raise ValueError("--fork copies a whole state: omit --init_from")
        if self.init_part and not self.init_from:
            raise ValueError("--init_part needs --init_from, the weights to take a part of")
        try:
            re.compile(self.init_part)
        except re.error as error:
            raise ValueError(
                f"--init_part {self.init_part!r} is not a regular expression: {error}"
            ) from error
        if not self.init_from.startswith("embedded:"):
            as_path("--init_from", self.init_from)
        as_path("--fork", self.fork)

    def check_origin(self, origin: Mapping[str, Any], workdir: AnyPath) -> None:
        """Raises ValueError unless a run with this origin is the one that these flags start.

        A resume may leave the flags out.
        """
        for flag, path in (("init_from", self.init_from), ("fork", self.fork)):
            if path and origin.get(flag, {}).get("path") != path:
                raise ValueError(
                    f"{workdir} holds a run that did not start from --{flag} {path}; give a new"
                    " --workdir"
                )
        if self.init_part and origin["init_from"].get("part", "") != self.init_part:
            raise ValueError(
                f"{workdir} holds a run that started with another --init_part; give a new --workdir"
            )
