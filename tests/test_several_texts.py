"""Several text encoders from the data to the samples: networks, training, evaluation, cascade; and
features that a run computes itself.
"""

import json
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax import cascade, drawing, encoder_identity, schema, sharding, train
from imagen_jax.data import pipeline
from imagen_jax.data.example_text import StoredText
from imagen_jax.diffusion import conditioning
from imagen_jax.distributed.watch import Watch
from imagen_jax.encoders_in_turn import Encoders
from imagen_jax.evals import stage_evaluation
from imagen_jax.online_text import OnlineText
from imagen_jax.picture_set import Requests, manifest_rows
from imagen_jax.stage import create_stage
from imagen_jax.text_inputs import MASK, POOLED, TEXT, TextInput, key, text_inputs
from imagen_jax.training.run import Run
from imagen_jax.weights.text_encoders import load_text_encoder
from tests import tiny
from tests.data.synthetic_source import prepare, write_folder
from tests.test_cascade import MESH
from tests.weights.test_encoder_families import write

LENGTH = 12
TWO = {
    "text__dim": 0,
    "text__encoders": ["clip", "bert"],
    "text__dims": [24, 24],
    "text__lengths": [LENGTH, LENGTH],
    "text__pooled_dims": [10, 0],
    "text__drops": [0.3, 0.6],
    **tiny.ONE_LEVEL_UNET,
}


def config(**changes):
    return schema.complete(tiny.config(**TWO | changes), new=True)


@pytest.fixture(scope="module")
def stage():
    return create_stage(config())


def random_batch(stage, b=4, seed=0):
    rng = np.random.default_rng(seed)
    batch = {}
    for name, (shape, dtype) in stage.batch_shapes(b, stage.buckets[0]).items():
        if name.startswith(MASK):
            batch[name] = np.arange(shape[1]) < rng.integers(1, shape[1] + 1, b)[:, None]
        elif name == "image":
            batch[name] = rng.integers(0, 256, shape, np.uint8)
        else:
            batch[name] = rng.standard_normal(shape).astype(dtype)
    return batch


def output(stage, params, batch):
    cond = stage.cond(jax.tree.map(jnp.asarray, batch))
    z = jnp.ones((4, 8, 8, 3))
    return stage.denoiser(params)(z, jnp.zeros(4), cond)


def test_every_text_field_arrives_and_padding_does_not(stage):
    """Catches an encoder that the network does not read, a pooled vector that is not added, and
    padding between two encoders' tokens that is attended to.
    """
    params, batch = tiny.random_params(stage.init), random_batch(stage)
    batch["text_mask.clip"][:] = np.arange(LENGTH) < 5
    plain = output(stage, params, batch)
    for name in ("text.clip", "text.bert", "pooled.clip", "text_mask.bert"):
        other = batch | {name: random_batch(stage, seed=1)[name]}
        assert jnp.abs(output(stage, params, other) - plain).max() > 1e-4, name
    padded = batch["text.clip"].copy()
    padded[:, 5:] = 9
    np.testing.assert_array_equal(output(stage, params, batch | {"text.clip": padded}), plain)


def test_one_named_encoder_is_the_unnamed_one():
    """Catches a network of one named encoder that differs from that of an unnamed one in more than
    the names of parameters.
    """
    one = dict(text__dim=24, data__text_length=LENGTH, **tiny.ONE_LEVEL_UNET)
    unnamed = create_stage(schema.complete(tiny.config(**one), new=True))
    columns = dict(dims=[24], lengths=[LENGTH], pooled_dims=[0], drops=[0.0], encoders=["t5"])
    changes = {f"text__{name}": value for name, value in columns.items()}
    named = create_stage(config(**changes))
    params = tiny.random_params(unnamed.init)
    inner = dict(params["conditioning"])
    renamed = {
        f"{name}_t5" if name in ("text_norm", "text_proj") else name: value
        for name, value in inner.items()
    }
    batch = random_batch(unnamed)
    fields = {f"{n}.t5" if n != "image" else n: value for n, value in batch.items()}
    other = {**params, "conditioning": renamed}
    np.testing.assert_array_equal(output(unnamed, params, batch), output(named, other, fields))


