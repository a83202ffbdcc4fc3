"""Any sentence-embedding checkpoint as a text encoder, with transformers only.

The encoder treats a folder as sentence-transformers does (Reimers and Gurevych 2019, arXiv:1908.10084): its tokenizer, its maximum
sequence length, mean (or [CLS]) pooling, and unit norm if modules.json asks for it. Longer text is truncated to the checkpoint's
``max_seq_length`` (256 word pieces for all-MiniLM-L6-v2, about 200 words: more than is spoken in a one-minute shot).

Shapes
    S  texts
    L  word pieces of a text
    D  hidden size of the checkpoint
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer

from mediafm_ray.models import weights
from mediafm_ray.models.encoder import Encoded
from mediafm_ray.models.loading import Workers, load_checkpoint, open_device, quiet_transformers
from mediafm_ray.models.options import TextEncoderConfig

MODULES = {"Transformer", "Pooling", "Normalize"}  # Supported modules of sentence-transformers.
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
TEXTS_PER_CALL = {"cpu": 1, "cuda": 256}  # On a CPU nothing is padded, so that no text affects another.


class SentenceEncoder:
    """The text encoder of the offline profile, for any sentence-embedding checkpoint. A text of only white space is absent."""

    def __init__(self, config: TextEncoderConfig) -> None:
        folder = weights.resolve(config.weights)
        self.device = open_device(config.device)
        self.workers = Workers(config.threads)
        self.model = load_checkpoint(AutoModel, folder, dtype=torch.float32).requires_grad_(False).to(self.device)
        self.tokenizer = load_tokenizer(folder)
        self.pooling, self.unit_norm = _read_pooling(folder)
        self.longest = _read_longest(folder, self.tokenizer, self.model)
        self.dim = int(self.model.config.hidden_size)

    def encode(self, texts: Sequence[str]) -> Encoded:
        """See TextEncoder."""
        present_S = np.array([bool(text.strip()) for text in texts], bool)
        embeddings_SD = np.zeros((len(texts), self.dim), np.float32)
        # Texts of similar length share a call, so that little is padded.
        order = sorted(np.flatnonzero(present_S).tolist(), key=lambda index: len(texts[index]))
        per_call = TEXTS_PER_CALL[self.device.type]
        groups = [order[start : start + per_call] for start in range(0, len(order), per_call)]
        batches = [self._tokenize([texts[index] for index in group]) for group in groups]
        pooled = self.workers.map(self._embed, batches) if self.device.type == "cpu" else [self._embed(batch) for batch in batches]
        for group, embedded_SD in zip(groups, pooled, strict=True):
            embeddings_SD[group] = embedded_SD
        return Encoded(embeddings_SD, present_S)

    def _tokenize(self, texts: list[str]) -> Any:
        return self.tokenizer(texts, padding=len(texts) > 1, truncation=True, max_length=self.longest, return_tensors="pt")

    @torch.inference_mode()
    def _embed(self, batch: Any) -> np.ndarray:
        batch = batch.to(self.device)
        hidden_SLD = self.model(**batch).last_hidden_state
        if self.pooling == "cls":
            pooled_SD = hidden_SLD[:, 0]
        else:
            mask_SL1 = batch["attention_mask"].unsqueeze(-1).to(hidden_SLD.dtype)
            pooled_SD = (hidden_SLD * mask_SL1).sum(1) / mask_SL1.sum(1)
        return (F.normalize(pooled_SD, dim=1) if self.unit_norm else pooled_SD).cpu().numpy()


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a checkpoint. Raises WeightsError if it has none: transformers would make one without a vocabulary."""
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise weights.WeightsError(f"no tokenizer in {folder}: it needs one of {', '.join(VOCABULARIES)}; copy the checkpoint whole")
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers, tokenizers and the OS raise errors of their own.
        raise weights.WeightsError(f"the tokenizer in {folder} cannot be loaded ({type(error).__name__}: {error})") from error


def _read_pooling(folder: Path) -> tuple[str, bool]:
    """Return the pooling ("mean" or "cls") and True if unit norm follows; mean without norm, as in sentence-transformers, by default."""
    modules = _read_json(folder / "modules.json", [])
    kinds = {module["type"].rsplit(".", 1)[-1]: module["path"] for module in modules}
    if unknown := sorted(set(kinds) - MODULES):
        raise weights.WeightsError(f"{folder} asks for the sentence-transformers modules {unknown}; supported are {sorted(MODULES)}")
    pooling = _read_json(folder / kinds["Pooling"] / "config.json", {}) if "Pooling" in kinds else {}
    modes = [name.removeprefix("pooling_mode_") for name, on in pooling.items() if name.startswith("pooling_mode_") and on is True]
    if isinstance(pooling.get("pooling_mode"), str):  # Newer versions write it in this way.
        modes = [pooling["pooling_mode"]]
    names = {"mean_tokens": "mean", "mean": "mean", "cls_token": "cls", "cls": "cls"}
    if len(modes) > 1 or any(mode not in names for mode in modes):
        raise weights.WeightsError(f"{folder} asks for pooling {modes}; supported are mean and cls, one of them")
    return (names[modes[0]] if modes else "mean"), "Normalize" in kinds


def _read_longest(folder: Path, tokenizer: Any, model: Any) -> int:
    """Return the checkpoint's maximum sequence length in word pieces, within the limits of its positions and tokenizer."""
    limits = [tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None)]
    limits.append(_read_json(folder / "sentence_bert_config.json", {}).get("max_seq_length"))
    return min(int(limit) for limit in limits if limit)


def _read_json(path: Path, default: Any) -> Any:
    return weights.read_json(path) if path.is_file() else default
