"""Very many mutated inputs of the parsers: how many, how fast, and whether anything but a result or the documented error came.

    python -m benchmarks.fuzzing FOLDER --inputs 1000000 [--processes 2] [--seed 1] [--kinds text message table uri record model object]

The inputs are, by kind,

    text      the timed text files below FOLDER, the same joined to a megabyte
    message   what a reading process says
    table     catalogs as JSON lines, CSV and Parquet
    uri       locations of every form, none on a network
    record    failure records
    model     model.json
    object    the Parquet objects of a title, with another set of facts or as bytes

with seeded random changes: bytes flipped, pieces cut, doubled, overwritten, inserted, and tokens of the formats. No hypothesis is in
between: see tests/media/test_fuzz.py and tests/storage/test_fuzz.py for that. The time of an input is the processor's, for a megabyte,
or a whole input if that is smaller: an input of 10 kB that takes 1 s counts as 1 s/MB. Ends with 1 where there was an exception or an
input was too slow.
"""

from __future__ import annotations

import argparse
import atexit
import collections
import functools
import io
import json
import logging
import multiprocessing
import os
import random
import shutil
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mediafm_ray.derive.reader import read_vectors
from mediafm_ray.errors import OutageError, TitleError
from mediafm_ray.media import timed_text
from mediafm_ray.media.options import MediaConfig, TimedTextConfig
from mediafm_ray.media.source import file_name, open_bytes
from mediafm_ray.media.wire import LENGTH, Channel, WireError
from mediafm_ray.storage import catalog
from mediafm_ray.storage.catalog import CatalogError, read_catalog
from mediafm_ray.storage.dataset import DatasetError, EmbeddingDataset, read_failures, record_failure
from mediafm_ray.storage.names import FAILURES, SHOTS, contextual, matching_object, object_name
from mediafm_ray.storage.schemas import METADATA_KEY
from mediafm_ray.storage.store import ObjectInfo, StorageError, Store, join, scheme_of
from mediafm_ray.storage.verify import check_model, check_title, list_titles
from mediafm_ray.text import local_path
from tests.datasets import CHECKPOINT, MODEL, SOURCE, write_dataset

