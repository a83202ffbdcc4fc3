"""The layout of an output: the names of its objects.

    <output>/<dataset version>/model.json
    <output>/<dataset version>/shots/shard=<00..ff>/<title>@<source>.parquet
    <output>/<dataset version>/contextual-<checkpoint>/shard=<00..ff>/<title>@<source>.parquet
    <output>/<dataset version>/scenes-<fused|contextual>-<options>/shard=<00..ff>/<title>@<source>.parquet
    <output>/<dataset version>/titles-<fused|contextual>-<options>/shard=<00..ff>/<title>@<source>.parquet
    <output>/<dataset version>/failures/shard=<00..ff>/<title>@<source>.json
    <output>/<dataset version>/compacted/<dataset>/shard=<00..ff>/titles.parquet     merged titles, see merged.py and compaction.py
    <output>/leases/<dataset version>/...                                       leases of running jobs, see lease.py
    <output>/runs/<UTC time>-<id>/...                                           the logs of every run, see runs/run_log.py

The listing is the ledger: an object that exists is committed, and what is pending is the catalog minus the listing. There is no journal.
A merged file counts as the objects of its titles. An object of a title, whatever its source, is newer than merged rows of the title and
hides them.
"""

from __future__ import annotations

import hashlib
import re
import urllib.parse
from collections.abc import Mapping
from typing import Any

from mediafm_ray.spec import digest_of
from mediafm_ray.storage.store import percent_encode

SHOTS = "shots"
FAILURES = "failures"
SCENES = "scenes"  # Scenes and titles are derived from the vectors of shots: see derived().
TITLES = "titles"
LEASES = "leases"
MODEL = "model.json"
DERIVED_DIGITS = 12  # hex digits in the name of a derived dataset
MAX_NAME_BYTES = 160  # The title's share of an object's name, of which file systems allow 255 bytes.
VERSION_PATTERN = re.compile(r"[0-9a-f]{12}")
DATASET_PATTERN = re.compile(r"shots|failures|contextual-.+|(?:scenes|titles)-(?:fused|contextual)-[0-9a-f]{12}")
OBJECT_PATTERN = re.compile(r"shard=[0-9a-f]{2}/(?P<title>[^/@]+)@(?P<source>[^/@.]+)\.(?:parquet|json)")


def contextual(checkpoint: str) -> str:
    """Return the name of the dataset of a contextualiser's checkpoint."""
    return f"contextual-{checkpoint}"


def derived(kind: str, vectors: str, recipe: Mapping[str, Any]) -> str:
    """Return the name of a dataset that is made from the vectors of shots, such as ``scenes-contextual-<12 hex digits>``.

    ``kind``: SCENES or TITLES. The digits are a digest of the dataset ``vectors`` that it is made from (``shots``: their fused vectors)
    and of the ``recipe``: the options, and whatever else changes its content.
    """
    source = "fused" if vectors == SHOTS else "contextual"
    return f"{kind}-{source}-{digest_of({'vectors': vectors, 'recipe': dict(recipe)})[:DERIVED_DIGITS]}"


def lease_folder(dataset_version: str) -> str:
    """Return the folder of a dataset version's lease below the output: beside the version, which may not exist yet."""
    return f"{LEASES}/{dataset_version}"


def compaction_lease_folder(dataset_version: str) -> str:
    """Return the folder of the lease of a dataset version's compaction, which runs beside the jobs that write titles."""
    return f"{LEASES}/{dataset_version}-compaction"


def encode_title(title_id: str) -> str:
    """Encode a title id for an object's name. A long id is cut and ends in '~' and its digest."""
    encoded = percent_encode(title_id)
    if len(encoded) <= MAX_NAME_BYTES:
        return encoded
    beginning = re.sub(r"%[0-9A-F]?$", "", encoded[: MAX_NAME_BYTES - 33])
    return f"{beginning}~{hashlib.sha256(title_id.encode()).hexdigest()[:32]}"


def decode_title(encoded: str) -> str:
    """Return the title id for messages: the inverse of ``encode_title``, but that a long id stays cut."""
    return urllib.parse.unquote(encoded)


def object_key(name: str) -> tuple[str, str]:
    """Return the encoded title and the source in the name of a title's object. Raises ValueError for any other name."""
    match = OBJECT_PATTERN.fullmatch(name.split("/", 1)[-1])
    if match is None:
        raise ValueError(f"{name} is not the name of a title's object")
    return match["title"], match["source"]


def matching_object(name: str, dataset: str) -> str:
    """Return the name of the object of the same title and source in another dataset."""
    ending = "json" if dataset == FAILURES else "parquet"
    return f"{dataset}/{name.split('/', 1)[1].rsplit('.', 1)[0]}.{ending}"


def shard_of(title_id: str) -> int:
    """Return the number of a title's shard, below SHARDS."""
    return hashlib.sha256(title_id.encode(errors="surrogatepass")).digest()[0]


def shard_name(number: int) -> str:
    """Return the name of a shard's folder."""
    return f"shard={number:02x}"


def object_name(dataset: str, title_id: str, source: str) -> str:
    """Return the name of a title's object below the dataset version."""
    ending = "json" if dataset == FAILURES else "parquet"
    return f"{dataset}/{shard_name(shard_of(title_id))}/{encode_title(title_id)}@{source}.{ending}"
