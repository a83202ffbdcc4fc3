"""Pages as files: their content, and that no text of a catalog becomes markup. tests/end_to_end/test_pages.py tests their behaviour."""

import base64
import hashlib
import io
import json
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from benchmarks.pages import commit_title
from mediafm_ray.derive.pages import title_content
from mediafm_ray.downstream.catalog_pages import CatalogContent, CatalogTitle, catalog_page
from mediafm_ray.downstream.pages import TitleContent, clock, fit_thumbnails, length_histogram, title_page, visible
from mediafm_ray.storage.dataset import EmbeddingDataset
from tests.hostile_text import HOSTILE


class Reader(HTMLParser):
    """The elements of a page with their attributes, and the text of each script and style."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.elements, self.raw, self.inside, self.text = [], {"script": [], "style": []}, None, []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in self.raw:
            self.inside = tag
            self.raw[tag].append("")

    def handle_endtag(self, tag):
        self.inside = None if tag == self.inside else self.inside

    def handle_data(self, data):
        if self.inside:
            self.raw[self.inside][-1] += data
        else:
            self.text.append(data)

    @property
    def data(self):
        return json.loads(self.raw["script"][0])

    @property
    def shape(self):
        return [(tag, sorted(attributes)) for tag, attributes in self.elements]


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    output = str(tmp_path_factory.mktemp("out"))
    commit_title(output, "a title", 30, warnings=("a warning",))
    return title_content(EmbeddingDataset(output), "a title")


def with_text(content, text):
    """The same title with one text in the place of everything that a catalog or a file can choose."""
    count = content.shots.num_rows
    shots = content.shots.set_column(content.shots.column_names.index("text"), "text", pa.array([text] * count))
    shots = shots.set_column(shots.column_names.index("language"), "language", pa.array([text] * count))
    media = {
        **content.facts["media"],
        "warnings": [text],
        "facts": dict.fromkeys(("container", "video_codec", "audio_codec", "audio_layout"), text),
    }
    return TitleContent(shots, {**content.facts, "title_id": text, "video": text, "media": media}, content.vectors, content.scenes, (text,))


def catalog_with(text):
    failure = {"stage": text, "type": text, "message": text, "attempts": 2}
    run = {"aborted": text, "versions": {text: text}, "seconds_by_stage": {text: 1.0}, "wall_s": 1.0, "dataset_version": "other"}
    titles = [CatalogTitle(text, 60.0, 10, (text, text), page="titles/x.html"), CatalogTitle(text + "2", failure=failure)]
    return CatalogContent(text, "0123456789ab", titles, run)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_no_text_changes_the_elements_of_a_page(content, text):
    harmless, hostile = (Reader(title_page(with_text(content, one))) for one in ("harmless", text))
    assert hostile.shape == harmless.shape
    assert hostile.data["shots"]["text"] == [text] * 30  # captions arrive as they are
    assert visible(text) in "".join(hostile.text)
    harmless, hostile = (Reader(catalog_page(catalog_with(one))) for one in ("harmless", text))
    assert hostile.shape == harmless.shape
    assert len(hostile.raw["script"]) == 2


@pytest.mark.parametrize("page", ["title", "catalog"])
def test_the_policy_allows_this_script_and_style_and_nothing_else(content, page):
    reader = Reader(title_page(content) if page == "title" else catalog_page(catalog_with("x")))
    policy = next(attributes["content"] for tag, attributes in reader.elements if attributes.get("http-equiv") == "Content-Security-Policy")
    directives = dict(part.split(" ", 1) for part in policy.split("; "))
    digest = {name: base64.b64encode(hashlib.sha256(reader.raw[name][-1].encode()).digest()).decode() for name in ("script", "style")}
    assert directives["default-src"] == "'none'"
    assert directives["script-src"] == f"'sha256-{digest['script']}'"
    assert directives["style-src"] == f"'sha256-{digest['style']}'"
    assert "unsafe" not in policy
    for tag, attributes in reader.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
        for name in ("src", "href"):
            assert not str(attributes.get(name, "")).startswith(("http", "//")), (tag, attributes)


def test_a_page_holds_what_was_stored(content):
    reader = Reader(title_page(content))
    shots, data = content.shots, reader.data["shots"]
    assert data["start"] == pytest.approx(shots["start_s"].to_pylist(), abs=1e-3)
    assert [base64.b64decode(picture) for picture in data["picture"]] == shots["thumbnail"].to_pylist()
    levels = np.frombuffer(base64.b64decode(data["levels"]["dbfs"]), np.int8).tolist()
    assert levels == [level for levels in shots["audio_levels"].to_pylist() for level in levels]
    assert [bool(seen & 4) for seen in data["seen"]] == shots["has_text"].to_pylist()
    np.testing.assert_allclose(np.sum(data["shares"], axis=1), 100, atol=0.2)
    assert reader.data["scenes"] == [0, 12, 24]
    assert list(reader.data["spaces"]) == ["fused", "contextual", "video", "audio", "text"]
    nearest = np.frombuffer(base64.b64decode(reader.data["spaces"]["fused"]["nearest"]), "<i4").reshape(30, -1)
    fused = content.vectors["fused"]
    cosines = fused @ fused.T - 2 * np.eye(30)
    np.testing.assert_array_equal(nearest[:, 0], cosines.argmax(axis=1))
    assert "a warning" in "".join(reader.text)


def test_scenes_of_other_shots_and_titles_without_shots_are_refused(content):
    scenes = content.scenes.slice(0, 2)
    with pytest.raises(ValueError, match="do not tile the 30 shots"):
        title_page(TitleContent(content.shots, content.facts, content.vectors, scenes))
    with pytest.raises(ValueError, match="has no shots"):
        title_page(TitleContent(content.shots.slice(0, 0), content.facts, {}))
    with pytest.raises(ValueError, match="29 vectors for 30 shots"):
        title_page(TitleContent(content.shots, content.facts, {"fused": content.vectors["fused"][1:]}))


def test_a_title_may_lack_pictures_levels_scenes_and_vectors(content):
    shots = content.shots.drop_columns("audio_levels").set_column(
        content.shots.column_names.index("thumbnail"), "thumbnail", pa.array([b""] * 30)
    )
    reader = Reader(title_page(TitleContent(shots, content.facts, {})))
    assert reader.data["shots"]["levels"] is None
    assert reader.data["spaces"] == {}
    assert "No levels of sound are stored" in "".join(reader.text)


def test_histogram_counts_every_shot_in_the_bin_that_it_lies_in():
    lengths = np.array([0.04, 0.5, 0.51, 0.99, 1.0, 1.3, 8.0, 100.0])
    bins = length_histogram(lengths)
    for one in bins:
        assert one["count"] == np.sum((lengths >= one["low"]) & (lengths < one["high"])), one
    assert [one["high"] for one in bins[:-1]] == pytest.approx([one["low"] for one in bins[1:]])
    assert sum(one["count"] for one in bins) == len(lengths)


def jpeg(width, height, seed=0):
    sink = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(sink, "JPEG", quality=90)
    return sink.getvalue()


def test_pictures_beyond_the_limit_are_made_smaller_in_proportion():
    pictures = [jpeg(160, 90, seed) for seed in range(8)] + [b"", jpeg(90, 160)]
    total = sum(map(len, pictures))
    assert fit_thumbnails(pictures, total) == pictures
    smaller = fit_thumbnails(pictures, total // 4)
    assert sum(map(len, smaller)) <= total // 4
    assert smaller[8] == b""
    for before, after in zip(pictures[:8], smaller[:8], strict=True):
        width, height = Image.open(io.BytesIO(after)).size
        assert width == 80
        assert abs(width / height - 160 / 90) < 0.05
        assert len(after) < len(before)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0:00.0"), (9.96, "0:10.0"), (59.96, "1:00.0"), (599.94, "9:59.9"), (600, "10:00"), (3599.97, "1:00:00"), (7325, "2:02:05")],
)
def test_clock(seconds, shown):
    assert clock(seconds) == shown


def test_nothing_hides_in_a_name():
    assert visible("plain Ünïcødé 影片") == "plain Ünïcødé 影片"
    assert visible("photo\u202egpj.exe") == "photo\u27e8U+202E\u27e9gpj.exe"
    assert visible("a\u200bb\nc\x00d\ufeff") == "a\u27e8U+200B\u27e9b\u27e8U+000A\u27e9c\u27e8U+0000\u27e9d\u27e8U+FEFF\u27e9"


def test_a_catalog_counts_each_title_once_and_keeps_what_it_has():
    failure = {"stage": "detect_shots", "type": "TitleError", "message": "empty file", "attempts": 1}
    titles = [
        CatalogTitle("b", 60.0, 30),
        CatalogTitle("a", 120.0, 60, warnings=("odd",), failure=failure),
        CatalogTitle("c", failure={**failure, "attempts": 4}),
    ]
    reader = Reader(catalog_page(CatalogContent("out", "0123456789ab", titles)))
    assert reader.data["id"] == ["a", "b", "c"]
    assert reader.data["status"] == ["outdated", "ok", "failed"]
    assert reader.data["failure"][2] == "detect_shots: empty file (tried 4 times)"
    text = " ".join(" ".join(reader.text).split())
    assert "Titles 3 Failed 1 With warnings 1 Hours of video 0.05 Shots 90 Shots a minute 30.0" in text
    assert "There is no run-summary.json" in text


def test_a_large_catalog_lists_what_needs_a_look_and_counts_all(monkeypatch):
    monkeypatch.setattr("mediafm_ray.downstream.catalog_pages.MAX_LISTED", 3)
    failed = CatalogTitle("d", failure={"stage": "detect_shots", "type": "TitleError", "message": "empty file"})
    titles = [CatalogTitle("a", 60.0, 30), CatalogTitle("b", 60.0, 30), CatalogTitle("c", 60.0, 30, warnings=("odd",)), failed]
    reader = Reader(catalog_page(CatalogContent("out", "0123456789ab", titles)))
    assert reader.data["id"] == ["a", "c", "d"]
    text = " ".join(" ".join(reader.text).split())
    assert "Titles 4 Failed 1 With warnings 1" in text
    assert "3 of 4 titles are listed here" in text
