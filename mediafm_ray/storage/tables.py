"""Tables at URIs of their own: read those of the user, reporting every problem at once, and write results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from mediafm_ray.storage.catalog import TABLE_ENDINGS, list_problems
from mediafm_ray.storage.dataset import DatasetError
from mediafm_ray.storage.store import StorageConfig, Store


class TableError(DatasetError):
    """A table that cannot be used. ``problems`` has one line for each, naming its row."""

    def __init__(self, uri: str, problems: list[str]):
        self.problems = problems
        super().__init__(*list_problems(f"table {uri}", problems))


def read_object(uri: str, config: StorageConfig | None = None) -> bytes:
    """Read the object at a URI. Raises FileNotFoundError, StorageError."""
    folder, _, name = Store(uri, config).uri.rpartition("/")
    return Store(folder or "/", config).read(name)


def write_object(uri: str, content: bytes, config: StorageConfig | None = None) -> None:
    """Write an object at a URI. Raises StorageError."""
    folder, _, name = Store(uri, config).uri.rpartition("/")
    Store(folder or "/", config).write(name, content)


def write_table(table: pa.Table, uri: str, config: StorageConfig | None = None, without: Sequence[str] = ()) -> None:
    """Write a table as one object: Parquet or, at a URI that ends in .jsonl, JSON lines without the columns ``without``."""
    if uri.endswith(".jsonl"):
        rows = table.drop_columns([column for column in without if column in table.column_names]).to_pylist()
        write_object(uri, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(), config)
        return
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_object(uri, sink.getvalue().to_pybytes(), config)


def read_table(uri: str, required: Mapping[str, pa.DataType], config: StorageConfig | None = None) -> pa.Table:
    """Read a table whose ``required`` columns have these types and no empty cell; other columns keep theirs.

    Raises TableError with every problem found, and StorageError where it cannot be opened.
    """
    ending = PurePosixPath(uri).suffix.lower()
    if ending not in TABLE_ENDINGS:
        raise TableError(uri or "(not set)", [f"the ending {ending or '(none)'} is not one of {', '.join(sorted(TABLE_ENDINGS))}"])
    try:
        content = pa.BufferReader(read_object(uri, config))
    except FileNotFoundError as error:
        raise TableError(uri, ["there is nothing at this location"]) from error
    try:
        table = _parse(content, TABLE_ENDINGS[ending], required)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise TableError(uri, [f"not readable as {TABLE_ENDINGS[ending]}: {' '.join(str(error).split())}"]) from error
    problems = [
        f"the column {name} is missing (there are: {', '.join(table.column_names)})" for name in required if name not in table.column_names
    ]
    if not problems and not table.num_rows:
        problems.append("the table has no rows")
    for column, type_ in required.items():
        if column not in table.column_names:
            continue
        try:
            values = table[column].cast(type_)
        except (pa.ArrowException, ValueError) as error:
            problems.append(f"the column {column} is {table[column].type}, not {type_}: {' '.join(str(error).split())}")
            continue
        table = table.set_column(table.column_names.index(column), column, values)
        empty = [row for row, value in enumerate(values.to_pylist(), start=1) if value is None or value == ""]
        problems += [f"row {row}: {column} is empty" for row in empty]
    if problems:
        raise TableError(uri, problems)
    return table


def _parse(content: pa.BufferReader, kind: str, required: Mapping[str, pa.DataType]) -> pa.Table:
    if kind == "parquet":
        return pq.read_table(content)
    if kind == "csv":  # Given types keep ids that look like numbers strings.
        return pyarrow.csv.read_csv(content, convert_options=pyarrow.csv.ConvertOptions(column_types=dict(required)))
    return pyarrow.json.read_json(content, parse_options=pyarrow.json.ParseOptions(explicit_schema=pa.schema(list(required.items()))))
