"""What every stage keeps: declared columns, failure as a value, one row a title."""

from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest

from mediafm_ray.errors import TitleError
from mediafm_ray.pipeline.rows import (
    AUDIO,
    FRAMES,
    Stage,
    TitleRow,
    list_cell,
    nested_cell,
    packed_array,
    plan_table,
    vectors_cell,
    vectors_type,
)
from mediafm_ray.spec import Packed


def titles(*ids):
    row = {"source": "s", "video": "v", "timed_text": [], "synopsis": "", "tags": [], "superseded": []}
    return plan_table([{"title_id": title_id, **row} for title_id in ids])


class Vectors(Stage):
    """A stage that gives as many vectors as the id says, and fails where it says so."""

    name = "vectors"
    takes = ("title_id", "video")
    drops = ("video",)
    adds: ClassVar = {"vectors": vectors_type(3), "count": pa.int64()}

    def process(self, row):
        if row.title_id == "bad":
            raise TitleError("the title is bad")
        if row.title_id == "broken":
            raise KeyError("a defect")
        count = int(row.title_id)
        return {"vectors": vectors_cell(np.arange(count * 3, dtype=np.float32).reshape(count, 3)), "count": count}


class Sums(Stage):
    name = "sums"
    takes = ("vectors", "count")
    adds: ClassVar = {"sum": pa.float64()}

    def process(self, row):
        return {"sum": float(row.vectors("vectors").sum())}


def test_failures_are_values_and_later_stages_pass_them_through():
    table = Sums()(Vectors()(titles("2", "bad", "0", "broken", "1")))
    assert table["title_id"].to_pylist() == ["2", "bad", "0", "broken", "1"]
    assert table["sum"].to_pylist() == [15.0, None, 0.0, None, 3.0]
    assert table["outcome"].to_pylist() == ["ok", "failed", "ok", "failed", "ok"]
    errors = table["error"].to_pylist()
    assert errors[0] is errors[2] is errors[4] is None
    assert errors[1] == {"stage": "vectors", "type": "TitleError", "message": "the title is bad", "traceback": "", "outage": False}
    assert errors[3]["type"] == "KeyError"
    assert "a defect" in errors[3]["message"]
    assert "in process" in errors[3]["traceback"]
    assert "video" not in table.column_names
    assert [[spent["stage"] for spent in seconds] for seconds in table["seconds"].to_pylist()] == [
        ["vectors", "sums"],
        ["vectors"],
        ["vectors", "sums"],
        ["vectors"],
        ["vectors", "sums"],
    ]


def test_blocks_of_failed_and_finished_titles_have_one_schema():
    stages = [Vectors(), Sums()]
    tables = []
    for title_id in ("0", "5", "bad"):
        table = titles(title_id)
        for stage in stages:
            table = stage(table)
        tables.append(table)
    assert tables[0].schema == tables[1].schema == tables[2].schema
    assert pa.concat_tables(tables).num_rows == 3


def test_empty_blocks_pass():
    assert Vectors()(titles()).schema == Vectors()(titles("1")).schema
    assert Vectors()(pa.table({})).num_rows == 0


def test_a_missing_column_is_a_defect_of_the_graph_not_of_a_title():
    with pytest.raises(TypeError, match="stage sums: the columns vectors, count are missing"):
        Sums()(titles("1"))


def test_a_stage_that_breaks_its_declaration_is_caught():
    class Wrong(Vectors):
        def process(self, row):
            return {"vectors": None}

    error = Wrong()(titles("1"))["error"][0].as_py()
    assert "declares" in error["message"]


def test_vectors_survive_ipc_and_slicing():
    vectors_SD = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    table = pa.table({"v": pa.concat_arrays([vectors_cell(vectors_SD[:2]), vectors_cell(vectors_SD), vectors_cell(vectors_SD[:0])])})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    back = pa.ipc.open_stream(sink.getvalue()).read_all()
    for index, expected in enumerate((vectors_SD[:2], vectors_SD, vectors_SD[:0])):
        np.testing.assert_array_equal(TitleRow(back.slice(index, 1)).vectors("v"), expected)


def test_packed_bytes_become_cells_without_a_copy_and_come_back_in_place():
    data = memoryview(b"aabbbc")
    packed = Packed(data, np.array([0, 2, 5, 5, 6], np.int64))
    assert [bytes(packed[index]) for index in range(len(packed))] == [b"aa", b"bbb", b"", b"c"]
    values = packed_array(packed)
    assert values.buffers()[2].address == pa.py_buffer(data).address
    table = pa.table({"frames": nested_cell(values, [1, 0, 3]).cast(FRAMES), "audio": list_cell(values).cast(AUDIO)})
    row = TitleRow(table)
    assert [[bytes(frame) for frame in shot] for shot in row.frames("frames")] == [[b"aa"], [], [b"bbb", b"", b"c"]]
    assert [bytes(samples) for samples in row.byte_strings("audio")[1:]] == [b"bbb", b"", b"c"]
    assert np.frombuffer(row.byte_strings("audio")[0], np.uint8).tolist() == [97, 97]
    assert row["frames"] == [[b"aa"], [], [b"bbb", b"", b"c"]]
    tables = pa.concat_tables([table, table])
    assert [[bytes(frame) for frame in shot] for shot in TitleRow(tables.slice(1, 1)).frames("frames")] == row["frames"]


def test_titles_that_go_together_fare_as_if_each_went_alone():
    calls = []

    class Together(Vectors):
        supports_batching = True

        def process_together(self, rows):
            calls.append([row.title_id for row in rows])
            return [self.process(row) for row in rows]

    for ids in (("2", "0", "3"), ("2", "bad", "1")):
        calls.clear()
        one, other = Together()(titles(*ids)), Vectors()(titles(*ids))
        assert calls == [list(ids)]
        assert one.drop_columns("seconds").equals(other.drop_columns("seconds"))
    assert [row["error"] is None for row in one.to_pylist()] == [True, False, True]
    failed = one.append_column("more", one["count"]).drop_columns(["vectors", "count"]).append_column("video", one["title_id"])
    calls.clear()
    Together()(failed)
    assert calls == [["2", "1"]]
