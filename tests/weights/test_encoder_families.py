"""CLIP text and BERT from a directory to features: identity, choice, limits, meshes."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax import encoder_identity
from imagen_jax.sharding import batch_mesh
from imagen_jax.text.choice import DEFAULT, Choice, parse
from imagen_jax.text.encoder import TextEncoder
from imagen_jax.text_inputs import TextInput
from imagen_jax.weights.text_encoders import (
    find_encoder,
    load_text_encoder,
    load_tokenize,
    longest_text,
    read_network,
)
from tests.text.random_encoders import BERTS, CLIPS, random_params, random_weights, write_encoder
from tests.weights import torch_files
from tests.weights.test_bert_files import LOWER
from tests.weights.test_bert_files import write_tokenizer as write_bert_tokenizer
from tests.weights.test_clip_files import vocabulary
from tests.weights.test_clip_files import write_tokenizer as write_clip_tokenizer

CONFIGS = {
    "clip": dataclasses.replace(CLIPS["exact"], vocab_size=len(vocabulary())),
    "bert": BERTS["bert"],
}
TEXTS = ["a red apple", "", "red red", "a apple red apple a", "red"]


def write(directory: pathlib.Path, family: str) -> pathlib.Path:
    if family == "clip":
        write_clip_tokenizer(directory, "tokenizer.json")
    else:
        write_bert_tokenizer(directory, LOWER)
    return write_encoder(directory, CONFIGS[family])


@pytest.fixture(name="directory", scope="module", params=["clip", "bert"])
def random_encoder(request, tmp_path_factory) -> pathlib.Path:
    return write(tmp_path_factory.mktemp("encoders") / f"random_{request.param}", request.param)


def config_of(name: str):
    path, choice = parse(name)
    return CONFIGS[pathlib.Path(path).name.removeprefix("random_")].with_choice(choice)


def same_bits(a, b) -> None:
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x.view(np.uint16), y.view(np.uint16))


def test_features_are_those_of_the_network(directory):
    """Catches a choice that is lost on the way, features out of order, and a pooled vector of the
    padding or of another text.
    """
    name = f"{directory}@layer=1,pooling={'end' if 'clip' in directory.name else 'mean'}"
    encoder = load_text_encoder(name, 14, "float32")
    assert isinstance(encoder, TextEncoder)
    config = config_of(name)
    features, pooled = encoder.encode_pooled(TEXTS, batch_size=2)
    assert pooled.shape == (5, encoder.pooled_dim) == (5, config.pooled_dim)
    same_bits(encoder.encode(TEXTS, batch_size=2), features)
    network = jax.jit(read_network(directory, "float32", parse(name)[1]).apply)
    params = {"params": random_params(config)}
    for row, feature, vector in zip(encoder.tokenize(TEXTS)[0], features, pooled):
        tokens = np.zeros((1, 14), np.int32)
        tokens[0, : len(row)] = row
        mask = (np.arange(14) < len(row))[None]
        want, want_vector = network(params, tokens, mask)
        for out, exact in ((feature, want[0, : len(row)]), (vector, want_vector[0])):
            close = dict(rtol=2**-7, atol=1e-4)  # one bf16 step
            np.testing.assert_allclose(out.astype(np.float32), exact, **close)


def test_identity(directory, tmp_path):
    """Catches an identity without layer or pooling, or one that depends on how a layer is written,
    on the path or on the format of the file.
    """
    encoder = load_text_encoder(str(directory), 14)
    identity = dict(encoder.identity)
    assert json.loads(json.dumps(identity)) == identity
    assert identity["name"] == directory.name and identity["max_length"] == 14
    assert identity["family"] in directory.name and identity["pooled_dim"] == encoder.pooled_dim
    moved = tmp_path / directory.name
    shutil.copytree(directory, moved)
    (moved / "model.safetensors").unlink()
    weights = random_weights(config_of(str(directory)))
    torch_files.write(moved / "pytorch_model.bin", *torch_files.plain(weights))
    assert load_text_encoder(str(moved), 14).identity == identity
    other = load_text_encoder(f"{directory}@layer=0", 14).identity
    assert {key for key in identity if identity[key] != other[key]} == {"layer"}


def compare(one, other):
    pooled = TextInput("", 4, 8, 4)
    encoder_identity.check_same([pooled], {"": one}, {"": other}, "a and b", "use one encoder")


def test_other_features_of_the_same_weights_are_refused(directory):
    """Catches a cascade whose stages read other layers or pooled vectors of one encoder."""
    identity = config_of(str(directory)).identity
    layer, kind = identity["layer"], "end" if "clip" in directory.name else "mean"
    for same in (f"{directory}@layer={layer}", f"{directory}@layer={layer - 4}"):
        compare(identity, config_of(same).identity)
    for option, field in (("layer=1", "layer"), (f"pooling={kind}", "pooling")):
        other = config_of(f"{directory}@{option}").identity
        with pytest.raises(ValueError, match=f"a and b do not share .*{field}: "):
            compare(identity, other)


def test_the_activation_and_norm_belong_to_the_identity():
    """Catches OpenCLIP's weights read with OpenAI's activation taken for the same encoder."""
    exact, quick = (CLIPS[name].with_choice(DEFAULT).identity for name in ("exact", "quick"))
    normed = CLIPS["exact"].with_choice(Choice(final_norm=True)).identity
    for other, field in ((quick, "activation: gelu and quick"), (normed, "final_norm: False and")):
        with pytest.raises(ValueError, match=field):
            compare(exact, other)


def test_the_longest_text(directory):
    """Catches positions beyond the table, which JAX reports as shapes that do not fit."""
    longest = config_of(str(directory)).max_length
    assert longest_text(str(directory)) == longest and longest_text("t5_tiny") is None
    encoder = load_text_encoder(str(directory), longest)
    (feature,) = encoder.encode(["a red apple " * 30], 1)
    assert feature.shape == (longest, encoder.dim)
    for load in (load_text_encoder, load_tokenize):
        with pytest.raises(
            ValueError,
            match=f"reads at most {longest} tokens, not 78: set --max_length to {longest}",
        ):
            load(str(directory), 78)


def test_mesh_changes_nothing(directory):
    """Catches sharded weights or a sharded batch that change features or pooled vectors."""
    mesh = batch_mesh(jax.devices(), 4)
    sharded = load_text_encoder(str(directory), 14, "float32", lambda weights: mesh)
    single = load_text_encoder(str(directory), 14, "float32")
    (features, pooled), (want, want_pooled) = (
        encoder.encode_pooled(TEXTS * 4, 2) for encoder in (sharded, single)
    )
    for a, b in zip([*features, pooled], [*want, want_pooled]):
        a, b = a.astype(np.float32), b.astype(np.float32)
        np.testing.assert_allclose(a, b, rtol=2**-7, atol=1e-4)


def test_the_number_of_devices_changes_no_bit(tmp_path):
    """Catches pooled vectors computed by all devices together: a resumed run would differ."""
    directory = str(write(tmp_path / "bert", "bert"))
    one, eight = (
        load_text_encoder(directory, 14, "bfloat16", lambda w: batch_mesh(jax.devices()[:n], 1))
        for n in (1, 8)
    )
    (features, pooled), (want, want_pooled) = (e.encode_pooled(TEXTS * 4, 2) for e in (one, eight))
    same_bits([*features, pooled], [*want, want_pooled])


def test_options_that_a_family_lacks(directory, tmp_path):
    """Catches a choice that is ignored."""
    with pytest.raises(ValueError, match=r"config.json: layer 9: the encoder has 3 blocks"):
        load_text_encoder(f"{directory}@layer=9", 14)
    with pytest.raises(ValueError, match="pooling 'max': choose one of"):
        load_text_encoder(f"{directory}@pooling=max", 14)
    if "bert" in directory.name:
        with pytest.raises(ValueError, match="BERT encoders have no option final_norm"):
            load_text_encoder(f"{directory}@final_norm=no", 14)
    with pytest.raises(ValueError, match="T5 encoders have no option pooling"):
        load_text_encoder("t5_tiny@pooling=mean", 14)


def test_t5_has_no_pooled_vector():
    """Catches a T5 whose identity or features change with the interface."""
    encoder = load_text_encoder("t5_tiny", 32)
    features, pooled = encoder.encode_pooled(["a red apple", ""], 2)
    assert encoder.pooled_dim == 0 and pooled.shape == (2, 0) and pooled.dtype == jnp.bfloat16
    same_bits(encoder.encode(["a red apple", ""], 2), features)
    assert not {"family", "layer", "pooling", "pooled_dim"} & encoder.identity.keys()


def test_hub_name_from_the_cache(directory, tmp_path, monkeypatch):
    """Catches a cached encoder that needs the network, or a file of another family."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "models--someone--encoder" / "snapshots" / ("a" * 40)
    shutil.copytree(directory, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("a" * 40)
    assert find_encoder("someone/encoder").name == "a" * 40
    identity = load_text_encoder("someone/encoder@layer=1", 14).identity
    assert identity["name"] == "someone/encoder" and identity["layer"] == 1
