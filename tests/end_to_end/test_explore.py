"""The application as a person uses it: the job's own process, and Chromium that searches, filters, plays, compares and saves."""

import csv
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest

from tests.end_to_end.clips import ROOT
from tests.end_to_end.test_pages import browser  # noqa: F401
from tests.explore.made import FILM, OLD, SHOTS, make_indexes, make_output, media_facts, rewrite
from tests.hostile_text import HOSTILE
from tests.searchable import SHOT_S, commit

WEBM = "film in vp9"
START_S = 120


def make_vp9(path: Path, seconds: float) -> Path:
    """A film in WebM, as browsers without H.264 play it."""
    random = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libvpx-vp9", rate=25, options={"deadline": "realtime", "cpu-used": "8"})
        video.width, video.height, video.pix_fmt = 160, 96, "yuv420p"
        for frame in range(round(seconds * 25)):
            if frame % 50 == 0:
                picture = np.kron(random.integers(0, 256, (6, 10, 3)), np.ones((16, 16, 1))).astype(np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a server that the job started."""
    root = tmp_path_factory.mktemp("browser")
    make_output(root)
    video = make_vp9(root / "videos" / "film.webm", 3 * SHOT_S)
    commit(root / "out", WEBM, 3)
    facts = {"container": "matroska,webm", "video_codec": "vp9", "average_rate": "25", "bytes": video.stat().st_size}
    rewrite(root / "out", WEBM, {"video": str(video), "media": media_facts(3, facts)}, {})
    make_indexes(root)
    command = [sys.executable, "-m", "jobs.explore_catalog", f"output.uri={root}/out", f"index.uri={root}/index", "explore.port=0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = []
    deadline = time.monotonic() + START_S
    for line in process.stdout:
        said.append(line)
        if found := re.search(r"open (http://\S+) ", line):
            break
        assert time.monotonic() < deadline, said
    assert found, said
    yield found[1]
    process.send_signal(signal.SIGTERM)
    assert (process.communicate(timeout=30)[0], process.returncode) == ("", 0)


@pytest.fixture
def page(server, browser):  # noqa: F811
    """A page of a browser that no request leaves but to the server, and that has nothing to complain about."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page, requests, complaints = context.new_page(), [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
    page.goto(server)
    yield page
    assert complaints == []
    assert [url for url in requests if not url.startswith((server, "data:", "blob:"))] == []
    assert page.evaluate("window.taken") is None
    context.close()


def until(page, expression, argument=None):
    """Wait until an expression is true. Playwright's own way needs eval, which the page's policy forbids."""
    deadline = time.monotonic() + 30
    while not page.evaluate(expression, argument):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(20)


def search_by_clip(page, title_id=FILM, start="6", end="8"):
    page.click("summary:has-text('Search by a clip')")
    form = page.locator("form:has(input[name=start])")
    form.locator("[name=like]").fill(title_id)
    form.locator("[name=start]").fill(start)
    form.locator("[name=end]").fill(end)
    form.locator("button").click()


def playing(page):
    """Wait until the video has played on."""
    until(page, "document.getElementById('video').readyState >= 2")
    before = page.evaluate("document.getElementById('video').currentTime")
    page.evaluate("(() => { const video = document.getElementById('video'); video.muted = true; return video.play(); })()")
    until(page, "(before) => document.getElementById('video').currentTime > before + 0.2", before)


def test_search_filter_play_compare_and_save(page, tmp_path):
    search_by_clip(page)
    assert page.locator(".result").count() == 24
    page.goto(f"{page.url}&title=film+two")
    assert page.locator(".result").count() == SHOTS["film two"]
    page.locator(".result input[type=checkbox]").nth(1).check()
    page.go_back()
    page.locator(".result .more a:has-text('video')").first.click()
    page.wait_for_selector(".asked")
    assert "by=video" in page.url
    page.click("summary:has-text('Filters')")
    page.fill("[name=title]", FILM)
    page.click("button.go")
    assert set(page.locator(".result .name bdi").all_text_contents()) == {FILM}
    page.locator(".result .more a:has-text('side by side')").first.click()
    assert page.locator(".columns h2").all_text_contents() == ["fused", "contextual", "video", "audio", "text"]
    page.locator(".asked a").first.click()
    page.wait_for_selector("#video")
    start = json.loads(page.text_content("#data"))["shots"]["start"]
    shot = int(re.search(r"shot=(\d+)", page.url)[1])
    until(page, "(at) => Math.abs(document.getElementById('video').currentTime - at) < 0.5", start[shot])
    playing(page)
    page.evaluate("document.getElementById('video').pause()")  # The next shot would be another one to pick.
    page.check("#pick")
    assert page.text_content("#selection-count") == "2 shots selected"
    with page.expect_download() as download:
        page.click("#selection button[value=csv]")
    rows = list(csv.DictReader(Path(download.value.path()).read_text().splitlines()))
    assert [row["title_id"] for row in rows] == ["film two", FILM]
    for kind, beginning in (("edl", "TITLE: mediafm selection"), ("json", '{\n  "dataset_version"')):
        with page.expect_download() as download:
            page.click(f"#selection button[value={kind}]")
        assert Path(download.value.path()).read_text().startswith(beginning)
        assert download.value.suggested_filename == f"selection.{kind}"
    page.click("#selection-clear")
    assert page.is_hidden("#selection")


def test_the_timeline_follows_the_playback_and_leads_it(page, server):
    page.goto(f"{server}title?id={FILM}&shot=2")
    until(page, "document.getElementById('video').readyState >= 2")
    box = page.locator("#strip").bounding_box()
    page.locator("#strip").click(position={"x": box["width"] * 0.55, "y": 60})  # of 24 s
    until(page, "Math.abs(document.getElementById('video').currentTime - 13.2) < 0.3")
    assert page.get_attribute("#strip", "aria-valuenow") == "6"
    page.evaluate("document.getElementById('video').currentTime = 17.7")
    until(page, "document.getElementById('strip').getAttribute('aria-valuenow') === '8'")
    playing(page)
    until(page, "document.getElementById('strip').getAttribute('aria-valuenow') === '9'")
    assert page.text_content("#now-shot").startswith("Shot 9, 0:18.0 to 0:20.0")
    page.evaluate("document.getElementById('video').pause()")
    page.focus("#strip")
    page.keyboard.press("ArrowLeft")
    until(page, "Math.abs(document.getElementById('video').currentTime - 16) < 0.3")
    page.check("#only-shot")
    page.evaluate("(() => { const video = document.getElementById('video'); video.currentTime = 17.5; return video.play(); })()")
    until(page, "document.getElementById('video').currentTime < 17")  # it begins again
    assert page.get_attribute("#strip", "aria-valuenow") == "8"


def test_vp9_plays_and_mpeg_2_is_said(page, server):
    page.goto(f"{server}title?id={WEBM}&shot=1")
    playing(page)
    page.goto(f"{server}title?id={OLD}&shot=2")
    assert "Browsers do not play this container" in page.text_content("#unplayable")
    assert page.evaluate("document.getElementById('still-picture').naturalWidth") == 160
    page.click("#next-shot")
    assert page.get_attribute("#still-picture", "alt") == "Middle frame of shot 3"


def test_everything_can_be_used_with_the_keyboard_alone(page, server):
    page.keyboard.press("Tab")
    reached = []
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.name || document.activeElement.textContent.trim()"))
        if reached[-1].startswith("Search by a clip"):
            break
    assert {"Titles", "Skip to the results", "by", "Search", "Filters"} <= set(reached)
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.type(FILM)
    for text in ("0", "2"):
        page.keyboard.press("Tab")
        page.keyboard.type(text)
    page.keyboard.press("Enter")
    page.wait_for_selector(".result")
    box = page.locator(".result input").first
    box.focus()
    page.keyboard.press("Space")
    assert page.text_content("#selection-count") == "1 shot selected"
    page.locator(".result a.frame").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#video")


@pytest.mark.parametrize("width", [375, 1280])
def test_nothing_is_cut_off_at_the_side_and_hostile_titles_are_text(page, server, width):
    page.set_viewport_size({"width": width, "height": 800})
    for path in ("", f"?like={FILM}&shot=0&count=96", f"compare?like={FILM}&shot=0", "titles"):
        page.goto(server + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        assert (
            page.locator("img:not([alt]), input:not([type=hidden]):not([aria-label])").evaluate_all(
                "found => found.filter(one => one.tagName === 'IMG' || !one.closest('label')).length"
            )
            == 0
        )
    page.locator(f".name a:has-text({json.dumps(HOSTILE[1])})").click()
    until(page, "performance.getEntriesByName('ready').length > 0")
    assert page.text_content("h1") == HOSTILE[1]
    assert page.text_content("#now-text") == HOSTILE[1]
