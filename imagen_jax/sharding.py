"""Sharding of arrays: the device mesh, rules for the training state, batches and activations.

Mesh axes:

    data      splits the batch
    fsdp      splits the batch, and parameters, EMA and optimizer state
    model     splits the features of kernels, where a rule says so
    spatial   splits the image height; convolutions then exchange halos

A rule is (regular expression for a leaf's path, placement). A placement is "fsdp" (shard the
largest dimension that is a multiple of the axis size), "replicate", or a list with an axis name or
None for each dimension. The first rule that matches a path applies.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Shaped

from imagen_jax.models.layers import Constrain, Gather

AXES = ("data", "fsdp", "model", "spatial")
BATCH_AXES = ("data", "fsdp")
# The first option disables windowed einsum: XLA would compute a product with a sharded kernel as a
# loop of collective-permutes. The loop needs more memory and takes longer to compile. The other
# options overlap parameter all-gathers with compute; v5e does this by default, v4, v5p and v6e do
# not.
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
# Placement of a text encoder's parameters. The token embedding is sharded along its features, so
# that a lookup needs no communication. Norms, biases and positions (0.1 % of T5's bytes) are
# replicated.
ENCODER_RULES = (
    ("(^|/)token_embedding$", (None, "fsdp")),
    ("(^|/)kernel$", "fsdp"),
    (".*", "replicate"),
)
Tree = Any


def mesh_sizes(sizes: Mapping[str, int], devices: int, slices: int = 1) -> dict[str, int]:
    """The size of each mesh axis on `devices` devices in `slices` TPU slices.

    One size may be -1: the number of devices that remain.

    Raises:
        ValueError: the product of the sizes is not the number of devices, or `data` is not a
            multiple of the number of slices. The message lists valid sizes.
    """
    shape = [sizes[axis] for axis in AXES]
    if any(size < 1 and size != -1 for size in shape):
        raise ValueError(
            f"mesh {sizes_text(shape)}: each size must be at least 1; one of them may be -1 (the"
            " remaining devices)"
        )
    product = math.prod(s for s in shape if s != -1)
    if shape.count(-1) > 1 or devices % product or (-1 not in shape and product != devices):
        raise ValueError(
            f"mesh {sizes_text(shape)} does not fit {devices} devices: the product of the sizes"
            f" must be {devices} (one may be -1); {_choices(shape, devices)}"
        )
    shape = [devices // product if s == -1 else s for s in shape]
    if shape[0] % slices:
        raise ValueError(
            f"mesh {sizes_text(shape)} cuts through {slices} slices of {devices // slices} devices:"
            f" `data` must be a multiple of {slices}"
        )
    return dict(zip(AXES, shape))


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with Auto axes over `devices` (default: all). One size may be -1.

    Neighbours in the mesh are neighbours on the TPU torus. Several TPU slices form the outer part
    of `data`, so that only gradient reductions cross the network between slices. Raises ValueError,
    see `mesh_sizes`.
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


def batch_mesh(devices: Sequence[jax.Device], fsdp: int = 1) -> Mesh:
    """A mesh for batches: sizes of `model` and `spatial` are 1, and `fsdp` shards the parameters.

    Raises ValueError if `fsdp` does not divide the number of devices.
    """
    return make_mesh(dict.fromkeys(AXES, 1) | {"data": -1, "fsdp": fsdp}, devices)


def slice_of(device: jax.Device) -> int:
    """The index of a TPU chip's slice; 0 on other platforms.

    (On GPUs `slice_index` is the node, and `fsdp` may extend over several nodes.)
    """
    return getattr(device, "slice_index", 0) if device.platform == "tpu" else 0


def sizes_text(shape: Sequence[int]) -> str:
    """The mesh sizes as text, such as "data 8, fsdp 16, model 1, spatial 1"."""
    return ", ".join(f"{axis} {size}" for axis, size in zip(AXES, shape))


def _choices(shape: Sequence[int], devices: int) -> str:
    """The part of an error message that lists valid sizes of the largest axis."""
    if shape.count(-1) > 1:
        return "here more than one is -1"
    at = max((i for i, size in enumerate(shape) if size > 0), key=lambda i: (shape[i], i))
    others = math.prod(size for i, size in enumerate(shape) if size > 0 and i != at)
    if devices % others:
        return f"each must divide {devices}"
    left = devices // others
    sizes = [size for size in range(1, left + 1) if left % size == 0] if -1 in shape else [left]
    return f"with the other sizes unchanged, {AXES[at]} may be {', '.join(map(str, sizes))}"


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """The `compiler_options` of `jax.jit` for programs on this mesh; empty except on TPUs."""
    return TPU_OPTIONS if mesh.devices.flat[0].platform == "tpu" else {}


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: rows over `data` and `fsdp`."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array of which every device holds a copy."""
    return NamedSharding(mesh, P())


