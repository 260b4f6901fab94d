"""The vision transformer of BLIP (timm's ViT; salesforce/BLIP `models/vit.py`), any size by config.

Pre-norm blocks, exact GELU, LayerNorm with epsilon 1e-6, and a last norm over every token.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cir_jax.encoders.layers import (
    Attention,
    Dtype,
    Mlp,
    base_std,
    drop_path,
    layer_keys,
    layer_norm,
    normal,
    patches,
    product,
    run,
    stack,
    subkey,
)

EPSILON = 1e-6


@dataclass(frozen=True)
class VitConfig:
    """Size of the transformer; `size` and `patch` in pixels.

    `drop_path` is the share of rows that skip a residual branch in the last block of a training step; it grows
    linearly from 0 in the first block.
    """

    size: int = 384
    patch: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    drop_path: float = 0.0


VIT_B16_384 = VitConfig()
VIT_B16_224 = VitConfig(size=224)


class Block(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, width, heads, *, dtype: Dtype, rngs):
        std = {"std": base_std(width), "out_std": base_std(width), "dtype": dtype}
        self.ln1 = layer_norm(width, rngs, EPSILON)
        self.attention = Attention(width, heads, **std, rngs=rngs)
        self.ln2 = layer_norm(width, rngs, EPSILON)
        self.mlp = Mlp(width, 4 * width, activation="gelu", **std, rngs=rngs)

    def __call__(self, x, key=None, rate=0.0):
        x = x + drop_path(self.attention(self.ln1(x)), rate, subkey(key, 0))
        return x + drop_path(self.mlp(self.ln2(x)), rate, subkey(key, 1))


class Vit(nnx.Module):
    """Pictures `[B, S, S, 3]`, already normalised -> all tokens `[B, 1 + patches, width]`, class token first."""

    def __init__(self, config: VitConfig, *, dtype: Dtype, remat: bool, rngs):
        if config.size % config.patch:
            raise ValueError(
                f"picture size {config.size} is not a multiple of patch {config.patch}"
            )
        width, patch = config.width, config.patch
        tokens = (config.size // patch) ** 2 + 1
        self.config, self.dtype, self.remat = config, dtype, remat
        # Stored as a convolution kernel; applied as a product over flattened patches.
        self.patch_kernel = normal(rngs, (patch, patch, 3, width), (3 * patch**2) ** -0.5)
        self.patch_bias = nnx.Param(jnp.zeros(width))
        self.class_token = normal(rngs, (width,), 0.02)
        self.positions = normal(rngs, (tokens, width), 0.02)
        make = lambda rngs: Block(width, config.heads, dtype=dtype, rngs=rngs)
        self.blocks = stack(make, config.layers, rngs)
        self.ln_post = layer_norm(width, rngs, EPSILON)

    def __call__(self, images: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """With a `key`, residual branches are dropped at the config's rate."""
        width, depth = self.config.width, self.config.layers
        cut = patches(images, self.config.patch)
        x = product("bnp,pw->bnw", cut, self.patch_kernel[...].reshape(-1, width), self.dtype)
        first = jnp.broadcast_to(self.class_token[...], (len(x), 1, width)).astype(x.dtype)
        x = jnp.concatenate([first, x + self.patch_bias[...]], axis=1) + self.positions[...]
        key = key if self.config.drop_path else None
        rates = None if key is None else jnp.linspace(0, self.config.drop_path, depth)
        x = run(self.blocks, x, each=(layer_keys(key, depth), rates), remat=self.remat)
        return self.ln_post(x)


def resize_positions(table: np.ndarray, grid: int) -> np.ndarray:
    """A position table `[1 + g * g, D]` for another grid: `[1 + grid * grid, D]`; the class row stays.

    original: BLIP `interpolate_pos_embed`, PyTorch's bicubic kernel without antialiasing. Computed in float64 by numpy,
    so that a conversion gives the same bytes on every device.

    Raises:
      ValueError: a table whose other rows are no square.
    """
    table = np.asarray(table)
    side, width = math.isqrt(max(0, len(table) - 1)), table.shape[1]
    if side < 1 or side**2 + 1 != len(table):
        raise ValueError(f"a position table has 1 + g * g rows; this one has {len(table)}")
    if side == grid:
        return table
    weights, square = bicubic_weights(side, grid), table[1:].reshape(side, side, width)
    resized = np.einsum("ai,bj,ijd->abd", weights, weights, square, optimize=True)
    return np.concatenate([table[:1], resized.reshape(-1, width).astype(table.dtype)])


def bicubic_weights(inputs: int, outputs: int) -> np.ndarray:
    """`[outputs, inputs]` float64: the rows that PyTorch's bicubic resize takes a line by (`align_corners=False`).

    The kernel's constant is -0.75; taps beyond the border count for the value at the border.
    """
    a, made = -0.75, np.zeros((outputs, inputs))
    near = lambda t: ((a + 2) * t - (a + 3)) * t * t + 1
    far = lambda t: ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    at = (np.arange(outputs) + 0.5) * inputs / outputs - 0.5
    first = np.floor(at).astype(int)
    t = at - first
    for tap, weight in enumerate((far(t + 1), near(t), near(1 - t), far(2 - t)), -1):
        np.add.at(made, (np.arange(outputs), np.clip(first + tap, 0, inputs - 1)), weight)
    return made
