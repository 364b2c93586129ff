"""Image files as phones, scanners and programs write them: the picture that a viewer shows."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from imagen_jax.data.prepare import checks, upright
from imagen_jax.data.sources.source import Fault, SourceItem
from tests.data import synthetic

WIDE = Image.fromarray(synthetic.gradient(24, 5)[:12])  # 24 x 12


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data):
    """The stored picture, as any reader of the prepared data sees it."""
    with Image.open(io.BytesIO(checks.stored_bytes(data))) as image:
        assert image.mode == "RGB" and image.getexif().get(0x0112, 1) == 1
        return np.asarray(image)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(pixels, depth, colour, transparent):
    """A PNG of big-endian rows with a tRNS chunk, which PIL itself cannot write for 16 bits."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    if depth < 8:
        width = width * 8 // depth
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    trns = chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    return upright._PNG + head + trns + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def phone_exif():
    """EXIF with orientation 6 and a signed rational -1/0, which PIL reads but cannot write."""
    entries = [(0x0112, 3, 1, struct.pack("<HH", 6, 0)), (0x011A, 10, 1, struct.pack("<I", 38))]
    table = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    head = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
    return head + table + b"\0\0\0\0" + struct.pack("<ii", -1, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(orientation):
    """Catches a swapped pair of turns or mirrors: the picture must be the one before turning."""
    back = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    method = back.get(orientation, upright._TO_UPRIGHT.get(orientation))
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = WIDE if method is None else WIDE.transpose(method)
    np.testing.assert_array_equal(decoded(encoded(turned, exif=exif)), np.asarray(WIDE))


def test_exif_data_that_cannot_be_written_again():
    """Catches struct.error out of the EXIF data of a phone's photo, which ended the run."""
    data = encoded(WIDE, "JPEG", exif=phone_exif(), quality=95)
    picture = decoded(data)
    assert picture.shape == (24, 12, 3)
    np.testing.assert_allclose(
        picture, np.asarray(WIDE.transpose(Image.Transpose.ROTATE_270)), atol=30
    )


def test_16_bit_grey_with_a_transparent_colour():
    """Catches values clipped at 255, and the transparent colour compared after scaling."""
    ramp = np.tile(np.linspace(0, 65535, 24).astype(">u2"), (4, 1))
    row = decoded(png(ramp, 16, 0, (1,)))[0, :, 0]
    np.testing.assert_array_equal(row, np.linspace(0, 65535, 24).astype(int) * 255 // 65535)
    assert decoded(png(ramp, 16, 0, (int(ramp[0, 1]),)))[0, :3, 0].tolist() == [0, 255, 22]


def test_16_bit_colour_with_a_transparent_colour_is_refused():
    """Catches a wrong colour made transparent: PIL compares 16 bits with 8."""
    pixels = np.full((4, 4, 3), 0x1234, ">u2")
    with pytest.raises(ValueError, match="16-bit colour with a transparent colour: save it with"):
        checks.stored_bytes(png(pixels, 16, 2, (0x1234,) * 3))
    plain = png(pixels, 16, 2, (0x1234,) * 3).replace(
        chunk(b"tRNS", struct.pack(">3H", *(0x1234,) * 3)), b""
    )
    assert (decoded(plain) == 0x12).all()


@pytest.mark.parametrize(("depth", "byte", "key"), [(2, 0b10_01_00_11, 2), (4, 0xA5, 10)])
def test_few_bits_of_grey_with_a_transparent_colour(depth, byte, key):
    """Catches a transparent colour of 2 or 4 bits compared with pixels scaled to 8."""
    row = decoded(png(np.array([[byte]], np.uint8), depth, 0, (key,)))[0, :, 0].tolist()
    assert row == {2: [255, 85, 0, 255], 4: [255, 85]}[depth]


@pytest.mark.parametrize("compressed", [True, False])
def test_a_png_with_much_text_is_used(compressed):
    """Catches a sound picture called broken, or stored so that training cannot read it."""
    info = PngImagePlugin.PngInfo()
    for name in range(1 if compressed else 70):
        info.add_text(f"workflow {name}", "node " * 300_000, zip=compressed)
    data = encoded(WIDE, pnginfo=info)
    if not compressed:
        with pytest.raises(ValueError, match="MAX_TEXT_MEMORY"):
            Image.open(io.BytesIO(data)).load()
    np.testing.assert_array_equal(decoded(data), np.asarray(WIDE))
    assert b"workflow" not in checks.stored_bytes(data)


def test_a_png_with_little_text_is_stored_as_it_is():
    """Catches bytes of good files that change: the text is removed only where it must be."""
    info = PngImagePlugin.PngInfo()
    info.add_text("author", "somebody")
    data = encoded(WIDE, pnginfo=info)
    assert checks.stored_bytes(data) == data


@pytest.mark.parametrize(
    "error",
    [RuntimeError("x"), struct.error("x"), KeyError("x"), MemoryError(), ZeroDivisionError()],
)
def test_whatever_the_decoder_raises_costs_one_item(monkeypatch, error):
    """Catches a list of the decoder's exceptions that misses one, which then ends the run."""

    def fail(*_):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    name = type(error).__name__
    checked = checks.check(SourceItem("a.png", b"data", ["x"], "train"), 0)
    assert checked.reason == "broken_image" and checked.detail.startswith(f"{name}: ")
    with pytest.raises(ValueError, match=name):
        checks.stored_bytes(b"data")


def test_a_fault_of_the_source_is_the_reason():
    """Catches an item used without the captions that its source could not read."""
    item = SourceItem("a.png", encoded(WIDE), ["x"], "train", Fault("unreadable_captions", "why"))
    checked = checks.check(item, 0)
    assert (checked.reason, checked.detail) == ("unreadable_captions", "why")
