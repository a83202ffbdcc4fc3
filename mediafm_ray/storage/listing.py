"""Listings of a dataset by shard: one listing while it is small, afterwards one for each shard, several at once."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from mediafm_ray.storage.base import ObjectInfo
from mediafm_ray.storage.dataset import Output
from mediafm_ray.storage.errors import StorageError
from mediafm_ray.storage.merged import COMPACTED
from mediafm_ray.storage.names import shard_name
from mediafm_ray.storage.partitions import Partitions
from mediafm_ray.storage.store import Store
from mediafm_ray.storage.workers import MIN_ROWS, Workers

MIN_SHARDS = 250  # So many of 256 shards have an object where there are a thousand objects or more: a page of a listing on S3.
LISTING_THREADS = 8
Listing = Mapping[tuple[str, str], list[ObjectInfo]]  # Keys are the encoded title and its source.

Kept = tuple[tuple[str, str], list[tuple[Any, ...]]]  # A key and its objects as plain values, which are written and read in half the time.
Result = TypeVar("Result")


def shards_of(output: Output, dataset: str, shards: Iterable[int]) -> list[str]:
    """Return what the listings of these shards of a dataset are made of: their names, or an empty name where one listing is enough."""
    places = (f"{output.store.uri}/{dataset}", f"{output.store.uri}/{COMPACTED}/{dataset}")
    names = {name for place in places for name in Store(place, output.store.config).folders()}
    return list(map(shard_name, shards)) if len(names) >= MIN_SHARDS else [""]


def list_shard(output: Output, dataset: str, shard: str) -> Listing:
    """List a shard of a dataset, or all of it. Raises StorageError, with the shard's name, where that is not possible."""
    try:
        return output.list(dataset, shard)
    except StorageError as error:
        raise StorageError(f"{output.store.uri}/{dataset}/{shard} cannot be listed: {error}") from error


def each_shard(shards: list[str], work: Callable[[str], Result]) -> Iterator[Result]:
    """Call ``work`` with every shard, some at once; yield the results in order. The first error ends it."""
    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        yield from pool.map(work, shards)


def keep_listing(output: Output, dataset: str, scratch: Path, shards: Iterable[int], workers: Workers) -> Partitions[Kept]:
    """List these shards of a dataset at least; return the listing by shard, in temporary files below ``scratch`` where it is large."""
    names = shards_of(output, dataset, shards)
    first, rest = names[:LISTING_THREADS], names[LISTING_THREADS:]
    list_part = functools.partial(_listing_of, output, dataset, scratch)
    kept = list_part(first)
    rows = kept.rows * len(names) // len(first)
    size = LISTING_THREADS if rows >= MIN_ROWS else max(1, len(rest))
    for found in workers.map(list_part, [rest[start : start + size] for start in range(0, len(rest), size)], rows):
        kept.take(found)
    return kept


def _listing_of(output: Output, dataset: str, scratch: Path, shards: list[str]) -> Partitions[Kept]:
    kept: Partitions[Kept] = Partitions(scratch, f"{output.dataset_version}-{dataset}")

    def keep(shard: str) -> None:
        found: dict[int, list[Kept]] = defaultdict(list)
        for key, infos in list_shard(output, dataset, shard).items():
            number = int(infos[0].name.split("/")[1].removeprefix("shard="), 16)
            found[number].append((key, list(map(tuple, infos))))
        for number, listing in found.items():
            kept.extend(number, listing)

    for _ in each_shard(shards, keep):
        pass
    return kept


def read_listing(kept: Partitions[Kept], shards: Iterable[int]) -> Listing:
    """Return the listing of some shards."""
    return {key: list(map(ObjectInfo._make, infos)) for shard in shards for key, infos in kept.read(shard)}
