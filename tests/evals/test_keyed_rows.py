"""Shards of keyed rows: joined in one order, or refused."""

import numpy as np
import pytest

from imagen_jax.evals.keyed_rows import join

KEYS = np.array([(p, i) for p in (30, 4, 17) for i in (0, 1)])


def features(keys):
    """Features from which the key can be read."""
    return (keys @ [[1.0, 100], [0.1, 10]]).astype(np.float32)


def shards(*parts):
    return [(KEYS[list(part)], features(KEYS[list(part)])) for part in parts]


@pytest.mark.parametrize(
    "parts", [[range(6)], [(5, 0), (3, 1), (4, 2)], [(), (2, 4, 0), (1, 5, 3)]]
)
def test_order_and_number_of_shards_change_nothing(parts):
    """Catches rows in the order of the shards, or sorted by key."""
    joined = join(KEYS, shards(*parts))
    np.testing.assert_array_equal(joined, features(KEYS))
    assert joined.dtype == np.float32


@pytest.mark.parametrize(
    "parts, message",
    [
        ([(0, 1), (4,)], r"3 rows are missing; .*: \(4, 0\), \(4, 1\), \(17, 1\)$"),
        ([(0, 1, 2, 3, 4)], r"1 row is missing; .*: \(17, 1\)$"),
        ([range(6), (3,)], r"1 row is doubled; .*: \(4, 1\)$"),
        ([(0, 0, 0, 1, 1, 2, 3, 4, 5)], r"2 rows are doubled; .*: \(30, 0\), \(30, 1\)$"),
        (
            [range(6), (5, 4, 3, 2)],
            r"4 rows are doubled; .*: \(17, 1\), \(17, 0\), \(4, 1\), \.\.\.$",
        ),
        ([], r"6 rows are missing"),
    ],
)
def test_missing_and_doubled_rows_are_refused(parts, message):
    """Catches a padded last batch that counts twice, and a dropped one."""
    with pytest.raises(ValueError, match=message) as error:
        join(KEYS, shards(*parts))
    assert "\n" not in str(error.value)


def test_unexpected_rows_are_refused():
    """Catches rows of another list of prompts, and padding with ids of its own."""
    other = np.array([[99, 0], [30, 2]])
    with pytest.raises(ValueError, match=r"2 rows are not expected; .*: \(99, 0\), \(30, 2\)"):
        join(KEYS, [*shards(range(6)), (other, features(other))])
    with pytest.raises(ValueError, match=r"1 row is expected twice; .*: \(30, 0\)"):
        join(np.concatenate([KEYS, KEYS[:1]]), shards(range(6)))


def test_broken_shards_are_refused():
    """Catches keys without features, and shards of two networks."""
    with pytest.raises(ValueError, match="a shard has 6 keys and 5 rows"):
        join(KEYS, [(KEYS, features(KEYS)[:5])])
    with pytest.raises(ValueError, match=r"the shards have \[1, 2\] features"):
        join(KEYS, [*shards(range(3)), (KEYS[3:], features(KEYS[3:])[:, :1])])
