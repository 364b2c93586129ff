"""The parquet source: columns of every layout, conditions, memory, processes, the command."""

import dataclasses
import json
import multiprocessing
import pickle
from decimal import Decimal

import pyarrow as pa
import pytest
from absl import flags

from imagen_jax import prepare_data
from imagen_jax.data import records
from imagen_jax.data.sources import parquet_rows, sharded, source
from imagen_jax.data.sources.parquet import distinct
from imagen_jax.data.sources.where import Where
from tests.data.sources.parquet_files import PNG, good, items, opened, reasons, write
from tests.data.synthetic_source import tree

STRINGS = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "binary": pa.binary(),
    "large_binary": pa.large_binary(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "list": pa.list_(pa.string()),
    "large_list": pa.large_list(pa.large_string()),
    "fixed_size_list": pa.list_(pa.string(), 1),
    "list_of_dictionary": pa.list_(pa.dictionary(pa.int32(), pa.string())),
}


@pytest.mark.parametrize("kind", STRINGS.values(), ids=STRINGS.keys())
@pytest.mark.parametrize("image", [pa.binary(), pa.large_binary(), pa.binary_view()], ids=str)
def test_every_type_of_text_and_binary_is_read(tmp_path, kind, image):
    """Catches a type that pandas, Spark or polars writes and that is refused or garbled."""
    is_list = "list" in str(kind)
    captions = [f"picture {i} – é" for i in range(4)]
    column = pa.array([[c] for c in captions] if is_list else captions).cast(kind)
    write(tmp_path / "a.parquet", pa.table({"image": pa.array(PNG[:4], image), "caption": column}))
    found = items(opened(tmp_path / "a.parquet"))
    assert [item.captions for item in found] == [[c] for c in captions]
    assert [item.image for item in found] == PNG[:4] and not any(item.fault for item in found)
    assert [item.id for item in found] == [f"a/{i:09d}" for i in range(4)]


def test_several_captions_nested_fields_and_names_with_dots(tmp_path):
    """Catches a lost caption column, a null that becomes "None", and a.b read as a field only."""
    rows = [
        {
            "jpg.bytes": {"data": PNG[i]},
            "long": {"text": f"long {i}", "score": 1.0} if i else None,
            "short": [f"short {i}", None, f"brief {i}"] if i != 1 else None,
            "parts": [{"raw": f"part {i}", "n": 3}],
        }
        for i in range(3)
    ]
    write(tmp_path / "a.parquet", rows)
    captions = ("long.text", "short", "parts.raw")
    found = opened(tmp_path / "a.parquet", image="jpg.bytes.data", captions=captions)
    assert [item.captions for item in items(found)] == [
        ["short 0", "brief 0", "part 0"],
        ["long 1", "part 1"],
        ["long 2", "short 2", "brief 2", "part 2"],
    ]
    assert [item.image for item in items(found)] == PNG[:3]
    assert found.describe()["captions"] == list(captions)


def test_bytes_and_paths_of_the_hub_are_mixed_row_by_row(tmp_path):
    """Catches a null of bytes that hides the path, and paths relative to the working directory."""
    (tmp_path / "shards" / "sub").mkdir(parents=True)
    (tmp_path / "shards" / "sub" / "1.png").write_bytes(PNG[1])
    inside = tmp_path / "shards" / "2.png"
    inside.write_bytes(PNG[2])
    images = [
        {"bytes": PNG[0], "path": "nowhere.png"},
        {"bytes": None, "path": "sub/1.png"},
        {"bytes": None, "path": str(inside)},
        {"bytes": None, "path": "sub/../2.png"},
    ]
    rows = [{"image": image, "caption": "c"} for image in images]
    write(tmp_path / "shards" / "a.parquet", rows)
    found = items(opened(tmp_path / "shards" / "a.parquet"))
    assert [item.image for item in found] == [PNG[0], PNG[1], PNG[2], PNG[2]]

    paths = [{"image": image["path"], "caption": "c"} for image in images[1:]]
    write(tmp_path / "elsewhere" / "b.parquet", paths)
    found = opened(tmp_path / "elsewhere" / "b.parquet", images=str(tmp_path / "shards"))
    assert [item.image for item in items(found)] == [PNG[1], PNG[2], PNG[2]]
    assert found.describe()["images"] == "shards"


