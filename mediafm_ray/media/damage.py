"""What was lost of a title: counted from what demuxer and decoder report, never guessed from how pictures look.

Damage is a share of the title's picture time, 0 to 1:

    lost        packets that could not be decoded, or gave no picture; holes in the time of the pictures when anything else
                is wrong; the end that the container declares and the file does not have
    damaged     pictures that the decoder marks as corrupt or says it has concealed errors in

Holes without any other sign of trouble are how variable frame rates look (slides, screen recordings): a remark, no damage.
So is an end that is declared where the file itself is complete: then the header is wrong.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass, field

LONG_HOLE_S = 5.0  # a picture that stays for longer than this, and ten usual frames, is worth a remark
LATE_PICTURE_S = 0.25  # pictures that start this much later than the container declares are worth a remark
CONCEALED = re.compile(rb"\] concealing \d+ DC")  # how FFmpeg's decoders say that they made up a part of one picture
TROUBLE = re.compile(rb"error|invalid|corrupt|damaged|missing|prematurely|truncat", re.IGNORECASE)


class DecoderLog:
    """Reads what FFmpeg writes to a file (descriptor 2 of the reading process) while a title is decoded.

    FFmpeg writes it from C, whichever thread it is in; a Python callback would need the interpreter's lock there, which
    can deadlock with a decoder that waits for its threads. The file is cut off whenever it has grown: it is written by
    appending.
    """

    MAX_BYTES = 8 << 20

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        self.position = os.fstat(descriptor).st_size

    def news(self) -> tuple[int, int]:
        """Since the last call: pictures in which errors were concealed, and lines that speak of errors at all."""
        concealed = errors = 0
        rest = b""
        while piece := os.pread(self.descriptor, 1 << 20, self.position):
            self.position += len(piece)
            *lines, rest = (rest + piece).split(b"\n")
            concealed += sum(1 for line in lines if CONCEALED.search(line))
            errors += sum(1 for line in lines if TROUBLE.search(line))
            rest = rest[:4096]
        if self.position > self.MAX_BYTES:
            os.ftruncate(self.descriptor, 0)
            self.position = 0
        return concealed, errors


@dataclass
class Damage:
    """Counts while a title is read, and the verdict at its end."""

    counts: Counter[str] = field(default_factory=Counter)  # what happened how often, in words for people
    notes: list[str] = field(default_factory=list)  # what happened once, in words for people
    lost_frames: int = 0  # packets that gave no picture
    corrupt_frames: int = 0  # pictures marked as corrupt
    concealed_frames: int = 0  # pictures with concealed errors, as the decoder's log says
    hole_ticks: int = 0  # time without a picture where one was due
    trouble: int = 0  # signs that something is wrong with the file

    def see(self, what: str) -> None:
        """Something is wrong: count it under these words."""
        self.counts[what] += 1
        self.trouble += 1

    def note(self, what: str) -> None:
        """Something is wrong once and for all: say it in these words."""
        self.notes.append(what)
        self.trouble += 1

    def remark(self, what: str) -> None:
        """Something is odd, but nothing is lost by it."""
        self.counts[what] += 1

    def share(self, frames: int, frame_ticks: int, missing_end_ticks: int) -> float:
        """The share of the picture that is lost or damaged, 0 to 1.

        ``frames`` were shown, of ``frame_ticks`` usually; ``missing_end_ticks`` are declared beyond the last of them.
        """
        hole_ticks = self.hole_ticks if self.trouble or self.concealed_frames else 0
        # a lost packet leaves a hole: the same loss seen twice
        lost = max(self.lost_frames, hole_ticks / frame_ticks) + missing_end_ticks / frame_ticks
        damaged = max(self.corrupt_frames, self.concealed_frames)
        return min((lost + damaged) / (frames + lost), 1.0)

    def summary(self) -> str:
        """The counts in words, "no error was reported" where there are none."""
        return ", ".join(self.in_words()) or "no error was reported"

    def in_words(self) -> list[str]:
        """What happened, for people."""
        words = [f"{count} {what}" for what, count in self.counts.items()] + self.notes
        if self.concealed_frames:
            words.append(f"{self.concealed_frames} pictures in which the decoder concealed errors")
        return words
