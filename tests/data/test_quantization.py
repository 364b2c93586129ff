"""Token features as int8: rounding, edge cases, and the error that the manifest states."""

import ml_dtypes
import numpy as np
import pytest

from imagen_jax.data.quantization import dequantize, error_sums, quantize, relative_errors

BF16 = ml_dtypes.bfloat16


def features(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(BF16)


def test_rounds_to_the_nearest_step_of_each_token():
    """Catches truncation, one scale for all tokens, a step of max / 128, a changed maximum."""
    tokens = np.float32([[127, -64, 2.5, 0.4], [-0.5, 0.25, 0.125, 0]]).astype(BF16)
    q, scale = quantize(tokens)
    assert (q.dtype, scale.dtype) == ("int8", "float32")
    np.testing.assert_array_equal(q, [[127, -64, 2, 0], [-127, 64, 32, 0]])
    np.testing.assert_array_equal(scale, np.float32([1, 0.5 / 127]))
    x = features(50, 64) * np.logspace(-3, 3, 50).astype(BF16)[:, None]
    back, exact = dequantize(*quantize(x)), x.astype(np.float64)
    assert back.dtype == BF16
    # Half a step, and the rounding of the result to the 8 bits of bfloat16.
    bound = np.abs(exact).max(axis=1, keepdims=True) / 127 / 2 * 1.001 + np.abs(exact) * 2**-8
    assert (np.abs(back.astype(np.float64) - exact) <= bound).all()
    largest = np.abs(exact).argmax(axis=1)[:, None]
    np.testing.assert_array_equal(
        np.take_along_axis(back, largest, 1), np.take_along_axis(x, largest, 1)
    )


@pytest.mark.filterwarnings("error")
def test_tokens_of_zeros_and_of_the_smallest_numbers():
    """Catches a division by zero, and an integer that wraps when the scale is not exact."""
    smallest = np.float32([[2.0**-133, -(2.0**-133)], [3 * 2.0**-133, 0]]).astype(BF16)
    assert (smallest != 0).any(axis=1).all()
    q, scale = quantize(np.concatenate([np.zeros((1, 2), BF16), smallest]))
    assert scale[0] == 0 and (dequantize(q, scale)[0] == 0).all()
    assert np.isfinite(scale).all() and q[1, 0] >= 0 >= q[1, 1] and np.abs(q).max() <= 127
    assert relative_errors([error_sums([np.zeros((3, 2), BF16)])]) == {
        "relative_rms": 0.0,
        "largest_token": 0.0,
    }


def test_errors_are_those_of_what_readers_get():
    """Catches errors before the rounding to bfloat16, means over texts or shards, a mean token."""
    texts = [features(length, 16, seed=length) * np.float32(length) for length in (1, 5, 2)]
    texts = [text.astype(BF16) for text in texts]
    exact = np.concatenate(texts).astype(np.float64)
    error = np.concatenate([dequantize(*quantize(text)) for text in texts]) - exact
    ratios = np.linalg.norm(error, axis=1) / np.linalg.norm(exact, axis=1)
    expected = {
        "relative_rms": np.linalg.norm(error) / np.linalg.norm(exact),
        "largest_token": ratios.max(),
    }
    assert 0.003 < expected["relative_rms"] < expected["largest_token"] < 0.02
    for parts in ([texts], [texts[:1], texts[1:]]):
        assert relative_errors([error_sums(part) for part in parts]) == pytest.approx(expected)
