"""The plan of encoding captions with a text encoder: memory, captions per second, hours.

The compiled program is the encoder's own (`text.program`). Each chip encodes different captions, so
the rate per chip does not depend on the number of chips. Where the weights do not fit on one chip,
they are sharded over a group of chips.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from imagen_jax import sharding
from imagen_jax.hardware.chips import GIB
from imagen_jax.hardware.topology import Topology, smallest_shape
from imagen_jax.planning import cost, hlo, links, whole_step
from imagen_jax.planning.amounts import amount
from imagen_jax.planning.cost_cache import COMPILERS, cached
from imagen_jax.planning.step_time import SECONDS_PER_HOUR
from imagen_jax.text import choice as choices
from imagen_jax.text import program, sizes
from imagen_jax.weights.text_encoders import (
    EMBEDDED,
    encode_program,
    find_encoder,
    one_device,
    read_network,
)

DTYPE = "bfloat16"
# What is cached of a compiled encoder: its peak in bytes per chip; seconds of its instructions
# (TPUs only), of collectives that overlap with them and of those that do not. Times are 0 if it
# does not fit.
COST_FIELDS = {"peak": float, "compute": float, "overlapped": float, "exposed": float}


def find_network(name: str, dtype: str = DTYPE) -> nn.Module:
    """The network of a text encoder, as `known_network`, or by the path of its config.json.

    name: with a choice of features (`text/choice.py`) if any.
    dtype: floating-point type of the weights.

    Raises ValueError if there is no such encoder or its family is not supported.
    """
    if network := known_network(name, dtype):
        return network
    path, choice = choices.parse(name)
    if not Path(path).is_file():
        raise ValueError(
            f"--text_encoder {path!r} is not one of {EMBEDDED}, {', '.join(sizes.SIZES)}, and not a"
            " directory with an encoder's config.json"
        )
    return read_network(path, dtype, choice)


def known_network(given: str, dtype: str = DTYPE) -> nn.Module | None:
    """The network of a text encoder, by its short name, its name on the hub or its directory.

    given: with a choice of features, if any. Returns None if the sizes are unknown here. Raises
    ValueError if the encoder has no such features.
    """
    name, choice = choices.parse(given)
    known = name if name in sizes.SIZES else sizes.short_name(name)
    if known:
        return sizes.network(known, dtype, choice)
    if name == EMBEDDED or Path(name).is_dir():
        return read_network(find_encoder(name), dtype, choice)
    return None


def plan_encoder(
    network: nn.Module,
    topology: Topology,
    lengths: Sequence[int],
    batch_size: int,
    captions: int,
    cache: str,
    price: float = 0.0,
) -> dict[str, Any]:
    """The plan of encoding captions.

    Times on TPUs are the compiler's estimates at its default level. For GPUs, which have no
    estimates, they are lower bounds, see `encoding`.

    Args:
        network: the encoder.
        topology: the hardware.
        lengths: caption lengths in tokens, at most the longest that the encoder can read.
        batch_size: captions of up to 32 tokens per chip and batch, as in prepare_data.
        captions: number of captions to report hours for, or 0.
        cache: directory of cached costs.
        price: of a chip-hour, to report the cost of `captions`; 0 for none.

    Returns a dict; "weights" are bytes, "parts" is the number of chips that the weights are sharded
    over, "passes" has an entry for each length.
    """
    chip = topology.chip
    longest = network.config.max_length or max(lengths)
    lengths = list(dict.fromkeys(min(length, longest) for length in lengths))
    weights = program.weight_bytes(program.parameter_shapes(network, DTYPE))
    group, mesh = _group(topology, weights)
    passes = []
    for length in lengths:
        rows = max(1, batch_size * 32 // max(length, 32))
        costs = encoding(network, DTYPE, group, mesh, rows * mesh.size, length, cache)
        taken = {name: costs[name] for name in ("flops", "peak", "fits", "seconds")}
        passes.append(taken | {"tokens": length, "rows": rows})
    for row in passes:
        row["captions_per_s_per_chip"] = row["rows"] / row["seconds"]
        if captions:
            hours = captions / row["captions_per_s_per_chip"] / topology.chips / SECONDS_PER_HOUR
            row |= {"captions": captions, "hours": hours, "chip_hours": hours * topology.chips}
            row |= {"money": row["chip_hours"] * price} if price else {}
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
    weights = program.weight_bytes(program.parameter_shapes(network, dtype))
    group, mesh = _group(topology, weights)
    costs = encoding(network, dtype, group, mesh, rows * mesh.size, length, cache)
    return {
        "weights": weights,
        "parts": mesh.shape["fsdp"],
        "peak": costs["peak"],
        "fits": costs["fits"],
    }


def encoding(
    network: nn.Module,
    dtype: str,
    topology: Topology,
    mesh: Mesh,
    rows: int,
    length: int,
    cache: str,
) -> dict[str, Any]:
    """Memory and time of encoding one batch on a mesh.

    On TPUs the time is max(compute, overlapped collectives) + exposed collectives, by the
    compiler's estimates. On GPUs it is a lower bound: the largest of FLOPs at the chip's peak,
    weights at full bandwidth, and collectives.

    Args:
        network: the encoder.
        dtype: floating-point type of the weights.
        topology: the hardware.
        mesh: its mesh.
        rows: texts of the whole batch.
        length: tokens per text.
        cache: directory of cached costs.

    Returns a dict with "flops" (per chip), "weights" (bytes on a chip), "peak", "fits", "seconds"
    and its parts "compute_s", "overlapped_s" and "exposed_s".
    """
    chip = topology.chip
    shapes = program.parameter_shapes(network, dtype)
    size = program.weight_bytes(shapes)
    encode = encode_program(network, shapes, mesh)
    costs = _compiled_cost(encode.lower(rows, length), topology, mesh, cache)
    # FLOPs are counted in the program for a single device.
    on_a_chip = rows // (mesh.shape["data"] * mesh.shape["fsdp"])
    single = encode_program(network, shapes, one_device(size))
    flops = single.lower(on_a_chip, length).cost_analysis()["flops"]
    compute, overlapped, exposed = (costs[name] for name in list(COST_FIELDS)[1:])
    if chip.platform == "tpu" and compute:
        seconds = max(compute, overlapped) + exposed
    else:
        bounds = (flops / chip.peak_flops, size / chip.memory_bandwidth, overlapped + exposed)
        seconds = max(bounds)
    return {
        "flops": flops,
        "weights": _bytes_on_a_chip(encode.params),
        "peak": costs["peak"],
        "fits": costs["peak"] <= chip.memory_limit,
        "seconds": seconds,
        "compute_s": compute,
        "overlapped_s": overlapped,
        "exposed_s": exposed,
    }


def sharded_bytes(network: nn.Module, mesh: Mesh) -> int:
    """Bytes of an encoder's weights on one chip of a mesh."""
    shapes = program.parameter_shapes(network, DTYPE)
    return _bytes_on_a_chip(sharding.shard_encoder(shapes, mesh))


