"""Words that are vectors: what turns pictures into them, and prompts of CLIP's text tower in which they stand.

Textual inversion as in Pic2Word, SEARLE, LinCIR and FTI4CIR: at some places of a prompt (its slots) the embedding of a
token, a star, gives way to a vector that a network made of a picture. A prompt is put together from parts inside the
compiled program, so that the number of pseudo-words may differ from row to row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from cir_jax.encoders.clip import ClipText
from cir_jax.encoders.layers import ACTIVATIONS, Activation, Linear, dropout, subkey


class Part(NamedTuple):
    """A piece of a prompt, `[B, n]` each, or `[1, n]` if all rows share it.

    `slots` is the number of the pseudo-word that stands in a place, -1 for none; only places that are `kept` count.
    """

    ids: jax.Array
    slots: jax.Array
    kept: jax.Array


class Prompt(NamedTuple):
    """Rows for a text tower, `[B, L]` each: ids with start, end and padding, and the slots as in `Part`."""

    ids: jax.Array
    slots: jax.Array


class Words(NamedTuple):
    """The vocabulary as prompts need it: special ids, the star's, and the ids of each fixed phrase."""

    start: int
    end: int
    pad: int
    star: int
    phrases: tuple[tuple[str, tuple[int, ...]], ...]

    def __call__(self, phrase: str) -> Part:
        """A fixed phrase, one of those given to `vocabulary`."""
        return fixed(dict(self.phrases)[phrase])

    def id(self, word: str) -> int:
        """The id of a phrase that is one."""
        return dict(self.phrases)[word][0]

    def stars(self, most: int, counts: jax.Array | None = None, first: int = 0) -> Part:
        """The slots `first`, `first` + 1, …: `most` of them, of which each row has its own count `[B]`."""
        places = jnp.arange(most)[None]
        kept = jnp.ones_like(places, bool) if counts is None else places < counts[:, None]
        places = jnp.broadcast_to(places, kept.shape)
        return Part(jnp.full_like(places, self.star), first + places, kept)


def vocabulary(tokenize, star: str, phrases: Sequence[str]) -> Words:
    """What prompts need to know of a tokenizer.

    Args:
      tokenize: a `cir_jax.data.text.Tokenizer`.
      star: the word whose places pseudo-words take.
      phrases: that the method's prompts consist of.

    Raises:
      ValueError: a vocabulary in which the star is no single id.
    """
    stars, *found = tokenize.content([star, *phrases])
    if len(stars) != 1:
        raise ValueError(
            f"the vocabulary makes {len(stars)} ids of {star!r}, expected one; use one of kind 'clip_bpe'"
        )
    ids = tuple(map(tuple, found))
    return Words(tokenize.start, tokenize.end, tokenize.pad, stars[0], tuple(zip(phrases, ids)))


def fixed(ids: Sequence[int]) -> Part:
    """The same ids in every row."""
    ids = jnp.asarray(ids, jnp.int32).reshape(1, -1)
    return Part(ids, jnp.full_like(ids, -1), jnp.ones_like(ids, bool))


def content(ids: jax.Array, end: int) -> Part:
    """What stands between start and end of rows `[B, L]` from a tokenizer."""
    inside = (jnp.cumsum(ids == end, axis=1) == 0) & (jnp.arange(ids.shape[1]) > 0)
    return Part(ids, jnp.full_like(ids, -1), inside)


def divided(part: Part, separator: int) -> tuple[Part, Part]:
    """What stands before and behind the first `separator` of each row; without one everything is before it."""
    found = (part.ids == separator) & part.kept
    passed = jnp.cumsum(found, axis=1)
    first = found & (passed == 1)
    before, behind = passed == 0, (passed > 0) & ~first
    return part._replace(kept=part.kept & before), part._replace(kept=part.kept & behind)


def starred(part: Part, star: int, first_only: bool = False) -> Part:
    """The part with slot 0 at its stars: at every one, or at the first of each row."""
    found = (part.ids == star) & part.kept
    if first_only:
        found &= jnp.cumsum(found, axis=1) == 1
    return part._replace(slots=jnp.where(found, 0, part.slots))


def joined(parts: Sequence[Part], words: Words, longest: int) -> Prompt:
    """Rows of the kept places of all parts, in order; what goes beyond `longest` ids is cut, as tokenizers do."""
    rows = max(len(part.ids) for part in parts)
    spread = lambda x: jnp.broadcast_to(x, (rows, x.shape[1]))
    ids, slots, kept = (jnp.concatenate(list(map(spread, each)), axis=1) for each in zip(*parts))
    room = min(ids.shape[1], longest - 2)
    order = jnp.argsort(~kept, axis=1, stable=True)[:, :room]
    counts = jnp.minimum(kept.sum(axis=1, keepdims=True), room)
    place = jnp.arange(room + 2)
    inside = (place > 0) & (place <= counts)
    framed = lambda x: jnp.pad(jnp.take_along_axis(x, order, axis=1), ((0, 0), (1, 1)))
    ends = jnp.where(place == 0, words.start, jnp.where(place == counts + 1, words.end, words.pad))
    return Prompt(jnp.where(inside, framed(ids), ends), jnp.where(inside, framed(slots), -1))


def read(tower: ClipText, prompt: Prompt, tokens: jax.Array) -> jax.Array:
    """The features `[B, embed]` of prompts whose slots hold pseudo-words `tokens` `[B, T, width]`.

    One prompt may serve all rows.
    """
    ids, slots = (jnp.broadcast_to(x, (len(tokens), x.shape[1])) for x in prompt)
    stand_ins = jnp.take_along_axis(tokens, jnp.maximum(slots, 0)[..., None], axis=1)
    words = jnp.where(slots[..., None] >= 0, stand_ins, tower.embedding[...][ids])
    return tower(ids, words)


def uniform_linear(inputs: int, outputs: int, *, bias=True, dtype, rngs) -> Linear:
    """A linear layer that begins like PyTorch's: weights and bias uniform within the root of 1 / inputs."""
    draw = lambda key, shape: jax.random.uniform(
        key, shape, minval=-(inputs**-0.5), maxval=inputs**-0.5
    )
    layer = Linear(inputs, outputs, std=draw, bias=bias, dtype=dtype, rngs=rngs)
    if bias:
        layer.bias = nnx.Param(draw(rngs.params(), (outputs,)))
    return layer


class Mapper(nnx.Module):
    """Features `[…, inputs]` -> pseudo-words `[…, outputs]`, through two hidden layers.

    The network of Pic2Word (ReLU) and of SEARLE, LinCIR and FTI4CIR (GELU).
    """

    def __init__(
        self, inputs, hidden, outputs, *, activation: Activation, dropout, dtype="float32", rngs
    ):
        options = {"dtype": dtype, "rngs": rngs}
        self.up = uniform_linear(inputs, hidden, **options)
        self.across = uniform_linear(hidden, hidden, **options)
        self.down = uniform_linear(hidden, outputs, **options)
        self.activation, self.dropout = activation, dropout

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """A `key` turns dropout on."""
        for number, layer in enumerate((self.up, self.across)):
            x = dropout(ACTIVATIONS[self.activation](layer(x)), self.dropout, subkey(key, number))
        return self.down(x)
