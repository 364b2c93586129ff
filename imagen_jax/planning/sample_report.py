"""The plan of a cascade as text."""

from collections.abc import Iterator, Mapping
from typing import Any

from imagen_jax import stage_sizes
from imagen_jax.hardware.chips import GIB
from imagen_jax.planning.amounts import amount

Plan = Mapping[str, Any]


def text(plan: Plan) -> str:
    """The plan for a terminal."""
    return "\n".join(line for part in (_head, _memory, _times, _advice) for line in part(plan))


def encoder_rows(plan: Plan) -> list[Plan]:
    """The rows of the text encoders that are planned: a single one, or those with names."""
    return [row for row in (plan["encoder"], *plan.get("encoders", {}).values()) if row]


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _verdict(row: Plan) -> str:
    return "fits" if row["fits"] else "DOES NOT FIT"


def _head(plan: Plan) -> Iterator[str]:
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan["mesh"].items() if size > 1)
    chips = f"{plan['chips']} chips, mesh {mesh}" if mesh else "1 chip"
    stages = ", ".join(row["name"] for row in plan["stages"])
    yield f"Sampling {stages} on {plan['topology']}: {chips}, {plan['batch']:,} images per batch"


def _memory(plan: Plan) -> Iterator[str]:
    yield f"\nMemory in GiB per chip, limit {_gib(plan['limit'])}"
    for encoder in encoder_rows(plan):
        shards = f", in {encoder['parts']} shards" if encoder["parts"] > 1 else ""
        yield (
            f"  text encoder {encoder['name']}, {encoder['rows']} prompts of {encoder['tokens']}"
            f" tokens: {_gib(encoder['peak'])}{shards}, {_verdict(encoder)}; freed before sampling"
        )
    where = (
        "the parameters of all stages stay on the chips"
        if plan["resident"]
        else "stages are placed on the chips one after the other"
    )
    yield f"  {where}: {_gib(plan['parameters'])} together"
    yield f"  {'stage':<6} {'network':<14} {'parameters':>10} {'other stages':>12} {'peak':>6}"
    for row in plan["stages"]:
        yield (
            f"  {row['stage']:<6} {row['name']:<14} {_gib(row['parameter_bytes']):>10}"
            f" {_gib(row['other_parameters']):>12} {_gib(row['peak']):>6}  {_verdict(row)}"
        )
    if plan["level"] == "O0":
        yield "  Compiled at the compiler's fast level, O0: the peaks are approximate."
    if plan["platform"] == "cuda":
        yield "  Not included: convolution workspaces, collective buffers and the driver's context."
        yield "  The limit reserves memory for them."


def _times(plan: Plan) -> Iterator[str]:
    rows = [row for row in plan["stages"] if "time" in row]
    if not rows:
        return
    is_bound = rows[0]["time"]["is_bound"]
    yield f"\nTimes, {plan['pictures']:,} pictures, without text encoding and file writing"
    if is_bound:
        yield "  ROOFLINE BOUNDS, not estimates: XLA:GPU provides no cycle estimates. A batch takes"
        yield "  at least the larger of FLOPs at peak and memory traffic at full bandwidth. Rates"
        yield "  are upper bounds (<), times are lower bounds (>)."
    yield (
        f"  {'stage':<8} {'pixels':>9} {'steps':>5} {'evaluations':>11} {'TFLOP/image':>11}"
        f" {'s/batch':>9} {'images/s/chip':>13} {'MFU':>6} {'hours':>9} {'chip-hours':>10}"
    )
    less, more = ("<", ">") if is_bound else ("", "")
    for row in rows:
        time, cost = row["time"], row["cost"]
        count, size = row["evaluations"] + row["guided"], stage_sizes.short(tuple(row["size"]))
        yield (
            f"  {row['stage']:<8} {size:>9} {row['steps']:>5} {count:>11}"
            f" {row['flops_per_image'] / 1e12:>11.1f} {more + amount(time['seconds'], 2):>9}"
            + _cost(cost, less, more, f"{less}{100 * time['utilization']:.0f} %")
        )
    if "cost" in plan:
        cost = plan["cost"]
        yield f"  {'cascade':<8} {'':>59}" + _cost(cost, less, more, "").removeprefix(" ")
        if "money" in cost:
            yield f"  {more}{amount(cost['money'], 2)} for all pictures at the given price"
    yield from _parts(rows)


def _cost(cost: Plan, less: str, more: str, utilization: str) -> str:
    """The last columns of a row."""
    rate = less + amount(cost["images_per_s_per_chip"], 3)
    hours = more + amount(cost["hours"], 2)
    chip_hours = more + amount(cost["chip_hours"], 1)
    return f" {rate:>13} {utilization:>6} {hours:>9} {chip_hours:>10}"


def _parts(rows: list[Plan]) -> Iterator[str]:
    """The parts of the time of each stage."""
    yield "  evaluations: a guided evaluation counts twice"
    for row in rows:
        time = row["time"]
        kinds = ", ".join(
            f"{kind} {amount(seconds, 2)} s" for kind, seconds in time["kinds_s"].items()
        )
        collectives = time["overlapped_s"] + time["exposed_s"]
        exposed = (
            f"; collectives {amount(collectives, 2)} s, of which"
            f" {amount(time['exposed_s'], 2)} s exposed"
            if collectives
            else ""
        )
        yield f"  {row['stage']:<8} per batch: {kinds}{exposed}"
        if time["roofline_share_of_compute"] > 5e-3:
            yield (
                f"  {'':<8} the compiler has no estimate for"
                f" {100 * time['roofline_share_of_compute']:.1f} % of it; a roofline is used there"
            )


def _advice(plan: Plan) -> Iterator[str]:
    """Changes that help if a stage does not fit."""
    wrong = [row for row in plan["stages"] if not row["fits"]]
    if not wrong:
        return
    yield "\nChanges that need less memory:"
    for row in wrong:
        if row["largest_batch"]:
            yield (
                f"  {row['stage']}: a batch of about {row['largest_batch']:,} images would fit:"
                f" --config.batch_size={row['largest_batch']}"
            )
        else:
            yield (
                f"  {row['stage']}: no batch size would fit; shard the parameters with"
                " --config.mesh.fsdp or the image height with --config.mesh.spatial"
            )
