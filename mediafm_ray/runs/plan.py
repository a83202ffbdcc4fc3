"""The plan of a job: the catalog minus the listing of the output. Runs on the driver, without ray and without torch."""

from __future__ import annotations

import contextlib
import functools
import math
import operator
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from mediafm_ray.config.jobs import ContextualiseCatalogConfig, EmbedCatalogConfig
from mediafm_ray.config.loader import ConfigError
from mediafm_ray.media.options import media_recipe
from mediafm_ray.models import weights
from mediafm_ray.models.encoder import encoder_dim, encoder_sample_rate, weights_digest
from mediafm_ray.models.fusion import fusion_recipe, spans
from mediafm_ray.models.options import BUILTIN_NEIGHBOURS, ContextualiserConfig, DetectorConfig
from mediafm_ray.pipeline.rows import PLAN_SCHEMA, plan_table
from mediafm_ray.spec import SHARDS, digest_of, recipe_of
from mediafm_ray.storage.catalog import SOURCE_DIGITS, Catalog, Entry, open_catalog
from mediafm_ray.storage.catalog_rows import BadRow
from mediafm_ray.storage.dataset import Model, Output, dataset_versions, record_failure
from mediafm_ray.storage.listing import Kept, Listing, keep_listing, read_listing
from mediafm_ray.storage.names import FAILURES, SHOTS, contextual, object_name
from mediafm_ray.storage.partitions import Partitions, SortedTables, scratch_folder
from mediafm_ray.storage.store import ObjectInfo, StorageError
from mediafm_ray.storage.workers import Workers, few_collections
from mediafm_ray.text import public_line

NUMERICS_VERSION = 2  # Part of the dataset version: raise it with a change of the code that changes the numbers.
VERSION_DIGITS = 12  # Hex digits of a dataset version.
BUILTIN = {"builtin": BUILTIN_NEIGHBOURS, "revision": 1}  # Raise the revision with a change that changes its numbers.
BUILTIN_DATASET = contextual(digest_of(BUILTIN)[:VERSION_DIGITS])  # For builtin:neighbours with its default options.
ROWS_AT_ONCE = 20_000  # Titles, or objects of a dataset, that are in memory at once, but at least those of a shard.
IN_CATALOG, WITH_SHOTS = "in_catalog", "with_committed_shots"  # The titles that a job starts from.
CHECKPOINT_TYPES = ("mediafm_contextualiser", "mediafm_neighbour_attention")  # The model_type in the config.json of a contextualiser.
PENDING_SCHEMA = pa.schema(  # What a plan needs of a pending title; the order of the titles is found when all are known.
    [
        *PLAN_SCHEMA,
        ("position", pa.int64()),  # See Entry.
        ("modified", pa.float64()),
        ("has_shots", pa.bool_()),  # Its shots are committed from its present source.
        ("stored", pa.string()),  # Name below the output of an object with the facts of its present source; null if there is none.
    ]
)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Plan:
    """The pending titles of a run and their place in the output."""

    model: Model
    checkpoint: str  # Name of the contextualiser's checkpoint; empty when none is configured.
    pending: pa.Table  # rows.PLAN_SCHEMA, or stored.STORED_SCHEMA where only step 6 is to be done.
    titles: int  # Titles in the catalog, or with committed shots.
    done: int  # Titles that are committed already.
    failed_before: int  # Titles passed over because of a failure record (run.retry_failed=false).
    left: int  # Pending titles beyond run.max_titles.
    only_contextual: int  # Pending titles that lack only the embeddings of a new checkpoint.
    leftovers: tuple[ObjectInfo, ...]  # Objects whose removal an earlier run did not finish.
    outdone: tuple[str, ...] = ()  # Objects to write again, because their source was changed back and a leftover is newer.
    bad_rows: tuple[BadRow, ...] = ()  # Rows of the catalog that are passed over (catalog.on_error=skip).
    unknown: tuple[tuple[str, str], ...] = ()  # Titles passed over because their source cannot be looked up, and the reasons.
    given_up: int = 0  # Titles of failed_before that no run takes until something changes.
    without_context: int = 0  # Finished titles without embeddings of builtin:neighbours.
    titles_are: str = IN_CATALOG  # The key of ``titles`` in summaries.

    @property
    def bad_titles(self) -> Mapping[str, Sequence[str]]:
        """The problems of each title whose row is bad, by title."""
        found: dict[str, list[str]] = defaultdict(list)
        for row in self.bad_rows:
            found[row.name].append(str(row))
        return found


