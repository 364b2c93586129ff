"""A plan as text and as a picture."""

from collections.abc import Iterator, Mapping
from typing import Any

from imagen_jax.pictures import figure_png
from imagen_jax.planning import text_report
from imagen_jax.planning.amounts import amount

Plan = Mapping[str, Any]
GIB = 2**30
# Above this share of the limit, a program that fits at level O0 may not fit at the default level.
NEAR = 0.95


def text(plan: Plan) -> str:
    """The plan for a terminal, one section after another."""
    sections = (
        _head,
        _memory,
        text_report.online,
        _time,
        text_report.comparison,
        _modules,
        _memory_traffic,
        _collectives,
        _sampler,
        _advice,
    )
    return "\n".join(line for section in sections for line in section(plan))


def _scaled(value: float, units: tuple[str, ...], base: float) -> str:
    """A number in the largest unit in which it is at least 1, such as "1.50 GiB"."""
    for unit in units[:-1]:
        if value < base:
            return f"{value:.2f} {unit}"
        value /= base
    return f"{value:,.2f} {units[-1]}"


def _size(size: float) -> str:
    """Bytes in binary units."""
    return _scaled(size, ("B", "KiB", "MiB", "GiB"), 1024)


def _bytes_moved(size: float) -> str:
    """Bytes of traffic in decimal units, as bandwidths are stated."""
    return _scaled(size, ("B", "kB", "MB", "GB"), 1000)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.3f} ms" if seconds < 1e-3 else f"{1e3 * seconds:,.2f} ms"


def _flop(flops: float) -> str:
    return _scaled(flops / 1e6, ("MFLOP", "GFLOP", "TFLOP", "PFLOP"), 1000)


def _verdict(row: Plan) -> str:
    return "fits" if row["fits"] else "DOES NOT FIT"


def _head(plan: Plan) -> Iterator[str]:
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan["mesh"].items() if size > 1)
    flops, accumulation = plan["flops"], plan["accumulation"]
    chips = f"{plan['chips']} chips, mesh {mesh}" if mesh else "1 chip"
    yield f"{plan['config']} on {plan['topology']}: {chips}"
    yield f"  parameters   {plan['parameters']:,}"
    yield (
        f"  batch        {plan['batch']:,} images per step, {plan['batch'] / plan['chips']:g} per"
        f" chip, {accumulation} accumulation step{'s' * (accumulation > 1)}"
    )
    if len(plan.get("buckets", ())) > 1:
        yield (
            f"  image sizes  {len(plan['buckets'])} buckets; all numbers are for steps on the one"
            f" with the most pixels, {plan['planned_size']}"
        )
    yield f"  remat        {plan['remat']}"
    yield (
        f"  model FLOPs  {_flop(flops['per_image'])} per image, {_flop(flops['per_step'])} per"
        f" step, {_flop(flops['per_chip_and_step'])} per chip and step"
    )
    if "overrides" in plan:
        yield (
            f"  The config as given needs {_size(plan['asked']['peak'])} per chip and does not fit."
            f" This plan is for {options(plan['overrides'])}"
        )


def _memory(plan: Plan) -> Iterator[str]:
    memory = plan["memory"]
    excess = f" by {_size(memory['peak'] - memory['limit'])}" if not memory["fits"] else ""
    yield (
        f"\nMemory per chip: {_size(memory['peak'])} of {_size(memory['limit'])},"
        f" {_verdict(memory)}{excess}"
    )
    for part, size in memory["parts"].items():
        yield f"  {part:<13} {_size(size):>12}"
    if memory["level"] == "O0":
        yield "  Compiled at the compiler's fast level, O0. Where both were measured, its peak was"
        yield "  0.97 to 1.35 times the default level's (BENCHMARKS.md); --exact uses the default."
        if NEAR * memory["limit"] < memory["peak"] <= memory["limit"]:
            yield f"  WARNING: above {100 * NEAR:.0f} % of the limit; check with --exact"
    if plan["platform"] == "cuda":
        yield "  Not included: convolution workspaces, collective buffers and the driver's context."
        yield "  The limit reserves memory for them."
    for line in plan["not_split"]:
        yield f"  WARNING: not sharded: {line}"


