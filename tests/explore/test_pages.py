"""The pages as a browser gets them: searches, comparison, titles, and whatever a catalog can hold that a page must not take for markup."""

import html
import re
import shutil
import urllib.parse
from html.parser import HTMLParser

import pytest

from jobs import compact_dataset
from mediafm_ray.config.jobs import CompactDatasetConfig
from mediafm_ray.config.loader import read_config
from mediafm_ray.explore.queries import link
from tests.explore.made import FILM, GONE, ODD_IDS, OLD, SEQUEL, SHOTS, client_of, config_of, rewrite, thumbnail
from tests.hostile_text import HOSTILE
from tests.searchable import PARTS, build, commit, expected, vectors_of

NEAREST = 8  # results whose cosines differ by more than half precision loses
PLACE = re.compile(r'data-title="(.*?)" data-shot="(\d+)"', re.DOTALL)


def places(answer):
    assert answer.status_code == 200, answer.text
    return [(html.unescape(title_id), int(shot)) for title_id, shot in PLACE.findall(answer.text)]


@pytest.mark.parametrize("by", ["fused", "video", "audio", "text"])
def test_shots_like_a_shot_are_those_of_a_search_by_hand(client, by):
    part = PARTS.get(by, slice(None))
    wanted, cosines = expected(vectors_of(FILM, SHOTS[FILM])[4, part], part, titles=SHOTS, without=[(FILM, 4)])
    answer = client.get(link("/", like=FILM, shot=4, by=by))
    assert places(answer)[:NEAREST] == wanted[:NEAREST]
    assert len(places(answer)) == 24
    assert f"<b>{cosines[0]:.3f}</b>" in answer.text
    assert sorted(places(client.get(link("/", like=FILM, shot=4, by=by, count=96)))) == sorted(wanted)
    elsewhere = [place for place in wanted if place[0] != FILM]
    assert places(client.get(link("/", like=FILM, shot=4, by=by, others=1)))[:NEAREST] == elsewhere[:NEAREST]


def test_a_clip_is_searched_with_as_the_command_does(client):
    answer = client.get(link("/", like=FILM, start="3", end="9.5", count=96))
    assert not {(FILM, shot) for shot in (1, 2, 3, 4)} & set(places(answer))
    assert len(places(answer)) == sum(SHOTS.values()) - 4


def test_filters_keep_titles_times_languages_and_lengths(client):
    wanted, _ = expected(vectors_of(FILM, SHOTS[FILM])[0], titles=SHOTS, without=[(FILM, 0)])
    for fields, holds in (
        ({"title": FILM}, lambda title_id, shot: title_id == FILM),  # a known title is that title alone
        ({"title": "FIL"}, lambda title_id, shot: title_id in (FILM, SEQUEL, "../film")),
        ({"title": "it's"}, lambda title_id, shot: title_id == "it's: \u2603"),
        ({"after": "5", "before": "8"}, lambda title_id, shot: shot in (2, 3)),
        ({"language": "de, fr"}, lambda title_id, shot: shot % 4 == 3),
        ({"length": "2"}, lambda title_id, shot: True),
        ({"length": "2.5"}, lambda title_id, shot: False),
        ({"title": "' OR '1'='1"}, lambda title_id, shot: False),
    ):
        answer = client.get(link("/", like=FILM, shot=0, count=96, **fields))
        assert sorted(places(answer)) == sorted(place for place in wanted if holds(*place)), fields
        assert ("No shot was found" in answer.text) == (not any(holds(*place) for place in wanted))


def test_the_kinds_of_vectors_stand_side_by_side(client):
    answer = client.get(link("/compare", like=FILM, shot=4, others=1))
    columns = dict(re.findall(r'<h2 id="by-(\w+)">.*?</h2>(.*?)</section>', answer.text, re.DOTALL))
    assert list(columns) == ["fused", "contextual", "video", "audio", "text"]
    assert "The index holds fused vectors. For likeness by contextual ones: mediafm index" in columns["contextual"]
    for by in ("fused", "video", "audio", "text"):
        part = PARTS.get(by, slice(None))
        wanted, _ = expected(vectors_of(FILM, SHOTS[FILM])[4, part], part, titles={**SHOTS, FILM: 0})
        found = [(html.unescape(title_id), int(shot)) for title_id, shot in PLACE.findall(columns[by])]
        assert found == wanted[:8]
    without_text = client.get(link("/compare", like=FILM, shot=1)).text
    assert "shot 1 of &#39;film&#39; has no text vector to compare with" in without_text


