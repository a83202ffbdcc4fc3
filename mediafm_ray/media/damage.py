"""Loss and damage of a title: counted from reports of demuxer and decoder, never guessed from how pictures look.

Damage is a share of the title's picture time, 0 to 1:

    lost        packets that could not be decoded; holes in the time of the pictures, with a sign that they are a loss;
                the end that the container declares and the file does not have
    damaged     pictures that the decoder marks as corrupt or says it has concealed errors in; where it says neither, its
                error messages

A hole alone may be a variable frame rate (slides, screen recordings, captures that drop frames), which is a remark and not
damage. It is a loss when demuxer or video decoder report an error at that time, when the sound has a gap for half of the
time, or when all other pictures come regularly in a container of broadcasting, which has no variable rates. (A
transport stream can lose a second without any error: its counters run modulo 16.) Trouble of the sound is never a loss of
pictures. An end that is declared although the file is complete is a wrong header, no loss.
"""

from __future__ import annotations

import bisect
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

LONG_HOLE_S = 5.0  # a picture that stays longer than this, and longer than ten usual frames, is worth a remark
BROADCAST_FORMATS = ("mpegts", "mpeg", "mxf", "gxf", "dv")
REGULAR_SHARE = 0.95  # share of usual intervals between pictures from which the rate counts as regular
MAX_HOLES = 10_000  # recorded holes, and recorded stretches of trouble
TROUBLE_REACH_S = 1.0  # a hole this near to an error of the demuxer, which reads ahead, is a loss
TROUBLE_REACH_PICTURES = 2  # the same for errors of the decoder, which come with the packet, in usual pictures
LATE_PICTURE_S = 0.25  # pictures that start this much later than the container declares are worth a remark
CONCEALED = re.compile(rb"\] concealing \d+ DC")  # FFmpeg's message about a picture that is partly made up
NO_MEMORY = re.compile(rb"Cannot allocate memory|get_buffer\(\) failed|alloc\w* failed")
OF_STREAM = re.compile(rb"\bstream\s*(?:[=#]\s*)?(\d+)")  # how demuxers name a stream in their messages
TROUBLE = re.compile(rb"error|invalid|corrupt|damaged|missing|prematurely|truncat|outside|overread|CABAC_MAX|not find ref", re.IGNORECASE)


class DecoderLog:
    """Reads what FFmpeg writes to a file (descriptor 2 of the reading process) while a title is decoded.

    FFmpeg writes it from C, whichever thread it is in; a Python callback would need the interpreter's lock there, which
    can deadlock with a decoder that waits for its threads. The file is cut off whenever it has grown: it is written by
    appending.
    """

    MAX_BYTES = 8 << 20

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        self.video_codec = b""  # lines of this codec are errors of the picture; set when the video is known, like the next two
        self.other_codecs: tuple[bytes, ...] = ()  # lines of these codecs are not about the picture
        self.video_index = 0  # index of the video stream in the demuxer's lines
        self.position = os.fstat(descriptor).st_size
        self.out_of_memory = False  # whether FFmpeg has reported it

    def grown(self) -> bool:
        """Return whether FFmpeg has written anything since the last call of ``news``."""
        return os.fstat(self.descriptor).st_size > self.position

    def news(self) -> tuple[int, int, int]:
        """Return counts since the last call: pictures with concealed errors, error lines of the video decoder, all of the picture."""
        concealed = of_video = errors = 0
        rest = b""
        while piece := os.pread(self.descriptor, 1 << 20, self.position):
            self.position += len(piece)
            *lines, rest = (rest + piece).split(b"\n")
            concealed += sum(1 for line in lines if CONCEALED.search(line))
            self.out_of_memory |= any(NO_MEMORY.search(line) for line in lines)
            troubled = [line for line in lines if TROUBLE.search(line) and not self._of_another_stream(line)]
            errors += len(troubled)
            of_video += sum(1 for line in troubled if line.startswith(b"[" + self.video_codec + b" @"))
            rest = rest[:4096]
        if self.position > self.MAX_BYTES:
            os.ftruncate(self.descriptor, 0)
            self.position = 0
        return concealed, of_video, errors

    def _of_another_stream(self, line: bytes) -> bool:
        """Return whether a line is about sound or text: their decoder wrote it, or the demuxer names their stream."""
        if line.startswith(tuple(b"[" + codec + b" @" for codec in self.other_codecs if codec != self.video_codec)):
            return True
        named = OF_STREAM.search(line)
        return named is not None and int(named.group(1)) != self.video_index


