"""Whether prepared data has the text features that a stage reads."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from imagen_jax.object_storage import AnyPath
from imagen_jax.text_inputs import UNNAMED, TextInput


class OtherText(ValueError):
    """Prepared data lacks text features. fact: what is wrong, without what a training can do."""

    def __init__(self, fact: str, advice: str):
        super().__init__(f"{fact}: {advice}")
        self.fact = fact


@dataclasses.dataclass(frozen=True)
class TextChecks:
    """The text features of prepared data at `path`.

    encoders: {name: identity}; {"": identity} for a single unnamed one, {} for texts alone.
    longest: {name: tokens of the longest caption}.
    """

    path: AnyPath
    encoders: Mapping[str, Mapping[str, Any]]
    longest: Mapping[str, int]

    @property
    def names(self) -> str:
        """The names of the encoders, for a message."""
        return ", ".join(self.encoders)

    def check(self, inputs: Sequence[TextInput]) -> None:
        """Raises OtherText unless the data has all of these inputs.

        An input of dim 0 has any width.
        """
        for text_input in inputs:
            self.check_named(text_input.name)
            if text_input.dim:
                self._check_width(text_input)
                self._check_pooled(text_input)
            self._check_length(text_input)

    def check_named(self, name: str) -> None:
        """Raises OtherText unless there are features of the encoder of this name."""
        if name in self.encoders:
            return
        if not self.encoders:
            raise OtherText(
                f"{self.path} has only the texts of its captions, no features",
                "set text.online = True, or prepare with --encoder",
            )
        if name == UNNAMED:
            raise OtherText(
                f"{self.path} has features of the named text encoders {self.names}, but the config"
                " has no names",
                "set text.encoders, and text.dim = 0",
            )
        if UNNAMED in self.encoders:
            raise OtherText(
                f"{self.path} has features of one unnamed text encoder"
                f" ({self.encoders[UNNAMED]['name']}), but text.encoders asks for {name}",
                f"set text.encoders = () and text.dim, or prepare with --encoder {name}=...",
            )
        raise OtherText(
            f"{self.path} has no features of a text encoder {name}, but of {self.names}",
            f"set text.encoders, or prepare with --encoder {name}=...",
        )

    def _check_width(self, text_input: TextInput) -> None:
        identity = self.encoders[text_input.name]
        found, who = identity["dim"], identity["name"]
        if found == text_input.dim:
            return
        if text_input.name == UNNAMED:
            raise OtherText(
                f"{self.path} has text features of width {found} (encoder {who}), but the"
                f" config asks for {text_input.dim}",
                "use the config's text encoder, or set text.dim",
            )
        raise OtherText(
            f"{self.path} has {text_input.name} features of width {found} (encoder {who}), but"
            f" text.dims asks for {text_input.dim}",
            "set text.dims, or use the config's text encoder",
        )

    def _check_pooled(self, text_input: TextInput) -> None:
        found = self.encoders[text_input.name].get("pooled_dim", 0)
        if not text_input.pooled_dim or found == text_input.pooled_dim:
            return
        has = (
            f"pooled {text_input.name} vectors of width {found}"
            if found
            else f"no pooled {text_input.name}"
        )
        raise OtherText(
            f"{self.path} has {has}{'' if found else ' vectors'}, but text.pooled_dims asks for"
            f" {text_input.pooled_dim}",
            f"set it to {found}, or use another text encoder",
        )

    def _check_length(self, text_input: TextInput) -> None:
        """Truncating stored features would be wrong: the encoder attends to the whole text, so the
        first features of a text differ from the features of the truncated text.
        """
        longest, length = self.longest[text_input.name], text_input.length
        if longest <= length:
            return
        whose = f" of {text_input.name}" if text_input.name else ""
        field = text_input.length_field
        raise OtherText(
            f"{self.path} has captions of up to {longest} tokens{whose}, but {field} is {length}",
            f"prepare with --max_length {length} or raise {field}",
        )
