"""Reference files: what they hold, and which ones are refused."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from imagen_jax import sharding
from imagen_jax.evals import reference, suite_features, suite_references
from imagen_jax.evals.networks.network import FeatureNetwork
from imagen_jax.evals.real_images import FolderImages, Images

IDENTITY = {"network": "n", "preprocessing": "p", "dim": 3, "weights_sha256": "w", "file": "f"}


def network(**changes):
    """A network whose features are the mean colour of an image."""
    mesh = sharding.batch_mesh(jax.devices()[:1])
    prepare = lambda image: image.astype(np.float32)
    apply = jax.jit(lambda images: images.mean(axis=(1, 2)))
    identity = IDENTITY | changes
    return FeatureNetwork("n", "p", 3, identity, 8, prepare, apply, mesh)


@pytest.fixture
def folder(tmp_path):
    """Seven images of different sizes, one of them in a subfolder, and a file that is no image."""
    rng = np.random.default_rng(0)
    (tmp_path / "images" / "more").mkdir(parents=True)
    for i in range(7):
        image = rng.integers(0, 256, (12 + i, 16, 3)).astype(np.uint8)
        path = tmp_path / "images" / ("more/" if i == 3 else "") / f"{i}.png"
        Image.fromarray(image).save(path)
    (tmp_path / "images" / "notes.txt").write_text("x")
    return tmp_path / "images"


def kept(*args):
    return suite_references._kept(*args)


@pytest.fixture
def made(folder, tmp_path, monkeypatch):
    """(the file of a reference, the images)."""
    monkeypatch.setattr(suite_features, "network_shard", lambda rows: 3)
    images = FolderImages(folder, 8)
    kept(images, network(), tmp_path / "r" / "n.npz")
    return tmp_path / "r" / "n.npz", images


def test_a_reference_holds_every_image_once(made):
    """Catches a chunk that is left out or repeated, and an order other than that of the names."""
    path, images = made
    loaded = reference.load(path, network(), images.identity)
    expected = [images.image(i).reshape(-1, 3).mean(axis=0) for i in range(7)]
    np.testing.assert_allclose(loaded.features, expected, rtol=1e-5)
    assert loaded.identity["images"]["count"] == 7 == len(loaded.features)
    assert loaded.identity["images"]["size"] == 8 and len(loaded.identity["sha256"]) == 64
    assert [image.shape for image in Images(images, 5, 99)] == [(8, 8, 3)] * 2
    assert reference.network_of(path) == "n"


def change(path, **arrays):
    with np.load(path) as file:
        content = {name: file[name] for name in file.files} | arrays
    np.savez(path, **content)


@pytest.mark.parametrize("name", ["features", "mean", "covariance"])
def test_statistics_of_other_images_are_refused(made, name):
    """Catches statistics and features of different sets, the fault of a published file."""
    path, images = made
    with np.load(path) as file:
        changed = file[name] + np.float32(0.1)
    change(path, **{name: changed})
    with pytest.raises(ValueError, match="contradicts itself"):
        reference.load(path, network(), images.identity)


def test_other_networks_and_images_are_refused(made, folder):
    """Catches features of other weights or another resize, and a folder that has changed."""
    path, _ = made
    other = network(preprocessing="q")
    with pytest.raises(ValueError, match=r"another network \(preprocessing differ\)"):
        reference.load(path, other, None)
    (folder / "6.png").unlink()
    with pytest.raises(ValueError, match="is of other images"):
        reference.load(path, network(), FolderImages(folder, 8).identity)
    with pytest.raises(ValueError, match="is of other images"):
        reference.load(path, network(), FolderImages(folder, 4).identity | {"count": 7})


def test_damaged_files_are_one_line(made, tmp_path):
    """Catches a traceback of numpy or zipfile."""
    path, _ = made
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged .*; make it again"):
        reference.load(path, network(), None)
    with pytest.raises(ValueError, match="is not a reference file"):
        reference.network_of(path)
    with pytest.raises(ValueError, match="does not exist"):
        reference.network_of(tmp_path / "none.npz")
    change_meta = tmp_path / "meta.npz"
    np.savez(change_meta, meta=np.array(json.dumps({"x": 1})))
    with pytest.raises(ValueError, match="is not a reference file"):
        reference.network_of(change_meta)


@pytest.mark.parametrize(
    "arrays",
    [
        {"features": np.float32(1)},
        {"features": np.zeros((7, 3, 1), np.float32)},
        {"features": np.zeros((1, 3), np.float32)},
        {"features": np.full((7, 3), "a")},
        {"mean": np.zeros(4)},
        {"mean": np.zeros(1)},
        {"covariance": np.zeros((3, 4))},
        {"covariance": np.zeros((3, 3), int)},
    ],
)
def test_arrays_of_a_wrong_shape_are_one_line(made, arrays):
    """Catches a message of numpy about shapes, and a mean of one number that is broadcast."""
    path, _ = made
    change(path, **arrays)
    name = next(iter(arrays))
    with pytest.raises(ValueError, match=rf"n\.npz is damaged \({name} .*; make it again"):
        reference.load(path, network(), None)


@pytest.mark.parametrize("content", [b"\x00\x93random bytes" * 9, b"", b"PK\x03\x04 cut"])
def test_bytes_that_are_no_reference_are_one_line(tmp_path, content):
    """Catches numpy's advice to load the file with pickle."""
    path = tmp_path / "n.npz"
    path.write_bytes(content)
    message = r"n\.npz is (damaged|not a reference file) \(it is not a complete \.npz file"
    for read in (reference.network_of, lambda path: reference.load(path, network(), None)):
        with pytest.raises(ValueError, match=message) as error:
            read(path)
        assert "pickle" not in str(error.value)
    with pytest.raises(ValueError, match=r"not a reference file \(Is a directory\)"):
        reference.network_of(tmp_path)


