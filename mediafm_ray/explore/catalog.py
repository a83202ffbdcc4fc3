"""The embedded catalog behind the web application: its dataset, its indexes and the encoders of queries, opened once. No ray here.

The titles are those of one listing at the start; the index is the version that was published then.
"""

from __future__ import annotations

import logging
import shlex
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from mediafm_ray.config.jobs import ExploreCatalogConfig
from mediafm_ray.config.loader import ConfigError
from mediafm_ray.derive.pages import UNREADABLE
from mediafm_ray.derive.reader import suggest_titles
from mediafm_ray.derive.repeats import read_repeats
from mediafm_ray.derive.search import WITH_WORDS, check_has_words, check_index, words_encoder
from mediafm_ray.explore.cache import BoundedCache
from mediafm_ray.extras import MissingExtra
from mediafm_ray.models.encoder import build_video_encoder
from mediafm_ray.models.weights import WeightsError
from mediafm_ray.runs.stored import open_dataset
from mediafm_ray.spec import MODALITIES
from mediafm_ray.storage.dataset import DatasetError, dataset_versions, newest_objects, title_facts
from mediafm_ray.storage.index import EMBEDDING, ShotIndex, open_index, part_column
from mediafm_ray.storage.names import SHOTS, decode_title, object_key
from mediafm_ray.storage.store import StorageError

log = logging.getLogger(__name__)

SPACES = ("fused", "contextual", *MODALITIES)  # the kinds of vectors by which shots are compared
ROW_COLUMNS = ("shot_index", "start_s", "end_s", "text", "language", "has_audio")
MAX_ID_LENGTH = 1024  # characters of a title id, for which similar ones are looked for; a catalog has no longer ones
CUT_ID = "~"  # In an object's name it marks a long title id, which is cut there.
MAX_THUMBNAIL_BYTES = 128 << 20  # the stored thumbnails in memory
MAX_TITLE_BYTES = 64 << 20  # the rows and facts of titles in memory
MAX_VECTORS = 1000  # query vectors of words and pictures in memory
NO_QUERY = (ConfigError, WeightsError, MissingExtra)  # reasons why words or pictures cannot be searched with


@dataclass(frozen=True, eq=False)
class StoredTitle:
    """The facts of a title and ROW_COLUMNS of its shots."""

    facts: Mapping[str, Any]
    shots: pa.Table

    def check(self, shot: int) -> None:
        """Raise DatasetError where there is no such shot."""
        if not 0 <= shot < len(self.shots):
            raise DatasetError(f"{self.facts['title_id']!r} has no shot {shot}: it has {len(self.shots)}, from 0 to {len(self.shots) - 1}")

    @property
    def source(self) -> Mapping[str, Any]:
        """The facts of the video file: container, codecs, frame rate."""
        return self.facts.get("media", {}).get("facts", {})


@dataclass
class Words:
    """The encoders of words by the vectors that they are compared with, and the reasons where there is none."""

    encoders: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


