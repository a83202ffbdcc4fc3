"""The reading process, which decodes titles for an ``IsolatedReader``.

It limits its own address space, writes no core dump, and ends when its parent does. Messages of one title:

    parent: read {title, options}           child: pictures (a block), sound (a piece), shot, ... in any order
    parent: spans, one for each pictures and for no more pictures
                                            child: end {...} or error {reason}
    parent: texts {title, options}          child: end (the texts of its sidecar, a line each) or error {reason}
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource as limits
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import av
import av.logging
import numpy as np

from mediafm_ray.errors import CardError, OutageError, TitleError, is_outage
from mediafm_ray.media import card, cues, reader
from mediafm_ray.media.damage import DecoderLog
from mediafm_ray.media.options import FramesConfig, MediaConfig, TimedTextConfig
from mediafm_ray.media.source import file_name
from mediafm_ray.media.wire import BufferedChannel, Channel, WireError
from mediafm_ray.spec import ShotSpan, TimedTextSource, Title

MIN_SOUND_BYTES = 1 << 16  # bytes in a piece of sound, two seconds at 16 kHz: a message for each audio packet costs both processes time
PR_SET_PDEATHSIG = 1  # linux/prctl.h
STDERR = 2  # where FFmpeg writes; the parent opened it as a file for appending


class _ToParent:
    """The ``reader.Exchange`` over the channel."""

    def __init__(self, channel: Channel):
        self.channel = channel
        self.samples = bytearray()  # sound that has not been sent

    def pictures(self, frames_THWC: np.ndarray) -> None:
        self.channel.send("pictures", {"count": len(frames_THWC)}, [np.ascontiguousarray(frames_THWC).tobytes()])

    def no_more_pictures(self) -> None:
        self.channel.send("no more pictures")

    def settled(self) -> list[ShotSpan]:
        header, _ = self.channel.receive()
        if header["kind"] != "spans":
            raise WireError(f"expected spans, got {header['kind']}")
        return [ShotSpan(**span) for span in header["spans"]]

    def sound(self, samples_N: np.ndarray) -> None:
        self.samples += samples_N.astype("<i2").tobytes()
        if len(self.samples) >= MIN_SOUND_BYTES:
            self.send_sound()

    def send_sound(self) -> None:
        """Send the sound that is still held back."""
        self.channel.send("sound", {}, [bytes(self.samples)])
        self.samples.clear()

    def shot(self, span: ShotSpan, start_s: float, end_s: float, frames: Sequence[bytes], thumbnail: bytes) -> None:
        self.channel.send("shot", {"span": asdict(span), "start_s": start_s, "end_s": end_s}, [thumbnail, *frames])

    def alive(self) -> None:
        self.channel.send("alive")


def serve(channel: Channel) -> None:
    """Read titles until the parent closes the channel."""
    while True:
        try:
            header, _ = channel.receive()
        except WireError:
            return
        if header["kind"] == "spans":  # answers to pictures of a title that has failed
            continue
        try:
            if header["kind"] == "texts":
                channel.send("end", {}, _texts(header, channel))
            else:
                channel.send("end", _read(header, channel))
        except (TitleError, OutageError, CardError) as error:
            of_card = isinstance(error, CardError)
            channel.send("error", {"reason": str(error), "outage": isinstance(error, OutageError), "card": of_card})
        except MemoryError:
            name = file_name(header["title"]["video"])
            limit_gb = header["media"]["memory_limit_gb"]
            channel.send("error", {"reason": f"{name} needs more memory than media.memory_limit_gb={limit_gb:g} to be read"})
        except WireError:
            return
        except Exception as error:
            traceback.print_exc()
            name = file_name(header["title"]["video"])
            reason = f"{name}: the reader failed: {error.__class__.__name__}: {error}"
            channel.send("error", {"reason": reason, "outage": is_outage(error)})


def _title(header: dict[str, Any]) -> Title:
    title = dict(header["title"])
    title["timed_text"] = tuple(TimedTextSource(**one) for one in title["timed_text"])
    title["tags"] = tuple(title["tags"])
    return Title(**title)


def _texts(header: dict[str, Any], channel: Channel) -> list[bytes]:
    """Return one part with the texts of the sidecar's cues, a line each; no part where there are no cues."""
    timed_text, media = TimedTextConfig(**header["timed_text"]), MediaConfig(**header["media"])
    found, _ = cues.read_sidecars(_title(header), timed_text, media, cues.SignsOfLife(lambda: channel.send("alive")))
    return ["\n".join(cue.text for cue in found).encode()] if found else []


def _read(header: dict[str, Any], channel: Channel) -> dict[str, Any]:
    to_parent = _ToParent(channel)
    end = reader.read_title(
        _title(header),
        FramesConfig(**header["frames"]),
        TimedTextConfig(**header["timed_text"]),
        MediaConfig(**header["media"]),
        to_parent,
        DecoderLog(STDERR),
        header["not_on_card"],
        header["sample_rate"],
    )
    to_parent.send_sound()
    return end


def confine(parent: int, memory_limit_gb: float, decoder: str) -> None:
    """Limit the memory of this process, switch off core dumps, and let it end with its parent.

    A card's driver reserves address space for all memory of the machine and the card, so where there may be a card, only memory that can be
    written is limited.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before the line above
        sys.exit(1)
    limits.setrlimit(limits.RLIMIT_CORE, (0, 0))
    size = int(memory_limit_gb * (1 << 30))
    with_card = decoder == "cuda" or (decoder == "auto" and card.is_visible())
    limits.setrlimit(limits.RLIMIT_DATA if with_card else limits.RLIMIT_AS, (size, size))


def main() -> None:
    descriptor, parent, memory_limit_gb, decoder = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
    confine(parent, memory_limit_gb, decoder)
    logging.disable(logging.CRITICAL)  # log lines of text parsers would be read as FFmpeg's and count as errors of the picture
    av.logging.restore_default_callback()  # FFmpeg writes its log from C: see DecoderLog
    av.logging.set_libav_level(av.logging.INFO)
    serve(BufferedChannel(socket.socket(fileno=descriptor)))


if __name__ == "__main__":
    main()
