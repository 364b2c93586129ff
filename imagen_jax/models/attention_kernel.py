"""Attention for TPUs as Pallas kernels. Attention weights never leave on-chip memory.

There is one forward and one backward kernel. A block of queries meets all keys at once: image and
text have at most a few thousand positions, so a row of attention weights fits on the chip and the
softmax needs no running maximum. The backward pass recomputes the weights from q and k.

Arrays keep the layout of the projections, [b n c], so nothing is transposed. A grid step handles
128 channels (`LANES`): one head, or several small ones. For each head the lanes of the other heads
are masked to zero. This costs no time, because the matrix unit is 128 columns wide.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from imagen_jax.models.attention import Keys
from imagen_jax.models.remat import mark_stored

LANES = 128
QUERIES = 256  # per grid step; with 1,152 keys the fp32 weights take 1.2 MB of on-chip memory
MAX_KEYS = 2304
MASKED = -1e30  # added to the scores of invalid keys; finite, so that differences are finite


def fits(n: int, m: int, c: int, heads: int) -> bool:
    """Whether the kernel supports these sizes.

    Args:
        n, m: number of queries and of keys.
        c: number of channels, of all heads together.
        heads: number of heads.
    """
    return (
        c % LANES == 0
        and c % heads == 0
        and LANES % (c // heads) == 0
        and n % 16 == 0
        and n % min(n, QUERIES) == 0
        and m <= MAX_KEYS
    )


def flash_attend(
    q: Float[Array, "b n c"], keys: Keys, heads: int, interpret: bool = False
) -> Float[Array, "b n c"]:
    """`attention.attend` as a kernel, for sizes that `fits` accepts.

    `interpret` runs the kernel without a TPU; this is slow and meant for tests.
    """
    return _attend(q, tuple(_padded(*group) for group in keys), heads, interpret)


def _padded(
    k: Float[Array, "b m c"], v: Float[Array, "b m c"], valid: Bool[Array, "b m"] | None
) -> tuple[Float[Array, "b _ _"], ...]:
    """Pads a group of keys to a multiple of 128.

    Returns (k, v), or (k, v, bias) where the bias [b 1 m] masks invalid and padded keys.
    """
    padding = -k.shape[1] % LANES
    if padding:
        k, v = (jnp.pad(a, ((0, 0), (0, padding), (0, 0))) for a in (k, v))
        valid = jnp.ones((k.shape[0], k.shape[1] - padding), bool) if valid is None else valid
    if valid is None:
        return k, v
    return k, v, jnp.where(jnp.pad(valid, ((0, 0), (0, padding))), 0.0, MASKED)[:, None, :]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _attend(
    q: Float[Array, "b n c"],
    keys: tuple[tuple[Float[Array, "b _ _"], ...], ...],
    heads: int,
    interpret: bool,
) -> Float[Array, "b n c"]:
    return _forward(q, keys, heads, interpret)[0]


def _forward(q, keys, heads, interpret):
    (out,) = _call(_forward_kernel, (q,), keys, (q,), heads, interpret)
    out = mark_stored(out)
    return out, (q, keys, out)


def _backward(heads, interpret, residuals, d_out):
    q, keys, out = residuals
    keys_values = [array for group in keys for array in group[:2]]
    dq, *d_keys_values = _call(
        _backward_kernel, (q, out, d_out), keys, (q, *keys_values), heads, interpret
    )
    return dq, tuple(
        (d_keys_values[2 * i], d_keys_values[2 * i + 1], *(None for _ in group[2:]))
        for i, group in enumerate(keys)
    )


_attend.defvjp(_forward, _backward)


def _call(kernel, per_query, keys, outputs, heads, interpret):
    """Runs a kernel on the grid (row of the batch, 128 channels, block of queries).

    Blocks of queries are the innermost dimension, so that sums over queries stay on the chip.

    Args:
        kernel: the kernel function.
        per_query: inputs [b n c] that are read one block of queries at a time.
        keys: groups of (k, v) or (k, v, bias), which every grid step reads whole.
        outputs: arrays of the outputs' shapes and types: the first is written per block of queries,
            the others are summed over all queries.
        heads: number of heads.
        interpret: run without a TPU.
    """
    q = per_query[0]
    b, n, c = q.shape
    queries = min(n, QUERIES)
    some_queries = pl.BlockSpec((None, queries, LANES), lambda row, lanes, i: (row, i, lanes))
    all_keys = lambda a: pl.BlockSpec(
        (None, a.shape[1], LANES), lambda row, lanes, i: (row, 0, lanes)
    )
    bias = lambda a: pl.BlockSpec((None, 1, a.shape[2]), lambda row, lanes, i: (row, 0, 0))
    flat = [array for group in keys for array in group]
    return pl.pallas_call(
        functools.partial(kernel, channels=c // heads, groups=[len(group) for group in keys]),
        grid=(b, c // LANES, n // queries),
        in_specs=[some_queries] * len(per_query)
        + [all_keys(a) if a.shape[2] == c and a.shape[1] > 1 else bias(a) for a in flat],
        out_specs=[some_queries, *map(all_keys, outputs[1:])],
        out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in outputs],
        scratch_shapes=[pltpu.VMEM((a.shape[1], LANES), jnp.float32) for a in outputs[1:]],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name=kernel.__name__.strip("_"),
    )(*per_query, *flat)


def _grouped(arrays, lengths):
    """Splits a flat sequence into lists of the given lengths."""
    arrays = iter(arrays)
    return [[next(arrays) for _ in range(length)] for length in lengths]


def _forward_kernel(q, *arrays, channels, groups):
    *arrays, out = arrays
    keys = _grouped(arrays, groups)
    total = jnp.zeros(q.shape, jnp.float32)
    for head in range(LANES // channels):
        mine = _lanes_of(head, channels, q.shape)
        weights, norm = _exp_scores(jnp.where(mine, q[...], 0), keys, channels)
        weighted = sum(
            _product(w.astype(q.dtype), group[1][...], 1, 0) for w, group in zip(weights, keys)
        )
        total = jnp.where(mine, weighted / norm, total)
    out[...] = total.astype(out.dtype)


def _backward_kernel(q, out, d_out, *arrays, channels, groups):
    count = sum(groups)
    keys, (dq, *gradients) = (
        _grouped(arrays[:count], groups),
        arrays[count : count + 1 + 2 * len(groups)],
    )
    sums = arrays[count + 1 + 2 * len(groups) :]

    @pl.when(pl.program_id(2) == 0)
    def _():
        for total in sums:
            total[...] = jnp.zeros_like(total)

    total = jnp.zeros(q.shape, jnp.float32)
    out_d_out = out[...].astype(jnp.float32) * d_out[...].astype(jnp.float32)
    for head in range(LANES // channels):
        mine = _lanes_of(head, channels, q.shape)
        q_mine, d_mine = jnp.where(mine, q[...], 0), jnp.where(mine, d_out[...], 0)
        # The softmax's gradient is weights * (dw - sum_j weights_j dw_j); the sum is out . d_out.
        mean = jnp.sum(jnp.where(mine, out_d_out, 0), axis=1, keepdims=True)
        weights, norm = _exp_scores(q_mine, keys, channels)
        for i, (weight, (k, v, *_)) in enumerate(zip(weights, keys)):
            weight = weight / norm
            d_scores = (weight * (_product(d_mine, v[...], 1, 1) - mean) * channels**-0.5).astype(
                q.dtype
            )
            sums[2 * i][...] += _product(d_scores, q_mine, 0, 0)
            sums[2 * i + 1][...] += _product(weight.astype(q.dtype), d_mine, 0, 0)
            total += jnp.where(mine, _product(d_scores, k[...], 1, 0), 0)
    dq[...] = total.astype(dq.dtype)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        for gradient, total in zip(gradients, sums):
            gradient[...] = total[...].astype(gradient.dtype)


def _exp_scores(q, keys, channels: int) -> tuple[list[Float[Array, "n _"]], Float[Array, "n 1"]]:
    """Unnormalised attention weights and their sums, in fp32.

    Returns exp(scores - row maximum) [n m] for each group of keys, and the sums over all keys [n
    1].
    """
    scores = [
        _product(q, k[...], 1, 1) * channels**-0.5 + (bias[0][...] if bias else 0.0)
        for k, _, *bias in keys
    ]
    highest = functools.reduce(jnp.maximum, [jnp.max(s, axis=1, keepdims=True) for s in scores])
    weights = [jnp.exp(s - highest) for s in scores]
    return weights, sum(jnp.sum(w, axis=1, keepdims=True) for w in weights)


def _product(
    a: Float[Array, "_ _"], b: Float[Array, "_ _"], axis_a: int, axis_b: int
) -> Float[Array, "_ _"]:
    """Matrix product over one axis of each operand, accumulated in fp32.

    fp32 operands are multiplied at full precision.
    """
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a,
        b,
        (((axis_a,), (axis_b,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _lanes_of(head: int, channels: int, shape: tuple[int, int]) -> Bool[Array, "_ _"]:
    """Boolean mask of the lanes that belong to one head."""
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return (lane >= head * channels) & (lane < (head + 1) * channels)
