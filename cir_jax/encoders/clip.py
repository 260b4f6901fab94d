"""CLIP's two transformers (Radford et al. 2021; openai/CLIP `clip/model.py`), any size by config.

The vision tower reads `[B, S, S, 3]` pictures that are already normalised, the text tower `[B, L]` token ids whose
largest id is the end-of-text token. Both return `[B, embed]`, not normalised.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from cir_jax.encoders.layers import (
    Activation,
    Attention,
    Dtype,
    Linear,
    Mlp,
    layer_norm,
    normal,
    patches,
    product,
    run,
    stack,
)


@dataclass(frozen=True)
class VisionConfig:
    """Size of the vision transformer; `size` and `patch` in pixels."""

    size: int = 224
    patch: int = 32
    width: int = 768
    layers: int = 12
    heads: int = 12


@dataclass(frozen=True)
class TextConfig:
    """Size of the text transformer; `length` counts tokens with start and end."""

    vocabulary: int = 49408
    length: int = 77
    width: int = 512
    layers: int = 12
    heads: int = 8


# The sizes that OpenAI published with a vision transformer, as fields of a config.
OPENAI_VITS = {
    "L/14": {
        "vision": VisionConfig(patch=14, width=1024, layers=24, heads=16),
        "text": TextConfig(width=768, heads=12),
        "embed": 768,
    },
    "B/32": {"vision": VisionConfig(patch=32), "text": TextConfig(), "embed": 512},
    "B/16": {"vision": VisionConfig(patch=16), "text": TextConfig(), "embed": 512},
}


class Block(nnx.Module):
    """Pre-norm transformer block. `depth` is the tower's number of blocks and scales the initial weights."""

    def __init__(self, width, heads, depth, *, activation: Activation, epsilon, dtype: Dtype, rngs):
        std, out_std = width**-0.5, width**-0.5 * (2 * depth) ** -0.5
        self.ln1 = layer_norm(width, rngs, epsilon)
        self.attention = Attention(width, heads, std=std, out_std=out_std, dtype=dtype, rngs=rngs)
        self.ln2 = layer_norm(width, rngs, epsilon)
        self.mlp = Mlp(
            width,
            4 * width,
            activation=activation,
            std=(2 * width) ** -0.5,
            out_std=out_std,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, x, mask=None):
        x = x + self.attention(self.ln1(x), mask=mask)
        return x + self.mlp(self.ln2(x))


def _blocks(config, rngs, **options):
    make = lambda rngs: Block(config.width, config.heads, config.layers, rngs=rngs, **options)
    return stack(make, config.layers, rngs)


class ClipVision(nnx.Module):
    """Pictures `[B, S, S, 3]` -> `[B, embed]`."""

    def __init__(self, config: VisionConfig, embed, *, activation, epsilon, dtype, remat, rngs):
        if config.size % config.patch:
            raise ValueError(
                f"picture size {config.size} is not a multiple of patch {config.patch}"
            )
        width, scale = config.width, config.width**-0.5
        tokens = (config.size // config.patch) ** 2 + 1
        self.config, self.dtype, self.remat = config, dtype, remat
        # Stored as a convolution kernel [patch, patch, 3, width]; applied as a product over flattened patches.
        shape = (config.patch, config.patch, 3, width)
        self.patch_kernel = normal(rngs, shape, (3 * config.patch**2) ** -0.5)
        self.class_token = normal(rngs, (width,), scale)
        self.positions = normal(rngs, (tokens, width), scale)
        self.ln_pre = layer_norm(width, rngs, epsilon)
        options = {"activation": activation, "epsilon": epsilon, "dtype": dtype}
        self.blocks = _blocks(config, rngs, **options)
        self.ln_post = layer_norm(width, rngs, epsilon)
        self.project = Linear(width, embed, std=scale, bias=False, dtype=dtype, rngs=rngs)

    def tokens(self, images: jax.Array, kept: jax.Array | None = None) -> jax.Array:
        """All states after the last block, `[B, 1 + patches, width]`, class token first.

        `kept` `[B, n]` names the patches that are read (training on part of each picture); None reads all.
        """
        kernel = self.patch_kernel[...].reshape(-1, self.config.width)
        x = product("bnp,pw->bnw", patches(images, self.config.patch), kernel, self.dtype)
        first = jnp.broadcast_to(self.class_token[...], (len(x), 1, x.shape[-1])).astype(x.dtype)
        x = jnp.concatenate([first, x], axis=1) + self.positions[...]
        if kept is not None:
            rows = jnp.pad(kept + 1, ((0, 0), (1, 0)))
            x = jnp.take_along_axis(x, rows[..., None], axis=1)
        return run(self.blocks, self.ln_pre(x), remat=self.remat)

    def random_patches(self, rows: int, share: float, key: jax.Array) -> jax.Array:
        """A random choice of patches for each of `rows` pictures, `[rows, share * patches]`."""
        count = len(self.positions[...]) - 1
        noise = jax.random.uniform(key, (rows, count))
        return jnp.argsort(noise, axis=1)[:, : max(1, round(share * count))]

    def __call__(self, images: jax.Array, kept: jax.Array | None = None) -> jax.Array:
        return self.project(self.ln_post(self.tokens(images, kept)[:, 0]))


class ClipText(nnx.Module):
    """Token ids `[B, L]` -> `[B, embed]`; L may be any length up to the config's."""

    def __init__(self, config: TextConfig, embed, *, activation, epsilon, dtype, remat, rngs):
        width = config.width
        self.config, self.remat = config, remat
        self.embedding = normal(rngs, (config.vocabulary, width), 0.02)
        self.positions = normal(rngs, (config.length, width), 0.01)
        options = {"activation": activation, "epsilon": epsilon, "dtype": dtype}
        self.blocks = _blocks(config, rngs, **options)
        self.ln_final = layer_norm(width, rngs, epsilon)
        self.project = Linear(width, embed, std=width**-0.5, bias=False, dtype=dtype, rngs=rngs)

    def __call__(
        self, ids: jax.Array, words: jax.Array | None = None, hidden: int | None = None
    ) -> jax.Array:
        """`words` `[B, L, width]`, if given, are read in place of the ids' own embeddings (pseudo-words).

        No place sees those of the id `hidden`.
        """
        length = ids.shape[1]
        words = self.embedding[...][ids] if words is None else words
        x = words + self.positions[...][:length]
        seen = jnp.tril(jnp.ones((length, length), bool))
        if hidden is not None:
            seen &= (ids != hidden)[:, None, None]
        x = self.ln_final(run(self.blocks, x, seen, remat=self.remat))
        # The end token has the largest id; padding behind it is invisible to it under the causal mask.
        last = jnp.argmax(ids, axis=1)
        return self.project(jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0])
