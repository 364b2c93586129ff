"""The command `evaluate`: one stage from an exported file to its report, the cascade's second stage
on samples of the first, and the follower.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from imagen_jax import schema, storage
from imagen_jax.data import manifest_file, records
from imagen_jax.data.transforms import shrink
from imagen_jax.evals import history, stage_evaluation, superres
from imagen_jax.stage import create_stage
from imagen_jax.weights import checkpoint, exports
from imagen_jax.weights.retention import Retention
from tests import tiny
from tests.data import synthetic

COUNTS = {"train": 10, "heldout": 6}
NUMBERS = {
    "rows": 5,
    "samples": 3,
    "gallery": 16,
    "bins": 2,
    "batch_size": 8,
    "seed": 0,
    "lowres_from": "",
}
ENCODER = {
    "name": "fake",
    "weights_sha256": "ab",
    "tokenizer_sha256": "cd",
    "dim": synthetic.DIM,
    "max_length": synthetic.TEXT_LENGTH,
}

BASE = tiny.config(
    data__image_size=16,
    model__multipliers=[1],
    model__attention=[True],
    model__text_attention=[True],
)
SHARD_ALL = {"fsdp_min_elements": 16}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A prepared directory of noise images of 32 pixels, each with a caption of its own."""
    root, rng, shards = tmp_path_factory.mktemp("prepared"), np.random.default_rng(0), {}
    captions = [
        records.CaptionRow(f"caption {i}", synthetic.embedding(i, 2))
        for i in range(sum(COUNTS.values()))
    ]
    caption_ids = iter(range(len(captions)))
    for split, count in COUNTS.items():
        pixels = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
        rows = [
            records.ImageRow(synthetic.encode(image), 32, 32, f"{split}-{i}", (next(caption_ids),))
            for i, image in enumerate(pixels)
        ]
        name = records.shard_name("images", split, 0, 1)
        shards[name] = records.write_shard(
            root, name, [records.serialize_image(row) for row in rows]
        )
    name = records.shard_name("captions", "train", 0, 1)
    shards[name] = records.write_shard(
        root, name, [records.serialize_caption(row) for row in captions]
    )
    manifest = {
        "format_version": manifest_file.FORMAT_VERSION,
        "encoder": ENCODER,
        "counts": {"images": COUNTS},
        "shards": shards,
        "embedding": {"length": {"max": 2}},
        "image_sizes": {"min_side": 32},
    }
    manifest["hash"] = manifest_file.manifest_hash(manifest)
    storage.write_atomically(root / manifest_file.MANIFEST, json.dumps(manifest).encode())
    return root


