"""Films with known scenes, places and cut-aways, assembled from real takes, for the benchmark of context.

A source video is cut into its shots; a long enough shot is a place. A place is seen through several views (crops at several scales, one of
them mirrored, with their own brightness and colour) and at several moments, each with the sound of that moment: a take is one view of one
moment, and is embedded once. Two videos show one film when the first words of their names agree, when the caller says so, or when their
takes are nearly the same pictures: places of one film are never on both sides of a split.

A film draws places, and scenes that show them: a scene alternates between views of its place, now and then between two places (cross-cut);
places recur; some scenes have captions, some have no sound; scenes and shots vary in length. A cut-away is a shot of a place outside the
film in the middle of a scene: its scene is still the scene.

Shapes
    N  takes
    S  shots of a film
    D  dimension of a vector
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from mediafm_ray.models.fusion import fuse
from mediafm_ray.models.options import FusionConfig

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mpg", ".ts", ".mov", ".avi")
MIN_PLACE_S = 1.5  # seconds: a shorter shot has no moments that differ
FRAMES_PER_SHOT = 24
MOMENTS = 4  # of a place
FRAMES_PER_TAKE = 3
VIEWS = (  # left, top, width and height as shares of the picture; mirrored; factors of brightness and colour
    ((0.0, 0.0, 1.0, 1.0), False, 1.0, 1.0),
    ((0.0, 0.1, 0.6, 0.6), False, 1.1, 0.9),
    ((0.4, 0.35, 0.6, 0.6), True, 0.9, 1.15),
)
MIN_PICTURE_DEVIATION = 8.0  # of 255, grey: a flatter picture is a fade or a title card, not a place
SAME_FILM_COSINE = 0.985  # of the video vectors of two takes: they are the same pictures, encoded twice
SAME_PLACE_COSINE = 0.85  # two shots of a film that are so alike may well show one place, and which one would be a matter of taste

PLACES_IN_FILM = (4, 8)  # from and below
SCENES_IN_FILM = (4, 8)
SHOTS_IN_SCENE = (4, 13)
CROSS_CUT = 0.15  # probability that a scene alternates between two places
TURN = 0.75  # probability that the next shot shows another view
RECUR = 0.4  # probability that a scene returns to a place that the film has shown
CAPTIONED, SILENT = 0.4, 0.1  # probabilities of a scene
SPOKEN = 0.6  # probability that a shot of a captioned scene has a line
MEDIAN_SHOT_S, SHOT_SPREAD = 3.0, 0.5  # of a log-normal distribution
TOPICS = ("the boat", "money", "my sister", "the war", "dinner", "the storm", "that letter", "the horses", "school", "the doctor")
LINES = (
    "Do you remember {0}?",
    "I cannot talk about {0} now.",
    "It was never about {0}.",
    "Tell him about {0} before he leaves.",
    "What have you done with {0}?",
    "We have to think of {0} first.",
    "Wait, where are you going?",
    "I said no, and I meant it.",
)


@dataclass(frozen=True, eq=False)
class Takes:
    """Embedded takes of places."""

    parts: Mapping[str, np.ndarray]  # (N, D) float32 of video and audio; zero where a take has no sound
    place_N: np.ndarray  # int64
    view_N: np.ndarray  # int64
    film_of_place: tuple[str, ...]  # the film that a place was cut from
    lines: np.ndarray  # (topics, lines, D) float32, the text vectors of the captions

    def save(self, path: str) -> None:
        """Keep them in a .npz file."""
        parts: dict[str, Any] = {f"part_{name}": part for name, part in self.parts.items()}
        np.savez(path, place=self.place_N, view=self.view_N, film=np.array(self.film_of_place), lines=self.lines, **parts)

    @classmethod
    def load(cls, path: str) -> Takes:
        """Read them back."""
        with np.load(path) as kept:
            parts = {name.removeprefix("part_"): kept[name] for name in kept.files if name.startswith("part_")}
            return cls(parts, kept["place"], kept["view"], tuple(kept["film"].tolist()), kept["lines"])

    def places(self, films: Sequence[str]) -> np.ndarray:
        """The places that were cut from some films."""
        return np.array([place for place, film in enumerate(self.film_of_place) if film in films], np.int64)


@dataclass(frozen=True, eq=False)
class Film:
    """A film with what is true of it."""

    title_id: str
    parts: Mapping[str, np.ndarray]  # (S, D) float32 by modality
    fused_SD: np.ndarray  # float32
    start_S: np.ndarray  # float64, seconds
    end_S: np.ndarray
    place_S: np.ndarray  # int64, what the shot shows
    scene_place_S: np.ndarray  # int64, the place of the scene that it stands in: place_S but for cut-aways
    scene_S: np.ndarray  # int64
    cut_away_S: np.ndarray  # bool

    @property
    def boundaries(self) -> tuple[int, ...]:
        """First shots of all scenes but the first."""
        return tuple((np.flatnonzero(np.diff(self.scene_S)) + 1).tolist())


# ------------------------------------------------------------------------------------------------------------ takes


def embed_takes(folders: Sequence[str], same: Sequence[Sequence[str]] = ()) -> Takes:
    """Read every video below the folders once and embed its takes with the offline profile. ``same``: first words that mean one film."""
    from mediafm_ray.errors import TitleError
    from mediafm_ray.media.isolation import IsolatedReader
    from mediafm_ray.media.options import FramesConfig, MediaConfig, TimedTextConfig
    from mediafm_ray.models.detector import ShotDetector
    from mediafm_ray.models.encoder import build_audio_encoder, build_text_encoder, build_video_encoder
    from mediafm_ray.models.options import AudioEncoderConfig, DetectorConfig, TextEncoderConfig, VideoEncoderConfig
    from mediafm_ray.spec import Title

    detector = ShotDetector(DetectorConfig())
    reader = IsolatedReader(FramesConfig(per_shot=FRAMES_PER_SHOT), TimedTextConfig(), MediaConfig())
    video, audio, text = (
        build_video_encoder(VideoEncoderConfig()),
        build_audio_encoder(AudioEncoderConfig()),
        build_text_encoder(TextEncoderConfig()),
    )
    vectors: dict[str, list[np.ndarray]] = {"video": [], "audio": []}
    place_N: list[int] = []
    view_N: list[int] = []
    film_of_place: list[str] = []
    files = [file for folder in folders for file in sorted(Path(folder).rglob("*")) if file.suffix.lower() in VIDEO_SUFFIXES]
    for file in files:
        try:
            media = reader.read(Title(file.stem, str(file)), detector.stream())
        except TitleError as error:
            print(f"passed over: {error}")
            continue
        for shot in media.shots:
            pictures = [Image.open(io.BytesIO(bytes(frame))).convert("RGB") for frame in shot.frames]
            if shot.end_s - shot.start_s < MIN_PLACE_S or len(pictures) < MOMENTS or _is_flat(pictures):
                continue
            samples = np.frombuffer(bytes(shot.audio), "<i2")
            frames = [takes for view in VIEWS for takes in _moments(pictures, view)]
            sound = [samples[len(samples) * moment // MOMENTS : len(samples) * (moment + 1) // MOMENTS] for moment in range(MOMENTS)]
            vectors["video"].append(video.encode(frames).embeddings_SD)
            vectors["audio"].append(np.tile(audio.encode([part.tobytes() for part in sound]).embeddings_SD, (len(VIEWS), 1)))
            place_N += [len(film_of_place)] * len(frames)
            view_N += np.repeat(np.arange(len(VIEWS)), MOMENTS).tolist()
            film_of_place.append(_film_of(file.stem, same))
    reader.close()
    lines = [[line.format(topic) for line in LINES] for topic in TOPICS]
    lines_TLD = np.stack([text.encode(of_topic).embeddings_SD for of_topic in lines])
    parts = {name: np.concatenate(found) for name, found in vectors.items()}
    return without_repeats(Takes(parts, np.array(place_N), np.array(view_N), tuple(film_of_place), lines_TLD))


def _film_of(stem: str, same: Sequence[Sequence[str]]) -> str:
    word = re.split(r"[^a-z]", stem.lower())[0]
    return next((words[0] for words in same if word in words), word)


def _is_flat(pictures: Sequence[Image.Image]) -> bool:
    return float(np.median([np.asarray(picture.convert("L"), np.float64).std() for picture in pictures])) < MIN_PICTURE_DEVIATION


def _moments(pictures: Sequence[Image.Image], view: tuple[tuple[float, float, float, float], bool, float, float]) -> list[list[bytes]]:
    """The JPEG frames of every moment in one view."""
    (left, top, width, height), mirrored, brightness, colour = view
    found = []
    for moment in range(MOMENTS):
        part = pictures[len(pictures) * moment // MOMENTS : len(pictures) * (moment + 1) // MOMENTS]
        frames = []
        for index in np.linspace(0, len(part) - 1, min(FRAMES_PER_TAKE, len(part))).round().astype(int):
            picture = part[index]
            w, h = picture.size
            picture = picture.crop((int(left * w), int(top * h), int((left + width) * w), int((top + height) * h)))
            picture = ImageEnhance.Color(ImageEnhance.Brightness(picture).enhance(brightness)).enhance(colour)
            content = io.BytesIO()
            (ImageOps.mirror(picture) if mirrored else picture).save(content, "JPEG", quality=90)
            frames.append(content.getvalue())
        found.append(frames)
    return found


def _merge_films(cosine_PP: np.ndarray, films: Sequence[str]) -> tuple[str, ...]:
    """The film of every place, those that show nearly the same pictures taken together."""
    name = {film: film for film in films}
    for here, there in {(films[place], films[other]) for place, other in zip(*np.nonzero(cosine_PP > SAME_FILM_COSINE), strict=True)}:
        kept, gone = sorted((name[here], name[there]))
        name = {film: kept if known == gone else known for film, known in name.items()}
    for film, known in sorted(name.items()):
        if film != known:
            print(f"{film} and {known} share pictures: one film")
    return tuple(name[film] for film in films)


def without_repeats(takes: Takes) -> Takes:
    """The takes of places that differ: films that share pictures are merged, and of places of a film that look alike the first is kept."""
    whole = np.flatnonzero(takes.view_N == 0)
    video_ND = takes.parts["video"][whole]
    unit_ND = video_ND / np.maximum(np.linalg.norm(video_ND, axis=1, keepdims=True), 1e-12)
    places = len(takes.film_of_place)
    cosine_PP = (unit_ND @ unit_ND.T).reshape(places, MOMENTS, places, MOMENTS).max(axis=(1, 3))
    films = _merge_films(cosine_PP, takes.film_of_place)
    kept: list[int] = []
    for place in range(places):
        if not any(films[other] == films[place] and cosine_PP[place, other] > SAME_PLACE_COSINE for other in kept):
            kept.append(place)
    rows = np.isin(takes.place_N, kept)
    place_N = np.searchsorted(kept, takes.place_N[rows])
    parts = {name: part[rows] for name, part in takes.parts.items()}
    return Takes(parts, place_N, takes.view_N[rows], tuple(films[place] for place in kept), takes.lines)


def split_films(takes: Takes, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Places to train on and places held out, about half each, no film on both sides."""
    films = sorted(set(takes.film_of_place))
    order = np.random.default_rng([41, seed]).permutation(len(films))
    trained: list[str] = []
    for index in order:
        if len(takes.places(trained)) + len(takes.places([films[index]])) <= len(takes.film_of_place) * 0.5:
            trained.append(films[index])
    return takes.places(trained), takes.places([film for film in films if film not in trained])


