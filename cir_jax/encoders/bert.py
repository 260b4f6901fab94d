"""BERT (Devlin et al. 2018), and with `image_width` the text encoder of BLIP, whose layers also look at a picture.

Post-norm layers, exact GELU, absolute positions. Follows Hugging Face `BertModel` and
salesforce/BLIP `models/med.py`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from cir_jax.encoders.layers import (
    Attention,
    Dtype,
    Mlp,
    base_std,
    dropout,
    layer_keys,
    layer_norm,
    normal,
    run,
    run_to_first,
    stack,
    subkey,
)
from cir_jax.large_batches import gathered, remembered


@dataclass(frozen=True)
class BertConfig:
    """Size of the transformer; the defaults are BERT base, uncased.

    `length` is the number of positions. `types` rows of token-type embeddings (only row 0 is used; 0 = no table).
    `image_width` is the width of the picture tokens that every layer attends to; 0 = no cross-attention.
    `dropout` acts only where a key is given; `epsilon` is that of every LayerNorm.
    """

    vocabulary: int = 30522
    length: int = 512
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    types: int = 2
    image_width: int = 0
    dropout: float = 0.1
    epsilon: float = 1e-12


BERT_BASE = BertConfig()
BLIP_BASE = BertConfig(vocabulary=30524, types=0, image_width=768)


class Embeddings(nnx.Module):
    """Token ids `[B, L]` -> `[B, L, width]`."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        self.embedding = normal(rngs, (config.vocabulary, config.width), 0.02)
        self.positions = normal(rngs, (config.length, config.width), 0.02)
        self.types = normal(rngs, (config.types, config.width), 0.02) if config.types else None
        self.ln = layer_norm(config.width, rngs, config.epsilon)
        self.dropout = config.dropout

    def __call__(self, ids: jax.Array, key: jax.Array | None = None) -> jax.Array:
        length, limit = ids.shape[1], len(self.positions[...])
        if length > limit:
            raise ValueError(
                f"a text of {length} tokens does not fit {limit} positions; set inputs.text.length"
            )
        x = self.embedding[...][ids] + self.positions[...][:length]
        x = x if self.types is None else x + self.types[...][0]
        return dropout(self.ln(x), self.dropout, key)


class Branch(nnx.Module):
    """The attention half of a layer: over the text itself, then, if `image_width` is set, over picture tokens."""

    def __init__(self, config: BertConfig, *, dtype: Dtype, rngs):
        width, self.dropout = config.width, config.dropout
        std = {
            "std": base_std(width),
            "out_std": base_std(width),
            "dropout": config.dropout,
            "dtype": dtype,
        }
        self.attention = Attention(width, config.heads, **std, rngs=rngs)
        self.ln1 = layer_norm(width, rngs, config.epsilon)
        looks, std["kv_width"] = config.image_width > 0, config.image_width
        self.cross = Attention(width, config.heads, **std, rngs=rngs) if looks else None
        self.ln2 = layer_norm(width, rngs, config.epsilon) if looks else None

    def read(self, x, mask, key=None, first=False):
        """Self-attention with residual and norm; `first` computes position 0 only, as `[B, 1, width]`."""
        y = x[:, :1] if first else x
        attended = self.attention(y, x, mask, subkey(key, 0))
        return self.ln1(dropout(attended, self.dropout, subkey(key, 1)) + y)

    def look(self, x, tokens, key=None):
        """Cross-attention without residual.

        x `[C * G, N, width]` may have more rows than tokens `[C, M, image_width]`: rows c * G … c * G + G - 1 look
        at picture c, whose keys and values are computed once.
        """
        grouped = x.reshape(len(tokens), -1, x.shape[-1])
        return self.cross(grouped, tokens, key=key).reshape(x.shape)


