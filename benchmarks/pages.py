"""Benchmark of the pages: time to write and to open them, and their size.

    python -m benchmarks.pages [--shots 1000] [--titles 20000] [--screenshots FOLDER]
    python -m benchmarks.pages --pictures demo/embeddings/VERSION/pages     the pictures of docs/images/, and nothing else

A title of the MediaFM profile's dimensions with pictures, captions, levels of sound, scenes and contextual embeddings is committed to a
temporary output; jobs.report_title is run as a command; the page is opened in Chromium, where it is ready once the timeline answers keys
and the list of all shots is there. The catalog's page is made of that many lines, a tenth of them failures.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from mediafm_ray.downstream.catalog_pages import CatalogContent, CatalogTitle, catalog_page
from mediafm_ray.models.fusion import spans
from mediafm_ray.spec import MODALITIES
from mediafm_ray.storage.dataset import Model, Output
from mediafm_ray.storage.names import SCENES, SHOTS, contextual, derived
from mediafm_ray.storage.schemas import contextual_schema, embedding_array, encode_parquet, scenes_schema, shots_schema

DIMS = {"video": 768, "audio": 768, "text": 768}  # of conf/mediafm.yaml
MODEL = Model("0123456789ab", {}, {**DIMS, "fused": sum(DIMS.values())}, spans(DIMS))
SOURCE = "00112233445566aa"
SHOTS_PER_SCENE = 12
WORDS = ("the", "river", "keeps", "its", "own", "time", "we", "have", "only", "one", "boat", "tonight", "hold", "rope", "look", "back")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
VIEWPORT = {"width": 1280, "height": 900}
IMAGES = Path(__file__).parents[1] / "docs" / "images"
PICTURES_MS = 500  # in which the page's pictures are decoded
MARGIN = 18  # pixels below the last part shown


def commit_title(output_uri: str, title_id: str, count: int, seed: int = 0, text: str = "", warnings: tuple[str, ...] = ()) -> None:
    """Commit a title with everything that a page can show. ``text`` is the text of every shot; empty = generated for two of three shots."""
    random = np.random.default_rng(seed)
    scene_S = np.arange(count) // SHOTS_PER_SCENE
    lengths_S = np.round(random.lognormal(0.9, 0.7, count), 3)
    end_S = np.cumsum(lengths_S)
    start_S = np.concatenate([[0.0], end_S[:-1]])
    has = {"video": np.ones(count, bool), "audio": random.random(count) > 0.05, "text": (random.random(count) > 0.33) | bool(text)}
    parts = [
        _clustered(random, scene_S, DIMS[name]) * has[name][:, None] * scale for name, scale in zip(MODALITIES, (1, 0.6, 0.8), strict=True)
    ]
    raw_SD = np.concatenate(parts, axis=1).astype(np.float32)
    norm_S = np.linalg.norm(raw_SD, axis=1)
    columns = {
        "title_id": [title_id] * count,
        "shot_index": np.arange(count),
        "start_s": start_S,
        "end_s": end_S,
        "start_frame": np.rint(start_S * 25).astype(int),
        "end_frame": np.rint(end_S * 25).astype(int),
        "boundary_kind": ["start", *random.choice(["cut", "cut", "cut", "gradual"], count - 1)],
        "boundary_probability": random.uniform(0.5, 1, count),
        "transition_start_frame": np.rint(start_S * 25).astype(int),
        "transition_end_frame": np.rint(start_S * 25).astype(int),
        "dropped_boundaries": random.integers(0, 8, count) // 7,
        "text": [text or " ".join(random.choice(WORDS, random.integers(3, 14))) if flag else "" for flag in has["text"]],
        "language": ["en"] * count,
        **{f"has_{name}": flags for name, flags in has.items()},
        "thumbnail": [_picture(random, scene) for scene in scene_S.tolist()],
        "audio_levels": [np.clip(random.normal(-24, 9, round(length * 10)), -96, 0).astype(np.int8) for length in lengths_S],
        "fused_embedding": embedding_array(raw_SD / norm_S[:, None]),
        "fused_norm": norm_S,
    }
    media = {
        "duration_s": float(end_S[-1]),
        "frame_count": int(columns["end_frame"][-1]),
        "warnings": list(warnings),
        "facts": {"container": "mov,mp4", "video_codec": "h264", "width": 1920, "height": 1080, "audio_codec": "aac", "audio_rate": 48000},
    }
    facts = {
        "title_id": title_id,
        "source": SOURCE,
        "video": f"{title_id}.mp4",
        "dims": dict(MODEL.dims),
        "dataset_version": "0123456789ab",
        "media": media,
    }
    output = Output(output_uri, MODEL.dataset_version)
    output.write_model(MODEL)
    in_context = {**columns, "contextual_embedding": embedding_array(raw_SD + np.roll(raw_SD, 1, axis=0))}
    firsts = list(range(0, count, SHOTS_PER_SCENE))
    lasts = [*(first - 1 for first in firsts[1:]), count - 1]
    scenes = {
        "title_id": [title_id] * len(firsts),
        "scene_index": range(len(firsts)),
        "first_shot": firsts,
        "last_shot": lasts,
        "start_s": start_S[firsts],
        "end_s": end_S[lasts],
        "score": [0.5] * len(firsts),
    }
    files = {
        contextual("0123456789ab"): (in_context, contextual_schema(MODEL.dims["fused"])),
        derived(SCENES, SHOTS, {}): (scenes, scenes_schema()),
        SHOTS: (columns, shots_schema(MODEL.dims["fused"])),
    }
    for name, (values, schema) in files.items():
        arrays = [values[field.name] for field in schema]
        table = pa.Table.from_arrays(
            [
                array if isinstance(array, pa.Array) else pa.array(list(array), field.type)
                for array, field in zip(arrays, schema, strict=True)
            ],
            schema=schema,
        )
        output.write(name, title_id, SOURCE, encode_parquet(table, facts))


def make_catalog(count: int, seed: int = 0) -> CatalogContent:
    """Make a catalog of a number of titles, a tenth of them failed, some with warnings."""
    random = np.random.default_rng(seed)
    titles = []
    for index in range(count):
        title_id = f"series {index // 40:03d}/episode {index % 40:02d}"
        if index % 10 == 3:
            failure = {"stage": "detect_shots", "type": "TitleError", "message": f"episode {index}.mp4: moov atom not found", "attempts": 3}
            titles.append(CatalogTitle(title_id, failure=failure))
        else:
            warnings = ("audio ends 2.1 s before the picture",) if index % 17 == 0 else ()
            titles.append(CatalogTitle(title_id, float(random.uniform(1200, 7000)), int(random.integers(200, 2500)), warnings))
    return CatalogContent("s3://bucket/embeddings", "0123456789ab", titles)


def browser_path() -> str:
    """Return the path of Chromium. Raises SystemExit if it is not installed."""
    found = [path for name in BROWSERS if (path := shutil.which(name))]
    if not found:
        raise SystemExit("no Chromium is installed: apt-get install chromium")
    return found[0]


def open_page(page: Page, path: Path) -> float:
    """Open a page and return the seconds until it reports that it is ready."""
    page.goto(path.as_uri())
    page.wait_for_function("performance.getEntriesByName('ready').length > 0")
    return page.evaluate("performance.getEntriesByName('ready')[0].startTime") / 1000


def main() -> None:
    """Write and open the pages, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shots", type=int, default=1000)
    parser.add_argument("--titles", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--screenshots", type=Path)
    parser.add_argument("--pictures", type=Path)
    options = parser.parse_args()
    if options.pictures:
        take_pictures(options.pictures.resolve())
        return
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        output, title, catalog = Path(folder, "out"), Path(folder, "title.html"), Path(folder, "catalog.html")
        commit_title(str(output), "benchmark", options.shots)
        command = [sys.executable, "-m", "jobs.report_title", f"output.uri={output}", "title_id=benchmark", f"report.path={title}"]
        before = os.times()
        seconds = [_timed(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)) for _ in range(options.rounds)]
        used = sum(os.times()[2:4]) - sum(before[2:4])  # of children
        size = title.stat().st_size / 1e6
        print(
            f"title of {options.shots} shots: the command takes {min(seconds):.1f} s (best of {options.rounds}), "
            f"{used / options.rounds:.1f} s of processor time; {size:.1f} MB"
        )
        content = make_catalog(options.titles)
        written = _timed(lambda: catalog.write_text(catalog_page(content), encoding="utf-8"))
        print(f"catalog of {options.titles} titles: page made in {written:.1f} s, {catalog.stat().st_size / 1e6:.1f} MB")
        browser = playwright.chromium.launch(executable_path=browser_path())
        page = browser.new_page(viewport=VIEWPORT)  # type: ignore[arg-type]
        ready = [open_page(page, title) for _ in range(options.rounds)]
        page.focus("#strip")
        moved = _timed(lambda: _press(page, "ArrowRight", 20)) / 20
        print(f"title page: ready {min(ready):.2f} s after navigation began (worst {max(ready):.2f} s); {1000 * moved:.0f} ms a key")
        _screenshot(page, options.screenshots, "title")
        ready = [open_page(page, catalog) for _ in range(options.rounds)]
        found = _timed(lambda: page.fill("#find", "episode 07"))
        sorted_ = _timed(lambda: page.click("[data-sort=duration]"))
        print(f"catalog page: ready in {min(ready):.2f} s (worst {max(ready):.2f} s); a filter {found:.2f} s, a sort {sorted_:.2f} s")
        _screenshot(page, options.screenshots, "catalog")
        browser.close()