MEGABYTE = 1 << 20
MAX_S_PER_MB = 2.0
ENDINGS = ("srt", "vtt", "ttml", "dfxp", "xml", "scc", "ass", "ssa", "smi", "sub", "txt")
LARGE_SHARE = 0.0005  # of the inputs are files joined to about a megabyte
TOKENS = [
    *[b"\n\n", b"-->", b"00:00:01,000 --> 00:00:02,000\n", b"9" * 400, b"<v ", b"<i>", b"{\\an8}", b"&#xd800;", b"&#99999999999;", b"\0"],
    *[b"<p>", b"</p>", b"<span begin='1s' end='9s'>", b"<br/>", b"<div timeContainer='seq'>", b"ttp:frameRate='0'", b"99999999h", b"]]>"],
    *[b"9420 ", b"942f ", b"942c ", b"ffff ", b"Dialogue: ", b"[Events]\n", b"<SYNC Start=", b"{0}{25}", b"[1][2]", b"WEBVTT\n\n"],
    *[b'{"', b"1e400", b"NaN", b"null", b"-1", b"[[[[", b"\\ud800", b'"sizes": ', b'"kind": '],
]
SEEDS = [  # formats of which a folder may have no file
    b'<tt xmlns="http://www.w3.org/ns/ttml"><body><div><p begin="1s" end="2s">Where is <span>she</span>?</p>'
    b'<p begin="00:00:03:05" dur="4s">Here,<br/>of course.</p></div></body></tt>',
    b"Scenarist_SCC V1.0\n\n00:00:01:00\t9420 9420 94ae 94ae 9470 9470 c8e5 ecec ef80 942c 942c 942f 942f\n\n00:00:03;00\t942c 942c\n",
    b"[Script Info]\n\n[V4+ Styles]\nFormat: Name, Fontname\nStyle: Default,Arial\n\n[Events]\nFormat: Layer, Start, End, Style, Name, "
    b"MarginL, MarginR, MarginV, Effect, Text\nDialogue: 0,0:00:01.00,0:00:02.50,Default,,0,0,0,,{\\i1}Where{\\i0} is she?\n",
    b"<SAMI><BODY><SYNC Start=1000><P Class=EN>Hello<br>there<SYNC Start=2000><P>&nbsp;</BODY></SAMI>",
    b"{0}{0}25\n{25}{50}{y:i}Hello|there\n{75}{100}Bye\n",
    b"[10][20]Hello|there\n[30][40]/Bye\n",
]
KINDS = ("text", "message", "table", "uri", "record", "model", "object")
TABLES = {
    "jsonl": b'{"title_id": "a", "video": "a.mp4", "timed_text": ["a.en.srt"], "synopsis": "A film.", "tags": ["x"], "duration_s": 3.5}\n'
    b'{"title_id": "b", "video": "b.mp4"}\n',
    "csv": b'title_id,video,timed_text,synopsis,tags,duration_s\na,a.mp4,a.srt;b.srt,"A ""film"".",x;y,3.5\nb,b.mp4,,,,\n',
}
URIS = [b"/videos/film.mp4", b"videos/my film#1.mp4", b"file:///videos/my%20film.mp4", b"~/film.mp4", b"memory://a/b", b"s3://bucket/key?x"]
HEADERS = [
    {"kind": "shot", "span": {"start_frame": 0, "end_frame": 64}, "start_s": 0.0, "end_s": 2.0, "sizes": [9, 5]},
    {"kind": "end", "texts": ["Hello"], "languages": ["en"], "duration_s": 2.0, "frame_count": 64, "has_sound": True, "sizes": []},
    {"kind": "alive", "sizes": []},
]


def mutated(content: bytes, chance: random.Random) -> bytes:
    """Content with one to twenty changes."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 3, 5, 20))):
        position, length, deed = chance.randrange(len(data) + 1), chance.choice((1, 2, 8, 64)), chance.randrange(7)
        if deed == 0 and position < len(data):
            data[position] ^= 1 << chance.randrange(8)
        elif deed == 1:
            del data[position : position + length]
        elif deed == 2:
            data[position:position] = data[position : position + length] * chance.choice((1, 2, 10, 100))
        elif deed == 3:
            data[position : position + length] = chance.randbytes(length)
        elif deed == 4:
            data[position:position] = chance.randbytes(length)
        elif deed == 5:
            data[position : position + length] = bytes(length)
        else:
            data[position:position] = chance.choice(TOKENS) * chance.choice((1, 1, 2, 50))
    return bytes(data)


def read_text(data: bytes, config: TimedTextConfig) -> str:
    """What comes of bytes as timed text, in a word."""
    try:
        cues, remarks = timed_text.parse(data, "a.srt", config)
    except TitleError:
        return "text refused"
    texts = timed_text.text_of_shots(cues, [(0.0, 1.0), (1.0, 1.5), (1.5, 1e6)], remarks)
    json.dumps(remarks)
    "".join(text for text, _ in texts).encode()
    return "text read"


def read_message(data: bytes) -> str:
    """What comes of bytes as a message, in a word."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        try:
            Channel(ours).receive()
        except WireError:
            return "message refused"
    return "message read"