def image_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of images [b h w c]: rows over the batch axes, height over `spatial`."""
    return NamedSharding(mesh, P(BATCH_AXES, "spatial" if mesh.shape["spatial"] > 1 else None))


def check_batch(rows: int, sizes: Mapping[str, int]) -> None:
    """Raises ValueError unless `rows` is a multiple of data x fsdp."""
    shards = sizes["data"] * sizes["fsdp"]
    if rows % shards:
        raise ValueError(
            f"a batch of {rows} does not divide over data x fsdp = {shards}; use a multiple of"
            f" {shards}"
        )


def rows_on(devices: Sequence[jax.Device], rows: int, mesh: Mesh) -> list[int]:
    """The rows of a batch that these devices hold, ascending.

    If image height is sharded over processes, several processes hold the same rows.
    """
    check_batch(rows, mesh.shape)
    parts = batch_sharding(mesh).devices_indices_map((rows,))
    return sorted({row for device in devices for row in range(rows)[parts[device][0]]})


def process_rows(rows: int, mesh: Mesh) -> list[int]:
    """The rows of a batch that this process reads.

    They need not be contiguous: the devices of a TPU host are a block of the mesh.
    """
    return rows_on(mesh.local_devices, rows, mesh)


def owned_rows(rows: int, mesh: Mesh) -> list[int]:
    """The rows of `process_rows` that no process with a lower index holds, ascending.

    Every row of a batch is owned by exactly one process.
    """
    first: dict[int, int] = {}
    for device, part in batch_sharding(mesh).devices_indices_map((rows,)).items():
        start = part[0].start or 0
        first[start] = min(first.get(start, device.process_index), device.process_index)
    size = rows // len(first)
    return [
        row for row in process_rows(rows, mesh) if first[row - row % size] == jax.process_index()
    ]


def fetch_rows(array: Shaped[Array, "b *d"]) -> Shaped[np.ndarray, "local *d"]:
    """This process's rows of an array with a batch's sharding, in the order of `process_rows`."""
    parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def place_batch(
    batch: dict[str, Shaped[np.ndarray, "local ..."]], mesh: Mesh
) -> dict[str, Shaped[Array, "b ..."]]:
    """Puts this process's rows (see `process_rows`) on the mesh, as global arrays.

    Raises ValueError unless the number of rows is a multiple of data x fsdp.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    held = process_rows(shards, mesh)
    rows = len(next(iter(batch.values()))) * shards // len(held)
    check_batch(rows, mesh.shape)
    size, sharding = rows // shards, batch_sharding(mesh)
    # The first row of each shard: global index -> index in this process.
    begin = {shard * size: i * size for i, shard in enumerate(held)}

    def put(array: Shaped[np.ndarray, "local *d"]) -> Shaped[Array, "b *d"]:
        part = lambda index: array[begin[index[0].start or 0] :][:size]
        return jax.make_array_from_callback((rows, *array.shape[1:]), sharding, part)

    with jax.transfer_guard_host_to_device("allow"):  # the only transfer of a training step
        return {name: put(array) for name, array in batch.items()}


def constrain_activations(mesh: Mesh) -> Constrain:
    """The `constrain` callable of a model: fixes the sharding of activations.

    Feature maps [b h w c] are sharded like images, other arrays by rows. Without the constraint,
    the partitioner sometimes propagates the kernel's sharding to the activations. It then
    all-gathers feature maps instead of the kernel (seen after up-sampling, with jax 0.10.2).
    """
    if mesh.size == 1:
        return lambda h: h

    def constrain(h: Float[Array, "*d"]) -> Float[Array, "*d"]:
        rows = NamedSharding(mesh, P(BATCH_AXES, *[P.UNCONSTRAINED] * (h.ndim - 1)))
        return jax.lax.with_sharding_constraint(h, image_sharding(mesh) if h.ndim == 4 else rows)

    return constrain


def gather_kernels(mesh: Mesh) -> Gather:
    """The `gather` of a model: all-gathers a convolution's kernel if image height is sharded.

    The partitioner computes a wrong convolution if both the image height and the kernel's input
    channels are sharded (seen with jax 0.10.2 on 8 CPU devices: the errors are as large as the
    activations, in kernels with more input than output channels).
    """
    if mesh.shape["spatial"] == 1:
        return lambda kernel: kernel
    return lambda kernel: jax.lax.with_sharding_constraint(kernel, replicated(mesh))