class Catalog:
    """A dataset, the indexes of it that can be searched, and the encoders of queries. Several threads may use it at once.

    Raises ConfigError, DatasetError, StorageError where the dataset cannot be read. A missing index is no error: ``problem`` says what
    to run.
    """

    def __init__(self, config: ExploreCatalogConfig):
        self.config = config
        self.index, self.problem = _open_index(config)
        indexed = self.index.facts.dataset_version if self.index else ""
        stored = dataset_versions(config.output.uri, config.storage) if indexed and config.output.uri else []
        version = config.dataset.version or (indexed if indexed in stored else "")
        self.dataset = open_dataset(config.output.uri, version, config.storage)
        self.is_other = indexed not in ("", self.dataset.version)
        if self.is_other:
            self.problem = f"{config.index.uri} is of dataset version {indexed}, the dataset shown here is {self.dataset.version}"
            self.index = None
        self.repeats = read_repeats(config.repeats.uri, self.dataset, config.storage) if config.repeats.uri else None
        self.spaces = self._open_spaces()
        self.counts = {name: index.shots(column) for name, (index, column) in self.spaces.items()}
        self.shots = self.index.shots() if self.index else 0
        self.objects = self._list_titles()
        self.words = self._open_words()
        self.no_pictures = self._check_pictures()
        self.pictured = self.dataset.model.recipe.get("frames", {}).get("thumbnail_width", 1) != 0
        self._encoding = threading.Lock()
        self._thumbnails = BoundedCache(MAX_THUMBNAIL_BYTES, lambda column: column.nbytes)
        self._titles = BoundedCache(MAX_TITLE_BYTES, lambda title: title.shots.nbytes + 4096)
        self._vectors = BoundedCache(MAX_VECTORS, lambda vector_D: 1)

    # ------------------------------------------------------------------------------------------------------------ opening

    def _open_spaces(self) -> dict[str, tuple[ShotIndex, str]]:
        """Return the index and the column of each kind of vectors that can be searched."""
        found: dict[str, tuple[ShotIndex, str]] = {}
        if self.index is None:
            return found
        indexes = [self.index]
        if second := self.config.explore.second_index:
            indexes.append(open_index(second, self.config.storage))
            facts = indexes[1].facts
            if facts.dataset_version != self.dataset.version or facts.kind == self.index.facts.kind:
                raise ConfigError(
                    f"explore.second_index: {second} holds {facts.describe()}; it must hold the {_other_kind(self.index)} vectors of "
                    f"dataset version {self.dataset.version}"
                )
        for index in reversed(indexes):
            found[index.facts.kind] = index, EMBEDDING
            found |= {name: (index, part_column(name)) for name in MODALITIES if part_column(name) in index.facts.dims}
        return {name: found[name] for name in SPACES if name in found}

    def _list_titles(self) -> dict[str, str]:
        """Return the name of the object of every title, by title id in order."""
        found = {}
        for info in newest_objects(self.dataset.output.list(SHOTS)):
            encoded = object_key(info.name)[0]
            if CUT_ID not in encoded:
                found[decode_title(encoded)] = info.name
                continue
            try:
                found[self.dataset.output.facts(info.name)["title_id"]] = info.name
            except UNREADABLE as error:
                log.warning("%s cannot be read and is left out: %s", info.name, error)
        return dict(sorted(found.items()))

    def _open_words(self) -> Words:
        words = Words()
        for by in ("text", *WITH_WORDS):
            if self.index is None or by not in self.spaces:
                words.reasons[by] = self.problem or self.missing(by)
                continue
            try:
                words.encoders[by] = words_encoder(self.index, by, self.config.text, self.config.video, self.config.audio)
            except NO_QUERY as error:
                words.reasons[by] = str(error)
        return words

    def _check_pictures(self) -> str:
        """Return the reason why no picture can be searched with; empty where one can."""
        if self.index is None or "video" not in self.spaces:
            return self.problem or self.missing("video")
        try:
            check_has_words(self.index, "video", self.config.video)
        except NO_QUERY as error:
            return str(error)
        return ""

    # ------------------------------------------------------------------------------------------------------------ queries

    @property
    def kind(self) -> str:
        """The kind of vectors by which shots are compared if nothing else is asked for."""
        return self.index.facts.kind if self.index else "fused"

    @property
    def to_run(self) -> str:
        """The command that makes an index for this dataset."""
        words = [f"output.uri={self.config.output.uri}", f"index.uri={self.config.index.uri or '/data/index'}"]
        words += [f"dataset.version={self.dataset.version}"] if self.config.dataset.version else []
        words += ["index.replace=true"] if self.is_other else []
        return shlex.join(["mediafm", "index", *words])

    def missing(self, space: str) -> str:
        """Return the reason why there are no vectors of a kind, and what to do about it."""
        if self.index is None:
            return self.problem
        if space in MODALITIES:
            return f"The index has no {space} vectors: run mediafm index with index.parts, and index.replace=true."
        return (
            f"The index holds {self.index.facts.kind} vectors. For likeness by {space} ones: mediafm index "
            f"output.uri={self.config.output.uri} index.uri=FOLDER vectors.kind={space}, and then explore.second_index=FOLDER."
        )

    def words_vector(self, by: str, words: str) -> np.ndarray:
        """Return the vector of words. Raises ConfigError without a word."""

        def encode() -> np.ndarray:
            with self._encoding:
                encoded = self.words.encoders[by].encode([words])
            if not encoded.present_S[0]:
                raise ConfigError("there are no words to search for")
            return encoded.embeddings_SD[0]

        return self._vectors.get((by, words), encode)

    def add_picture(self, name: str, jpeg: bytes) -> None:
        """Keep the vector of a JPEG file as that of the picture ``name``."""

        def encode() -> np.ndarray:
            with self._encoding:
                return self._picture_encoder.encode([[jpeg]]).embeddings_SD[0]

        self._vectors.get(("picture", name), encode)

    def picture_vector(self, name: str) -> np.ndarray:
        """Return the vector of a picture. Raises DatasetError where it is not kept any more."""
        found = self._vectors.peek(("picture", name))
        if found is None:
            raise DatasetError("the picture is not kept any more: choose it again")
        return found

    @cached_property
    def _picture_encoder(self) -> Any:
        """The image tower, which is loaded for the first picture: it is large."""
        return build_video_encoder(self.config.video)

    # ------------------------------------------------------------------------------------------------------------- titles

    def title(self, title_id: str) -> StoredTitle:
        """Return the facts and the shots of a title. Raises DatasetError for an unknown one."""

        def read() -> StoredTitle:
            shots = self._read(title_id, ROW_COLUMNS)
            return StoredTitle(title_facts(shots), shots.combine_chunks())

        self._known(title_id)
        return self._titles.get(title_id, read)

    def thumbnail(self, title_id: str, shot: int) -> bytes:
        """Return the JPEG of a shot's middle frame; empty where none is stored. Raises DatasetError for an unknown title or shot."""
        self.title(title_id).check(shot)
        return self._thumbnails.get(title_id, lambda: self._read(title_id, ["thumbnail"])["thumbnail"])[shot].as_py()

    def _known(self, title_id: str) -> str:
        if title_id not in self.objects:
            if len(title_id) > MAX_ID_LENGTH:
                raise DatasetError("the dataset has no title with so long an id")
            raise DatasetError(f"the dataset has no title {title_id!r}{suggest_titles(title_id, list(self.objects))}")
        return self.objects[title_id]

    def _read(self, title_id: str, columns: Sequence[str]) -> pa.Table:
        """Read columns of a title; where its object was superseded since the start, of its successor. Raises DatasetError."""
        for _ in range(2):
            name = self._known(title_id)
            try:
                return self.dataset.output.table(name, columns)
            except FileNotFoundError:
                self.objects[title_id] = self.dataset.title_object(title_id)
            except UNREADABLE as error:
                raise DatasetError(f"{name} cannot be read ({type(error).__name__}: {error}): run mediafm verify") from error
        raise DatasetError(f"{name} was removed while it was read: load the page again")


def _other_kind(index: ShotIndex) -> str:
    return "contextual" if index.facts.kind == "fused" else "fused"


def _open_index(config: ExploreCatalogConfig) -> tuple[ShotIndex | None, str]:
    """Open the configured index, or return the reason why there is none."""
    if not config.index.uri:
        return None, "no index was given (index.uri)"
    try:
        index = open_index(config.index.uri, config.storage)
        check_index(index, config.index)
    except (DatasetError, StorageError) as error:
        return None, str(error)
    return index, ""
