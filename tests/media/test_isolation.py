"""The reading process dies in every way there is; the title fails, the reader goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from mediafm_ray.errors import TitleError
from mediafm_ray.media import child
from mediafm_ray.media.isolation import MAX_LEAD_S, IsolatedReader, _Assembly
from mediafm_ray.media.options import FramesConfig, MediaConfig, TimedTextConfig
from mediafm_ray.spec import TimedTextSource, Title, recipe_of
from tests.videos import KnownCuts, flat, make_video


def reader_with(**media) -> IsolatedReader:
    return IsolatedReader(FramesConfig(), TimedTextConfig(), MediaConfig(**media))


class Interfering(KnownCuts):
    """A detector that does something to the child when it gets the second block of pictures."""

    def __init__(self, deed):
        super().__init__([])
        self.deed, self.blocks = deed, 0

    def push(self, frames_THWC):
        self.blocks += 1
        if self.blocks == 2:
            self.deed()
        return super().push(frames_THWC)


@pytest.fixture
def long_video(tmp_path):
    return make_video(tmp_path / "long.mp4", [600], size=(96, 64), options={"preset": "ultrafast"})


def test_process_starts_fast_and_without_torch_or_ray():
    code = "import sys; import mediafm_ray.media.child; print(sorted(set(sys.modules) & {'torch', 'ray', 'omegaconf', 'transformers'}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_decoder_gets_no_variable_that_it_does_not_need(monkeypatch):
    """Whatever its name: an allow-list knows the object stores' variables, and no other."""
    others = ["OPENAI_API_KEY", "AZURE_OPENAI_API_KEY", "GOOGLE_API_KEY", "AWS_BEARER_TOKEN_BEDROCK", "RAY_AUTH_TOKEN"]
    others += ["DATABASE_URL", "SLACK_WEBHOOK", "PGPASS", "MY_OWN_THING", "GCS_LIKE"]
    needed = ["AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS", "AZURE_STORAGE_ACCOUNT_KEY", "FSSPEC_S3_KEY"]
    needed += ["HTTPS_PROXY", "SSL_CERT_FILE", "TMPDIR", "STORE_OF_OUR_OWN"]
    for name in [*others, *needed]:
        monkeypatch.setenv(name, "mark-of-a-key")
    monkeypatch.setenv("TMPDIR", "/tmp/mark-of-a-key/..")
    reader = IsolatedReader(FramesConfig(), TimedTextConfig(), MediaConfig(environment=["STORE_OF_OUR_OWN"]))
    try:
        reader.start()
        environment = [b""]
        while environment == [b""] and reader.process.poll() is None:  # for a moment a new process has none
            environment = Path(f"/proc/{reader.process.pid}/environ").read_bytes().split(b"\0")
    finally:
        reader.close()
    assert sorted(entry.split(b"=")[0].decode() for entry in environment if b"mark-of-a-key" in entry) == sorted(needed)


@pytest.mark.parametrize("blow", [signal.SIGSEGV, signal.SIGKILL, signal.SIGABRT])
def test_crash_is_the_titles_error_and_the_next_title_is_read(long_video, blow):
    reader = reader_with()
    try:
        with pytest.raises(TitleError, match=rf"long\.mp4.*{blow.name}"):
            reader.read(Title("a", str(long_video.path)), Interfering(lambda: os.kill(reader.process.pid, blow)))
        assert reader.read(Title("a", str(long_video.path)), KnownCuts([])).frame_count == 600
    finally:
        reader.close()


@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_sound_beyond_the_longest_title_is_refused_in_seconds_whatever_its_rate(rate):
    assembly = _Assembly(1 / 3600, rate)
    assembly.sound(bytes(2 * rate * (2 + round(MAX_LEAD_S))))
    with pytest.raises(ValueError, match="too much sound"):
        assembly.sound(bytes(2))


def test_hang_ends_after_the_timeout(long_video):
    reader = reader_with(no_progress_timeout_s=5.0)
    try:
        started = time.monotonic()
        with pytest.raises(TitleError, match="no progress for 5 s"):
            reader.read(Title("a", str(long_video.path)), Interfering(lambda: os.kill(reader.process.pid, signal.SIGSTOP)))
        assert time.monotonic() - started < 40
        assert reader.process is None
        assert reader.read(Title("a", str(long_video.path)), KnownCuts([])).frame_count == 600
    finally:
        reader.close()


def test_hang_before_the_title_is_even_opened(tmp_path, long_video):
    """A named pipe that nobody writes to: opening it blocks for ever."""
    os.mkfifo(tmp_path / "pipe.mp4")
    reader = reader_with(no_progress_timeout_s=5.0)
    try:
        with pytest.raises(TitleError, match=r"pipe\.mp4"):
            reader.read(Title("a", str(tmp_path / "pipe.mp4")), KnownCuts([]))
        assert reader.read(Title("a", str(long_video.path)), KnownCuts([])).frame_count == 600
    finally:
        reader.close()