@dataclass
class Damage:
    """Counts of faults while a title is read, and the damaged share at its end."""

    counts: Counter[str] = field(default_factory=Counter)  # faults and remarks for people, with how often each happened
    notes: list[str] = field(default_factory=list)  # faults for people that happen once
    lost_frames: int = 0  # packets that gave no picture
    corrupt_frames: int = 0  # pictures marked as corrupt
    concealed_frames: int = 0  # pictures with concealed errors, as the decoder's log says
    holes: list[tuple[int, int]] = field(default_factory=list)  # start and end in ticks of times without a picture where one was due
    hole_ticks: int = 0  # total length of all holes
    complaints: int = 0  # packets at which the video decoder reported errors
    reach_ticks: int = 0  # TROUBLE_REACH_S in ticks
    decoder_reach_ticks: int = 0  # TROUBLE_REACH_PICTURES and the delay of the decoder's threads in ticks
    now_ticks: int = 0  # time of the packet that is read
    troubles: list[tuple[int, int]] = field(default_factory=list)  # start and end in ticks of times in which a hole is a loss

    def trouble(self, of_decoder: bool = False) -> None:
        """Record that something is wrong at the current time, with the file or with the packet that is decoded."""
        reach_ticks = self.decoder_reach_ticks if of_decoder else self.reach_ticks
        start, end = self.now_ticks - reach_ticks, self.now_ticks + reach_ticks
        if self.troubles and ((self.troubles[-1][0] <= end and start <= self.troubles[-1][1]) or len(self.troubles) == MAX_HOLES):
            last_start, last_end = self.troubles.pop()
            start, end = min(start, last_start), max(end, last_end)
        self.troubles.append((start, end))

    def see(self, what: str, of_decoder: bool = False) -> None:
        """Count a fault under these words."""
        self.counts[what] += 1
        self.trouble(of_decoder)

    def note(self, what: str) -> None:
        """Record a fault that happens once, in these words."""
        self.notes.append(what)
        self.trouble()

    def remark(self, what: str) -> None:
        """Count something unusual by which nothing is lost."""
        self.counts[what] += 1

    def hole(self, start_ticks: int, end_ticks: int) -> None:
        """Record a time without a picture where one was due."""
        self.hole_ticks += end_ticks - start_ticks
        if len(self.holes) < MAX_HOLES:
            self.holes.append((start_ticks, end_ticks))

    def share(self, frames: int, missing_end_ticks: int, end_ticks: int, broadcast: bool, silences: Sequence[tuple[int, int]]) -> float:
        """Return the share of the picture that is lost or damaged, 0 to 1.

        ``frames`` pictures were shown until ``end_ticks``; ``missing_end_ticks`` are declared beyond; ``silences`` are the gaps of the
        sound, in the same ticks; ``broadcast`` says that the container has no variable frame rates.
        """
        regular = len(self.holes) <= (1 - REGULAR_SHARE) * frames
        if broadcast and regular:
            hole_ticks = self.hole_ticks
        else:
            troubles, gaps = _Intervals(self.troubles), _Intervals(silences)
            lost = ((start, end) for start, end in self.holes if troubles.within(start, end) or 2 * gaps.within(start, end) >= end - start)
            hole_ticks = sum(end - start for start, end in lost)
            if self.troubles:  # the times of holes that were not recorded are unknown
                hole_ticks += self.hole_ticks - sum(end - start for start, end in self.holes)
        usual_ticks = max((end_ticks - self.hole_ticks) / frames, 1)
        # A lost packet also leaves a hole, so the larger of the two counts.
        lost_frames = max(self.lost_frames, hole_ticks / usual_ticks) + missing_end_ticks / usual_ticks
        damaged = max(self.corrupt_frames, self.concealed_frames) or self.complaints  # some decoders report nothing else
        kept = (self.hole_ticks - hole_ticks) / usual_ticks  # during holes that are not a loss the picture before stays
        return min((lost_frames + damaged) / (frames + kept + lost_frames), 1.0)

    def summary(self) -> str:
        """Return the counts in words, "no error was reported" where there are none."""
        return ", ".join(self.in_words()) or "no error was reported"

    def in_words(self) -> list[str]:
        """Return all faults and remarks for people."""
        words = [f"{count} {what}" for what, count in self.counts.items()] + self.notes
        if self.concealed_frames:
            words.append(f"{self.concealed_frames} pictures in which the decoder concealed errors")
        if self.complaints:
            words.append(f"{self.complaints} video packets of which the decoder complains")
        return words


class _Intervals:
    """Intervals of time; overlapping ones are joined."""

    def __init__(self, intervals: Iterable[tuple[int, int]]):
        self.starts: list[int] = []
        self.ends: list[int] = []
        for start, end in sorted(intervals):
            if self.ends and start <= self.ends[-1]:
                self.ends[-1] = max(self.ends[-1], end)
            else:
                self.starts.append(start)
                self.ends.append(end)

    def within(self, start: int, end: int) -> int:
        """Return how much of the time from ``start`` to ``end`` the intervals cover."""
        places = range(bisect.bisect_right(self.ends, start), bisect.bisect_left(self.starts, end))
        return sum(min(end, self.ends[place]) - max(start, self.starts[place]) for place in places)
