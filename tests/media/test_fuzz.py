"""Any bytes as timed text, and as what the reading process says: a result or the documented error, in time that grows with the size.

The default run takes some twenty seconds; ``FUZZ_EXAMPLES=100000 pytest -m slow tests/media/test_fuzz.py`` as long as it is told to.
What a run has found stands in a test with a name, here or beside the code.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import socket
import subprocess
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mediafm_ray.errors import TitleError
from mediafm_ray.media import timed_text
from mediafm_ray.media.isolation import IsolatedReader
from mediafm_ray.media.options import FramesConfig, MediaConfig, TimedTextConfig
from mediafm_ray.media.wire import LENGTH, Channel, DeadlineExceeded, WireError
from mediafm_ray.spec import ShotSpan, Title, TitleMedia
from tests.media.test_timed_text import ASS, SRT, TTML, VTT
from tests.videos import KnownCuts

MAX_S_PER_MB = 2.0
SCC = "Scenarist_SCC V1.0\n\n00:00:01:00\t9420 9420 94ae 94ae 9470 9470 c8e5 ecec ef80 942c 942c 942f 942f\n\n00:00:03;00\t942c 942c\n"
SEEDS = {
    "srt": SRT,
    "vtt": VTT,
    "ttml": TTML.replace("NAMESPACE", "http://www.w3.org/ns/ttml"),
    "scc": SCC,
    "ass": ASS,
    "sami": "<SAMI><BODY><SYNC Start=1000><P Class=EN>Hello<br>there<SYNC Start=2000><P>&nbsp;</BODY></SAMI>",
    "microdvd": "{0}{0}25\n{25}{50}{y:i}Hello|there\n{75}{100}Bye\n",
    "mpl2": "[10][20]Hello|there\n[30][40]/Bye\n",
    "json": '{"info": {}, "styles": {}, "events": [{"start": 0, "end": 1000, "text": "Hello"}]}',
}
TOKENS = {
    "srt": r"1\n|\n\n|00:00:01,000| --> |:|-1|<v|<i>|{\an8}|&#xd800;|&#9999999999999;|&amp;| |\r|" + "9" * 400 + ":",
    "vtt": r"WEBVTT|\n\n|NOTE|STYLE|00:01.000 --> 00:02.000\n|<v A>|<00:00:01.000>|align:start|&lrm;|#|\u266a",
    "ttml": r"<p>|</p>|<p begin='1s' end='2s'>|<br/>|<span>|</span>|<div timeContainer='seq'>|</div>|99999999h|1f|&#0;|&#xd800;|]]>"
    "|<![CDATA[|xml:space='preserve'|ttp:frameRate='0'|ttp:tickRate='9999999999999'",
    "scc": r"9420|942c|942f|94ad|9425|ffff|0000|9137|1340|\t|\n\n|00:00:01:00|99:99:99;99| |94d0|c8e5",
    "ass": r"Dialogue: |0:00:01.00,|[Events]\n|Format: |Text|\n|{\p1}|\N|,|-1|[V4+ Styles]\n|Style: ",
    "sami": r"<SYNC Start=|99999999999999999999|<P>|<SAMI>|>|&nbsp;|<!--|-->|<br",
    "microdvd": r"{|}|{0}|{99999999999999999999}|{y:i}|\n|{1}{1}0\n|{1}{1}nan\n|{1}{1}inf\n",
    "mpl2": r"[|]|[1]|[99999999999999999999]|\n|/",
    "json": r'{|}|[|]|"|"events":|1e400|NaN|\ud800|,|"start":',
}  # pieces of each format, between bars; \n, \r and \t are the characters

DEFAULT = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
LONG = settings(DEFAULT, max_examples=int(os.environ.get("FUZZ_EXAMPLES", "10000")), derandomize=False)

edits = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 4), st.integers(1, 64), st.binary(max_size=12), st.integers(0, 99)), max_size=12)


def mutated(content: bytes, changes: list[tuple[float, int, int, bytes, int]], tokens: list[bytes]) -> bytes:
    """Content with pieces cut, doubled many times, overwritten or inserted, the latter of bytes or of a format's own tokens."""
    data = bytearray(content)
    for place, deed, length, noise, number in changes:
        position = round(place * len(data))
        if deed == 0:
            del data[position : position + length]
        elif deed == 1:
            data[position:position] = data[position : position + length] * (number + 1)
        elif deed == 2:
            data[position : position + len(noise)] = noise
        elif deed == 3:
            data[position:position] = noise
        elif tokens:
            data[position:position] = tokens[number % len(tokens)] * (1 + number // 10)
    return bytes(data)


def check_text(data: bytes, name: str) -> None:
    """Cues that can be stored and handed over, or the documented error; within the time, whatever the options."""
    for config in (TimedTextConfig(), TimedTextConfig(speakers=True, sound_cues=False)):
        started = time.process_time()
        try:
            cues, warnings = timed_text.parse(data, name, config)
        except TitleError as error:
            said = str(error)
            assert name in said
            cues, warnings = [], []
        texts = timed_text.text_of_shots(cues, [(0.0, 1.0), (1.0, 1.5), (1.5, 1e6)], warnings)
        assert time.process_time() - started < MAX_S_PER_MB * max(1, len(data) / (1 << 20))
        assert all(0 <= cue.start_s < cue.end_s and math.isfinite(cue.start_s) and cue.text for cue in cues)
        assert all(isinstance(warning, str) for warning in warnings)
        json.dumps([cues and dataclasses.asdict(cues[0]), texts, warnings], allow_nan=False).encode()
        "".join(text for text, _ in texts).encode()  # no lone surrogate


def check_any_text(seed: str, changes: list[tuple[float, int, int, bytes, int]]) -> None:
    pieces = TOKENS[seed].replace(r"\n", "\n").replace(r"\t", "\t").replace(r"\r", "\r").replace(r"\u266a", "\u266a")
    tokens = [token.encode() for token in pieces.split("|")]
    check_text(mutated(SEEDS[seed].encode(), changes, tokens), f"a.{seed}")


@pytest.mark.parametrize("seed", list(SEEDS))
def test_mutated_text(seed):
    DEFAULT(given(edits)(lambda changes: check_any_text(seed, changes)))()


@DEFAULT
@given(st.binary(max_size=2000), st.sampled_from([*SEEDS, ""]))
def test_any_bytes_as_text(data, name):
    check_text(data, f"a.{name}")


@pytest.mark.slow
@pytest.mark.parametrize("seed", list(SEEDS))
def test_mutated_text_for_long(seed):
    LONG(given(edits)(lambda changes: check_any_text(seed, changes)))()


# ------------------------------------------------------------------------------------------------------------- the wire

SPAN = ShotSpan(0, 64)
END = {
    "texts": ["Hello"],
    "languages": ["en"],
    "duration_s": 2.0,
    "frame_count": 64,
    "has_sound": True,
    "warnings": ["odd"],
    "facts": {"bytes": 1000},
}


def conversation() -> list[bytes]:
    """The messages of a title of one shot, as the reading process sends them."""
    ours, theirs = socket.socketpair()
    messages = []
    with ours, theirs:
        channel = Channel(theirs)
        for kind, fields, parts in (
            ("alive", {}, []),
            ("pictures", {"count": 2}, [np.zeros((2, 27, 48, 3), np.uint8).tobytes()]),
            ("sound", {}, [bytes(1000)]),
            ("no more pictures", {}, []),
            ("shot", {"span": dataclasses.asdict(SPAN), "start_s": 0.0, "end_s": 2.0}, [b"thumbnail", b"frame"]),
            ("end", END, []),
        ):
            channel.send(kind, fields, parts)
            messages.append(ours.recv(1 << 20))
    return messages


MESSAGES = conversation()


class Recorded(IsolatedReader):
    """A reader whose child has said all it has to say, and has ended."""

    def __init__(self, said: bytes):
        super().__init__(FramesConfig(), TimedTextConfig(), MediaConfig(no_progress_timeout_s=5.0))
        self.said = said

    def start(self) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(5.0)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        theirs.setblocking(False)
        theirs.sendall(self.said)
        theirs.shutdown(socket.SHUT_WR)
        self.theirs = theirs
        self.process = subprocess.Popen(["true"])
        self.channel = Channel(ours)

    def close(self) -> None:
        super().close()
        self.theirs.close()


def check_wire(
    said: bytes, ask: Callable[[IsolatedReader], object] = lambda reader: reader.read(Title("a", "a.mp4"), KnownCuts([]))
) -> None:
    """What is understood is whole and can be stored; all else is that title's error."""
    reader = Recorded(said)
    try:
        media = ask(reader)
    except TitleError:
        return
    finally:
        reader.close()
    if isinstance(media, TitleMedia):
        assert len(media.audio.data) <= 2 * 16_000 * (24 * 3600 + 60)
        assert all(len(shot.audio) <= len(media.audio.data) and isinstance(shot.text, str) for shot in media.shots)
        json.dumps([[shot.text, shot.language, shot.start_s, shot.end_s] for shot in media.shots], allow_nan=False)
        "".join(shot.text for shot in media.shots).encode()


def check_mutated_wire(place: int, changes: list[tuple[float, int, int, bytes, int]], keeps_length: bool) -> None:
    """One message of the conversation is changed; its announced length is put right, or left as it is."""
    messages = list(MESSAGES)
    content = mutated(
        messages[place][LENGTH.size :], changes, [b"{", b"}", b"1e400", b"NaN", b"-1", b'"', b"null", b"[", b"\\ud800", b"9" * 30]
    )
    (length,) = LENGTH.unpack(messages[place][: LENGTH.size])
    header = max(length + len(content) - (len(messages[place]) - LENGTH.size), 0)
    messages[place] = (messages[place][: LENGTH.size] if keeps_length else LENGTH.pack(header)) + content
    check_wire(b"".join(messages))


def test_unchanged_conversation_is_understood():
    reader = Recorded(b"".join(MESSAGES))
    try:
        media = reader.read(Title("a", "a.mp4"), KnownCuts([]))
    finally:
        reader.close()
    assert (media.shots[0].text, len(media.shots[0].audio), media.warnings) == ("Hello", 64_000, ["odd"])


@DEFAULT
@given(st.integers(0, len(MESSAGES) - 1), edits, st.booleans())
def test_mutated_conversation(place, changes, keeps_length):
    check_mutated_wire(place, changes, keeps_length)


@pytest.mark.slow
@LONG
@given(st.integers(0, len(MESSAGES) - 1), edits, st.booleans())
def test_mutated_conversation_for_long(place, changes, keeps_length):
    check_mutated_wire(place, changes, keeps_length)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def with_field(place: int, name: str, value: object) -> bytes:
    """The conversation with another value in one field of one header, or of its span."""
    messages = list(MESSAGES)
    (length,) = LENGTH.unpack(messages[place][: LENGTH.size])
    header = json.loads(messages[place][LENGTH.size : LENGTH.size + length])
    (header["span"] if name in header.get("span", {}) else header)[name] = value
    changed = json.dumps(header).encode()
    messages[place] = LENGTH.pack(len(changed)) + changed + messages[place][LENGTH.size + length :]
    return b"".join(messages)


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        (4, "end_s", 1e300),  # a file of that size
        (4, "end_s", math.inf),
        (4, "end_s", 1e9),  # 32 GB of silence
        (4, "start_frame", "0"),
        (4, "boundary_probability", math.nan),
        (5, "texts", [7]),
        (5, "duration_s", math.nan),
        (5, "sizes", [math.inf]),
        (1, "sizes", [1e300]),
    ],
)
def test_child_that_asks_for_the_absurd_is_not_believed(place, name, value):
    reader = Recorded(with_field(place, name, value))
    try:
        with pytest.raises(TitleError, match=r"a\.mp4: the reading process sent something that is not understood"):
            reader.read(Title("a", "a.mp4"), KnownCuts([]))
    finally:
        reader.close()


