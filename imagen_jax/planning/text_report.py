"""The part of a training's plan that is about text encoders, as text."""

from collections.abc import Iterator, Mapping
from typing import Any

from imagen_jax.data.prepare.choices import size_text
from imagen_jax.hardware.chips import GIB

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
            f"  {row['name']}, {row['tokens']} tokens: {row['weights'] / GIB:.2f} GiB of weights"
            f" per chip, {row['peak'] / GIB:.2f} GiB while it encodes,"
            f" {more}{1e3 * row['seconds']:,.2f} ms per step{note}"
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
    found, rows = costs["online"], costs["rows"]
    less, more = ("<", ">") if found["is_bound"] else ("", "")
    share = f" ({100 * found['share']:.1f} % of a step)" if found["share"] else ""
    yield f"\nStored text features against text.online, with {', '.join(found['names'])}"
    for one in costs["once"]:
        note = "" if one["fits"] else ", DOES NOT FIT"
        yield (
            f"  once    {one['name']}: {less}{one['captions_per_s_per_chip']:,.0f} captions/s per"
            f" chip, padded to {one['tokens']} tokens{note}"
        )
    yield (
        f"  online  {more}{1e3 * found['seconds']:,.2f} ms more per step{share},"
        f" {more}{found['chip_hours']:,.0f} chip-hours in {found['steps']:,} steps,"
        f" {found['weights'] / GIB:.2f} GiB of weights per chip"
    )
    yield (
        f"  {'captions':>15} {'store, bfloat16':>16} {'store, int8':>12} {'once: hours':>12}"
        f" {'chip-hours':>11} {'equal after: steps':>19} {'epochs':>7} {'epochs of the run':>18}"
    )
    for row in rows:
        sizes = [size_text(row["bytes"][name]) for name in ("bfloat16", "int8")]
        hours = [more + _number(row[name]) for name in ("once_hours", "once_chip_hours")]
        yield (
            f"  {row['captions']:>15,} {sizes[0]:>16} {sizes[1]:>12} {hours[0]:>12} {hours[1]:>11}"
            f" {row['break_even_steps']:>19,.0f} {row['break_even_epochs']:>7.2f}"
            f" {row['epochs']:>18.2f}"
        )
    yield f"  Assumed: {costs['tokens']:g} tokens per caption (--caption_tokens), for stores and for"
    yield "  encoding once; online, captions are padded to the length of the input. Stores are"
    yield '  without the texts. A run of more steps or epochs than "equal after" has spent more'
    yield "  chip-hours on encoding online than encoding once would have cost. The price of storage"
    yield "  and the reading of the store are not counted."
    if found["is_bound"]:
        yield '  ROOFLINE BOUNDS, not estimates: XLA:GPU provides no cycle estimates. "Equal after"'
        yield "  compares two bounds, and is itself neither a bound nor an estimate."


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