@pytest.mark.parametrize(
    ("fields", "status", "said"),
    [
        ({"like": "flim", "shot": 3}, 400, "the index has no title &#39;flim&#39;; similar: film"),
        ({"like": FILM, "shot": 12}, 400, "has no shot 12: it has 12, from 0 to 11"),
        ({"like": FILM, "shot": "one"}, 400, "expected its index, counted from 0"),
        ({"like": FILM, "shot": 1, "by": "smell"}, 400, "there are no &#39;smell&#39; vectors; there are: fused, video, audio, text"),
        ({"like": FILM, "shot": 1, "by": "contextual"}, 400, "The index holds fused vectors."),
        ({"like": FILM}, 400, "a clip needs its start and its end"),
        ({"like": FILM, "start": "5", "end": "3"}, 400, "is empty"),
        ({"like": FILM, "start": "nan", "end": "3"}, 400, "expected seconds"),
        ({"like": FILM, "shot": 1, "after": "-inf"}, 400, "expected seconds"),
        ({"like": FILM, "shot": 1, "after": "9", "before": "3"}, 400, "must be greater than"),
        ({"like": FILM, "shot": 1, "language": "en') OR 1=1 --"}, 400, "expected a tag such as en"),
        ({"like": FILM, "shot": 1, "count": "9999999"}, 200, "24 shots by fused"),
        ({"q": "boats"}, 400, "the index does not record the encoder of its text vectors"),
        ({"q": "x" * 2001}, 400, "at most 2000 characters"),
        ({"picture": "00"}, 400, "a picture cannot be searched with"),
    ],
)
def test_what_cannot_be_searched_is_said_on_the_page(client, fields, status, said):
    answer = client.get(link("/", **fields))
    assert answer.status_code == status
    assert said in answer.text


def test_the_titles_are_listed_in_pages_and_parts(client):
    answer = client.get("/titles")
    assert all(f'href="{html.escape(link("/title", id=title_id))}"' in answer.text.replace("&#39;", "&#x27;") for title_id in SHOTS)
    assert "2 titles, page 1 of 1" in client.get(link("/titles", part="Film ")).text.replace("1 titles", "2 titles")
    for page in ("0", "99", "x", "-1", "\u0663"):
        assert client.get(link("/titles", page=page)).status_code == 200


def test_a_title_has_its_player_timeline_texts_levels_and_warnings(client):
    answer = client.get(link("/title", id=FILM, shot=3))
    for part in (
        'id="video"',
        'id="strip"',
        'id="map"',
        "the audio ends early",
        "film says 3",
        '"levels":{"dbfs"',
        f'src="{link("/media", id=FILM)}"',
    ):
        assert part in answer.text, part
    assert 'data-mime="video/mp4; codecs=&#34;avc1.42E01E&#34;"' in answer.text
    assert "'unsafe-inline'" not in answer.headers["content-security-policy"]


def test_a_title_whose_video_is_gone_or_unplayable_is_shown_by_its_thumbnails(client):
    gone = client.get(link("/title", id=GONE)).text
    assert "moved.mp4 does not exist. Put it back, or embed the catalog" in gone
    assert "<video" not in gone
    assert (client.get(link("/media", id=GONE)).status_code, client.get(link("/media", id=GONE)).text) == (404, "moved.mp4 does not exist")
    old = client.get(link("/title", id=OLD)).text
    assert "Browsers do not play this container (mpeg)" in old
    assert "<video" not in old


def test_thumbnails_are_those_of_the_dataset(client):
    for title_id, count in SHOTS.items():
        answer = client.get(link("/thumbnail", id=title_id, shot=count - 1))
        assert (answer.content, answer.headers["content-type"]) == (thumbnail(title_id, count - 1), "image/jpeg")
    for title_id, shot in ((FILM, 12), (FILM, -1), (FILM, "0/../.."), ("../../etc/passwd", 0), ("", 0)):
        assert client.get(link("/thumbnail", id=title_id, shot=shot)).status_code in (400, 404)


class Inspected(HTMLParser):
    """A parser that objects to every element and attribute that the templates do not write."""

    def __init__(self, address):
        super().__init__()
        self.address = address

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        assert tag not in ("style", "iframe", "base", "object"), self.address
        assert tag != "svg" or found == {**found, "class": "histogram", "role": "img"}, self.address
        assert not [name for name in found if name.startswith("on") or name == "style"], self.address
        if tag == "script":
            assert found.get("src", "").startswith("/static/") or found.get("type") == "application/json", self.address
        for name in ("src", "href", "action"):
            assert re.match(r"/(?!/)|#|data:,$", found.get(name, "/")), (self.address, found[name])


@pytest.mark.parametrize("text", HOSTILE[:9])
def test_no_text_becomes_markup(client, text):
    for address in (
        *(link("/", **{name: text}) for name in ("q", "title", "language", "after", "shot", "by", "picture")),
        *(link("/", like=text, shot=1), link("/", like=text, start=text, end=text), link("/", like=FILM, shot=1, title=text)),
        *(link("/compare", like=text, shot=1), link("/titles", part=text, page=text), link("/title", id=text, shot=text)),
    ):
        answer = client.get(address)
        assert answer.status_code in (200, 400, 404), address
        assert "49{%" not in answer.text
        Inspected(address).feed(answer.text)