FIELDS = [
    *[(4, name) for name in ("start_s", "end_s", "span", "sizes", *dataclasses.asdict(SPAN))],
    *[(5, name) for name in (*END, "kind", "reason", "sizes")],
    *[(1, name) for name in ("count", "sizes", "kind")],
]


@DEFAULT
@given(st.sampled_from(FIELDS), json_values)
@example((4, "end_s"), 1e300)  # the parent was asked for a file of that size
@example((4, "end_s"), math.inf)
@example((4, "start_frame"), "0")
@example((5, "texts"), ["\ud800"])
@example((5, "sizes"), [math.inf])
@example((5, "has_sound"), "yes")
def test_any_value_in_a_field_of_the_conversation(field, value):
    check_wire(with_field(*field, value))


@DEFAULT
@given(st.binary(max_size=200), st.booleans())
@example(b'{"kind": "end", "sizes": [1e400]}', True)
@example(b'{"kind": "end", "sizes": [' + b"9" * 5000 + b"]}", True)
@example(b"[" * 100_000, True)
def test_any_bytes_as_a_message(data, framed):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall((LENGTH.pack(len(data)) if framed else b"") + data)
        theirs.shutdown(socket.SHUT_WR)
        try:
            header, parts = Channel(ours).receive()
        except (WireError, DeadlineExceeded):
            return
        assert len(header["sizes"]) == len(parts)


@DEFAULT
@given(st.binary(max_size=300))
def test_any_bytes_as_texts_of_a_sidecar(content):
    header = json.dumps({"kind": "end", "sizes": [len(content)]}).encode()
    check_wire(LENGTH.pack(len(header)) + header + content, lambda reader: reader.texts(Title("a", "a.mp4")))