def test_images_that_would_be_enlarged_are_refused(folder):
    """Catches real images that PIL's area average enlarges to blocks. They are 16 pixels wide and
    12 to 18 high; a size is read without decoding, so a damaged file is left to `check`.
    """
    FolderImages(folder, 12).check_sizes()
    (folder / "6.png").write_bytes(b"no image")
    message = r"2 of 7 images .* below 14 pixels.*, e\.g\. 0\.png \(16x12\), 1\.png \(16x13\): give"
    with pytest.raises(ValueError, match=message):
        FolderImages(folder, 14).check_sizes()


def test_a_few_images_that_are_enlarged_are_a_warning(tmp_path, caplog):
    """Catches a folder such as COCO's, in which few images are small, that cannot be used."""
    for i in range(40):
        Image.new("RGB", (16, 7 if i < 2 else 9)).save(tmp_path / f"{i:02}.png")
    FolderImages(tmp_path, 8).check_sizes()
    assert "2 of 40 images" in caplog.text and "00.png (16x7), 01.png (16x7)" in caplog.text
    Image.new("RGB", (16, 7)).save(tmp_path / "39.png")
    with pytest.raises(ValueError, match="3 of 40 images"):
        FolderImages(tmp_path, 8).check_sizes()


def test_a_kept_reference_of_enlarged_images_is_refused(folder, tmp_path):
    """Catches a reference of an earlier evaluation that is used although its images are small."""
    Image.new("RGB", (9, 6)).save(folder / "0.png")
    path, images = tmp_path / "n.npz", FolderImages(folder, 8)
    few = np.zeros((7, 3), np.float32)
    reference.write(images, network(), few, path)
    with pytest.raises(ValueError, match=r"below 8 pixels.* 0\.png \(9x6\)"):
        kept(images, network(), path)


def test_damaged_images_are_counted_and_named(folder, tmp_path):
    """Catches a damaged image that is skipped in silence, or found after hours."""
    FolderImages(folder, 8).check()
    (folder / "2.png").write_bytes(b"no image")
    whole = (folder / "5.png").read_bytes()
    (folder / "5.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"2 of 7 images .*2\.png .*5\.png .*replace or remove"):
        FolderImages(folder, 8).check()
    with pytest.raises(ValueError, match="is not a directory"):
        FolderImages(tmp_path / "none", 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no image files"):
        FolderImages(tmp_path / "empty", 8)
