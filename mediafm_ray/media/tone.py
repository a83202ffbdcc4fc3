"""HDR pictures to the range of ordinary screens, which the detector and the encoders were trained on.

Code values of the PQ and HLG curves shown as if they were ordinary ones look flat and dark. They are turned into light,
moved from BT.2020 to BT.709 primaries, and compressed so that HDR reference white (203 cd/m2, ITU-R BT.2408) comes out as
75 % grey-to-white of an ordinary screen and 1000 cd/m2 as its white, by the extended Reinhard curve (Reinhard et al. 2002,
eq. 4) on the brightest channel, which keeps hue.
"""

from __future__ import annotations

from functools import cache

import numpy as np

TRANSFER_PQ = 16  # SMPTE ST 2084; numbers of ITU-T H.273, as FFmpeg uses them
TRANSFER_HLG = 18  # ARIB STD-B67
PEAK = 1000.0  # luminance in cd/m2 that becomes white
REFERENCE_WHITE = 203.0  # cd/m2 (ITU-R BT.2408)

# BT.2020 to BT.709 primaries, linear light (ITU-R BT.2087)
TO_BT709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32)


def to_ordinary_range(picture_HWC: np.ndarray, transfer: int) -> np.ndarray:
    """Map (H, W, 3) uint8 RGB in the given transfer characteristic (ITU-T H.273) to ordinary RGB; SDR is returned unchanged."""
    if transfer not in (TRANSFER_PQ, TRANSFER_HLG):
        return picture_HWC
    light_HWC = _light(transfer)[picture_HWC]  # cd/m2 / reference white
    light_HWC = np.maximum(light_HWC @ TO_BT709.T, 0)
    brightest_HW1 = np.maximum(light_HWC.max(axis=-1, keepdims=True), np.float32(1e-6))
    white = np.float32(PEAK / REFERENCE_WHITE)
    mapped_HW1 = brightest_HW1 * (1 + brightest_HW1 / white**2) / (1 + brightest_HW1)
    shown_HWC = np.clip(light_HWC * (mapped_HW1 / brightest_HW1), 0, 1) ** np.float32(1 / 2.2)
    return np.rint(shown_HWC * 255).astype(np.uint8)


@cache
def _light(transfer: int) -> np.ndarray:
    """Return the light of the 256 code values in units of reference white, (256,) float32."""
    code = np.arange(256) / 255
    if transfer == TRANSFER_PQ:  # SMPTE ST 2084 EOTF
        m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
        power = code ** (1 / m2)
        light = 10_000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)
    else:  # ARIB STD-B67 inverse OETF, then the display's gamma of 1.2 at 1000 cd/m2, channel by channel
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        scene = np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12)
        light = PEAK * scene**1.2
    return (light / REFERENCE_WHITE).astype(np.float32)