def _bytes_on_a_chip(params: Any) -> int:
    return sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(params)
    )


def _compiled_cost(lowered: Any, topology: Topology, mesh: Mesh, cache: str) -> dict[str, float]:
    """The `COST_FIELDS` of an encoder's program, compiled unless they are in the cache.

    It is compiled at the compiler's default level.
    """

    def compute() -> dict[str, float]:
        text, peak = whole_step.compile_text(lowered, topology, exact=True)
        sums = Counter(peak=peak, compute=0.0, overlapped=0.0, exposed=0.0)
        if not text:
            return dict(sums)
        module = hlo.parse(text)
        if topology.chip.platform == "tpu":
            sums["compute"] = sum(item.seconds for item in cost.items(module, topology.chip))
        for collective in hlo.collectives(module, mesh.size):
            kind = "overlapped" if collective.overlapped else "exposed"
            sums[kind] += links.seconds(collective, list(mesh.devices.flat), topology)
        return dict(sums)

    key = f"encoder {topology} {lowered.as_text()}"
    return cached(cache, key, COST_FIELDS, compute, COMPILERS[topology.chip.platform])


def text(plan: Mapping[str, Any]) -> Iterator[str]:
    """Yields the lines of the report for a terminal."""
    weights = (
        "replicated on every chip"
        if plan["parts"] == 1
        else f"sharded over groups of {plan['parts']} chips"
    )
    yield (
        f"Text encoder {plan['name']} on {plan['topology']} ({plan['chips']} chips):"
        f" {amount(plan['weights'] / GIB, 2)} GiB of bfloat16 weights, {weights}"
    )
    if plan["platform"] == "cuda":
        yield "Rates are upper bounds from the chip's peak: XLA:GPU provides no cycle estimates"
    yield f"Memory limit per chip: {plan['limit'] / GIB:.2f} GiB"
    yield (
        f"{'tokens':>7} {'captions/batch':>15} {'memory GiB':>11} {'TFLOP/batch':>12}"
        f" {'captions/s/chip':>16} {'hours':>8} {'chip-hours':>11}"
        + (f" {'cost':>9}" if "money" in plan["passes"][0] else "")
    )
    bound = "<" if plan["platform"] == "cuda" else ""
    for row in plan["passes"]:
        verdict = "" if row["fits"] else "  DOES NOT FIT"
        times = (
            f"{amount(row['hours'], 2):>8} {amount(row['chip_hours'], 0):>11}"
            if "hours" in row
            else f"{'-':>8} {'-':>11}"
        )
        if "money" in row:
            times += f" {amount(row['money']):>9}"
        rate = bound + amount(row["captions_per_s_per_chip"], 0)
        yield (
            f"{row['tokens']:7d} {row['rows']:15d} {amount(row['peak'] / GIB, 2):>11}"
            f" {amount(row['flops'] / 1e12, 2):>12} {rate:>16} {times}{verdict}"
        )
