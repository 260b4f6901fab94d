"""Training losses. Written as if there were one device: under `jax.jit` on a mesh the batch is global."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cir_jax import large_batches


def contrastive(
    queries: jax.Array,
    items: jax.Array,
    scale: jax.Array,
    groups: jax.Array | None = None,
    *,
    one_way: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Symmetric softmax loss over a batch of matching unit vectors (InfoNCE; Radford et al. 2021).

    In a ring (`cir_jax.large_batches`) no device ever holds the scores of all rows with all rows.

    Args:
      queries: `[B, D]` unit vectors.
      items: `[B, D]` unit vectors; row i belongs to query i.
      scale: the inverse temperature, a scalar.
      groups: `[B]` integers; rows of one group are right answers for each other, so that two drawings of one thing
        in a batch are not pushed apart. None: every row is its own group.
      one_way: only the direction from queries to items.

    Returns:
      The mean of both directions, and the share of queries whose best item is a right one (`accuracy`).
    """
    if large_batches.rings():
        forward, metrics = _met(_SOFTMAX, queries, items, groups, scale)
        if one_way:
            return forward, metrics
        return (forward + _met(_SOFTMAX, items, queries, groups, scale)[0]) / 2, metrics
    logits = scale * jnp.einsum("qd,id->qi", queries, items)
    forward, metrics = listwise(logits, groups)
    return (forward if one_way else (forward + listwise(logits.T, groups)[0]) / 2), metrics


