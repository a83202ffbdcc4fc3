"""A selection as files: the same shots with times, as tables and as an edit list whose time codes follow the frame rate."""

import csv
import io
import json
import urllib.parse
from fractions import Fraction

import pytest

from mediafm_ray.explore.export import TimeCode, time_code
from tests.explore.made import FILM, H264, ODD_IDS, SHOTS, client_of, config_of, media_facts, rewrite
from tests.searchable import commit


def save(client, kind, places):
    body = urllib.parse.urlencode({"format": kind, "places": places if isinstance(places, str) else json.dumps(places)})
    return client.post("/export", content=body.encode())


PLACES = [[FILM, 3], *([title_id, 1] for title_id in ODD_IDS), [FILM, 0]]


def test_csv_holds_the_shots_in_order(client):
    answer = save(client, "csv", PLACES)
    assert answer.headers["content-disposition"] == 'attachment; filename="selection.csv"'
    rows = list(csv.DictReader(io.StringIO(answer.content.decode(), newline="")))
    assert [(row["title_id"], int(row["shot_index"])) for row in rows] == [(title_id, shot) for title_id, shot in PLACES]
    assert {**rows[0], "video": ""} == {
        **{"title_id": FILM, "shot_index": "3", "start_s": "6.0", "end_s": "8.0", "frame_rate": "25", "video": ""},
        **{"language": "de", "text": "film says 3"},
    }
    assert rows[0]["video"].endswith("/videos/film \u00e9 #1.mp4")
    assert [row["text"] for row in rows[1:-1]] == ODD_IDS


def test_json_holds_the_same(client):
    content = json.loads(save(client, "json", PLACES).content)
    assert content["dataset_version"] == "0123456789ab"
    assert [[shot["title_id"], shot["shot_index"]] for shot in content["shots"]] == PLACES
    assert (content["shots"][0]["start_s"], content["shots"][0]["end_s"]) == (6.0, 8.0)


def test_edl_has_an_event_for_each_shot(client):
    lines = save(client, "edl", [[FILM, 3], [FILM, 0]]).text.split("\r\n")
    assert lines == [
        *("TITLE: mediafm selection", "FCM: NON-DROP FRAME", ""),
        "001  AX       AA/V  C        00:00:06:00 00:00:08:00 01:00:00:00 01:00:02:00",
        *("* FROM CLIP NAME: film \u00e9 #1.mp4", "* COMMENT: film, shot 3, 25 frames/s", ""),
        "002  AX       AA/V  C        00:00:00:00 00:00:02:00 01:00:02:00 01:00:04:00",
        *("* FROM CLIP NAME: film \u00e9 #1.mp4", "* COMMENT: film, shot 0, 25 frames/s", ""),
    ]


def test_no_text_adds_a_line_to_an_edl(tmp_path):
    hostile = "a\r\n002  AX       V     C        00:00:00:00\x1b[2J"
    commit(tmp_path / "out", hostile, 3)
    facts = {"video": f"/videos/{hostile}.mp4", "media": media_facts(3, H264)}
    rewrite(tmp_path / "out", hostile, facts, {"text": ["=1+1", "@x", "-2"]})
    client = client_of(config_of(tmp_path, "index.uri="))
    text = save(client, "edl", [[hostile, 1]]).text
    assert len(text.split("\r\n")) == 7
    assert "\x1b" not in text
    rows = list(csv.reader(io.StringIO(save(client, "csv", [[hostile, shot] for shot in range(3)]).content.decode(), newline="")))
    assert [row[-1] for row in rows[1:]] == ["'=1+1", "'@x", "'-2"]  # no formula for a spreadsheet


@pytest.mark.parametrize(
    ("rate", "seconds", "text"),
    [
        ("25", 61.04, "00:01:01:01"),
        ("24", 3661.5, "01:01:01:12"),
        ("24000/1001", 1001.0, "00:16:40:00"),  # 24,000 frames
        ("30000/1001", 3603.6, "01:00:00:00"),  # 108,000 frames, non-drop
        ("30000/1001", 1 / 29.97, "00:00:00:01"),
        ("60000/1001", 1.001, "00:00:01:00"),
        ("120", 1.0, "00:00:01:00"),
        ("25/2", 3600.0, "01:00:00:00"),  # an odd rate counts real time
        ("54000/1801", 3600.0, "01:00:00:00"),
        ("25", 86400.0, "00:00:00:00"),
    ],
)
def test_time_codes(rate, seconds, text):
    code = time_code({"average_rate": rate})
    assert code.text(code.frames(seconds)) == text


def test_a_frame_rate_that_is_none():
    assert [time_code({"average_rate": rate}) for rate in (None, "", "0", "1/0", "nan", "-25", "fast")] == [None] * 7
    assert TimeCode(Fraction(1, 3)).nominal == 1


@pytest.mark.parametrize(
    ("kind", "places", "status", "said"),
    [
        ("csv", [], 400, "the selection is empty or damaged"),
        ("csv", "no json", 400, "the selection is empty or damaged"),
        ("csv", "[" * 100_000, 400, "the selection is empty or damaged"),
        ("csv", [[FILM, "1"]], 400, "the selection is empty or damaged"),
        ("csv", [[FILM, True]], 400, "the selection is empty or damaged"),
        ("csv", [[FILM, -1]], 404, "has no shot -1"),
        ("json", [["../../etc/passwd", 1]], 404, "the dataset has no title"),
        ("exe", [[FILM, 1]], 400, "a selection is saved as csv, json, edl"),
        ("edl", [[FILM, 1]] * 1000, 400, "at most 999 events"),
        ("csv", [[FILM, 1]] * 5001, 400, "at most 5000 shots"),
        ("csv", "x" * (3 << 20), 413, "at most 2 MB"),
    ],
)
def test_what_cannot_be_saved_is_said(client, kind, places, status, said):
    answer = save(client, kind, places)
    assert (answer.status_code, said in answer.text) == (status, True), answer.text


def test_a_title_without_a_frame_rate_has_no_time_codes(tmp_path):
    commit(tmp_path / "out", FILM, SHOTS[FILM])
    client = client_of(config_of(tmp_path, "index.uri="))
    assert "the frame rate of &#39;film&#39; is not known" in save(client, "edl", [[FILM, 1]]).text
    assert save(client, "json", [[FILM, 1]]).status_code == 200
