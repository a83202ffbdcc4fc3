"""Decoded frames to pixels: the detector's small pictures, the kept frames, and thumbnails for people.

Pixel contract: RGB, 8 bits a channel, rows top to bottom, as a player shows the frame: turned by the display matrix, square
pixels (kept frames and thumbnails), HDR mapped to the range of ordinary screens (see ``tone.py``), fields of interlaced
video woven together as they are stored.

Every frame is scaled once, to a working picture of about the size that is kept, by averaging areas; the detector's
48 x 27 are made from that by bicubic interpolation. Against bicubic interpolation from the full frame, which is what the
detector was trained on, this differs by a rounding error (0.2 of 255 levels on average, 5 at most, on film), at half the
cost. Pictures that are not larger than the working picture are scaled directly.

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

from mediafm_ray.media import tone
from mediafm_ray.spec import DETECTOR_HEIGHT, DETECTOR_WIDTH

MAX_ASPECT = 4  # longer side of a kept frame as a multiple of the configured shorter side
MIN_WORKING_SIZE = 192  # shorter side from which the detector's pictures may be made without a visible difference
WORKING_FORMAT = "yuv420p"  # the cheapest format, because nearly all video is stored in it


@dataclass(frozen=True)
class Orientation:
    """Turn of a stored picture for display: quarter turns counter-clockwise, then mirrored left to right."""

    quarters: int = 0
    mirrored: bool = False

    def apply(self, picture_HWC: np.ndarray) -> np.ndarray:
        turned = np.rot90(picture_HWC, self.quarters)
        return turned[:, ::-1] if self.mirrored else turned


def turn_of(frame: av.VideoFrame) -> Orientation:
    """Return the turn in the frame's display matrix, rounded to a quarter.

    The matrix (ISO/IEC 14496-12, 8.5.2.3; 16.16 fixed point) maps stored (x, y) to shown (a x + c y, b x + d y), y down.
    """
    try:
        matrix = cast(Any, frame.side_data).get(SideData.DISPLAYMATRIX)  # PyAV's stub has strings as keys, the object has types
    except ValueError:  # PyAV returns no side data of a frame that has a kind unknown to it
        return Orientation(round(frame.rotation / 90) % 4)
    if matrix is None:
        return Orientation()
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix)[:36])
    if a * d - b * c == 0:  # players ignore a matrix that is not a turn
        return Orientation()
    mirrored = a * d - b * c < 0
    if mirrored:  # without the mirror (x -> -x after the turn) a pure rotation is left
        a, c = -a, -c
    # A rotation counter-clockwise by t on a y-down screen maps (1, 0) to (cos t, -sin t).
    quarters = round(np.degrees(np.arctan2(-b, a)) / 90) % 4
    return Orientation(int(quarters), mirrored)


@dataclass(frozen=True)
class WorkingFrame:
    """A working picture that may be kept: as stored (not turned), planar YUV 4:2:0, 8 bits."""

    planes: np.ndarray  # (width * height * 3 / 2,) uint8: Y, U, V
    width: int
    height: int
    colorspace: int
    color_range: int
    transfer: int
    turn: Orientation


class FrameConverter:
    """Converts the frames of one title to pixels. Frames may change size or format in mid-stream.

    Working pictures lie in reused memory: return them with ``discard``. (Fresh memory for each, between the decoder's
    large frames, would fragment the heap to many times their size.)
    """

    def __init__(self, size: int, pixel_aspect: Fraction):
        self.size = size
        self.pixel_aspect = pixel_aspect  # width / height of a stored pixel
        self.to_working = VideoReformatter()
        self.to_detector = VideoReformatter()
        self.to_rgb = VideoReformatter()
        self.free: list[np.ndarray] = []
        self.turn = Orientation()
        self.rotation: int | None = None  # rotation of the frame that ``turn`` was read from
        self.kept: tuple[int, int] | None = None  # width and height of kept frames; by default ``kept_size`` decides for each

    def expect(self, like: av.VideoFrame, kept: tuple[int, int]) -> None:
        """Expect scaled frames without side data from now on: turn them as ``like`` and keep them at the given size."""
        self.turn, self.rotation, self.kept = turn_of(like), 0, kept

    def pictures(self, frame: av.VideoFrame) -> tuple[np.ndarray, WorkingFrame]:
        """Return the detector's picture of a frame, (27, 48, 3) uint8 RGB, and its working picture."""
        if frame.rotation != self.rotation:  # reading side data keeps a frame in memory for long, so only after a change
            self.rotation, self.turn = frame.rotation, turn_of(frame)
        turn = self.turn
        width, height = self.kept or kept_size(frame.width, frame.height, self.pixel_aspect, self.size)
        working = self.to_working.reformat(frame, width, height, WORKING_FORMAT, interpolation=Interpolation.AREA, threads=1)
        reduced = width < frame.width and height < frame.height and min(width, height) >= MIN_WORKING_SIZE
        columns, rows = (DETECTOR_WIDTH, DETECTOR_HEIGHT) if turn.quarters % 2 == 0 else (DETECTOR_HEIGHT, DETECTOR_WIDTH)
        tiny = self.to_detector.reformat(
            working if reduced else frame, columns, rows, "rgb24", interpolation=Interpolation.BICUBIC, threads=1
        )
        detector_HWC = turn.apply(tone.to_ordinary_range(tiny.to_ndarray(), int(frame.color_trc)))
        return detector_HWC, self._put_aside(working, int(frame.color_trc), turn)

    def rgb_HWC(self, small: WorkingFrame) -> np.ndarray:
        """Return the (H, W, 3) uint8 RGB of a working picture, as a player shows it."""
        frame = av.VideoFrame.from_ndarray(small.planes.reshape(small.height * 3 // 2, small.width), format=WORKING_FORMAT)
        frame.colorspace, frame.color_range = small.colorspace, small.color_range
        picture = self.to_rgb.reformat(frame, format="rgb24", interpolation=Interpolation.BICUBIC, threads=1)
        return small.turn.apply(tone.to_ordinary_range(picture.to_ndarray(), small.transfer))

    def discard(self, small: WorkingFrame) -> None:
        """Reuse the memory of a picture that is not needed any more for the next one of the same size."""
        if not self.free or self.free[-1].size == small.planes.size:
            self.free.append(small.planes)

    def _put_aside(self, working: av.VideoFrame, transfer: int, turn: Orientation) -> WorkingFrame:
        size = working.width * working.height * 3 // 2
        if self.free and self.free[-1].size != size:
            self.free.clear()
        planes = self.free.pop() if self.free else np.empty(size, np.uint8)
        start = 0
        for plane in working.planes:
            rows = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
            planes[start : start + rows.size].reshape(rows.shape)[:] = rows
            start += rows.size
        return WorkingFrame(planes, working.width, working.height, int(working.colorspace), int(working.color_range), transfer, turn)


def kept_size(width: int, height: int, pixel_aspect: Fraction, size: int) -> tuple[int, int]:
    """Return width and height of a kept frame: square pixels, shorter side ``size`` at most, never enlarged, sides even."""
    shown_width, shown_height = float(width * pixel_aspect), float(height)
    if pixel_aspect < 1:  # enlarging the height makes square pixels without a loss
        shown_width, shown_height = float(width), float(height / pixel_aspect)
    shorter, longer = sorted((shown_width, shown_height))
    scale = min(1.0, size / shorter, MAX_ASPECT * size / longer)
    return max(2 * round(shown_width * scale / 2), 2), max(2 * round(shown_height * scale / 2), 2)


def jpeg(picture_HWC: np.ndarray, quality: int, width: int = 0) -> bytes:
    """Encode the picture as a baseline JPEG, reduced to ``width`` columns where that is given and it has more."""
    image = Image.fromarray(np.ascontiguousarray(picture_HWC))
    if 0 < width < image.width:
        image = image.resize((width, max(round(image.height * width / image.width), 1)), Image.Resampling.BOX)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()
