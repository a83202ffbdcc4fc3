"""A decoded frame to pixels: the detector's small pictures, the frames that are kept, thumbnails for people.

Pixel contract: RGB, 8 bits a channel, rows top to bottom, as a player shows the frame: turned by the display matrix,
square pixels (kept frames and thumbnails), deinterlaced not at all.

    T frames, H rows, W columns, C channels (RGB)
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image

from mediafm_ray.spec import DETECTOR_HEIGHT, DETECTOR_WIDTH

MAX_ASPECT = 4  # longer side of a kept frame, at most this many times the configured shorter side


@dataclass(frozen=True)
class Turn:
    """How a stored picture is turned to be shown: quarter turns counter-clockwise, then mirrored left to right."""

    quarters: int = 0
    mirrored: bool = False

    def apply(self, picture_HWC: np.ndarray) -> np.ndarray:
        turned = np.rot90(picture_HWC, self.quarters)
        return turned[:, ::-1] if self.mirrored else turned


def turn_of(frame: av.VideoFrame) -> Turn:
    """The turn that the frame's display matrix asks for, to the nearest quarter.

    The matrix (ISO/IEC 14496-12, 8.5.2.3; 16.16 fixed point) maps stored (x, y) to shown (a x + c y, b x + d y), y down.
    """
    try:
        matrix = cast(Any, frame.side_data).get(SideData.DISPLAYMATRIX)  # typed as a mapping of strings, is one of types
    except ValueError:  # PyAV does not know one of the frame's other kinds of side data and gives none of them
        return Turn(round(frame.rotation / 90) % 4)
    if matrix is None:
        return Turn()
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix)[:36])
    if a * d - b * c == 0:  # not a turn at all: ignored as players do
        return Turn()
    mirrored = a * d - b * c < 0
    if mirrored:  # take the mirror out (x -> -x after the turn); what is left is a pure rotation
        a, c = -a, -c
    # a rotation counter-clockwise by t on a y-down screen maps (1, 0) to (cos t, -sin t)
    quarters = round(np.degrees(np.arctan2(-b, a)) / 90) % 4
    return Turn(int(quarters), mirrored)


@dataclass(frozen=True)
class Kept:
    """A small picture that waits for its choice: scaled, as stored (not turned), YUV."""

    frame: av.VideoFrame
    turn: Turn


class Painter:
    """Turns the frames of one title into pixels. Copes with frames that change size or format in mid-stream."""

    def __init__(self, size: int, pixel_aspect: Fraction):
        self.size = size
        self.pixel_aspect = pixel_aspect  # width / height of a stored pixel
        self.to_detector = VideoReformatter()
        self.to_kept = VideoReformatter()
        self.to_rgb = VideoReformatter()

    def detector_HWC(self, frame: av.VideoFrame) -> np.ndarray:
        """(27, 48, 3) uint8 RGB: the whole picture squeezed by bicubic interpolation, as TransNet V2 was trained on."""
        turn = turn_of(frame)
        width, height = (DETECTOR_WIDTH, DETECTOR_HEIGHT) if turn.quarters % 2 == 0 else (DETECTOR_HEIGHT, DETECTOR_WIDTH)
        small = self.to_detector.reformat(frame, width, height, "rgb24", interpolation=Interpolation.BICUBIC, threads=1)
        return turn.apply(small.to_ndarray())

    def kept(self, frame: av.VideoFrame) -> Kept:
        """The frame scaled for keeping, not yet turned or converted to RGB (most candidates are never needed)."""
        width, height = kept_size(frame.width, frame.height, self.pixel_aspect, self.size)
        small = self.to_kept.reformat(frame, width, height, "yuv420p", interpolation=Interpolation.AREA, threads=1)
        return Kept(small, turn_of(frame))

    def rgb_HWC(self, kept: Kept) -> np.ndarray:
        """(H, W, 3) uint8 RGB of a kept frame, turned as a player shows it."""
        picture = self.to_rgb.reformat(kept.frame, format="rgb24", interpolation=Interpolation.BICUBIC, threads=1)
        return kept.turn.apply(picture.to_ndarray())


def kept_size(width: int, height: int, pixel_aspect: Fraction, size: int) -> tuple[int, int]:
    """Width and height of a kept frame: square pixels, shorter side ``size`` at most, never enlarged, sides even."""
    shown_width, shown_height = float(width * pixel_aspect), float(height)
    if pixel_aspect < 1:  # square pixels without enlarging the width
        shown_width, shown_height = float(width), float(height / pixel_aspect)
    shorter, longer = sorted((shown_width, shown_height))
    scale = min(1.0, size / shorter, MAX_ASPECT * size / longer)
    return max(2 * round(shown_width * scale / 2), 2), max(2 * round(shown_height * scale / 2), 2)


def jpeg(picture_HWC: np.ndarray, quality: int) -> bytes:
    """The picture as a baseline JPEG."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture_HWC)).save(file, "JPEG", quality=quality)
    return file.getvalue()


def thumbnail(picture_HWC: np.ndarray, width: int, quality: int) -> bytes:
    """The picture as a JPEG of the given width (never enlarged)."""
    image = Image.fromarray(np.ascontiguousarray(picture_HWC))
    if image.width > width:
        image = image.resize((width, max(round(image.height * width / image.width), 1)), Image.Resampling.BOX, reducing_gap=2.0)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()