def describe_model(config: EmbedCatalogConfig) -> Model:
    """Return all that decides the numbers of a dataset version, and its digest.

    Raises WeightsError for weights that are missing, ConfigError for encoders that do not exist.
    """
    try:
        dims = {"video": encoder_dim(config.video), "audio": encoder_dim(config.audio), "text": encoder_dim(config.text)}
    except ValueError as error:
        raise ConfigError(str(error)) from error
    recipe = {
        "arithmetic": NUMERICS_VERSION,
        "detector": detector_recipe(config.detector),
        "frames": recipe_of(config.frames),
        "media": media_recipe(config.media, encoder_sample_rate(config.audio)),
        "timed_text": recipe_of(config.timed_text),
        "video": encoder_recipe(config.video, weights_digest(config.video)),
        "audio": encoder_recipe(config.audio, weights_digest(config.audio)),
        "text": encoder_recipe(config.text, weights_digest(config.text)),
        "fusion": fusion_recipe(config.fusion),
    }
    return Model(digest_of(recipe)[:VERSION_DIGITS], recipe, {**dims, "fused": sum(dims.values())}, spans(dims))


@dataclass(frozen=True)
class Survey:
    """The titles of the catalog and their objects in one or several shards."""

    entries: Sequence[Entry]  # In the order of their ids.
    model: Model
    checkpoint: str  # Name of the contextualiser's checkpoint; empty when none is configured.
    output: Output
    listed: Mapping[str, Listing]  # Listings by dataset.
    versions: Mapping[str, Listing]  # Listings of the shots of other dataset versions.

    @property
    def failures(self) -> Listing:
        """The failure records."""
        return self.listed.get(FAILURES, {})

    @cached_property
    def wanted(self) -> Sequence[Listing]:
        """The listings that have a title which is done, the shots first.

        A missing object of builtin:neighbours is no reason to read a video again: it is the default, and a catalog may have been embedded
        without it. New titles get it with their shots.
        """
        trained = self.checkpoint and contextual(self.checkpoint) != BUILTIN_DATASET
        names = [SHOTS, *([contextual(self.checkpoint)] if trained else [])]
        return [self.listed.get(name, {}) for name in names]

    @cached_property
    def objects_of_title(self) -> Mapping[str, Sequence[tuple[str, ObjectInfo]]]:
        """The objects of every title, in all datasets, with their sources."""
        found: dict[str, list[tuple[str, ObjectInfo]]] = defaultdict(list)
        for listing in self.listed.values():
            for (title, source), infos in listing.items():
                found[title] += [(source, info) for info in infos]
        return found

    def is_done(self, entry: Entry) -> bool:
        """Return whether all wanted objects of a title are committed from its present source."""
        return all(entry.key in listing for listing in self.wanted)

    def lacks_context(self, entry: Entry) -> bool:
        """Return whether a title that is done has no embeddings of the configured contextualiser."""
        return bool(self.checkpoint) and entry.key not in self.listed.get(contextual(self.checkpoint), {})

    @cached_property
    def titles_with_shots(self) -> Set[str]:
        """The titles whose shots are committed from any source."""
        return {title for title, _ in self.listed.get(SHOTS, {})}

    def is_unknown(self, entry: Entry) -> bool:
        """Return whether a title is passed over, because its source cannot be compared with the committed one.

        A title without committed shots is passed over only during an outage: otherwise, processing it shows what is wrong.
        """
        return bool(entry.unknown) and not self.is_done(entry) and (entry.is_outage or entry.key[0] in self.titles_with_shots)

    def others(self, entry: Entry) -> list[ObjectInfo]:
        """Return the objects of a title's other sources in the order of their removal (``shots_first``)."""
        title, source = entry.key
        found = [info for other, info in self.objects_of_title.get(title, ()) if other != source]
        return shots_first(found) if found else found

    def leftovers(self, entry: Entry) -> list[ObjectInfo]:
        """Return the objects that a finished title should no longer have: those of other sources, and records of failures.

        Another job may have committed them later, from a source that the catalog had for a time. The catalog decides, because it is read
        after the listing (see ``survey``).
        """
        if entry.unknown:
            return []
        return [*self.others(entry), *self.failures.get(entry.key, ())]

    def outdone(self, entry: Entry) -> list[str]:
        """Return the objects of a finished title that readers pass over, because one of another source is at least as new."""
        newest: dict[str, float] = {}  # Modification time of another source's object, by dataset.
        for info in [] if entry.unknown else self.others(entry):
            dataset = info.name.split("/")[0]
            newest[dataset] = max(newest.get(dataset, -math.inf), info.modified)
        own = [(info, modified) for dataset, modified in newest.items() for info in self.listed[dataset].get(entry.key, ())]
        return [info.name for info, modified in own if info.modified <= modified]

    def row(self, entry: Entry) -> dict[str, Any]:
        """Return a pending title as a row of the plan."""
        title = entry.title
        return {
            "title_id": title.title_id,
            "source": entry.source,
            "video": title.video,
            "timed_text": [{"uri": text.uri, "language": text.language, "kind": text.kind} for text in title.timed_text],
            "synopsis": title.synopsis,
            "tags": list(title.tags),
            "superseded": [info.name for info in self.others(entry)],
            "expected_bytes": entry.size,
            "expected_s": entry.duration_s,
        }


