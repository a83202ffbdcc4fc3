"""Search an index of shots by a shot, a clip or words, and format the results as a table or as JSON. No ray here.

Shapes
    S  shots of a title
    D  dimension of a vector
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mediafm_ray.config.jobs import SearchShotsConfig
from mediafm_ray.config.loader import ConfigError
from mediafm_ray.config.sections import FilterConfig, SearchedIndexConfig
from mediafm_ray.derive.reader import suggest_titles
from mediafm_ray.downstream.clips import clip_overlaps, pool_overlaps
from mediafm_ray.models.encoder import EncoderConfig, build_text_encoder, weights_digest
from mediafm_ray.models.options import AudioEncoderConfig, TextEncoderConfig, VideoEncoderConfig
from mediafm_ray.runs.plan import encoder_recipe
from mediafm_ray.storage.dataset import DatasetError
from mediafm_ray.storage.index import EMBEDDING, IndexFacts, NoIndex, ShotFilter, ShotIndex, modality_of, part_column, vectors_or_zero
from mediafm_ray.text import escape_controls_in_json, public_uri

ALL = "all"  # all modalities: the fused or contextual vector
# modality -> encoder that has a text tower, words of a message
WITH_WORDS = {"video": ("clip", "pictures were"), "audio": ("clap", "sound was")}
SHOT_PATTERN = re.compile(r"(?P<title>.+):(?P<index>\d+)")
CLIP_PATTERN = re.compile(r"(?P<title>.+):(?P<start>\d+(?:\.\d+)?)-(?P<end>\d+(?:\.\d+)?)")
TEXT_WIDTH = 60  # characters of a shot's text in a table
MAX_TITLE_WIDTH = 48  # characters of the column; a longer title makes its own line longer
DECIMALS = 6  # digits of a cosine in the JSON output


@dataclass(frozen=True, eq=False)
class Query:
    """A query vector and its origin."""

    asked: Mapping[str, Any]  # the user's options
    column: str  # column of the index to search
    vector_D: np.ndarray  # float32
    own_title: str = ""  # title of the query's shot or clip
    own_shots: frozenset[int] = frozenset()  # ... and its shots, which are not results


def check_index(index: ShotIndex, config: SearchedIndexConfig) -> None:
    """Check that the index is the configured one. Raises NoIndex with what it holds instead."""
    facts = index.facts
    if config.version not in ("", facts.dataset_version):
        raise NoIndex(f"{index.uri} is of dataset version {facts.dataset_version}, not {config.version}: it holds {facts.describe()}")
    if config.vectors not in ("", facts.kind):
        raise NoIndex(f"{index.uri} has no {config.vectors} vectors: it holds {facts.describe()}")


# -------------------------------------------------------------------------------------------------------------- query


def make_query(index: ShotIndex, config: SearchShotsConfig) -> Query:
    """Compute the query of a configuration. Raises ConfigError, DatasetError, WeightsError for an invalid one."""
    asked = {name: value for name in ("shot", "clip", "query") if (value := getattr(config, name))}
    if len(asked) != 1:
        given = f"given are {' and '.join(asked)}" if asked else "none is given"
        raise ConfigError(f"one of shot=TITLE:INDEX, clip=TITLE:START-END and query=WORDS is required; {given}")
    if config.query:
        by = config.by or "text"
        return words_query(index, config.query, by, words_encoder(index, by, config.text, config.video, config.audio))
    column = column_of(index, config.by or ALL)
    if config.shot:
        match = SHOT_PATTERN.fullmatch(config.shot)
        if match is None:
            raise ConfigError(f"shot={config.shot}: expected TITLE:INDEX, such as film:12; shots are counted from 0")
        return shot_query(index, match["title"], int(match["index"]), column)
    match = CLIP_PATTERN.fullmatch(config.clip)
    if match is None:
        raise ConfigError(f"clip={config.clip}: expected TITLE:START-END in seconds, such as film:61.5-70")
    return clip_query(index, match["title"], match["start"], match["end"], column)


def column_of(index: ShotIndex, by: str) -> str:
    """Return the column of the vectors that ``by`` names: all, or a modality. Raises ConfigError where the index lacks it."""
    column = EMBEDDING if by == ALL else part_column(by)
    if column not in index.facts.dims:
        there = ", ".join([ALL, *(modality_of(name) for name in index.facts.dims if name != EMBEDDING)])
        raise ConfigError(f"by={by}: the index has no {by} vectors, there are: {there}; build it with index.parts to have others")
    return column


def shot_query(index: ShotIndex, title_id: str, number: int, column: str) -> Query:
    """Return the query for shots like a shot. Raises DatasetError where there is no such shot, or it has no such vector."""
    shots = _title(index, title_id, column)
    row = np.flatnonzero(shots["shot_index"].to_numpy() == number)
    if not len(row):
        raise DatasetError(f"{title_id!r} has no shot {number}: it has {len(shots)}, from 0 to {len(shots) - 1}")
    vector_D = vectors_or_zero(shots[column])[row[0]]
    if not vector_D.any():
        raise DatasetError(f"shot {number} of {title_id!r} has no {modality_of(column)} vector to compare with; try by=all")
    return Query({"shot": f"{title_id}:{number}", "by": _name(column)}, column, vector_D, title_id, frozenset([number]))


def clip_query(index: ShotIndex, title_id: str, start: str, end: str, column: str) -> Query:
    """Return the query for shots like a clip, whose ends are decimal numbers of seconds. Raises DatasetError for an invalid clip."""
    clip = f"{title_id}:{start}-{end}"
    shots = _title(index, title_id, column)
    try:
        overlaps_S = clip_overlaps(shots["start_s"].to_numpy(), shots["end_s"].to_numpy(), float(start), float(end))
        vector_D = pool_overlaps(overlaps_S, vectors_or_zero(shots[column]))
    except ValueError as error:
        raise DatasetError(f"clip={clip}: {error}") from error
    own = shots["shot_index"].to_numpy()[overlaps_S > 0]
    return Query({"clip": clip, "by": _name(column)}, column, vector_D, title_id, frozenset(own.tolist()))


def _title(index: ShotIndex, title_id: str, column: str) -> pa.Table:
    shots = index.title(title_id, [column])
    if not len(shots):
        raise DatasetError(_unknown(index, title_id))
    return shots


def _unknown(index: ShotIndex, title_id: str) -> str:
    return f"the index has no title {title_id!r}{suggest_titles(title_id, sorted({one for one, _ in index.titles()}))}"


def _name(column: str) -> str:
    return ALL if column == EMBEDDING else modality_of(column)


def words_query(index: ShotIndex, words: str, by: str, encoder: Any) -> Query:
    """Return the query for words. ``encoder``: the ``words_encoder`` of the index and of ``by``. Raises ConfigError without a word."""
    encoded = encoder.encode([words])
    if not encoded.present_S[0]:
        raise ConfigError("query= has no words")
    return Query({"query": words, "by": by}, column_of(index, by), encoded.embeddings_SD[0])


def words_encoder(index: ShotIndex, by: str, text: TextEncoderConfig, video: VideoEncoderConfig, audio: AudioEncoderConfig) -> Any:
    """Load the encoder of words into the space of an index's text, video or audio vectors. Raises ConfigError, WeightsError."""
    if by not in ("text", *WITH_WORDS):
        raise ConfigError(
            f"by={by}: words are compared with the text of shots (by=text), with CLIP as video encoder with their pictures (by=video), and "
            "with CLAP as audio encoder with their sound (by=audio)"
        )
    column = column_of(index, by)
    if by == "text":
        _check_encoder(index.facts, "text", text)
        encoder: Any = build_text_encoder(text)
    else:
        config = video if by == "video" else audio
        check_has_words(index, by, config)
        from mediafm_ray.models.text_tower import TextTower

        encoder = TextTower(config)
    if encoder.dim != index.facts.dims[column]:
        raise ConfigError(f"by={by}: the encoder gives {encoder.dim} dimensions, the index has {index.facts.dims[column]}")
    return encoder