def sigmoid(
    queries: jax.Array,
    items: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    groups: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Every pair of the batch on its own: does it match (Zhai et al. 2023, arXiv 2303.15343, "SigLIP").

    Arguments and the metric as of `contrastive`; `bias` is added to all logits. The sum over pairs is divided by the rows.
    """
    return _met(_SIGMOID, queries, items, groups, scale, bias)


class _Memory(NamedTuple):
    """What a loss of queries remembers of the items that they meet part by part.

    Attributes:
      start: the numbers of a query before.
      meet: `(numbers, products, right, *shared) -> numbers`, arrays `[Q]`, from inner products `[Q, I]` and which are right.
      loss: of a query, from its numbers after all.
    """

    start: tuple[float, ...]
    meet: Callable
    loss: Callable


def _met(memory: _Memory, queries, items, groups, *shared):
    """The loss of queries that meet all items, and the accuracy."""
    rows = len(queries)
    groups = jnp.arange(rows) if groups is None else groups
    zeros = jnp.zeros(rows, queries.dtype)
    best = (zeros - jnp.inf, jnp.full(rows, rows), jnp.zeros(rows, bool))  # score, row, is right

    def visit(state, own, others, first, *shared):
        queries, groups, items, theirs = *own, *others
        products = jnp.einsum("qd,id->qi", queries, items)
        right = groups[:, None] == theirs[None, :]
        found = _best(state[0], jax.lax.stop_gradient(products), right, first)
        return found, memory.meet(state[1], products, right, *shared)

    state = (best, tuple(zeros + x for x in memory.start))
    best, state = large_batches.meet_all(visit, state, (queries, groups), (items, groups), *shared)
    return memory.loss(*state).mean(), {"accuracy": best[2].mean()}


def _best(state, scores, right, first):
    """The best item so far (its score, row, and whether it is a right one); of equal ones that of the lower row."""
    score, row, hit = state
    here = scores.argmax(axis=1)
    take = lambda table: jnp.take_along_axis(table, here[:, None], axis=1)[:, 0]
    new, number = take(scores), first + here
    better = (new > score) | ((new == score) & (number < row))
    choose = lambda x, y: jnp.where(better, x, y)
    return choose(new, score), choose(number, row), choose(take(right), hit)


def _softmax(state, products, right, scale):
    """Running largest logit, sum of exponentials relative to it, sum of right logits, and their number."""
    largest, total, wanted, count = state
    logits = scale * products
    new = jnp.maximum(largest, jax.lax.stop_gradient(logits.max(axis=1)))
    total = total * jnp.exp(largest - new) + jnp.exp(logits - new[:, None]).sum(axis=1)
    return new, total, wanted + (logits * right).sum(axis=1), count + right.sum(axis=1)


def _sigmoid(state, products, right, scale, bias):
    """Running sum over pairs."""
    logits = scale * products + bias
    return (state[0] - jax.nn.log_sigmoid(jnp.where(right, logits, -logits)).sum(axis=1),)


_SOFTMAX = _Memory(
    (-1e30, 0.0, 0.0, 0.0),
    _softmax,
    lambda largest, total, wanted, count: largest + jnp.log(total) - wanted / count,
)
_SIGMOID = _Memory((0.0,), _sigmoid, lambda total: total)


def listwise(
    scores: jax.Array, groups: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Softmax loss of each query over the items of the batch, in this one direction.

    Args:
      scores: `[B, B]`; item i belongs to query i.
      groups: as in `contrastive`.

    Returns:
      The mean cross-entropy, and the share of queries whose best item is a right one (`accuracy`).
    """
    groups = jnp.arange(len(scores)) if groups is None else groups
    right = groups[:, None] == groups[None, :]
    target = right / right.sum(axis=1, keepdims=True)
    accuracy = jnp.take_along_axis(right, scores.argmax(axis=1)[:, None], axis=1).mean()
    return -(target * jax.nn.log_softmax(scores)).sum(axis=1).mean(), {"accuracy": accuracy}


def paired_hinge(
    queries: jax.Array,
    items: jax.Array,
    mask: jax.Array,
    margin: float,
    *,
    groups: jax.Array | None = None,
    parts: int = 1,
    summed: bool = False,
) -> jax.Array:
    """Hinge loss in which every query meets one wrong item (Tan & Bansal 2020, "Vokenization").

    The batch is cut into halves: row i of one and row i of the other are each other's only wrong answer.

    Args:
      queries: `[B, L, D]` unit vectors, several for each query: those of its tokens, or one.
      items: `[B, D]` unit vectors; row i belongs to query i.
      mask: `[B, L]`, True where there is a token.
      margin: by which the right item is to be nearer than the wrong one.
      groups: as in `contrastive`; a row is not pushed away from one of its own group.
      parts: cut the batch into as many equal parts first, each with halves of its own, and take their mean: what
        as many processes do, each with its own rows.
      summed: sum the tokens of a part instead of taking their mean.

    Raises:
      ValueError: a batch that does not divide into two halves of each part.
    """
    rows = len(items)
    if rows % (2 * parts):
        raise ValueError(
            f"a batch of {rows} rows does not divide into {parts} parts of two halves; "
            f"use a multiple of {2 * parts}"
        )
    halves = lambda x: x.reshape(parts, rows // parts, *x.shape[1:])
    partner = lambda x: jnp.roll(halves(x), rows // parts // 2, axis=1).reshape(x.shape)
    right = jnp.einsum("bld,bd->bl", queries, items)
    wrong = jnp.einsum("bld,bd->bl", queries, partner(items))
    counted = mask if groups is None else mask & (groups != partner(groups))[:, None]
    hinges = jnp.where(counted, jax.nn.relu(margin - right + wrong), 0)
    totals, counts = (halves(x).sum(axis=(1, 2)) for x in (hinges, counted))
    return (totals if summed else totals / jnp.maximum(counts, 1)).mean()


def batch_hinge(
    queries: jax.Array,
    items: jax.Array,
    mask: jax.Array,
    margin: float,
    groups: jax.Array | None = None,
) -> jax.Array:
    """Hinge loss in which every token meets all wrong items of the batch, and every item all wrong texts.

    A token of a wrong text is compared with the token at its place in the right one, if there is one. Arguments as of
    `paired_hinge`; the sum is divided by tokens times rows.
    """
    # original: airsplay/vokenization has it as `batchwise_hinge_rank_loss`, broken by one axis too many and unused
    wrong = wrong_rows(len(items), groups)[:, None] & mask[:, :, None]  # [B, L, B]
    scores = jnp.einsum("bld,id->bli", queries, items)
    right = jnp.einsum("bld,bd->bl", queries, items)
    by_item = jax.nn.relu(margin - right[:, :, None] + scores)
    by_text = jax.nn.relu(margin - right.T[None] + scores)
    total = jnp.where(wrong, by_item, 0) + jnp.where(wrong & mask.T[None], by_text, 0)
    return total.sum() / (jnp.maximum(mask.sum(), 1) * len(items))


def token_accuracy(
    queries: jax.Array, items: jax.Array, mask: jax.Array, groups: jax.Array | None = None
) -> jax.Array:
    """The share of tokens whose best item of the batch is a right one; arguments as of `paired_hinge`."""
    best = jnp.einsum("bld,id->bli", queries, items).argmax(axis=2)
    wrong = jnp.take_along_axis(wrong_rows(len(items), groups), best, axis=1)
    return (mask & ~wrong).sum() / jnp.maximum(mask.sum(), 1)


def wrong_rows(rows: int, groups: jax.Array | None) -> jax.Array:
    """`[B, B]`, True where item i is a wrong answer for query q."""
    groups = jnp.arange(rows) if groups is None else groups
    return groups[:, None] != groups[None, :]


def nt_xent(first: jax.Array, second: jax.Array, temperature: float) -> jax.Array:
    """SimCLR's loss (Chen et al. 2020) over matching unit vectors `[B, D]` of two kinds.

    Each of the 2 B rows looks for its partner among all others, those of its own kind included.
    """
    rows = jnp.concatenate([first, second])
    count = len(rows)
    scores = jnp.einsum("id,jd->ij", rows, rows) / temperature
    scores = jnp.where(jnp.eye(count, dtype=bool), jnp.finfo(scores.dtype).min, scores)
    partner = jnp.roll(jnp.arange(count), count // 2)[:, None]
    return -jnp.take_along_axis(jax.nn.log_softmax(scores), partner, axis=1).mean()


def cosine(first: jax.Array, second: jax.Array) -> jax.Array:
    """The mean of 1 - cosine over rows `[B, D]`; a zero row has cosine 0, as in PyTorch's CosineEmbeddingLoss."""
    squares = lambda x: jnp.sum(x * x, axis=-1) + 1e-12
    inner = jnp.einsum("bd,bd->b", first, second)
    return jnp.mean(1 - inner * jax.lax.rsqrt(squares(first) * squares(second)))
