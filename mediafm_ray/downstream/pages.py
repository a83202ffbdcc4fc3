"""Pages to look at: one self-contained HTML file of a title, and one that lists a catalog. numpy, pyarrow and Jinja only.

A page asks nothing of any server: pictures, figures, style and script stand in it, and its Content-Security-Policy allows just these, by
their digests. What comes from a catalog (ids, captions, messages) reaches the page as text that Jinja escapes or as JSON that the script
puts into text nodes; no markup is ever made of it.

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
NEAREST = 8  # shots named as nearest to a shot
MAP_CELLS = 512  # along a side of the similarity map: beyond it a cell is a run of shots
THUMBNAIL_BYTES = 5_000_000  # of a page, before base64; what a title has beyond it is made smaller
SMALLEST_THUMBNAIL = 48  # pixels of width
THUMBNAIL_QUALITY = 60  # JPEG quality of pictures that are made smaller
COSINE_SCALE = 10_000  # cosines are int16 in steps of 0.0001
BINS_PER_OCTAVE = 2  # of the histogram of shot lengths
MAX_WARNINGS = 200  # of a title, on its page
SHOWN_ID = 300  # characters of a title id in a list; its page has the whole
HIDDEN = re.compile(  # controls, zero-width characters and marks of direction (but not the joiners that scripts need), tags
    "[\x00-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f]"
)
MESSAGE = 600  # characters of a warning or a failure's message in the list of a catalog


# -------------------------------------------------------------------------------------------------------- one title


@dataclass(frozen=True, eq=False)
class TitleContent:
    """What the page of a title is made from."""

    shots: pa.Table  # rows of ``shots`` of one title, in order
    facts: Mapping[str, Any]  # that the title's file carries: title_id, source, video, media, dims, dataset_version
    vectors: Mapping[str, np.ndarray]  # (S, D) float32 of each embedding to compare shots by, the most telling first; zero where absent
    scenes: pa.Table | None = None  # rows of ``scenes`` of the title: first_shot, last_shot; None where there are none
    notes: Sequence[str] = ()  # what is not on the page, and how to get it there
    index: str = ""  # relative address of the catalog's page; empty = no link


def title_page(content: TitleContent) -> str:
    """The HTML file of one title. Raises ValueError for a title without shots and for scenes or vectors that do not fit its shots."""
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
    return render(
        "title",
        data,
        title=visible(str(content.facts.get("title_id", ""))),
        index=content.index,
        figures=_title_figures(lengths_s, media, len(scenes)),
        warnings=[visible(warning) for warning in media.get("warnings", [])][:MAX_WARNINGS],
        hidden_warnings=max(len(media.get("warnings", [])) - MAX_WARNINGS, 0),
        notes=[
            visible(note)
            for note in [
                *content.notes,
                *([] if columns["levels"] or not sum(shots["has_audio"].to_pylist()) else ["No levels of sound are stored."]),
            ]
        ],
        spaces=list(content.vectors),
        has_scenes=bool(scenes),
        has_gradual=BOUNDARY_GRADUAL in columns["kind"],
        histogram=length_histogram(lengths_s),
        coverage=_coverage(shots, lengths_s, columns["shares"]),
        facts=title_facts_shown(content.facts),
        count=count,
    )


def length_histogram(lengths_s: np.ndarray) -> list[dict[str, float]]:
    """Shots by length, in bins of half an octave from the shortest to the longest: ``low`` and ``high`` in seconds, ``count``."""
    positive_s = np.maximum(lengths_s, 1e-3)
    octaves = np.floor(np.log2(positive_s) * BINS_PER_OCTAVE).astype(int)
    counted = Counter(octaves.tolist())
    bins = range(min(counted), max(counted) + 1)
    return [{"low": 2 ** (bin_ / BINS_PER_OCTAVE), "high": 2 ** ((bin_ + 1) / BINS_PER_OCTAVE), "count": counted[bin_]} for bin_ in bins]


def title_facts_shown(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The facts of a title for a person: labels and values, without what is not known."""
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
    """The first shot of each scene. Raises ValueError when the scenes do not tile the shots."""
    if scenes is None or scenes.num_rows == 0:
        return []
    first, last = scenes["first_shot"].to_pylist(), scenes["last_shot"].to_pylist()
    if first[0] != 0 or last[-1] != count - 1 or any(begin != end + 1 for begin, end in zip(first[1:], last[:-1], strict=True)):
        raise ValueError(f"the scenes do not tile the {count} shots of the title: they are of another version of it")
    return first


