"""Turn HDR pictures (PQ or HLG, BT.2020) into BT.709 ones, as a screen of today shows them.

The curves are those of ITU-R BT.2100, with white at 203 cd/m2 (BT.2408) and highlights up to 1000 cd/m2, which the
curve of BT.2390, annex 5, brings below white. It acts on the largest of R, G and B, so that hues stay. Colours that
BT.709 has not are clipped. Codes are those of a screen with the exponent 2.4 (BT.1886).
"""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np
from av.video.reformatter import ColorTrc

WHITE, PEAK = 203.0, 1000.0
"""Luminance of white and of the brightest highlight, cd/m2."""
CURVES = {int(ColorTrc.SMPTE2084): "PQ", int(ColorTrc.ARIB_STD_B67): "HLG"}
"""The transfer functions of HDR, by FFmpeg's number."""
BT2020_TO_BT709 = np.array(
    [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]], np.float32
)
"""Linear RGB to linear RGB (BT.2087)."""
LUMINANCE = np.array([[0.2627, 0.6780, 0.0593]], np.float32)
NUM_STEPS = 16384


def tone_map(codes: np.ndarray, curve: str) -> np.ndarray:
    """Return uint8 RGB (H,W,3) of BT.709 for uint16 RGB codes (H,W,3) of BT.2020, `curve` PQ or HLG."""
    linear = light(curve)[codes]  # cd/m2 / WHITE of PQ; of HLG, of the scene
    if curve == "HLG":
        scene = np.maximum(cv2.transform(linear, LUMINANCE), 1e-6)
        linear = linear * (PEAK / WHITE * scene**0.2)[..., None]
    linear = np.maximum(cv2.transform(linear, BT2020_TO_BT709), 0)
    brightest = np.maximum(np.maximum(linear[..., 0], linear[..., 1]), linear[..., 2])
    linear *= look_up(gains(), brightest * (WHITE / 10000))[..., None]
    return look_up(levels(), np.minimum(linear, 1))


def look_up(table: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the entries of a table over the square roots of values in [0, 1], at the nearest one."""
    return table[(np.sqrt(values) * (len(table) - 1) + 0.5).astype(np.int32).clip(0, len(table) - 1)]


@cache
def levels() -> np.ndarray:
    """Return the codes of light in [0, 1], uint8 (NUM_STEPS,) over its square root."""
    return np.rint(255 * np.linspace(0, 1, NUM_STEPS) ** (2 / 2.4)).astype(np.uint8)


@cache
def light(curve: str) -> np.ndarray:
    """Return what each 16-bit code stands for, float32 (65536,): PQ in units of white, HLG as light of the scene."""
    codes = np.arange(65536) / 65535
    if curve == "PQ":
        return (nits_of(codes) / WHITE).astype(np.float32)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(codes <= 0.5, codes**2 / 3, (np.exp((codes - c) / a) + b) / 12).astype(np.float32)


def nits_of(codes: np.ndarray) -> np.ndarray:
    """Return the luminance of PQ codes in [0, 1], cd/m2 (SMPTE ST 2084)."""
    root = codes ** (1 / 78.84375)
    return 10000 * (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (1 / 0.1593017578125)


def pq_of(nits: np.ndarray) -> np.ndarray:
    """Return the PQ codes in [0, 1] of a luminance; inverts `nits_of`."""
    root = (nits / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * root) / (1 + 18.6875 * root)) ** 78.84375


@cache
def gains() -> np.ndarray:
    """Return the factor of light by the brightest channel, float32 (NUM_STEPS,) over the root of its share of 10000."""
    nits = 10000 * np.linspace(0, 1, NUM_STEPS) ** 2
    peak = pq_of(np.array(PEAK))
    white, x = pq_of(np.array(WHITE)) / peak, np.minimum(pq_of(nits) / peak, 1)
    knee = 1.5 * white - 0.5
    t = (x - knee) / (1 - knee)
    hermite = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * white
    shown = nits_of(peak * np.maximum(hermite, 0))
    return np.divide(shown, nits, out=np.ones_like(nits), where=x > knee).astype(np.float32)
