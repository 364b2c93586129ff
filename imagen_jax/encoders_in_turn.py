"""Several text encoders, of which one is in memory at a time."""

from collections.abc import Callable, Mapping
from typing import Any

from imagen_jax.text_inputs import UNNAMED


class Encoders:
    """Text encoders by name: {"": ...} is a single unnamed one, {} stores only the texts.

    Creating it loads each of them for its identity, before any other work.

    is_named: whether texts and features are in stores of their own.
    identities: {name: TextEncoder.identity}, in the order given.
    """

    def __init__(self, loaders: Mapping[str, Callable[[], Any]]):
        """loaders: {name: function that loads the text.encoder.TextEncoder}."""
        self._loaders = dict(loaders)
        self._name: str | None = None
        self._encoder: Any = None
        self.is_named = UNNAMED not in self._loaders
        self.identities = {name: dict(self.load(name).identity) for name in self._loaders}

    @classmethod
    def single(cls, encoder: Any) -> "Encoders":
        """One unnamed encoder that is loaded already."""
        return cls({UNNAMED: lambda: encoder})

    def load(self, name: str) -> Any:
        """The encoder of this name. Frees the one before it, so do not keep a reference to that."""
        if name != self._name:
            self.release()
            self._encoder = self._loaders[name]()
            self._name = name
        return self._encoder

    def release(self) -> None:
        """Frees the encoder in memory; `load` loads it again."""
        self._name, self._encoder = None, None

    def in_turn(self) -> list[str]:
        """The names, that of the encoder in memory first, so that it is not loaded again."""
        return sorted(self._loaders, key=lambda name: name != self._name)
