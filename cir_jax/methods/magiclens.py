"""MagicLens (Zhang et al. 2024, arXiv 2403.19651; google-deepmind/magiclens `model.py`): pictures with instructions.

Queries and items go through one network: CLIP's features of a picture and of a text, as two tokens, through a small
transformer and a pooling attention. An item, and a query of a picture alone, has an empty text. How the published
weights were trained is not released; the loss here is CLIP's.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from cir_jax.data.images import ImageSpec
from cir_jax.data.inputs import Inputs
from cir_jax.data.text import tokenizer
from cir_jax.encoders.clip import OPENAI_VITS
from cir_jax.encoders.layers import Linear, Mlp, normal, product, run, stack
from cir_jax.encoders.pseudo_words import joined, vocabulary
from cir_jax.methods.clip import Clip, ClipConfig
from cir_jax.methods.inversion import check_whole, composed

# Of the logits in every attention.
CAP = 50.0
# 1 / softplus(0), with which the learned scale of the pooling begins near one.
SOFTPLUS = 1.442695041


@dataclass(frozen=True)
class MagicLensConfig(ClipConfig):
    """CLIP and what fuses its features; `fusion_heads` also in the pooling, whose heads are four times as wide.

    With `hide_id_zero` no word of a text sees the id 0: padding and, in CLIP's vocabulary, a "!" before another sign.
    """

    fusion_layers: int = 4
    fusion_heads: int = 8
    hide_id_zero: bool = False

    @classmethod
    def tiny(cls, inputs: Inputs) -> "MagicLensConfig":
        """A size for tests."""
        clip = ClipConfig.tiny(inputs)
        return cls(
            clip.vision, clip.text, clip.embed, inputs=inputs, fusion_layers=2, fusion_heads=2
        )

    @classmethod
    def paper(cls, size: Literal["base", "large"] = "large") -> "MagicLensConfig":
        """The published sizes, with their picture transform.

        Original: data_utils.py, divides a picture by its largest value instead of 255; Scenic's text tower takes
        the id 0 for padding wherever it stands.
        """
        image = ImageSpec(resize="squash", filter="bilinear", scale_by_brightest=True)
        clip, heads = {"base": ("B/16", 8), "large": ("L/14", 16)}[size]
        return cls(
            **OPENAI_VITS[clip], inputs=Inputs(image=image), fusion_heads=heads, hide_id_zero=True
        )


class ShiftedNorm(nnx.Module):
    """LayerNorm that multiplies by one more than its scale; the scale begins at 0, where the original's begins at 1."""

    def __init__(self, width, rngs):
        self.scale, self.bias = nnx.Param(jnp.zeros(width)), nnx.Param(jnp.zeros(width))

    def __call__(self, x):
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        return centred * jax.lax.rsqrt(variance + 1e-6) * (1 + self.scale[...]) + self.bias[...]


class CappedAttention(nnx.Module):
    """Attention with bounded logits; with `scaled` each dimension of a head learns its own scale."""

    def __init__(self, width, hidden, heads, *, scaled=False, dtype="float32", rngs):
        if hidden % heads:
            raise ValueError(f"width {hidden} does not divide into {heads} heads")
        options = {"dtype": dtype, "rngs": rngs}
        self.heads, self.dtype = heads, dtype
        self.query = Linear(width, hidden, **options)
        self.key = Linear(width, hidden, **options)
        self.value = Linear(width, hidden, **options)
        self.out = Linear(hidden, width, **options)
        self.scale = nnx.Param(jnp.zeros(hidden // heads)) if scaled else None

    def __call__(self, x: jax.Array, kv: jax.Array) -> jax.Array:
        """x `[B, N, width]`, kv `[B, M, width]` -> `[B, N, width]`."""
        split = lambda y: y.reshape(*y.shape[:-1], self.heads, -1)
        q, k, v = split(self.query(x)), split(self.key(kv)), split(self.value(kv))
        q = q * q.shape[-1] ** -0.5
        if self.scale is not None:
            q = q * SOFTPLUS * jax.nn.softplus(self.scale[...])
        logits = CAP * jnp.tanh(product("bnhd,bmhd->bhnm", q, k, self.dtype) / CAP)
        mixed = product("bhnm,bmhd->bnhd", jax.nn.softmax(logits, axis=-1), v, self.dtype)
        return self.out(mixed.reshape(*x.shape[:2], -1))


class FusionBlock(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, width, heads, *, dtype, rngs):
        options = {"dtype": dtype, "rngs": rngs}
        self.ln1 = ShiftedNorm(width, rngs)
        self.attention = CappedAttention(width, width, heads, **options)
        self.ln2 = ShiftedNorm(width, rngs)
        self.mlp = Mlp(width, 4 * width, activation="relu", **options)

    def __call__(self, x):
        normed = self.ln1(x)
        x = x + self.attention(normed, normed)
        return x + self.mlp(self.ln2(x))


class Fusion(nnx.Module):
    """Tokens `[B, N, width]` -> unit vectors `[B, width]`."""

    def __init__(self, width, layers, heads, *, remat=True, dtype="float32", rngs):
        make = lambda rngs: FusionBlock(width, heads, dtype=dtype, rngs=rngs)
        self.blocks = stack(make, layers, rngs)
        self.pool_query = normal(rngs, (1, width), 1.0)
        self.pool = CappedAttention(width, 4 * width, heads, scaled=True, dtype=dtype, rngs=rngs)
        self.ln_pool = ShiftedNorm(width, rngs)
        self.remat = remat

    def __call__(self, x: jax.Array) -> jax.Array:
        x = run(self.blocks, x, remat=self.remat)
        query = jnp.repeat(self.pool_query[...][None], len(x), axis=0)
        pooled = self.ln_pool(self.pool(query, x))[:, 0]
        return pooled * jax.lax.rsqrt(jnp.sum(pooled * pooled, axis=-1, keepdims=True) + 1e-12)


class MagicLens(nnx.Module):
    """Retriever: a picture, and perhaps a text that says what is wanted of it, against pictures."""

    query_kinds = ({"image", "text"}, {"image"})
    special_rows = 0

    def __init__(self, config: MagicLensConfig, rngs: nnx.Rngs):
        check_whole(config, "magiclens")
        self.clip = Clip(config, rngs)
        self.fusion = Fusion(
            config.embed,
            config.fusion_layers,
            config.fusion_heads,
            remat=config.remat,
            dtype=config.dtype,
            rngs=rngs,
        )
        self.words = vocabulary(tokenizer(config.inputs.text), "*", ("",))
        self.config = config

    def query(self, query: dict[str, jax.Array], key: jax.Array | None = None) -> jax.Array:
        """`[B, embed]`; nothing is random."""
        return self._fused(query["image"], query.get("text"))

    def item(self, item: dict[str, jax.Array]) -> jax.Array:
        return self._fused(item["image"], None)

    def _fused(self, images, text):
        image = self.clip.image(images)
        if text is None:  # the same for all rows, so read once
            text = joined([self.words("")], self.words, self.config.text.length).ids
        hidden = 0 if self.config.hide_id_zero else None
        text = jnp.broadcast_to(self.clip.text(text, hidden=hidden), image.shape)
        return self.fusion(jnp.stack([image, text], axis=1))

    def loss(self, batch, key) -> tuple[jax.Array, dict[str, jax.Array]]:
        """CLIP's contrastive loss between queries and items."""
        return composed(self, batch, key)
