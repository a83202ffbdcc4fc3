"""The searches that an address of the web application asks for, and their results. No ray here."""

from __future__ import annotations

import dataclasses
import math
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mediafm_ray.config.loader import ConfigError
from mediafm_ray.derive.search import Query, clip_query, nearest_shots, shot_query
from mediafm_ray.explore.catalog import SPACES, Catalog
from mediafm_ray.storage.dataset import DatasetError
from mediafm_ray.storage.index import ShotFilter

COUNTS = (24, 48, 96, 192)  # results of a page
COMPARED = 8  # results of each kind of vectors, side by side
MAX_TEXT = 2000  # characters of a field of the form
LANGUAGE_CHARACTERS = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-")


@dataclass(frozen=True)
class Search:
    """The fields of the search form. Empty = not given."""

    q: str = ""  # words
    like: str = ""  # title of a shot or a clip
    shot: str = ""  # index of that shot
    start: str = ""  # seconds of that clip
    end: str = ""
    picture: str = ""  # digest of an uploaded picture
    by: str = ""  # vectors to compare
    title: str = ""  # of filters: a title, or a part of its id
    after: str = ""  # seconds of the title
    before: str = ""
    language: str = ""
    length: str = ""  # seconds, at least
    others: str = ""  # not the title of the query
    count: str = ""

    @classmethod
    def of(cls, parameters: Mapping[str, str]) -> Search:
        """Read the fields from an address. Raises ConfigError for a field that is too long."""
        fields = {entry.name: parameters.get(entry.name, "").strip() for entry in dataclasses.fields(cls)}
        fields["like"] = parameters.get("like", "")  # An id may begin with a space.
        for name, value in fields.items():
            if len(value) > MAX_TEXT:
                raise ConfigError(f"{name}: at most {MAX_TEXT} characters can be searched for")
        if fields["q"]:  # Words replace the shot, clip or picture of the search before.
            fields |= dict.fromkeys(("like", "shot", "start", "end", "picture"), "")
        return cls(**fields)

    @property
    def kind(self) -> str:
        """The kind of query: words, shot, clip, picture; empty where nothing is asked for."""
        if self.q:
            return "words"
        if self.picture:
            return "picture"
        if not self.like:
            return ""
        return "shot" if self.shot else "clip"

    def link(self, path: str = "/", **changes: Any) -> str:
        """Return the address of this search with other values of some fields."""
        fields = dataclasses.asdict(self) | {name: str(value) for name, value in changes.items()}
        return link(path, **fields)

    def more_like(self, title_id: str, shot: int, by: str) -> str:
        """Return the address of a search for shots like a shot, with these filters."""
        return self.link(q="", picture="", start="", end="", like=title_id, shot=shot, by=by)

    def filters(self, catalog: Catalog, query: Query) -> ShotFilter:
        """Return the filter on the results. Raises ConfigError for values that are none."""
        known = self.title in catalog.objects
        after, before, length = (_seconds(name, getattr(self, name)) for name in ("after", "before", "length"))
        if after is not None and before is not None and after >= before:
            raise ConfigError(f"until ({before:g} s) must be greater than from ({after:g} s)")
        languages = [language.strip() for language in self.language.split(",") if language.strip()]
        if not set("".join(languages)) <= LANGUAGE_CHARACTERS:
            raise ConfigError("language: expected a tag such as en or pt-BR, or several with commas between them")
        return ShotFilter(
            titles=[self.title] if known else [],
            without_titles=[query.own_title] if self.others and query.own_title else [],
            start_s=after,
            end_s=before,
            languages=languages,
            min_length_s=length or 0.0,
            title_part="" if known else self.title,
        )


@dataclass(frozen=True, eq=False)
class Found:
    """The results of a search."""

    by: str
    shots: Sequence[Mapping[str, Any]]  # the columns of ShotIndex.nearest
    compared: int  # shots with such vectors
    of: int  # shots of the index


def link(path: str, **fields: Any) -> str:
    """Return an address with the fields that are not empty as its query."""
    query = urllib.parse.urlencode({name: str(value) for name, value in fields.items() if str(value) != ""})
    return f"{path}?{query}" if query else path


def find(catalog: Catalog, search: Search) -> Found:
    """Search. Raises ConfigError, DatasetError for what cannot be searched for."""
    count = int(search.count) if search.count.isascii() and search.count.isdigit() and int(search.count) in COUNTS else COUNTS[0]
    by = _vectors(catalog, search)
    query = _query(catalog, search, by)
    return _found(catalog, search, by, query, count)


def find_by_each(catalog: Catalog, search: Search) -> dict[str, Found | str]:
    """Search for shots like a shot by each kind of vectors; return the results of each, or the reason why there are none."""
    columns: dict[str, Found | str] = {}
    for by in SPACES:
        if by not in catalog.spaces:
            columns[by] = catalog.missing(by)
            continue
        try:
            columns[by] = _found(catalog, search, by, _query(catalog, search, by), COMPARED)
        except DatasetError as error:
            columns[by] = str(error)
    return columns


def _vectors(catalog: Catalog, search: Search) -> str:
    """Return the vectors to compare: those that were asked for, if the query can be compared with them."""
    if search.kind == "words":
        return search.by if search.by in catalog.words.encoders else next(iter(catalog.words.encoders), "text")
    return "video" if search.kind == "picture" else search.by or catalog.kind


def _query(catalog: Catalog, search: Search, by: str) -> Query:
    if search.kind == "words":
        if by not in catalog.words.encoders:
            raise ConfigError(f"words cannot be searched for: {catalog.words.reasons[by]}")
        return Query({}, catalog.spaces[by][1], catalog.words_vector(by, search.q))
    if search.kind == "picture":
        if catalog.no_pictures:
            raise ConfigError(f"a picture cannot be searched with: {catalog.no_pictures}")
        return Query({}, catalog.spaces[by][1], catalog.picture_vector(search.picture))
    if by not in SPACES:
        raise ConfigError(f"there are no {by!r} vectors; there are: {', '.join(catalog.spaces)}")
    if by not in catalog.spaces:
        raise ConfigError(catalog.missing(by))
    index, column = catalog.spaces[by]
    if search.kind == "shot":
        return shot_query(index, search.like, shot_number(search.shot), column)
    ends = _seconds("start", search.start), _seconds("end", search.end)
    if ends[0] is None or ends[1] is None:
        raise ConfigError("a clip needs its start and its end in seconds")
    return clip_query(index, search.like, search.start, search.end, column)


def _found(catalog: Catalog, search: Search, by: str, query: Query, count: int) -> Found:
    index = catalog.spaces[by][0]
    shots = nearest_shots(index, query, search.filters(catalog, query), count, catalog.config.index.exact)
    return Found(by, shots.to_pylist(), catalog.counts[by], catalog.shots)


def shot_number(text: str) -> int:
    """Parse the index of a shot. Raises ConfigError."""
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ConfigError(f"shot: expected its index, counted from 0, not {text!r}")
    return int(text)


def _seconds(name: str, text: str) -> float | None:
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds) or seconds < 0:
        raise ConfigError(f"{name}: expected seconds, such as 61.5, not {text!r}")
    return seconds
