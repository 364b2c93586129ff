"""The command `sample`: its inputs, warnings and output, without drawing."""

import json
import struct
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from imagen_jax import cascade, demo, drawing, picture_set, pictures, sample
from imagen_jax.encoders_in_turn import Encoders
from imagen_jax.picture_set import Requests
from imagen_jax.text_inputs import TextInput, longest_input
from imagen_jax.weights import text_encoders
from tests.test_storage import POINTER

RECORD = {
    "prompt": "a cat",
    "seed": 3,
    "stages": ["base"],
    "image": "",
    "image_sha256": "",
    "config": {},
    "checkpoints": [{"checkpoint": "x", "which": "ema", "step": 1, "sha256": "ab"}],
    "encoder": {"name": "t5_tiny"},
}


def gradient(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


def exif_with_a_bad_rational(orientation: int) -> bytes:
    """EXIF data as some phones write it: an orientation and a resolution of -1/0."""
    table = struct.pack("<H", 2)
    table += struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    table += struct.pack("<HHII", 0x011A, 10, 1, 38)
    return b"Exif\0\0II*\0\x08\0\0\0" + table + bytes(4) + struct.pack("<ii", -1, 0)


def test_a_photo_with_a_bad_rational_is_drawn_upright(tmp_path):
    """Catches struct.error as a traceback, from PIL writing the EXIF data back."""
    path = tmp_path / "phone.jpg"
    gradient(40, 30).save(path, exif=exif_with_a_bad_rational(6))
    image = sample.read_image(str(path), (16, 16))
    assert image.shape == (16, 16, 3) and image[0, 0, 1] > 200


def test_an_image_with_large_metadata_is_used(tmp_path):
    """Catches a picture whose pixels are sound, called broken because of its metadata."""
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "node " * 300_000, zip=True)
    path = tmp_path / "generated.png"
    gradient(32, 32).save(path, pnginfo=info)
    image = sample.read_image(str(path), (32, 32))
    np.testing.assert_array_equal(image, np.asarray(gradient(32, 32)))


def test_an_image_is_cut_square_and_shrunk(tmp_path):
    """Catches an image that is squeezed, or taken from a corner."""
    pictures.write_png(tmp_path / "x.png", np.asarray(gradient(60, 20)))
    image = sample.read_image(str(tmp_path / "x.png"), (10, 10))
    assert image.shape == (10, 10, 3) and image.dtype == np.uint8
    assert 80 < image[0, 0, 0] < image[0, -1, 0] < 175


def test_a_small_image_is_refused(tmp_path):
    """Catches an --image that is enlarged to blocks; a picture's record may still have one."""
    pictures.write_png(tmp_path / "x.png", np.asarray(gradient(60, 15)))
    with pytest.raises(ValueError, match="x.png is 60x15 .*, but the first stage reads 16x16"):
        sample.read_image(str(tmp_path / "x.png"), (16, 16))
    assert sample.read_image(str(tmp_path / "x.png"), (16, 16), any_size=True).shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER.encode(), "x.png is a Git LFS pointer"),
        (b"", "x.png is empty"),
        (b"no image", "--image .*x.png cannot be used: cannot identify image file$"),
    ],
)
def test_a_file_that_is_no_image_is_named(tmp_path, content, message):
    """Catches an error of PIL that names a buffer instead of the file."""
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        sample.check_image(str(tmp_path / "x.png"))
        sample.read_image(str(tmp_path / "x.png"), (16, 16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: POINTER, "cat.json is a Git LFS pointer"),
        (lambda record: "", "cat.json is empty"),
        (lambda record: json.dumps(record)[:-9], "cat.json is not valid JSON"),
        (lambda record: "[]", "cat.json is not a picture's record"),
        (lambda record: json.dumps(record | {"seed": "3"}), "it has no valid seed"),
        (lambda record: json.dumps(record | {"seed": -1}), "it has no valid seed"),
        (lambda record: json.dumps(record | {"seed": 2**32}), "it has no valid seed"),
        (lambda record: json.dumps(record | {"checkpoints": {}}), "it has no valid checkpoints"),
        (
            lambda record: json.dumps({k: v for k, v in record.items() if k != "prompt"}),
            "it has no valid prompt",
        ),
    ],
)
def test_a_record_that_is_not_whole_is_named(tmp_path, change, message):
    """Catches a traceback, or pictures drawn from a record that lost a field."""
    path = tmp_path / "cat.json"
    path.write_text(change(RECORD))
    with pytest.raises(ValueError, match=message):
        sample.read_record(path)


