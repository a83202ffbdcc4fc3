"""Read the content of the HTML pages from the committed objects of a dataset version, and write the pages. No ray here.

<output>/<dataset version>/pages/index.html
<output>/<dataset version>/pages/titles/<title>.html
<output>/<dataset version>/pages/titles.parquet          what index.html says of each object, so that the next one reads only new objects
"""

from __future__ import annotations

import dataclasses
import math
import urllib.parse
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mediafm_ray.derive.reader import suggest_titles
from mediafm_ray.downstream.catalog_pages import CatalogContent, CatalogTitle
from mediafm_ray.downstream.pages import TitleContent, title_page
from mediafm_ray.runs.report import SUMMARY
from mediafm_ray.runs.run_log import RUNS
from mediafm_ray.spec import MODALITIES, parse_json
from mediafm_ray.storage.dataset import DatasetError, EmbeddingDataset, newest_objects, parse_failure, title_facts
from mediafm_ray.storage.merged import DamagedRows
from mediafm_ray.storage.names import FAILURES, SCENES, SHOTS, contextual, decode_title, encode_title, object_key, object_name
from mediafm_ray.storage.schemas import embedding_values, encode_parquet, read_facts
from mediafm_ray.storage.store import ObjectInfo, Store
from mediafm_ray.text import public_line, public_uri

PAGES = "pages"
INDEX = "index.html"
READING_THREADS = 16  # A GET from object storage mostly waits.
MAX_PICTURES = 300  # The list of a larger catalog has no pictures, which would make the page too large.
KEPT = "titles.parquet"
KEPT_SCHEMA = pa.schema(
    [
        ("object", pa.string()),
        ("modified", pa.float64()),  # Modification time of the object; one that was written again is read again.
        ("title_id", pa.string()),
        ("duration_s", pa.float64()),
        ("shots", pa.int64()),
        ("warnings", pa.list_(pa.string())),
    ]
)
UNREADABLE = (pa.ArrowException, OSError, ValueError, KeyError, DamagedRows)  # errors of an object that is damaged or not of this program


def pages_folder(dataset: EmbeddingDataset) -> str:
    """Return the URI of the folder of a dataset version's pages."""
    return f"{dataset.output.store.uri}/{PAGES}"


def title_page_name(title_id: str) -> str:
    """Return the name of a title's page below the folder of pages."""
    return _page_of(encode_title(title_id))


def _page_of(title: str) -> str:
    return f"titles/{title}.html"


# -------------------------------------------------------------------------------------------------------- one title


def title_content(dataset: EmbeddingDataset, title_id: str, index: str = "") -> TitleContent:
    """Read the content of a title's page: its shots, and the contextual embeddings and scenes that were made from these shots.

    Raises DatasetError, with the reason or with similar titles, where the title is not committed.
    """
    try:
        shots = dataset.title(title_id)
    except DatasetError as error:
        raise DatasetError(f"{error}{_explain_missing(dataset, title_id)}") from None
    facts = title_facts(shots)
    vectors = {"fused": dataset.embeddings(shots)}
    notes = []
    in_context, note = _newest_of_title(dataset, contextual(""), title_id, facts["source"], "contextual embeddings")
    if in_context is not None:
        vectors["contextual"] = embedding_values(in_context["contextual_embedding"])
    notes += [note] if note else []
    scenes, note = _newest_of_title(dataset, f"{SCENES}-", title_id, facts["source"], "scenes")
    notes += [note] if note else []
    for modality in MODALITIES:
        if any(shots[f"has_{modality}"].to_pylist()):
            vectors[modality] = dataset.embeddings(shots, modality)
    return TitleContent(shots, facts, vectors, scenes, notes, index)


def _newest_of_title(dataset: EmbeddingDataset, prefix: str, title_id: str, source: str, what: str) -> tuple[pa.Table | None, str]:
    """Read the rows of a title in the last written dataset of a kind, or return None and a note for the page."""
    found: list[ObjectInfo] = []
    for name in dataset.names():
        if name.startswith(prefix):
            shard = object_name(name, title_id, source).split("/")[1]
            objects = dataset.output.list(name, shard)
            found += [info for (title, _), infos in objects.items() if title == encode_title(title_id) for info in infos]
    if not found:
        return None, f"No {what} of this title are stored."
    fitting = [info for info in found if object_key(info.name)[1] == source]
    if not fitting:
        return None, f"The stored {what} of this title are of another version of its source: run the job that writes them again."
    return dataset.read(max(fitting, key=lambda info: (info.modified, info.name)).name), ""


