"""The plan of encoding captions with a text encoder: memory, captions per second, hours.

The compiled program is the encoder's own (`text.program`). Each chip encodes different captions, so
the rate per chip does not depend on the number of chips. Where the weights do not fit on one chip,
they are sharded over a group of chips.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
from jax.sharding import Mesh

from imagen_jax import sharding
from imagen_jax.hardware.chips import GIB
from imagen_jax.hardware.topology import Topology, smallest_shape
from imagen_jax.planning import cost, hlo, links, whole_step
from imagen_jax.planning.cost_cache import COMPILERS, cached
from imagen_jax.planning.step_time import SECONDS_PER_HOUR
from imagen_jax.text import choice as choices
from imagen_jax.text import program, sizes
from imagen_jax.weights.text_encoders import encode_program, one_device, read_network

DTYPE = "bfloat16"


def find_network(name: str, dtype: str = DTYPE) -> nn.Module:
    """The network of a text encoder, by its short name, its directory or its config.json.

    name: of `text.sizes`, or a path, with a choice of features (`text/choice.py`) if any.
    dtype: floating-point type of the weights.

    Raises ValueError if there is no such encoder or its family is not supported.
    """
    name, choice = choices.parse(name)
    if name in sizes.SIZES:
        return sizes.network(name, dtype, choice)
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        raise ValueError(
            f"--text_encoder {name!r} is not one of {', '.join(sizes.SIZES)}, and not a directory"
            " with an encoder's config.json"
        )
    return read_network(path, dtype, choice)


def plan_encoder(
    network: nn.Module, topology: Topology, lengths: Sequence[int], batch_size: int, captions: int
) -> dict[str, Any]:
    """The plan of encoding captions.

    Times on TPUs are the compiler's estimates at its default level. For GPUs, which have no
    estimates, they are lower bounds: FLOPs and weights at the chip's peak rates.

    Args:
        network: the encoder.
        topology: the hardware.
        lengths: caption lengths in tokens, at most the longest that the encoder can read.
        batch_size: captions of up to 32 tokens per chip and batch, as in prepare_data.
        captions: number of captions to report hours for, or 0.

    Returns a dict; "weights" are bytes, "parts" is the number of chips that the weights are sharded
    over, "passes" has an entry for each length.
    """
    chip = topology.chip
    longest = network.config.max_length or max(lengths)
    lengths = list(dict.fromkeys(min(length, longest) for length in lengths))
    shapes = program.parameter_shapes(network, DTYPE)
    weights = program.weight_bytes(shapes)
    group, mesh = _group(topology, weights)
    encode = encode_program(network, shapes, mesh)
    # FLOPs are counted in the program for a single device.
    single = encode_program(network, shapes, one_device(weights))
    passes = []
    for length in lengths:
        rows = max(1, batch_size * 32 // max(length, 32))
        flops = single.lower(rows, length).cost_analysis()["flops"]
        passes.append(
            _pass(encode, mesh, group, weights, flops, rows, length)
            | {"tokens": length, "rows": rows}
        )
    for row in passes:
        row["captions_per_s_per_chip"] = row["rows"] / row["seconds"]
        if captions:
            hours = captions / row["captions_per_s_per_chip"] / topology.chips / SECONDS_PER_HOUR
            row |= {"captions": captions, "hours": hours, "chip_hours": hours * topology.chips}
    return {
        "topology": str(topology),
        "chip": chip.name,
        "platform": chip.platform,
        "chips": topology.chips,
        "weights": weights,
        "parts": mesh.shape["fsdp"],
        "limit": int(chip.memory_limit),
        "passes": passes,
    }


def _group(topology: Topology, weights: int) -> tuple[Topology, Mesh]:
    """The chips that weights of this number of bytes are sharded over: (topology, mesh)."""
    chip = topology.chip
    shape = smallest_shape(chip) if chip.platform == "tpu" else (1, topology.shape[-1])
    group = dataclasses.replace(topology, shape=shape, slices=1)
    devices = group.devices()
    parts = program.fewest_parts(weights, int(chip.memory_limit), len(devices))
    return group, sharding.batch_mesh(devices, parts)


def memory(
    network: nn.Module, topology: Topology, dtype: str, rows: int, length: int, cache: str
) -> dict[str, Any]:
    """Memory per chip of encoding one batch, in bytes: {"weights", "parts", "peak", "fits"}.

    Args:
        network: the encoder.
        topology: the hardware.
        dtype: floating-point type of the weights.
        rows: texts per chip.
        length: tokens per text.
        cache: directory of cached costs.
    """
    chip = topology.chip
    shapes = program.parameter_shapes(network, dtype)
    weights = program.weight_bytes(shapes)
    group, mesh = _group(topology, weights)
    lowered = encode_program(network, shapes, mesh).lower(rows * mesh.size, length)
    peak = cached(
        cache,
        f"encoding {group} {lowered.as_text()}",
        {"peak": float},
        lambda: {"peak": whole_step.compile_text(lowered, group, exact=True)[1]},
        COMPILERS[chip.platform],
    )["peak"]
    parts = mesh.shape["fsdp"]
    return {"weights": weights, "parts": parts, "peak": peak, "fits": peak <= chip.memory_limit}


def _pass(
    encode: program.EncodeProgram,
    mesh: Mesh,
    group: Topology,
    weights: int,
    flops: float,
    rows: int,
    length: int,
) -> dict[str, Any]:
    """Memory and time of encoding one batch: {"flops", "peak", "fits", "seconds"}.

    Args:
        encode: the sharded program.
        mesh: its mesh.
        group: the chips that it is sharded over.
        weights: bytes of the weights.
        flops: FLOPs per chip.
        rows: captions per chip.
        length: tokens per caption.
    """
    chip = group.chip
    lowered = encode.lower(rows * mesh.size, length)
    text, peak = whole_step.compile_text(lowered, group, exact=True)
    if chip.platform == "tpu" and text:
        module = hlo.parse(text)
        seconds = sum(item.seconds for item in cost.items(module, chip))
        seconds += sum(
            links.seconds(collective, list(mesh.devices.flat), group)
            for collective in hlo.collectives(module, mesh.size)
        )
    else:
        seconds = max(flops / chip.peak_flops, weights / chip.memory_bandwidth)
    return {"flops": flops, "peak": peak, "fits": peak <= chip.memory_limit, "seconds": seconds}


def text(plan: Mapping[str, Any]) -> Iterator[str]:
    """Yields the lines of the report for a terminal."""
    weights = (
        "replicated on every chip"
        if plan["parts"] == 1
        else f"sharded over groups of {plan['parts']} chips"
    )
    yield (
        f"Text encoder {plan['name']} on {plan['topology']} ({plan['chips']} chips):"
        f" {plan['weights'] / GIB:.2f} GiB of bfloat16 weights, {weights}"
    )
    if plan["platform"] == "cuda":
        yield "Rates are upper bounds from the chip's peak: XLA:GPU provides no cycle estimates"
    yield f"Memory limit per chip: {plan['limit'] / GIB:.2f} GiB"
    yield (
        f"{'tokens':>7} {'captions/batch':>15} {'memory GiB':>11} {'TFLOP/batch':>12}"
        f" {'captions/s/chip':>16} {'hours':>8} {'chip-hours':>11}"
    )
    bound = "<" if plan["platform"] == "cuda" else ""
    for row in plan["passes"]:
        verdict = "" if row["fits"] else "  DOES NOT FIT"
        times = (
            f"{row['hours']:8.2f} {row['chip_hours']:11.0f}"
            if "hours" in row
            else f"{'-':>8} {'-':>11}"
        )
        rate = f"{bound}{row['captions_per_s_per_chip']:.0f}"
        yield (
            f"{row['tokens']:7d} {row['rows']:15d} {row['peak'] / GIB:11.2f}"
            f" {row['flops'] / 1e12:12.2f} {rate:>16} {times}{verdict}"
        )