def test_keys(tmp_path):
    """Catches two items of one id, a repeated key that is dropped, and a null that ends the run."""
    keys = ["x", "x", None, "x#2", "x", "000000002"]
    rows = [row | {"id": key} for row, key in zip(good(6), keys)]
    write(tmp_path / "a.parquet", rows)
    found = opened(tmp_path / "a.parquet", key="id")
    names = ["x", "x#3", "000000002#2", "x#2", "x#4", "000000002"]
    assert [item.id for item in items(found)] == [f"a/{name}" for name in names]
    assert {note["reason"]: note["count"] for note in found.notes()} == {
        "repeated_key": 2,
        "missing_key": 1,
    }
    write(tmp_path / "a.parquet", [row | {"id": 2**40 + i} for i, row in enumerate(good())])
    assert opened(tmp_path / "a.parquet", key="id")[1].id == f"a/{2**40 + 1}"
    write(tmp_path / "a.parquet", [row | {"id": b"k\xff%d" % i} for i, row in enumerate(good())])
    assert opened(tmp_path / "a.parquet", key="id")[1].id == "a/k\\xff1"
    assert distinct(["a"] * 20000)[0][-1] == "a#20000"


def test_shards_of_one_name_have_different_ids(tmp_path):
    """Catches ids that repeat because two folders hold train-0.parquet, as on the hub."""
    for folder in ("de", "en"):
        write(tmp_path / folder / "train-0.parquet", good(1))
    write(tmp_path / "en" / "train-1.parquet", good(1))
    found = items(opened(f"{tmp_path}/*/*.parquet"))
    names = ["de/train-0", "en/train-0", "en/train-1"]
    assert [item.id for item in found] == [f"{name}/000000000" for name in names]


def test_where(tmp_path):
    """Catches decimals, dictionaries and binary text that compare as unequal, or a missing one."""
    columns = {
        "width": [100, 300, 300, None, 300],
        "score": [Decimal("0.5"), Decimal("0.25"), Decimal("0.75"), Decimal("0.75"), None],
        "license": pa.array([b"cc0", b"cc0", b"cc0", b"cc0", b"cc0"]),
        "origin": pa.array(["web"] * 5).dictionary_encode(),
    }
    table = pa.table({"image": PNG[:5], "caption": [f"c {i}" for i in range(5)]} | columns)
    write(tmp_path / "a.parquet", table)
    write(tmp_path / "b.parquet", table.drop_columns(["width"]).slice(0, 1))
    text = "width >= 200 and score + 0.25 > 0.75 and license == 'cc0' and origin in ('web',)"
    found = opened(f"{tmp_path}/*.parquet", where=Where(text))
    assert reasons(found) == {
        "a/000000000": "filtered",
        "a/000000001": "filtered",
        "a/000000003": "filter_undecided",
        "a/000000004": "filter_undecided",
        "b/000000000": "filter_undecided",
    }
    assert found.describe()["where"] == text and found[2].captions == ["c 2"]
    assert "where" not in opened(f"{tmp_path}/*.parquet").describe()
    with pytest.raises(ValueError, match="no shard has the column hight: use columns of caption,"):
        opened(f"{tmp_path}/*.parquet", where=Where("hight > 3"))


def test_a_date_that_python_does_not_have_is_undecided(tmp_path):
    """Catches metadata that Arrow cannot convert, which costs a run."""
    dates = pa.array([0, 2**61, 0], pa.timestamp("ms"))
    write(tmp_path / "a.parquet", pa.table({"image": PNG[:3], "caption": ["c"] * 3, "at": dates}))
    found = opened(tmp_path / "a.parquet", where=Where("at != 3"))
    assert [item.fault and item.fault.reason for item in items(found)] == [
        None,
        "filter_undecided",
        None,
    ]