class Block(nnx.Module):
    """One BERT layer."""

    def __init__(self, config: BertConfig, *, dtype: Dtype, rngs):
        self.branch = Branch(config, dtype=dtype, rngs=rngs)
        self.mlp = feed_forward(config, dtype=dtype, rngs=rngs)
        self.ln3 = layer_norm(config.width, rngs, config.epsilon)
        self.dropout = config.dropout

    def __call__(self, x, mask, tokens, key=None, first=False):
        x = self.branch.read(x, mask, subkey(key, 0), first)
        if tokens is not None:
            seen = self.branch.look(x, tokens, subkey(key, 1))
            x = self.branch.ln2(dropout(seen, self.dropout, subkey(key, 2)) + x)
        return self.ln3(dropout(self.mlp(x), self.dropout, subkey(key, 3)) + x)


def feed_forward(config: BertConfig, *, dtype: Dtype, rngs) -> Mlp:
    """The second half of a layer, without residual and norm."""
    std = base_std(config.width)
    options = {"std": std, "out_std": std, "dtype": dtype, "rngs": rngs}
    return Mlp(config.width, config.hidden, activation="gelu", **options)


class Bert(nnx.Module):
    """Token ids `[B, L]` and their mask (True = a token, not padding) -> hidden states `[B, L, width]`.

    With cross-attention every call may also bring picture tokens `[C, M, image_width]`, where C divides B
    (`Branch.look`); without them the layers skip it, which is BLIP's text-only mode.
    """

    def __init__(self, config: BertConfig, *, dtype: Dtype, remat: bool, rngs):
        self.config, self.remat = config, remat
        self.embeddings = Embeddings(config, rngs)
        make = lambda rngs: Block(config, dtype=dtype, rngs=rngs)
        self.blocks = stack(make, config.layers, rngs)

    def __call__(self, ids, mask, tokens=None, key=None) -> jax.Array:
        """The last hidden state. A `key` turns dropout on."""
        x = self.embeddings(ids, subkey(key, 0))
        return run(self.blocks, x, *self._context(mask, tokens), **self._options(key))

    def first(self, ids, mask, tokens=None, key=None) -> jax.Array:
        """Position 0 of the last hidden state, `[B, width]`: the same number for less work."""
        return self.first_of(self.embeddings(ids, subkey(key, 0)), mask, tokens, key)

    def first_of(self, x, mask, tokens=None, key=None) -> jax.Array:
        """`first`, from the output x `[B, L, width]` of `embeddings`."""
        context = self._context(mask, tokens)
        return run_to_first(self.blocks, x, *context, **self._options(key))[:, 0]

    def states(self, ids, mask) -> jax.Array:
        """Embeddings and the state behind every layer, `[1 + layers, B, L, width]`."""
        x, (mask, _) = self.embeddings(ids), self._context(mask, None)
        step = lambda x, block: (block(x, mask, None),) * 2
        return jnp.concatenate([x[None], jax.lax.scan(step, x, self.blocks)[1]])

    def last_states(self, ids, mask, layers: int, key=None, first=False) -> jax.Array:
        """The states behind the last `layers` layers side by side, lowest first: `[B, L, layers * width]`.

        With `first` only those of position 0, `[B, 1, layers * width]`. Layers are not cut off the stack: that would copy
        their parameters for every batch.
        """
        depth = self.config.layers
        if not 1 <= layers <= depth:
            raise ValueError(
                f"states of the last {layers} layers are wanted; this BERT has 1 to {depth}"
            )
        x, (mask, _) = self.embeddings(ids, subkey(key, 0)), self._context(mask, None)

        def step(x, layer):
            x = gathered(layer[0])(x, mask, None, layer[1])
            return x, x[:, :1] if first else x

        step = remembered(step, self.remat)
        states = jax.lax.scan(step, x, (self.blocks, layer_keys(key, depth)))[1][-layers:]
        return jnp.concatenate(list(states), axis=-1)

    def _context(self, mask, tokens):
        if tokens is not None and not self.config.image_width:
            raise ValueError(
                "this BERT has no cross-attention; set image_width to give it picture tokens"
            )
        return mask[:, None, None], tokens

    def _options(self, key):
        return {"each": (layer_keys(key, self.config.layers),), "remat": self.remat}
