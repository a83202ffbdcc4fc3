"""Benchmark of writing finished titles: Output.write compared with raw uploads of the same bytes, to an S3 server and locally.

    python -m benchmarks.store [--titles 1000] [--shots 700] [--dim 2304] [--threads 4] [--rounds 3] [--endpoint URL --bucket NAME]

The raw upload is botocore's put_object (on a local disk: write, fsync, rename), with as many threads. The titles are a few made ones,
written again and again under other names: what is measured is the store. Without --endpoint the server is the OpenStack Swift that the
tests install (one process on loopback), so its own speed is in every number; the ratio is what counts.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import botocore.session
import numpy as np
import pyarrow as pa
from botocore.config import Config

from mediafm_ray.storage.base import StorageConfig
from mediafm_ray.storage.dataset import Output
from mediafm_ray.storage.names import SHOTS
from mediafm_ray.storage.schemas import embedding_array, encode_parquet, shots_schema

DIFFERENT_TITLES = 4
VERSION = "0123456789ab"
MB = 1e6


def main() -> None:
    """Write the titles in both ways, alternately; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--titles", type=int, default=1000)
    parser.add_argument("--shots", type=int, default=700)
    parser.add_argument("--dim", type=int, default=2304)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="the titles are divided among so many rounds of both ways")
    parser.add_argument("--endpoint", help="an S3 server of your own; keys from the environment")
    parser.add_argument("--bucket", default="benchmark")
    arguments = parser.parse_args()
    contents = [title_file(arguments.shots, arguments.dim, seed) for seed in range(DIFFERENT_TITLES)]
    size = statistics.mean(map(len, contents))
    print(f"{platform.machine()}, {os.cpu_count()} cores: {arguments.titles} titles of {arguments.shots} shots, {size / MB:.1f} MB each")
    with tempfile.TemporaryDirectory() as folder:
        ours = Output(f"{folder}/ours", VERSION)
        compare(
            "local disk", lambda name, content: ours.write(SHOTS, name, "0" * 16, content), local_writer(Path(folder)), contents, arguments
        )
    if arguments.endpoint:
        compare_on(arguments.endpoint, arguments.bucket, contents, arguments)
        return
    from tests.servers.fixtures import S3Server, _running

    with tempfile.TemporaryDirectory() as folder, _running("swift_node.py", lambda port: [folder, str(port)]) as url:
        server = S3Server(url)
        os.environ.update({name: value for name, value in server.environment().items() if name.startswith("AWS_")})
        compare_on(url, server.bucket(), contents, arguments)


def title_file(shots: int, dim: int, seed: int) -> bytes:
    """Make a title's object as the job does, from random unit vectors, which compress as little as real ones."""
    random = np.random.default_rng(seed)
    vectors_SD = random.normal(size=(shots, dim)).astype(np.float32)
    norms_S = np.linalg.norm(vectors_SD, axis=1)
    thumbnail = random.bytes(2500)
    filled = {pa.string(): "some words of a shot", pa.binary(): thumbnail, pa.bool_(): True}
    schema = shots_schema(dim)
    given = {"fused_embedding": embedding_array(vectors_SD / norms_S[:, None]), "fused_norm": pa.array(norms_S)}
    arrays = [given.get(field.name, pa.array([_filler(field.type, filled)] * shots, field.type)) for field in schema]
    return encode_parquet(pa.Table.from_arrays(arrays, schema=schema), {"title_id": f"title {seed}"})


def _filler(type_: pa.DataType, filled: dict[pa.DataType, object]) -> object:
    """Return a value of a type."""
    if pa.types.is_fixed_size_list(type_):
        return [0.0] * type_.list_size
    if pa.types.is_list(type_):
        return []
    return filled.get(type_, 0)


def compare_on(endpoint: str, bucket: str, contents: list[bytes], arguments: argparse.Namespace) -> None:
    """Time our uploads and raw uploads to one server."""
    ours = Output(f"s3://{bucket}/ours", VERSION, StorageConfig(endpoint_url=endpoint))
    options = Config(s3={"addressing_style": "path"}, request_checksum_calculation="when_required", max_pool_connections=arguments.threads)
    client = botocore.session.Session().create_client("s3", endpoint_url=endpoint, config=options)

    def raw(name: str, content: bytes) -> None:
        client.put_object(Bucket=bucket, Key=f"raw/{name}", Body=content)

    compare(f"s3 ({endpoint})", lambda name, content: ours.write(SHOTS, name, "0" * 16, content), raw, contents, arguments)


def local_writer(folder: Path) -> Callable[[str, bytes], None]:
    """Write a local file that survives a crash: the minimum cost."""
    (folder / "raw").mkdir()

    def raw(name: str, content: bytes) -> None:
        path = folder / "raw" / name
        with open(f"{path}.partial", "wb", buffering=0) as stream:
            stream.write(content)
            os.fsync(stream.fileno())
        os.rename(f"{path}.partial", path)

    return raw


def compare(
    where: str,
    ours: Callable[[str, bytes], object],
    raw: Callable[[str, bytes], object],
    contents: list[bytes],
    arguments: argparse.Namespace,
) -> None:
    """Time both ways alternately with the same number of titles; return the medians."""
    count = max(1, arguments.titles // arguments.rounds)
    size = statistics.mean(map(len, contents))
    rates: dict[str, list[float]] = {"raw uploads": [], "Output.write": []}
    for number in range(arguments.rounds):
        for way, write in (("raw uploads", raw), ("Output.write", ours)):
            rates[way].append(count / seconds_of(write, f"round{number}", contents, count, arguments.threads))
    print(where)
    for way, found in rates.items():
        rate = statistics.median(found)
        print(f"  {way:<14}{rate:8.1f} objects/s {rate * size / MB:8.1f} MB/s")
    ratios = [mine / theirs for theirs, mine in zip(rates["raw uploads"], rates["Output.write"], strict=True)]
    print(f"  ratio, median of rounds {statistics.median(ratios):.2f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)})")


def seconds_of(write: Callable[[str, bytes], object], prefix: str, contents: list[bytes], count: int, threads: int) -> float:
    """Return the wall time of writing a number of titles."""
    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(write, f"{prefix}-{index}", contents[index % len(contents)]) for index in range(count)]:
            done.result()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