def test_only_needed_columns_are_read_in_batches(tmp_path, monkeypatch):
    """Catches a whole row group in memory, and large columns that nobody asked for."""
    image = [{"bytes": PNG[i], "path": "p", "mask": b"m" * 10} for i in range(8)]
    rows = [row | {"image": image[i], "thumbnail": b"t"} for i, row in enumerate(good(8))]
    path = write(tmp_path / "a.parquet", rows, row_group_size=8)
    monkeypatch.setattr(parquet_rows, "BATCH_BYTES", path.stat().st_size // 3)
    found = opened(path)
    assert [item.image for item in items(found)] == PNG[:8]
    batch = found._open[0]._rows._batch
    assert 1 <= batch.num_rows <= 4 and set(batch.schema.names) == {"image", "caption"}
    assert [field.name for field in batch.schema.field("image").type] == ["bytes", "path"]


def test_two_shards_are_open(tmp_path, monkeypatch):
    """Catches files that stay open: a process may open about a thousand."""
    for i in range(5):
        write(tmp_path / f"{i}.parquet", good(1))
    found = opened(f"{tmp_path}/{{0..4}}.parquet")
    first = found._open.setdefault(0, found.open_shard(tmp_path / "0.parquet"))
    items(found)
    assert len(found._open) == sharded.OPEN_SHARDS and first._file.reader.closed


def first_and_last(found):
    return found[0], found[len(found) - 1], found.describe()


def test_another_process_reads_the_same(tmp_path):
    """Catches open files that are sent to a worker, and a description that names this machine."""
    for name in "ab":
        write(tmp_path / f"{name}.parquet", [row | {"w": 1} for row in good()])
    options = {"heldout": 0.5, "where": Where("w == 1")}
    found = opened(f"{tmp_path}/*.parquet", **options)
    here = first_and_last(found)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(first_and_last, (found,)) == here
    assert first_and_last(pickle.loads(pickle.dumps(found))) == here
    assert str(tmp_path) not in json.dumps(found.describe())
    (tmp_path / "copy").mkdir()
    for name in "ab":
        data = (tmp_path / f"{name}.parquet").read_bytes()
        (tmp_path / "copy" / f"{name}.parquet").write_bytes(data)
    assert opened(f"{tmp_path}/copy/*.parquet", **options).describe() == found.describe()
    write(tmp_path / "copy" / "b.parquet", [row | {"w": 2} for row in good()])
    assert opened(f"{tmp_path}/copy/*.parquet", **options).describe() != found.describe()


def command(spec, output, *more):
    values = flags.FlagValues()
    prepare_data.define_flags(values)
    base = ["--encoder=t5_tiny", "--max_length=16", "--processes=1", f"--output={output}"]
    values(["prepare_data", f"--source={spec}", *base, *more])
    prepare_data._run(values)
    return records.Prepared(output)


def test_prepared_like_a_folder(tmp_path):
    """Catches pixels, captions or their order that change on the way from parquet."""
    (tmp_path / "folder").mkdir()
    for i, data in enumerate(PNG):
        (tmp_path / "folder" / f"{i:02d}.png").write_bytes(data)
        (tmp_path / "folder" / f"{i:02d}.txt").write_text(f"picture {i}")
    write(tmp_path / "a.parquet", good(7))
    write(tmp_path / "b.parquet", [row | {"extra": 1} for row in good(12)[7:]])
    folder = command(f"folder:{tmp_path}/folder", tmp_path / "1")
    found = command(f"parquet:{tmp_path}/{{a,b}}.parquet", tmp_path / "2")
    rows = [list(prepared.images("train")) for prepared in (folder, found)]
    assert [row.id for row in rows[1]] == [f"a/{i:09d}" for i in range(7)] + [
        f"b/{i:09d}" for i in range(5)
    ]
    without = [[dataclasses.replace(row, id="") for row in read] for read in rows]
    assert without[0] == without[1]
    captions = [tree(tmp_path / name / "captions") for name in "12"]
    assert captions[0] == captions[1] and len(rows[0]) == 12


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--parquet_caption=,"], "is empty: name a column"),
        (["--parquet_images=/no/such"], "--parquet_images /no/such is not a directory"),
        (["--parquet_key=none"], "has no column 'none' .it has image, caption.: name another"),
        (["--where=width >"], "is no condition"),
    ],
)
def test_wrong_flags_are_one_clear_line(tmp_path, more, message):
    """Catches a traceback, and a flag that does not reach the source."""
    write(tmp_path / "a.parquet", good())
    values = flags.FlagValues()
    source.define_flags(values)
    values(["prepare_data", f"--source=parquet:{tmp_path}/a.parquet", *more])
    with pytest.raises(ValueError, match=message):
        source.open_source(values)
