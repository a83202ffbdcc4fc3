"""The audio tower of a CLAP checkpoint as an audio encoder: its vectors can be compared with vectors of words (text_tower).

CLAP (Wu et al. 2023, arXiv:2211.06687) sees a log-mel spectrogram of at most 10 s (the feature extractor's ``max_length_s``); shorter
sound is repeated up to that. Of longer sound, transformers' extractor would take a part at random. Longer shots are divided here instead.

Shapes
    B  pieces of sound in one call
    N  samples
    T  time steps, 100 a second
    M  mel bands
    S  shots
    D  dimension of an embedding
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch.nn import functional
from transformers import ClapAudioModelWithProjection, ClapFeatureExtractor

from mediafm_ray.models import weights
from mediafm_ray.models.encoder import Encoded
from mediafm_ray.models.loading import PRECISIONS, MicroBatches, Workers, load_checkpoint, open_device, quiet_transformers
from mediafm_ray.models.options import AudioEncoderConfig

KINDS = ("clap", "clap_audio_model")  # model_type of config.json
WITHOUT_FUSION = "rand_trunc"  # The extractor's features of a checkpoint without fusion; no piece is so long that it would be truncated.
PREPARED_TOGETHER = 256  # Pieces whose features are computed while the GPU computes the previous ones.
INT16_SCALE = 32768.0


class ClapEncoder:
    """An audio encoder whose sound can be searched by words.

    A shot's embedding is the tower's projection, of unit norm. A shot longer than the extractor's maximum is divided into pieces of that
    length, the last one shorter; its embedding is their mean, weighted by length. Features are computed on the CPU.
    """

    def __init__(self, config: AudioEncoderConfig) -> None:
        """Load the weights. Raises ValueError for a wrong device, WeightsError for weights that are missing, damaged or of another kind."""
        folder = weights.resolve(config.weights)
        kind = weights.read_config(str(folder)).get("model_type")
        if kind not in KINDS:
            raise weights.WeightsError(f"{config.weights} is a {kind!r} checkpoint; the clap encoder takes {', '.join(KINDS)}")
        self.device = open_device(config.device)
        self.alone = self.device.type == "cpu"
        self.workers = Workers(config.threads)
        self.micro_batches = MicroBatches(self.device, config.micro_batch)
        self.dtype = PRECISIONS[config.precision]
        self.extractor = _load_extractor(folder)
        self.longest = int(self.extractor.nb_max_samples)
        tower = load_checkpoint(ClapAudioModelWithProjection, folder, dtype=torch.float32)
        if tower.config.enable_fusion or self.extractor.truncation != WITHOUT_FUSION:
            raise weights.WeightsError(
                f"{config.weights} is a checkpoint with fusion, which sees random parts of long sounds; take one without it, such as "
                "laion/clap-htsat-unfused or laion/larger_clap_general"
            )
        self.tower: Any = tower.requires_grad_(False).to(self.device)
        self.dim = int(self.tower.config.projection_dim)

    def encode(self, shots: Sequence[bytes]) -> Encoded:
        """See AudioEncoder. Raises ValueError for an odd number of bytes."""
        embeddings_SD = np.zeros((len(shots), self.dim), np.float64)
        pieces: list[np.ndarray] = []
        places: list[tuple[int, float]] = []  # the shot of each piece and its share of the shot
        for shot, samples in enumerate(shots):
            if len(samples) % 2:
                raise ValueError(f"the audio of shot {shot} has {len(samples)} bytes: int16 samples take an even number")
            samples_N = np.frombuffer(samples, "<i2")
            for start in range(0, len(samples_N), self.longest):
                pieces.append(samples_N[start : start + self.longest])
                places.append((shot, len(pieces[-1]) / len(samples_N)))
        with threadpool_limits(limits=1, user_api="blas"):  # Threads of numpy would compete with the workers, and may round differently.
            embedded = self._embed(pieces)
        for (shot, share), embedding_D in zip(places, embedded, strict=True):
            embeddings_SD[shot] += share * embedding_D
        return Encoded(embeddings_SD.astype(np.float32), np.array([len(samples) > 0 for samples in shots], bool))

    def _embed(self, pieces: Sequence[np.ndarray]) -> list[np.ndarray]:
        if self.alone:
            return self.workers.map(lambda samples_N: self._embed_batch([self._features(samples_N)])[0], pieces)
        return self.workers.feed(
            self._features, pieces, PREPARED_TOGETHER, lambda features: self.micro_batches.compute(self._embed_batch, features)
        )

    def _features(self, samples_N: np.ndarray) -> np.ndarray:
        """Return the (1, T, M) float32 features of a piece, of equal shape for all pieces."""
        sound_N = samples_N.astype(np.float32) / INT16_SCALE
        return self.extractor(sound_N, sampling_rate=self.extractor.sampling_rate, return_tensors="np")["input_features"][0]

    @torch.inference_mode()
    def _embed_batch(self, features: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return a (D,) float32 embedding of each piece. Decibels need float32; with a lower precision the products are computed in it."""
        features_B1TM = torch.from_numpy(np.stack(features)).to(self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            projected_BD = self.tower(input_features=features_B1TM).audio_embeds
        return list(functional.normalize(projected_BD.float(), dim=1).cpu().numpy())


def _load_extractor(folder: Path) -> Any:
    """Load the feature extractor of a checkpoint. Raises WeightsError if it has none or cannot be loaded."""
    weights.read_preprocessor(str(folder))  # Without that file transformers would look for the extractor elsewhere.
    try:
        with quiet_transformers():
            return ClapFeatureExtractor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers, numpy and the OS raise errors of their own.
        raise weights.WeightsError(f"the {weights.PREPROCESSOR} in {folder} cannot be followed ({error!r})") from error
