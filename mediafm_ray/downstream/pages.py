"""Self-contained HTML pages of a title, and common parts of all pages. numpy, pyarrow and Jinja only.

A page needs no server: it contains pictures, figures, style and script, and its Content-Security-Policy allows only these, by their
digests. Text of a catalog (ids, captions, messages) is escaped by Jinja, or is JSON that the script puts into text nodes; it never
becomes markup.

Shapes
    S  shots of the title
    D  dimension of a vector
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
from markupsafe import Markup
from PIL import Image

from mediafm_ray.downstream.similarity import nearest_shots, similarity_map
from mediafm_ray.spec import BOUNDARY_GRADUAL, MODALITIES

ASSETS = Path(__file__).parent / "page"
NEAREST = 8  # nearest shots listed for a shot
MAP_CELLS = 512  # cells along a side of the similarity map; of longer titles a cell is a run of shots
MAX_THUMBNAIL_BYTES = 5_000_000  # Thumbnails of a page, before base64; larger ones are scaled down.
MIN_THUMBNAIL_WIDTH = 48  # pixels
THUMBNAIL_QUALITY = 60  # JPEG quality of thumbnails that are scaled down
COSINE_SCALE = 10_000  # Cosines are int16 in steps of 0.0001.
BINS_PER_OCTAVE = 2  # bins of the histogram of shot lengths
MAX_WARNINGS = 200  # warnings on a title's page
MAX_ID_LENGTH = 300  # characters of a title id in a list; the page of the title has the whole id
HIDDEN = re.compile(  # Controls, zero-width characters, marks of direction (but not the joiners that scripts need) and tags.
    "[\x00-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f]"
)
MAX_MESSAGE_LENGTH = 600  # characters of a warning or a failure's message in the list of a catalog


# -------------------------------------------------------------------------------------------------------- one title


@dataclass(frozen=True, eq=False)
class TitleContent:
    """The content of a title's page."""

    shots: pa.Table  # rows of ``shots`` of one title, in order
    facts: Mapping[str, Any]  # metadata of the title's file: title_id, source, video, media, dims, dataset_version
    vectors: Mapping[str, np.ndarray]  # (S, D) float32 embeddings by name, the default first; zero if absent
    scenes: pa.Table | None = None  # rows of ``scenes`` of the title: first_shot, last_shot; None if there are none
    notes: Sequence[str] = ()  # what is missing on the page and how to add it
    index: str = ""  # relative address of the catalog's page; empty = no link


def title_page(content: TitleContent) -> str:
    """Return the HTML file of one title. Raises ValueError without shots, or if scenes or vectors do not fit the shots."""
    return render("title", **title_values(content))


def title_values(content: TitleContent) -> dict[str, Any]:
    """Return the values of the template title.html, its ``data`` among them. Raises ValueError as ``title_page`` does."""
    shots, count = content.shots, content.shots.num_rows
    if count == 0:
        raise ValueError(f"title {content.facts.get('title_id')!r} has no shots")
    for name, vectors_SD in content.vectors.items():
        if len(vectors_SD) != count:
            raise ValueError(f"{name} has {len(vectors_SD)} vectors for {count} shots")
    lengths_s = shots["end_s"].to_numpy() - shots["start_s"].to_numpy()
    media = content.facts.get("media", {})
    scenes = _scene_starts(content.scenes, count)
    columns = _shot_columns(shots, content.vectors)
    data = {
        "shots": columns,
        "scenes": scenes,
        "spaces": {name: _space(vectors_SD) for name, vectors_SD in content.vectors.items()},
    }
    return {
        "data": data,
        "title": visible(str(content.facts.get("title_id", ""))),
        "index": content.index,
        "figures": _title_figures(lengths_s, media, len(scenes)),
        "warnings": [visible(warning) for warning in media.get("warnings", [])][:MAX_WARNINGS],
        "hidden_warnings": max(len(media.get("warnings", [])) - MAX_WARNINGS, 0),
        "notes": [
            visible(note)
            for note in [
                *content.notes,
                *([] if columns["levels"] or not sum(shots["has_audio"].to_pylist()) else ["No levels of sound are stored."]),
            ]
        ],
        "spaces": list(content.vectors),
        "has_scenes": bool(scenes),
        "has_gradual": BOUNDARY_GRADUAL in columns["kind"],
        "histogram": length_histogram(lengths_s),
        "coverage": _coverage(shots, lengths_s, columns["shares"]),
        "facts": title_facts_shown(content.facts),
        "count": count,
    }


def length_histogram(lengths_s: np.ndarray) -> list[dict[str, float]]:
    """Return the histogram of shot lengths in bins of half an octave: ``low`` and ``high`` in seconds, ``count``."""
    positive_s = np.maximum(lengths_s, 1e-3)
    octaves = np.floor(np.log2(positive_s) * BINS_PER_OCTAVE).astype(int)
    counted = Counter(octaves.tolist())
    bins = range(min(counted), max(counted) + 1)
    return [{"low": 2 ** (bin_ / BINS_PER_OCTAVE), "high": 2 ** ((bin_ + 1) / BINS_PER_OCTAVE), "count": counted[bin_]} for bin_ in bins]


