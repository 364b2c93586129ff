"""A plan as text and as a picture."""

from collections.abc import Iterator, Mapping
from typing import Any

from imagen_jax.pictures import figure_png

Plan = Mapping[str, Any]
GIB = 2**30
NEAR = 0.95  # of the limit: above it a program that fits at level O0 may not at the default


def text(plan: Plan) -> str:
    """The plan for a terminal, one section after another."""
    return "\n".join(
        line
        for section in (
            _head,
            _memory,
            _time,
            _places,
            _memory_traffic,
            _traffic,
            _sampler,
            _advice,
        )
        for line in section(plan)
    )


def _head(plan: Plan) -> Iterator[str]:
    mesh = (
        ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
        or "one device"
    )
    flops = plan["flops"]
    yield (
        f"{plan['config']}: {plan['parameters']:,} parameters on {plan['topology']},"
        f" {plan['chips']} chips ({mesh})"
    )
    yield (
        f"batch {plan['batch']} in {plan['accumulation']} part(s),"
        f" {plan['batch'] / plan['chips']:g} images a chip, remat {plan['remat']}"
    )
    yield (
        f"{flops['per_image'] / 1e12:.3f} TFLOP an image, {flops['per_step'] / 1e15:.3f} PFLOP a"
        f" step, {flops['per_chip_and_step'] / 1e12:.2f} TFLOP a chip"
    )
    if "overrides" in plan:
        yield (
            f"as asked it needs {plan['asked']['peak'] / GIB:.2f} GiB and does not fit; this is"
            " with " + options(plan["overrides"])
        )


def _memory(plan: Plan) -> Iterator[str]:
    memory = plan["memory"]
    over = memory["peak"] - memory["limit"]
    verdict = "fits" if memory["fits"] else f"DOES NOT FIT, {over / GIB:.2f} GiB too much"
    yield (
        f"\nmemory of a chip: {memory['peak'] / GIB:.2f} of {memory['limit'] / GIB:.2f} GiB,"
        f" {verdict} (compile level {memory['level']})"
    )
    if memory["level"] == "O0":
        yield (
            "  O0 gives 0.97 to 1.35 times the default level's peak where both were compiled"
            " (BENCHMARKS.md); --exact for the default"
        )
        if NEAR * memory["limit"] < memory["peak"] <= memory["limit"]:
            yield "  TOO NEAR THE LIMIT to be sure: use --exact"
    if plan["platform"] == "cuda":
        yield (
            "  without workspaces of convolutions, buffers of collectives and the driver's context,"
            " for which the limit leaves room"
        )
    for part, size in memory["parts"].items():
        yield f"  {part:<14} {size / GIB:8.3f} GiB"
    for line in plan["not_split"]:
        yield f"  not split: {line}"


def _time(plan: Plan) -> Iterator[str]:
    if "time" not in plan:
        return
    time, cost = plan["time"], plan["cost"]
    yield (
        f"\npredicted step: {1e3 * time['step_s']:.0f} ms, MFU {100 * time['mfu']:.1f} %,"
        f" {time['images_per_s_per_chip']:.2f} images/s a chip"
    )
    yield (
        f"  compute {1e3 * time['compute_s']:.1f} ms, and beside it gathers of parameters,"
        f" {1e3 * time['gathers_s']:.1f} ms; then in turn sums of gradients"
    )
    yield (
        f"  {1e3 * time['sums_s']:.1f} ms, other traffic {1e3 * time['exposed_traffic_s']:.1f} ms,"
        f" optimizer and EMA {1e3 * time['update_s']:.1f} ms"
    )
    yield (
        f"  were sums too beside the compute, {1e3 * time['at_best_s']:.0f} ms; were nothing,"
        f" {1e3 * time['in_turn_s']:.0f} ms"
    )
    yield "  compute: " + ", ".join(
        f"{100 * s / time['compute_s']:.1f} % {kind}" for kind, s in time["kinds_s"].items()
    )
    yield (
        "  without the compiler's estimate, by roofline:"
        f" {100 * time['roofline_share_of_compute']:.2f} % of compute"
    )
    if "check" in plan:
        whole, parts = plan["check"]["whole_s"], plan["check"]["parts_s"]
        yield (
            f"  check: the whole step {1e3 * whole:.1f} ms, blocks and update {1e3 * parts:.1f} ms"
            f" ({100 * (parts / whole - 1):+.1f} %), without kernels and collectives"
        )
        beside = [100 * plan["check"][f"{part}_beside"] for part in ("gathers", "sums")]
        yield (
            f"  check: the whole step runs {beside[0]:.0f} % of the gathers and {beside[1]:.0f} %"
            " of the sums beside what computes"
        )
    money = f", {cost['money']:,.0f} at the price given" if "money" in cost else ""
    yield (
        f"{cost['steps']:,} steps: {cost['hours']:,.0f} hours, {cost['chip_hours']:,.0f}"
        f" chip-hours{money}"
    )


def _places(plan: Plan) -> Iterator[str]:
    if "places" not in plan:
        return
    yield "\nmost expensive places (ms a step, all equal ones together)"
    for row in plan["places"]:
        yield f"  {1e3 * row['seconds']:8.2f} {100 * row['share']:5.1f} %  {_place(row)}"


