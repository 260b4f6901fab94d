"""Random changes to training pictures: those of photographs that papers make, and those of the built-in drawings."""

import math
from dataclasses import dataclass

import numpy as np

SCALE = (0.65, 1.2)
SHIFT = 0.12  # of the side
TURN = 0.18  # radians
TINT = 0.15  # strength of each colour, and of all together
DROPPED_WORDS = 0.15
WHITE = 255
ASPECTS = (3 / 4, 4 / 3)  # of a random part of a picture, width by height
TRIES = 10


@dataclass(frozen=True)
class Changes:
    """Which changes training makes; the fields of `cir_jax.config.Train` of those names say what they are."""

    augment: bool = True
    crop: tuple[float, float] | None = None
    mirror: bool = False


OF_DRAWINGS = Changes()


def random_box(
    width: int, height: int, share: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """A random part (left, top, right, bottom) of a picture, as torchvision's `RandomResizedCrop` chooses it.

    Args:
      share: of the picture's area, at least and at most.
    """
    for _ in range(TRIES):
        area = width * height * rng.uniform(*share)
        aspect = math.exp(rng.uniform(*map(math.log, ASPECTS)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            return int(left), int(top), int(left) + w, int(top) + h
    # The largest part in the middle that is neither too long nor too high.
    w = min(width, round(height * ASPECTS[1]))
    h = min(height, round(width / ASPECTS[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def drop_words(text: str, rng: np.random.Generator) -> str:
    """A text without some of its words, so that none is indispensable; never empty."""
    kept = [word for word in text.split() if rng.random() >= DROPPED_WORDS]
    return " ".join(kept) if kept else text


def augment(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A picture `[H, W, 3]` uint8, scaled, shifted, turned and tinted a little; what comes into view is white.

    Never mirrored: "facing right" is something a query asks for.
    """
    height, width = picture.shape[:2]
    scale, angle = rng.uniform(*SCALE), rng.uniform(-TURN, TURN)
    down, right = rng.uniform(-SHIFT, SHIFT, 2) * (height, width)
    y = np.arange(height)[:, None] - (height - 1) / 2
    x = np.arange(width)[None, :] - (width - 1) / 2
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    rows = np.rint(cos * y + sin * x + (height - 1) / 2 + down).astype(int)
    columns = np.rint(cos * x - sin * y + (width - 1) / 2 + right).astype(int)
    outside = (rows < 0) | (rows >= height) | (columns < 0) | (columns >= width)
    out = picture[rows.clip(0, height - 1), columns.clip(0, width - 1)]
    out[outside] = WHITE
    # White stays white: only what is drawn changes its strength.
    strength = rng.uniform(1 - TINT, 1 + TINT, 3) * rng.uniform(1 - TINT, 1 + TINT)
    return (WHITE - (WHITE - out.astype(np.float32)) * strength).clip(0, WHITE).astype(np.uint8)
