"""Configuration of the media layer: one frozen dataclass for each concern, filled from YAML. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mediafm_ray.spec import SAMPLE_RATE, ConfigSection, recipe, recipe_of, resource

DECODERS = ("cpu", "cuda", "auto")


@dataclass(frozen=True)
class FramesConfig(ConfigSection):
    """Choice and storage of the frames of a shot."""

    per_shot: int = recipe(8, "frames kept of a shot, at most: the ones shown at the centres of equal parts of its time", min=1)
    size: int = recipe(256, "shorter side of a kept frame in (square) pixels; smaller pictures are not enlarged", min=16)
    jpeg_quality: int = recipe(90, "JPEG quality of kept frames", min=1, max=95)
    thumbnail_width: int = recipe(160, "width in pixels of the JPEG of a shot's middle frame, for people; 0 leaves it out", min=0)
    thumbnail_quality: int = recipe(80, "JPEG quality of that thumbnail", min=1, max=95)


@dataclass(frozen=True)
class TimedTextConfig(ConfigSection):
    """Choice of the timed text that becomes the text of a shot."""

    languages: list[str] = recipe(
        [], "languages in order of preference (BCP 47 prefixes, e.g. [en, de]); the first that a title has is used; empty = any"
    )
    kinds: list[str] = recipe(
        ["", "captions", "subtitles"], "kinds used, in order of preference: captions, subtitles, descriptions, forced; '' = kind unknown"
    )
    embedded: bool = recipe(True, "use subtitle streams inside the video when no sidecar fits")
    sound_cues: bool = recipe(True, "keep descriptions of sounds such as [door slams] or (music)")
    speakers: bool = recipe(False, "keep who speaks, as 'Name: ', where the timed text says it")


@dataclass(frozen=True)
class MediaConfig(ConfigSection):
    """Limits and cost of reading a title."""

    max_damage: float = recipe(0.1, "share of a title's picture that may be missing or damaged before the title fails", min=0, max=1)
    max_pixels: int = recipe(67_108_864, "pixels of a frame, at most (8K is 33 million); a larger picture fails the title", above=0)
    max_hours: float = recipe(24.0, "length of a title, at most", above=0)
    memory_limit_gb: float = resource(
        4.0, "address space of the reading process in GB, or its own memory where a card may decode; beyond it the title fails", above=0
    )
    no_progress_timeout_s: float = resource(
        120.0, "a reading process without progress for this long is killed and the title fails", above=0
    )
    max_frames: int = resource(10_368_000, "pictures of a title, at most (24 h at 120 a second); more fail the title", above=0)
    max_shots: int = resource(100_000, "shots of a title, at most (24 h at one in 0.86 s); more fail the title", above=0)
    max_processing_s: float = resource(
        18_000.0,
        "wall time in which a title must be read and cut into shots; beyond it the title fails. "
        "Keep it below resources.no_progress_timeout_s, which ends the whole run",
        above=0,
    )
    threads: int = resource(
        1, "decoder threads of one reading process; with more, what a decoder makes up in damaged H.264 depends on their timing", min=0
    )
    decoder: str = resource(
        "cpu",
        "cpu; cuda: an NVIDIA card where it can decode the title, else the CPU, with a warning; auto: the same without a warning where "
        "there is no card. With cuda and auto the dataset version is another one than with cpu",
        choices=DECODERS,
    )
    read_ahead_mb: int = resource(8, "bytes asked for at once from object storage, in MB", above=0)
    storage_options: dict[str, Any] = resource({}, "options of the file system of remote videos (fsspec), e.g. endpoint_url")

    environment: list[str] = resource(
        [], "further environment variables that the reading process gets, by name; it gets those of common object stores anyway"
    )


def media_recipe(media: MediaConfig, sample_rate: int) -> dict[str, Any]:
    """Return the settings that change the numbers, and the rate of the sound if it is not the usual one.

    A card scales pictures differently from a CPU, and the titles that it takes depend on the machine, so all settings that allow
    a card make one dataset version.
    """
    on_card = {"on_card": True} if media.decoder != "cpu" else {}
    return recipe_of(media) | on_card | ({"sample_rate": sample_rate} if sample_rate != SAMPLE_RATE else {})