def _time(plan: Plan) -> Iterator[str]:
    if "time" not in plan:
        return
    time = plan["time"]
    kinds = ", ".join(
        f"{100 * seconds / time['compute_s']:.1f} % {kind}"
        for kind, seconds in time["kinds_s"].items()
    )
    rate = amount(time["images_per_s_per_chip"], 2)
    yield (
        f"\nPredicted step time: {_ms(time['step_s'])}, {rate} images/s per chip,"
        f" MFU {100 * time['mfu']:.1f} %"
    )
    for name, part, note in (
        ("compute", "compute_s", kinds),
        ("parameter all-gathers", "gathers_s", "overlapped with compute"),
        ("gradient reductions", "sums_s", "exposed"),
        ("other communication", "exposed_traffic_s", "exposed"),
        ("parameter update", "update_s", "optimizer and EMA"),
        ("text encoding", "encode_s", "before the step (text.online)"),
    ):
        if part in time:
            yield f"  {name:<22} {_ms(time[part]):>12}   {note}"
    yield (
        f"  With gradient reductions overlapped as well: {_ms(time['at_best_s'])}; with no overlap:"
        f" {_ms(time['in_turn_s'])}"
    )
    share = time["roofline_share_of_compute"]
    if share > 5e-5:
        yield (
            f"  The compiler has no estimate for {100 * share:.2f} % of the compute time; a"
            " roofline is used there."
        )
    yield from _check(plan)
    cost = plan["cost"]
    money = f", {amount(cost['money'], 0)} at the given price" if "money" in cost else ""
    yield (
        f"  {cost['steps']:,} steps: {amount(cost['hours'])} hours,"
        f" {amount(cost['chip_hours'])} chip-hours{money}"
    )


def _check(plan: Plan) -> Iterator[str]:
    """The comparison with the whole step compiled at the default level (--exact)."""
    if "check" not in plan:
        return
    check = plan["check"]
    whole, parts = check["whole_s"], check["parts_s"]
    yield (
        f"  Check, without kernels and collectives: sum of blocks and update {_ms(parts)}, whole"
        f" step {_ms(whole)} ({100 * (parts / whole - 1):+.1f} %)"
    )
    yield (
        f"  Check of the whole step: {100 * check['gathers_beside']:.0f} % of the all-gather time"
        f" and {100 * check['sums_beside']:.0f} % of the gradient-reduction time are overlapped"
        " with compute"
    )


def _modules(plan: Plan) -> Iterator[str]:
    if "places" not in plan:
        return
    yield "\nMost expensive modules: time per step, share of compute (xN: N equal modules together)"
    for row in plan["places"]:
        yield f"  {_ms(row['seconds']):>12} {100 * row['share']:5.1f} %   {_module(row)}"


def _module(row: Plan) -> str:
    return row["place"] + (f" (x{row['others'] + 1})" if row["others"] else "")


def _memory_traffic(plan: Plan) -> Iterator[str]:
    if "memory_traffic" not in plan:
        return
    traffic = plan["memory_traffic"]
    yield (
        f"\nDevice-memory traffic per chip and step: {_bytes_moved(traffic['bytes'])} read and"
        f" written, {_ms(traffic['seconds'])} at full bandwidth"
    )
    if plan["platform"] == "tpu":
        yield "  Lower bound: a sum over separate blocks, without all-gathered parameters."


def _collectives(plan: Plan) -> Iterator[str]:
    if not plan.get("collectives"):
        return
    yield "\nCollectives per step (bytes of the largest array on each chip, time on the links)"
    for row in plan["collectives"]:
        yield (
            f"  {row['kind']:<19} over {' and '.join(row['axes']) or '-':<16} {row['count']:6d} x"
            f" {_bytes_moved(row['bytes']):>10} {_ms(row['seconds']):>12}"
        )


