"""The interface of a source of captioned images, and the discovery of sources by name.

A source is one module of this folder, and its name is the kind: `--source folder:DIR` is opened by
`folder.py`. The module has

    USAGE                      what follows `--source`, for messages: "folder:DIR"
    open_source(name, args)    the source; `name` is what stands after the colon, `args` the options
    add_options(parser)        only if the kind has options of its own

so a new kind of source is one new file here, and nothing else learns its name.
"""

import argparse
import dataclasses
import hashlib
import importlib
import pkgutil
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

from imagen_jax.data import sources


@dataclasses.dataclass(frozen=True)
class SourceItem:
    """One image as the source has it: id, encoded bytes (None if the file is missing), captions,
    train or heldout.
    """

    id: str
    image: bytes | None
    captions: list[str]
    split: str


@runtime_checkable
class Source(Protocol):
    """What prepare_data needs of a source."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> SourceItem: ...

    def describe(self) -> dict[str, Any]: ...


def hashed_split(item_id: str, heldout: float) -> str:
    """`heldout` for that fraction of all ids, the same ids on every machine and in every order,
    else `train`.
    """
    place = int.from_bytes(hashlib.sha256(item_id.encode()).digest()[:8], "big") / 2**64
    return "heldout" if place < heldout else "train"


def kinds() -> dict[str, ModuleType]:
    """{kind: the module that opens it}, one for each module of this folder but this one."""
    names = (module.name for module in pkgutil.iter_modules(sources.__path__))
    found = {name: importlib.import_module(f"{sources.__name__}.{name}") for name in names}
    return {
        name: module
        for name, module in found.items()
        if hasattr(module, "open_source") and name != "source"
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--source`, `--heldout` and the options of every kind of source."""
    usages = ", ".join(module.USAGE for module in kinds().values())
    parser.add_argument("--source", required=True, help=usages)
    parser.add_argument(
        "--heldout",
        type=float,
        default=0.0,
        help="fraction of images for the held-out split, chosen by id",
    )
    for module in kinds().values():
        if hasattr(module, "add_options"):
            module.add_options(parser)


def open_source(args: argparse.Namespace) -> Source:
    """The source that `args.source` names. Raises ValueError if there is no such kind, or it cannot
    be opened.
    """
    kind, _, name = args.source.partition(":")
    known = kinds()
    takes_name = kind in known and ":" in known[kind].USAGE
    if kind not in known or takes_name != bool(name):
        usages = [module.USAGE for module in known.values()]
        raise ValueError(
            f"--source {args.source!r} is not {', '.join(usages[:-1])} or {usages[-1]}"
        )
    return known[kind].open_source(name, args)
