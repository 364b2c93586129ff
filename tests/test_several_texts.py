"""Several text encoders from the data to the samples: networks, training, evaluation, cascade; and
features that a run computes itself.
"""

import gc
import json
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax import (
    cascade,
    drawing,
    drawn_sets,
    encoder_identity,
    online_text,
    schema,
    sharding,
    train,
)
from imagen_jax.data import pipeline, records
from imagen_jax.data.example_text import StoredFeatures
from imagen_jax.diffusion import conditioning
from imagen_jax.distributed.watch import Watch
from imagen_jax.encoders_in_turn import Encoders
from imagen_jax.evals import evaluation_text, stage_evaluation
from imagen_jax.online_text import OnlineText
from imagen_jax.picture_set import Requests, manifest_rows
from imagen_jax.stage import create_stage
from imagen_jax.text_inputs import MASK, POOLED, TEXT, TextInput, field_name, text_inputs
from imagen_jax.training.run import Run
from imagen_jax.training.start_flags import Start
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
        (dict(text__encoders=["t5", ""]), "has the name '': give the names of prepare_data"),
        (dict(text__dims=[24]), "text.encoders has 2, text.dims has 1"),
        (dict(text__online=True), "text.online needs an encoder: set text.online_encoder=NAME"),
    ],
)
def test_fields_that_do_not_fit_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        text_inputs(config(**changes))


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
    changes |= dict(text__online=True, text__online_encoder=given)
    return config(data__path=str(data), train__steps=2, **changes)


def run(made, workdir, monkeypatch):
    monkeypatch.setattr(sharding, "make_mesh", lambda sizes, devices=None: MESH)
    assert train.train(made, workdir, (0, 0), 0.0, Start(), Watch(100.0)) == 0
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("workers", [0, 2])
def test_online_features_are_the_stored_ones(both, texts, encoders, workers):
    """Catches tokens of another caption, features of padding, and a pooled vector of another row;
    and a tokenizer that data workers cannot load.
    """
    stored = config(data__path=str(both), data__workers=workers)
    made = online(encoders, texts, data__workers=workers)
    wanted = next(pipeline.batches(stored["data"], 0, 0, text=StoredFeatures(text_inputs(stored))))
    computed = OnlineText.load(made, MESH)
    batch = next(pipeline.batches(made["data"], 0, 0, text=computed.tokens))
    np.testing.assert_array_equal(batch["image"], wanted["image"])
    fields = computed.place(batch)
    for name in (TEXT, MASK, POOLED):
        field = field_name(name, "clip")
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
    with pytest.raises(
        ValueError, match="has only the texts of its captions, no features: give --enc"
    ):
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
    rows = manifest_rows(drawing.draw(drawer, requests, output, drawn_sets.NO_IMAGE))
    assert len({row["sha256"] for row in rows}) == 2
    clip, bert = given.split("+")
    for wrong, message in (
        (clip, "bert is needed, clip given"),
        (f"{clip}@layer=1+{bert}", "text encoder clip .layer"),
        (f"{clip}@pooling=end+{bert}", "text encoder clip .*pooling: "),
        (f"{clip}+bert={clip.removeprefix('clip=')}", "text encoder bert .weights_sha256"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            drawing.Drawer(made | {"encoder": wrong}, ["base"])
        assert "\n" not in str(error.value)


def test_online_encoders_must_be_those_of_the_inputs(encoders, texts):
    """Catches an encoder of another width or name, and a run without any."""
    for given, message in (
        ("", "set text.online_encoder=NAME"),
        (f"clip={encoders['clip']}", "gives the encoders clip, but the stage reads clip, bert"),
        (f"clip={encoders['bert']}+bert=t5_tiny", "pooled|width"),
    ):
        made = online(encoders, texts)
        made["text"]["online_encoder"] = given
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


def test_stored_features_are_read_if_they_are_those_of_the_training(both, texts, encoders):
    """Catches features of another encoder that are read, --encoder that is ignored or refused."""
    prepared, alone = records.Prepared(both), records.Prepared(texts)
    trained = encoder_identity.to_record(prepared.encoders)
    made = config(data__path=str(both))
    choose = evaluation_text.choose_encoder
    assert choose(made, trained, prepared, "") == ""
    with pytest.raises(ValueError, match="--encoder x has no effect, because .* has its features"):
        choose(made, trained, prepared, "x")
    assert choose(made, trained, alone, "x") == "x"
    with pytest.raises(ValueError, match="only the texts .* no features: give --enc") as error:
        choose(made, trained, alone, "")
    assert "text.online" not in str(error.value)  # which is not for evaluate
    other = {"encoders": trained["encoders"] | {"bert": trained["encoders"]["clip"]}}
    assert choose(made, other, prepared, "x") == "x"
    with pytest.raises(ValueError, match="share a text encoder bert .*: give --encoder"):
        choose(made, other, prepared, "")
    more = config(text__encoders=["clip", "t5"])
    assert choose(more, trained, prepared, "x") == "x"
    assert choose(online(encoders, texts), trained, alone, "").startswith("clip=")
    assert [evaluation_text.kind(made, name) for name in ("", "x")] == ["stored", "computed"]
    without = schema.complete(tiny.config(text__dim=0, **tiny.ONE_LEVEL_UNET), new=True)
    with pytest.raises(ValueError, match="no effect, because the checkpoint reads no text"):
        choose(without, trained, prepared, "x")


def test_an_evaluation_encodes_with_one_encoder_after_another(both, texts, encoders, monkeypatch):
    """Catches encoders that stay in memory beside the stage or each other, features of another
    caption, and an encoder that reads less than the padded input of the stage.
    """
    alive, counts = [], []

    def load(*args, **more):
        counts.append(sum(encoder() is not None for encoder in alive))
        made = load_text_encoder(*args, **more)
        alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr(online_text, "load_text_encoder", load)
    alone = records.Prepared(texts)
    trained = encoder_identity.to_record(records.Prepared(both).encoders)
    made = online(encoders, texts, text__lengths=[15, LENGTH])  # the tiny CLIP reads 14 tokens
    given = made["text"]["online_encoder"]
    make_mesh = lambda weights: MESH
    ids = [5, 2, 2, 0]
    encoded = evaluation_text.encode(made, trained, alone, ids, given, make_mesh)
    gc.collect()
    assert counts == [0, 0, 0] and not any(encoder() for encoder in alive)
    read = encoded.open(alone)
    for caption_id in set(ids):
        fields, text = read(caption_id), alone.captions().text(caption_id)
        for name, length in (("clip", 14), ("bert", LENGTH)):
            encoder = load_text_encoder(str(encoders[name]), length)
            (wanted,), pooled = encoder.encode_pooled([text], 8)
            assert fields[f"text_mask.{name}"].sum() == len(wanted)
            pairs = [(fields[f"text.{name}"][: len(wanted)], wanted)]
            pairs += [(fields["pooled.clip"], pooled[0])] if name == "clip" else []
            for ours, theirs in pairs:
                np.testing.assert_allclose(*(np.float32(x) for x in (ours, theirs)), atol=0.03)


def test_cut_captions_are_reported_by_encoder(texts, encoders, caplog):
    """Catches the mean over encoders, which says that half as many captions are cut."""
    Run.create(online(encoders, texts, text__lengths=[2, LENGTH]))
    lines = [record.getMessage() for record in caplog.records if " are cut" in record.getMessage()]
    assert lines == [
        f"about 1e+02 % of the captions of {texts} are cut for clip; raise text.lengths, if the"
        " encoder reads more"
    ]
