"""Small videos with known shots, and catalogs of them, for whole runs of the program."""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np

from mediafm_ray.runs.run_log import RUNS

ROOT = Path(__file__).parents[2]
RATE = 25  # frames a second
SIZE = (96, 160)  # height, width
AUDIO_RATE = 44_100  # Hz
PROFILE = ["--config", str(ROOT / "conf" / "offline.yaml")]


def make_clip(path: Path, shot_frames: list[int], seed: int = 0, audio: bool = True) -> Path:
    """A video whose shots have the given numbers of frames, each of another texture that drifts; a tone a shot beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=RATE)
        video.height, video.width = SIZE
        video.pix_fmt = "yuv420p"
        sound = container.add_stream("aac", rate=AUDIO_RATE, layout="mono") if audio else None
        for frames in shot_frames:
            texture = np.kron(random.integers(0, 256, (12, 20, 3)), np.ones((16, 16, 1))).astype(np.uint8)
            for index in range(frames):
                drift = abs(index % 64 - 32)  # there and back: a jump would be a cut
                picture = texture[drift : drift + SIZE[0], : SIZE[1]]
                for packet in video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")):
                    container.mux(packet)
        for packet in video.encode(None):
            container.mux(packet)
        if sound is not None:
            for packet in _tone(sound, sum(shot_frames) / RATE, 200 + 40 * seed):
                container.mux(packet)
    return path


def _tone(stream, seconds: float, frequency: float):
    times = np.arange(int(seconds * AUDIO_RATE)) / AUDIO_RATE
    frame = av.AudioFrame.from_ndarray((8000 * np.sin(2 * np.pi * frequency * times)).astype(np.int16)[None], format="s16", layout="mono")
    frame.sample_rate = AUDIO_RATE
    fifo = av.AudioFifo()
    fifo.write(frame)
    for chunk in fifo.read_many(1024, partial=True):
        yield from stream.encode(chunk)
    yield from stream.encode(None)


def command(catalog: Path, output: Path, *overrides: str, profile: Sequence[str] = PROFILE) -> list[str]:
    """The command line of the main job."""
    return [sys.executable, "-m", "jobs.embed_catalog", *profile, f"catalog.uri={catalog}", f"output.uri={output}", *overrides]


def embed(catalog: Path, output: Path, *overrides: str, profile: Sequence[str] = PROFILE) -> subprocess.CompletedProcess:
    """Run the main job as a user does."""
    return subprocess.run(command(catalog, output, *overrides, profile=profile), cwd=ROOT, capture_output=True, text=True, timeout=600)


def run_job(job: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run one of jobs/ as a user does."""
    return subprocess.run([sys.executable, "-m", f"jobs.{job}", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600)


def embed_and_kill(catalog: Path, output: Path, *overrides: str, after_objects: int) -> int:
    """Start the main job, kill its driver once so many titles are committed, and wait until it is gone; return the exit code."""
    return kill_after(command(catalog, output, *overrides), output, after_objects)


def kill_after(job: Sequence[str], output: Path, after_objects: int, number: signal.Signals = signal.SIGKILL) -> int:
    """Start a job and send its driver a signal, to kill it, once so many titles are committed; return the exit code."""
    process = subprocess.Popen(job, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(list(output.glob("*/shots/*/*.parquet"))) < after_objects:
        assert process.poll() is None, "the job ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    return process.wait()


def objects(output: Path) -> dict[str, bytes]:
    """Every object of the datasets below an output, by relative name."""
    paths = [path for path in sorted(output.rglob("*")) if path.is_file() and path.parent != output]
    return {str(path.relative_to(output)): path.read_bytes() for path in paths if path.relative_to(output).parts[0] != RUNS}
