"""The pages in a real browser, as people use them: with a mouse, with the keyboard only, on a phone, in the dark, and over hostile text."""

import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks.pages import BROWSERS, browser_path, commit_title, make_catalog
from jobs import report_title
from mediafm_ray.config.jobs import ReportTitleConfig
from mediafm_ray.downstream.catalog_pages import catalog_page
from mediafm_ray.runs.command import EXIT_BAD_INPUT, run_job
from mediafm_ray.storage.dataset import EmbeddingDataset
from mediafm_ray.storage.names import FAILURES, encode_title
from tests.end_to_end.clips import ROOT
from tests.hostile_text import HOSTILE

PLAIN = "series/a title"
SHOTS = 40
SINGLE = "one shot"
NAMES = HOSTILE[:4]  # of titles; the others are reasons of failures


@pytest.fixture(scope="module")
def browser():
    """Chromium. Where it is not installed these tests are left out, unless REQUIRE_CHROMIUM is set, as .ci/run does."""
    if not any(map(shutil.which, BROWSERS)) and not os.environ.get("REQUIRE_CHROMIUM"):
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path())
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The folder of pages of a catalog with plain and hostile titles and failures, written by the job as a user runs it."""
    output = tmp_path_factory.mktemp("pages") / "out"
    commit_title(str(output), PLAIN, SHOTS, warnings=("the audio ends early",))
    commit_title(str(output), SINGLE, 1)
    for seed, text in enumerate(NAMES):
        commit_title(str(output), text, 3, seed, text, (text,))
    storage = EmbeddingDataset(str(output)).output
    for text in [*HOSTILE[len(NAMES) :], "broken"]:
        record = {"title_id": text, "source": "00", "stage": "detect_shots", "type": "TitleError", "message": text, "attempts": 1}
        storage.write(FAILURES, text, "00", json.dumps(record).encode())
    done = subprocess.run(
        [sys.executable, "-m", "jobs.report_catalog", f"output.uri={output}", "report.title_pages=true"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = output / storage.dataset_version / "pages"
    assert done.stdout.splitlines()[-1] == str(folder / "index.html")
    return folder


@pytest.fixture
def visit(browser):
    """Open a page in a fresh context. Afterwards: no request has left the files, no error was logged, no script was smuggled in."""
    contexts, requests, complaints, opened = [], [], [], []

    def visit(path, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        page.goto(path.as_uri())
        page.wait_for_function("performance.getEntriesByName('ready').length > 0")
        opened.append(page)
        return page

    yield visit
    assert complaints == []
    assert {url.split(":")[0] for url in requests} <= {"file", "data", "blob"}
    for page in opened:
        assert page.evaluate("window.taken") is None
    for context in contexts:
        context.close()


def title_path(pages, title_id):
    return pages / "titles" / f"{encode_title(title_id)}.html"


def colours(picture):
    """How many different colours a screenshot has: a blank canvas has one."""
    return len(np.unique(np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).reshape(-1, 3), axis=0))


def focused(page):
    return page.evaluate("document.activeElement.id || document.activeElement.dataset.shot || document.activeElement.textContent.trim()")


def test_a_click_on_the_timeline_shows_the_shot_and_its_nearest(pages, visit):
    page = visit(title_path(pages, PLAIN))
    assert page.text_content("h1") == PLAIN
    assert "the audio ends early" in page.text_content(".notice")
    page.wait_for_timeout(300)  # the strip's pictures are decoded
    assert colours(page.locator("#tracks").screenshot()) > 500
    box = page.locator("#strip").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + 70)
    middle = int(page.get_attribute("#strip", "aria-valuenow"))
    data = json.loads(page.text_content("#data"))["shots"]
    assert data["start"][middle] <= data["end"][-1] / 2 < data["end"][middle] + 0.2
    assert page.text_content("#shot-name") == f"Shot {middle}"
    assert page.locator("#nearest .card").count() == 8
    nearest = page.locator("#nearest .card").first
    wanted = int(nearest.get_attribute("data-shot"))
    nearest.click()
    assert page.text_content("#shot-name") == f"Shot {wanted}"


def test_the_embedding_to_compare_by_is_one_choice_for_the_page(pages, visit):
    page = visit(title_path(pages, PLAIN))
    before = page.locator("#map").screenshot()
    assert colours(before) > 50
    page.check("[data-choice=nearest-by] input[value=audio]", force=True)
    assert page.is_checked("[data-choice=map-by] input[value=audio]")
    assert "audio embedding" in page.text_content("#nearest-heading")
    assert page.locator("#map").screenshot() != before
    page.hover("#map", position={"x": 3, "y": 3})
    assert page.text_content("#pair").startswith("Shot 0 and shot 0: cosine")
    box = page.locator("#map").bounding_box()
    page.click("#map", position={"x": 5, "y": box["height"] - 3})
    assert page.text_content("#shot-name") == f"Shot {SHOTS - 1}"


def test_everything_can_be_reached_and_used_with_the_keyboard_alone(pages, visit):
    page = visit(title_path(pages, PLAIN))
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(focused(page))
        if reached[-1] == "strip":
            break
    assert reached[0] == "Skip to the timeline"
    assert reached[-1] == "strip"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"  # focus can be seen
    for key, shot in [
        ("ArrowRight", 2),
        ("PageDown", 13),
        ("End", SHOTS),
        ("ArrowRight", SHOTS),
        ("Home", 1),
        ("ArrowLeft", 1),
        ("ArrowRight", 2),
    ]:
        page.keyboard.press(key)
        assert page.get_attribute("#strip", "aria-valuenow") == str(shot - 1), key
    assert page.get_attribute("#strip", "aria-valuetext").startswith(f"Shot 1, the last is {SHOTS - 1}, ")
    width = page.evaluate("document.getElementById('strip').scrollWidth")
    page.keyboard.press("+")
    page.keyboard.press("+")
    assert page.evaluate("document.getElementById('strip').scrollWidth") > 2 * width
    page.keyboard.press("0")
    assert page.evaluate("document.getElementById('strip').scrollWidth") == width
    for _ in range(40):
        page.keyboard.press("Tab")
        if focused(page) == "map":
            break
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert page.text_content("#pair").startswith("Shot 2 and shot 1: cosine")
    page.keyboard.press("Enter")
    assert page.text_content("#shot-name") == "Shot 2"
    for _ in range(10):
        page.keyboard.press("Tab")
        if focused(page) == "2":  # the card of the selected shot is the one that Tab reaches
            break
    page.keyboard.press("ArrowRight")
    assert focused(page) == "3"
    page.keyboard.press("Enter")
    assert page.text_content("#shot-name") == "Shot 3"


def test_all_shots_can_be_searched(pages, visit):
    page = visit(title_path(pages, PLAIN))
    assert page.locator("#sheet .card").count() == SHOTS
    texts = json.loads(page.text_content("#data"))["shots"]["text"]
    page.fill("#find", "boat")
    assert page.locator("#sheet .card").count() == sum("boat" in text for text in texts) > 0
    page.fill("#find", "no such words")
    assert page.locator("#sheet .card").count() == 0
    page.fill("#find", "")
    page.select_option("#kind", "text")
    assert page.locator("#sheet .card").count() == sum(map(bool, texts))


def test_a_title_of_one_shot_has_nothing_to_compare(pages, visit):
    page = visit(title_path(pages, SINGLE))
    assert "nothing to compare" in page.text_content("#similarity")
    page.focus("#strip")
    page.keyboard.press("ArrowRight")
    assert page.text_content("#shot-name") == "Shot 0"
    page.check("[data-choice=nearest-by] input[value=video]", force=True)


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_cut_off_at_the_side(pages, visit, width):
    for path in (title_path(pages, PLAIN), title_path(pages, HOSTILE[0]), pages / "index.html"):
        page = visit(path, viewport={"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        if page.locator("#strip").count():  # the whole title is in view, and stays so
            page.set_viewport_size({"width": width - 70, "height": 844})
            page.wait_for_function(
                "() => { const strip = document.getElementById('strip'); return strip.scrollWidth <= strip.clientWidth; }"
            )


def contrast(one, other):
    """The contrast ratio of two colours (WCAG 2.2)."""
    light = []
    for colour in (one, other):
        channels = np.array([int(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]) / 255
        light.append(np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])
    return (max(light) + 0.05) / (min(light) + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_colour_schemes(pages, visit, scheme):
    grounds = []
    for path in (title_path(pages, PLAIN), pages / "index.html"):
        page = visit(path, color_scheme=scheme)
        ground = page.evaluate("getComputedStyle(document.querySelector('section:not(.notice)')).backgroundColor")
        grounds.append(contrast(ground, "rgb(0,0,0)"))
        for selector in ("h2", ".quiet", "a", ".badge.failed", ".badge.ok"):
            if page.locator(selector).count():
                colour = page.evaluate("(selector) => getComputedStyle(document.querySelector(selector)).color", selector)
                assert contrast(colour, ground) >= 4.5, (path, selector, colour, ground)
    assert all(ground > 15 for ground in grounds) if scheme == "light" else all(ground < 2 for ground in grounds)


def test_hostile_titles_are_shown_as_they_are_written(pages, visit):
    for text in NAMES:
        page = visit(title_path(pages, text))
        assert page.text_content("h1") == text
        assert page.locator("#sheet .words").first.text_content() == text[:300]
        assert text in page.text_content(".notice")
        assert page.is_visible("h1")
        page.click("#sheet .card >> nth=1")
        page.keyboard.press("Enter")


def test_the_catalog_is_sorted_filtered_and_leads_to_the_titles(pages, visit):
    page = visit(pages / "index.html")
    count, failed = len(HOSTILE) + 3, len(HOSTILE) - len(NAMES) + 1
    assert page.locator("#rows tr").count() == count
    assert page.locator(".badge.failed").count() == failed
    page.select_option("#status", "failed")
    assert page.locator("#rows tr").count() == failed
    page.select_option("#status", "")
    page.fill("#find", PLAIN)
    assert page.locator("#rows tr").count() == 1
    page.fill("#find", "")
    page.focus("[data-sort=shots]")
    page.keyboard.press("Enter")
    shots = [int(text or 0) for text in page.locator("#rows td:nth-child(4)").all_text_contents()]
    assert shots == sorted(shots, reverse=True)
    assert page.get_attribute("th:has([data-sort=shots])", "aria-sort") == "descending"
    page.click(f"#rows a:has-text('{PLAIN}')")
    page.wait_for_url("**/titles/*.html")
    page.wait_for_function("performance.getEntriesByName('ready').length > 0")
    assert page.text_content("h1") == PLAIN
    page.click("text=All titles")
    page.wait_for_url("**/index.html")
    assert page.locator("#titles").count() == 1


def test_a_catalog_of_20_000_titles_stays_usable(tmp_path, visit):
    path = tmp_path / "index.html"
    path.write_text(catalog_page(make_catalog(20_000)), encoding="utf-8")
    page = visit(path)
    assert page.locator("#rows tr").count() == 50
    assert page.is_disabled("#previous")
    page.click("#next")
    assert page.text_content("#found") == "51 to 100 of 20,000"
    page.click("#last")
    assert page.text_content("#found") == "19,951 to 20,000 of 20,000"
    assert page.is_disabled("#next")
    page.select_option("#status", "failed")
    assert page.text_content("#found") == "1 to 50 of 2,000 (20,000 listed)"
    page.fill("#find", "episode 13.mp4")  # in the reason of one
    assert page.text_content("#found") == "1 to 1 of 1 (20,000 listed)"
    page.fill("#find", "nowhere")
    assert page.text_content("#found") == "no title fits"


def test_one_title_can_be_written_where_the_user_says(pages, tmp_path, visit):
    output = pages.parents[1]
    command = [sys.executable, "-m", "jobs.report_title", f"output.uri={output}"]
    own = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    done = subprocess.run([*command, f"title_id={PLAIN}", "report.path=mine.html"], **own, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert visit(tmp_path / "mine.html").text_content("h1") == PLAIN


@pytest.mark.parametrize(
    ("title_id", "said"), [("broken", "it failed in detect_shots: broken"), ("unheard of", "; there are "), ("", "title_id")]
)
def test_a_title_that_is_not_there_is_named_with_what_is(pages, capsys, title_id, said):
    assert run_job("", ReportTitleConfig, report_title.main, [f"output.uri={pages.parents[1]}", f"title_id={title_id}"]) == EXIT_BAD_INPUT
    assert said in capsys.readouterr().err
