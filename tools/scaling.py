r"""Plans one config on growing numbers of chips and shows the scaling efficiency.

    python -m tools.scaling --config configs/base_64.py --chip v5p --chips 8,64,512,2048 \
        --rows 8 --output plans/scaling_base
    python -m tools.scaling --config configs/base_64.py --chip v5p --chips 64,256,1024 \
        --batch 2048 --output plans/scaling_base_2048

--rows fixes the images per chip, --batch the images per step. Each size is planned by
`imagen_jax.plan`: the step is compiled for it, and its collectives are read from the compiled
program. Their time is their bytes over the links' bandwidth, without latency or congestion. Blocks
take the compiler's estimates. Slices of v5e and v6e have at most 256 chips; larger sizes are
several slices over the data-center network.

Efficiency is images/s per chip, relative to the first size. It is given twice: with parameter
all-gathers overlapped with compute and exposed gradient reductions, as in `plan`, and without any
overlap ("in turn"). Plans are kept in --output and not computed again.
"""

import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from imagen_jax import cli, output_paths
from imagen_jax.hardware import topology
from imagen_jax.pictures import figure_png
from imagen_jax.storage import write_atomically, write_json
from launch import command_line
from launch.job import read_config

log = logging.getLogger("imagen_jax.scaling")
SLICE = 256  # chips of the largest slice of v5e and v6e
PARTS = ("compute_s", "gathers_s", "sums_s", "exposed_traffic_s", "update_s")  # of a plan's "time"


