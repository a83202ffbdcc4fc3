"""One suite that every encoder passes: shape, type, finiteness, batch invariance, order, empty input, processes, presence flags."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import io
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mediafm_ray.models import encoder, tiny
from mediafm_ray.models.options import AudioEncoderConfig, TextEncoderConfig, VideoEncoderConfig

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Case:
    """An encoder and what it is tried with; ``absent`` says which of the shots have nothing to encode."""

    modality: str
    config: Any
    shots: list[Any]
    absent: list[bool]

    def build(self) -> Any:
        return getattr(encoder, f"build_{self.modality}_encoder")(self.config)

    def dim(self) -> int:
        return encoder.encoder_dim(self.config)


def jpeg(seed: int, width: int = 320, height: int = 180, mode: str = "RGB") -> bytes:
    """A blurred random picture: colour blobs, no two seeds alike."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def noise(seed: int, samples: int, amplitude: float = 3000) -> bytes:
    return (np.random.default_rng(seed).normal(size=samples) * amplitude).clip(-32768, 32767).astype("<i2").tobytes()


VIDEO_SHOTS = [
    [jpeg(0), jpeg(1), jpeg(2)],
    [],
    [jpeg(3, 180, 320)],
    [jpeg(4, 31, 17), jpeg(5, mode="L"), jpeg(6, 640, 272), *(jpeg(seed) for seed in range(7, 14))],
    [jpeg(3, 180, 320)],
    [jpeg(0, 1, 1)],
]
AUDIO_SHOTS = [
    noise(0, 16_000),
    b"",
    noise(1, 1),
    noise(2, 399),
    noise(3, 400),
    bytes(32_000),
    noise(4, 90_000, 30_000),
    noise(5, 20_001, 200),
]
TEXTS = ["A man walks into a bar.", "", "Hello", "the quick brown fox jumps " * 150, " \n ", "¿Qué? 映画 🎬", "A man walks into a bar."]

VIDEO = ("video", VIDEO_SHOTS, [not frames for frames in VIDEO_SHOTS])
AUDIO = ("audio", AUDIO_SHOTS, [not samples for samples in AUDIO_SHOTS])
TEXT = ("text", TEXTS, [not text.strip() for text in TEXTS])

# name: what it is tried with, and its configuration where "{root}" holds tiny checkpoints and "{server}" is an embeddings server
CASES: dict[str, tuple[tuple[str, list[Any], list[bool]], dict[str, Any]]] = {
    "efficientnet_lite0": (VIDEO, {"encoder": "efficientnet_lite0"}),
    "clip": (VIDEO, {"encoder": "clip", "weights": "{root}/video"}),
    "clip with temporal transformer": (VIDEO, {"encoder": "clip", "weights": "{root}/video", "temporal_weights": "{root}/temporal"}),
    "siglip": (VIDEO, {"encoder": "clip", "weights": "{root}/siglip"}),
    "log_mel": (AUDIO, {"encoder": "log_mel"}),
    "wav2vec2": (AUDIO, {"encoder": "wav2vec2", "weights": "{root}/audio", "chunk_seconds": 3.0}),
    "clap": (AUDIO, {"encoder": "clap", "weights": "{root}/clap"}),
    "MiniLM": (TEXT, {"encoder": "sentence_transformer"}),
    "BERT": (TEXT, {"encoder": "sentence_transformer", "weights": "{root}/text"}),
    "openai": (TEXT, {"encoder": "openai", "base_url": "{server}", "model": "own-model", "dimensions": 64}),
}
CONFIGS = {"video": VideoEncoderConfig, "audio": AudioEncoderConfig, "text": TextEncoderConfig}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.main(folder)
    tiny.make_siglip(folder / "siglip")
    tiny.make_clap(folder / "clap")
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """An embeddings server whose embedding of a text is a function of its SHA-256."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            data = []
            for index, text in enumerate(request["input"]):
                seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
                values = np.random.default_rng(seed).normal(size=request["dimensions"])
                data.append({"object": "embedding", "index": index, "embedding": values.tolist()})
            body = json.dumps({"object": "list", "data": data, "model": request["model"], "usage": {"prompt_tokens": 1, "total_tokens": 1}})
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}/v1"
        listening.shutdown()


@dataclass(frozen=True)
class Elsewhere:
    """What another process gave, with one thread everywhere."""

    digests: dict[str, str]
    errors: str  # standard error: no progress bars, no warnings


@pytest.fixture(scope="module")
def cases(root: Path, server: str) -> dict[str, Case]:
    made = {}
    for name, ((modality, shots, absent), options) in CASES.items():
        filled = {key: value.format(root=root, server=server) if isinstance(value, str) else value for key, value in options.items()}
        made[name] = Case(modality, CONFIGS[modality](threads=2, **filled), shots, absent)
    return made


ENCODE_ELSEWHERE = """
import hashlib, json, pathlib, pickle, sys
from mediafm_ray.models import encoder
digests = {}
for name, (modality, config, shots) in pickle.loads(pathlib.Path(sys.argv[1]).read_bytes()).items():
    built = getattr(encoder, f"build_{modality}_encoder")(config)
    digests[name] = hashlib.sha256(built.encode(shots).embeddings_SD.tobytes()).hexdigest()
