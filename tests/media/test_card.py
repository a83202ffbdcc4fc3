"""Decoding on a card: what is refused, what falls back, and that nothing of the CPU's bytes moves by it. No test here has a card.

Without a driver FFmpeg's ``*_cuvid`` cannot be opened, for real. What happens behind a decoder that was opened is tested with FFmpeg's own
decoders in its place: they take the same packets and give the same pictures, so everything must come out as from the CPU.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from fractions import Fraction

import pytest

from mediafm_ray.errors import CardError, TitleError
from mediafm_ray.media import card
from mediafm_ray.media.isolation import IsolatedReader
from mediafm_ray.media.options import FramesConfig, MediaConfig, TimedTextConfig
from mediafm_ray.spec import Title
from tests.videos import KnownCuts, flat, make_video

STAND_IN = """
from mediafm_ray.media import card
card.DECODERS = {name: name for name in card.DECODERS}
complete = card.CardDecoder._complete
def as_cards_do(self, frame):
    frame.duration, frame.colorspace, frame.color_range, frame.color_trc, frame.color_primaries = 0, 2, 0, 2, 2
    complete(self, frame)
card.CardDecoder._complete = as_cards_do
"""
LOSES_THE_CARD = """
first = card.CardDecoder.decode
def decode(self, packet, seen=[]):
    seen.append(packet)
    if len(seen) > 100:
        raise card.CardError("the card is lost")
    return first(self, packet)
