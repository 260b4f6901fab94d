"""BEiT-3 (Wang et al. 2022; microsoft/unilm `beit3`, torchscale's multiway encoder), any size.

A multiway transformer keeps two experts of everything with parameters: one reads pictures, one
reads text, and only attention can join them. Here each expert is a tower of its own, so that
retrieval computes exactly one of them. Blocks are pre-norm with a second norm inside each half
(sub-LayerNorm), exact GELU, epsilon 1e-5.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cir_jax.encoders import vit
from cir_jax.encoders.layers import (
    Attention,
    Dtype,
    Initial,
    Linear,
    Mlp,
    drop_path,
    dropout,
    layer_keys,
    layer_norm,
    normal,
    patches,
    product,
    run,
    run_to_first,
    stack,
    subkey,
    truncated,
)

EPSILON = 1e-5
# Both position tables begin with two rows that nothing reads. original: torchscale, after fairseq
UNREAD = 2

Tower = Literal["image", "text"]


@dataclass(frozen=True)
class AdapterConfig:
    """A bottleneck beside the feed-forward half of every block, added to its result.

    Attributes:
      towers: which towers have it; empty for none.
      width: of the bottleneck.
      scale: factor of the result; None learns it, starting at 1.
      norm: LayerNorm before ("in") or behind ("out") the bottleneck.
      dropout: inside the bottleneck, only where a key is given.
      initial: "nothing" begins with an adapter that adds zero, so that training begins with the model as it was;
        "noise" is CFIR's, which means to do the same and overwrites it.
    """

    towers: tuple[Tower, ...] = ()
    width: int = 64
    scale: float | None = 0.3
    norm: Literal["none", "in", "out"] = "none"
    dropout: float = 0.1
    initial: Literal["nothing", "noise"] = "nothing"


@dataclass(frozen=True)
class Beit3Config:
    """Size of both towers; the defaults are BEiT-3 base.

    Attributes:
      size: side of a picture, in pixels.
      patch: side of a patch.
      vocabulary: rows of the token table.
      length: longest text, in tokens.
      width: of the residual stream.
      layers: in each tower.
      heads: of the attention.
      hidden: width of the feed-forward half.
      drop_path: share of rows that skip a residual branch in the last block of a training step;
        grows linearly from 0 in the first.
      mask_token: a token that stands for hidden patches. Retrieval never reads it; the original's
        checkpoints have it.
      adapter: bottlenecks beside the feed-forward halves, by default none.
      enhancer: hidden width of a further feed-forward half behind each block; 0 for none, CFIR's
        is 128.
      initial: first values. "original" expects weights to be loaded over it: beside its large
        positions nearly nothing of the input reaches the output, and training from it hardly
        begins. "scratch" has larger kernels and smaller positions.
    """

    size: int = 224
    patch: int = 16
    vocabulary: int = 64010
    length: int = 1022
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    drop_path: float = 0.0
    mask_token: bool = True
    adapter: AdapterConfig = AdapterConfig()
    enhancer: int = 0
    initial: Literal["original", "scratch"] = "original"

    def kernels(self) -> Initial | None:
        """The `std` of linear layers."""
        # original: torchscale's gains for sub-LayerNorm are erased by BEiT-3's own wrapper
        return truncated(0.02) if self.initial == "original" else None


BEIT3_BASE = Beit3Config()
BEIT3_LARGE = Beit3Config(width=1024, layers=24, heads=16, hidden=4096)


class Adapter(nnx.Module):
    """`[B, N, width]` -> what is added to it."""

    def __init__(self, width, config: AdapterConfig, *, std=None, dtype: Dtype, rngs):
        self.config = config
        noise = config.initial == "noise"
        # original: BEiT-3's wrapper draws every linear layer again, those of adapters too
        std, up = (truncated(0.02), truncated(0.02)) if noise else (std, 0.0)
        self.down = Linear(width, config.width, std=std, dtype=dtype, rngs=rngs)
        self.up = Linear(config.width, width, std=up, dtype=dtype, rngs=rngs)
        self.ln = None if config.norm == "none" else layer_norm(width, rngs, EPSILON)
        self.scale = nnx.Param(jnp.ones(())) if config.scale is None else None

    def __call__(self, x, key=None):
        x = self.ln(x) if self.config.norm == "in" else x
        y = dropout(jax.nn.relu(self.down(x)), self.config.dropout, key)
        y = self.up(y) * (self.config.scale if self.scale is None else self.scale[...])
        return self.ln(y) if self.config.norm == "out" else y


class Block(nnx.Module):
    """One layer of one expert."""

    def __init__(self, config: Beit3Config, tower: Tower, *, dtype: Dtype, rngs):
        width, std = config.width, config.kernels()
        common = {"std": std, "dtype": dtype, "rngs": rngs}
        options = {**common, "out_std": std, "norm": EPSILON}
        adapted = tower in config.adapter.towers
        feed = lambda hidden: Mlp(width, hidden, activation="gelu", **options)
        self.ln1 = layer_norm(width, rngs, EPSILON)
        self.attention = Attention(width, config.heads, **options)
        self.ln2 = layer_norm(width, rngs, EPSILON)
        self.mlp = feed(config.hidden)
        self.adapter = Adapter(width, config.adapter, **common) if adapted else None
        self.enhancer = feed(config.enhancer) if config.enhancer else None

    def feed(self, x, key=None, rate=0.0, adapt=True):
        """The feed-forward half."""
        y = drop_path(self.mlp(self.ln2(x)), rate, subkey(key, 1))
        if self.adapter is not None and adapt:
            y = y + self.adapter(x, subkey(key, 2))
        x = x + y
        return x if self.enhancer is None else x + self.enhancer(x)

    def __call__(self, x, mask, key=None, rate=0.0, first=False):
        """x `[B, N, D]`, mask as in `Attention`; `first` computes position 0 only, `[B, 1, D]`."""
        normed = self.ln1(x)
        asking = normed[:, :1] if first else normed
        mixed = self.attention(asking, normed, mask)
        x = (x[:, :1] if first else x) + drop_path(mixed, rate, subkey(key, 0))
        return self.feed(x, key, rate)


class Expert(nnx.Module):
    """The blocks of one tower and the norm behind them, with the positions in front."""

    def __init__(self, config: Beit3Config, tower: Tower, positions, *, dtype: Dtype, remat, rngs):
        self.config, self.remat = config, remat
        std = 1.0 if config.initial == "original" else 0.02
        self.positions = normal(rngs, (UNREAD + positions, config.width), std)
        make = lambda rngs: Block(config, tower, dtype=dtype, rngs=rngs)
        self.blocks = stack(make, config.layers, rngs)
        self.ln_final = layer_norm(config.width, rngs, EPSILON)

    def placed(self, x: jax.Array) -> jax.Array:
        """x `[B, N, D]` with its positions added."""
        table = self.positions[...][UNREAD:]
        if x.shape[1] > len(table):
            raise ValueError(
                f"{x.shape[1]} tokens do not fit {len(table)} positions; "
                "set `length` of the encoder, or inputs.text.length"
            )
        return x + table[: x.shape[1]]

    def states(self, x: jax.Array, mask=None, key=None) -> jax.Array:
        """All states behind the last block, `[B, N, D]`."""
        return self.ln_final(run(self.blocks, x, mask, **self._options(key)))

    def first(self, x: jax.Array, mask=None, key=None) -> jax.Array:
        """Position 0 of `states`, `[B, D]`, for less work."""
        return self.ln_final(run_to_first(self.blocks, x, mask, **self._options(key)))[:, 0]

    def _options(self, key):
        config = self.config
        active = config.drop_path or (config.adapter.towers and config.adapter.dropout)
        key = key if active else None
        rates = None if key is None else jnp.linspace(0, config.drop_path, config.layers)
        return {"each": (layer_keys(key, config.layers), rates), "remat": self.remat}


class ImageTower(nnx.Module):
    """Pictures `[B, S, S, 3]`, already normalised; the class token is position 0."""

    def __init__(self, config: Beit3Config, *, dtype: Dtype, remat: bool, rngs):
        if config.size % config.patch:
            raise ValueError(
                f"picture size {config.size} is not a multiple of patch {config.patch}"
            )
        width, patch = config.width, config.patch
        self.config, self.dtype = config, dtype
        # Stored as a convolution kernel; applied as a product over flattened patches.
        bound = (3 * patch**2) ** -0.5
        uniform = lambda shape: jax.random.uniform(
            rngs.params(), shape, minval=-bound, maxval=bound
        )
        self.patch_kernel = nnx.Param(uniform((patch, patch, 3, width)))
        self.patch_bias = nnx.Param(uniform((width,)))
        self.class_token = nnx.Param(jnp.zeros(width))
        self.mask_token = nnx.Param(jnp.zeros(width)) if config.mask_token else None
        tokens = 1 + (config.size // patch) ** 2
        self.expert = Expert(config, "image", tokens, dtype=dtype, remat=remat, rngs=rngs)

    def embed(self, images: jax.Array, hidden: jax.Array | None = None) -> jax.Array:
        """Class token and patches without positions, `[B, 1 + P, D]`.

        Patches where `hidden` `[B, P]` is True become `mask_token`.
        """
        if images.shape[1:] != (self.config.size, self.config.size, 3):
            raise ValueError(
                f"pictures are {images.shape[1:]}, the tower reads "
                f"{(self.config.size, self.config.size, 3)}; set inputs.image.size to that size"
            )
        width = self.config.width
        kernel = self.patch_kernel[...].reshape(-1, width)
        x = product("bnp,pw->bnw", patches(images, self.config.patch), kernel, self.dtype)
        x = x + self.patch_bias[...]
        if hidden is not None:
            if self.mask_token is None:
                raise ValueError("this tower has no mask token; set mask_token to hide patches")
            x = jnp.where(hidden[:, :, None], self.mask_token[...], x)
        first = jnp.broadcast_to(self.class_token[...], (len(x), 1, width)).astype(x.dtype)
        return jnp.concatenate([first, x], axis=1)

    def tokens(self, images, hidden=None, key=None) -> jax.Array:
        """`[B, 1 + P, D]`. A `key` turns drop-path and dropout on, here and below."""
        return self.expert.states(self.expert.placed(self.embed(images, hidden)), key=key)

    def __call__(self, images: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """State of the class token, `[B, D]`."""
        return self.expert.first(self.expert.placed(self.embed(images)), key=key)


class TextTower(nnx.Module):
    """Token ids `[B, L]` and their mask (True = a token); the start token is position 0."""

    def __init__(self, config: Beit3Config, *, dtype: Dtype, remat: bool, rngs):
        width = config.width
        self.embedding = normal(rngs, (config.vocabulary, width), width**-0.5)
        self.expert = Expert(config, "text", config.length, dtype=dtype, remat=remat, rngs=rngs)

    def embed(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """`[B, L, D]` with positions; padding is zero."""
        return jnp.where(mask[:, :, None], self.expert.placed(self.embedding[...][ids]), 0)

    def tokens(self, ids, mask, key=None) -> jax.Array:
        """`[B, L, D]`; states at padding are computed, but mean nothing."""
        return self.expert.states(self.embed(ids, mask), mask[:, None, None], key)

    def __call__(self, ids: jax.Array, mask: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """State of the start token, `[B, D]`."""
        return self.expert.first(self.embed(ids, mask), mask[:, None, None], key)


def joint(image: ImageTower, text: TextTower, images, ids, mask) -> jax.Array:
    """A picture and a text read together, `[B, 1 + P + L, D]`.

    Every token attends to all, each expert does the rest. Retrieval never does this; it is here
    because checkpoints are made with it. Adapters stay out of it, as in CFIR.
    """
    seen = image.expert.placed(image.embed(images))
    count = seen.shape[1]
    visible = jnp.concatenate([jnp.ones((len(seen), count), bool), jnp.asarray(mask, bool)], axis=1)
    x = jnp.concatenate([seen, text.embed(ids, mask)], axis=1)

    def step(x, blocks):
        return _joint_block(blocks, x, count, visible[:, None, None]), None

    x, _ = jax.lax.scan(step, x, (image.expert.blocks, text.expert.blocks))
    return _each((image.expert.ln_final, text.expert.ln_final), x, count)


def _joint_block(blocks, x, count, mask):
    """One layer of both experts."""
    q, k, v = (jnp.concatenate(z, axis=1) for z in zip(*map(_heads, blocks, _split(x, count))))
    mixed = blocks[0].attention.mix(q, k, v, mask)
    x = x + _each([block.attention.finish for block in blocks], mixed, count)
    return _each([partial(block.feed, adapt=False) for block in blocks], x, count)


def _heads(block, x):
    normed = block.ln1(x)
    return block.attention.project(normed, normed)


def _split(x, count):
    return x[:, :count], x[:, count:]


def _each(functions, x, count):
    """The first function on the first `count` tokens, the second on the others."""
    return jnp.concatenate([f(part) for f, part in zip(functions, _split(x, count))], axis=1)


def resize_positions(table: np.ndarray, grid: int) -> np.ndarray:
    """The position table of pictures for another grid, `[UNREAD + 1 + grid * grid, D]`.

    As `vit.resize_positions`; the unread rows stay too.
    """
    return np.concatenate([table[:UNREAD], vit.resize_positions(table[UNREAD:], grid)])