class Places:
    """The places that the stored kinds are read from: a folder for tables, and an output with one title."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fuzzing-"))
        atexit.register(shutil.rmtree, self.folder)
        self.output = write_dataset(str(self.folder / "out"), {"a": [10, 20, 30]}, failed=["b"])
        self.dataset = EmbeddingDataset(str(self.folder / "out"))
        self.shots = self.dataset.title_object("a")
        self.objects = {name: self.output.store.read(matching_object(self.shots, name)) for name in (SHOTS, contextual(CHECKPOINT))}
        self.record = self.output.store.read(object_name(FAILURES, "b", SOURCE))
        sink = io.BytesIO()
        pq.write_table(pa.table({"title_id": ["a", "b"], "video": ["a.mp4", "b.mp4"], "tags": [["x"], None]}), sink)
        self.tables = {**TABLES, "parquet": sink.getvalue()}

    def read_table(self, ending: str, data: bytes) -> str:
        """Read bytes as a catalog; the outcome in a word."""
        path = self.folder / f"catalog.{ending}"
        path.write_bytes(data)
        try:
            entries = read_catalog(str(path), skipped=[])
        except (CatalogError, StorageError) as error:
            str(error).encode(errors="backslashreplace")
            return "table refused"
        for entry in entries:
            object_name(SHOTS, entry.title.title_id, entry.source)
        return "table read"

    def read_record(self, data: bytes) -> str:
        """Read bytes as a failure record; the outcome in a word."""
        name = object_name(FAILURES, "b", SOURCE)
        self.output.store.write(name, data)
        count = len(list(read_failures(self.output)))
        check_title(self.output, MODEL, [(FAILURES, ObjectInfo(name, len(data), "", 0.0))])
        record_failure(self.output, name, {"title_id": "b"}, {"stage": "x", "message": "y"})
        return "record read" if count else "record refused"

    def read_model(self, data: bytes) -> str:
        """Read bytes as model.json; the outcome in a word."""
        self.output.store.write("model.json", data)
        check_model(self.output)
        try:
            dataset = EmbeddingDataset(str(self.folder / "out"), MODEL.dataset_version)
        except DatasetError:
            return "model refused"
        return f"model read, and {self._vectors(dataset)}"

    def read_object(self, name: str, data: bytes) -> str:
        """Read bytes as an object of a title; the outcome in a word."""
        self.output.store.write(matching_object(self.shots, name), data)
        for objects in list_titles(self.output)[0]:
            check_title(self.output, MODEL, objects)
        said = self._vectors(self.dataset)
        self.output.store.write(matching_object(self.shots, name), self.objects[name])
        return said

    def _vectors(self, dataset: EmbeddingDataset) -> str:
        try:
            for name in self.objects:
                read_vectors(dataset, self.shots, name)
        except TitleError:
            return "object refused"
        return "object read"


def read_uri(uri: str) -> str:
    """Open text as a location that is not on a network; the outcome in a word."""
    file_name(uri).encode()
    join(uri, uri)
    if scheme_of(uri) not in ("file", "memory") or (local_path(uri) or "").startswith("/dev"):
        return "uri of another scheme"
    try:
        Store(uri).info("x")
        open_bytes(uri, MediaConfig()).close()
    except (StorageError, OutageError, TitleError):
        return "uri refused"
    return "uri read"


@functools.cache
def places() -> Places:
    """Those of this process."""
    real_look_up = catalog._look_up
    catalog._look_up = lambda uris, *others: real_look_up([uri for uri in uris if scheme_of(uri) == "file"], *others)  # no network
    catalog._s3_key = lambda uri: ""
    os.fsync = lambda fd: None  # nothing here outlives the process
    return Places()


def with_facts(content: bytes, chance: random.Random) -> bytes:
    """A Parquet object with changed facts."""
    table = pq.read_table(pa.BufferReader(content))
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: mutated(table.schema.metadata[METADATA_KEY], chance)}), sink)
    return sink.getvalue()


def stored_deed(kind: str, chance: random.Random) -> tuple[bytes, Callable[[], str]]:
    """An input of one of the stored kinds, and what is done with it."""
    here = places()
    if kind == "table":
        ending, seed = chance.choice(list(here.tables.items()))
        data = mutated(seed, chance)
        return data, functools.partial(here.read_table, ending, data)
    if kind == "uri":
        data = mutated(chance.choice(URIS), chance)
        return data, functools.partial(read_uri, os.fsdecode(data) if chance.random() < 0.5 else data.decode("latin-1"))
    if kind == "record":
        data = mutated(here.record, chance)
        return data, functools.partial(here.read_record, data)
    if kind == "model":
        data = mutated(MODEL.to_json(), chance)
        return data, functools.partial(here.read_model, data)
    name, seed = chance.choice(list(here.objects.items()))
    data = with_facts(seed, chance) if chance.random() < 0.5 else mutated(seed, chance)
    return data, functools.partial(here.read_object, name, data)


def run(arguments: tuple[list[bytes], Sequence[str], int, int]) -> tuple[collections.Counter[str], list[str], float, str]:
    """Some inputs: counts of outcomes, the exceptions, and the slowest with what it was."""
    files, kinds, first, count = arguments
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    counts: collections.Counter[str] = collections.Counter()
    exceptions: list[str] = []
    slowest, what = 0.0, ""
    for seed in range(first, first + count):
        chance = random.Random(seed)
        deed: Callable[[], str]
        kind = chance.choice(kinds)
        if kind not in ("text", "message"):
            data, deed = stored_deed(kind, chance)
        elif kind == "message":
            header = mutated(json.dumps(chance.choice(HEADERS)).encode(), chance)
            data = LENGTH.pack(len(header)) + header + bytes(14)
            data = data if chance.random() < 0.8 else mutated(data, chance)
            deed = functools.partial(read_message, data[:100_000])
        else:
            content = chance.choice(files)
            if chance.random() < LARGE_SHARE:
                content *= MEGABYTE // max(len(content), 1) + 1
            data = mutated(content, chance)
            config = TimedTextConfig(speakers=chance.random() < 0.5, sound_cues=chance.random() < 0.5)
            deed = functools.partial(read_text, data, config)
        started = time.process_time()
        try:
            counts[deed()] += 1
        except Exception:
            counts["uncaught"] += 1
            exceptions.append(f"seed {seed}: {data[:200]!r}\n{traceback.format_exc(limit=-3)}")
        s_per_mb = (time.process_time() - started) / max(1.0, len(data) / MEGABYTE)
        if s_per_mb > slowest:
            slowest, what = s_per_mb, f"seed {seed}, {len(data)} bytes: {data[:60]!r}"
    return counts, exceptions, slowest, what


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    options = parser.parse_args()
    paths = sorted(path for ending in ENDINGS for path in options.folder.rglob(f"*.{ending}") if path.stat().st_size < MEGABYTE)
    files = [content for path in paths if (content := path.read_bytes())] + SEEDS
    piece = 2000
    pieces = [(files, options.kinds, options.seed + start, min(piece, options.inputs - start)) for start in range(0, options.inputs, piece)]
    counts: collections.Counter[str] = collections.Counter()
    exceptions: list[str] = []
    slowest, what = 0.0, ""
    started = time.monotonic()
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:  # raises where a process dies
        for done, (some, raised, slow, slow_what) in enumerate(pool.map(run, pieces), 1):
            counts += some
            exceptions += raised
            slowest, what = max((slowest, what), (slow, slow_what))
            if done % 50 == 0:
                print(f"{counts.total()} inputs, {counts['uncaught']} uncaught, slowest {slowest:.2f} s/MB", file=sys.stderr, flush=True)
    for one in exceptions[:20]:
        print(one)
    print(f"{counts.total()} inputs from {len(files)} files in {time.monotonic() - started:.0f} s with {options.processes} processes")
    for outcome, count in sorted(counts.items()):
        print(f"  {outcome:32} {count}")
    print(f"  uncaught exceptions: {counts['uncaught']}")
    print(f"  slowest input: {slowest:.2f} s/MB ({what})")
    return int(counts["uncaught"] > 0 or slowest > MAX_S_PER_MB)


if __name__ == "__main__":
    sys.exit(main())
