"""prepare_data --store_size: the pixels and bytes of resized images, and what depends on them."""

import io
import json

import numpy as np
import pytest
from absl import flags
from PIL import Image, JpegImagePlugin

from imagen_jax import prepare_data
from imagen_jax.data import records
from imagen_jax.data.prepare import checks, ingest, passes, work_directory
from imagen_jax.data.prepare.resize import AS_IS, Resize
from imagen_jax.data.sources.folder import FolderSource
from imagen_jax.data.sources.source import SourceItem
from imagen_jax.data.transforms import decode_square
from imagen_jax.encoders_in_turn import Encoders
from tests.data import synthetic
from tests.data.synthetic_source import SETTINGS, FakeEncoder, prepare, skipped, tree

PNG_16 = Resize(16, "png")


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder with 12 images of 20x20 to 53x31 pixels, and one of 12x30."""
    folder = tmp_path_factory.mktemp("source") / "photographs"
    folder.mkdir()
    for i in range(13):
        height, width = (20 + i, 20 + 3 * i) if i < 12 else (12, 30)
        data = synthetic.encode(synthetic.photograph(height, width, i))
        (folder / f"{i:02d}.png").write_bytes(data)
        (folder / f"{i:02d}.txt").write_text(f"photograph {i}")
    return folder


@pytest.fixture(scope="module")
def resized(photographs, tmp_path_factory):
    """The directory that one process prepares at 16 pixels."""
    output = tmp_path_factory.mktemp("resized") / "data"
    prepare(photographs, output, resize=Resize(16))
    return output


@pytest.mark.parametrize("side", [16, 23])
@pytest.mark.parametrize(
    "shape", [(48, 48), (37, 90), (91, 46), (47, 48), (47, 46), (24, 71), (27, 81)]
)
def test_training_at_the_stored_size_sees_the_same_pixels(side, shape):
    """Catches another filter, two steps, and a centre square that moves when it is resized."""
    data = synthetic.encode(synthetic.photograph(*shape))
    stored = checks.stored_bytes(data, Resize(side, "png"))
    assert min(opened(stored).size) == side
    np.testing.assert_array_equal(decode_square(stored, side), decode_square(data, side))


def test_training_at_a_divisor_differs_by_rounding():
    """Catches a filter whose two steps are not the area average in one."""
    data = synthetic.encode(synthetic.photograph(192, 256))
    stored = checks.stored_bytes(data, Resize(64, "png"))
    one, two = (decode_square(file, 16).astype(int) for file in (data, stored))
    assert np.abs(one - two).max() == 1


def test_the_whole_image_is_stored():
    """Catches ends of the longer side that are cut off, shifted or not averaged over areas."""
    pixels = synthetic.photograph(48, 149)  # 50 and 51 pixels beside the square, 16 and 17 stored
    stored = np.asarray(opened(checks.stored_bytes(synthetic.encode(pixels), PNG_16)))
    wanted = pixels[:, 2:149].reshape(16, 3, 49, 3, 3).mean(axis=(1, 3))
    assert stored.shape == (16, 49, 3) and np.abs(stored - wanted).max() <= 1


@pytest.mark.parametrize(
    ("size", "stored"),
    [
        ((400, 300), (340, 256)),  # 50 * 256 / 300 = 42.7 pixels on either side
        ((300, 401), (256, 341)),  # 50 and 51: 42 and 43
        ((1024, 1024), (256, 256)),
        ((257, 5000), (256, 4979)),
        ((256, 9000), (256, 9000)),
        ((100, 900), (100, 900)),
    ],
)
def test_stored_sizes(size, stored):
    """Catches the longer side rounded up, images that are enlarged, width and height exchanged."""
    assert Resize(256).stored_size(size) == stored and AS_IS.stored_size(size) == size


def test_jpeg_has_quality_95_and_full_chroma():
    """Catches PIL's defaults, which are 75 and 4:2:0, and metadata that describes the original."""
    pixels, buffer = synthetic.photograph(64, 64), io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", comment="mine", icc_profile=b"profile")
    stored = opened(checks.stored_bytes(buffer.getvalue(), Resize(32)))
    wanted = io.BytesIO()
    Image.new("RGB", (8, 8)).save(wanted, "JPEG", quality=95)
    assert stored.quantization == opened(wanted.getvalue()).quantization
    assert JpegImagePlugin.get_sampling(stored) == 0 and stored.size == (32, 32)
    assert not {"comment", "icc_profile", "exif"} & stored.info.keys()


def test_an_image_too_long_for_jpeg_is_a_png():
    """Catches an encoder error that ends the run."""
    data = synthetic.encode(np.zeros((140_000, 2, 3), np.uint8))
    stored = opened(checks.stored_bytes(data, Resize(1)))
    assert stored.format == "PNG" and stored.size == (1, 69_999)


