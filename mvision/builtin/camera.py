"""The camera: uneven light, exposure, white balance, blur and sensor noise."""

from statistics import NormalDist

import cv2
import numpy as np

# A random byte looked up here is a normally distributed number: much faster than drawing one, and as good for noise.
_NORMAL = np.array([NormalDist().inv_cdf((i + 0.5) / 256) for i in range(256)], np.float32)


def expose(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> the same, as a modest camera would have taken it."""
    height, width = image.shape[:2]
    depth = rng.uniform(0, 38)
    field = np.clip(128 + rng.uniform(-depth, depth, (3, 3)), 0, 255).astype(np.uint8)
    light = cv2.resize(field, (width, height), interpolation=cv2.INTER_CUBIC)
    image = cv2.multiply(image, cv2.merge([light, light, light]), scale=1 / 128)
    if rng.random() < 0.3:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.0))
    ramp = np.linspace(0, 1, 256, dtype=np.float32)[:, None] ** np.float32(np.exp(rng.normal(-0.08, 0.16)))
    low, high = rng.uniform(0, 0.05), rng.uniform(0.92, 1.08)
    tint = np.exp(rng.normal(0, 0.04, 3)).astype(np.float32)
    table = np.clip(255 * (low + (high - low) * ramp) * tint, 0, 255).astype(np.uint8)
    image = cv2.LUT(image, table[:, None, :])
    grain = (_NORMAL * rng.uniform(0, 5.5)).round().astype(np.int16)
    sample = cv2.LUT(rng.integers(0, 256, image.shape, dtype=np.uint8), grain)
    return cv2.add(image, sample, dtype=cv2.CV_8U)
