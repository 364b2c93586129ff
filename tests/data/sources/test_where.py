"""Conditions on metadata: what they keep, what they cannot decide, and that they run no code."""

import pickle

import pytest

from imagen_jax.data.sources.where import FILTERED, UNDECIDED, Where


@pytest.mark.parametrize(
    "text, metadata, reason",
    [
        ("width >= 256 and punsafe < 0.1", {"width": 256, "punsafe": 0.05}, None),
        ("width >= 256 and punsafe < 0.1", {"width": 255, "punsafe": 0.05}, FILTERED),
        ("width >= 256", {}, UNDECIDED),
        ("width >= 256", {"width": None}, UNDECIDED),
        ("width >= 256", {"width": float("nan")}, UNDECIDED),
        ("width >= 256", {"width": "wide"}, UNDECIDED),
        ("max(width, height) / min(width, height) <= 2", {"width": 2, "height": 1}, None),
        ("max(width, height) / min(width, height) <= 2", {"width": 2, "height": 0}, UNDECIDED),
        ("lower(license) in ('cc0', 'cc by')", {"license": "CC0"}, None),
        ("not watermark", {"watermark": True}, FILTERED),
    ],
)
def test_items_are_kept_by_their_metadata(text, metadata, reason):
    """Catches a missing value that counts as 0 or ends the run, and an inverted condition."""
    fault = Where(text).fault(metadata)
    assert (fault and fault.reason) == reason
    again = pickle.loads(pickle.dumps(Where(text))).fault(metadata)
    assert again == fault


@pytest.mark.parametrize(
    "text",
    ["width >", "3 > 2", "__import__('os').system('true')", "width.real > 1", "open('x') == width"],
)
def test_what_is_no_condition_is_refused_at_once(text):
    """Catches code that runs, and a condition that fails on every item of a long run."""
    with pytest.raises(ValueError, match="--where"):
        Where(text)