def test_inputs_are_dropped_alone_and_together(stage):
    """Catches draws of two encoders that are the same, a probability that is not an encoder's own,
    and a dropped encoder whose pooled vector stays.
    """
    draws = stage.draw(jax.random.key(3), 4000, (1, 1))
    clip, bert = draws["drop.clip"], draws["drop.bert"]
    assert abs(clip.mean() - 0.3) < 0.04 and abs(bert.mean() - 0.6) < 0.04
    assert abs((clip & bert).mean() - 0.18) < 0.04 and abs(draws["drop"].mean() - 0.1) < 0.02
    cond = stage.cond(jax.tree.map(jnp.asarray, random_batch(stage)))
    drop = jnp.array([True, False, True, False])
    alone = conditioning.drop_input(cond, "clip", drop)
    for name in ("text.clip", "pooled.clip"):
        assert not np.any(alone[name][0]) and np.array_equal(alone[name][1], cond[name][1])
    assert alone["text_mask.clip"][0].tolist() == [True] + [False] * (LENGTH - 1)
    np.testing.assert_array_equal(alone["text.bert"], cond["text.bert"])
    null = conditioning.null_text(cond)
    assert not any(np.any(null[name]) for name in ("text.clip", "text.bert", "pooled.clip"))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(text__dim=8), "with text.encoders set text.dim = 0"),
        (dict(text__encoders=["t5", "t5"]), "has a name twice"),
        (dict(text__dims=[24]), "text.encoders has 2, text.dims has 1"),
    ],
)
def test_fields_that_do_not_fit_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        text_inputs(config(**changes))


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
    if differ is None:
        return encoder_identity.check_same(names, ours, theirs, "a and b", "use one")
    with pytest.raises(ValueError, match=f"{differ}.*; use one$") as error:
        encoder_identity.check_same(names, ours, theirs, "a and b", "use one")
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
    find = lambda: encoder_identity.find(name, A, encoders, "a and b", "use one")
    if found in encoders:
        assert find() == found
        return
    with pytest.raises(ValueError, match=f"{found}.*; use one$"):
        find()


