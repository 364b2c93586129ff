r"""How training would scale, on paper: the same config planned on ever more chips of a kind, and
what of each chip's rate is left.

    python -m tools.scaling --config configs/base_64.py --chip v5p --chips 8,64,512,2048 \
        --rows 8 --output plans/scaling_base
    python -m tools.scaling --config configs/base_64.py --chip v5p --chips 64,256,1024 \
        --batch 2048 --output plans/scaling_base_2048

--rows keeps the images a chip, --batch those a step. Every size is planned as `imagen_jax.plan`
does: the whole step compiled for it, its collectives read from the compiled program, their bytes
over the links' bandwidth (nothing for latency or congestion; slices of v5e and v6e have 256 chips,
more are joined by the data-centre network), blocks by the compiler's estimates. Efficiency is
images a second a chip over those of the first size: as `plan` has it, gathers of parameters beside
the compute as long as it lasts and sums of gradients after it, and "in turn", nothing beside
anything. What was planned is kept in --output, and not planned again.
"""

import argparse
import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imagen_jax import cli
from imagen_jax.hardware import topology
from imagen_jax.pictures import figure_png
from imagen_jax.storage import write_atomically, write_json
from launch.job import read_config

log = logging.getLogger("imagen_jax.scaling")
SLICE = 256  # chips of the largest slice of v5e and v6e
PARTS = ("compute_s", "gathers_s", "sums_s", "exposed_traffic_s", "update_s")  # of a plan's "time"


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--config",
        required=True,
        help="configs/NAME.py or configs/NAME.py:ARG; its fields as --config.mesh.spatial=2",
    )
    parser.add_argument("--chip", default="v5p", choices=("v4", "v5e", "v5p", "v6e"))
    parser.add_argument(
        "--chips", default="8,16,32,64,128,256,512,1024,2048", help="sizes, comma-separated"
    )
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--rows", type=int, help="images a chip")
    size.add_argument("--batch", type=int, help="images a step")
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        help="directory for plans, scaling.json and scaling.png",
    )
    parser.add_argument(
        "--cache", default="~/.cache/imagen_jax/plan", help="directory for block costs"
    )
    args, args.fields = parser.parse_known_args(argv)
    if strange := [
        option for option in args.fields if not option.startswith("--config.") or "=" not in option
    ]:
        parser.error(
            f"{strange[0]!r} is no option; fields of the config are written --config.mesh.spatial=2"
        )
    if any(field.startswith("--config.data.batch_size=") for field in args.fields):
        parser.error("--config.data.batch_size: the batch follows from --rows or --batch")
    cli.log_to_stderr()
    cli.check_directory("output", str(args.output))
    if (args.rows or args.batch or 0) < 1 or not all(
        text.isascii() and text.isdigit() and int(text) for text in args.chips.split(",")
    ):
        raise ValueError(
            f"--chips {args.chips}"
            f" {f'--rows {args.rows}' if args.batch is None else f'--batch {args.batch}'}: sizes"
            " are whole numbers above 0, chips such as 8,64,512"
        )
    config = read_config(args.config, ["--config.data.path=none", *args.fields])
    sizes = [int(text) for text in args.chips.split(",")]
    for chips in sizes:
        slices_of(args.chip, chips)
    os.environ["IMAGEN_JAX_PARENT"] = str(os.getpid())  # plans end with this process
    found = [planned(args, config, chips) for chips in sizes]
    rows = compared(found)
    write_json(args.output / "scaling.json", rows)
    title = " ".join([config["name"], *args.fields])
    title += f", {args.rows} images a chip" if args.rows else f", {args.batch} images a step"
    write_atomically(args.output / "scaling.png", picture(rows, title))
    print(f"{title}\n{table(rows)}")
    return 0


def slices_of(chip: str, chips: int) -> topology.Topology:
    """One slice, or several of v5e and v6e. Raises ValueError for a number of chips that no slices
    have.
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


def fsdp_on(mesh: Mapping[str, int], place: topology.Topology) -> int:
    """The config's own fsdp, or the most of it that divides what the other axes leave of a slice;
    -1 stays what is left.
    """
    if mesh["fsdp"] == -1:
        return -1
    columns = math.prod(mesh[axis] for axis in ("model", "spatial") if mesh[axis] != -1)
    return math.gcd(mesh["fsdp"], max(1, place.chips // place.slices // columns))


def planned(args: argparse.Namespace, config: Mapping[str, Any], chips: int) -> dict[str, Any]:
    """The plan of the config on so many chips, read if it was made before for the same config."""
    batch = args.batch or args.rows * chips
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
    directory = args.output / f"{config['name']}_{digest}_{args.chip}_{chips}_{batch}"
    place = slices_of(args.chip, chips)
    if (fsdp := fsdp_on(config["mesh"], place)) != config["mesh"]["fsdp"]:
        log.info(
            "%s: mesh.fsdp is %d, as %d does not divide the chips",
            place,
            fsdp,
            config["mesh"]["fsdp"],
        )
    if not made(directory):
        fields = [*args.fields, f"--config.data.batch_size={batch}", f"--config.mesh.fsdp={fsdp}"]
        options = [
            f"--topology={place}",
            f"--cache={args.cache}",
            f"--output={directory}",
            "--nosampler",
        ]
        if (
            code := cli.call(
                (
                    sys.executable,
                    "-m",
                    "imagen_jax.plan",
                    f"--config={args.config}",
                    *fields,
                    *options,
                )
            )
        ) not in (0, 1):
            raise ValueError(
                f"the plan of {batch} images on {chips} chips ended with exit code {code}"
            )
    found = json.loads((directory / "plan.json").read_text())
    if "time" not in found:
        raise ValueError(
            f"{batch} images do not fit {chips} chips of {args.chip}: leave out that size"
        )
    return found


def made(directory: Path) -> bool:
    """Whether there is a plan already, and one with all parts of the time if it has a time: those
    of earlier versions have not.
    """
    if not (directory / "plan.json").exists():
        return False
    time = json.loads((directory / "plan.json").read_text()).get("time")
    return time is None or set(PARTS) < set(time)


def compared(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each plan, with its efficiency against the first."""
    rows = []
    for one in found:
        time = one["time"]
        row = {
            "chips": one["chips"],
            "topology": one["topology"],
            "mesh": one["mesh"],
            "batch": one["batch"],
            "mfu": time["mfu"],
        }
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
    """Markdown."""
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
        ("beside", "gathers of parameters beside the compute"),
        ("in_turn", "nothing beside it"),
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
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(cli.fail("interrupted, the same command continues", 130))
    except (ValueError, OSError) as error:
        sys.exit(cli.fail(str(error)))
