"""Which text encoders are the same: of two records, of an input, of the stages of a cascade."""

import contextlib
import types

import pytest

from imagen_jax import cascade, drawing, encoder_identity
from imagen_jax.text_inputs import TextInput

A = {"name": "a", "weights_sha256": "1", "tokenizer_sha256": "2", "dim": 4, "layer": 1}
B = A | {"layer": 2}


@pytest.mark.parametrize(
    "names, ours, theirs, differ",
    [
        ([""], {"": A}, {"": A}, None),
        ([""], {"": A}, {"": B}, "encoder .layer: 1 and 2"),
        (["t"], {"t": A, "c": B}, {"t": A}, None),
        (["t"], {"t": A, "c": B}, {"t": A, "c": A}, None),
        (["c", "t"], {"t": A, "c": B}, {"t": B, "c": B}, "text encoder t .layer: 1 and 2"),
        (["t", "c"], {"t": A, "c": A}, {"t": A}, "text encoder c .t, c and t"),
        (["t"], {"t": A}, {"": A}, "text encoder t .t and one unnamed encoder"),
        ([], {"": A}, {"": B}, None),
        ([], {}, {"": B}, None),
    ],
)
def test_the_encoders_that_are_read_are_compared(names, ours, theirs, differ):
    """Catches two encoders that pass because one of them agrees, and an encoder that nobody reads
    that decides.
    """
    compare = lambda: encoder_identity.check_same(
        [TextInput(name, 4, 8) for name in names], ours, theirs, "a and b", "use one"
    )
    if differ is None:
        return compare()
    with pytest.raises(ValueError, match=f"{differ}.*; use one$") as error:
        compare()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoders", [{"": A}, {"t": A, "c": B}, {}])
def test_records_of_encoders(encoders):
    """Catches an unnamed encoder whose record is not its identity, as in older checkpoints."""
    record = encoder_identity.to_record(encoders)
    assert encoder_identity.from_record(record) == encoders
    assert "encoders" in record or record == A


@pytest.mark.parametrize(
    "name, encoders, found",
    [
        ("", {"": A}, ""),
        ("", {"c": B, "t": A}, "t"),
        ("t", {"": A}, ""),
        ("t", {"c": B, "t": A}, "t"),
        ("t", {"c": A}, "t is needed, c given"),
        ("", {"c": B}, "a is needed, c given"),
        ("t", {"t": B}, "text encoder t .layer"),
    ],
)
def test_an_input_finds_its_encoder(name, encoders, found):
    """Catches an input that reads an encoder of another name, or another layer."""
    text_input = TextInput(name, 4, 8)
    find = lambda: encoder_identity.find(text_input, A, encoders, "a and b", "use one")
    if found in encoders:
        assert find() == found
        return
    with pytest.raises(ValueError, match=f"{found}.*; use one$"):
        find()


@pytest.mark.parametrize("pooled_dim", [0, 5])
def test_a_pooled_vector_that_is_not_read_is_not_compared(pooled_dim):
    """Catches two sets refused for a pooling that nobody reads, and a pooling that is read and not
    compared.
    """
    mean, end = (A | {"pooling": pooling} for pooling in ("mean", "end"))
    text_input = TextInput("t", 4, 8, pooled_dim)
    calls = (
        lambda: encoder_identity.check_same([text_input], {"t": mean}, {"t": end}, "a", "b"),
        lambda: encoder_identity.find(text_input, mean, {"": end}, "a", "b"),
    )
    for call in calls:
        with pytest.raises(ValueError) if pooled_dim else contextlib.nullcontext():
            call()


def loaded(name, names, pooled_dim=0, **encoders):
    """A stage that reads the encoders of these names."""
    texts = [TextInput(text, 4, 8, pooled_dim) for text in names]
    stage = types.SimpleNamespace(name=name, texts=texts)
    record = encoder_identity.to_record(encoders)
    made = object.__new__(cascade.LoadedStage)  # without loading
    vars(made).update(stage=stage, encoder=record)
    return made


def test_encoders_of_a_cascade_are_named_in_messages(caplog):
    """Catches an error that does not say how to give named encoders, and an encoder that is loaded
    for nothing without a word.
    """
    stages = [loaded("base", ["t", "c"], t=A, c=B), loaded("sr", [""], **{"": A})]
    with pytest.raises(ValueError, match=r"t is needed, .*--config.encoder=t=\.\.\.\+c=\.\.\. "):
        drawing.text_sources(stages, {"": A | {"dim": 9}}, "mini")
    with pytest.raises(ValueError, match=r"; give the text encoder .*--config.encoder=\.\.\. "):
        drawing.text_sources(stages[1:], {"": B}, "mini")
    assert drawing.text_sources(stages, {"t": A, "c": B}, "") == {"t": "t", "c": "c", "": "t"}
    assert not caplog.records
    drawing.text_sources(stages, {"t": A, "c": B, "x": B, "": A}, "")
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "no stage reads the text encoder x"
    ]


def test_the_stages_of_a_cascade_share_what_they_share():
    """Catches stages that are refused for an encoder that only one of them reads, and a conflict of
    stages that are not neighbours.
    """
    base, middle = loaded("base", ["t"], t=A, c=A), loaded("sr", ["c"], t=B, c=B)
    cascade.check_encoders([base, middle, loaded("without", [], t=B)])
    cascade.check_encoders([base, middle, loaded("last", ["t"], t=A)])
    with pytest.raises(ValueError, match="stages base and last do not share a text encoder t"):
        cascade.check_encoders([base, middle, loaded("last", ["t"], t=B)])
    pooled = [loaded(f"p{n}", ["t"], 5, t=A | {"pooling": n}) for n in range(2)]
    cascade.check_encoders([base, pooled[0]])
    with pytest.raises(ValueError, match="stages p0 and p1 do not share .*pooling: 0 and 1"):
        cascade.check_encoders([base, *pooled])
