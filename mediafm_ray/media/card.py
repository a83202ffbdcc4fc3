"""Decoding on an NVIDIA card, through the decoders that PyAV's wheels carry (``*_cuvid``); the only other requirement is the driver.

The card decodes by the same standards as the CPU, bit by bit, and scales the pictures down before they leave it, so that little has to
be copied: to ``CARD_SCALE`` times the size that is kept, from which a CPU averages the rest. It does not report errors that it conceals,
pictures that a file hides, or a turned picture. So the CPU decodes the first picture of every title, which gives orientation and
colours, and anything that looks like damage, or differs from what the CPU would return, raises ``CardError``: the CPU decodes the title.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, cast

import av

from mediafm_ray.errors import CardError
from mediafm_ray.media.picture import kept_size

DECODERS = {"h264": "h264_cuvid", "hevc": "hevc_cuvid", "av1": "av1_cuvid", "vp9": "vp9_cuvid"}  # keys are FFmpeg's names of the codecs
LOGGED_AS = ("AVHWDeviceContext", *DECODERS.values())  # names in FFmpeg's log whose lines are not about the file
CARD_SCALE = 2  # size of the pictures that leave the card, as a multiple of the kept size: the card's scaling averages too few pixels
MAX_FIRST_PACKETS = 64  # packets before the first picture; with more the title stays on the CPU


@functools.cache
def is_visible() -> bool:
    """Return whether this process has an NVIDIA driver and may use a card (CUDA_VISIBLE_DEVICES)."""
    count = ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def codec_of(stream: av.VideoStream) -> str:
    """Return FFmpeg's name of the codec, not of the CPU's decoder for it."""
    return stream.codec_context.codec.canonical_name


class CardDecoder:
    """The card's decoder of one title. Its frames are smaller than the CPU's, and NV12 or P010."""

    def __init__(
        self,
        stream: av.VideoStream,
        packets: Sequence[Any],
        first: av.VideoFrame,
        pixel_aspect: Fraction,
        size: int,
        scale: int = CARD_SCALE,
    ) -> None:
        """Open the decoder and decode ``packets``, the first ones of the title.

        ``first`` is the CPU's first picture of them, ``size`` the shorter side of a kept frame. Raises CardError where the card cannot
        decode the title: no driver, no decoder, an unknown pixel format.
        """
        self.name = DECODERS[codec_of(stream)]
        self.first = first
        self.kept = kept_size(first.width, first.height, pixel_aspect, size)
        self.context = cast(Any, av.CodecContext.create(self.name, "r"))
        self.context.extradata = stream.codec_context.extradata
        self.context.width, self.context.height, self.context.pix_fmt = first.width, first.height, first.format.name
        width, height = (scale * side for side in self.kept)
        if width < first.width and height < first.height:
            self.context.options = {"resize": f"{width}x{height}"}
        self.durations: dict[int, int] = {}  # by time stamp, for packets whose picture has not come
        self.coded: tuple[int, int] | None = None
        try:
            self.context.open()
        except (av.error.FFmpegError, MemoryError) as error:
            raise CardError(f"{self.name} cannot be opened: {_reason(error)}") from error
        self.frames = [frame for packet in packets for frame in self.decode(packet)]

    def decode(self, packet: Any) -> list[av.VideoFrame]:
        """Return the pictures that a packet completes; for an empty packet, those that are left. Raises CardError."""
        if packet.size:
            self._check(packet)
            self.durations[packet.pts] = packet.duration or 0
        try:
            frames = self.context.decode(packet if packet.size else None)
        except av.error.EOFError:  # flushed before
            return []
        except (av.error.FFmpegError, MemoryError) as error:
            raise CardError(f"{self.name} failed: {_reason(error)}") from error
        if frames and self.coded is None:
            self.coded = self._coded_size()
        if frames and self.coded != self._coded_size():
            raise CardError("the size of the picture changes")
        for frame in frames:
            self._complete(frame)
        return frames

    def check_end(self) -> None:
        """Check after the flush that no picture is missing (two packets of fields make one picture). Raises CardError."""
        if self.durations and not self.first.interlaced_frame:
            raise CardError(f"{self.name} gave no picture for {len(self.durations)} packets")

    def _check(self, packet: Any) -> None:
        if packet.pts is None:
            raise CardError("there are packets without a time stamp")
        if packet.is_discard:
            raise CardError("the file hides some of its pictures")
        if packet.pts in self.durations:
            raise CardError("two packets have one time stamp")

    def _complete(self, frame: av.VideoFrame) -> None:
        """Set the properties of a frame that the card does not pass on."""
        if frame.pts not in self.durations:
            raise CardError(f"{self.name} gave a time stamp that no packet has")
        frame.duration = self.durations.pop(frame.pts)
        for name in ("colorspace", "color_range", "color_trc", "color_primaries"):
            setattr(frame, name, getattr(self.first, name))

    def _coded_size(self) -> tuple[int, int]:
        return self.context.coded_width, self.context.coded_height


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
