"""Random changes to training pictures that keep what they show, left and right included."""

import numpy as np

SCALE = (0.65, 1.2)
SHIFT = 0.12  # of the side
TURN = 0.18  # radians
TINT = 0.15  # strength of each colour, and of all together
DROPPED_WORDS = 0.15
WHITE = 255


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