def _explain_missing(dataset: EmbeddingDataset, title_id: str) -> str:
    """Return the end of a message about a missing title: the reason of its failure or, without one, similar titles."""
    failures = [infos[0] for (title, _), infos in dataset.output.list(FAILURES).items() if title == encode_title(title_id)]
    if failures:
        record = _failure(dataset, failures[0])
        return f"; it failed in {record.get('stage')}: {record.get('message')}"
    return suggest_titles(title_id, sorted({decode_title(title) for title, _ in dataset.output.list(SHOTS)}))


# -------------------------------------------------------------------------------------------------------- a catalog


def catalog_content(dataset: EmbeddingDataset, output_uri: str, pages: Store) -> CatalogContent:
    """Read the content of a catalog's page: length, shots, warnings and failure of every title, and links to the pages in ``pages``.

    Threads read little more than the end of each object that is new since the last page; ``pages`` keeps what they read.
    """
    there = {info.name for info in pages.list("titles")}
    committed = newest_objects(dataset.output.list(SHOTS))
    failures = newest_objects(dataset.output.list(FAILURES))
    pictured = len(committed) <= MAX_PICTURES
    kept = {} if pictured else _read_kept(pages)
    new = [info for info in committed if (info.name, info.modified) not in kept]
    dataset.output.store.prime_listing_cache(new)
    with ThreadPoolExecutor(READING_THREADS) as threads:
        records = list(threads.map(lambda info: _failure(dataset, info), failures))
        read = dict(
            zip(((info.name, info.modified) for info in new), threads.map(lambda info: _light(dataset, info, pictured), new), strict=True)
        )
    found = [(info.name, kept.get((info.name, info.modified)) or read[info.name, info.modified]) for info in committed]
    if new and not pictured:
        _write_kept(pages, committed, [title for _, title in found])
    failed = {object_key(info.name)[0]: record for info, record in zip(failures, records, strict=True)}
    titles = [_completed(name, title, failed, there) for name, title in found]
    done = {object_key(info.name)[0] for info in committed}
    titles += [CatalogTitle(record["title_id"], failure=record) for title, record in failed.items() if title not in done]
    return CatalogContent(
        name=public_uri(output_uri),
        dataset_version=dataset.version,
        titles=titles,
        run=_run_summary(output_uri, dataset),
        dims=dataset.model.dims,
    )


def _read_kept(pages: Store) -> dict[tuple[str, float], CatalogTitle]:
    """Read the titles of the last page by the name and the time of their object; none where the file is missing or damaged."""
    try:
        table = pq.read_table(pa.BufferReader(pages.read(KEPT)), schema=KEPT_SCHEMA, page_checksum_verification=True)
        rows = zip(*(table[name].to_pylist() for name in KEPT_SCHEMA.names), strict=True)
    except (FileNotFoundError, pa.ArrowException, OSError, ValueError):  # All objects are read instead.
        return {}
    return {(name, modified): CatalogTitle(*row) for name, modified, *row in rows}


def _write_kept(pages: Store, committed: Sequence[ObjectInfo], titles: Sequence[CatalogTitle]) -> None:
    rows = [
        (info.name, info.modified, title.title_id, title.duration_s, title.shots, list(title.warnings))
        for info, title in zip(committed, titles, strict=True)
        if title.failure is None  # A damaged object is looked at again.
    ]
    columns = list(zip(*rows, strict=True)) or [()] * len(KEPT_SCHEMA)
    table = pa.table([pa.array(column, field.type) for column, field in zip(columns, KEPT_SCHEMA, strict=True)], KEPT_SCHEMA)
    pages.write(KEPT, encode_parquet(table, {}))


def _failure(dataset: EmbeddingDataset, info: ObjectInfo) -> Mapping[str, Any]:
    try:
        return parse_failure(dataset.output.store.read(info.name))
    except (FileNotFoundError, ValueError) as error:  # A damaged record is a line of the list.
        reason = f"{info.name} is not a failure record ({error}): mediafm verify can remove it"
        title = decode_title(object_key(info.name)[0])
        return {"title_id": title, "stage": "reading back", "type": type(error).__name__, "message": reason}