def export(path: Path, config: dict, **meta) -> Path:
    """An exported file with random parameters of a config's stage."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(create_stage(config).init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape, leaf.dtype), shapes)
    meta = {"config": config, "encoder": ENCODER, "manifest_hash": "other", "step": 7} | meta
    exports.export_params(params, meta, path)
    return path


def evaluator(data: Path, *names: str, sampling=None, **numbers) -> stage_evaluation.Evaluator:
    return stage_evaluation.Evaluator(
        str(data), "ema", list(names), NUMBERS | numbers, sampling or {}
    )


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    """(result, output) of a base stage that draws 16 pixels, as the low-res images of the next
    have.
    """
    output = tmp_path_factory.mktemp("base")
    return (
        evaluator(data, "loss", "retrieval", sampling={"steps": 2}).run(
            export(output / "base.safetensors", BASE), output
        ),
        output,
    )


def test_result_is_whole_and_reads_back(data, base):
    """Catches a file that differs from what was measured, numbers JSON cannot hold, and provenance
    that would not give the numbers again.
    """
    result, output = base
    assert json.loads((output / "evaluation.json").read_text()) == result
    assert result["step"] == 7 and result["provenance"]["data"] == {
        "manifest_hash": records.Prepared(data).hash, "trained_on": "other", "images": COUNTS
    }  # fmt: skip
    assert (
        result["provenance"]["sampling"]["steps"] == 2
        and result["provenance"]["sampling"]["w"] == 5.0
    )
    assert result["provenance"]["checkpoint"]["sha256"] == records.sha256_file(
        output / "base.safetensors"
    )
    for split in COUNTS:
        assert (
            result["loss"][split]["overall"]["n"] == 5 and len(result["loss"][split]["bins"]) == 2
        )
        assert set(result["retrieval"][split]) == {"right", "shuffled", "null"}
        assert (
            result["retrieval"][split]["right"]["n"] == 3
            and result["retrieval"][split]["right"]["gallery"] == 16
        )
        assert Image.open(output / f"samples_{split}.png").width > 6 * 96
    assert Image.open(output / "loss.png").size[0] > 100


@pytest.mark.parametrize("name", ["evaluation.json", "samples.npz"])
def test_a_blocked_output_is_found_before_the_weights_are_read(data, tmp_path, name):
    """Catches an evaluation whose result cannot be written."""
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"{name} is a directory, but a file of that name"):
        evaluator(data, "loss").run(tmp_path / "gone", tmp_path)


def test_sharded_parameters_give_the_same_numbers(data, base, tmp_path, monkeypatch):
    """Catches parameters that every device holds whole, and kernels in a type that changes the
    result."""
    placed = []

    class Watched(stage_evaluation.Evaluation):
        def __init__(self, probe, rows, params):
            super().__init__(probe, rows, params)
            placed.append(params)

    monkeypatch.setattr(stage_evaluation, "Evaluation", Watched)
    monkeypatch.setattr(stage_evaluation.program, "fewest_parts", lambda *sizes: 4)
    path = export(tmp_path / "base.safetensors", BASE | {"mesh": BASE["mesh"] | SHARD_ALL})
    result = evaluator(data, "loss", sampling={"steps": 2}).run(path, tmp_path / "out")
    kernel = placed[0]["down_0"]["block_0"]["conv_1"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    for split in COUNTS:
        expected = base[0]["loss"][split]["overall"]["mean"]
        assert result["loss"][split]["overall"]["mean"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_cascade_is_measured_on_what_its_first_stage_drew(data, base, tmp_path):
    """Catches --lowres_from read but not used, rows that differ between the stages, and crops where
    whole images are drawn.
    """
    result, output = base
    second_output = tmp_path / "sr"
    path = export(
        tmp_path / "sr.safetensors",
        tiny.config("sr_1024", model__widths=[16], model__blocks=[1], model__attention=["cross"]),
    )
    drawn = {"lowres_from": str(output / "samples.npz")}
    names = ("sensitivity", "denoising", "consistency", "retrieval", "x_error")
    second = evaluator(data, *names, sampling={"steps": 1}, **drawn).run(path, second_output)
    samples, lowres = np.load(second_output / "samples.npz"), np.load(output / "samples.npz")
    assert samples["heldout_right"].shape == (3, 32, 32, 3) and lowres["heldout_right"].shape == (
        3,
        16,
        16,
        3,
    )
    np.testing.assert_array_equal(samples["heldout_index"], lowres["heldout_index"])
    shrunk = np.stack([shrink(image, (16, 16)) for image in samples["heldout_right"]])
    assert second["consistency"]["samples"] == superres.consistency(
        superres.consistency_errors(shrunk, lowres["heldout_right"])
    )
    assert set(second["sensitivity"]) == {"split", "text", "lowres_drawn", "lowres_clean"}
    assert second["denoising"]["drawn"]["gain"]["overall"]["n"] == 5
    errors = np.load(second_output / "rows.npz")[
        "x_error.heldout.overall.mean"
    ]  # of crops, as the stage trains on
    assert len(errors) == 5 and second["x_error"]["heldout"]["overall"]["mean"] == pytest.approx(
        errors.mean()
    )
    assert len(second["x_error"]["train"]["bins"]) == 14
    with pytest.raises(ValueError, match="compares with true low-res"):
        evaluator(data, "detail", **drawn).run(path, second_output)
    with pytest.raises(ValueError, match="does not hold samples that evaluate made"):
        evaluator(data, "consistency", **(drawn | {"seed": 1})).run(path, second_output)
    origin = second["provenance"]["lowres_samples"]
    assert (
        origin["checkpoint_sha256"] == result["provenance"]["checkpoint"]["sha256"]
        and json.loads(origin["sampling"])["steps"] == 2
    )
    (tmp_path / "broken.npz").write_bytes((output / "samples.npz").read_bytes()[:-100])
    with pytest.raises(ValueError, match="broken.npz is not a samples.npz"):
        evaluator(data, "consistency", lowres_from=str(tmp_path / "broken.npz")).run(
            path, second_output
        )


def test_a_record_is_continued_with_the_same_settings_only(data, base, tmp_path):
    """Catches a curve of two different measurements in one file."""
    record = tmp_path / history.FILE
    evaluator(data).check_continues(record)  # nothing there yet
    line = json.loads((base[1] / "evaluation.json").read_text())
    line["provenance"]["checkpoint"]["which"] = "ema"  # as from a workdir's checkpoint
    history.append(record, line)
    evaluator(data, sampling={"steps": 2}).check_continues(record)
    for sampling, numbers, message in (
        ({}, {}, "sampling: "),
        ({"steps": 2}, {"rows": 4}, "rows: 5, now 4"),
    ):
        with pytest.raises(
            ValueError, match=f"made with other settings; give another --output: {message}"
        ):
            evaluator(data, sampling=sampling, **numbers).check_continues(record)


def test_data_of_another_encoder_is_refused(data, tmp_path):
    """Catches features of the right width and the wrong meaning."""
    path = export(
        tmp_path / "a.safetensors", tiny.config(), encoder=ENCODER | {"weights_sha256": "other"}
    )
    with pytest.raises(
        ValueError, match="do not share a text encoder .weights_sha256: ab and other"
    ):
        evaluator(data, "loss").run(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_set_of_a_mixture_is_data_that_the_checkpoint_knows(data, caplog):
    """Catches a checkpoint of a mixture that cannot be evaluated on one of its sets, or that calls
    the set other data; and other data that are taken for a set.
    """
    config = schema.complete(BASE)
    config["data"] |= {"mixture": (("a", 0.5), ("b", 0.5)), "view": "short_side"}
    config["data"]["buckets"] = ((16, 32), (16, 16))
    own = records.open_once(data).hash
    for hashes, warnings in (["x", own], 0), (["x", "y"], 1):
        meta = {"config": config, "encoder": ENCODER, "manifest_hash": "joined"}
        one = evaluator(data, "loss")
        caplog.clear()
        one._prepare(meta | {"mixture_hashes": hashes}, {})
        said = [record.getMessage() for record in caplog.records]
        assert said == warnings * [f"the checkpoint was trained on other data than {data}"]
        rows = one._rows.crops("heldout").at(np.arange(2))
        assert rows["image"].shape == (2, 16, 16, 3) and "set" not in rows


class Trainer:
    """A workdir as a trainer fills it."""

    def __init__(self, workdir: Path, last: int):
        self.workdir = workdir
        (workdir / "config.json").write_text(json.dumps({"train": {"steps": last}}))
        self.checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", Retention(9))

    def save(self, step: int) -> Path:
        self.checkpoints.save(step, {"ema": {"w": jax.numpy.full(3, step, "float32")}}, {})
        self.checkpoints.wait()
        return self.checkpoints.directory / str(step)


def weight(directory: Path, output: Path) -> dict:
    """Stands for an evaluation: reads the checkpoint and returns its weight."""
    params, meta = checkpoint.load_params(directory)
    return {"step": meta["step"], "weight": float(params["w"][0])}


def lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / history.FILE).read_text().splitlines()]


def test_follower_takes_each_checkpoint_once_and_ends_with_the_run(tmp_path):
    """Catches only the newest being evaluated, a save under way taken for a checkpoint, and a
    follower that never ends.
    """
    trainer = Trainer(tmp_path, 30)
    trainer.save(10)
    (trainer.checkpoints.directory / "15.writing").mkdir()

    def run(directory, output):
        if directory.name == "10":  # meanwhile the trainer goes on
            trainer.save(20), trainer.save(30)
        return weight(directory, output)

    stage_evaluation.follow(run, tmp_path, tmp_path / "out", minutes=0, poll_s=0.0)
    assert lines(tmp_path / "out") == [{"step": step, "weight": step} for step in (10, 20, 30)]


def test_damaged_and_deleted_checkpoints_are_passed_over(tmp_path, caplog):
    """Catches numbers from damaged weights, a follower that a deletion kills, and one that asks for
    the same checkpoint for ever.
    """
    trainer = Trainer(tmp_path, 30)
    for step in (10, 20, 30):
        directory = trainer.save(step)
    array = max(
        (p for p in (directory.parent / "10" / "state").rglob("*") if p.is_file()),
        key=lambda p: p.stat().st_size,
    )
    array.write_bytes(array.read_bytes()[:-1] + b"\x01")

    def run(directory, output):
        if directory.name == "20":
            directory.rename(directory.with_name("20.deleting"))
        return weight(directory, output)

    stage_evaluation.follow(run, tmp_path, tmp_path / "out", minutes=0, poll_s=0.0)
    assert [line["step"] for line in lines(tmp_path / "out")] == [30]
    assert "checkpoint 10 is skipped" in caplog.text and "checkpoint 20" not in caplog.text


def test_a_missing_file_of_the_data_is_not_a_deleted_checkpoint(tmp_path, monkeypatch):
    """Catches one process that skips a checkpoint because of its data, while the others wait in the
    evaluation for it; and a deleted checkpoint that ends the evaluation.
    """
    Trainer(tmp_path, 10).save(10)

    def missing(*_):
        raise FileNotFoundError("shard 3")

    with pytest.raises(FileNotFoundError, match="shard 3"):
        stage_evaluation.follow(missing, tmp_path, tmp_path / "out", minutes=0, poll_s=0.0)
    monkeypatch.setattr(stage_evaluation, "load_params", missing)
    with pytest.raises(stage_evaluation.CheckpointError, match="shard 3"):
        stage_evaluation.load_same(tmp_path, "ema")


def test_killed_follower_goes_on_where_it_was(tmp_path):
    """Catches a repeated evaluation, and a line cut short by the kill that makes the record
    unreadable.
    """
    trainer, output = Trainer(tmp_path, 20), tmp_path / "out"
    trainer.save(10), trainer.save(20)
    output.mkdir()
    (output / history.FILE).write_text('{"step": 10, "weight": 10.0}\n{"step": 20, "wei')
    asked = []
    stage_evaluation.follow(
        lambda d, o: asked.append(o.name) or weight(d, o), tmp_path, output, minutes=0, poll_s=0.0
    )
    assert asked == ["20"] and [line["step"] for line in lines(output)] == [10, 20]


def test_follower_waits_for_a_run_that_has_not_begun_no_longer_than_told(tmp_path):
    """Catches an error for an empty workdir, and a time limit that is not kept."""
    stage_evaluation.follow(weight, tmp_path / "none", tmp_path / "out", minutes=1e-4, poll_s=1e-3)
    assert not (tmp_path / "out" / history.FILE).exists()
