"""A table of choices for prepared data: bytes on disk, hours of preparation, cost of storage."""

import dataclasses
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Choice:
    """One way to store the images or the captions.

    seconds: time of preparation; None if unknown.
    chosen: whether the command line has chosen it.
    """

    name: str
    bytes: float
    seconds: float | None
    chosen: bool


def print_choices(choices: Sequence[Choice], price: float) -> None:
    """Prints one row for each choice, with a star before the chosen ones.

    price: storage price per GiB and month; 0 if unknown, then there is no column of costs.
    """
    heading = f"  {'* chosen':<24}{'bytes':>12}{'hours':>12}"
    print(heading + (f"{'per month':>14}" if price else ""))
    for choice in choices:
        hours = "-" if choice.seconds is None else _number(choice.seconds / 3600)
        row = f"{'*' if choice.chosen else ' '} {choice.name:<24}"
        row += f"{size_text(choice.bytes):>12}{hours:>12}"
        print(row + (f"{_number(choice.bytes / 2**30 * price):>14}" if price else ""))
    if price:
        print(f"price     {price:g} per GiB and month")


def size_text(size: float) -> str:
    """The size in MiB, GiB or TiB, with its unit."""
    unit = min(max(int(math.log2(max(size, 1)) // 10), 2), 4)
    return f"{size / 2 ** (10 * unit):,.1f} {('MiB', 'GiB', 'TiB')[unit - 2]}"


def _number(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.3f}"