def _place(row: Plan) -> str:
    return row["place"] + (f" and {row['others']} more" if row["others"] else "")


def _memory_traffic(plan: Plan) -> Iterator[str]:
    if "memory_traffic" not in plan:
        return
    found = plan["memory_traffic"]
    yield (
        f"\nread and written in a chip's memory: {found['bytes'] / 1e9:.2f} GB a step,"
        f" {1e3 * found['seconds']:.1f} ms at its full bandwidth"
    )
    if plan["platform"] == "tpu":
        yield (
            "  at least: of each block by itself, without gathered parameters and what a block"
            " finds left on the chip"
        )


def _traffic(plan: Plan) -> Iterator[str]:
    if not plan.get("collectives"):
        return
    yield "\ncollectives of a step (bytes of the largest array, on each chip)"
    for row in plan["collectives"]:
        yield (
            f"  {row['kind']:<19} {' and '.join(row['axes']) or '-':<16} {row['count']:6d} x"
            f" {row['bytes'] / 1e9:9.3f} GB {1e3 * row['seconds']:9.2f} ms"
        )


def _sampler(plan: Plan) -> Iterator[str]:
    if "sampler" in plan:
        found = plan["sampler"]
        verdict = "fits" if found["fits"] else "DOES NOT FIT"
        yield (
            f"\nsample grids during training: {found['rows']} images of {found['steps']} steps at"
            f" once, {found['peak'] / GIB:.2f} GiB a chip, {verdict}"
        )
        yield (
            f"  {found['beside'] / GIB:.2f} GiB of that are parameters, optimizer and batch of the"
            " training, which stay; the rest are EMA and the sampler's arrays"
        )
    if "whole_images" in plan:
        found = plan["whole_images"]
        verdict = (
            "fits"
            if found["fits"]
            else "DOES NOT FIT: more chips for each with --config.mesh.spatial"
        )
        yield (
            f"whole images of {found['size']} pixels, {found['rows']} at once, without a training"
            f" beside: {found['peak'] / GIB:.2f} GiB a chip, {verdict}"
        )


def _advice(plan: Plan) -> Iterator[str]:
    for row in plan.get("tried", []):
        yield (
            f"  tried {options(row['overrides'])}: {row['peak'] / GIB:.2f} GiB (estimated"
            f" {row['estimated_peak'] / GIB:.2f})"
        )
    if "advice" not in plan:
        return
    yield "\nwhat would need less, in the order to try it (--search compiles them):"
    for row in plan["advice"]:
        fits = "would fit" if row["estimated_peak"] <= plan["memory"]["limit"] else "not enough"
        yield f"  {options(row['overrides'])}: about {row['estimated_peak'] / GIB:.2f} GiB, {fits}"
    if not plan["advice"] or plan["advice"][-1]["estimated_peak"] > plan["memory"]["limit"]:
        yield "  none of these is enough: more chips, chips with more memory, or a smaller model"


def options(overrides: Plan) -> str:
    """Overrides as a command line has them."""
    return " ".join(f"--config.{field}={value}" for field, value in overrides.items())


def picture(plan: Plan) -> bytes:
    """A PNG: memory against the limit, where the step's time goes, the most expensive places."""
    from matplotlib.figure import Figure

    timed = "time" in plan
    figure = Figure(figsize=(16 if timed else 6, 5), layout="constrained")
    axes = figure.subplots(
        1, 3 if timed else 1, width_ratios=[1.3, 1.3, 2.2] if timed else None, squeeze=False
    )
    memory = plan["memory"]
    _stack(axes[0, 0], {part: size / GIB for part, size in memory["parts"].items()}, "GiB a chip")
    axes[0, 0].axhline(memory["limit"] / GIB, color="black", linestyle="--")
    axes[0, 0].text(-0.45, memory["limit"] / GIB, " limit", va="bottom")
    axes[0, 0].set_title("fits" if memory["fits"] else "does not fit")
    if timed:
        time = plan["time"]
        share = max(time["compute_s"], time["gathers_s"]) / time["compute_s"]
        parts = {kind: 1e3 * share * s for kind, s in time["kinds_s"].items()}
        parts |= {
            "sums of gradients": 1e3 * time["sums_s"],
            "other traffic": 1e3 * time["exposed_traffic_s"],
            "optimizer, EMA": 1e3 * time["update_s"],
        }
        _stack(axes[0, 1], parts, "ms a step")
        axes[0, 1].set_title(f"MFU {100 * time['mfu']:.1f} %")
        rows = plan["places"][::-1]
        axes[0, 2].barh(
            [_place(row) for row in rows], [1e3 * row["seconds"] for row in rows], color="#4477aa"
        )
        axes[0, 2].set_xlabel("ms a step")
        axes[0, 2].set_title("most expensive places")
    figure.suptitle(f"{plan['config']} on {plan['topology']}, batch {plan['batch']}")
    return figure_png(figure)


def _stack(axis: Any, parts: Mapping[str, float], label: str) -> None:
    """One stacked bar, its parts named with their size in the legend."""
    base = 0.0
    for name, value in parts.items():
        axis.bar([0], [value], bottom=base, width=0.9, label=f"{name} {value:.2f}")
        base += value
    axis.set_xticks([])
    axis.set_xlim(-0.5, 2.2)
    axis.set_ylabel(label)
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], fontsize=7, loc="center right")
