"""Tables that people bring: Parquet, CSV or JSON lines at any URI, with every problem reported at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from mediafm_ray.storage.catalog import MAX_PROBLEMS_SHOWN, TABLE_ENDINGS
from mediafm_ray.storage.dataset import DatasetError
from mediafm_ray.storage.store import StorageConfig, Store


class TableError(DatasetError):
    """A table that cannot be used. ``problems`` has one line for each, naming its row."""

    def __init__(self, uri: str, problems: list[str]):
        self.problems = problems
        shown = problems[:MAX_PROBLEMS_SHOWN]
        more = f"\n  ... and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
        count = f"{len(problems)} problem" + ("s" if len(problems) != 1 else "")
        super().__init__(f"table {uri}: {count}; nothing was started\n  " + "\n  ".join(shown) + more)


def read_table(uri: str, required: Mapping[str, pa.DataType], config: StorageConfig | None = None) -> pa.Table:
    """A table whose ``required`` columns have these types and no empty cell; other columns are as they come.

    Raises TableError with every problem found, and StorageError when it cannot be opened.
    """
    ending = PurePosixPath(uri).suffix.lower()
    if ending not in TABLE_ENDINGS:
        raise TableError(uri or "(not set)", [f"the ending {ending or '(none)'} is not one of {', '.join(sorted(TABLE_ENDINGS))}"])
    folder, _, name = Store(uri, config).uri.rpartition("/")
    try:
        content = pa.BufferReader(Store(folder or "/", config).read(name))
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
    if kind == "csv":  # ids that look like numbers stay what they are
        return pyarrow.csv.read_csv(content, convert_options=pyarrow.csv.ConvertOptions(column_types=dict(required)))
    return pyarrow.json.read_json(content, parse_options=pyarrow.json.ParseOptions(explicit_schema=pa.schema(list(required.items()))))
