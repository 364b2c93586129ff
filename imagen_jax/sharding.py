"""Where arrays live: the mesh, path rules that place the training state, placement of batches, the
constraint models call.

Axes: `data` and `fsdp` both split the batch; `fsdp` also splits parameters, EMA and optimizer
state; `model` splits a kernel's features by rule; `spatial` splits image height (a convolution then
exchanges halos). A rule is (regex on the path, placement): "fsdp" (largest dimension that divides),
"replicate", or a list of axis names or None, one for each dimension.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from imagen_jax.models.attention import Attend, Keys
from imagen_jax.models.attention_kernel import fits

AXES = ("data", "fsdp", "model", "spatial")
BATCH_AXES = ("data", "fsdp")
# The first: else a product with a sharded kernel becomes a loop of permutations, which needs more
# memory and compiles longer. The others let gathers of kernels run beside what computes, which v5e
# does unasked and v4, v5p and v6e do not.
TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"} | dict.fromkeys(
    (
        "xla_enable_async_all_gather",
        "xla_tpu_enable_async_collective_fusion",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
        "xla_tpu_enable_async_collective_fusion_multiple_steps",
        "xla_tpu_overlap_compute_collective_tc",
    ),
    "true",
)
Tree = Any


def mesh_sizes(sizes: Mapping[str, int], devices: int, slices: int = 1) -> dict[str, int]:
    """The size of each axis on so many devices in so many TPU slices; one size may be -1 (what is
    left).

    Raises ValueError, with the sizes that would do, if these do not multiply to the devices or a
    slice would be cut.
    """
    shape = [sizes[axis] for axis in AXES]
    if any(size < 1 and size != -1 for size in shape):
        raise ValueError(
            f"mesh {sizes_text(shape)}: each size must be at least 1, or for one of them -1 (what"
            " is left)"
        )
    known = math.prod(s for s in shape if s != -1)
    if shape.count(-1) > 1 or devices % known or (-1 not in shape and known != devices):
        raise ValueError(
            f"mesh {sizes_text(shape)} does not fit {devices} devices: the sizes must multiply to"
            f" it (one may be -1); {_choices(shape, devices)}"
        )
    shape = [devices // known if s == -1 else s for s in shape]
    if shape[0] % slices:
        raise ValueError(
            f"mesh {sizes_text(shape)} cuts through {slices} slices of {devices // slices} devices:"
            f" `data` must be a multiple of {slices}"
        )
    return dict(zip(AXES, shape))


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of Auto axes over all devices; one size may be -1 (what is left). Neighbours on the
    torus are neighbours in the mesh.

    Several TPU slices lie along `data`, so that only sums of gradients cross the network between
    them. Raises ValueError as `mesh_sizes` does.
    """
    devices = jax.devices() if devices is None else devices
    slices: dict[int, list[jax.Device]] = {}
    for device in devices:
        slices.setdefault(slice_of(device), []).append(device)
    shape = list(mesh_sizes(sizes, len(devices), len(slices)).values())
    inside = (shape[0] // len(slices), *shape[1:])
    parts = [
        mesh_utils.create_device_mesh(inside, slices[i], allow_split_physical_axes=True)
        for i in sorted(slices)
    ]
    return Mesh(np.concatenate(parts), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def slice_of(device: jax.Device) -> int:
    """Which slice a TPU chip is in; 0 for all else. (On GPUs `slice_index` is the node, which
    `fsdp` may well cross.)
    """
    return getattr(device, "slice_index", 0) if device.platform == "tpu" else 0


def sizes_text(shape: Sequence[int]) -> str:
    """data 8, fsdp 16, model 1, spatial 1."""
    return ", ".join(f"{axis} {size}" for axis, size in zip(AXES, shape))


def _choices(shape: Sequence[int], devices: int) -> str:
    """For the largest axis with a size of its own: what it could be beside the others."""
    if shape.count(-1) > 1:
        return "here two are"
    at = max((i for i, size in enumerate(shape) if size > 0), key=lambda i: (shape[i], i))
    others = math.prod(size for i, size in enumerate(shape) if size > 0 and i != at)
    if devices % others:
        return f"each must divide {devices}"
    left = devices // others
    sizes = [size for size in range(1, left + 1) if left % size == 0] if -1 in shape else [left]
    return f"with the others as they are, {AXES[at]} may be {', '.join(map(str, sizes))}"


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """What the compiler is told of a program whose arrays are split over the mesh, for `jax.jit`:
    nothing but on TPUs.
    """
    return TPU_OPTIONS if mesh.devices.flat[0].platform == "tpu" else {}


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`."""
    return NamedSharding(mesh, P(BATCH_AXES))


def image_sharding(mesh: Mesh) -> NamedSharding:
    """[b h w c] with rows over the batch axes and height over `spatial`."""
    return NamedSharding(mesh, P(BATCH_AXES, "spatial" if mesh.shape["spatial"] > 1 else None))


def check_batch(rows: int, sizes: Mapping[str, int]) -> None:
    """Raises ValueError unless a batch of so many rows divides over a mesh of these sizes."""
    shards = sizes["data"] * sizes["fsdp"]
    if rows % shards:
        raise ValueError(
            f"a batch of {rows} does not divide over data x fsdp = {shards}; use a multiple of"
            f" {shards}"
        )


def rows_on(devices: Sequence[jax.Device], rows: int, mesh: Mesh) -> list[int]:
    """Which rows of a batch these devices hold, ascending. Where an image is split over processes,
    several hold the same.
    """
    check_batch(rows, mesh.shape)
    parts = batch_sharding(mesh).devices_indices_map((rows,))
    return sorted({row for device in devices for row in range(rows)[parts[device][0]]})


def process_rows(rows: int, mesh: Mesh) -> list[int]:
    """Which rows of a batch this process has to read. They need not be neighbours: a TPU host's
    devices are a block of the mesh.
    """
    return rows_on(mesh.local_devices, rows, mesh)


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """This process's rows (see `process_rows`) as global arrays on the mesh. Raises ValueError if
    the rows do not divide by the batch axes.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    held = process_rows(shards, mesh)
    rows = len(next(iter(batch.values()))) * shards // len(held)
    check_batch(rows, mesh.shape)
    size, sharding = rows // shards, batch_sharding(mesh)
    begin = {
        shard * size: place * size for place, shard in enumerate(held)
    }  # global row -> row here

    def place(array: np.ndarray) -> Array:
        part = lambda index: array[begin[index[0].start or 0] :][:size]
        return jax.make_array_from_callback((rows, *array.shape[1:]), sharding, part)

    with jax.transfer_guard_host_to_device("allow"):  # the one transfer that a step needs
        return {name: place(array) for name, array in batch.items()}


def constrain_activations(mesh: Mesh) -> Callable[[Array], Array]:
    """What models call on what their layers make: feature maps [b h w c] laid out as images are,
    rows of all else over the batch axes.

    Left to itself the partitioner sometimes follows a kernel's shards instead of the rows: it then
    gathers the feature map of every device, where gathering the kernel would have done (seen after
    up-sampling, with jax 0.10.2).
    """
    if mesh.size == 1:
        return lambda h: h

    def constrain(h: Array) -> Array:
        rows = NamedSharding(mesh, P(BATCH_AXES, *[P.UNCONSTRAINED] * (h.ndim - 1)))
        return jax.lax.with_sharding_constraint(h, image_sharding(mesh) if h.ndim == 4 else rows)

    return constrain


def gather_parameters(mesh: Mesh) -> Callable[[Tree], Tree]:
    """What a stage does to its parameters before use: nothing, but where image height is split
    every shard is gathered first.

    The partitioner computes a convolution wrongly if the image is split by height and the kernel
    over its input channels at once (seen with jax 0.10.2 on 8 CPU devices: errors as large as the
    activations, in kernels of more input than output channels).
    """
    if mesh.shape["spatial"] == 1:
        return lambda tree: tree
    return lambda tree: jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P()))


def attend_in_parts(
    mesh: Mesh, kernel: Attend, plain: Attend, q: Array, keys: Keys, heads: int
) -> Array:
    """`kernel` on every device's part: rows over the batch axes, queries over `spatial`, channels
    over `model`.

    The compiler does not know how to divide a kernel. Where the parts are not whole, or the kernel
    does not take them, `plain` runs instead.
    """
    pixels, parts = mesh.shape["spatial"], mesh.shape["model"]
    (b, n, c), m = q.shape, sum(k.shape[1] for k, _, _ in keys)
    if (
        b % (mesh.shape["data"] * mesh.shape["fsdp"])
        or n % pixels
        or heads % parts
        or not fits(n // pixels, m, c // parts, heads // parts)
    ):
        return plain(q, keys, heads)
    rows, queries = P(BATCH_AXES), P(BATCH_AXES, "spatial", "model")
    # Keys are whole; but where an axis has one device, saying that it splits them saves their
    # gradients a sum over it.
    channels = P(BATCH_AXES, "spatial" if pixels == 1 else None, "model")
    specs = (
        queries,
        tuple((channels, channels, None if valid is None else rows) for _, _, valid in keys),
    )
    return jax.shard_map(
        lambda q, keys: kernel(q, keys, heads // parts),
        mesh=mesh,
        in_specs=specs,
        out_specs=queries,
        check_vma=False,
    )(q, keys)


def path_name(path: tuple) -> str:
    """A key path as "ema/down_2/block_0/conv_1/kernel"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def fsdp_spec(shape: tuple[int, ...], size: int, min_elements: int) -> P:
    """The largest dimension that divides by `size` goes over `fsdp`, of equal ones the first; small
    arrays and indivisible ones are replicated.

    (Of a square kernel the last dimension lies along a TPU's lanes: its gradient would be summed
    whole on every device and then cut.)
    """
    divisible = [i for i, n in enumerate(shape) if n % size == 0]
    if size == 1 or math.prod(shape) < min_elements or not divisible:
        return P()
    best = max(divisible, key=lambda i: shape[i])
    return P(*("fsdp" if i == best else None for i in range(len(shape))))


def rule_spec(
    placement: str | Sequence[str | None], shape: tuple[int, ...], mesh: Mesh, min_elements: int
) -> P:
    """The PartitionSpec of one leaf. A per-dimension placement that does not fit (a factored moment
    has fewer dimensions) falls back to fsdp.
    """
    if placement == "replicate":
        return P()
    if placement != "fsdp" and _fits(placement, shape, mesh):
        return P(*placement)
    return fsdp_spec(shape, mesh.shape["fsdp"], min_elements)


def _fits(placement: Sequence[str | None], shape: tuple[int, ...], mesh: Mesh) -> bool:
    return len(placement) == len(shape) and all(
        a is None or n % mesh.shape[a] == 0 for a, n in zip(placement, shape)
    )


def badly_split(
    params: Tree, mesh: Mesh, rules: Sequence[Sequence[Any]], min_elements: int
) -> list[str]:
    """A line for each parameter that its rule would split and cannot, with what could: each device
    then holds all of it, or is sent all of it.
    """
    found, fsdp = [], mesh.shape["fsdp"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = f"params/{path_name(path)}"
        placement, shape = rules[rule_of(name, rules)][1], list(leaf.shape)
        if placement == "replicate" or math.prod(shape) < min_elements:
            continue
        if placement != "fsdp" and not _fits(placement, leaf.shape, mesh):
            found.append(
                f"{name} {shape}: its rule {placement} does not divide it; dimensions must be"
                " multiples of the axes' sizes"
            )
        elif placement == "fsdp" and fsdp > 1 and not any(n % fsdp == 0 for n in shape):
            sizes = [
                n
                for n in range(2, mesh.size + 1)
                if mesh.size % n == 0 and any(d % n == 0 for d in shape)
            ]
            found.append(
                f"{name} {shape}: no dimension is a multiple of fsdp {fsdp}; fsdp"
                f" {', '.join(map(str, sizes)) or 'of no size'} would split it"
            )
    return found


def rule_of(name: str, rules: Sequence[Sequence[Any]]) -> int:
    """Index of the first rule whose pattern is found in a leaf's path. Raises ValueError if there
    is none.
    """
    for i, (pattern, _) in enumerate(rules):
        if re.search(pattern, name):
            return i
    raise ValueError(f"no sharding rule matches {name}; end the rules with ('.*', 'fsdp')")


def check_rules(rules: Any, mesh: Mesh) -> None:
    """Raises ValueError for rules that are no pairs of a regular expression and a placement there
    is, and for a `model` axis that no rule uses.
    """
    named = set()
    for rule in rules if isinstance(rules, (list, tuple)) else [rules]:
        if not (
            isinstance(rule, (list, tuple))
            and len(rule) == 2
            and isinstance(rule[0], str)
            and isinstance(rule[1], (str, list, tuple))
        ):
            raise ValueError(
                f"mesh.rules has {rule!r}: a rule is (regular expression, placement), such as"
                " ('.*', 'fsdp')"
            )
        axes = [] if isinstance(rule[1], str) else [axis for axis in rule[1] if axis is not None]
        if any(axis not in AXES for axis in axes) or (
            isinstance(rule[1], str) and rule[1] not in ("fsdp", "replicate")
        ):
            raise ValueError(
                f"sharding rule {rule[0]!r} -> {rule[1]!r}: use 'fsdp', 'replicate' or a list of"
                f" None and axes {AXES}"
            )
        if len(set(axes)) < len(axes):
            raise ValueError(f"sharding rule {rule[0]!r} -> {rule[1]!r} names an axis twice")
        try:
            re.compile(rule[0])
        except re.error as error:
            raise ValueError(
                f"sharding rule {rule[0]!r} is no regular expression: {error}"
            ) from error
        named.update(axes)
    if mesh.shape.get("model", 1) > 1 and "model" not in named:
        raise ValueError(
            f"mesh.model is {mesh.shape['model']}, but no rule splits anything over it: add one"
            " such as ('conv_0/kernel', [None, None, None, 'model']), or set it to 1"
        )


def tree_shardings(
    tree: Tree, mesh: Mesh, rules: Sequence[Sequence[Any]], min_elements: int
) -> Tree:
    """A NamedSharding for each leaf (anything with a shape): the first rule whose regex is found in
    the leaf's path decides.

    Raises ValueError for a rule that is never used, names an unknown axis, or a leaf that no rule
    matches.
    """
    check_rules(rules, mesh)
    used = set()

    def place(path, leaf):
        used.add(rule := rule_of(path_name(path), rules))
        return NamedSharding(mesh, rule_spec(rules[rule][1], leaf.shape, mesh, min_elements))

    shardings = jax.tree_util.tree_map_with_path(place, tree)
    unused = [rules[i][0] for i in range(len(rules)) if i not in used]
    if unused:
        raise ValueError(
            f"sharding rules match no leaf: {unused}; fix the pattern or remove the rule"
        )
    return shardings


def bytes_table(tree: Tree, shardings: Tree) -> list[dict[str, Any]]:
    """Per top-level part of the state: total bytes, bytes on one device, and the share of its bytes
    that is really split.
    """
    rows: dict[str, dict[str, Any]] = {}
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings)):
        size = leaf.dtype.itemsize
        total, local = (
            math.prod(leaf.shape) * size,
            math.prod(sharding.shard_shape(leaf.shape)) * size,
        )
        row = rows.setdefault(
            path_name(path).split("/")[0], {"bytes": 0, "bytes_per_device": 0, "sharded_bytes": 0}
        )
        row["bytes"] += total
        row["bytes_per_device"] += local
        row["sharded_bytes"] += total if local < total else 0
    return [{"part": part} | row for part, row in rows.items()]