def take_pictures(pages: Path) -> None:
    """Take pictures of the demo's pages: a title with its similarities, and the whole catalog."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path())
        for name, path, last in (("title_page", "titles/reels%2Freel-0.html", ".two"), ("catalog_page", "index.html", "#titles")):
            page = browser.new_page(viewport=VIEWPORT)  # type: ignore[arg-type]
            open_page(page, pages / path)
            if page.locator("#strip").count():
                page.focus("#strip")
                _press(page, "ArrowRight", 3)
            page.wait_for_timeout(PICTURES_MS)
            bottom = page.evaluate("(last) => document.querySelector(last).getBoundingClientRect().bottom + scrollY", last) + MARGIN
            page.set_viewport_size({"width": VIEWPORT["width"], "height": round(bottom)})
            page.evaluate("document.activeElement.blur()")
            page.wait_for_timeout(PICTURES_MS)
            picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            IMAGES.mkdir(exist_ok=True)
            picture.quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(IMAGES / f"{name}.png", optimize=True)
        browser.close()


def _press(page: Page, key: str, times: int) -> None:
    for _ in range(times):
        page.keyboard.press(key)


def _timed(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def _screenshot(page: Page, folder: Path | None, name: str) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=folder / f"{name}.png")


def _clustered(random: np.random.Generator, scene_S: np.ndarray, dim: int) -> np.ndarray:
    """Return (S, dim) vectors of norm about 1 that are similar within a scene."""
    centre_ND = random.normal(size=(scene_S.max() + 1, dim))
    vectors_SD = centre_ND[scene_S] + 0.9 * random.normal(size=(len(scene_S), dim)) + 0.5
    return vectors_SD / np.linalg.norm(vectors_SD, axis=1, keepdims=True)


def _picture(random: np.random.Generator, scene: int) -> bytes:
    """Return a JPEG of 160 x 90 with about as many bytes as a real thumbnail: shapes in the scene's colours, and grain."""
    hue = np.random.default_rng(scene).uniform(40, 215, 3)
    coarse = np.clip(hue + random.normal(0, 38, (6, 10, 3)), 0, 255).astype(np.uint8)
    picture_HWC = np.asarray(Image.fromarray(coarse).resize((160, 90), Image.Resampling.BICUBIC), np.float32)
    grain_HWC = picture_HWC + random.normal(0, 9, (90, 160, 1))
    sink = io.BytesIO()
    Image.fromarray(np.clip(grain_HWC, 0, 255).astype(np.uint8)).save(sink, "JPEG", quality=80)
    return sink.getvalue()


if __name__ == "__main__":
    main()