print(json.dumps(digests))
"""


@pytest.fixture(scope="module")
def elsewhere(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Elsewhere:
    given = tmp_path_factory.mktemp("elsewhere") / "given.pickle"
    one_thread = {name: (case.modality, dataclasses.replace(case.config, threads=1), case.shots) for name, case in cases.items()}
    given.write_bytes(pickle.dumps(one_thread))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", ENCODE_ELSEWHERE, str(given)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Elsewhere(json.loads(done.stdout), done.stderr)


@pytest.fixture(scope="module", params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def case(name: str, cases: dict[str, Case]) -> Case:
    return cases[name]


@pytest.fixture(scope="module")
def built(case: Case) -> Any:
    return case.build()


@pytest.fixture(scope="module")
def encoded(case: Case, built: Any) -> encoder.Encoded:
    return built.encode(case.shots)


def test_every_encoder_of_the_registries_is_in_this_suite() -> None:
    names = {*encoder.VIDEO_ENCODERS, *encoder.AUDIO_ENCODERS, *encoder.TEXT_ENCODERS}
    assert {options["encoder"] for _, options in CASES.values()} == names


def test_shape_and_type(case: Case, built: Any, encoded: encoder.Encoded) -> None:
    assert encoded.embeddings_SD.shape == (len(case.shots), built.dim)
    assert encoded.embeddings_SD.dtype == np.float32
    assert encoded.present_S.dtype == np.bool_
    assert np.isfinite(encoded.embeddings_SD).all()


def test_the_dimension_planned_without_torch_is_the_real_one(case: Case, built: Any) -> None:
    assert case.dim() == built.dim


def test_absent_shots_are_flagged_and_zero_and_the_others_are_neither(case: Case, encoded: encoder.Encoded) -> None:
    assert encoded.present_S.tolist() == [not absent for absent in case.absent]
    norms = np.linalg.norm(encoded.embeddings_SD, axis=1)
    assert (norms[case.absent] == 0).all()
    assert (norms[~np.array(case.absent)] > 0.01).all()


def test_neighbours_leave_no_trace(case: Case, built: Any, encoded: encoder.Encoded) -> None:
    one_by_one = np.concatenate([built.encode([shot]).embeddings_SD for shot in case.shots])
    assert one_by_one.tobytes() == encoded.embeddings_SD.tobytes()
    in_two = [built.encode(case.shots[:3]).embeddings_SD, built.encode(case.shots[3:]).embeddings_SD]
    assert np.concatenate(in_two).tobytes() == encoded.embeddings_SD.tobytes()


def test_order_is_kept(case: Case, built: Any, encoded: encoder.Encoded) -> None:
    backwards = built.encode(case.shots[::-1])
    assert backwards.embeddings_SD[::-1].tobytes() == encoded.embeddings_SD.tobytes()
    assert backwards.present_S[::-1].tolist() == encoded.present_S.tolist()


def test_different_shots_have_different_embeddings(case: Case, encoded: encoder.Encoded) -> None:
    present = [index for index, absent in enumerate(case.absent) if not absent]
    for first in present:
        for second in present:
            if case.shots[first] != case.shots[second]:
                assert not np.allclose(encoded.embeddings_SD[first], encoded.embeddings_SD[second], atol=1e-4), (first, second)


def test_no_shots(built: Any) -> None:
    nothing = built.encode([])
    assert nothing.embeddings_SD.shape == (0, built.dim)
    assert nothing.embeddings_SD.dtype == np.float32
    assert nothing.present_S.shape == (0,)


def test_only_absent_shots(case: Case, built: Any) -> None:
    absent = [shot for shot, is_absent in zip(case.shots, case.absent, strict=True) if is_absent]
    nothing = built.encode(absent * 2)
    assert not nothing.present_S.any()
    assert not nothing.embeddings_SD.any()


def test_another_process_with_other_threads_gives_the_same_bytes(name: str, encoded: encoder.Encoded, elsewhere: Elsewhere) -> None:
    assert elsewhere.digests[name] == hashlib.sha256(encoded.embeddings_SD.tobytes()).hexdigest()
    assert elsewhere.errors == ""


def test_the_number_of_threads_of_the_process_is_left_alone(case: Case, built: Any) -> None:
    import torch

    before = torch.get_num_threads()
    built.encode(case.shots[:3])
    assert torch.get_num_threads() == before


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"video\.encoder.*'clop'.*efficientnet_lite0"):
        encoder.build_video_encoder(VideoEncoderConfig(encoder="clop"))
    with pytest.raises(ValueError, match=r"audio\.encoder.*'mel'.*log_mel"):
        encoder.encoder_dim(AudioEncoderConfig(encoder="mel"))
    with pytest.raises(ValueError, match=r"text\.encoder.*''.*sentence_transformer"):
        encoder.weights_digest(TextEncoderConfig(encoder=""))


def test_a_device_that_is_not_there_is_named() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has the device that the test wants missing")
    with pytest.raises(ValueError, match=r"cuda.*sees 0 CUDA devices"):
        encoder.build_text_encoder(TextEncoderConfig(device="cuda"))
    with pytest.raises(ValueError, match="'gpu' is not a torch device"):
        encoder.build_video_encoder(VideoEncoderConfig(device="gpu"))


def test_planning_imports_no_torch() -> None:
    code = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None  # importing them now raises
from mediafm_ray.models import encoder, fusion, options, weights
video, audio, text = options.VideoEncoderConfig(), options.AudioEncoderConfig(), options.TextEncoderConfig()
print((encoder.encoder_dim(video), encoder.encoder_dim(audio), encoder.encoder_dim(text)))
print(len(encoder.weights_digest(video)), len(encoder.weights_digest(audio)), len(encoder.weights_digest(text)))
encoder.build_audio_encoder(audio).encode([b"ab"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["(1280, 192, 384)", "64 0 64", ""]


def test_an_encoder_that_gives_nan_is_caught() -> None:
    embeddings = np.zeros((3, 4), np.float32)
    embeddings[1, 2] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity for shot 1"):
        encoder.Encoded(embeddings, np.ones(3, bool))
    with pytest.raises(ValueError, match="float32"):
        encoder.Encoded(np.zeros((3, 4)), np.ones(3, bool))
    with pytest.raises(ValueError, match="presence flags"):
        encoder.Encoded(np.zeros((3, 4), np.float32), np.ones(2, bool))
