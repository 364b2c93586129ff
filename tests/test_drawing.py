"""From prompts to pictures: each prompt encoded once, the encoder freed, sets continued."""

import collections
import gc
import json
import types
import weakref

import ml_dtypes
import numpy as np
import pytest

from imagen_jax import cascade, drawing, drawn_sets, picture_set, set_reservations, sharding
from imagen_jax.encoders_in_turn import Encoders
from imagen_jax.picture_set import Requests
from imagen_jax.text import feature_file
from tests import test_cascade, tiny

config = test_cascade.config  # the fixture: a cascade of tiny random stages


class Encoder:
    """Random features of each text; counts its calls."""

    dim, pooled_dim, max_length, identity = tiny.DIM, 0, 6, test_cascade.ENCODER

    def __init__(self):
        self.texts, self.batch_sizes = [], set()

    def tokenize(self, texts):
        return [[0]] * len(texts), [False] * len(texts)

    def unknown(self, texts):
        return [""] * len(texts)

    def encode(self, texts, batch_size, fill=False):
        assert fill
        self.texts += texts
        self.batch_sizes.add(batch_size)
        rng = lambda text: np.random.default_rng(len(text))
        features = [rng(text).standard_normal((1 + len(text) % 5, tiny.DIM)) for text in texts]
        return [feature.astype(ml_dtypes.bfloat16) for feature in features]

    def encode_pooled(self, texts, batch_size, fill=False):
        return self.encode(texts, batch_size, fill), np.empty((len(texts), 0), ml_dtypes.bfloat16)


@pytest.fixture
def encoder(monkeypatch):
    made = Encoder()
    monkeypatch.setattr(drawing, "load_encoders", lambda *_: Encoders.single(made))
    return made


@pytest.fixture
def complete(config):
    mesh = {"data": 2, "fsdp": 4, "model": 1, "spatial": 1}
    base = {"base": config["base"], "sr_1": config["sr_1"] | {"checkpoint": ""}}
    return {**config, **base, "sr_2": config["sr_2"] | {"checkpoint": ""}, "mesh": mesh}


def draw(config, requests, output):
    return drawing.draw(drawing.Drawer(config, ["base"]), requests, output, drawn_sets.NO_IMAGE)


def manifest_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_set_is_drawn_and_continued(complete, encoder, tmp_path):
    """Catches a prompt that is encoded for each of its pictures, a continued set that is drawn
    again, and another command that continues it.
    """
    requests = Requests(["a", "bb", "a"], 2, 5)
    rows = manifest_rows(draw(complete, requests, tmp_path))
    assert encoder.texts == ["a", "bb"]
    prompts = [(row["prompt"], row["seed"]) for row in rows]
    assert prompts == [("a", 5), ("a", 6), ("bb", 7), ("bb", 8), ("a", 9), ("a", 10)]
    assert len({row["sha256"] for row in rows}) == 6
    for row in rows[2:4]:
        (tmp_path / row["file"]).unlink()
    encoder.texts.clear()
    changed = complete | {"batch_size": 1, "mesh": complete["mesh"] | {"data": 8, "fsdp": 1}}
    assert manifest_rows(draw(changed, requests, tmp_path)) == rows
    assert encoder.texts == ["bb"]
    draw(complete, requests, tmp_path)
    assert encoder.texts == ["bb"]  # nothing left to draw
    other = draw(complete, Requests(["a"], 1, 5), tmp_path)
    assert other.name == "set_0006.jsonl"
    assert manifest_rows(other)[0]["sha256"] == rows[0]["sha256"]


def test_the_encoder_is_freed_before_the_stages_are_placed(complete, monkeypatch, tmp_path):
    """Catches an encoder of 9 GiB that stays on the devices beside the stages."""
    drawer_encoder = Encoder()
    alive = weakref.ref(drawer_encoder)
    made = Encoders({"": [drawer_encoder].pop})
    monkeypatch.setattr(drawing, "load_encoders", lambda *_: made)
    del drawer_encoder
    place, seen = cascade.place, []

    def record(stages):
        gc.collect()
        seen.append(alive() is None)
        return place(stages)

    monkeypatch.setattr(cascade, "place", record)
    draw(complete, Requests(["a"], 1, 0), tmp_path)
    assert seen == [True]


def test_a_record_lists_the_stages_that_ran(complete, encoder):
    """Catches a record of three stages for a picture of one: the others have no checkpoint."""
    record = drawing.Drawer(complete, cascade.STAGES).record
    assert record["stages"] == ["base"] and len(record["checkpoints"]) == 1


