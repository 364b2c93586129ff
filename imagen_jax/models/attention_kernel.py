"""Attention for TPUs as one Pallas kernel forward and one backward, so that attention weights never
leave the chip.

A block of queries meets all keys at once: image and text are at most some thousand positions, so a
row of weights fits on the chip and the softmax needs no running maximum, and the backward pass
computes the weights again from q and k alone. Arrays keep the layout that the projections make, [b
n c]: a grid step takes the 128 channels (`LANES`) of one head or of several small ones, and lanes
of other heads are masked to zero, which costs a matrix unit of 128 columns nothing and saves every
transposition.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from imagen_jax.models.attention import Keys
from imagen_jax.models.remat import keep

LANES = 128
QUERIES = 256  # of one grid step; with 1,152 keys its fp32 weights are 1.2 MB of on-chip memory
MAX_KEYS = 2304
MASKED = -1e30  # added to a score; finite, so that a difference of two is


def fits(n: int, m: int, c: int, heads: int) -> bool:
    """Whether the kernel takes n queries and m keys of c channels in so many heads."""
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
    """`attention.attend` for what `fits`. `interpret` runs it without a TPU, slowly."""
    return _attend(q, tuple(_padded(*group) for group in keys), heads, interpret)


def _padded(k: Array, v: Array, valid: Array | None) -> tuple[Array, ...]:
    """(k, v) with as many keys as fill whole vectors, and the bias [b 1 m] of their scores unless
    every one is valid.
    """
    more = -k.shape[1] % LANES
    if more:
        k, v = (jnp.pad(a, ((0, 0), (0, more), (0, 0))) for a in (k, v))
        valid = jnp.ones((k.shape[0], k.shape[1] - more), bool) if valid is None else valid
    if valid is None:
        return k, v
    return k, v, jnp.where(jnp.pad(valid, ((0, 0), (0, more))), 0.0, MASKED)[:, None, :]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _attend(q: Array, keys: tuple[tuple[Array, ...], ...], heads: int, interpret: bool) -> Array:
    return _forward(q, keys, heads, interpret)[0]


def _forward(q, keys, heads, interpret):
    (out,) = _call(_forward_kernel, (q,), keys, (q,), heads, interpret)
    out = keep(out)
    return out, (q, keys, out)


def _backward(heads, interpret, residuals, d_out):
    q, keys, out = residuals
    gradients = [array for group in keys for array in group[:2]]
    dq, *found = _call(_backward_kernel, (q, out, d_out), keys, (q, *gradients), heads, interpret)
    return dq, tuple(
        (found[2 * i], found[2 * i + 1], *(None for _ in group[2:])) for i, group in enumerate(keys)
    )


_attend.defvjp(_forward, _backward)


def _call(kernel, of_queries, keys, outputs, heads, interpret):
    """Runs a kernel for every row, 128 channels and block of queries; the last are innermost, so
    that sums over them stay on the chip.
    """
    q = of_queries[0]
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
        in_specs=[some_queries] * len(of_queries)
        + [all_keys(a) if a.shape[2] == c and a.shape[1] > 1 else bias(a) for a in flat],
        out_specs=[some_queries, *map(all_keys, outputs[1:])],
        out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in outputs],
        scratch_shapes=[pltpu.VMEM((a.shape[1], LANES), jnp.float32) for a in outputs[1:]],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name=kernel.__name__.strip("_"),
    )(*of_queries, *flat)


def _grouped(arrays, lengths):
    """A flat sequence as one of sequences of these lengths."""
    arrays = iter(arrays)
    return [[next(arrays) for _ in range(length)] for length in lengths]


def _forward_kernel(q, *arrays, channels, groups):
    *arrays, out = arrays
    keys = _grouped(arrays, groups)
    total = jnp.zeros(q.shape, jnp.float32)
    for head in range(LANES // channels):
        mine = _lanes_of(head, channels, q.shape)
        weights, norm = _exp_scores(jnp.where(mine, q[...], 0), keys, channels)
        found = sum(
            _product(w.astype(q.dtype), group[1][...], 1, 0) for w, group in zip(weights, keys)
        )
        total = jnp.where(mine, found / norm, total)
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
        # d softmax: weights * (dw - sum_j weights_j dw_j), and that sum is out . d_out.
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


def _exp_scores(q, keys, channels: int) -> tuple[list[Array], Array]:
    """(exp(scores - their maximum) [n m] for each group of keys, the sums over all keys [n 1]) in
    fp32.
    """
    scores = [
        _product(q, k[...], 1, 1) * channels**-0.5 + (bias[0][...] if bias else 0.0)
        for k, _, *bias in keys
    ]
    highest = functools.reduce(jnp.maximum, [jnp.max(s, axis=1, keepdims=True) for s in scores])
    weights = [jnp.exp(s - highest) for s in scores]
    return weights, sum(jnp.sum(w, axis=1, keepdims=True) for w in weights)


def _product(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """Matrix product over one axis of each, summed in fp32; fp32 inputs are multiplied in fp32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a,
        b,
        (((axis_a,), (axis_b,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _lanes_of(head: int, channels: int, shape: tuple[int, ...]) -> Array:
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return (lane >= head * channels) & (lane < (head + 1) * channels)