def test_rotated_grey_and_transparent_images():
    """Catches a resize before the image is upright, RGB and on white."""
    turned = Image.Exif()
    turned[0x0112] = 6  # rotate a quarter clockwise
    wide, rotated, grey, clear = synthetic.photograph(32, 80), *(io.BytesIO() for _ in range(3))
    Image.fromarray(wide).save(rotated, "PNG", exif=turned)
    Image.fromarray(wide).convert("L").save(grey, "PNG")
    alpha = np.concatenate([wide, np.full((32, 80, 1), 255, np.uint8)], axis=2)
    alpha[:, :40] = 0
    Image.fromarray(alpha).save(clear, "PNG")
    upright = synthetic.encode(np.rot90(wide, -1))
    item = lambda file: SourceItem("a", file.getvalue(), ["x"], "train")
    checked = checks.check(item(rotated), 0, PNG_16)
    stored = checks.stored_bytes(rotated.getvalue(), PNG_16)
    assert (checked.height, checked.width, checked.size) == (40, 16, len(stored))
    assert stored == checks.stored_bytes(upright, PNG_16)
    shrunk = opened(checks.stored_bytes(grey.getvalue(), PNG_16))
    assert shrunk.mode == "RGB" and shrunk.size == (40, 16)
    pixels = np.asarray(opened(checks.stored_bytes(clear.getvalue(), PNG_16)))
    assert pixels.shape == (16, 40, 3) and (pixels[:, :20] == 255).all()
    opaque = np.asarray(opened(checks.stored_bytes(synthetic.encode(wide), PNG_16)))
    assert (pixels[:, 20:] == opaque[:, 20:]).all()


def test_small_images_are_stored_as_without_the_flag():
    """Catches images of the stored size that are encoded again."""
    data = synthetic.encode(synthetic.gradient(32), "JPEG")
    assert checks.stored_bytes(data, Resize(32)) == checks.stored_bytes(data, Resize(33)) == data
    assert checks.stored_bytes(data, Resize(31)) != data


def test_sizes_and_duplicates_are_those_of_the_original():
    """Catches --min_size above --store_size that skips all, and merged images that differ."""
    one = synthetic.photograph(64, 64)
    other = one.copy()
    other[0, 0, 0] ^= 1
    item = lambda pixels: SourceItem("a", synthetic.encode(pixels), ["x"], "train")
    kept, small = (checks.check(item(one), size, PNG_16) for size in (64, 65))
    assert (kept.reason, kept.height, kept.width) == ("", 16, 16)
    assert (small.reason, small.detail) == ("small_image", "64x64")
    assert kept.pixels == checks.check(item(one), 0).pixels
    changed = checks.check(item(other), 0, PNG_16)
    assert checks.stored_bytes(item(other).image, PNG_16) == checks.stored_bytes(
        item(one).image, PNG_16
    )
    assert changed.pixels != kept.pixels


def test_manifest_and_records_have_the_stored_sizes(photographs, resized):
    """Catches the sizes of the originals, and a manifest that does not name the resize."""
    prepared = records.Prepared(resized)
    rows = [
        prepared.images(split)[i]
        for split in ("train", "heldout")
        for i in range(prepared.num_images(split))
    ]
    sizes = [opened(row.image).size for row in rows]
    assert sizes == [(row.width, row.height) for row in rows] and len(rows) == 13
    assert prepared.manifest["image_sizes"] == {
        "min_side": 12,
        "max_side": max(map(max, sizes)),
        "mean_height": np.mean([height for _, height in sizes]),
        "mean_width": np.mean([width for width, _ in sizes]),
    }
    assert (prepared.manifest["store_size"], prepared.manifest["store_format"]) == (16, "jpeg")
    for row in rows:
        data = (photographs / row.id).read_bytes()
        assert row.image == (data if row.id == "12.png" else Resize(16).encode(opened(data)))


def test_processes_and_stops_change_no_byte(photographs, resized, tmp_path, monkeypatch):
    """Catches a worker or a continued run that stores the originals."""
    monkeypatch.setattr(ingest, "CHUNK", 3)
    prepare(photographs, tmp_path / "two", resize=Resize(16), processes=2)
    assert tree(tmp_path / "two") == tree(resized)
    for name in ("write_images", "check_span"):
        output, original, calls = tmp_path / name, getattr(ingest, name), []

        def stopping(*args):
            calls.append(args)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return original(*args)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(ingest, name, stopping)
            prepare(photographs, output, resize=Resize(16))
        prepare(photographs, output, resize=Resize(16))
        assert tree(output) == tree(resized)