def test_a_changed_record_is_refused():
    """Catches a record whose number of stages or weights was edited, and a traceback for one."""
    identity = RECORD["checkpoints"][0]
    sample.check_same(RECORD, [identity], "")
    with pytest.raises(ValueError, match="sampled with 1 stages, but its config has 2"):
        sample.check_same(RECORD, [identity, identity], "")
    with pytest.raises(ValueError, match=r"weights .*: step 1 \(ema, sha256 cd\) then"):
        changed = RECORD | {"checkpoints": [identity | {"sha256": "cd"}]}
        sample.check_same(changed, [identity], "")


class Encoder:
    """Knows ASCII and at most 3 words."""

    dim, pooled_dim, max_length, identity = 1, 0, 3, {}

    def tokenize(self, texts):
        return [[0]] * len(texts), [len(text.split()) > 3 for text in texts]

    def unknown(self, texts):
        return ["".join(c for c in text if not c.isascii()) for text in texts]

    def encode(self, texts, batch_size, fill=False):
        return []

    def encode_pooled(self, texts, batch_size, fill=False):
        return [], np.empty((0, 0))


def test_prompts_that_the_encoder_cannot_read_are_named(capsys):
    """Catches unknown characters that pass in silence, and a warning for every repetition."""
    drawing.warn_of_prompts(Encoder(), ["一只红苹果", "a cat", "a b c d", "🍎 x", "🍎 x"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith("warning: ") for line in lines] == [True] * 3
    assert "does not know '一只红苹果'" in lines[0]
    assert "longer than 3 tokens and was cut: 'a b c d'" in lines[1]
    assert "does not know '🍎'" in lines[2] and "'🍎 x'" in lines[2]


def test_a_prompt_that_a_stage_cannot_read_is_refused():
    """Catches a prompt that fits the first stage and stops the sampling of a later one."""
    stage = lambda name, *texts: types.SimpleNamespace(
        stage=types.SimpleNamespace(name=name, texts=texts)
    )
    reads = lambda length: TextInput("", 1, length)
    encoder = Encoder()
    encoder.tokenize = lambda texts: ([text.split() for text in texts], [False] * len(texts))
    drawer = object.__new__(drawing.Drawer)  # without loading
    drawer.encoders, drawer.sources = Encoders.single(encoder), {"": ""}
    drawer.stages = [stage("a", reads(3)), stage("b", reads(2))]
    drawing.check_prompts(drawer, ["one two"])
    with pytest.raises(ValueError, match="stage b reads at most 2 tokens, .* has 3: .* 'x y z'"):
        drawing.check_prompts(drawer, ["one two", "x y z"])
    drawer.stages = [stage("a", reads(3)), stage("without text")]
    drawing.check_prompts(drawer, ["x y z"])


def test_stages_with_more_padding_than_the_encoder_reads(monkeypatch):
    """Catches a cascade of CLIP features that cannot be sampled: its stages may have been trained
    with data.text_length 128, CLIP reads 77 tokens.
    """
    monkeypatch.setattr(text_encoders, "longest_text", {"clip": 77, "t5": None}.__getitem__)
    asked = [("clip", 128), ("clip", 64), ("t5", 128)]
    assert [text_encoders.readable_length(*each) for each in asked] == [77, 64, 128]


def test_the_longest_text_of_an_encoder():
    """Catches a prompt that is encoded at the length of another encoder's input: it would be an
    error instead of being cut.
    """
    inputs = [TextInput("t5", 8, 64), TextInput("clip", 8, 77), TextInput("t5", 8, 32)]
    assert [longest_input(name, inputs, ("t5", "clip")) for name in ("t5", "clip")] == [64, 77]
    assert longest_input("t5", [TextInput("", 8, 128), *inputs], ("t5", "clip")) == 128
    assert longest_input("", inputs, ("",)) == 77


def test_a_page_of_text_does_not_fill_the_terminal(capsys):
    """Catches a warning that repeats a prompt of 100,000 characters."""
    drawing.warn_of_prompts(Encoder(), ["word " * 20_000])
    (line,) = capsys.readouterr().out.splitlines()
    assert len(line) < 200 and line.endswith("word word ...'")


def test_the_embedded_encoder_knows_what_it_lacks():
    """Catches an encoder whose unknown token is not found: both prompts would be one token."""
    encoder = text_encoders.load_text_encoder("t5_tiny", 32)
    assert encoder.unknown(["一只红苹果", "a red apple", "🍎🍏"]) == ["一只红苹果", "", "🍎🍏"]


@pytest.mark.parametrize("stages", ["base", "sr_1", "base,sr_1", "sr_1,sr_2", "base,sr_1,sr_2"])
def test_consecutive_stages_pass(stages):
    """Catches a run of stages that is refused although its stages follow each other."""
    stages = stages.split(",")
    sample.check_stages(stages, "" if stages[0] == "base" else "x.png")
    with pytest.raises(ValueError, match="--image"):
        sample.check_stages(stages, "x.png" if stages[0] == "base" else "")


@pytest.mark.parametrize("stages", ["", "sr_3", "base,sr_2", "sr_1,base", "base,base"])
def test_other_stages_are_refused(stages):
    """Catches a stage that is skipped, repeated, unknown or in the wrong order."""
    with pytest.raises(ValueError, match="give consecutive stages of base,sr_1,sr_2"):
        sample.check_stages(stages.split(","), "")


def test_a_read_only_output_is_refused_before_drawing(tmp_path, monkeypatch):
    """Catches an output directory that is tried only after the first batch is drawn."""

    def refuse(flag, path):
        raise ValueError(f"--{flag} {path} cannot be written to")

    class Drawer:
        def __init__(self, config, names, size):
            self.stages = [types.SimpleNamespace(stage=types.SimpleNamespace(lowres_size=0))]

    monkeypatch.setattr(drawing, "Drawer", Drawer)
    monkeypatch.setattr(cascade, "check_intervals", lambda *_: None)
    monkeypatch.setattr(sample.output_paths, "make_directory", refuse)
    with pytest.raises(ValueError, match="--output .* cannot be written to"):
        sample.sample({}, Requests(["a"], 1, 0), ["base"], "", tmp_path / "out")


def test_a_disk_that_is_too_small_is_refused_before_drawing(tmp_path, monkeypatch):
    """Catches a disk that is full after hours, and pictures of earlier stages that need none."""

    class Drawer:
        def __init__(self, config, names, size):
            sides = {"base": 64, "sr_1": 256}
            self.sizes = [(sides[name], sides[name]) for name in names]
            self.stages = [types.SimpleNamespace(stage=None) for _ in names]
            self.record = {"config": {}}

    usage = types.SimpleNamespace(free=3 * 2 * (64**2 + 256**2) - 1)
    monkeypatch.setattr(drawing, "Drawer", Drawer)
    monkeypatch.setattr(cascade, "check_intervals", lambda *_: None)
    monkeypatch.setattr(drawing.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"4 pictures need up to .* give another --output"):
        sample.sample({}, Requests(["a"], 2, 0), ["base", "sr_1"], "", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(("code", "expected"), [(2, 2), (1, 1), (75, 75), (-9, 1)])
def test_the_demo_exits_as_its_step_did(monkeypatch, capsys, code, expected):
    """Catches exit code 2, do not retry, for a step whose failure was transient."""
    monkeypatch.setattr(demo.cli, "call", lambda command: code)
    with pytest.raises(SystemExit) as end:
        demo.run_command("sample", "--output", Path("x"))
    assert end.value.code == expected
    assert f"sample failed with exit code {code}; run the demo again" in capsys.readouterr().err


def test_contact_sheets_show_the_first_pictures(tmp_path, monkeypatch):
    """Catches sheets without the last picture, more sheets than allowed, and large pictures that
    are shown by every n-th pixel.
    """
    monkeypatch.setattr(picture_set, "SHEET_ROWS", 2)
    monkeypatch.setattr(picture_set, "SHEETS", 2)
    rows = []
    for number in range(3, 8):
        stripes = np.zeros((512, 512, 3), np.uint8)
        stripes[:, ::2] = 200
        pictures.write_png(tmp_path / f"000{number}_a.png", stripes)
        pictures.write_png(tmp_path / f"000{number}_a_8.png", stripes[:8, :8])
        row = {"row": number - 3, "prompt": "a", "seed": 0, "sha256": ""}
        rows.append(row | {"file": f"000{number}_a.png"})
    manifest = tmp_path / "set_0003.jsonl"
    for count, names in {5: ["sheet_0003.png", "sheet_0005.png"], 1: ["sheet_0003.png"]}.items():
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
        sheets = picture_set.write_sheets(manifest, [(8, 8), (512, 512)])
        assert [path.name for path in sheets] == names
    sheet = np.asarray(Image.open(tmp_path / "sheet_0003.png"))
    assert (abs(sheet[100:110, -100:-20, 0].astype(int) - 100) < 20).all()  # grey, not stripes


@pytest.mark.parametrize(
    "name", ["config", "prompt", "prompts", "seed", "count", "stages", "image", "size"]
)
def test_flags_that_a_record_replaces_are_refused(name):
    """Catches --prompt blue with --reproduce, which draws the prompt of the record."""

    def given(reproduce):
        holder = lambda flag: types.SimpleNamespace(present=flag == name, value="")
        flags = {flag: holder(flag) for flag in (*sample.REPLACED, "reproduce")}

        class Flags(dict):
            __getattr__ = lambda self, flag: reproduce

        return Flags(flags)

    sample.check_flags(given(""))
    with pytest.raises(ValueError, match=f"--{name} has no effect with --reproduce"):
        sample.check_flags(given("r.json"))
