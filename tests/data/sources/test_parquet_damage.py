"""Damaged parquet files, shards, row groups and rows: each costs only what cannot be read of it."""

from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imagen_jax.data.prepare import checks
from imagen_jax.data.sources import parquet_rows
from tests.data.sources.parquet_files import PNG, good, items, opened, reasons, write


def mixed(column, value):
    """Five rows, of which the third has this value."""
    rows = good(5)
    if column == "image" and not isinstance(value, bytes | None):
        rows = [row | {"image": {"bytes": row["image"], "path": None}} for row in rows]
    rows[2][column] = value
    return rows


def paths(value):
    return mixed("image", {"bytes": None, "path": value})


THIRD = "bad/000000002"
ROWS = {
    "null image": (mixed("image", None), "missing_image"),
    "null bytes and path": (mixed("image", {"bytes": None, "path": None}), "missing_image"),
    "null struct": (paths(None), "missing_image"),
    "empty bytes": (mixed("image", b""), "broken_image"),
    "empty bytes and a path": (
        mixed("image", {"bytes": b"", "path": "bad.parquet"}),
        "broken_image",
    ),
    "bytes that are no image": (mixed("image", b"<html>"), "broken_image"),
    "truncated image": (mixed("image", PNG[0][:60]), "broken_image"),
    "path that does not exist": (paths("no.png"), "missing_image"),
    "URL": (paths("https://example.com/a.png"), "missing_image"),
    "absolute path outside": (paths("/etc/hostname"), "path_outside_folder"),
    "parent folders": (paths("../../etc/hostname"), "path_outside_folder"),
    "the folder itself": (paths("."), "path_outside_folder"),
    "a name with NUL": (paths("a\0b.png"), "missing_image"),
    "a name of 5000 letters": (paths("a" * 5000), "unreadable_image"),
    "null caption": (mixed("caption", None), "no_caption"),
    "blank caption": (mixed("caption", " \n"), "no_caption"),
}


@pytest.mark.parametrize(("rows", "reason"), ROWS.values(), ids=ROWS.keys())
def test_a_bad_row_costs_only_itself(tmp_path, rows, reason):
    """Catches a bad row that ends the run, or that is skipped without its reason."""
    write(tmp_path / "bad.parquet", rows)
    found = opened(tmp_path / "bad.parquet")
    assert reasons(found) == {THIRD: reason} and len(found) == 5
    assert found[4].image == PNG[4]


def test_the_detail_of_a_bad_row(tmp_path):
    """Catches a URL taken for a file, and the address of an object in the detail."""
    write(tmp_path / "a.parquet", ROWS["URL"][0])
    assert opened(tmp_path / "a.parquet")[2].fault.detail.endswith(
        "a URL: download the images first"
    )
    write(tmp_path / "a.parquet", ROWS["empty bytes"][0])
    assert opened(tmp_path / "a.parquet")[2].fault.detail == "0 bytes"


@pytest.mark.parametrize("kind", [pa.binary(), pa.string(), pa.list_(pa.string())], ids=str)
def test_a_caption_that_is_not_utf8_costs_only_itself(tmp_path, kind):
    """Catches an error of the decoder, which Arrow raises for the whole column."""
    texts = pa.array([b"one", b"caf\xe9", b"three"])
    column = pa.Array.from_buffers(pa.string(), 3, texts.buffers())  # as a careless writer's
    if "list" in str(kind):
        column = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3]), column)
    elif kind == pa.binary():
        column = texts
    write(tmp_path / "bad.parquet", pa.table({"image": PNG[:3], "caption": column}))
    found = opened(tmp_path / "bad.parquet")
    assert reasons(found) == {"bad/000000001": "no_caption"}
    assert checks.check(found[1], 0).bad_captions == ["invalid_caption"]


def damaged(path, change):
    data = bytearray(path.read_bytes())
    changed = bytes(change(data))
    assert changed != path.read_bytes()
    path.write_bytes(changed)


