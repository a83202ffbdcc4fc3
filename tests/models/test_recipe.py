"""The MediaFM recipe from encoders to contextual embeddings at its 2304 dimensions, with tiny random weights."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mediafm_ray.models import encoder, tiny
from mediafm_ray.models.contextualiser import TitleContextualiser
from mediafm_ray.models.fusion import fuse, spans, split
from mediafm_ray.models.options import AudioEncoderConfig, ContextualiserConfig, FusionConfig, TextEncoderConfig, VideoEncoderConfig

SHOTS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny.main(path)
    return path


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (90, 160, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_a_title_runs_through_the_recipe(folder: Path) -> None:
    video = VideoEncoderConfig(encoder="clip", weights=str(folder / "video"), temporal_weights=str(folder / "temporal"), threads=2)
    audio = AudioEncoderConfig(encoder="wav2vec2", weights=str(folder / "audio"), threads=2)
    text = TextEncoderConfig(weights=str(folder / "text"), threads=2)
    sounds = [(np.random.default_rng(seed).normal(size=8000) * 2000).astype("<i2").tobytes() for seed in range(SHOTS)]
    words = encoder.build_text_encoder(text)
    encoded = {
        "video": encoder.build_video_encoder(video).encode([[jpeg(seed), jpeg(seed + 50)] for seed in range(SHOTS)]),
        "audio": encoder.build_audio_encoder(audio).encode([*sounds[:3], b"", sounds[4]]),
        "text": words.encode(["a shot", "", "", "with words", ""]),
    }
    where = spans({"video": encoder.encoder_dim(video), "audio": encoder.encoder_dim(audio), "text": encoder.encoder_dim(text)})
    assert where == {"video": (0, 768), "audio": (768, 1536), "text": (1536, 2304)}
    fused, norm = fuse({name: part.embeddings_SD for name, part in encoded.items()}, FusionConfig("none"))
    np.testing.assert_allclose(np.linalg.norm(fused, axis=1), 1, atol=1e-6)
    for name, part in split(fused, norm, where).items():
        np.testing.assert_allclose(part, encoded[name].embeddings_SD, rtol=1e-6, atol=1e-6)
        assert part.any(axis=1).tolist() == encoded[name].present_S.tolist()
    contextualiser = TitleContextualiser(ContextualiserConfig(checkpoint=str(folder / "contextualiser"), threads=2))
    metadata = words.encode(["a film about shots"]).embeddings_SD[0]
    contextual, cls = contextualiser.contextualise(fused, metadata)
    assert contextual.shape == (SHOTS, 2304)
    assert cls.shape == (2304,)
    assert np.isfinite(contextual).all()
    assert np.isfinite(cls).all()
