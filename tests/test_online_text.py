"""The batches in which text encoders of a run encode captions."""

import types

from imagen_jax import online_text


def test_few_captions_are_replicated_at_once():
    """Catches the features of a batch of 2048 captions on every device: 2 GiB of T5-XXL's."""
    mesh = lambda data, fsdp: types.SimpleNamespace(shape={"data": data, "fsdp": fsdp})
    rows = getattr(online_text.rows_at_once, "__wrapped__", online_text.rows_at_once)
    sizes = [rows(*each) for each in ((9999, mesh(8, 1)), (9999, mesh(64, 4)), (9999, mesh(1, 1)))]
    assert sizes == [512, 512, 64]
    assert [rows(captions, mesh(2, 4)) for captions in (0, 8, 9)] == [8, 8, 16]