def check_has_words(index: ShotIndex, modality: str, config: VideoEncoderConfig | AudioEncoderConfig) -> None:
    """Check that the vectors of a modality are of the configured encoder and that it has a text tower. Raises ConfigError otherwise."""
    column_of(index, modality)
    recorded = index.facts.recipe.get(modality, {}).get("encoder")
    encoder, encoded = WITH_WORDS[modality]
    if recorded not in (encoder, None):
        raise ConfigError(f"by={modality}: the index's {encoded} encoded by {recorded}, which has no text encoder: use by=text")
    _check_encoder(index.facts, modality, config)


def _check_encoder(facts: IndexFacts, modality: str, config: EncoderConfig) -> None:
    """Check that the configured encoder is that of the index, whose vectors others cannot match. Raises ConfigError with the difference."""
    recorded = facts.recipe.get(modality)
    if recorded is None:
        raise ConfigError(f"by={modality}: the index does not record the encoder of its {modality} vectors; build it again")
    if recorded.get("encoder") != config.encoder:
        raise ConfigError(
            f"by={modality}: the index's {modality} vectors are from {modality}.encoder={recorded.get('encoder')}, configured is "
            f"{config.encoder}: give the profile that the catalog was embedded with, such as --config mediafm"
        )
    configured = encoder_recipe(config, weights_digest(config))
    differing = [name for name in sorted({*recorded, *configured}) if recorded.get(name) != configured.get(name)]
    if differing:
        difference = "; ".join(f"{modality}.{name} is {configured.get(name)}, the index has {recorded.get(name)}" for name in differing)
        raise ConfigError(f"by={modality}: the configured encoder is not that of the index: {difference}; give the profile of its catalog")