def _shot_columns(shots: pa.Table, vectors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The shots as columns for the script; numbers rounded to what can be seen."""
    pictures = fit_thumbnails(shots["thumbnail"].to_pylist(), THUMBNAIL_BYTES)
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
    """(S, 3) float: the part of each modality in the squared norm of a shot's vectors, in per cent."""
    energies = [np.square(vectors[name].astype(np.float64)).sum(axis=1) if name in vectors else None for name in MODALITIES]
    found = [energy for energy in energies if energy is not None]
    if not found:
        return np.zeros((0, len(MODALITIES)))
    total_S = np.maximum(np.sum(found, axis=0), 1e-12)
    return np.round(np.stack([np.zeros_like(total_S) if energy is None else 100 * energy / total_S for energy in energies], axis=1), 1)


def _levels(shots: pa.Table) -> dict[str, Any] | None:
    """The levels of sound of all shots, one after another, and how many each has; None where none are stored."""
    column = shots["audio_levels"].to_pylist() if "audio_levels" in shots.column_names else []
    counts = [len(levels or ()) for levels in column]
    if not sum(counts):
        return None
    levels = np.concatenate([np.asarray(levels or (), np.int8) for levels in column])
    return {"dbfs": _base64(levels), "counts": counts}


def _space(vectors_SD: np.ndarray) -> dict[str, Any]:
    """What the page knows of the shots' vectors of one kind: the nearest of each shot, and the map."""
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
    """JPEG files that together have at most (about) so many bytes: all as they are, or all made smaller by the same factor."""
    total = sum(map(len, pictures))
    if total <= most_bytes:
        return list(pictures)
    shrink = math.sqrt(most_bytes / total)
    return [_smaller(picture, shrink) if picture else b"" for picture in pictures]


def _smaller(picture: bytes, shrink: float) -> bytes:
    image: Image.Image = Image.open(io.BytesIO(picture))
    width = max(round(image.width * shrink), min(SMALLEST_THUMBNAIL, image.width))
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
    """For each modality: shots and time in which it is present, and its mean share in the fused vectors, in per cent."""
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
    """Text in which no character is hidden or reorders its neighbours: such ones are written as their code points."""
    return HIDDEN.sub(lambda match: f"\u27e8U+{ord(match[0]):04X}\u27e9", text)


def clock(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss from an hour on; tenths below ten minutes."""
    tenths = round(seconds * 10)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    if hours or minutes >= 10:
        return f"{hours}:{minutes:02d}:{rest // 10:02d}" if hours else f"{minutes}:{rest // 10:02d}"
    return f"{minutes}:{rest // 10:02d}.{rest % 10}"


def render(name: str, data: Mapping[str, Any], **values: Any) -> str:
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
        policy="; ".join(policy), style=Markup(style), script=Markup(script), data=Markup(_json_for_html(data)), **values
    )


@cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name)


def _json_for_html(data: Mapping[str, Any]) -> str:
    """JSON that may stand inside a script element: no character of it can end the element or begin markup."""
    text = json.dumps(data, separators=(",", ":"))  # ASCII: also no line separators
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
    """A rate such as 30000/1001 as 29.97; other text as it is."""
    match = re.fullmatch(r"(\d+)/([1-9]\d*)", fraction or "")
    return f"{int(match[1]) / int(match[2]):.5g}" if match else fraction


def thousands(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"