def test_time_of_the_detector_is_not_lack_of_progress(long_video):
    reader = reader_with(no_progress_timeout_s=5.0)
    try:
        assert reader.read(Title("a", str(long_video.path)), Interfering(lambda: time.sleep(6))).frame_count == 600
    finally:
        reader.close()


def test_memory_beyond_the_limit_is_the_titles_error(tmp_path, long_video):
    """Frames of 8192 x 8192 pixels in a process that may have 0.7 GB."""
    huge = make_video(tmp_path / "huge.mkv", [3], size=(8192, 8192), codec="mjpeg", pixel_format="yuvj444p", b_frames=0)
    reader = reader_with(memory_limit_gb=0.7)
    try:
        with pytest.raises(TitleError, match=r"huge\.mkv.*memory"):
            reader.read(Title("a", str(huge.path)), KnownCuts([]))
        assert reader.read(Title("a", str(long_video.path)), KnownCuts([])).frame_count == 600
    finally:
        reader.close()


def test_title_that_fails_midway_leaves_the_child_ready_for_the_next(tmp_path, long_video):
    """The child fails while answers of the detector are on their way: they must not be taken for the next title."""
    small = make_video(tmp_path / "small.ts", [200], size=(320, 180), time_base=Fraction(1, 90_000))
    large = make_video(tmp_path / "large.ts", [10], size=(640, 360), time_base=Fraction(1, 90_000))
    joined = tmp_path / "joined.ts"
    joined.write_bytes(small.path.read_bytes() + large.path.read_bytes())
    reader = reader_with(max_pixels=400 * 300)
    try:
        with pytest.raises(TitleError, match="640x360"):
            reader.read(Title("a", str(joined)), Slow([]))
        child_process = reader.process
        assert reader.read(Title("b", str(long_video.path)), KnownCuts([])).frame_count == 600
        assert reader.process is child_process
    finally:
        reader.close()


def test_error_of_the_detector_passes_through_and_the_reader_goes_on(long_video):
    reader = reader_with()

    def fail():
        raise ZeroDivisionError("the detector's own fault")

    try:
        with pytest.raises(ZeroDivisionError):
            reader.read(Title("a", str(long_video.path)), Interfering(fail))
        assert reader.read(Title("a", str(long_video.path)), KnownCuts([])).frame_count == 600
    finally:
        reader.close()


def test_child_ends_with_its_parent(long_video, tmp_path):
    """The parent is killed in the middle of a title; its child is gone soon after."""
    program = tmp_path / "parent.py"
    program.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(Path(child.__file__).parents[2])!r})\n"
        "from tests.media.test_isolation import Interfering, reader_with\n"
        "from mediafm_ray.spec import Title\n"
        "reader = reader_with()\n"
        "def die():\n"
        "    print(reader.process.pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "reader.read(Title('a', sys.argv[1]), Interfering(die))\n"
    )
    parent = subprocess.run([sys.executable, str(program), str(long_video.path)], capture_output=True, text=True, check=False)
    assert parent.returncode == -signal.SIGKILL, parent.stderr
    orphan = int(parent.stdout)
    deadline = time.monotonic() + 10
    while _alive(orphan) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(orphan)


def _alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_two_readers_at_once_do_not_disturb_each_other(long_video):
    results = []

    def read():
        reader = reader_with()
        try:
            results.append(reader.read(Title("a", str(long_video.path)), KnownCuts([200])))
        finally:
            reader.close()

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert flat(results[0]) == flat(results[1])


def test_child_that_breaks_the_protocol_is_not_believed(long_video, monkeypatch, tmp_path):
    """A child taken over by a decoder's flaw can send what it likes: the parent reports it and takes no harm."""
    fake = tmp_path / "fake.py"
    fake.write_text(
        "import socket, struct, sys\n"
        "parent = socket.socket(fileno=int(sys.argv[3]))\n"
        'header = b\'{"kind": "shot", "sizes": [], "span": {"nonsense": 1}}\'\n'
        "parent.sendall(struct.pack('>I', len(header)) + header)\n"
        "parent.recv(1 << 20)\n"
        "parent.recv(1 << 20)\n"
    )
    reader = reader_with()
    monkeypatch.setattr(sys, "executable", str(_executable(tmp_path, fake)))
    try:
        with pytest.raises(TitleError, match=r"long\.mp4"):
            reader.read(Title("a", str(long_video.path)), KnownCuts([]))
    finally:
        reader.close()


def _executable(folder: Path, program: Path) -> Path:
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {program} "$@"\n')
    script.chmod(0o755)
    return script


# ------------------------------------------------------------------------------------------- limits of a title's size