def shard(tmp_path, name):
    """A file of the kind `name`, and the reason for which it is left out."""
    path = tmp_path / "bad.parquet"
    write(path, good())
    renamed = [{"picture": row["image"], "caption": row["caption"]} for row in good()]
    match name:
        case "empty file":
            path.write_bytes(b"")
        case "not parquet":
            path.write_bytes(b"file,caption\na.png,a cat\n" * 9)
        case "Git LFS pointer":
            path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        case "truncated":
            damaged(path, lambda data: data[: len(data) // 2])
        case "damaged footer":
            damaged(path, lambda data: data[:-60] + b"\xff" * 40 + data[-20:])
        case "footer longer than the file":
            damaged(path, lambda data: data[:-8] + b"\xff\xff\xff\x7f" + data[-4:])
        case "wrong number of rows":  # of the file: field 3, followed by the list of row groups
            damaged(path, lambda data: data.replace(b"\x16\x08\x19", b"\x16\x0a\x19"))
        case "negative number of rows":
            damaged(path, lambda data: data.replace(b"\x16\x08\x19", b"\x16\x07\x19"))
        case "a column's name is not UTF-8":
            write(path, [row | {"umlaut": 1} for row in good()], store_schema=False)
            damaged(path, lambda data: data.replace(b"umlaut", b"uml\xe4ut"))
        case "encrypted":
            damaged(path, lambda data: b"PARE" + data[4:-4] + b"PARE")
        case "directory":
            path.unlink()
            path.mkdir()
            return path, "missing_shard"
        case "link without a target":
            path.unlink()
            path.symlink_to(tmp_path / "nothing")
            return path, "missing_shard"
        case "no rows":
            write(path, pa.Table.from_pylist(good()).slice(0, 0))
            return path, "empty_shard"
        case "another column":
            write(path, renamed)
            return path, "missing_column"
        case "numbers for images":
            write(path, [row | {"image": 3} for row in good()])
            return path, "wrong_column_type"
        case "lists for images":
            write(path, [row | {"image": [row["image"]]} for row in good()])
            return path, "wrong_column_type"
        case "lists of structs for images":
            write(path, [row | {"image": [{"bytes": row["image"]}]} for row in good()])
            return path, "wrong_column_type"
        case "struct without bytes":
            write(path, [row | {"image": {"url": "x"}} for row in good()])
            return path, "wrong_column_type"
        case "numbers for captions":
            write(path, [row | {"caption": 1.5} for row in good()])
            return path, "wrong_column_type"
    return path, "unreadable_shard"


SHARDS = (
    "empty file|not parquet|Git LFS pointer|truncated|damaged footer|footer longer than the file"
    "|wrong number of rows|negative number of rows|a column's name is not UTF-8"
    "|encrypted|directory|link without a target|no rows|another column|numbers for images"
    "|lists of structs for images|lists for images|struct without bytes|numbers for captions"
).split("|")


@pytest.mark.parametrize("name", SHARDS)
def test_a_bad_shard_costs_only_itself(tmp_path, name):
    """Catches one bad file of many that ends the run, is not named, or shifts other items."""
    _, reason = shard(tmp_path, name)
    write(tmp_path / "a.parquet", good(2))
    write(tmp_path / "c.parquet", good(3))
    found = opened(f"{tmp_path}/*.parquet")
    (note,) = found.notes()
    assert note["id"] == "bad.parquet" and note["reason"] == reason and note["detail"]
    assert note["detail"].isprintable() and str(tmp_path) not in note["detail"]
    assert note.get("count", 4) == 4
    names = [f"a/{i:09d}" for i in range(2)] + [f"c/{i:09d}" for i in range(3)]
    assert [item.id for item in items(found)] == names
    assert [item.image for item in items(found)] == PNG[:2] + PNG[:3]


@pytest.mark.parametrize("name", ["not parquet", "another column", "lists for images"])
def test_only_bad_shards_are_one_clear_line(tmp_path, name):
    """Catches a source of nothing, and a message that does not list the columns."""
    path, _ = shard(tmp_path, name)
    with pytest.raises(ValueError, match=r"has no items: bad.parquet [a-z_]+ \((has|is) ") as error:
        opened(path)
    expected = {
        "not parquet": "is not a parquet file",
        "another column": "has no column 'image' (it has picture, caption): name another with "
        "--parquet_image",
        "lists for images": "has lists of binary in column 'image', not binary, a struct of bytes "
        "and path, or text with paths: name another with --parquet_image",
    }
    assert expected[name] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_a_damaged_row_group_costs_only_its_rows(tmp_path, compression):
    """Catches a damaged page that ends the run, spoils other row groups or gives other pixels."""
    options = {"compression": compression, "write_page_checksum": True, "use_dictionary": False}
    path = write(tmp_path / "a.parquet", good(6), **options)
    where = pq.ParquetFile(path).metadata.row_group(1).column(0)
    at = where.data_page_offset + where.total_compressed_size - 30
    damaged(path, lambda data: data[:at] + b"\xaa" * 20 + data[at + 20 :])
    lost = {"a/000000002": "unreadable_row_group", "a/000000003": "unreadable_row_group"}
    found = opened(path)
    assert reasons(found) == lost
    assert [found[i].image for i in (5, 3, 0, 2, 4)] == [PNG[5], None, PNG[0], None, PNG[4]]
    assert found[2].fault.detail.startswith("row group 1: ")


def test_a_damaged_row_group_is_read_once(tmp_path, monkeypatch):
    """Catches a row group of 1,000 damaged rows that is read 1,000 times."""
    path = write(tmp_path / "a.parquet", good(8), row_group_size=8, compression="none")
    found = opened(path)
    starts = []

    def fail(*_, **__):
        starts.append(1)
        raise OSError("corrupt data page")
        yield

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", fail)
    assert set(reasons(found).values()) == {"unreadable_row_group"} and len(starts) == 1


def test_numbers_of_rows_are_not_negative():
    """Catches a damaged footer whose numbers agree."""
    group = SimpleNamespace(num_rows=-4)
    metadata = SimpleNamespace(num_rows=-4, num_row_groups=1, row_group=lambda _: group)
    with pytest.raises(ValueError, match="damaged footer"):
        parquet_rows.row_counts(SimpleNamespace(metadata=metadata))


def test_rows_before_the_damage_are_read_in_any_order(tmp_path, monkeypatch):
    """Catches losses that depend on the order of reading, which makes two passes differ."""
    monkeypatch.setattr(parquet_rows, "BATCH_ROWS", 2)
    options = {"write_page_checksum": True, "use_dictionary": False, "data_page_size": 1}
    options["compression"] = "none"
    path = write(tmp_path / "a.parquet", good(8), row_group_size=8, write_batch_size=2, **options)
    damaged(path, lambda data: data.replace(PNG[5][-40:-20], bytes(20)))
    for order in (range(8), reversed(range(8)), (6, 1, 5, 3, 4, 0, 7, 2)):
        found = opened(path, heldout=0.0)
        read = {i: found[i].image for i in order}
        assert read == {i: PNG[i] if i < 4 else None for i in range(8)}


def test_a_shard_that_changes_while_it_is_read_is_named(tmp_path):
    """Catches items that move, and an error of Arrow or the file system without the file."""
    for change in (b"x" * 100, None, write(tmp_path / "other", good(1)).read_bytes()):
        path = write(tmp_path / "a.parquet", good(2))
        found = opened(path)
        path.unlink() if change is None else path.write_bytes(change)
        with pytest.raises(ValueError, match=r"a.parquet changed while it was being read.*: start"):
            found[0]


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), OSError(24, "Too many open files"), MemoryError()]
)
@pytest.mark.parametrize("step", ["__init__", "iter_batches"])
def test_an_error_of_the_machine_is_no_fault_of_a_row(tmp_path, monkeypatch, error, step):
    """Catches rows that are lost because the file system was away for a moment."""
    write(tmp_path / "a.parquet", good(2))
    found = opened(tmp_path / "a.parquet")

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        # iter_batches raises when its first batch is asked for
        failing = fail if step == "__init__" else lambda *_, **__: map(fail, [0])
        patch.setattr(pq.ParquetFile, step, failing)
        with pytest.raises(type(error)):
            found[0]
    assert found[0].image == PNG[0]
