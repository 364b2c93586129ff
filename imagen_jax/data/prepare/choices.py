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
    heading = f"  {'* chosen':<24}{'size':>12}{'time':>12}"
    print(heading + (f"{'per month':>14}" if price else ""))
    for choice in choices:
        time = "unknown" if choice.seconds is None else _time(choice.seconds)
        row = f"{'*' if choice.chosen else ' '} {choice.name:<24}"
        row += f"{size_text(choice.bytes):>12}{time:>12}"
        print(row + (f"{_number(choice.bytes / 2**30 * price):>14}" if price else ""))
    if price:
        print(f"price     {price:g} per GiB and month")


def size_text(size: float) -> str:
    """The size in KiB, MiB, GiB or TiB, with its unit."""
    unit = min(max(int(math.log2(max(size, 1)) // 10), 1), 4)
    return f"{size / 2 ** (10 * unit):,.1f} {('KiB', 'MiB', 'GiB', 'TiB')[unit - 1]}"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 360 else f"{_number(seconds / 3600)} h"


def _number(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.3f}"
