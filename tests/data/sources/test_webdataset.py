"""Tar files: which members are one item, and that damage costs only what it hits."""

import bz2
import dataclasses
import gzip
import io
import json
import lzma
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from imagen_jax.data import records
from imagen_jax.data.prepare import passes
from imagen_jax.data.prepare.checks import check
from imagen_jax.data.sources.folder import FolderSource
from imagen_jax.data.sources.webdataset import WebDatasetSource
from imagen_jax.encoders_in_turn import Encoders
from imagen_jax.weights.text_encoders import load_text_encoder
from tests.data import synthetic
from tests.data.sources import layouts
from tests.data.synthetic_source import SETTINGS

ROOT = Path(__file__).resolve().parents[3]
IMAGE = synthetic.encode(synthetic.gradient(16))


def tar_bytes(members, kind=tarfile.PAX_FORMAT, mtime=0):
    """A tar of (name or TarInfo, content)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size, info.mtime = len(content), mtime
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def triple(key, caption="a ramp", **metadata):
    content = json.dumps({"caption": f"{caption} in json"} | metadata).encode()
    return [(f"{key}.json", content), (f"{key}.jpg", IMAGE), (f"{key}.txt", caption.encode())]


def opened(path, *options):
    return layouts.opened(f"webdataset:{path}", *options)


def items(source):
    return {item.id: item for item in map(source.__getitem__, range(len(source)))}


def noted(source):
    return sorted({(note["id"], note["reason"]) for note in source.notes()})


def special(name, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "good.jpg"
    return info


def test_members_of_a_key_are_one_item(tmp_path):
    """Catches members that must be contiguous, in order, or in small letters; lost folders."""
    members = [*triple("a/0", "zero"), ("b.1/7.TXT", b"seven\nand more\n"), *triple("b.1/0", "one")]
    members += [("./b.1/7.JPG", IMAGE), ("x.y.txt", b"no image"), ("/root/2.png", b"png")]
    (tmp_path / "00.tar").write_bytes(tar_bytes(members))
    found = items(opened(tmp_path / "00.tar"))
    assert {key: item.captions for key, item in found.items()} == {
        "00/a/0": ["zero"],
        "00/b.1/7": ["seven\nand more\n"],
        "00/b.1/0": ["one"],
        "00/x": [],
        "00/root/2": [],
    }
    assert found["00/a/0"].image == found["00/b.1/7"].image == IMAGE
    assert check(found["00/b.1/7"], 0).captions == ["seven and more"]
    assert found["00/x"].fault.reason == "missing_image" and found["00/root/2"].image == b"png"


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("mtime", [0, 1.5])
def test_every_format_of_tar(tmp_path, kind, mtime):
    """Catches long names, names that are not ASCII, and extended headers taken for members."""
    keys = ["short", "ä" * 20, f"{'d' * 90}/{'n' * 80}"]
    keys += [] if kind == tarfile.USTAR_FORMAT else ["f/" + "x" * 300]
    members = [member for key in keys for member in triple(key, key)]
    (tmp_path / "00.tar").write_bytes(tar_bytes(members, kind, mtime))
    source = opened(tmp_path / "00.tar")
    assert {key: item.captions for key, item in items(source).items()} == {
        f"00/{key}": [key] for key in keys
    }
    assert all(item.image == IMAGE for item in items(source).values()) and not source.notes()


@pytest.mark.parametrize(
    "fields, captions",
    [
        ("txt", ["text"]),
        ("short", ["s"]),
        ("txt, many ,short", ["text", "m1", "m2", "s"]),
        ("styles.long", ["l"]),
        ("a.b", ["dotted"]),
        ("none,nan,absent,styles.absent,short.x", []),
    ],
)
def test_captions_are_the_named_fields(tmp_path, fields, captions):
    """Catches another order, null or NaN as a text, and fields of fields that are not found."""
    metadata = {"short": "s", "many": ["m1", None, "m2"], "none": None, "styles": {"long": "l"}}
    metadata |= {"nan": float("nan"), "a.b": "dotted", "a": {"b": "nested"}}
    members = [("0.json", b"\xef\xbb\xbf" + json.dumps(metadata).encode())]
    members += [("0.txt", b"\xef\xbb\xbftext"), ("0.png", IMAGE)]
    (tmp_path / "00.tar").write_bytes(tar_bytes(members))
    item = opened(tmp_path / "00.tar", f"--webdataset_captions={fields}")[0]
    assert (item.captions, item.fault) == (captions, None)
    assert check(item, 0).reason == ("" if captions else "no_caption")


GOOD = [*triple("good"), *triple("last")]
NESTED = b"[" * 100_000
WHERE = "--where=width > 9"
ITEMS = {
    "no_image": ([("x.txt", b"t"), ("x.cls", b"1")], "missing_image", ()),
    "other_image": ([("x.1.jpg", IMAGE), ("x.txt", b"t")], "missing_image", ()),
    "no_caption": ([("x.jpg", IMAGE)], "no_caption", ()),
    "empty_image": ([("x.jpg", b""), ("x.txt", b"t")], "broken_image", ()),
    "cut_image": ([("x.jpg", IMAGE[:40]), ("x.txt", b"t")], "broken_image", ()),
    "empty_text": ([("x.jpg", IMAGE), ("x.txt", b"")], "no_caption", ()),
    "latin_text": ([("x.jpg", IMAGE), ("x.txt", b"caf\xe9")], "unreadable_captions", ()),
    "utf_16": ([("x.jpg", IMAGE), ("x.txt", "t".encode("utf-16"))], "unreadable_captions", ()),
    "json_unused": ([("x.jpg", IMAGE), ("x.json", b"{"), ("x.txt", b"t")], "", ()),
    "json_cut": ([("x.jpg", IMAGE), ("x.json", b'{"c')], "broken_metadata", "caption"),
    "json_where": ([("x.jpg", IMAGE), ("x.json", b"{"), ("x.txt", b"t")], "broken_metadata", WHERE),
    "json_empty": ([("x.jpg", IMAGE), ("x.json", b"")], "broken_metadata", "caption"),
    "json_list": ([("x.jpg", IMAGE), ("x.json", b"[1]")], "broken_metadata", "caption"),
    "json_latin": ([("x.jpg", IMAGE), ("x.json", b'{"a": "\xe9"}')], "broken_metadata", "caption"),
    "json_deep": ([("x.jpg", IMAGE), ("x.json", NESTED)], "broken_metadata", "caption"),
    "json_deep_no_image": ([("x.json", NESTED)], "missing_image", ()),
    "long_number": (
        [("x.jpg", IMAGE), ("x.json", b'{"n": ' + b"9" * 9999 + b"}")],
        "broken_metadata",
        "caption",
    ),
    "number": (
        [("x.jpg", IMAGE), ("x.json", b'{"caption": 5}')],
        "unreadable_captions",
        "caption",
    ),
    "objects": (
        [("x.jpg", IMAGE), ("x.json", b'{"caption": ["a", {}]}')],
        "unreadable_captions",
        "caption",
    ),
    "surrogate": (
        [("x.jpg", IMAGE), ("x.json", b'{"caption": "\\ud83d"}')],
        "no_caption",
        "caption",
    ),
    "failed": (
        [("x.json", b'{"status": "failed_to_download", "error_message": "404 \\ud83d"}')],
        "failed_download",
        (),
    ),
    "filtered": ([("x.jpg", IMAGE), ("x.json", b'{"width": 9}')], "filtered", WHERE),
    "undecided": ([("x.jpg", IMAGE), ("x.txt", b"t")], "filter_undecided", WHERE),
    "where_nan": ([("x.jpg", IMAGE), ("x.json", b'{"width": NaN}')], "filter_undecided", WHERE),
    "surrogate_value": (
        [("x.jpg", IMAGE), ("x.json", b'{"width": "\\ud83d"}')],
        "filter_undecided",
        WHERE,
    ),
}


@pytest.mark.parametrize("name", ITEMS)
def test_a_bad_item_costs_only_itself(tmp_path, name):
    """Catches exceptions that end the run, items without a reason, and neighbours that are lost."""
    members, reason, option = ITEMS[name]
    good = [*triple("good", width=10), *triple("last", width=10)]
    (tmp_path / "00.tar").write_bytes(tar_bytes([*good[:3], *members, *good[3:]]))
    options = (
        [f"--webdataset_captions={option}" if option == "caption" else option] if option else []
    )
    source = opened(tmp_path / "00.tar", *options)
    checked = {item.id: check(item, 0) for item in items(source).values()}
    assert {key: result.reason for key, result in checked.items()} == {
        "00/good": "",
        "00/x": reason,
        "00/last": "",
    }
    json.dumps([checked["00/x"].detail, checked["00/x"].captions], ensure_ascii=False).encode()


def test_a_failed_download_tells_its_cause(tmp_path):
    """Catches the generic reason for what img2dataset has explained."""
    metadata = {"status": "failed_to_download", "error_message": "HTTP Error 404"}
    (tmp_path / "00.tar").write_bytes(tar_bytes([("0.json", json.dumps(metadata).encode())]))
    assert opened(tmp_path / "00.tar")[0].fault == ("failed_download", "HTTP Error 404")


@pytest.mark.parametrize("error", [ArithmeticError("x"), MemoryError()], ids=repr)
def test_an_unforeseen_error_costs_only_its_item(tmp_path, monkeypatch, error):
    """Catches an error that ends the run, and items lost because memory was short."""
    (tmp_path / "00.tar").write_bytes(tar_bytes(GOOD))
    source = opened(tmp_path / "00.tar", "--webdataset_captions=caption")

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(json, "loads", fail)
        if isinstance(error, MemoryError):
            with pytest.raises(MemoryError):
                source[0]
        else:
            assert source[0].fault == ("unreadable_item", "ArithmeticError: x")
    assert source[0].image == IMAGE and not source[0].fault


def damaged(data, offset, replacement=b"\xff" * 512):
    return data[:offset] + replacement + data[offset + len(replacement) :]


def header_of(data, name):
    """Where the header of a member begins."""
    return tarfile.open(fileobj=io.BytesIO(data)).getmember(name).offset


PLAIN = tar_bytes([*triple("good"), *triple("x"), *triple("last")], tarfile.USTAR_FORMAT)
TIMED = tar_bytes([*triple("good"), *triple("x"), *triple("last")], mtime=0.5)
UTF8 = ("caf\udce9.jpg", IMAGE), ("caf\udce9.txt", b"t")
SHARDS = {
    "empty": (b"", "unreadable_shard", 0),
    "html": (b"<html>404 Not Found</html>", "unreadable_shard", 0),
    "not_a_tar": (IMAGE * 40, "unreadable_shard", 0),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "unreadable_shard", 0),
    "gzip": (gzip.compress(PLAIN), "unreadable_shard", 0),
    "bzip2": (bz2.compress(PLAIN), "unreadable_shard", 0),
    "xz": (lzma.compress(PLAIN), "unreadable_shard", 0),
    "zstd": (b"\x28\xb5\x2f\xfd" + PLAIN, "unreadable_shard", 0),
    "no_members": (tar_bytes([]), "empty_shard", 0),
    "cut_in_content": (PLAIN[: header_of(PLAIN, "last.txt") + 514], "truncated_shard", 3),
    "cut_in_header": (PLAIN[: header_of(PLAIN, "last.txt") + 100], "truncated_shard", 3),
    "cut_between": (PLAIN[: header_of(PLAIN, "last.json")], "truncated_shard", 2),
    "cut_in_pax": (TIMED[: header_of(TIMED, "last.txt") + 600], "truncated_shard", 3),
    "bad_header": (damaged(PLAIN, header_of(PLAIN, "x.jpg")), "damaged_shard", 3),
    "bad_first": (damaged(PLAIN, 0), "damaged_shard", 3),
    "bad_pax": (damaged(TIMED, header_of(TIMED, "x.jpg") + 512), "damaged_shard", 3),
    "junk_at_end": (PLAIN + b"junk" * 999, "damaged_shard", 3),
    "folder": (tar_bytes([(special("d", tarfile.DIRTYPE), b""), *GOOD]), "ignored_member", 2),
    "symlink": (tar_bytes([(special("l.jpg", tarfile.SYMTYPE), b""), *GOOD]), "ignored_member", 2),
    "hardlink": (tar_bytes([(special("l.jpg", tarfile.LNKTYPE), b""), *GOOD]), "ignored_member", 2),
    "fifo": (tar_bytes([(special("l.jpg", tarfile.FIFOTYPE), b""), *GOOD]), "ignored_member", 2),
    "macos": (tar_bytes([("._good.jpg", b"x"), ("d/._a.txt", b"x"), *GOOD]), "ignored_member", 2),
    "no_suffix": (tar_bytes([("README", b"x"), ("a.", b"x"), *GOOD]), "ignored_member", 2),
    "other_suffix": (tar_bytes([("good.cls", b"5"), *GOOD]), "ignored_member", 2),
    "two_images": (tar_bytes([("good.png", b"x"), *GOOD]), "repeated_member", 2),
    "repeated": (tar_bytes([*GOOD, ("good.jpg", b"x")]), "repeated_member", 2),
}


@pytest.mark.parametrize("name", SHARDS)
def test_a_bad_shard_costs_what_cannot_be_read(tmp_path, name):
    """Catches a damaged shard that ends the run, or whose loss or sound items nobody sees."""
    data, reason, count = SHARDS[name]
    (tmp_path / "0.tar").write_bytes(tar_bytes(triple("first")))
    (tmp_path / "1.tar").write_bytes(data)
    (tmp_path / "2.tar").write_bytes(tar_bytes(triple("after")))
    source = opened(tmp_path / "*.tar")
    assert {reason for _, reason in noted(source)} == {reason}
    assert all(note["id"].startswith("1") and note["detail"] for note in source.notes())
    found = items(source)
    assert len(found) == count + 2 and found["2/after"].captions == ["a ramp"]
    if count:
        sound = {key for key, item in found.items() if not check(item, 0).reason}
        assert {"0/first", "1/good", "2/after"} <= sound
        assert "1/last" in sound or name.startswith("cut")


@pytest.mark.parametrize("block", [1, 2])
def test_extended_headers_belong_to_one_member(tmp_path, block):
    """Catches a long name given to a later member, and a member under its shortened name."""
    long = "a.b/" + "long" * 30 + ".jpg"
    data = tar_bytes([*triple("good"), (long, b"x"), *triple("last")])
    damage = damaged(data, header_of(data, long) + block * 512)
    (tmp_path / "0.tar").write_bytes(damage)
    source = opened(tmp_path / "0.tar")
    assert list(items(source)) == ["0/good", "0/last"] and not check(source[1], 0).reason
    assert noted(source) == [("0.tar", "damaged_shard")]


def test_an_incomplete_image_is_not_read(tmp_path):
    """Catches half an image, which some decoders accept, and a note that does not name it."""
    (tmp_path / "0.tar").write_bytes(PLAIN[: header_of(PLAIN, "last.jpg") + 512 + 20])
    source = opened(tmp_path / "0.tar")
    assert source[2].fault == ("missing_image", "its members are .json")
    assert [note["detail"] for note in source.notes()] == [
        f"last.jpg has 20 of its {len(IMAGE)} bytes"
    ]


def test_sparse_files_are_ignored_and_tars_may_be_joined(tmp_path):
    """Catches the list of parts of a sparse file read as headers, and an end mark that ends."""
    with open(tmp_path / "hole.jpg", "wb") as file:
        for i in range(40):
            file.seek(i * 200_000)
            file.write(b"x")
    joined = tar_bytes(triple("good"))
    for kind in ("gnu", "posix"):
        command = ["tar", "--sparse", f"--format={kind}", "-cf", f"{kind}.tar", "hole.jpg"]
        subprocess.run(command, cwd=tmp_path, check=True)
        joined += (tmp_path / f"{kind}.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(joined + tar_bytes(triple("last")))
    source = opened(tmp_path / "0.tar")
    assert list(items(source)) == ["0/good", "0/last"]
    assert [(note["reason"], note["detail"], note["count"]) for note in source.notes()] == [
        ("ignored_member", "sparse file", 2)
    ]


def test_the_first_of_several_images_is_read(tmp_path):
    """Catches the last member of a name, or an order of images that depends on the tar."""
    members = [("0.png", b"png"), ("0.jpg", b"jpg"), ("0.jpg", b"again"), ("0.txt", b"t")]
    (tmp_path / "00.tar").write_bytes(tar_bytes(members))
    source = opened(tmp_path / "00.tar")
    assert len(source) == 1 and source[0].image == b"jpg"
    assert [note["detail"] for note in source.notes()] == [
        "0.jpg is not read, but an earlier member of that name",
        "0.png is not read, but 0.jpg",
    ]


def test_names_that_are_not_utf8_are_escaped(tmp_path):
    """Catches a name that ends the run when its split is chosen or its id is stored."""
    (tmp_path / "00.tar").write_bytes(tar_bytes([*UTF8, ("../up.jpg", IMAGE)], tarfile.GNU_FORMAT))
    found = items(opened(tmp_path / "00.tar"))
    assert list(found) == ["00/caf\\udce9", "00/../up"] and found["00/caf\\udce9"].captions == ["t"]


def test_only_bad_shards_are_one_clear_error(tmp_path):
    """Catches a compressed data set that is only called empty."""
    (tmp_path / "0.tar.gz").write_bytes(gzip.compress(PLAIN))
    with pytest.raises(ValueError, match="no items: 0.tar.gz .*compressed with gzip: decompress"):
        opened(tmp_path / "*.gz")
    with pytest.raises(ValueError, match="--webdataset_captions is empty: name txt or"):
        opened(tmp_path / "*.gz", "--webdataset_captions= ,")


def test_description(tmp_path):
    """Catches options that change items and are not in the manifest, and time stamps that are."""
    path = tmp_path / "00.tar"
    path.write_bytes(tar_bytes(GOOD, mtime=1))
    plain = opened(path).describe()
    assert plain["kind"] == "webdataset" and plain["items"] == 2 and "where" not in plain
    options = ("--where=width > 1", "--webdataset_captions=caption", "--heldout=0.5")
    described = [opened(path, option).describe() for option in options]
    assert all(description != plain for description in described)
    assert described[0]["where"] == "width > 1"
    path.write_bytes(tar_bytes(GOOD, mtime=2.5))
    assert opened(path).describe() == plain


def test_another_process_reads_the_same(tmp_path):
    """Catches open files or state that a pickle loses or shares."""
    for i in range(3):
        members = [member for j in range(4) for member in triple(j, f"{i} {j}", width=i)]
        (tmp_path / f"{i}.tar").write_bytes(tar_bytes(members))
    source = WebDatasetSource(f"{tmp_path}/*.tar", 0.5, "caption,txt", "width != 1")
    before = [source[i] for i in range(len(source))]
    assert {item.split for item in before} == {"train", "heldout"}
    assert [item.fault is None for item in before] == [True] * 4 + [False] * 4 + [True] * 4
    program = (
        "import pickle, sys; s = pickle.load(sys.stdin.buffer);"
        " pickle.dump([s[i] for i in reversed(range(len(s)))], sys.stdout.buffer)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        input=pickle.dumps(source),
        stdout=subprocess.PIPE,
        check=True,
    )
    assert pickle.loads(done.stdout)[::-1] == before


def test_prepared_like_a_folder(tmp_path):
    """Catches images or captions that differ from those of the same files in a folder."""
    folder, members = tmp_path / "folder", []
    folder.mkdir()
    for i in range(12):
        files = {
            f"{i:02d}.png": synthetic.encode(synthetic.gradient(16, i)),
            f"{i:02d}.txt": f"a ramp number {i}".encode(),
        }
        members += files.items()
        for name, data in files.items():
            (folder / name).write_bytes(data)
    (tmp_path / "0.tar").write_bytes(tar_bytes(members[:10]))
    (tmp_path / "1.tar").write_bytes(tar_bytes(members[10:]))
    encoder = load_text_encoder("t5_tiny", 16)
    stores = []
    for source in (
        FolderSource(folder, 0.0),
        WebDatasetSource(f"{tmp_path}/{{0,1}}.tar", 0.0),
    ):
        output = tmp_path / f"out{len(stores)}"
        manifest = passes.prepare(
            source, Encoders.single(encoder), output, passes.Settings(**SETTINGS)
        )
        assert manifest["counts"]["skipped"] == {}
        stores.append(records.Prepared(output))
    images = [[store.images("train")[i] for i in range(12)] for store in stores]
    nameless = [[dataclasses.replace(row, id="") for row in rows] for rows in images]
    assert nameless[0] == nameless[1]
    assert [row.id for row in images[1]] == [f"{int(i >= 5)}/{i:02d}" for i in range(12)]
    texts = [[store.captions()[i].text for i in range(12)] for store in stores]
    assert texts[0] == texts[1]