def title_facts_shown(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the known facts of a title as labels and values."""
    media = facts.get("media", {})
    found = media.get("facts", {})
    size = f"{found['width']} x {found['height']}" if found.get("width") and found.get("height") else None
    sound = [found.get("audio_codec"), with_unit(found.get("audio_rate"), "Hz"), found.get("audio_layout")]
    dims = facts.get("dims", {})
    rows = [
        ("Video", facts.get("video")),
        ("Container", found.get("container")),
        ("Picture", _joined([found.get("video_codec"), size, with_unit(_decimal(found.get("average_rate")), "frames/s on average")])),
        ("Sound", _joined(sound) or "none"),
        ("Frames decoded", thousands(media.get("frame_count"))),
        ("Duration", with_unit(rounded(media.get("duration_s"), 3), "s")),
        ("Duration the file declares", with_unit(rounded(found.get("declared_duration_s"), 3), "s")),
        ("Damaged picture", f"{100 * found['damage']:.2g} %" if found.get("damage") is not None else None),
        ("Size", f"{found['bytes'] / 1e6:.1f} MB" if found.get("bytes") else None),
        ("Dataset version", facts.get("dataset_version")),
        ("Source digest", facts.get("source")),
        ("Fused embedding", _joined([f"{dims['fused']} numbers"] + [f"{name} {dims[name]}" for name in MODALITIES]) if dims else None),
    ]
    return [(label, visible(str(value))) for label, value in rows if value not in (None, "")]


def _scene_starts(scenes: pa.Table | None, count: int) -> list[int]:
    """Return the first shot of each scene. Raises ValueError if the scenes do not tile the shots."""
    if scenes is None or scenes.num_rows == 0:
        return []
    first, last = scenes["first_shot"].to_pylist(), scenes["last_shot"].to_pylist()
    if first[0] != 0 or last[-1] != count - 1 or any(begin != end + 1 for begin, end in zip(first[1:], last[:-1], strict=True)):
        raise ValueError(f"the scenes do not tile the {count} shots of the title: they are of another version of it")
    return first


def _shot_columns(shots: pa.Table, vectors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the shots as columns for the script, with numbers rounded to visible digits."""
    pictures = fit_thumbnails(shots["thumbnail"].to_pylist(), MAX_THUMBNAIL_BYTES)
    flags = sum(shots[f"has_{name}"].to_numpy(zero_copy_only=False).astype(int) << bit for bit, name in enumerate(MODALITIES))
    return {
        "start": np.round(shots["start_s"].to_numpy(), 3).tolist(),
        "end": np.round(shots["end_s"].to_numpy(), 3).tolist(),
        "frame": shots["start_frame"].to_pylist(),
        "lastFrame": shots["end_frame"][-1].as_py(),
        "kind": shots["boundary_kind"].to_pylist(),
        "probability": np.round(shots["boundary_probability"].to_numpy().astype(float), 3).tolist(),
        "dropped": shots["dropped_boundaries"].to_pylist(),
        "text": shots["text"].to_pylist(),
        "language": [visible(language) for language in shots["language"].to_pylist()],
        "seen": flags.tolist(),  # bit 0 video, bit 1 audio, bit 2 text
        "shares": _shares(vectors).tolist(),
        "levels": _levels(shots),
        "picture": [base64.b64encode(picture).decode() for picture in pictures],
    }


def _shares(vectors: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return (S, 3) float, the share of each modality in the squared norm of a shot's vectors, in per cent."""
    energies = [np.square(vectors[name].astype(np.float64)).sum(axis=1) if name in vectors else None for name in MODALITIES]
    found = [energy for energy in energies if energy is not None]
    if not found:
        return np.zeros((0, len(MODALITIES)))
    total_S = np.maximum(np.sum(found, axis=0), 1e-12)
    return np.round(np.stack([np.zeros_like(total_S) if energy is None else 100 * energy / total_S for energy in energies], axis=1), 1)


def _levels(shots: pa.Table) -> dict[str, Any] | None:
    """Return the concatenated sound levels of all shots and the number of each shot's; None if none are stored."""
    column = shots["audio_levels"].to_pylist() if "audio_levels" in shots.column_names else []
    counts = [len(levels or ()) for levels in column]
    if not sum(counts):
        return None
    levels = np.concatenate([np.asarray(levels or (), np.int8) for levels in column])
    return {"dbfs": _base64(levels), "counts": counts}


def _space(vectors_SD: np.ndarray) -> dict[str, Any]:
    """Return the nearest shots of each shot and the similarity map for one kind of vectors."""
    neighbours, map_ = nearest_shots(vectors_SD, NEAREST), similarity_map(vectors_SD, MAP_CELLS)
    cosines = np.rint(np.nan_to_num(neighbours.cosine_SK) * COSINE_SCALE)
    return {
        "nearest": _base64(neighbours.index_SK.astype("<i4")),
        "cosines": _base64(cosines.astype("<i2")),
        "perShot": neighbours.index_SK.shape[1],
        "map": _base64(map_.code_NN),
        "cells": len(map_.code_NN),
        "first": map_.first_N.tolist(),
        "low": round(map_.low, 4),
        "high": round(map_.high, 4),
    }


def fit_thumbnails(pictures: Sequence[bytes], most_bytes: int) -> list[bytes]:
    """Return the JPEG files, all scaled down by one factor if they exceed about ``most_bytes`` together."""
    total = sum(map(len, pictures))
    if total <= most_bytes:
        return list(pictures)
    shrink = math.sqrt(most_bytes / total)
    return [_smaller(picture, shrink) if picture else b"" for picture in pictures]


def _smaller(picture: bytes, shrink: float) -> bytes:
    image: Image.Image = Image.open(io.BytesIO(picture))
    width = max(round(image.width * shrink), min(MIN_THUMBNAIL_WIDTH, image.width))
    image = image.resize((width, max(round(image.height * width / image.width), 1)), Image.Resampling.BILINEAR, reducing_gap=2.0)
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=THUMBNAIL_QUALITY)
    return sink.getvalue()


def _title_figures(lengths_s: np.ndarray, media: Mapping[str, Any], scenes: int) -> list[tuple[str, str]]:
    duration_s = float(media.get("duration_s") or lengths_s.sum())
    return [
        ("Duration", clock(duration_s)),
        ("Shots", f"{len(lengths_s):,}"),
        *([("Scenes", f"{scenes:,}")] if scenes else []),
        ("Shots a minute", f"{60 * len(lengths_s) / duration_s:.1f}" if duration_s else "0"),
        ("Median shot", f"{np.median(lengths_s):.1f} s"),
        ("Longest shot", f"{lengths_s.max():.1f} s"),
    ]


def _coverage(shots: pa.Table, lengths_s: np.ndarray, shares: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """Return for each modality the shots and the time in which it is present, and its mean share in the fused vectors, in per cent."""
    mean_share = np.mean(shares, axis=0).tolist() if len(shares) else [None] * len(MODALITIES)
    total_s = max(float(lengths_s.sum()), 1e-9)
    rows = []
    for name, share in zip(MODALITIES, mean_share, strict=True):
        has_S = shots[f"has_{name}"].to_numpy(zero_copy_only=False).astype(bool)
        rows.append({"name": name, "shots": int(has_S.sum()), "time": 100 * float(lengths_s[has_S].sum()) / total_s, "share": share})
    return rows


OK, FAILED, OUTDATED = "ok", "failed", "outdated"


# ----------------------------------------------------------------------------------------------------------- shared


def visible(text: str) -> str:
    """Return text with characters that are hidden or reorder their neighbours replaced by their code points."""
    return HIDDEN.sub(lambda match: f"\u27e8U+{ord(match[0]):04X}\u27e9", text)


def clock(seconds: float) -> str:
    """Format seconds as m:ss.t, from ten minutes on as m:ss, from an hour on as h:mm:ss."""
    tenths = round(seconds * 10)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    if hours or minutes >= 10:
        return f"{hours}:{minutes:02d}:{rest // 10:02d}" if hours else f"{minutes}:{rest // 10:02d}"
    return f"{minutes}:{rest // 10:02d}.{rest % 10}"


def render(name: str, data: Mapping[str, Any], **values: Any) -> str:
    """Return a self-contained page: a template with its style, its script and the data that the script draws."""
    style, script = ((ASSETS / file).read_text(encoding="utf-8") for file in ("page.css", f"{name}.js"))
    script = f"{(ASSETS / 'common.js').read_text(encoding='utf-8')}{script}"
    policy = [
        "default-src 'none'",
        f"script-src '{_digest(script)}'",
        f"style-src '{_digest(style)}'",
        "img-src data: blob:",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    return _template(f"{name}.html").render(
        policy="; ".join(policy), style=Markup(style), script=Markup(script), data=Markup(json_for_html(data)), **values
    )


@cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name)


def json_for_html(data: Mapping[str, Any]) -> str:
    """Return JSON for a script element: no character of it can end the element or begin markup."""
    text = json.dumps(data, separators=(",", ":"))  # ASCII output has no line separators.
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def cut_to(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}\u2026"


def _joined(parts: Iterable[Any]) -> str:
    return ", ".join(str(part) for part in parts if part)


def with_unit(value: Any, unit: str) -> str | None:
    return None if value in (None, "") else f"{value} {unit}"


def rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _decimal(fraction: str | None) -> str | None:
    """Format a rate such as 30000/1001 as 29.97; return other text unchanged."""
    match = re.fullmatch(r"(\d+)/([1-9]\d*)", fraction or "")
    return f"{int(match[1]) / int(match[2]):.5g}" if match else fraction


def thousands(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"
