"""Optimisation-based textual inversion, the first stage of SEARLE (Baldrati et al. 2023; miccunifi/SEARLE).

A pseudo-word of its own is learned for each picture, so that prompts with it resemble the picture and phrases with it
those with a concept that the picture shows. Slow, and the teacher of SEARLE's mapping network.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from cir_jax import losses
from cir_jax.data.text import tokenizer
from cir_jax.methods.inversion import Inversion

_KINDS = ("photo", "illustration", "sketch", "diagram")
_PLACES = ("photo", "image", "illustration")
# "illustrations" is so in the original.
_NAMES = ("A photo of a", "An illustrations of a", "A sketch of a", "A diagram of a")
# Prompts of PALAVRA (Cohen et al. 2022) in the order of SEARLE; {} is the place of the concept.
TEMPLATES = (
    *(
        template
        for kind, name in zip(_KINDS, _NAMES)
        for template in (
            f"This is {'an' if kind == 'illustration' else 'a'} {kind} of a {{}}",
            f"This {kind} contains a {{}}",
            f"{name} {{}}",
        )
    ),
    "A {}",
    "We see a {}",
    "{}",
    *(f"We see a {{}} in this {kind}" for kind in _PLACES),
    *(f"We see a {{}} {kind}" for kind in _PLACES),
    *(f"{{}} {kind}" for kind in _PLACES),
)


class Phrases(NamedTuple):
    """Phrases of N pictures: ids `[N, P, L]` as they are and with a star for the concept, and how many each has."""

    plain: np.ndarray
    starry: np.ndarray
    counts: np.ndarray


def phrases_of(method: Inversion, phrases: Sequence[Sequence[tuple[str, str]]]) -> Phrases:
    """Ids of the phrases of each picture, given as (phrase, concept in it); its first occurrence becomes a star.

    ValueError: a picture without phrases, or a phrase without its concept.
    """
    for row, each in enumerate(phrases):
        if not each:
            raise ValueError(f"picture {row} has no phrases; give it some, or give none at all")
        for phrase, concept in each:
            if concept not in phrase:
                raise ValueError(
                    f"the concept {concept!r} is not in the phrase {phrase!r} of picture {row}; leave it out"
                )
    tokenize = tokenizer(method.config.inputs.text)
    star = f" {method.config.star} "
    counts = np.array([len(each) for each in phrases])
    flat = [pair for each in phrases for pair in each]
    rows = np.arange(counts.max()) < counts[:, None]
    made = []
    for texts in (
        [phrase for phrase, _ in flat],
        [phrase.replace(concept, star, 1) for phrase, concept in flat],
    ):
        ids = np.zeros((*rows.shape, tokenize.length), np.int32)
        ids[rows] = tokenize(texts)[0]
        made.append(ids)
    return Phrases(*made, counts)


def invert(
    method: Inversion,
    features: jax.Array,
    key: jax.Array,
    phrases: Sequence[Sequence[tuple[str, str]]] | None = None,
    *,
    steps: int = 350,
    lr: float = 2e-2,
    weight_decay: float = 0.01,
    decay: float = 0.99,
    phrase_weight: float = 0.5,
) -> jax.Array:
    """The pseudo-words `[N, width]` of pictures, a running mean over the steps.

    Args:
      method: whose CLIP, star and prompts are used; its mapping network is not.
      features: `[N, embed]`, CLIP's of the pictures; only their directions count.
      key: of the first words and of the templates and phrases that each step draws.
      phrases: for each picture, (phrase, concept in it); None asks only for likeness with the picture.
      steps, lr, weight_decay: of AdamW.
      decay: of the running mean, which begins at the first words.
      phrase_weight: of the loss on phrases against that on pictures.
    """
    said = None if phrases is None else phrases_of(method, phrases)
    star = f" {method.config.star} "
    templates = tokenizer(method.config.inputs.text)([each.format(star) for each in TEMPLATES])[0]
    width = method.config.text.width
    start = 0.02 * jax.random.normal(key, (len(features), width), features.dtype)
    graph, params = nnx.split(method)
    given = params, start, features, templates, said, key
    return _inverted(*given, graph, steps, lr, weight_decay, decay, phrase_weight)


@functools.partial(jax.jit, static_argnums=range(6, 12))
def _inverted(
    params, start, features, templates, said, key, graph, steps, lr, weight_decay, decay, weight
):
    """`invert` from the words `start` on."""
    method, optimizer = nnx.merge(graph, params), optax.adamw(lr, weight_decay=weight_decay)

    def step(state, number):
        tokens, mean, moments = state
        drawn = jax.random.fold_in(key, number)
        loss = lambda x: step_loss(method, x, features, templates, said, weight, drawn)
        updates, moments = optimizer.update(jax.grad(loss)(tokens), moments, tokens)
        tokens = optax.apply_updates(tokens, updates)
        return (tokens, decay * mean + (1 - decay) * tokens, moments), None

    first = (start, start, optimizer.init(start))
    return jax.lax.scan(step, first, jnp.arange(1, steps + 1))[0][1]


def step_loss(method, tokens, features, templates, said: Phrases | None, phrase_weight, key):
    """The loss of one step: a random template for each picture and, if there are any, a random one of its phrases."""
    first, second = jax.random.split(key)
    texts = jnp.asarray(templates)[jax.random.randint(first, (len(tokens),), 0, len(templates))]
    prompts = method.read(method.phrase(texts), tokens[:, None])
    value = losses.cosine(prompts, features)
    if said is None:
        return value
    rows = jax.random.randint(second, (len(tokens),), 0, said.counts)
    take = lambda ids: jnp.take_along_axis(ids, rows[:, None, None], axis=1)[:, 0]
    starry = method.read(method.phrase(take(said.starry)), tokens[:, None])
    apart = losses.cosine(starry, method.clip.text(take(said.plain)))
    return (value + phrase_weight * apart) / (1 + phrase_weight)
