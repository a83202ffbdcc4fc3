"""Tiny checkpoints with seeded random weights of every class that the MediaFM profile uses, with its 768 dimensions.

    python -m mediafm_ray.models.tiny FOLDER

writes FOLDER/video (CLIP), FOLDER/temporal (a temporal transformer), FOLDER/audio (wav2vec2), FOLDER/text (a BERT) and
FOLDER/contextualiser (for their 2304 fused dimensions). Their output is meaningless: they run the whole recipe on a CPU, in tests
and in trials of a cluster.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    ClapConfig,
    ClapModel,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    RobertaTokenizer,
    SiglipConfig,
    SiglipModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from mediafm_ray.models.contextualiser import Contextualiser, ContextualiserModelConfig
from mediafm_ray.models.loading import quiet_transformers
from mediafm_ray.models.temporal import TemporalTransformer, TemporalTransformerConfig

DIM = 768
SEED = 20
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 64, "patch_size": 16}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}
CLIP_PIXELS = {
    "do_center_crop": True,
    "crop_size": 64,
    "size": 64,
    "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "CLIPImageProcessor",
}
SIGLIP_PIXELS = {
    "size": {"height": 64, "width": 64},
    "resample": 3,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "image_processor_type": "SiglipImageProcessor",
}
WAV2VEC2_SAMPLES = {
    "do_normalize": True,
    "feature_size": 1,
    "padding_value": 0.0,
    "return_attention_mask": False,
    "sampling_rate": 16000,
    "feature_extractor_type": "Wav2Vec2FeatureExtractor",
}
CLAP_SOUND = {"patch_embeds_hidden_size": 16, "hidden_size": 32, "depths": [2, 2], "num_attention_heads": [2, 4], "spec_size": 128}
CLAP_SAMPLES = {
    "feature_size": 64,
    "sampling_rate": 48000,
    "hop_length": 480,
    "fft_window_size": 1024,
    "max_length_s": 2,
    "frequency_min": 0,
    "frequency_max": 14000,
    "padding": "repeatpad",
    "truncation": "rand_trunc",
    "feature_extractor_type": "ClapFeatureExtractor",
}
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'"
CLIP_SPECIALS = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
CLAP_SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
SPECIAL_PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def make_clip(folder: Path) -> None:
    """Write a whole CLIP model with text tower and tokenizer, like published checkpoints; 64 x 64 pixels, texts of single letters."""
    pieces = [*CLIP_SPECIALS.values(), *(letter + ending for letter in LETTERS for ending in ("", "</w>"))]
    ids = {piece: number for number, piece in enumerate(pieces)}
    specials = {f"{name}_id": ids[piece] for name, piece in CLIP_SPECIALS.items()}
    text = {**TEXT, "projection_dim": DIM, "vocab_size": len(pieces), "pad_token_id": specials["eos_token_id"], **specials}
    shape = CLIPConfig(vision_config={**VISION, "projection_dim": DIM}, text_config=text, projection_dim=DIM)
    save_seeded(folder, lambda: CLIPModel(shape))
    write_json(folder / "preprocessor_config.json", CLIP_PIXELS)
    text_tower: Any = shape.text_config
    CLIPTokenizer(vocab=ids, merges=[], model_max_length=text_tower.max_position_embeddings).save_pretrained(folder)


def make_siglip(folder: Path) -> None:
    """Write a whole SigLIP model; its embedding has the width of its tower, 768."""
    vision = {**VISION, "hidden_size": DIM, "num_attention_heads": 12}
    save_seeded(folder, lambda: SiglipModel(SiglipConfig(vision_config=vision, text_config={**TEXT, "projection_size": DIM})))
    write_json(folder / "preprocessor_config.json", SIGLIP_PIXELS)


def make_temporal(folder: Path) -> None:
    """Write a temporal transformer of one layer."""
    save_seeded(folder, lambda: TemporalTransformer(TemporalTransformerConfig(num_hidden_layers=1, initializer_range=0.05)))


def make_wav2vec2(folder: Path, **changes: Any) -> None:
    """Write a wav2vec2 model like facebook/wav2vec2-base (group norm, no attention mask), with narrow convolutions and two layers."""
    shape = {"hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 64, "conv_dim": (32,) * 7}
    save_seeded(folder, lambda: Wav2Vec2Model(Wav2Vec2Config(**{**shape, **changes})))
    extractor = {"do_normalize": True, "feature_size": 1, "padding_value": 0.0, "return_attention_mask": False, "sampling_rate": 16000}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**extractor, "feature_extractor_type": "Wav2Vec2FeatureExtractor"}, indent=1)
    )


def make_clap(folder: Path, **changes: Any) -> None:
    """Write a whole CLAP model with text tower and tokenizer, like published checkpoints without fusion, for pieces of sound of 2 s."""
    pieces = [*CLAP_SPECIALS, "\u0120", *LETTERS]  # U+0120 is a space.
    text = {**TEXT, "vocab_size": len(pieces), "max_position_embeddings": 66}
    shape = ClapConfig(text_config=text, audio_config={**CLAP_SOUND, **changes}, projection_dim=DIM)
    save_seeded(folder, lambda: ClapModel(shape))
    write_json(folder / "preprocessor_config.json", CLAP_SAMPLES)
    ids = {piece: number for number, piece in enumerate(pieces)}
    RobertaTokenizer(vocab=ids, merges=[], model_max_length=64).save_pretrained(folder)


def make_bert(folder: Path) -> None:
    """Write a BERT over single letters and digits, 768 wide."""
    pieces = SPECIAL_PIECES + [prefix + letter for letter in LETTERS for prefix in ("", "##")]
    shape = BertConfig(
        vocab_size=len(pieces),
        hidden_size=DIM,
        num_hidden_layers=1,
        num_attention_heads=12,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    save_seeded(folder, lambda: BertModel(shape))
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    BertTokenizer(str(folder / "vocab.txt"), model_max_length=128).save_pretrained(folder)


def make_contextualiser(folder: Path, fused_dim: int = 3 * DIM, metadata_dim: int = DIM, **changes: Any) -> None:
    """Write a contextualiser of two layers, 64 wide."""
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    save_seeded(
        folder, lambda: Contextualiser(ContextualiserModelConfig(fused_dim=fused_dim, metadata_dim=metadata_dim, **{**shape, **changes}))
    )


def main(folder: Path) -> None:
    makers: dict[str, Callable[[Path], None]] = {
        "video": make_clip,
        "temporal": make_temporal,
        "audio": make_wav2vec2,
        "text": make_bert,
        "contextualiser": make_contextualiser,
    }
    for name, make in makers.items():
        make(folder / name)
        print(folder / name)


def save_seeded(folder: Path, make: Callable[[], Any]) -> None:
    """Write the model that ``make`` returns, with the same random weights on every call; torch's random state is not changed."""
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(SEED)
        make().save_pretrained(folder)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