def test_processes_agree_on_each_field_of_a_job(complete, encoder, monkeypatch, tmp_path):
    """Catches a message that names the whole job, and a field that is not compared."""
    compared = {}
    monkeypatch.setattr(drawing.agreement, "check", compared.update)
    monkeypatch.setattr(drawn_sets, "Reservation", None)  # draws nothing
    for w in (2.0, 3.0):
        changed = complete["base"] | {"sampling": complete["base"]["sampling"] | {"w": w}}
        with pytest.raises(TypeError):
            draw(complete | {"base": changed}, Requests(["a"], 1, 5), tmp_path)
        assert compared["config.base.sampling.w"] == str(w) and compared["first_seed"] == "5"
    assert {"prompts_sha256", "per_prompt", "checkpoints", "encoder.name", "--output"} < set(
        compared
    )


def test_a_device_encodes_its_part_of_a_batch(monkeypatch, tmp_path):
    """Catches texts per device as many as images on all devices: eight times the memory here."""
    mesh = sharding.make_mesh({"data": 8, "fsdp": 1, "model": 1, "spatial": 1})
    made = Encoder()
    drawer = types.SimpleNamespace(
        config={"batch_size": 24},
        encoders=Encoders.single(made),
        sources={"": ""},
        stages=[types.SimpleNamespace(mesh=mesh)],
    )
    encode = getattr(drawing.encode_prompts, "__wrapped__", drawing.encode_prompts)
    text = encode(drawer, Requests(["a", "bb"], 1, 0), [[0, 1]], tmp_path)
    assert made.batch_sizes == {3} and text(1)[""].embedding.shape == (3, tiny.DIM)
    sizes = [feature_file.texts_per_device(size, 8) for size in (1, 8, 9, 64, 10_000)]
    assert sizes == [1, 1, 2, 8, 64]


@pytest.mark.parametrize("rows", [[], [0], [0, 1, 2, 5, 7, 8], list(range(9))])
def test_ranges_are_those_rows(rows):
    """Catches a run without its last row, and rows that are agreed on by their number alone."""
    assert drawn_sets.from_ranges(drawn_sets.to_ranges(rows)) == rows
    assert len(drawn_sets.to_ranges([0, 1, 2, 5, 7, 8])) == 3


def test_a_row_belongs_to_its_set(tmp_path):
    """Catches numbers of an earlier set in the manifest of a later one."""
    requests = Requests(["a"], 1, 0)
    part = picture_set.part_path(tmp_path, 3, "p")
    pictures = picture_set.PictureSet(tmp_path, requests, {}, 3, part)
    pictures.add(0, [np.zeros((4, 4, 3), np.uint8)])
    assert pictures.finish().name == "set_0003.jsonl"
    assert (tmp_path / "0003_a.png").is_file()


def test_a_set_that_was_killed_before_its_manifest_gets_it(tmp_path):
    """Catches a set with all pictures and no manifest, which no later command can complete."""
    make = lambda: drawn_sets.Reservation(tmp_path, Requests(["a"], 1, 0), {"config": {}})
    with make() as reserved:
        reserved.pictures().add(0, [np.zeros((4, 4, 3), np.uint8)])
    with make() as reserved:
        assert reserved.left == []
        path = reserved.finish()
        assert len(manifest_rows(path)) == 1
    path.write_bytes(path.read_bytes() * 2 + b"\n")
    with make() as reserved:
        assert len(manifest_rows(reserved.finish())) == 1


def test_the_files_of_all_processes_are_visible_before_they_are_read(tmp_path, monkeypatch):
    """Catches a manifest without the pictures that a network file system shows late, and a manifest
    that other processes read before they see it.
    """
    awaited = []
    record = lambda files: awaited.append([path.name for path in files])
    monkeypatch.setattr(drawing.shared_files, "share_files", record)
    monkeypatch.setattr(drawing.shared_files, "wait_for_files", record)
    given = Requests(["a", "b"], 1, 0), {"config": {}}
    with drawn_sets.Reservation(tmp_path, *given, earlier=[(4, 4)]) as reserved:
        pictures = reserved.pictures()
        for row in (0, 1):
            pictures.add(row, [np.zeros((size, size, 3), np.uint8) for size in (4, 8)])
        reserved.finish()
    files = [f"{stem}{end}" for stem in ("0000_a", "0001_b") for end in (".png", "_4.png", ".json")]
    assert awaited == [[pictures.part.name], files, ["set_0000.jsonl"]]


def test_a_set_without_a_picture_of_an_earlier_stage_is_completed(tmp_path):
    """Catches a row that counts as there by its last picture, so that no run draws the others."""
    given = tmp_path, Requests(["a", "b"], 1, 0), {"config": {}}
    reserve = lambda: drawn_sets.Reservation(*given, earlier=[(4, 4)])
    images = [np.zeros((size, size, 3), np.uint8) for size in (4, 8)]
    with reserve() as reserved:
        for row in reserved.left:
            reserved.pictures().add(row, images)
        reserved.finish()
    (tmp_path / "0001_b_4.png").unlink()
    with reserve() as reserved:
        assert reserved.left == [1]
        reserved.pictures().add(1, images)
        reserved.finish()
    with reserve() as reserved:
        assert reserved.left == []


