"""The interface of a source of captioned images, and the discovery of sources by name.

A source is one module of this folder, and its name is the kind: `folder.py` opens
`--source folder:DIR`. The module has

    USAGE                      the value of `--source`, for messages: "folder:DIR"
    open_source(name, args)    opens it; `name` is the text after the colon, `args` the flags
    define_flags(values)       optional: defines the flags of this kind, named after it
    HAS_METADATA               optional: True if it takes `--where`
    HAS_SHARDS                 optional: True if it has `open_source(name, args, index)`, see
                               `shard_index`

A new kind of source is one new file here; no other file names it.
"""

import dataclasses
import hashlib
import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol, runtime_checkable

from absl import flags

from imagen_jax.data import sources
from imagen_jax.data.sources.shard_index import ShardIndex


class Fault(NamedTuple):
    """Why an item cannot be used: a reason of skipped.jsonl, and details."""

    reason: str
    detail: str


@dataclasses.dataclass(frozen=True)
class SourceItem:
    """One image as the source has it.

    image: encoded bytes, None if the file is missing. split: "train" or "heldout". fault: set if
    the source cannot read a part of the item.
    """

    id: str
    image: bytes | None
    captions: list[str]
    split: str
    fault: Fault | None = None


@runtime_checkable
class Source(Protocol):
    """Captioned images by index.

    A damaged item has a fault and raises nothing, so that it costs only itself. An error that
    another attempt may not meet, such as a file system that does not answer, is raised.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> SourceItem: ...

    def describe(self) -> dict[str, Any]:
        """JSON for the manifest; equal for equal items."""
        ...

    def notes(self) -> list[dict[str, Any]]:
        """Lines for skipped.jsonl on files that are not items: "id", "reason" and details.

        A "count" in a line says how many files it stands for; without it, one.
        """
        ...


def hashed_split(item_id: str, heldout: float) -> str:
    """Returns "heldout" for the fraction `heldout` of all ids, else "train".

    It depends on the id alone, so it is the same on every machine and in every order.
    """
    fraction = int.from_bytes(hashlib.sha256(item_id.encode()).digest()[:8], "big") / 2**64
    return "heldout" if fraction < heldout else "train"


def kinds() -> dict[str, ModuleType]:
    """Returns {kind: module} for the modules of this folder that open a source."""
    names = [module.name for module in pkgutil.iter_modules(sources.__path__)]
    modules = {name: importlib.import_module(f"{sources.__name__}.{name}") for name in names}
    return {
        name: module
        for name, module in modules.items()
        if hasattr(module, "open_source") and name != "source"
    }


def define_flags(values: flags.FlagValues) -> None:
    """Defines `--source`, `--heldout` and the flags of every kind of source."""
    usages = ", ".join(module.USAGE for module in kinds().values())
    flags.DEFINE_string("source", None, f"{usages}; required", required=True, flag_values=values)
    flags.DEFINE_float(
        "heldout",
        0.0,
        "fraction of images for the held-out split, chosen by id",
        flag_values=values,
    )
    flags.DEFINE_string(
        "where",
        "",
        'condition on the metadata of items, for sources that have some: "width >= 256 and punsafe'
        ' < 0.1"',
        flag_values=values,
    )
    for module in kinds().values():
        if hasattr(module, "define_flags"):
            module.define_flags(values)


def open_source(
    args: flags.FlagValues, index: Path | None = None, read_only: bool = False
) -> Source:
    """Opens the source that `args.source` names.

    index: the file of a `shard_index.ShardIndex`, which makes the next opening of a source of
    shards fast; other sources ignore it. read_only: reads it only.

    Raises:
      ValueError: there is no such kind, or the source cannot be opened.
    """
    kind, _, name = args.source.partition(":")
    modules = kinds()
    takes_name = kind in modules and ":" in modules[kind].USAGE
    if kind not in modules or takes_name != bool(name):
        usages = [module.USAGE for module in modules.values()]
        raise ValueError(
            f"--source {args.source!r} is not {', '.join(usages[:-1])} or {usages[-1]}"
        )
    if getattr(args, "where", "") and not getattr(modules[kind], "HAS_METADATA", False):
        raise ValueError(
            f"--where needs metadata, which a {kind} source does not have: leave it out"
        )
    if index and getattr(modules[kind], "HAS_SHARDS", False):
        return modules[kind].open_source(name, args, ShardIndex(index, read_only))
    return modules[kind].open_source(name, args)
