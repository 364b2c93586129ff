"""Whether prepared data has the text features that a stage reads."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imagen_jax.text_inputs import UNNAMED, TextInput


@dataclasses.dataclass(frozen=True)
class StoredTexts:
    """The text features of prepared data at `path`.

    encoders: {name: identity}; {"": identity} for a single unnamed one, {} for texts alone.
    longest: {name: tokens of the longest caption}.
    """

    path: Path
    encoders: Mapping[str, Mapping[str, Any]]
    longest: Mapping[str, int]

    @property
    def names(self) -> str:
        """The names of the encoders, for a message."""
        return ", ".join(self.encoders)

    def check(self, inputs: Sequence[TextInput]) -> None:
        """Raises ValueError unless the data has all of these inputs.

        An input of dim 0 has any width.
        """
        for one in inputs:
            self.check_named(one.name)
            if one.dim:
                self._check_width(one)
                self._check_pooled(one)
            self._check_length(one)

    def check_named(self, name: str) -> None:
        """Raises ValueError unless there are features of the encoder of this name."""
        if name in self.encoders:
            return
        if not self.encoders:
            raise ValueError(
                f"{self.path} has only the texts of its captions, no features: set text.online ="
                " True, or prepare with --encoder"
            )
        if name == UNNAMED:
            raise ValueError(
                f"{self.path} has features of the named text encoders {self.names}, but the config"
                " has no names: set text.encoders, and text.dim = 0"
            )
        if UNNAMED in self.encoders:
            raise ValueError(
                f"{self.path} has features of one unnamed text encoder"
                f" ({self.encoders[UNNAMED]['name']}), but text.encoders asks for {name}: set"
                f" text.encoders = () and text.dim, or prepare with --encoder {name}=..."
            )
        raise ValueError(
            f"{self.path} has no features of a text encoder {name}, but of {self.names}: set"
            f" text.encoders, or prepare with --encoder {name}=..."
        )

    def _check_width(self, one: TextInput) -> None:
        identity = self.encoders[one.name]
        found, who = identity["dim"], identity["name"]
        if found == one.dim:
            return
        if one.name == UNNAMED:
            raise ValueError(
                f"{self.path} has text features of width {found} ({who}), but the"
                f" config asks for {one.dim}: use the config's text encoder"
            )
        raise ValueError(
            f"{self.path} has {one.name} features of width {found} ({who}), but text.dims asks for"
            f" {one.dim}: set text.dims, or use the config's text encoder"
        )

    def _check_pooled(self, one: TextInput) -> None:
        found = self.encoders[one.name].get("pooled_dim", 0)
        if one.pooled_dim in (0, found):
            return
        has = f"pooled {one.name} vectors of width {found}" if found else f"no pooled {one.name}"
        raise ValueError(
            f"{self.path} has {has}{'' if found else ' vectors'}, but text.pooled_dims asks for"
            f" {one.pooled_dim}: set it to {found}, or use another text encoder"
        )

    def _check_length(self, one: TextInput) -> None:
        """Truncating stored features would be wrong: the encoder attends to the whole text, so the
        first features of a text differ from the features of the truncated text.
        """
        longest, length = self.longest[one.name], one.length
        if longest <= length:
            return
        whose, field = ("", "data.text_length")
        if one.name != UNNAMED:
            whose, field = f" of {one.name}", "text.lengths"
        raise ValueError(
            f"{self.path} has captions of up to {longest} tokens{whose}, but {field} is"
            f" {length}: prepare with --max_length {length} or raise {field}"
        )
