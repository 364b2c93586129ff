"""The part of a training's plan that is about text encoders, as text."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from imagen_jax.data.prepare.choices import size_text
from imagen_jax.hardware.chips import GIB
from imagen_jax.planning.amounts import amount

Plan = Mapping[str, Any]


def online(plan: Plan) -> Iterator[str]:
    """Yields the lines about the encoders that run in the training."""
    if "online" not in plan:
        return
    found = plan["online"]
    more = ">" if found["is_bound"] else ""
    shards = f"in {found['shards']} shards" if found["shards"] > 1 else "whole on every chip"
    yield f"\nText encoding in the training (text.online): bfloat16 weights, {shards}"
    for row in found["encoders"]:
        note = "" if row["fits"] else "  DOES NOT FIT"
        yield (
            f"  {row['name']}, {row['tokens']} tokens: {row['weights'] / GIB:.3g} GiB of weights"
            f" per chip, {row['peak'] / GIB:.3g} GiB while it encodes,"
            f" {more}{amount(1e3 * row['seconds'], 2)} ms per step{note}"
        )
    for name in found["unknown"]:
        yield (
            f"  WARNING: the sizes of {name} are unknown, so memory and times do not include it;"
            " give a directory with its config.json"
        )
    if found["is_bound"] and found["encoders"]:
        yield "  ROOFLINE BOUNDS, not estimates: XLA:GPU provides no cycle estimates."


def comparison(plan: Plan) -> Iterator[str]:
    """Yields the lines that compare stored features with encoding in the training."""
    if "text_costs" not in plan:
        return
    costs = plan["text_costs"]
    found = costs["online"]
    less, more = ("<", ">") if found["is_bound"] else ("", "")
    share = f" (+{100 * found['share']:.1f} %)" if found["share"] else ""
    yield f"\nStored text features against text.online, with {', '.join(found['names'])}"
    for one in costs["once"]:
        note = "" if one["fits"] else ", DOES NOT FIT"
        rate = less + amount(one["captions_per_s_per_chip"], 0)
        yield (
            f"  once    {one['name']}: {rate} captions/s per chip, padded to {one['tokens']}"
            f" tokens{note}"
        )
    yield (
        f"  online  {more}{amount(1e3 * found['seconds'], 2)} ms more per step{share},"
        f" {found['weights'] / GIB:.3g} GiB of weights per chip"
    )
    money = f", {more}{amount(found['money'])} at the given price" if "money" in found else ""
    chip_hours = f"{more}{amount(found['chip_hours'])} chip-hours"
    yield f"          {chip_hours} in {found['steps']:,} steps{money}"
    yield from _table(costs["rows"], more)
    for row in costs["rows"] if money else ():
        cost = f"{more}{amount(row['once_money'])} at the given price"
        yield f"  Encoding {row['captions']:,} captions once: {cost}"
    yield f"  Assumed: {costs['tokens']:g} tokens per caption (--caption_tokens), for stores and"
    yield "  encoding once; online, captions are padded to the length of the input. Stores are"
    yield '  without the texts. A run of more steps or epochs than "equal after" spends more'
    yield "  chip-hours on encoding online than encoding once costs. The price of storage and the"
    yield "  reading of the store are not counted."
    if found["is_bound"]:
        yield '  ROOFLINE BOUNDS, not estimates: XLA:GPU provides no cycle estimates. "Equal after"'
        yield "  compares two bounds, and is itself neither a bound nor an estimate."


def _table(rows: Sequence[Plan], more: str) -> Iterator[str]:
    """Yields a heading, and a line for each number of captions. more: ">" if times are bounds."""
    yield f"  {'':>13} {'store:':>10} {'':>10} {'once:':>9} {'':>11} {'equal after:':>12}"
    yield (
        f"  {'captions':>13} {'bfloat16':>10} {'int8':>10} {'hours':>9} {'chip-hours':>11}"
        f" {'steps':>12} {'epochs':>7} {'epochs of run':>14}"
    )
    for row in rows:
        sizes = [size_text(row["bytes"][name]) for name in ("bfloat16", "int8")]
        hours = [more + amount(row[name]) for name in ("once_hours", "once_chip_hours")]
        yield (
            f"  {row['captions']:>13,} {sizes[0]:>10} {sizes[1]:>10} {hours[0]:>9} {hours[1]:>11}"
            f" {amount(row['break_even_steps'], 0):>12} {amount(row['break_even_epochs'], 2):>7}"
            f" {amount(row['epochs'], 2):>14}"
        )