# ------------------------------------------------------------------------------------------------------------ films


def make_films(
    takes: Takes, places: np.ndarray, count: int, seed: int, cut_aways: float, fusion: FusionConfig, name: str = "film"
) -> list[Film]:
    """So many films of these places; ``cut_aways``: share of the shots inside scenes that show a place outside the film."""
    return [
        _make_film(takes, places, np.random.default_rng([43, seed, number]), cut_aways, fusion, f"{name}-{number}")
        for number in range(count)
    ]


def _make_film(
    takes: Takes, places: np.ndarray, random: np.random.Generator, cut_aways: float, fusion: FusionConfig, title_id: str
) -> Film:
    own = random.permutation(places)[: random.integers(*PLACES_IN_FILM)]
    elsewhere = np.setdiff1d(places, own)
    rows: list[tuple[int, int, int, bool]] = []  # take, place of the scene, scene, cut-away
    captions: list[np.ndarray] = []
    silent: list[bool] = []
    shown: list[int] = []
    last: tuple[int, ...] = ()
    for scene in range(random.integers(*SCENES_IN_FILM)):
        among = [place for place in (shown if shown and random.random() < RECUR else own.tolist()) if place not in last]
        place = int(random.choice(among or [other for other in own.tolist() if other not in last]))
        beside = [other for other in own.tolist() if other != place and other not in last]
        crossed = int(random.choice(beside)) if beside and random.random() < CROSS_CUT else place
        shown += [place, crossed]
        topic, captioned, without_sound = random.integers(len(TOPICS)), random.random() < CAPTIONED, random.random() < SILENT
        view, here = int(random.integers(len(VIEWS))), place
        length = int(random.integers(*SHOTS_IN_SCENE))
        for shot in range(length):
            away = 0 < shot < length - 1 and random.random() < cut_aways * length / max(1, length - 2) and len(elsewhere) > 0
            seen = int(random.choice(elsewhere)) if away else here
            choices = np.flatnonzero((takes.place_N == seen) & ((takes.view_N == view) | away))
            rows.append((int(random.choice(choices)), here, scene, bool(away)))
            spoken = captioned and random.random() < SPOKEN
            captions.append(takes.lines[topic, random.integers(len(LINES))] if spoken else np.zeros(takes.lines.shape[-1], np.float32))
            silent.append(bool(without_sound))
            here = (crossed if here == place else place) if crossed != place and random.random() < TURN else here
            view = int((view + random.integers(1, len(VIEWS))) % len(VIEWS)) if random.random() < TURN else view
        last = (place, crossed)
    take_S, scene_place_S, scene_S, cut_away_S = (np.array(column) for column in zip(*rows, strict=True))
    audio_SD = takes.parts["audio"][take_S] * ~np.array(silent)[:, None]
    parts = {"video": takes.parts["video"][take_S], "audio": audio_SD.astype(np.float32), "text": np.stack(captions).astype(np.float32)}
    end_S = np.cumsum(MEDIAN_SHOT_S * np.exp(SHOT_SPREAD * random.normal(size=len(rows))))
    start_S = np.concatenate([[0.0], end_S[:-1]])
    fused_SD = fuse(parts, fusion)[0]
    return Film(title_id, parts, fused_SD, start_S, end_S, takes.place_N[take_S], scene_place_S, scene_S, cut_away_S)
