"""Writes and opens small parquet files, for the tests of the parquet source."""

import pyarrow as pa
import pyarrow.parquet as pq

from imagen_jax.data.prepare import checks
from imagen_jax.data.sources.parquet import Options, ParquetSource
from tests.data import synthetic

PNG = [synthetic.encode(synthetic.gradient(16, i)) for i in range(12)]


def write(path, rows, schema=None, **options):
    """Writes a file of rows; two of them in a row group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows, schema)
    pq.write_table(table, path, **{"row_group_size": 2} | options)
    return path


def good(count=4):
    return [{"image": PNG[i], "caption": f"picture {i}"} for i in range(count)]


def opened(pattern, **options):
    return ParquetSource(str(pattern), Options(**options))


def items(found):
    return [found[i] for i in range(len(found))]


def reasons(found):
    """{id: reason} of items that cannot be used, as prepare_data decides it, and of shards."""
    checked = [checks.check(item, 0) for item in items(found)]
    lost = {item.id: item.reason for item in checked if item.reason}
    return lost | {note["id"]: note["reason"] for note in found.notes()}