def _sampler(plan: Plan) -> Iterator[str]:
    if "sampler" in plan:
        sampler = plan["sampler"]
        yield (
            f"\nSampling during training: {sampler['rows']} images at once, {sampler['steps']}"
            f" sampling steps, {_size(sampler['peak'])} per chip, {_verdict(sampler)}"
        )
        yield (
            f"  {_size(sampler['beside'])} of it: parameters, optimizer state and batch of the"
            " training, which stay in memory"
        )
    if "whole_images" in plan:
        images = plan["whole_images"]
        advice = (
            "" if images["fits"] else "; split each image over chips with --config.mesh.spatial"
        )
        yield (
            f"\nSampling of full images of {images['size']} pixels after training: {images['rows']}"
            f" at once, {_size(images['peak'])} per chip, {_verdict(images)}{advice}"
        )


def _advice(plan: Plan) -> Iterator[str]:
    if plan.get("tried"):
        yield "\nTried by --search:"
    for row in plan.get("tried", []):
        yield (
            f"  {options(row['overrides'])}: {_size(row['peak'])} (estimate was"
            f" {_size(row['estimated_peak'])})"
        )
    if "advice" not in plan:
        return
    yield "\nChanges that need less memory, in the order to try them (--search compiles them):"
    limit = plan["memory"]["limit"]
    for row in plan["advice"]:
        verdict = "would fit" if row["estimated_peak"] <= limit else "not enough"
        yield f"  {options(row['overrides'])}: about {_size(row['estimated_peak'])}, {verdict}"
    if not plan["advice"] or plan["advice"][-1]["estimated_peak"] > limit:
        yield "  None is enough: use more chips, chips with more memory or a smaller model."


def options(overrides: Plan) -> str:
    """Overrides as command-line flags."""
    return " ".join(f"--config.{field}={value}" for field, value in overrides.items())


def picture(plan: Plan) -> bytes:
    """A PNG of the memory against its limit, the parts of the step and the expensive modules."""
    from matplotlib.figure import Figure

    timed = "time" in plan
    figure = Figure(figsize=(16 if timed else 6, 5), layout="constrained")
    axes = figure.subplots(
        1, 3 if timed else 1, width_ratios=[1.3, 1.3, 2.2] if timed else None, squeeze=False
    )[0]
    memory = plan["memory"]
    _stack(axes[0], {part: size / GIB for part, size in memory["parts"].items()}, "GiB per chip")
    axes[0].axhline(memory["limit"] / GIB, color="black", linestyle="--")
    axes[0].text(-0.45, memory["limit"] / GIB, " limit", va="bottom")
    axes[0].set_title("fits" if memory["fits"] else "does not fit")
    if timed:
        _stack(axes[1], _step_parts(plan["time"]), "ms per step")
        axes[1].set_title(f"MFU {100 * plan['time']['mfu']:.1f} %")
        rows = plan["places"][::-1]
        axes[2].barh(
            [_module(row) for row in rows], [1e3 * row["seconds"] for row in rows], color="#4477aa"
        )
        axes[2].set_xlabel("ms per step")
        axes[2].set_title("most expensive modules")
    figure.suptitle(f"{plan['config']} on {plan['topology']}, batch {plan['batch']}")
    return figure_png(figure)


def _step_parts(time: Mapping[str, Any]) -> dict[str, float]:
    """The parts of a step in ms. They add up to the step.

    Where all-gathers take longer than compute, the kinds of compute are scaled to their time.
    """
    scale = max(time["compute_s"], time["gathers_s"]) / time["compute_s"]
    return (
        {kind: 1e3 * scale * seconds for kind, seconds in time["kinds_s"].items()}
        | {
            "gradient reductions": 1e3 * time["sums_s"],
            "other communication": 1e3 * time["exposed_traffic_s"],
            "optimizer, EMA": 1e3 * time["update_s"],
        }
        | ({"text encoding": 1e3 * time["encode_s"]} if "encode_s" in time else {})
    )


def _stack(axis: Any, parts: Mapping[str, float], label: str) -> None:
    """One stacked bar with a legend of its parts and their sizes."""
    base = 0.0
    for name, value in parts.items():
        axis.bar([0], [value], bottom=base, width=0.9, label=f"{name} {value:.2f}")
        base += value
    axis.set_xticks([])
    axis.set_xlim(-0.5, 2.2)
    axis.set_ylabel(label)
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], fontsize=7, loc="center right")