@pytest.mark.parametrize("title_id", ODD_IDS)
def test_titles_of_any_name_are_found_shown_and_played(client, title_id):
    wanted, _ = expected(vectors_of(title_id, 3)[2], titles=SHOTS, without=[(title_id, 2)])
    answer = client.get(link("/", like=title_id, shot=2))
    assert places(answer)[:NEAREST] == wanted[:NEAREST]
    page = client.get(link("/title", id=title_id))
    assert page.status_code == 200
    for shown in (answer, page):
        Inspected(title_id).feed(shown.text)
    assert client.get(link("/media", id=title_id)).content == client.get(link("/media", id=FILM)).content


@pytest.mark.parametrize(
    "path",
    [
        *("/static/..%2f..%2fapp.py", "/static/../app.py", "/static/%2e%2e/catalog.py", "/static/explore.js%00"),
        *("/media", "/media/film", "/media?id=..%2F..%2Fvideos%2Ffilm", "/media?id=%2Fetc%2Fpasswd"),
        *("/title?id=%00", "/thumbnail?id=film&shot=%00"),
    ],
)
def test_only_what_the_dataset_and_the_package_name_is_served(client, path):
    answer = client.get(path)
    assert answer.status_code in (400, 404), answer.text
    assert "import" not in answer.text


def test_without_an_index_the_page_says_what_to_run_and_titles_play(root, tmp_path):
    for uri, said in (
        (tmp_path / "nowhere", "has no index of shots; there is nothing"),
        (root / "out", "there is: 0123456789ab"),
        ("", "no index was given"),
    ):
        client = client_of(config_of(root, f"index.uri={uri}"))
        answer = client.get("/")
        assert said in answer.text
        assert f"mediafm index output.uri={root}/out index.uri={uri or '/data/index'}" in answer.text
        assert client.get(link("/", like=FILM, shot=1)).status_code == 200
        assert client.get(link("/compare", like=FILM, shot=1)).status_code == 200
        assert 'id="video"' in client.get(link("/title", id=FILM)).text
        assert client.get("/titles").status_code == 200


def test_an_index_of_another_version_is_named_with_the_command_that_replaces_it(root, tmp_path):
    from benchmarks.stored_titles import commit_title, make_model

    commit_title(str(tmp_path / "other"), make_model("ba9876543210", 20, 12, 16), "film", vectors_of("film", 3))
    assert build(tmp_path / "other", tmp_path / "index") == 0
    answer = client_of(config_of(root, f"index.uri={tmp_path}/index")).get("/")
    assert "is of dataset version ba9876543210, the dataset shown here is 0123456789ab" in answer.text
    assert f"index.uri={tmp_path}/index index.replace=true" in answer.text


def test_a_dataset_without_thumbnails_shows_a_drawing_instead(tmp_path):
    commit(tmp_path / "out", FILM, 3)
    assert build(tmp_path / "out", tmp_path / "index") == 0
    client = client_of(config_of(tmp_path))
    answer = client.get(link("/thumbnail", id=FILM, shot=1))
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/svg+xml")
    assert client.get(link("/title", id=FILM)).status_code == 200  # its video, film.mp4, is not there


def test_a_title_that_was_embedded_again_since_the_start_is_read_from_its_new_object(tmp_path):
    from mediafm_ray.storage.dataset import EmbeddingDataset

    commit(tmp_path / "out", FILM, 3)
    rewrite(tmp_path / "out", FILM, {}, {"thumbnail": [b"old"] * 3})
    assert build(tmp_path / "out", tmp_path / "index") == 0
    client = client_of(config_of(tmp_path))
    first = EmbeddingDataset(str(tmp_path / "out")).title_object(FILM)
    commit(tmp_path / "out", FILM, 4, seed=1)
    rewrite(tmp_path / "out", FILM, {}, {"thumbnail": [b"new"] * 4})
    (tmp_path / "out" / "0123456789ab" / first).unlink()
    assert client.get(link("/thumbnail", id=FILM, shot=3)).content == b"new"


def test_links_hold_any_text():
    assert urllib.parse.parse_qs(link("/title", id="a&b=c #\u2603?", shot=0).partition("?")[2]) == {"id": ["a&b=c #\u2603?"], "shot": ["0"]}


def test_titles_in_merged_files_are_shown_as_before(root, client, tmp_path):
    shutil.copytree(root / "out", tmp_path / "out")
    shutil.copytree(root / "index", tmp_path / "index")
    given = [f"output.uri={tmp_path}/out", "compact.min_titles=1", "compact.keep_hours=0"]
    assert compact_dataset.main(read_config(CompactDatasetConfig, [], given)) == 0
    assert not list((tmp_path / "out").glob("*/shots/shard=*/*.parquet"))
    merged = client_of(config_of(tmp_path))
    for title_id, count in SHOTS.items():
        for path in (link("/title", id=title_id), *(link("/thumbnail", id=title_id, shot=shot) for shot in range(count))):
            before, after = client.get(path), merged.get(path)
            assert (after.status_code, after.content) == (200, before.content), path
