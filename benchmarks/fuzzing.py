"""Very many mutated inputs of the parsers: how many, how fast, and whether anything but a result or the documented error came.

    python -m benchmarks.fuzzing FOLDER --inputs 1000000 [--processes 2] [--seed 1]

The inputs are the timed text files below FOLDER, the same joined to a megabyte, and the messages of a reading process, with
seeded random changes: bytes flipped, pieces cut, doubled, overwritten, inserted, and tokens of the formats. No hypothesis is in
between: see tests/media/test_fuzz.py for that. The time of an input is the processor's, for a megabyte, or a whole input if that
is smaller: an input of 10 kB that takes 1 s counts as 1 s/MB. Ends with 1 where there was an exception or an input was too slow.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import logging
import multiprocessing
import random
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from mediafm_ray.media import timed_text
from mediafm_ray.media.options import TimedTextConfig
from mediafm_ray.media.wire import LENGTH, Channel, WireError
from mediafm_ray.spec import TitleError

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


def run(arguments: tuple[list[bytes], int, int]) -> tuple[collections.Counter[str], list[str], float, str]:
    """Some inputs: counts of outcomes, the exceptions, and the slowest with what it was."""
    files, first, count = arguments
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    counts: collections.Counter[str] = collections.Counter()
    exceptions: list[str] = []
    slowest, what = 0.0, ""
    for seed in range(first, first + count):
        chance = random.Random(seed)
        deed: Callable[[], str]
        if chance.random() < 0.2:
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
    options = parser.parse_args()
    paths = sorted(path for ending in ENDINGS for path in options.folder.rglob(f"*.{ending}") if path.stat().st_size < MEGABYTE)
    files = [content for path in paths if (content := path.read_bytes())] + SEEDS
    piece = 2000
    pieces = [(files, options.seed + start, min(piece, options.inputs - start)) for start in range(0, options.inputs, piece)]
    counts: collections.Counter[str] = collections.Counter()
    exceptions: list[str] = []
    slowest, what = 0.0, ""
    started = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for done, (some, raised, slow, slow_what) in enumerate(pool.imap_unordered(run, pieces), 1):
            counts += some
            exceptions += raised
            slowest, what = max((slowest, what), (slow, slow_what))
            if done % 50 == 0:
                print(f"{counts.total()} inputs, {counts['uncaught']} uncaught, slowest {slowest:.2f} s/MB", file=sys.stderr, flush=True)
    for one in exceptions[:20]:
        print(one)
    print(f"{counts.total()} inputs from {len(files)} files in {time.monotonic() - started:.0f} s with {options.processes} processes")
    for outcome, count in sorted(counts.items()):
        print(f"  {outcome:16} {count}")
    print(f"  uncaught exceptions: {counts['uncaught']}")
    print(f"  slowest input: {slowest:.2f} s/MB ({what})")
    return int(counts["uncaught"] > 0 or slowest > MAX_S_PER_MB)


if __name__ == "__main__":
    sys.exit(main())
