"""What encoding captions with a text encoder takes on hardware that is not here: memory, captions a
second, hours for a store of them.

The pass that is compiled is the encoder's own (`text.program`). Every chip encodes captions of its
own, so a chip's rate does not depend on how many there are; where weights must be divided, groups
of chips work so.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from imagen_jax.hardware.chips import GIB
from imagen_jax.hardware.topology import Topology, smallest_shape
from imagen_jax.planning import cost, hlo, links, whole_step
from imagen_jax.planning.step_time import SECONDS_PER_HOUR
from imagen_jax.text import program
from imagen_jax.text.t5_network import T5Config, T5Encoder
from imagen_jax.weights.text_encoders import read_network

# Of google/t5-v1_1-NAME, by their config.json.
SIZES = {
    "large": T5Config(
        d_model=1024, d_ff=2816, d_kv=64, num_heads=16, num_layers=24, vocab_size=32_128
    ),
    "xl": T5Config(
        d_model=2048, d_ff=5120, d_kv=64, num_heads=32, num_layers=24, vocab_size=32_128
    ),
    "xxl": T5Config(
        d_model=4096, d_ff=10_240, d_kv=64, num_heads=64, num_layers=24, vocab_size=32_128
    ),
}
DTYPE = "bfloat16"


def find_network(name: str) -> nn.Module:
    """The network of an encoder, by its name, its directory or its config.json.

    Raises:
        ValueError: there is no such encoder (the message lists the names), or its family is
            unknown.
    """
    if name in SIZES:
        return T5Encoder(SIZES[name], jnp.dtype(DTYPE))
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        raise ValueError(
            f"--text_encoder {name!r} is none of {', '.join(SIZES)}, and no directory or file with"
            " an encoder's config.json"
        )
    return read_network(path, DTYPE)


def plan_encoder(
    network: nn.Module, place: Topology, lengths: Sequence[int], batch_size: int, captions: int
) -> dict[str, Any]:
    """The report: {"weights", "parts", "passes": one for each length}. `batch_size` is
    prepare_data's: rows of up to 32 tokens on a chip.

    Times of TPUs are the compiler's estimates at the default level; of GPUs, which have none, what
    FLOPs and weights take at the chip's peak rates: no run will be faster.
    """
    shape = smallest_shape(place.chip) if place.chip.platform == "tpu" else (1, place.shape[-1])
    group = dataclasses.replace(place, shape=shape, slices=1)
    devices = group.devices()
    shapes = program.parameter_shapes(network, DTYPE)
    weights = program.weight_bytes(shapes)
    mesh = program.make_mesh(
        devices, program.fewest_parts(weights, int(place.chip.memory_limit), len(devices))
    )
    encode = program.EncodeProgram.create(network, shapes, mesh)
    # FLOPs are counted in the program for one device.
    alone = program.EncodeProgram.create(network, shapes, program.one_device(weights))
    passes = []
    for length in lengths:
        rows = max(1, batch_size * 32 // max(length, 32))
        flops = alone.lower(rows, length).cost_analysis()["flops"]
        passes.append(
            _pass(encode, group, weights, flops, rows, length) | {"tokens": length, "rows": rows}
        )
    for row in passes:
        row["captions_per_s_per_chip"] = row["rows"] / row["seconds"]
        if captions:
            hours = captions / row["captions_per_s_per_chip"] / place.chips / SECONDS_PER_HOUR
            row |= {"captions": captions, "hours": hours, "chip_hours": hours * place.chips}
    return {
        "topology": str(place),
        "chip": place.chip.name,
        "platform": place.chip.platform,
        "chips": place.chips,
        "weights": weights,
        "parts": mesh.shape["fsdp"],
        "limit": int(place.chip.memory_limit),
        "passes": passes,
    }


def _pass(
    encode: program.EncodeProgram,
    group: Topology,
    weights: int,
    flops: float,
    rows: int,
    length: int,
) -> dict[str, Any]:
    """{"flops" of a chip, as given, "peak", "fits", "seconds"} of one batch."""
    mesh, chip = encode.mesh, group.chip
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


def text(found: Mapping[str, Any]) -> Iterator[str]:
    """The report's lines for a terminal."""
    whole = "whole on each" if found["parts"] == 1 else f"in {found['parts']} parts"
    yield (
        f"{found['name']}: {found['weights'] / GIB:.2f} GiB in bfloat16, {whole}, on"
        f" {found['topology']}, {found['chips']} chips"
    )
    if found["platform"] == "cuda":
        yield "rates are bounds from the chip's peak: the compiler has no estimates of time"
    yield (
        f"{'tokens':>7} {'rows a chip':>12} {'GiB of ' + format(found['limit'] / GIB, '.2f'):>14}"
        f" {'TFLOP':>7} {'captions/s a chip':>18} {'hours':>8} {'chip-hours':>11}"
    )
    bound = "<" if found["platform"] == "cuda" else ""
    for row in found["passes"]:
        verdict = "" if row["fits"] else "  DOES NOT FIT"
        times = (
            f"{row['hours']:8.2f} {row['chip_hours']:11.0f}"
            if "hours" in row
            else f"{'-':>8} {'-':>11}"
        )
        rate = f"{bound}{row['captions_per_s_per_chip']:.0f}"
        yield (
            f"{row['tokens']:7d} {row['rows']:12d} {row['peak'] / GIB:14.2f}"
            f" {row['flops'] / 1e12:7.2f} {rate:>18} {times}{verdict}"
        )