card.CardDecoder.decode = decode
"""

needs_no_card = pytest.mark.skipif(card.is_visible(), reason="this machine has a card")


def read(path, cuts=(), decoder="cpu", not_on_card="", **media):
    reader = IsolatedReader(FramesConfig(), TimedTextConfig(), MediaConfig(decoder=decoder, **media))
    try:
        return reader.read(Title("a title", str(path)), KnownCuts(cuts), not_on_card)
    finally:
        reader.close()


def as_on_cpu(media, reason=""):
    """What can be compared with a CPU's reading: without the one warning, that must be there, and without the decoder's name."""
    told = [warning for warning in media.warnings if warning.startswith("decoded on the CPU, not by media.decoder=")]
    assert len(told) == bool(reason)
    assert reason in "".join(told)
    others = [warning for warning in media.warnings if warning not in told]
    facts = {name: value for name, value in media.facts.items() if name != "decoder"}
    return flat(dataclasses.replace(media, warnings=others, facts=facts))


@pytest.fixture
def in_child(tmp_path, monkeypatch):
    """Have a reading process run some lines when it starts."""

    def run(lines):
        (tmp_path / "site").mkdir(exist_ok=True)
        (tmp_path / "site" / "sitecustomize.py").write_text(lines)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))

    return run


@needs_no_card
def test_without_a_driver_the_cpu_decodes_and_the_title_says_so(tmp_path):
    made = make_video(tmp_path / "a.mp4", [40, 60], clicks=[1.0])
    media = read(made.path, made.cuts, "cuda")
    assert "decoder" not in media.facts
    assert as_on_cpu(media, "h264_cuvid cannot be opened") == flat(read(made.path, made.cuts))
    assert flat(read(made.path, made.cuts, "auto")) == flat(read(made.path, made.cuts))  # and says nothing


@needs_no_card
@pytest.mark.parametrize(
    ("name", "codec", "reason"),
    [("a.mkv", "mpeg4", "cards have no decoder for mpeg4"), ("a.webm", "libvpx-vp9", "vp9_cuvid cannot"), ("a.avi", "libx264", "no times")],
)
def test_what_a_card_cannot_do_is_left_to_the_cpu(tmp_path, name, codec, reason):
    made = make_video(tmp_path / name, [20, 20], codec=codec, b_frames=0)
    assert as_on_cpu(read(made.path, made.cuts, "cuda"), reason) == flat(read(made.path, made.cuts))


def test_memory_is_limited_where_a_card_may_be_used(tmp_path):
    """By what can be written: a driver reserves address space without end."""
    huge = make_video(tmp_path / "huge.mkv", [3], size=(4096, 4096), codec="mjpeg", pixel_format="yuvj444p", b_frames=0)
    with pytest.raises(TitleError, match=r"huge\.mkv.*memory"):
        read(huge.path, decoder="cuda", memory_limit_gb=0.15)


@pytest.mark.parametrize(
    "options",
    [
        {"size": (1280, 720), "clicks": [1.0], "cues": [(0.5, 1.5, "Hello")]},
        {"durations": [1, 5, 2, 2, 9] * 20, "time_base": Fraction(1, 100), "start": Fraction(7)},
        {"rotation": 90, "mirrored": True, "pixel_aspect": Fraction(4, 3)},
        {"options": {"color_primaries": "bt2020", "color_trc": "smpte2084", "colorspace": "bt2020nc"}, "pixel_format": "yuv420p10le"},
        {"b_frames": 3, "options": {"x264-params": "interlaced=1:bff=1"}},
    ],
    ids=["usual", "variable rate", "turned", "hdr", "interlaced"],
)
def test_a_card_that_decodes_as_the_cpu_changes_nothing(tmp_path, in_child, options):
    made = make_video(tmp_path / "a.mp4", [40, 60], **options)
    expected = read(made.path, made.cuts)
    in_child(STAND_IN)
    media = read(made.path, made.cuts, "cuda")
    assert media.facts["decoder"] == "h264"
    assert as_on_cpu(media) == flat(expected)


def test_titles_shorter_than_what_a_decoder_holds_back(tmp_path, in_child):
    made = make_video(tmp_path / "a.mp4", [2])
    in_child(STAND_IN)
    media = read(made.path, decoder="cuda")
    assert media.facts["decoder"] == "h264"
    assert as_on_cpu(media) == flat(read(made.path))


def test_a_card_lost_in_the_middle_leaves_the_title_to_the_cpu(tmp_path, in_child):
    made = make_video(tmp_path / "a.mp4", [100, 200], size=(160, 96), clicks=[1.0, 5.0])
    in_child(STAND_IN + LOSES_THE_CARD)
    with pytest.raises(CardError, match="the card is lost"):
        read(made.path, made.cuts, "cuda")
    again = read(made.path, made.cuts, "cuda", "the card is lost")
    assert as_on_cpu(again, "the card is lost") == flat(read(made.path, made.cuts))


def test_a_driver_that_crashes_is_the_cards_error_once(tmp_path, in_child):
    made = make_video(tmp_path / "a.mp4", [300], size=(160, 96))
    in_child(STAND_IN)
    reader = IsolatedReader(FramesConfig(), TimedTextConfig(), MediaConfig(decoder="cuda"))

    class Crashing(KnownCuts):
        def push(self, frames_THWC):
            os.kill(reader.process.pid, signal.SIGSEGV)
            return super().push(frames_THWC)

    try:
        with pytest.raises(CardError, match="SIGSEGV"):
            reader.read(Title("a", str(made.path)), Crashing([]))
        with pytest.raises(TitleError, match="SIGSEGV"):
            reader.read(Title("a", str(made.path)), Crashing([]), "it crashed")
        assert reader.read(Title("a", str(made.path)), KnownCuts([]), "it crashed").frame_count == 300
    finally:
        reader.close()


def test_a_file_that_is_cut_off_is_judged_by_the_cpu(tmp_path, in_child):
    made = make_video(tmp_path / "whole.mkv", [100, 100])
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(made.path.read_bytes()[: made.path.stat().st_size * 97 // 100])
    expected = read(cut, made.cuts, max_damage=0.5)
    in_child(STAND_IN)
    with pytest.raises(CardError, match="damaged") as error:
        read(cut, made.cuts, "cuda", max_damage=0.5)
    assert as_on_cpu(read(cut, made.cuts, "cuda", str(error.value), max_damage=0.5), "damaged") == flat(expected)
