"""Films that share runs of shots, made from footage and from drawn pictures, for the benchmark of repeats.

A catalog has originals, films of one disturbance each, and unrelated films. A run is a piece of footage of some shots; it is unchanged in
an original, and disturbed in other films, at other times. Between the runs every film has footage of its own. A family, the videos whose
names begin with the same word, serves either runs or one film alone, so that no film shares anything but runs with another.

Shapes
    T  frames
    H, W  height and width
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw

from tests.videos import numbered_picture

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mpg", ".ts", ".mov", ".avi")
SIZE = (384, 216)  # width and height of the films
RATE = 25  # frames a second of the films
SAME_FILM = (("tears", "tos"),)  # first words of names that mean one family
RUN_S = (2.5, 9.0)  # seconds of a run, from and to
OWN_S = (2.0, 5.0)  # seconds of a piece between two runs
DRAWN_SHOT_S = (1.2, 5.0)  # seconds of a drawn shot
TILES = 0.15  # share of the drawn shots of a film's own that all look alike
CROP = 0.05  # of width and height
BRIGHTER = 1.2
OTHER_RATE = Fraction(24000, 1001)


@dataclass(frozen=True)
class Piece:
    """Some seconds of a source: a file, or the drawn shots of a seed (an empty path)."""

    path: str
    start_s: float
    end_s: float
    seed: int = 0
    run: int = -1  # number of the run; -1 for footage of a film's own

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end_s - self.start_s


@dataclass
class Plan:
    """A film to make: its pieces, in order, and what is done to the runs among them."""

    title_id: str
    disturbance: str  # "" for originals and unrelated films
    pieces: list[Piece] = field(default_factory=list)


@dataclass(frozen=True)
class Found:
    """A run that was found."""

    title_a: str
    title_b: str
    start_a_s: float
    end_a_s: float
    start_b_s: float
    end_b_s: float


@dataclass(frozen=True)
class SharedRun(Found):
    """The truth: two films show the same run at these seconds."""

    label: str  # what was done to the copy


# ------------------------------------------------------------------------------------------------------------ disturbances


def _recoded(frames_THWC: np.ndarray, codec: str, bits: int) -> np.ndarray:
    """Encode with another codec at a low bit rate and decode again."""
    content = io.BytesIO()
    height, width = frames_THWC.shape[1:3]
    with av.open(content, "w", format="matroska") as container:
        stream: Any = container.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = width, height, "yuv420p", bits
        for frame in frames_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    content.seek(0)
    with av.open(content, "r") as reader:
        found = [frame.to_ndarray(format="rgb24") for frame in reader.decode(video=0)]
    return np.stack((found + [found[-1]] * len(frames_THWC))[: len(frames_THWC)])


def _each(change: Callable[[Image.Image, int], Image.Image], frames_THWC: np.ndarray) -> np.ndarray:
    return np.stack([np.asarray(change(Image.fromarray(frame), number)) for number, frame in enumerate(frames_THWC)])


def _crop(picture: Image.Image, number: int) -> Image.Image:
    width, height = picture.size
    box = (width * CROP / 2, height * CROP / 2, width * (1 - CROP / 2), height * (1 - CROP / 2))
    return picture.resize(picture.size, Image.Resampling.BICUBIC, box)


def _subtitle(picture: Image.Image, number: int) -> Image.Image:
    picture = picture.copy()
    width, height = picture.size
    words = ("Where have you been all night?", "I told you not to come here.", "Look at that!")[number // 50 % 3]
    draw = ImageDraw.Draw(picture)
    place = (width * 0.18, height * 0.86)
    draw.text(place, words, fill="white", font_size=height / 13, stroke_width=2, stroke_fill="black")
    return picture


def _logo(picture: Image.Image, number: int) -> Image.Image:
    picture = picture.copy()
    width, height = picture.size
    ImageDraw.Draw(picture).rounded_rectangle((width * 0.84, height * 0.06, width * 0.95, height * 0.17), 6, fill=(230, 40, 40))
    return picture


DISTURBANCES: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "copied": lambda frames: frames,
    "re-encoded, MPEG-4 at 250 kb/s": lambda frames: _recoded(frames, "mpeg4", 250_000),
    "re-encoded, MPEG-2 at 400 kb/s": lambda frames: _recoded(frames, "mpeg2video", 400_000),
    "cropped by 5 %": lambda frames: _each(_crop, frames),
    "subtitled": lambda frames: _each(_subtitle, frames),
    "with a logo": lambda frames: _each(_logo, frames),
    "brighter by 20 %": lambda frames: np.clip(frames * BRIGHTER, 0, 255).astype(np.uint8),
    "scaled to 192 x 108": lambda frames: frames,  # The whole film is.
    "at 23.976 frames a second": lambda frames: frames,  # The whole film is.
    "shortened": lambda frames: frames[len(frames) // 5 : len(frames) - len(frames) // 5],  # as a recap does, within a shot
}


# ----------------------------------------------------------------------------------------------------------------- footage


def drawn_frames(seed: int, seconds: float, rate: Fraction, tiles: float) -> Iterator[np.ndarray]:
    """Yield the frames of drawn shots: soft textures with moving shapes under a moving camera.

    ``tiles``: share of shots that are pictures of the tests' videos instead, which all look alike.
    """
    random = np.random.default_rng([17, seed])
    count, shot = round(seconds * rate), 0
    while count > 0:
        length = min(count, round(random.uniform(*DRAWN_SHOT_S) * rate))
        length = count if count - length < rate else length
        yield from _tiles(random, length) if random.random() < tiles else _drawn_shot(random, length)
        count -= length
        shot += 1


def _tiles(random: np.random.Generator, length: int) -> Iterator[np.ndarray]:
    first, shot = int(random.integers(0, 1000)), int(random.integers(0, 1 << 30))
    for number in range(length):
        yield numbered_picture(first + number, shot, *SIZE)


def _drawn_shot(random: np.random.Generator, length: int) -> Iterator[np.ndarray]:
    width, height = SIZE
    canvas = np.zeros((height * 2, width * 2, 3))
    for cells, share in ((2, 1.0), (5, 0.6), (13, 0.35), (40, 0.2)):
        grid = Image.fromarray(random.integers(0, 256, (cells, cells * 2, 3), dtype=np.uint8))
        canvas += share * (np.asarray(grid.resize((width * 2, height * 2), Image.Resampling.BICUBIC), float) - 128)
    tint, contrast = random.uniform(50, 205, 3), random.uniform(0.15, 0.8)
    canvas = np.clip(canvas * contrast + tint, 0, 255).astype(np.uint8)
    pan = random.uniform(-0.12, 0.12, 2)
    shapes = [
        (random.choice(["ellipse", "rectangle"]), random.uniform(0, 1, 2), random.uniform(0.04, 0.3, 2), random.uniform(-0.4, 0.4, 2),
         tuple(random.integers(0, 256, 3).tolist()))
        for _ in range(int(random.integers(1, 7)))
    ]  # fmt: skip
    for number in range(length):
        t = number / max(length, 1) - 0.5
        left, top = ((0.5 + pan * t) * (width, height)).astype(int)
        picture = Image.fromarray(np.ascontiguousarray(canvas[top : top + height, left : left + width]))
        draw = ImageDraw.Draw(picture)
        for kind, place, size, speed, colour in shapes:
            (x, y), (w, h) = (place + speed * t) * (width, height), size * (width, height)
            getattr(draw, kind)((x - w / 2, y - h / 2, x + w / 2, y + h / 2), fill=colour)
        yield np.asarray(picture)


def file_frames(path: str, start_s: float, end_s: float, rate: Fraction) -> Iterator[np.ndarray]:
    """Yield the frames of some seconds of a file at a rate, in the shape of the films."""
    wanted = [start_s + number / float(rate) for number in range(round((end_s - start_s) * rate))]
    with av.open(path) as container:
        stream = container.streams.video[0]
        if start_s > 1:
            container.seek(round((start_s - 0.5) * av.time_base), backward=True)
        last = None
        for frame in container.decode(stream):
            if wanted and last is not None and frame.time > wanted[0]:
                picture = _fitted(last)
                while wanted and frame.time > wanted[0]:
                    wanted.pop(0)
                    yield picture
            if not wanted:
                return
            last = frame
    if last is not None:
        yield from [_fitted(last)] * len(wanted)


def _fitted(frame: av.VideoFrame) -> np.ndarray:
    return frame.reformat(*SIZE, format="rgb24", interpolation="AREA").to_ndarray()


def families(folders: Sequence[str]) -> dict[str, list[tuple[str, float]]]:
    """Return the videos with their seconds by the first word of their names."""
    found: dict[str, list[tuple[str, float]]] = {}
    for folder in folders:
        for path in sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in VIDEO_SUFFIXES):
            word = re.split(r"[^a-z]", path.stem.lower())[0]
            word = next((words[0] for words in SAME_FILM if word in words), word)
            with av.open(str(path)) as container:
                found.setdefault(word, []).append((str(path), (container.duration or 0) / av.time_base - 0.5))
    return found


# ------------------------------------------------------------------------------------------------------------------- films


def plan_films(folders: Sequence[str], seed: int, runs: int, copies: int, unrelated: int) -> list[Plan]:
    """Plan a catalog: so many runs, each in an original and in so many of the disturbed films."""
    random = np.random.default_rng([19, seed])
    there = families(folders)
    names = [str(name) for name in random.permutation(sorted(there))]
    films = [Plan(f"original-{number}", "") for number in range(3)]
    films += [Plan(f"film-{number:02}", name) for number, name in enumerate(DISTURBANCES)]
    films += [Plan(f"unrelated-{number}", "") for number in range(unrelated)]
    for_runs = names[: len(names) * 2 // 5]
    # The unrelated films come first, so that real footage is among them where there are few families.
    own = {film.title_id: names[len(for_runs) + number :: len(films)] for number, film in enumerate(reversed(films))}
    drawn = iter(range(seed * 100_000, (seed + 1) * 100_000))
    footage = {name: _pieces(there[name], random, RUN_S) for name in names}
    pool = [piece for name in for_runs for piece in footage[name][::2]]  # Two neighbours can be parts of one shot.
    real = [pool[index] for index in random.permutation(len(pool))][: runs * 2 // 3]
    shared = real + [_drawn(next(drawn), random, RUN_S) for _ in range(runs - len(real))]
    placed: dict[str, list[Piece]] = {film.title_id: [] for film in films}
    disturbed = films[3 : 3 + len(DISTURBANCES)]
    for run, piece in enumerate(shared):
        marked = Piece(piece.path, piece.start_s, piece.end_s, piece.seed, run)
        hosts = [films[run % 3], *(disturbed[int(index)] for index in random.permutation(len(disturbed))[:copies])]
        for host in hosts:
            placed[host.title_id].append(marked)
    for film in films:
        mine = [piece for name in own[film.title_id] for piece in footage[name]][:6]
        fresh = [mine[index] for index in random.permutation(len(mine))]
        inside = [placed[film.title_id][index] for index in random.permutation(len(placed[film.title_id]))]
        for run_piece in [*inside, None] if inside else [None] * 6:
            film.pieces.append(fresh.pop() if fresh else _drawn(next(drawn), random, OWN_S))
            film.pieces += [run_piece] if run_piece else []
        film.pieces += fresh
    return films


def _pieces(files: Sequence[tuple[str, float]], random: np.random.Generator, bounds: tuple[float, float]) -> list[Piece]:
    """Cut the longest file of a family into pieces: the others may show the same."""
    path, seconds = max(files, key=lambda file: file[1])
    found, at = [], 0.0
    while seconds - at > bounds[0]:
        end = min(at + random.uniform(*bounds), seconds)
        end = seconds if seconds - end < bounds[0] else end
        found.append(Piece(path, at, end))
        at = end
    return found


def _drawn(seed: int, random: np.random.Generator, bounds: tuple[float, float]) -> Piece:
    return Piece("", 0.0, float(random.uniform(*bounds)), seed)


def write_film(film: Plan, folder: Path) -> dict[int, tuple[float, float]]:
    """Write a film; return the seconds of its runs."""
    rate = OTHER_RATE if "frames a second" in film.disturbance else Fraction(RATE)
    width, height = (192, 108) if "scaled" in film.disturbance else SIZE
    places: dict[int, tuple[float, float]] = {}
    number = 0
    with av.open(str(folder / f"{film.title_id}.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"preset": "ultrafast", "qp": "0"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for piece in film.pieces:
            begun = number
            frames = (
                drawn_frames(piece.seed, piece.seconds, rate, 0.0 if piece.run >= 0 else TILES)
                if not piece.path
                else file_frames(piece.path, piece.start_s, piece.end_s, rate)
            )
            if piece.run >= 0 and film.disturbance:
                frames = iter(DISTURBANCES[film.disturbance](np.stack(list(frames))))
            for picture in frames:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24").reformat(width, height, "yuv420p")
                frame.pts, frame.time_base = number, 1 / rate
                container.mux(stream.encode(frame))
                number += 1
            if piece.run >= 0:
                places[piece.run] = float(begun / rate), float(number / rate)
        container.mux(stream.encode(None))
    return places


def make_films(films: Sequence[Plan], folder: Path) -> list[SharedRun]:
    """Write the films; return every run that two of them share."""
    folder.mkdir(parents=True)
    places = {film.title_id: write_film(film, folder) for film in films}
    truth = []
    for first, a in enumerate(films):
        for b in films[first + 1 :]:
            a_, b_ = sorted((a, b), key=lambda film: film.title_id)
            for run in sorted(places[a_.title_id].keys() & places[b_.title_id].keys()):
                (start_a, end_a), (start_b, end_b) = places[a_.title_id][run], places[b_.title_id][run]
                if "shortened" in (a_.disturbance, b_.disturbance) and a_.disturbance != b_.disturbance:
                    # What both show is the middle.
                    if b_.disturbance == "shortened":
                        cut = (end_a - start_a) / 5
                        start_a, end_a = start_a + cut, end_a - cut
                    else:
                        cut = (end_b - start_b) / 5
                        start_b, end_b = start_b + cut, end_b - cut
                label = a_.disturbance or b_.disturbance if not (a_.disturbance and b_.disturbance) else "two disturbances"
                truth.append(SharedRun(a_.title_id, b_.title_id, start_a, end_a, start_b, end_b, label))
    return truth
