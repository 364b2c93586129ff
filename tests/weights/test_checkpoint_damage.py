"""Damaged checkpoints are rejected, named and kept aside; old ones are deleted last."""

import json
import logging
import shutil
import subprocess

import numpy as np
import pytest

from imagen_jax import checksums, exit_codes, storage
from imagen_jax.weights import checkpoint, step_directories
from imagen_jax.weights.checkpoint import CheckpointError, Checkpoints, load_params
from imagen_jax.weights.retention import Retention
from tests.weights.states import (
    assert_equal,
    assert_restores,
    files_of,
    flip_bit,
    make_state,
    save,
    shard,
)

DAMAGE = {
    "deleted": lambda path, rng: path.unlink(),
    "emptied": lambda path, rng: path.write_bytes(b""),
    "cut": lambda path, rng: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path, rng: path.write_bytes(path.read_bytes() + b"\0"),
    "bit flipped": flip_bit,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoint_is_never_used(two_steps, saved, kind, caplog):
    """Catches a file without a checksum, and a rejection that does not name step and file."""
    rng = np.random.default_rng(0)
    originals = files_of(two_steps / "20")
    names = [p.relative_to(two_steps / "20").as_posix() for p in originals]
    assert {"meta.json", "SHA256SUMS"} < set(names) and len(names) > 8
    for original, name in zip(originals, names):
        # The list of checksums is the file whose own damage is hardest to notice: try many places.
        for _ in range(200 if (kind, name) == ("bit flipped", "SHA256SUMS") else 1):
            target = saved / "20" / name
            DAMAGE[kind](target, rng)
            if target.exists() and target.read_bytes() == original.read_bytes():
                continue  # an empty file has nothing to lose
            caplog.clear()
            assert Checkpoints(saved, Retention(2)).latest_good() == 10, name
            (record,) = caplog.records
            assert record.levelno >= logging.WARNING and f"{saved}/20" in record.getMessage()
            assert name in record.getMessage() or name == "SHA256SUMS"
            shutil.copy2(original, target)
    assert Checkpoints(saved, Retention(2)).latest_good() == 20


def test_added_file_and_empty_directory_are_rejected(saved, caplog):
    """Catches a check of the listed files only, which an empty directory would pass."""
    (saved / "20" / "state" / "d" / "more").write_bytes(b"x")
    (saved / "30").mkdir()
    assert Checkpoints(saved, Retention(2)).latest_good() == 10
    assert "state/d/more is not listed in SHA256SUMS" in caplog.text


def test_flipped_bit_would_be_restored_silently_without_the_checks(saved, monkeypatch):
    """Catches a test of damage that proves nothing: without checksums it reaches the arrays."""
    path = max(files_of(saved / "20"), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr(checkpoint, "find_damage", lambda directory: None)
    state, abstract = shard(make_state(20))
    try:
        restored, _ = Checkpoints(saved, Retention(2)).restore(20, abstract)
    except CheckpointError:
        return  # orbax noticed this one
    with pytest.raises(AssertionError):
        assert_equal(restored, state)


def test_restore_and_load_verify_a_named_step(saved):
    """Catches verification in `latest_good` alone, not of a step given by number or path."""
    flip_bit(saved / "20" / "meta.json", np.random.default_rng(0))
    with pytest.raises(
        CheckpointError, match="20 cannot be used: meta.json does not match its checksum"
    ):
        Checkpoints(saved, Retention(2)).restore(20, shard(make_state(20))[1])
    with pytest.raises(CheckpointError, match="20 cannot be used: meta.json"):
        load_params(saved / "20")
    with pytest.raises(CheckpointError, match="15 cannot be used: .*No such file"):
        Checkpoints(saved, Retention(2)).restore(15, shard(make_state(20))[1])
    assert load_params(saved)[1]["step"] == 10


def test_damage_after_the_save_is_seen_by_the_same_object(tmp_path):
    """Catches a writer that trusts its own checkpoint after the disk has damaged it."""
    checkpoints = save(Checkpoints(tmp_path, Retention(2)), 10, 20)
    flip_bit(tmp_path / "20" / "meta.json", np.random.default_rng(0))
    with pytest.raises(CheckpointError, match="meta.json"):
        checkpoints.restore(20, shard(make_state(20))[1])
    assert checkpoints.latest_good() == 10


def test_all_damaged_is_an_error_and_none_is_none(saved, tmp_path):
    """Catches a run that starts from scratch because all of its checkpoints are damaged."""
    for step in ("10", "20"):
        (saved / step / "SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint in .* is intact .20: .*SHA256SUMS"):
        Checkpoints(saved, Retention(2)).latest_good()
    assert Checkpoints(tmp_path / "nothing", Retention(2)).latest_good() is None
    with pytest.raises(CheckpointError, match="holds no checkpoint: give a workdir"):
        load_params(tmp_path / "nothing")


def test_keeps_the_newest_and_never_counts_a_damaged_one(saved):
    """Catches the last intact step deleted because a damaged one was counted."""
    flip_bit(saved / "20" / "meta.json", np.random.default_rng(0))
    checkpoints = Checkpoints(saved, Retention(2))
    assert checkpoints.latest_good() == 10
    save(checkpoints, 15)
    assert checkpoints.steps() == [10, 15, 20]
    save(checkpoints, 17)
    assert checkpoints.steps() == [15, 17, 20]
    save(checkpoints, 20)
    assert checkpoints.steps() == [17, 20] and (saved / "20.damaged").is_dir()
    assert_restores(saved, 20)
    save(checkpoints, 30, 40)
    assert checkpoints.steps() == [30, 40] and (saved / "20.damaged").is_dir()
    flip_bit(saved / "40" / "meta.json", np.random.default_rng(0))
    checkpoints = Checkpoints(saved, Retention(2))
    assert checkpoints.latest_good() == 30
    save(checkpoints, 45)
    assert checkpoints.steps() == [30, 40, 45]
    save(checkpoints, 50)
    assert checkpoints.steps() == [40, 45, 50]


def test_damaged_ones_are_kept_apart(saved, caplog):
    """Catches a second damaged directory that replaces the first or makes the save fail."""
    for n in (1, 2, 3):
        flip_bit(saved / "20" / "meta.json", np.random.default_rng(n))
        save(Checkpoints(saved, Retention(2)), 20)
    assert sorted(p.name for p in saved.iterdir()) == [
        "10",
        "20",
        "20.damaged",
        "20.damaged_2",
        "20.damaged_3",
    ]
    assert "kept as 20.damaged_3" in caplog.text


def test_step_deleted_while_it_is_read_is_no_fault(saved, monkeypatch, caplog):
    """Catches a checkpoint called damaged because the trainer deleted it meanwhile."""
    find_damage = checksums.find_damage

    def trainer_deletes(directory):
        shutil.rmtree(directory)
        return find_damage(directory)

    monkeypatch.setattr(
        step_directories,
        "find_damage",
        lambda d: trainer_deletes(d) if d.name == "20" else find_damage(d),
    )
    assert Checkpoints(saved, Retention(2)).latest_good() == 10
    assert not caplog.records


@pytest.mark.parametrize("module", [storage, checksums])
def test_old_ones_stay_until_a_new_one_is_whole(tmp_path, monkeypatch, module):
    """Catches an old checkpoint deleted before the save, and a failed save without an error."""
    checkpoints = save(Checkpoints(tmp_path, Retention(1)), 10)

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "flush", full)
    message = "checkpoint 20 was not saved in .*No space left on device; free some space, then run"
    with pytest.raises(CheckpointError, match=message):
        save(checkpoints, 20)
    monkeypatch.undo()
    assert_restores(tmp_path, 10)
    save(checkpoints, 20)
    assert checkpoints.steps() == [20] and [p.name for p in tmp_path.iterdir()] == ["20"]


def test_a_full_disk_that_orbax_reports_is_transient(tmp_path, monkeypatch):
    """Catches orbax's ValueError taken for invalid input, which launchers do not retry."""
    checkpoints = save(Checkpoints(tmp_path, Retention(1)), 10)

    def full(path):
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write 9 bytes: No space left on device")

    monkeypatch.setattr(checksums, "flush", full)
    with pytest.raises(CheckpointError, match="free some space") as error:
        save(checkpoints, 20)
    assert exit_codes.of(error.value) == exit_codes.FAILED


def test_checksums_are_those_of_sha256sum(two_steps):
    """Catches a checksum file that sha256sum cannot check, or that omits a file."""
    done = subprocess.run(
        ["sha256sum", "-c", "--strict", "SHA256SUMS"],
        cwd=two_steps / "20",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(files_of(two_steps / "20")) - 1


@pytest.mark.parametrize(
    "spec",
    [
        [[3, 3, 16, 8], "float32"],  # the same number of bytes
        [[3, 3, 8, 17], "float32"],
        [[3, 3, 8, 4], "float32"],
        [[3, 3, 8, 16], "int32"],
        [[3, 3, 8, 16], "bfloat16"],
    ],
)
def test_leaf_that_meta_json_describes_otherwise_is_named(saved, spec):
    """Catches an array that is not what meta.json says, and one that orbax converts; the checksums
    were rewritten."""
    name, directory = "ema/down_0/block_0/conv_1/kernel", saved / "20"
    document = json.loads((directory / "meta.json").read_text())
    document["leaves"][name] = spec
    (directory / "meta.json").write_text(json.dumps(document))
    (directory / "SHA256SUMS").unlink()
    checksums.seal(directory)
    with pytest.raises(CheckpointError, match=f"leaf {name} is .* in meta.json, but float32"):
        load_params(directory)
    with pytest.raises(ValueError, match=f"does not fit the state: leaf {name} is"):
        Checkpoints(saved, Retention(2)).restore(20, shard(make_state(20))[1])