def define_flags(values: flags.FlagValues) -> None:
    """The flags of `python -m tools.scaling`."""
    flags.DEFINE_string(
        "config",
        None,
        "configs/NAME.py or configs/NAME.py:ARG; its fields as --config.mesh.spatial=2",
        required=True,
        flag_values=values,
    )
    flags.DEFINE_enum("chip", "v5p", ("v4", "v5e", "v5p", "v6e"), "chip", flag_values=values)
    flags.DEFINE_string(
        "chips",
        "8,16,32,64,128,256,512,1024,2048",
        "numbers of chips, comma-separated",
        flag_values=values,
    )
    flags.DEFINE_integer("rows", None, "images per chip", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("batch", None, "images per step", lower_bound=1, flag_values=values)
    flags.mark_flags_as_mutual_exclusive(["rows", "batch"], required=True, flag_values=values)
    flags.DEFINE_string(
        "output",
        None,
        "directory for plans, scaling.json and scaling.png",
        required=True,
        flag_values=values,
    )
    flags.DEFINE_string(
        "cache", "~/.cache/imagen_jax/plan", "directory for block costs", flag_values=values
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit code."""
    return command_line.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    options, fields = command_line.parse(argv, define_flags, __doc__)
    for field in fields:
        if not field.startswith("--config.") or "=" not in field:
            raise ValueError(
                f"{field!r} is not an option; write config fields as --config.mesh.spatial=2"
            )
        if field.startswith("--config.data.batch_size="):
            sys.exit(cli.fail("--config.data.batch_size: the batch follows from --rows or --batch"))
    cli.log_to_stderr()
    output_paths.check_directory("output", options.output)
    sizes = options.chips.split(",")
    if not all(text.isascii() and text.isdigit() and int(text) for text in sizes):
        raise ValueError(f"--chips {options.chips}: give whole numbers above 0, such as 8,64,512")
    config = read_config(options.config, ["--config.data.path=none", *fields])
    for chips in sizes:
        slices_of(options.chip, int(chips))
    os.environ["IMAGEN_JAX_PARENT"] = str(os.getpid())  # plans end with this process
    rows = compared([planned(options, fields, config, int(chips)) for chips in sizes])
    output = Path(options.output)
    write_json(output / "scaling.json", rows)
    batch = f"{options.rows} images a chip" if options.rows else f"{options.batch} images a step"
    title = " ".join([config["name"], *fields]) + f", {batch}"
    write_atomically(output / "scaling.png", picture(rows, title))
    print(f"{title}\n{table(rows)}")
    return 0


def slices_of(chip: str, chips: int) -> topology.Topology:
    """A topology of one slice, or of several slices of v5e or v6e.

    Raises ValueError for a number of chips that no slices have.
    """
    if chip in ("v4", "v5p"):
        name = f"{chip}-{2 * chips}"  # cores
    elif chips > SLICE and chips % SLICE:
        raise ValueError(f"--chips {chips}: more than one slice of {chip} is a multiple of {SLICE}")
    else:
        name = f"{chip}-{chips}" if chips <= SLICE else f"{chips // SLICE}x{chip}-{SLICE}"
    try:
        return topology.parse(name)
    except ValueError as error:
        raise ValueError(
            f"--chips {chips}: {str(error).removeprefix(f'--topology {name}: ')}"
        ) from error


def fsdp_on(mesh: Mapping[str, int], target: topology.Topology) -> int:
    """The config's fsdp, or its largest divisor that fits a slice with the other axes.

    -1, which means all remaining chips, stays -1.
    """
    if mesh["fsdp"] == -1:
        return -1
    columns = math.prod(mesh[axis] for axis in ("model", "spatial") if mesh[axis] != -1)
    return math.gcd(mesh["fsdp"], max(1, target.chips // target.slices // columns))


def planned(
    options: flags.FlagValues, fields: Sequence[str], config: Mapping[str, Any], chips: int
) -> dict[str, Any]:
    """The config's plan on a number of chips, read from --output if it exists there."""
    batch = options.batch or options.rows * chips
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
    name = f"{config['name']}_{digest}_{options.chip}_{chips}_{batch}"
    directory = Path(options.output) / name
    slices = slices_of(options.chip, chips)
    if (fsdp := fsdp_on(config["mesh"], slices)) != config["mesh"]["fsdp"]:
        log.info(
            "%s: mesh.fsdp is %d, because %d does not divide the chips",
            slices,
            fsdp,
            config["mesh"]["fsdp"],
        )
    if not is_planned(directory):
        command = [sys.executable, "-m", "imagen_jax.plan", f"--config={options.config}", *fields]
        command += [f"--config.data.batch_size={batch}", f"--config.mesh.fsdp={fsdp}"]
        command += [f"--topology={slices}", f"--cache={options.cache}", f"--output={directory}"]
        code = cli.call((*command, "--nosampler"))
        if code not in (0, 1):
            raise ValueError(
                f"the plan of {batch} images on {chips} chips failed with exit code {code}"
            )
    plan = json.loads((directory / "plan.json").read_text())
    if "time" not in plan:
        raise ValueError(
            f"{batch} images do not fit {chips} chips of {options.chip}: leave out that size"
        )
    return plan


def is_planned(directory: Path) -> bool:
    """Whether the directory has a plan with all parts of the step time.

    Plans of earlier versions lack some parts. A plan that does not fit has no time at all.
    """
    if not (directory / "plan.json").exists():
        return False
    time = json.loads((directory / "plan.json").read_text()).get("time")
    return time is None or set(PARTS) < set(time)


def compared(plans: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each plan, with its efficiency relative to the first."""
    rows = []
    for plan in plans:
        time = plan["time"]
        row = {name: plan[name] for name in ("chips", "topology", "mesh", "batch")}
        row["mfu"] = time["mfu"]
        rows.append(row | {part: time[part] for part in (*PARTS, "step_s", "in_turn_s")})
    rate = lambda row, seconds: row["batch"] / row["chips"] / row[seconds]
    return [
        row
        | {
            f"efficiency_{name}": rate(row, s) / rate(rows[0], s)
            for name, s in (("beside", "step_s"), ("in_turn", "in_turn_s"))
        }
        for row in rows
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        (
            "| chips | topology | images a step | compute | gathers | sums | other | update | MFU |"
            " efficiency | in turn |"
        ),
        "|" + "---|" * 11,
    ]
    for row in rows:
        times = [f"{1e3 * row[part]:.1f} ms" for part in PARTS]
        shares = [
            f"{100 * row[name]:.1f} %"
            for name in ("mfu", "efficiency_beside", "efficiency_in_turn")
        ]
        lines.append(
            "| "
            + " | ".join([str(row["chips"]), row["topology"], str(row["batch"]), *times, *shares])
            + " |"
        )
    return "\n".join(lines)


def picture(rows: Sequence[dict[str, Any]], title: str) -> bytes:
    """A PNG: efficiency by chips."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    chips = [row["chips"] for row in rows]
    for name, label in (
        ("beside", "parameter all-gathers overlapped with compute"),
        ("in_turn", "no overlap"),
    ):
        axis.plot(chips, [100 * row[f"efficiency_{name}"] for row in rows], "o-", label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(chips, [str(n) for n in chips])
    axis.set_ylim(0, 110)
    axis.set_xlabel(f"chips ({rows[0]['topology'].partition(':')[0]})")
    axis.set_ylabel("images a second a chip, % of the first")
    axis.set_title(title)
    axis.legend()
    return figure_png(figure)


if __name__ == "__main__":
    sys.exit(main())