def _light(dataset: EmbeddingDataset, info: ObjectInfo, pictured: bool) -> CatalogTitle:
    """Read the facts, the number of shots and the picture of the middle shot, which is little more than the object's end."""
    try:
        table = dataset.output.table(info.name, ["thumbnail"] if pictured else [])
        facts, shots = read_facts(table.schema), table.num_rows
        picture = table["thumbnail"][shots // 2].as_py() if pictured and shots else b""
        media = facts.get("media", {})
        return CatalogTitle(facts["title_id"], media.get("duration_s", 0.0), shots, media.get("warnings", ()), picture=picture)
    except UNREADABLE as error:  # A damaged object is a line of the list.
        reason = f"{info.name} cannot be read ({public_line(str(error))}): delete it and run the job that wrote it again"
        failure = {"stage": "reading back", "type": type(error).__name__, "message": reason}
        return CatalogTitle(decode_title(object_key(info.name)[0]), failure=failure)


def _completed(name: str, title: CatalogTitle, failed: Mapping[str, Mapping[str, Any]], there: Set[str]) -> CatalogTitle:
    """Add its failure and the link to its page to a title. ``name``: its object; ``there``: the pages that exist."""
    if title.failure:
        return title
    key, source = object_key(name)
    failure, page = failed.get(key), title_page_name(title.title_id)
    is_later = failure and failure.get("source") != source  # Otherwise, a retry of this source has succeeded since.
    return dataclasses.replace(title, failure=failure if is_later else None, page=urllib.parse.quote(page) if page in there else "")


def _run_summary(output_uri: str, dataset: EmbeddingDataset) -> Mapping[str, Any] | None:
    """Read the summary of the last run that computed something or, where none has, of the last run; None where there is none.

    A nightly run mostly finds nothing to do; its summary says nothing about the catalog. ``idle_runs_since`` counts such runs.
    """
    store = Store(output_uri, dataset.output.store.config)
    last = _read_summary(store, SUMMARY)
    if last is None or _computed(last):
        return last
    kept = sorted((info.name for info in store.list(f"{RUNS}/") if info.name.endswith(f"/{SUMMARY}")), reverse=True)
    for idle, name in enumerate(kept):
        summary = _read_summary(store, name)
        if summary is not None and _computed(summary):
            return {**summary, "idle_runs_since": idle}
    return last


def _read_summary(store: Store, name: str) -> Mapping[str, Any] | None:
    try:
        content = parse_json(store.read(name))
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _computed(summary: Mapping[str, Any]) -> bool:
    titles = summary.get("titles")
    return isinstance(titles, dict) and any(titles.get(ending) for ending in ("ok", "failed", "lost"))


# -------------------------------------------------------------------------------------------------------- writing


def write_title_page(dataset: EmbeddingDataset, title_id: str, pages: Store, name: str = "", index: str = "") -> str:
    """Write the page of a title below ``pages``, by default under ``title_page_name``; return its URI. Raises DatasetError."""
    name = name or title_page_name(title_id)
    pages.write(name, title_page(title_content(dataset, title_id, index)).encode())
    return f"{pages.uri}/{name}"


def titles_to_write(dataset: EmbeddingDataset, pages: Store) -> list[str]:
    """List the ids of the committed titles in order whose page is missing or older than an object that it shows.

    A folder of pages in another place has a clock of its own: then all are listed. Titles whose objects cannot be read, which the
    catalog's page names, are left out.
    """
    changed: dict[str, float] = defaultdict(float)  # Time of the last object of a title, by encoded title.
    shots = dataset.output.list(SHOTS)
    if pages.uri.startswith(f"{dataset.output.store.uri}/"):
        others = [name for name in dataset.names() if name.startswith((contextual(""), f"{SCENES}-"))]
        for listing in (shots, *map(dataset.output.list, others)):
            for (title, _), infos in listing.items():
                changed[title] = max(changed[title], *(info.modified for info in infos))
    written = {info.name: info.modified for info in pages.list("titles")} if changed else {}
    objects = [info for info in newest_objects(shots) if not _is_newer(written, changed, object_key(info.name)[0])]
    dataset.output.store.prime_listing_cache(objects)
    with ThreadPoolExecutor(READING_THREADS) as threads:
        return sorted(title_id for title_id in threads.map(lambda info: _title_id(dataset, info), objects) if title_id is not None)


def _is_newer(written: Mapping[str, float], changed: Mapping[str, float], title: str) -> bool:
    return written.get(_page_of(title), 0.0) > changed.get(title, math.inf)


def _title_id(dataset: EmbeddingDataset, info: ObjectInfo) -> str | None:
    try:
        return dataset.output.facts(info.name)["title_id"]
    except UNREADABLE:
        return None