def path_name(path: tuple) -> str:
    """A key path as text, such as "ema/down_2/block_0/conv_1/kernel"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def fsdp_spec(shape: tuple[int, ...], size: int, min_elements: int) -> P:
    """Shards over `fsdp` the largest dimension that is a multiple of `size`.

    Of equal dimensions, it takes the first. (The last dimension lies along the TPU's lanes; if it
    is sharded, XLA all-reduces the gradient and slices it instead of reduce-scattering it.)
    Arrays with fewer than `min_elements` elements, or with no such dimension, are replicated.
    """
    divisible = [i for i, n in enumerate(shape) if n % size == 0]
    if size == 1 or math.prod(shape) < min_elements or not divisible:
        return P()
    best = max(divisible, key=lambda i: shape[i])
    return P(*("fsdp" if i == best else None for i in range(len(shape))))


def rule_spec(
    placement: str | Sequence[str | None], shape: tuple[int, ...], mesh: Mesh, min_elements: int
) -> P:
    """The PartitionSpec of a leaf of this shape.

    A per-dimension placement that does not fit the shape falls back to "fsdp"; a factored moment,
    for example, has fewer dimensions than its parameter.
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
    """One line for each parameter that its rule should shard but cannot, with a remedy.

    Such a parameter is replicated on every device.
    """
    problems, fsdp = [], mesh.shape["fsdp"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = f"params/{path_name(path)}"
        placement, shape = rules[rule_of(name, rules)][1], list(leaf.shape)
        if placement == "replicate" or math.prod(shape) < min_elements:
            continue
        if placement != "fsdp" and not _fits(placement, leaf.shape, mesh):
            problems.append(
                f"{name} {shape}: its rule {placement} does not fit; each sharded dimension must"
                " be a multiple of its axis's size"
            )
        elif placement == "fsdp" and fsdp > 1 and not any(n % fsdp == 0 for n in shape):
            sizes = [
                n
                for n in range(2, mesh.size + 1)
                if mesh.size % n == 0 and any(d % n == 0 for d in shape)
            ]
            advice = (
                f"set mesh.fsdp to one of {', '.join(map(str, sizes))}"
                if sizes
                else "no mesh.fsdp divides it"
            )
            problems.append(
                f"{name} {shape}: no dimension is a multiple of mesh.fsdp = {fsdp}; {advice}"
            )
    return problems


def rule_of(name: str, rules: Sequence[Sequence[Any]]) -> int:
    """Index of the first rule that matches the path. Raises ValueError if there is none."""
    for i, (pattern, _) in enumerate(rules):
        if re.search(pattern, name):
            return i
    raise ValueError(f"no sharding rule matches {name}; end the rules with ('.*', 'fsdp')")


def check_rules(rules: Any, mesh: Mesh) -> None:
    """Raises ValueError for invalid rules, and for a `model` axis that no rule uses."""
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
                f" axes from {AXES} and None"
            )
        if len(set(axes)) < len(axes):
            raise ValueError(f"sharding rule {rule[0]!r} -> {rule[1]!r} names an axis twice")
        try:
            re.compile(rule[0])
        except re.error as error:
            raise ValueError(
                f"sharding rule {rule[0]!r} is not a valid regular expression: {error}"
            ) from error
        named.update(axes)
    if mesh.shape.get("model", 1) > 1 and "model" not in named:
        raise ValueError(
            f"mesh.model is {mesh.shape['model']}, but no rule shards anything over it: add a rule"
            " such as ('conv_0/kernel', [None, None, None, 'model']), or set mesh.model to 1"
        )


def place_tree(tree: Tree, shardings: Tree) -> Tree:
    """Puts host arrays, the same in all processes, on the mesh; each device gets its shards."""

    def put(leaf, to):
        return jax.make_array_from_callback(leaf.shape, to, lambda index: leaf[index])

    return jax.tree.map(put, tree, shardings)


def tree_shardings(
    tree: Tree,
    mesh: Mesh,
    rules: Sequence[Sequence[Any]],
    min_elements: int,
    partial: bool = False,
) -> Tree:
    """A NamedSharding for each leaf of a tree of arrays or shapes, by the first rule that matches.

    partial: the tree is a part of a training state, so rules may match none of its leaves.

    Raises ValueError for invalid rules, a rule that matches no leaf, and a leaf without a rule.
    """
    check_rules(rules, mesh)
    used = set()

    def named_sharding(path, leaf):
        used.add(rule := rule_of(path_name(path), rules))
        return NamedSharding(mesh, rule_spec(rules[rule][1], leaf.shape, mesh, min_elements))

    shardings = jax.tree_util.tree_map_with_path(named_sharding, tree)
    unused = [rules[i][0] for i in range(len(rules)) if i not in used]
    if unused and not partial:
        raise ValueError(
            f"sharding rules match no leaf: {unused}; fix the pattern or remove the rule"
        )
    return shardings


def shard_encoder(shapes: Tree, mesh: Mesh) -> Tree:
    """The shapes of a text encoder's parameters with their shardings, by ENCODER_RULES."""

    def shard(path, leaf):
        placement = ENCODER_RULES[rule_of(path_name(path), ENCODER_RULES)][1]
        sharding = NamedSharding(mesh, rule_spec(placement, leaf.shape, mesh, min_elements=0))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(shard, shapes)