def unfinished(photographs, output, monkeypatch, **changes):
    """Prepares up to the manifest. Returns the path of the request."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(passes, "finish", stop)
        prepare(photographs, output, **changes)
    return work_directory.work_directory(output) / "request.json"


def test_another_size_or_format_is_refused(photographs, tmp_path, monkeypatch):
    """Catches images of two sizes or encodings in one directory, finished or not."""
    output = tmp_path / "data"
    unfinished(photographs, output, monkeypatch, resize=Resize(16))
    for _ in range(2):  # unfinished, then finished
        for resize, message in [
            (Resize(15), r"\(store_size was 16, is 15\)"),
            (Resize(16, "png"), r"\(store_format was jpeg, is png\)"),
            (AS_IS, r"\(store_size was 16, is 0; store_format was jpeg, is none\)"),
        ]:
            with pytest.raises(ValueError, match=f"{message}: choose another --output"):
                prepare(photographs, output, resize=resize)
        prepare(photographs, output, resize=Resize(16))


def test_data_of_older_versions_continues_and_is_complete(photographs, tmp_path, monkeypatch):
    """Catches older data that is refused, and another manifest for the same data as before."""
    output = tmp_path / "data"
    file = unfinished(photographs, output, monkeypatch)
    older = {"source", "encoder", "max_length", "shard_size", "min_size", "batch_size"}
    assert json.loads(file.read_text()).keys() == older
    with pytest.raises(ValueError, match="store_size was 0, is 16; store_format was none, is jpeg"):
        prepare(photographs, output, resize=Resize(16))
    manifest = prepare(photographs, output)
    assert not {"store_size", "store_format"} & manifest.keys()
    assert prepare(photographs, output) == manifest
    with pytest.raises(ValueError, match="store_size was 0, is 16"):
        prepare(photographs, output, resize=Resize(16))


def test_a_damaged_request_names_its_file(photographs, tmp_path, monkeypatch):
    """Catches a request whose size is compared as a text."""
    file = unfinished(photographs, tmp_path / "data", monkeypatch, resize=Resize(16))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"store_size": "16"}))
    with pytest.raises(ValueError, match=r"request.json is damaged \(store_size is '16', not"):
        prepare(photographs, tmp_path / "data", resize=Resize(16))


def test_the_estimate_counts_resized_bytes(photographs, resized):
    """Catches an estimate, and a refusal for lack of room, from the bytes of the originals."""
    source, encoders = FolderSource(photographs, 0.2), Encoders.single(FakeEncoder())
    estimates = [
        passes.preview(source, encoders, passes.Settings(**SETTINGS, resize=resize)).images
        for resize in (AS_IS, Resize(16))
    ]
    prepared = records.Prepared(resized)
    stored = sum(
        len(prepared.images(split)[i].image)
        for split in ("train", "heldout")
        for i in range(prepared.num_images(split))
    )
    originals = sum(path.stat().st_size for path in photographs.glob("*.png"))
    assert estimates[0] - estimates[1] == originals - stored > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--store_format=png"], "--store_format has no effect without --store_size: give"),
        (["--store_size=-1"], "--store_size -1 is less than 0"),
    ],
)
def test_wrong_flags_are_refused(photographs, tmp_path, options, message):
    """Catches an encoding that is silently not used, and a negative size."""
    values = flags.FlagValues()
    prepare_data.define_flags(values)
    base = [f"--source=folder:{photographs}", f"--output={tmp_path / 'data'}", "--encoder=t5_tiny"]
    values(["prepare_data", *base, *options])
    with pytest.raises(ValueError, match=message):
        prepare_data._run(values)
    assert not list(tmp_path.iterdir())


def test_the_flags_reach_the_data(photographs, tmp_path, monkeypatch):
    """Catches flags that are parsed and not used."""
    monkeypatch.setattr(prepare_data, "_encoders", lambda *_: Encoders.single(FakeEncoder()))
    values = flags.FlagValues()
    prepare_data.define_flags(values)
    base = [f"--source=folder:{photographs}", f"--output={tmp_path / 'data'}", "--encoder=t5_tiny"]
    values(["prepare_data", *base, "--processes=1", "--store_size=16", "--store_format=png"])
    prepare_data._run(values)
    store = records.Prepared(tmp_path / "data").images("train")
    assert {opened(store[i].image).format for i in range(len(store))} == {"PNG"}
    assert max(min(store[i].height, store[i].width) for i in range(len(store))) == 16
    assert not skipped(tmp_path / "data")


def test_training_at_a_larger_size_names_the_flag(resized):
    """Catches the advice to skip images, when all are too small because they were resized."""
    prepared = records.Prepared(resized)
    prepared.check_image_size(12)
    with pytest.raises(ValueError, match=r"is 16: prepare with --min_size 16$"):
        prepared.check_image_size(16)
    with pytest.raises(ValueError, match=r"--min_size 17 and --store_size 17 or more$"):
        prepared.check_image_size(17)
