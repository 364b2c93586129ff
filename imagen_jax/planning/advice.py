"""Changes of a config that reduce the memory of a run, each with an estimate of its peak."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from imagen_jax.hardware.topology import Topology
from imagen_jax.models.remat import KINDS as REMAT_KINDS
from imagen_jax.planning import block_costs, online_plan, whole_step


def advice(
    config: Mapping[str, Any], topology: Topology, plan: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yields {"overrides": ..., "estimated_peak": bytes} in the order to try them.

    The estimate is the compiled peak, with the parts of the state recomputed and the temporaries
    scaled by the number of rows and the height per device.
    """
    if plan["memory"]["fits"]:
        yield from sampler_advice(config, topology, plan)
        return
    for overrides in alternatives(config, topology):
        changed = overridden(config, overrides)
        try:
            program = whole_step.make_program(changed, topology)
            parts = whole_step.state_parts(program)
        except ValueError:
            continue
        scale = _rows_at_once(changed) / _rows_at_once(config)
        scale *= (
            block_costs.resolved_mesh(config, topology)["spatial"]
            / block_costs.resolved_mesh(changed, topology)["spatial"]
        )
        peak = sum(parts.values()) + plan["memory"]["parts"]["temporaries"] * scale
        peak += online_plan.weights_on_a_chip(changed, program.mesh)
        yield {"overrides": overrides, "estimated_peak": int(peak)}


def _rows_at_once(config: Mapping[str, Any]) -> float:
    """Rows of the batch that all devices together compute at once."""
    return config["data"]["batch_size"] / config["optim"]["accumulation"]


def sampler_advice(
    config: Mapping[str, Any], topology: Topology, plan: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """`advice` where the step fits and the sampler does not: smaller sample grids, or none."""
    sizes = block_costs.resolved_mesh(config, topology)
    sampler, shards = plan["sampler"], sizes["data"] * sizes["fsdp"]
    fixed = sampler["beside"] + plan["memory"]["parts"]["EMA"]
    for overrides in smaller_sample_grids(config, shards):
        scale = -(-overrides["train.sample_rows"] // shards) / -(-sampler["rows"] // shards)
        peak = fixed + scale * (sampler["peak"] - fixed)
        yield {"overrides": overrides, "estimated_peak": int(peak)}
    yield {"overrides": {"train.sample_every": 0}, "estimated_peak": plan["memory"]["peak"]}


def up_to_first_that_fits(rows: Iterable[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """The rows of advice up to the first whose estimate fits, or all of them."""
    taken = []
    for row in rows:
        taken.append(row)
        if row["estimated_peak"] <= limit:
            break
    return taken


def alternatives(config: Mapping[str, Any], topology: Topology) -> list[dict[str, Any]]:
    """Overrides that need less memory, those that cost the least speed first.

    1. More recomputation (`model.remat`).
    2. Larger `fsdp`: state on more chips. Its all-gathers are overlapped with compute.
    3. Gradient accumulation: adds no exposed communication.
    4. Larger `spatial`: image height on several chips, with exposed halo exchanges.
    5. A smaller batch, which changes the result of the training.
    """
    sizes = block_costs.resolved_mesh(config, topology)
    shards = sizes["data"] * sizes["fsdp"]
    slices = topology.slices if topology.chip.platform == "tpu" else 1
    remats = [
        {"model.remat": kind}
        for kind in REMAT_KINDS[REMAT_KINDS.index(config["model"]["remat"]) + 1 :]
    ]
    most = remats[-1] if remats else {}  # combined with every other change
    wider = [most | change for change in _larger_fsdp(config, sizes, shards // slices)]
    bases = [most, *wider[-1:]]
    return [
        *remats,
        *wider,
        *(base | change for change in _more_accumulation(config, shards) for base in bases),
        *(most | change for change in _larger_spatial(config, sizes, shards // slices)),
        *(base | change for change in _smaller_batches(config, shards) for base in bases),
    ]


def _larger_fsdp(
    config: Mapping[str, Any], sizes: Mapping[str, int], shards: int
) -> Iterator[dict[str, int]]:
    """fsdp doubled up to 2^11 times. shards: of the batch, in one slice."""
    for size in (sizes["fsdp"] * 2**i for i in range(1, 12)):
        if shards % size == 0:
            yield resized(config, sizes, fsdp=size)


def _more_accumulation(config: Mapping[str, Any], shards: int) -> Iterator[dict[str, int]]:
    """accumulation doubled up to 2^7 times. shards: of the batch."""
    rows = config["data"]["batch_size"]
    for n in (config["optim"]["accumulation"] * 2**i for i in range(1, 8)):
        if rows % n == 0 and rows // n % shards == 0:
            yield {"optim.accumulation": n}


def _larger_spatial(
    config: Mapping[str, Any], sizes: Mapping[str, int], shards: int
) -> Iterator[dict[str, int]]:
    """spatial of 2, 4 and 8 where it is 1. shards: of the batch, in one slice."""
    all_shards = sizes["data"] * sizes["fsdp"]
    for n in (2, 4, 8) if sizes["spatial"] == 1 else ():
        if shards % n == 0 and config["data"]["batch_size"] % (all_shards // n) == 0:
            yield resized(config, sizes, spatial=n, fsdp=math.gcd(sizes["fsdp"], shards // n))


def _smaller_batches(config: Mapping[str, Any], shards: int) -> Iterator[dict[str, int]]:
    """A half, a quarter and an eighth of the batch. shards: of the batch."""
    rows = config["data"]["batch_size"]
    for n in (2, 4, 8):
        if rows % (n * shards) == 0:
            yield {"data.batch_size": rows // n}


def smaller_sample_grids(config: Mapping[str, Any], shards: int) -> list[dict[str, int]]:
    """Overrides that halve the number of sampled images per device, again and again, down to 1."""
    rows, overrides = -(-config["train"]["sample_rows"] // shards), []
    while rows > 1:
        rows = -(-rows // 2)
        overrides.append({"train.sample_rows": rows * shards})
    return overrides


def resized(config: Mapping[str, Any], sizes: Mapping[str, int], **changed: int) -> dict[str, int]:
    """Overrides that change some sizes of a mesh and let `data` take the remaining devices."""
    target = {**sizes, **changed, "data": -1}
    return {
        f"mesh.{axis}": size
        for axis, size in target.items()
        if axis in changed or (config["mesh"][axis] == -1) != (size == -1)
    }


def overridden(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config with fields replaced, such as {"mesh.fsdp": 32}."""
    out = {
        section: dict(value) if isinstance(value, Mapping) else value
        for section, value in config.items()
    }
    for field, value in overrides.items():
        section, name = field.split(".")
        out[section][name] = value
    return out