def test_a_set_has_the_pictures_of_the_earlier_stages(tmp_path, monkeypatch):
    """Catches `draw` that takes a set for complete without them."""
    given = []

    def reserve(*_, earlier):
        given.extend(earlier)
        raise InterruptedError

    monkeypatch.setattr(drawn_sets, "Reservation", reserve)
    sizes = [(64, 96), (256, 384), (1024, 1536)]
    drawer = object.__new__(drawing.Drawer)  # without loading
    drawer.record = {"config": {}}
    drawer.stages = [types.SimpleNamespace(size=size) for size in sizes]
    with pytest.raises(InterruptedError):
        drawing.draw(drawer, Requests(["a"], 1, 0), tmp_path, drawn_sets.NO_IMAGE)
    assert given == sizes[:2]


def test_a_changed_picture_is_named_and_drawn_again(tmp_path, monkeypatch, caplog):
    """Catches a corrupt picture that stops every run, and one that is evaluated."""
    monkeypatch.setattr(drawn_sets, "SHOWN", 1)
    image = np.zeros((4, 4, 3), np.uint8)
    reserve = lambda: drawn_sets.Reservation(
        tmp_path, Requests(["a", "b", "c"], 1, 0), {"config": {}}
    )
    with reserve() as reserved:
        for row in reserved.left:
            reserved.pictures().add(row, [image])
        before = manifest_rows(reserved.finish())
    (tmp_path / "0001_b.png").write_bytes(b"x")
    (tmp_path / "0002_c.png").write_bytes((tmp_path / "0002_c.png").read_bytes()[:-9])
    with reserve() as reserved:
        assert reserved.left == [1, 2]
        for row, value in ((1, 0), (2, 1)):
            reserved.pictures().add(row, [image + value])
        after = manifest_rows(reserved.finish())
    assert after[:2] == before[:2] and after[2]["sha256"] != before[2]["sha256"]
    named, more = (record.getMessage() for record in caplog.records if record.levelname != "INFO")
    assert named.endswith("0001_b.png was changed since it was drawn; it is drawn again")
    assert more == "... and 1 more pictures"
    with reserve() as reserved:
        assert reserved.left == []


def test_what_changes_no_picture_is_not_part_of_the_job():
    """Catches a set that begins again because the mesh, the batch or a path for `plan` differs."""
    record = {"image": "", "stages": ["base"]}
    config = {"mesh": {}, "batch_size": 4, "base": {"sampling": {"w": 2.0}, "config": "a.py"}}
    requests = Requests(["a"], 1, 0)
    job = lambda **changes: drawn_sets.job_of(requests, record | {"config": config | changes})
    assert job() == job(mesh={"data": 8}) == job(batch_size=1)
    assert job() == job(base={"sampling": {"w": 2.0}})
    assert job() != job(base={"sampling": {"w": 3.0}, "config": "a.py"})


def test_a_set_larger_than_the_disk_is_refused(tmp_path, monkeypatch):
    """Catches a disk that is full after a night of sampling, and sets that are not added up."""
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(drawing.shutil, "disk_usage", lambda _: usage(0, 0, 3 * 64**2 * 10))
    drawing.check_disk(tmp_path, [(6, (64, 64)), (16, (16, 64))])
    with pytest.raises(ValueError, match=r"23 pictures need up to .* GiB, .* give another"):
        drawing.check_disk(tmp_path, [(7, (64, 64)), (16, (16, 64))])


def test_a_set_with_other_settings_is_drawn_whole(tmp_path):
    """Catches a check of the disk that counts the pictures of other settings, or only those
    of the last stage.
    """
    record = drawn_sets.NO_IMAGE | {
        "config": {"which": "ema"},
        "checkpoints": [],
        "stages": ["base"],
    }
    requests = Requests(["a", "b"], 2, 0)
    job = drawn_sets.job_of(requests, record)
    with set_reservations.reserve(tmp_path, job, len(requests)) as first:
        part = picture_set.part_path(tmp_path, first, "p")
        made = picture_set.PictureSet(tmp_path, requests, record, first, part)
        made.add(0, [np.zeros((size, size, 3), np.uint8) for size in (16, 64)])
    sizes = [(16, 16), (64, 64)]
    left = lambda record: drawn_sets.missing(requests, record, tmp_path, sizes)
    assert left(record) == [(len(requests) - 1, size) for size in sizes]
    other = record | {"config": {"which": "params"}}
    assert left(other) == [(len(requests), size) for size in sizes]
