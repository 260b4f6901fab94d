"""What BLIP's retrieval models add to its ViT and BERT: the [ENC] token, the two-branch text encoder, pairing.

The two branches are those of Candidate-Reranking (Liu et al. 2024, arXiv 2305.16304; `src/nlvr_encoder.py`).
"""

import operator
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from cir_jax.encoders.bert import BertConfig, Branch, Embeddings, feed_forward
from cir_jax.encoders.layers import (
    Dtype,
    Linear,
    base_std,
    dropout,
    layer_keys,
    layer_norm,
    run,
    run_to_first,
    stack,
    subkey,
)


def with_encode_token(ids: jax.Array, config: BertConfig) -> jax.Array:
    """Ids `[B, L]` with [ENC], the last row of the vocabulary, in place of [CLS]: how BLIP asks for a fused reading."""
    return jnp.asarray(ids).at[:, 0].set(config.vocabulary - 1)


class TwoBranchBlock(nnx.Module):
    """A layer in which two hidden states look at the same picture and share what they saw.

    Each branch has its own attention and norms; the cross-attention outputs are merged into one (their mean, or with
    `linear` a linear map of both), and the feed-forward half is shared.
    """

    def __init__(self, config: BertConfig, linear: bool, *, dtype: Dtype, rngs):
        self.fused = Branch(config, dtype=dtype, rngs=rngs)
        self.text = Branch(config, dtype=dtype, rngs=rngs)
        width, self.dropout = config.width, config.dropout
        self.merge = (
            Linear(2 * width, width, std=base_std(width), dtype=dtype, rngs=rngs)
            if linear
            else None
        )
        self.mlp = feed_forward(config, dtype=dtype, rngs=rngs)
        self.ln3 = layer_norm(width, rngs, config.epsilon)

    def merged(self, fused, text):
        """One `[B, N, width]` of the two cross-attention outputs."""
        if self.merge is None:
            return (fused + text) / 2
        return self.merge(jnp.concatenate([fused, text], axis=-1))

    def __call__(self, states, mask, tokens, key=None, first=False):
        """States are a pair of `[B, L, width]`; tokens `[C, M, image_width]` as in `Branch.look`."""
        fused = self.fused.read(states[0], mask, subkey(key, 0), first)
        text = self.text.read(states[1], mask, subkey(key, 1), first)
        seen = self.merged(
            self.fused.look(fused, tokens, subkey(key, 2)),
            self.text.look(text, tokens, subkey(key, 3)),
        )
        seen = dropout(seen, self.dropout, subkey(key, 4))
        both = jnp.stack([self.fused.ln2(seen + fused), self.text.ln2(seen + text)])
        both = self.ln3(dropout(self.mlp(both), self.dropout, subkey(key, 5)) + both)
        return both[0], both[1]


class TwoBranchBlocks(nnx.Module):
    """Layers below `merge_from` merge by mean, the others by a linear map: one stack for each kind."""

    def __init__(self, config: BertConfig, merge_from: int, *, dtype: Dtype, remat: bool, rngs):
        self.mean_layers = min(merge_from, config.layers)
        self.linear_layers = config.layers - self.mean_layers
        self.remat = remat
        make = lambda linear: lambda rngs: TwoBranchBlock(config, linear, dtype=dtype, rngs=rngs)
        self.mean = stack(make(False), self.mean_layers, rngs) if self.mean_layers else None
        self.linear = stack(make(True), self.linear_layers, rngs) if self.linear_layers else None

    def first(self, states, mask, tokens, key=None):
        """Position 0 of both branches behind the last layer, a pair of `[B, 1, width]`."""
        options = lambda number, layers: {
            "each": (layer_keys(subkey(key, number), layers),),
            "remat": self.remat,
        }
        if self.mean_layers and self.linear_layers:
            states = run(self.mean, states, mask, tokens, **options(0, self.mean_layers))
        last = self.linear if self.linear_layers else self.mean
        layers = self.linear_layers or self.mean_layers
        return run_to_first(last, states, mask, tokens, **options(1, layers))


class TwoBranchBert(nnx.Module):
    """The text encoder of the re-ranker: a fused state and the embedded text read one candidate picture together."""

    def __init__(self, config: BertConfig, merge_from: int, *, dtype: Dtype, remat: bool, rngs):
        self.embeddings = Embeddings(config, rngs)
        self.blocks = TwoBranchBlocks(config, merge_from, dtype=dtype, remat=remat, rngs=rngs)

    def first(self, fused, text, mask, tokens, key=None) -> jax.Array:
        """Position 0 of both branches side by side, `[B, 2 * width]`.

        Args:
          fused: `[B, L, width]`, enters as it is.
          text: `[B, L, width]`, the output of `embeddings`.
          mask: `[B, L]`, for both branches.
          tokens: `[C, M, image_width]`, C divides B (`Branch.look`).
          key: turns dropout on.
        """
        states = self.blocks.first((fused, text), mask[:, None, None], tokens, key)
        return jnp.concatenate(states, axis=-1)[:, 0]


def two_branches(bert: Mapping, blocks: Mapping) -> dict:
    """Parameters of a `TwoBranchBert` that starts from those of a `Bert` with cross-attention.

    Both branches begin as copies of its attention, the feed-forward half is taken over; the merging layers, which
    `Bert` does not have, keep their values.

    Args:
      bert: nested parameters of the `Bert`, layers stacked.
      blocks: nested parameters `mean` and/or `linear` of `TwoBranchBlocks`.
    """
    kinds = [kind for kind in ("mean", "linear") if kind in blocks]
    depth = lambda kind: len(blocks[kind]["ln3"]["scale"])
    starts = {kind: sum(map(depth, kinds[:i])) for i, kind in enumerate(kinds)}
    doubled = {}
    for kind, start in starts.items():
        layers = slice(start, start + depth(kind))
        part = jax.tree.map(operator.itemgetter(layers), dict(bert["blocks"]))
        branch = part.pop("branch")
        merge = {name: x for name, x in blocks[kind].items() if name == "merge"}
        doubled[kind] = {**part, **merge, "fused": branch, "text": branch}
    return {"embeddings": bert["embeddings"], "blocks": doubled}


def score_lists(score: Callable, queries: Mapping, tokens: jax.Array) -> jax.Array:
    """Scores `[B, K]` of each query with its own candidates.

    Args:
      score: from a tree of N rows and tokens `[C, M, W]`, C dividing N, to scores `[N]`.
      queries: a tree of `[B, …]`.
      tokens: `[B, K, M, W]`.
    """
    count, candidates = tokens.shape[:2]
    rows = jax.tree.map(lambda x: jnp.repeat(x, candidates, axis=0), queries)
    return score(rows, tokens.reshape(-1, *tokens.shape[2:])).reshape(count, candidates)


def score_pairs(score: Callable, queries: Mapping, tokens: jax.Array) -> jax.Array:
    """Scores `[B, N]` of every query with every one of N candidates `[N, M, W]`; arguments as in `score_lists`."""
    rows = jax.tree.map(lambda x: jnp.tile(x, (len(tokens),) + (1,) * (x.ndim - 1)), queries)
    return score(rows, tokens).reshape(len(tokens), -1).T
