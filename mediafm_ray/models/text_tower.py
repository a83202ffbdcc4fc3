"""The text tower of a CLIP, SigLIP or CLAP checkpoint: words to a vector that can be compared with vectors of its image or audio tower.

CLIP (Radford et al. 2021, arXiv:2103.00020) projects the state at the end-of-text token, SigLIP (Zhai et al. 2023, arXiv:2303.15343)
that at the last of 64 positions, to which every text is padded, CLAP (Wu et al. 2023, arXiv:2211.06687) that at the first token of a
RoBERTa. Longer text is truncated.

Shapes
    S  texts
    L  tokens of a text
    D  dimension of an embedding
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import ClapTextModelWithProjection, CLIPTextModelWithProjection, SiglipTextModel

from mediafm_ray.models import weights
from mediafm_ray.models.encoder import Encoded
from mediafm_ray.models.loading import load_checkpoint, open_device
from mediafm_ray.models.options import AudioEncoderConfig, VideoEncoderConfig
from mediafm_ray.models.sentence import load_tokenizer

TOWERS = {  # model_type of config.json -> class of the text tower, name of the output that is the embedding, padding of texts
    "clap": (ClapTextModelWithProjection, "text_embeds", False),
    "clip": (CLIPTextModelWithProjection, "text_embeds", False),
    "siglip": (SiglipTextModel, "pooler_output", "max_length"),
}


class TextTower:
    """The encoder of texts into the space of a video or audio encoder. It computes in float32, one text at a time."""

    def __init__(self, config: VideoEncoderConfig | AudioEncoderConfig) -> None:
        """Load the weights. Raises WeightsError for weights without a text tower or without a tokenizer."""
        folder = weights.resolve(config.weights)
        kind = weights.read_config(str(folder)).get("model_type")
        if kind not in TOWERS:
            raise weights.WeightsError(
                f"{config.weights} is a {kind!r} checkpoint, which has no text tower: searching by words needs a whole "
                f"{', '.join(TOWERS)} checkpoint"
            )
        tower, self.output, self.padding = TOWERS[kind]
        self.device = open_device(config.device)
        self.tower: Any = load_checkpoint(tower, folder, dtype=torch.float32).requires_grad_(False).to(self.device)
        self.tokenizer = load_tokenizer(folder)
        self.longest = int(self.tower.config.max_position_embeddings)
        if kind == "clap":
            self.longest -= int(self.tower.config.pad_token_id) + 1  # RoBERTa counts positions from there.
        self.dim = int(self.tower.config.projection_dim if self.output == "text_embeds" else self.tower.config.projection_size)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> Encoded:
        """See TextEncoder."""
        embeddings_SD = np.zeros((len(texts), self.dim), np.float32)
        present_S = np.array([bool(text.strip()) for text in texts], bool)
        for index in np.flatnonzero(present_S).tolist():
            options = {"padding": self.padding, "truncation": True, "max_length": self.longest}
            tokens_1L = self.tokenizer(texts[index], **options, return_tensors="pt")["input_ids"].to(self.device)
            # There is no mask: SigLIP was trained without one, and texts for CLIP and CLAP are not padded.
            embeddings_SD[index] = getattr(self.tower(input_ids=tokens_1L), self.output)[0].cpu().numpy()
        return Encoded(embeddings_SD, present_S)