def shots_first(infos: Iterable[ObjectInfo]) -> list[ObjectInfo]:
    """Return objects in the order of their removal, shots first: shots that a kill left without their other objects would count as done."""
    return sorted(infos, key=lambda info: not info.name.startswith(f"{SHOTS}/"))


@dataclass(frozen=True)
class Surveys:
    """The catalog against the listings, shard by shard: a title and its objects are in the same one, by a digest of its id."""

    catalog: Catalog
    bad_rows: Sequence[BadRow]  # Rows of the catalog that are skipped.
    model: Model
    checkpoint: str  # Name of the contextualiser's checkpoint; empty when none is configured.
    output: Output
    listed: Mapping[str, Partitions[Kept]]  # Listings by dataset.
    versions: Mapping[str, Partitions[Kept]]  # Listings of the shots of other dataset versions.
    scratch: Path  # A temporary folder.
    shards: range  # Those that the run takes.
    workers: Workers

    def each(self, work: Callable[[Survey], Result]) -> Iterator[Result]:
        """Yield ``work`` of the surveys of the run's shards in order, of a small catalog all at once: its sources are looked up together.

        ``work`` and what it returns can be pickled, because processes do it where a catalog is large. Raises StorageError where sources
        cannot be looked up.
        """
        rows = max(self.catalog.titles, *(kept.rows for kept in [*self.listed.values(), *self.versions.values()]), 1)
        size = max(1, ROWS_AT_ONCE * SHARDS // rows)
        parts = [self.shards[start : start + size] for start in range(0, len(self.shards), size)]
        return self.workers.map(functools.partial(_survey_of, self, work), parts, rows)

    def pending(self, *order: tuple[str, str]) -> SortedTables:
        """Return an empty collection of pending titles that has them in an order of PENDING_SCHEMA's columns."""
        return SortedTables(self.scratch, "pending", PENDING_SCHEMA, order)


def _survey_of(there: Surveys, work: Callable[[Survey], Result], shards: Sequence[int]) -> Result:
    listed = {dataset: read_listing(kept, shards) for dataset, kept in there.listed.items()}
    versions = {version: read_listing(kept, shards) for version, kept in there.versions.items()}
    return work(Survey(there.catalog.entries(shards), there.model, there.checkpoint, there.output, listed, versions))


@contextlib.contextmanager
def survey(config: EmbedCatalogConfig, model: Model | None = None, with_others: bool = False) -> Iterator[Surveys]:
    """List the output once, then read the catalog. Writes nothing but temporary files, which the context manager removes.

    ``model``: the result of ``describe_model``, if it is known; ``with_others``: whether to list other dataset versions, too.
    In this order, objects that another job commits meanwhile from a source that is newer than this catalog are not in the listing.
    Raises CatalogError with every problem of the catalog, StorageError, and what ``describe_model`` and ``checkpoint_name`` raise.
    """
    if not config.output.uri:
        raise ConfigError("output.uri is required: a folder or bucket prefix that receives the datasets")
    model = model or describe_model(config)
    checkpoint = checkpoint_name(config, model)
    output = Output(config.output.uri, model.dataset_version, config.storage)
    output.store.check_readable()
    shards = config.run.shard_numbers
    with few_collections(), scratch_folder("plan") as scratch, Workers() as workers:
        listed = {dataset: keep_listing(output, dataset, scratch, shards, workers) for dataset in output.datasets()}
        versions = dataset_versions(config.output.uri, config.storage) if with_others else []
        others = [Output(config.output.uri, version, config.storage) for version in versions if version != model.dataset_version]
        shots = {other.dataset_version: keep_listing(other, SHOTS, scratch, shards, workers) for other in others}
        skipped: list[BadRow] = []
        catalog = open_catalog(config.catalog.uri, config.storage, scratch, skipped if config.catalog.on_error == "skip" else None, workers)
        yield Surveys(catalog, skipped, model, checkpoint, output, listed, shots, scratch, shards, workers)


def pending_table(there: Survey, entries: Sequence[Entry], elsewhere: Mapping[tuple[str, str], str] | None = None) -> pa.Table:
    """Return pending titles of a survey as a table of PENDING_SCHEMA.

    ``elsewhere``: names below the output of shots that are committed under other dataset versions.
    """
    shots, others = there.wanted[0], elsewhere or {}
    found = [shots.get(entry.key) for entry in entries]
    here = [f"{there.model.dataset_version}/{infos[0].name}" if infos else None for infos in found]
    columns = {
        "position": [entry.position for entry in entries],
        "modified": [float(entry.modified) for entry in entries],
        "has_shots": [infos is not None for infos in found],
        "stored": [name or others.get(entry.key) for name, entry in zip(here, entries, strict=True)],
    }
    table = plan_table(map(there.row, entries))
    for name, values in columns.items():
        table = table.append_column(PENDING_SCHEMA.field(name), pa.array(values, PENDING_SCHEMA.field(name).type))
    return table


def in_order(found: Iterable[tuple[str, Result]]) -> list[Result]:
    """Return what was found of titles, shard by shard, in the order of the titles' ids."""
    return [one for _, one in sorted(found, key=operator.itemgetter(0))]


@dataclass
class Compared:
    """The part of a plan that the titles of a survey, or of several, give."""

    pending: pa.Table  # PENDING_SCHEMA
    counts: Counter[str] = field(default_factory=Counter)  # Titles by class.
    leftovers: list[tuple[str, ObjectInfo]] = field(default_factory=list)  # With the ids of their titles, as are the next two.
    outdone: list[tuple[str, str]] = field(default_factory=list)
    unknown: list[tuple[str, str]] = field(default_factory=list)

    def add_done(self, there: Survey, entry: Entry) -> None:
        """Add the objects of a finished title that need something."""
        self.leftovers += ((entry.title.title_id, info) for info in there.leftovers(entry))
        self.outdone += ((entry.title.title_id, name) for name in there.outdone(entry))

    def take(self, other: Compared) -> None:
        """Add what was found of other titles, but for those that are pending."""
        self.counts.update(other.counts)
        self.leftovers += other.leftovers
        self.outdone += other.outdone
        self.unknown += other.unknown


def _compare(retry_failed: bool, there: Survey) -> Compared:
    """Compare the titles of a survey with their objects."""
    found = Compared(PENDING_SCHEMA.empty_table())
    counts = found.counts
    entries = []
    for entry in there.entries:
        if there.is_done(entry):
            counts["done"] += 1
            counts["without_context"] += there.lacks_context(entry)
            found.add_done(there, entry)
        elif there.is_unknown(entry):
            found.unknown.append((entry.title.title_id, entry.unknown))
        elif entry.key in there.failures and not retry_failed:
            counts["failed_before"] += 1
        else:
            counts["only_contextual"] += entry.key in there.wanted[0]
            entries.append(entry)
    found.pending = pending_table(there, entries)
    return found


def make_plan(config: EmbedCatalogConfig) -> Plan:
    """Return the titles of the catalog that are not committed. Writes nothing.

    Raises CatalogError with every problem of the catalog, StorageError, WeightsError.
    """
    with survey(config) as surveys:
        pending = surveys.pending(("title_id", "ascending"))
        found = Compared(PENDING_SCHEMA.empty_table())
        for part in surveys.each(functools.partial(_compare, config.run.retry_failed)):
            pending.add(part.pending)
            found.take(part)
        taken = pending.read(slice(config.run.max_titles or None)).select(PLAN_SCHEMA.names)
    return Plan(
        model=surveys.model,
        checkpoint=surveys.checkpoint,
        pending=taken,
        titles=surveys.catalog.titles,
        done=found.counts["done"],
        failed_before=found.counts["failed_before"],
        left=len(pending) - taken.num_rows,
        only_contextual=found.counts["only_contextual"],
        leftovers=tuple(in_order(found.leftovers)),
        outdone=tuple(in_order(found.outdone)),
        bad_rows=tuple(surveys.bad_rows),
        unknown=tuple(sorted(found.unknown)),
        without_context=found.counts["without_context"],
    )


def prepare_output(plan: Plan, config: EmbedCatalogConfig) -> None:
    """Check that the output can be written, write model.json, and finish the removals of earlier runs.

    Raises StorageError, and ConfigError for an embeddings API without a key.
    """
    text = config.text
    if plan.pending.num_rows and text.encoder == "openai" and not text.base_url and not os.environ.get(text.api_key_variable):
        raise ConfigError(f"text.encoder=openai needs a key: set the environment variable {text.api_key_variable}")
    output = Output(config.output.uri, plan.model.dataset_version, config.storage)
    output.store.check_writable()
    output.write_model(plan.model)
    for name in plan.outdone:
        try:
            output.store.write(name, output.read(name))
        except FileNotFoundError:
            raise StorageError(
                f"{output.store.uri}/{name} was removed while this run was planned: another job is at work; run the same command again"
            ) from None
    for leftover in plan.leftovers:  # One that was written again since belongs to a running job, which has another source of the title.
        output.remove(leftover.name, leftover.modified)
    for title_id, problems in plan.bad_titles.items():
        error = {"stage": "catalog", "type": "CatalogError", "message": public_line(f"{config.catalog.uri}: {'; '.join(problems)}")}
        source = digest_of([config.catalog.uri, title_id])[:SOURCE_DIGITS]
        record_failure(output, object_name(FAILURES, title_id, source), {"title_id": title_id, "source": source, "video": ""}, error)


def checkpoint_name(config: EmbedCatalogConfig | ContextualiseCatalogConfig, model: Model) -> str:
    """Return the 12 hex digits that name the dataset of the configured contextualiser; empty without one.

    They are the checkpoint's digest, or one of ``builtin:neighbours`` and its revision, or, where options change its numbers, a digest
    over both. Raises WeightsError for a checkpoint that is missing or cut short, ConfigError for one that was trained on other dimensions
    or another dataset version.
    """
    contextualiser = config.contextualiser
    address = contextualiser.checkpoint
    if not address:
        return ""
    changes = {name: value for name, value in recipe_of(contextualiser).items() if value != getattr(ContextualiserConfig, name)}
    if address == BUILTIN_NEIGHBOURS:
        return digest_of({**BUILTIN, **changes})[:VERSION_DIGITS]
    shape = weights.read_config(address)
    if shape.get("model_type", CHECKPOINT_TYPES[0]) not in CHECKPOINT_TYPES:
        raise weights.WeightsError(f"contextualiser.checkpoint={address}: this is a {shape['model_type']!r} checkpoint, no contextualiser")
    if shape.get("model_type") == CHECKPOINT_TYPES[1] and "max_logit" not in shape:
        raise weights.WeightsError(
            f"contextualiser.checkpoint={address}: it does not say how its corrections are bounded (it was written by an early version): "
            "train it again"
        )
    for key, dim, made_by in (("fused_dim", model.dims["fused"], "the encoders"), ("metadata_dim", model.dims["text"], "the text encoder")):
        if shape.get(key) != dim:
            raise ConfigError(
                f"contextualiser.checkpoint={address}: its {key} is {shape.get(key)}, and {made_by} of this dataset give {dim}: "
                "use the encoders that it was trained with, or another checkpoint"
            )
    trained_on = shape.get("dataset_version", "")
    if trained_on not in ("", model.dataset_version) and not contextualiser.any_dataset:
        raise ConfigError(
            f"contextualiser.checkpoint={address}: it was trained on dataset version {trained_on}, and this is {model.dataset_version}: "
            "its vectors mean something else; train one on this version, or set contextualiser.any_dataset=true if you know they are alike"
        )
    digest = weights.checkpoint_digest(address)
    return (digest_of({"checkpoint_sha256": digest, **changes}) if changes else digest)[:VERSION_DIGITS]


def detector_recipe(config: DetectorConfig) -> dict[str, Any]:
    """The detector's part of the recipe."""
    recipe = encoder_recipe(config, weights.digest(config.weights))
    # Before, a title was computed in windows of 250 frames, and then in float32 where it is now in integers of 8 bits.
    return recipe if config.exact else {**recipe, "title": "one sequence", "convolutions": "bfloat16 or int8"}


def encoder_recipe(config: Any, weights_sha256: str) -> dict[str, Any]:
    """Return a model's part of the recipe, with the digest of its weights in place of their location."""
    fields = recipe_of(config)
    fields.pop("weights", None)
    return {**fields, "weights_sha256": weights_sha256}