def test_the_stages_of_a_cascade_share_what_they_share():
    """Catches stages that are refused for an encoder that only one of them reads, and a conflict of
    stages that are not neighbours.
    """

    def loaded(name, names, **encoders):
        texts = [TextInput(text, 4, 8) for text in names]
        stage = types.SimpleNamespace(name=name, texts=texts)
        record = encoder_identity.to_record(encoders)
        made = object.__new__(cascade.LoadedStage)  # without loading
        vars(made).update(stage=stage, encoder=record)
        return made

    base, middle = loaded("base", ["t"], t=A, c=A), loaded("sr", ["c"], t=B, c=B)
    cascade.check_encoders([base, middle, loaded("without", [], t=B)])
    cascade.check_encoders([base, middle, loaded("last", ["t"], t=A)])
    with pytest.raises(ValueError, match="stages base and last do not share a text encoder t"):
        cascade.check_encoders([base, middle, loaded("last", ["t"], t=B)])


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Directories of a random CLIP and a random BERT."""
    root = tmp_path_factory.mktemp("encoders")
    return {name: write(root / name, name) for name in ("clip", "bert")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("folder") / "images", 12)


@pytest.fixture(scope="module")
def both(folder, encoders, tmp_path_factory):
    """Data with features of both encoders."""
    output = tmp_path_factory.mktemp("both") / "data"
    load = lambda path: lambda: load_text_encoder(str(path), LENGTH)
    prepare(folder, output, Encoders({name: load(path) for name, path in encoders.items()}))
    return output


@pytest.fixture(scope="module")
def texts(folder, tmp_path_factory):
    """The same data with the texts of its captions alone."""
    output = tmp_path_factory.mktemp("texts") / "data"
    prepare(folder, output, Encoders({}))
    return output


def online(encoders, data, **changes):
    given = "+".join(f"{name}={path}" for name, path in encoders.items())
    return config(
        text__online=True, text__encoder=given, data__path=str(data), train__steps=2, **changes
    )


def run(made, workdir, monkeypatch):
    monkeypatch.setattr(sharding, "make_mesh", lambda sizes, devices=None: MESH)
    assert train.train(made, workdir, (0, 0), 0.0, "", Watch(100.0)) == 0
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("workers", [0, 2])
def test_online_features_are_the_stored_ones(both, texts, encoders, workers):
    """Catches tokens of another caption, features of padding, and a pooled vector of another row;
    and a tokenizer that data workers cannot load.
    """
    stored = config(data__path=str(both), data__workers=workers)
    made = online(encoders, texts, data__workers=workers)
    wanted = next(pipeline.batches(stored["data"], 0, 0, text=StoredText(text_inputs(stored))))
    computed = OnlineText.load(made, MESH)
    batch = next(pipeline.batches(made["data"], 0, 0, text=computed.tokens))
    np.testing.assert_array_equal(batch["image"], wanted["image"])
    fields = computed.place(batch)
    for name in (TEXT, MASK, POOLED):
        field = key(name, "clip")
        ours, theirs = (np.asarray(f[field], np.float32) for f in (fields, wanted))
        np.testing.assert_allclose(ours, theirs, atol=0.03)
    assert fields.keys() == {name for name in wanted if "." in name}


def test_a_run_with_two_encoders(both, texts, encoders, tmp_path, monkeypatch):
    """Catches a run whose losses with computed features are others than with stored ones, a
    checkpoint that cannot be evaluated or sampled, and another encoder, layer or pooling that is
    not refused.
    """
    changes = dict(train__validate_every=2, train__validate_rows=4, train__sample_every=2)
    made = config(data__path=str(both), train__steps=2, **changes)
    losses = run(made, tmp_path / "stored", monkeypatch)
    again = run(online(encoders, texts, **changes), tmp_path / "online", monkeypatch)
    np.testing.assert_allclose(losses, again, rtol=2e-3)
    rows = [
        json.loads((tmp_path / name / "validation.jsonl").read_text())
        for name in ("stored", "online")
    ]
    assert rows[0].keys() == rows[1].keys()
    for name in ("heldout/ema/loss", "heldout/ema/x_error"):
        assert abs(rows[0][name] / rows[1][name] - 1) < 0.01

    numbers = dict(rows=4, samples=4, gallery=4, bins=2, batch_size=8, seed=0, lowres_from="")
    evaluate = lambda data, **more: stage_evaluation.Evaluator(
        str(data), "ema", ["loss"], numbers, {}, **more
    )
    given = "+".join(f"{name}={path}" for name, path in encoders.items())
    measured = [
        evaluate(data, **more).run(tmp_path / "stored", tmp_path / f"evaluated_{i}")
        for i, (data, more) in enumerate(((both, {}), (texts, {"encoder": given})))
    ]
    one, other = (each["loss"]["heldout"]["overall"]["mean"] for each in measured)
    assert abs(one / other - 1) < 0.01
    with pytest.raises(ValueError, match="has only the texts of its captions: give --encoder"):
        evaluate(texts).run(tmp_path / "stored", tmp_path / "refused")
    swapped = given.replace("clip=", "x=").replace("bert=", "clip=").replace("x=", "bert=")
    with pytest.raises(ValueError, match="do not share a text encoder|width"):
        evaluate(texts, encoder=swapped).run(tmp_path / "stored", tmp_path / "refused")

    draw_both(tmp_path / "stored", given, tmp_path / "drawn")


def draw_both(workdir, given, output):
    """Draws with the encoders of the training, and with others that are refused."""
    base = {"checkpoint": str(workdir), "config": "", "sampling": config()["sampling"]}
    none = {"checkpoint": "", "config": "", "sampling": config()["sampling"]}
    mesh = {"data": -1, "fsdp": 1, "model": 1, "spatial": 1}
    made = dict(encoder_dtype="bfloat16", which="ema", batch_size=8, mesh=mesh, base=base)
    made |= {"sr_1": none, "sr_2": none}
    drawer = drawing.Drawer(made | {"encoder": given}, ["base"])
    assert drawer.record["encoder"]["encoders"].keys() == {"clip", "bert"}
    requests = Requests(["picture number 3", "a colour ramp"], 1, 0)
    drawing.check_prompts(drawer, requests.prompts)
    rows = manifest_rows(drawing.draw(drawer, requests, output, drawing.NO_IMAGE))
    assert len({row["sha256"] for row in rows}) == 2
    clip, bert = given.split("+")
    for wrong, message in (
        (clip, "bert is needed, clip given"),
        (f"{clip}@layer=1+{bert}", "text encoder clip .layer"),
        (f"{clip}+{bert}@pooling=mean", "text encoder bert .pooling"),
        (f"{clip}+bert={clip.removeprefix('clip=')}", "text encoder bert .weights_sha256"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            drawing.Drawer(made | {"encoder": wrong}, ["base"])
        assert "\n" not in str(error.value)


def test_online_encoders_must_be_those_of_the_inputs(encoders, texts):
    """Catches an encoder of another width or name, and a run without any."""
    for given, message in (
        ("", "text.online needs an encoder"),
        (f"clip={encoders['clip']}", "gives the encoders clip, but the stage reads clip, bert"),
        (f"clip={encoders['bert']}+bert=t5_tiny", "pooled|width"),
    ):
        made = online(encoders, texts)
        made["text"]["encoder"] = given
        with pytest.raises(ValueError, match=message):
            OnlineText.load(made, MESH)


def test_stored_features_that_a_run_lacks_are_refused(texts, both):
    """Catches a run without text features that starts."""
    with pytest.raises(ValueError, match="has only the texts of its captions"):
        Run.create(config(data__path=str(texts)))
    with pytest.raises(ValueError, match="set text.encoders"):
        Run.create(schema.complete(tiny.config(data__path=str(both)), new=True))


def test_only_encoders_that_are_read_decide(texts, both, folder, encoders, tmp_path):
    """Catches a stage without text that cannot train on texts alone, and a set that is refused for
    an encoder that the stage does not read; and a run that keeps such an encoder.
    """
    other = tmp_path / "other" / "data"
    load = lambda name, choice="": lambda: load_text_encoder(f"{encoders[name]}{choice}", LENGTH)
    named = {"clip": load("clip"), "bert": load("bert", "@layer=1")}
    prepare(folder, other, Encoders(named))
    mixture = lambda *paths: dict(data__mixture=[(str(path), 1.0) for path in paths])
    without = dict(text__dim=0, model__cond_dim=0, model__text_attention=[False])
    for paths in ((texts,), (texts, both)):
        made = tiny.config(**tiny.ONE_LEVEL_UNET | without | mixture(*paths))
        assert Run.create(schema.complete(made, new=True)).meta["encoder"] == {"encoders": {}}
    columns = dict(encoders=["clip"], dims=[24], lengths=[LENGTH], pooled_dims=[0], drops=[0.0])
    clip = {f"text__{name}": value for name, value in columns.items()}
    kept = Run.create(config(**clip | mixture(both, other))).meta["encoder"]
    assert kept["encoders"].keys() == {"clip"}
    with pytest.raises(ValueError, match="text encoder bert .layer.*prepare both with the same"):
        Run.create(config(**mixture(both, other)))


def test_one_encoder_is_in_memory_at_a_time(monkeypatch, encoders):
    """Catches encoders that are loaded together, each as if it had the memory alone."""
    alive, seen = [], []

    def load(name, length, dtype, make_mesh):
        seen.append((name, sum(one() is not None for one in alive), length))
        made = type("Loaded", (), {"identity": {"name": name}})()
        alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr(drawing, "load_text_encoder", load)
    texts = [TextInput("clip", 24, 16), TextInput("bert", 24, 6)]
    stage = object.__new__(cascade.LoadedStage)
    vars(stage).update(stage=types.SimpleNamespace(texts=texts))
    given = "+".join(f"{name}={path}" for name, path in encoders.items())
    loaded = drawing.load_encoders({"encoder": given, "encoder_dtype": "bfloat16"}, [stage])
    for name in loaded.in_turn():
        assert loaded.load(name).identity["name"] == str(encoders[name])
    # The tiny CLIP reads 14 tokens. BERT stays from the first round.
    wanted = [("clip", 14), ("bert", 6), ("clip", 14)]
    assert seen == [(str(encoders[name]), 0, length) for name, length in wanted]
    loaded.release()
    assert not any(one() for one in alive)


def test_a_field_that_the_network_reads_must_be_there(stage):
    """Catches a pooled vector that is missing and is ignored, and one that is added although the
    stage does not read it.
    """
    params = tiny.random_params(stage.init)
    batch = random_batch(stage)
    plain = output(stage, params, batch)
    without = {name: value for name, value in batch.items() if name != "pooled.clip"}
    with pytest.raises(ValueError, match="reads pooled.clip, which the batch lacks"):
        output(stage, params, without)
    more = batch | {"pooled.bert": np.ones((4, 24), np.float32)}
    np.testing.assert_array_equal(output(stage, params, more), plain)


def test_settings_of_text_that_contradict_each_other():
    """Catches a message that names fields which the config does not use."""
    with pytest.raises(ValueError, match=r"text.encoders=\('clip', 'bert'\) and model.cond_dim=0"):
        create_stage(config(model__cond_dim=0))
    plain = tiny.config(model__cond_dim=0, **tiny.ONE_LEVEL_UNET)
    with pytest.raises(ValueError, match="text.dim=8 and model.cond_dim=0"):
        create_stage(schema.complete(plain, new=True))


def test_encoders_are_compiled_before_the_loop(texts, encoders, monkeypatch, caplog):
    """Catches encoders that are compiled inside the first step."""
    monkeypatch.setattr(sharding, "make_mesh", lambda sizes, devices=None: MESH)
    made = Run.create(online(encoders, texts))
    step = types.SimpleNamespace(compile=lambda: None)
    monkeypatch.setattr(type(made.program), "lower", lambda *_: step)
    batch = next(made.batches(0, made.rows))
    with jax.log_compiles():
        made.compile_steps()
        assert any("Compiling" in record.message for record in caplog.records)
        caplog.clear()
        jax.block_until_ready(made.place(batch))
    assert not [record.message for record in caplog.records if "Compiling" in record.message]