def endless_pictures(path: Path, count: int) -> Path:
    """A file of a few hundred kB with very many tiny pictures: one key frame, then copies of a packet that changes nothing."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=120, options={"g": "600", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        packets = []
        for number in range(10):
            frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
            frame.pts = number
            packets += stream.encode(frame)
        for number in range(count):
            packet = packets[0] if number % 600 == 0 else packets[-1]
            again = av.Packet(bytes(packet))
            again.stream, again.time_base, again.pts, again.dts = stream, Fraction(1, 120), number, number
            again.is_keyframe = packet.is_keyframe
            container.mux(again)
    return path


class EveryFrameAShot(KnownCuts):
    """A detector that finds a cut at every other picture."""

    def __init__(self):
        super().__init__(list(range(2, 100_000, 2)))


@pytest.mark.parametrize(
    ("limit", "detector", "reason"),
    [
        ({"max_frames": 4000}, lambda: KnownCuts([]), r"endless\.mkv has more than 4000 pictures \(media\.max_frames\)"),
        ({"max_shots": 500}, EveryFrameAShot, r"endless\.mkv has more than 500 shots \(media\.max_shots\)"),
        ({"max_processing_s": 3.0}, lambda: Slow([]), r"endless\.mkv could not be read .* media\.max_processing_s=3 s"),
    ],
)
def test_limits_of_a_title_are_its_own_failure(tmp_path, limit, detector, reason):
    """A small file of which reading or detection has no end in sight fails with a reason, and the next is read."""
    video = endless_pictures(tmp_path / "endless.mkv", 8000)
    assert video.stat().st_size < 250_000
    reader = reader_with(**limit)
    try:
        started = time.monotonic()
        with pytest.raises(TitleError, match=reason):
            reader.read(Title("a", str(video)), detector())
        assert time.monotonic() - started < 20
        short = make_video(tmp_path / "short.mp4", [50], size=(96, 64))
        assert reader.read(Title("b", str(short.path)), KnownCuts([])).frame_count == 50
    finally:
        reader.close()


class Slow(KnownCuts):
    """A detector that takes its time, as a real one does on a slow machine."""

    def push(self, frames_THWC):
        time.sleep(0.2)
        return super().push(frames_THWC)


def test_child_that_only_says_it_is_alive_is_overdue(long_video, monkeypatch, tmp_path):
    """A drip of bytes is no progress: the deadline holds within a message, too."""
    fake = tmp_path / "fake.py"
    fake.write_text(
        "import socket, struct, sys, time\n"
        "parent = socket.socket(fileno=int(sys.argv[3]))\n"
        "parent.sendall(struct.pack('>I', 1 << 20))\n"
        "while True:\n"
        "    parent.sendall(b' ')\n"
        "    time.sleep(0.2)\n"
    )
    reader = reader_with(max_processing_s=2.0, no_progress_timeout_s=60.0)
    monkeypatch.setattr(sys, "executable", str(_executable(tmp_path, fake)))
    try:
        started = time.monotonic()
        with pytest.raises(TitleError, match=r"media\.max_processing_s=2 s"):
            reader.read(Title("a", str(long_video.path)), KnownCuts([]))
        assert time.monotonic() - started < 20
    finally:
        reader.close()


def test_limits_of_size_are_no_part_of_the_dataset_version():
    assert set(recipe_of(MediaConfig())) == {"max_damage", "max_pixels", "max_hours"}


# ----------------------------------------------------------------------------------------------------- text without video


def test_texts_are_read_in_the_child(tmp_path):
    """The text that the run would use, though there is no video; and none where no text can be read."""
    (tmp_path / "deep.ttml").write_text(f"{'9' * 400}:00:01,000 --> {'9' * 400}:00:02,000\nmuch later\n")
    (tmp_path / "good.srt").write_text("1\n00:00:00,100 --> 00:00:00,900\nWhere is\nshe?\n\n2\n00:00:01,000 --> 00:00:02,000\nHere.\n")
    texts = [TimedTextSource(str(tmp_path / name)) for name in ("gone.srt", "deep.ttml", "good.srt")]
    reader = reader_with()
    try:
        assert reader.texts(Title("a", "no/such/video.mp4", tuple(texts))) == ["Where is she?", "Here."]
        child_process = reader.process
        assert reader.texts(Title("a", "no/such/video.mp4", tuple(texts[:2]))) == []
        assert reader.process is child_process
    finally:
        reader.close()


def test_text_that_hangs_is_given_up(tmp_path):
    os.mkfifo(tmp_path / "pipe.srt")
    reader = reader_with(no_progress_timeout_s=3.0)
    try:
        with pytest.raises(TitleError, match="no progress for 3 s"):
            reader.texts(Title("a", "no/such/video.mp4", (TimedTextSource(str(tmp_path / "pipe.srt")),)))
        assert reader.texts(Title("a", "no/such/video.mp4")) == []
    finally:
        reader.close()