# ------------------------------------------------------------------------------------------------------------- search


def find_shots(index: ShotIndex, query: Query, config: SearchShotsConfig) -> pa.Table:
    """Find the nearest shots except the query's own, with the columns of ShotIndex.nearest. Raises DatasetError for unknown titles."""
    return nearest_shots(index, query, _filter(index, query, config.filter), config.count, config.index.exact)


def nearest_shots(index: ShotIndex, query: Query, where: ShotFilter, count: int, exact: bool = False) -> pa.Table:
    """Find the ``count`` nearest shots that a filter allows, except the query's own, with the columns of ShotIndex.nearest."""
    found = index.nearest(query.column, query.vector_D, count + len(query.own_shots), where.sql(), exact=exact)
    places = zip(found["title_id"].to_pylist(), found["shot_index"].to_pylist(), strict=True)
    others = [not (title_id == query.own_title and shot in query.own_shots) for title_id, shot in places]
    return found.filter(pa.array(others, pa.bool_())).slice(0, count)


def _filter(index: ShotIndex, query: Query, config: FilterConfig) -> ShotFilter:
    for name, titles in (("titles", config.titles), ("without_titles", config.without_titles)):
        for title_id in titles:
            if not len(index.title(title_id, [])):
                raise DatasetError(f"filter.{name}: {_unknown(index, title_id)}")
    if config.other_titles and not query.own_title:
        raise ConfigError("filter.other_titles needs a shot or a clip: words belong to no title")
    without = [*config.without_titles, *([query.own_title] if config.other_titles else [])]
    return ShotFilter(config.titles, without, config.start_s, config.end_s, config.languages, config.min_length_s)


# ------------------------------------------------------------------------------------------------------------- results


def as_json(index: ShotIndex, query: Query, found: pa.Table) -> str:
    """Format the query, the index and the results as one JSON object."""
    results = [
        {
            "rank": rank,
            "cosine": round(row["cosine"], DECIMALS),
            **{name: row[name] for name in ("title_id", "shot_index", "start_s", "end_s", "language", "text")},
        }
        for rank, row in enumerate(found.to_pylist(), start=1)
    ]
    facts = index.facts
    about = {"uri": public_uri(index.uri), "version": index.version, "dataset_version": facts.dataset_version, "vectors": facts.vectors}
    content = {"query": dict(query.asked), "index": about, "results": results}
    return escape_controls_in_json(json.dumps(content, ensure_ascii=False, indent=2))


def as_table(index: ShotIndex, query: Query, found: pa.Table) -> str:
    """Format the results as a text table."""
    rows = found.to_pylist()
    asked = ", ".join(f"{name}={value}" for name, value in query.asked.items())
    there, shots = index.shots(query.column), index.shots()
    compared = f"{there} shots" if there == shots else f"the {there} of {shots} shots that have {modality_of(query.column)}"
    heading = f"{asked}, in {compared} ({index.facts.describe()})"
    if not rows:
        return f"{heading}\n\n  no shot was found: the filters leave none (shots have a language if the name of their subtitles gives one)"
    titles = [printable(row["title_id"]) for row in rows]
    width = min(MAX_TITLE_WIDTH, max(len("title"), *map(len, titles)))
    lines = [heading, "", f"  {'cosine':>6}  {'title':<{width}}  {'shot':>5}  {'start':>9}  {'end':>9}  text"]
    for row, title in zip(rows, titles, strict=True):
        language = f"{row['language']}: " if row["language"] else ""
        text = textwrap.shorten(printable(language + row["text"]), TEXT_WIDTH, placeholder=" ...")
        place = f"{row['shot_index']:>5}  {row['start_s']:>9.2f}  {row['end_s']:>9.2f}"
        lines.append(f"  {row['cosine']:>6.3f}  {title:<{width}}  {place}  {text}".rstrip())
    return "\n".join(lines)


def printable(text: str) -> str:
    """Make text of a catalog safe for a terminal: characters that are not printable, such as escapes, become question marks."""
    return "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))
