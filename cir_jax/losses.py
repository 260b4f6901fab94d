"""Training losses. Written as if there were one device: under `jax.jit` on a mesh the batch is global."""

import jax
import jax.numpy as jnp


def contrastive(
    queries: jax.Array, items: jax.Array, scale: jax.Array, groups: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Symmetric softmax loss over a batch of matching unit vectors (InfoNCE; Radford et al. 2021).

    Args:
      queries: `[B, D]` unit vectors.
      items: `[B, D]` unit vectors; row i belongs to query i.
      scale: the inverse temperature, a scalar.
      groups: `[B]` integers; rows of one group are right answers for each other, so that two drawings of one thing
        in a batch are not pushed apart. None: every row is its own group.

    Returns:
      The mean of both directions, and the share of queries whose best item is a right one (`accuracy`).
    """
    logits = scale * jnp.einsum("qd,id->qi", queries, items)
    forward, metrics = listwise(logits, groups)
    backward, _ = listwise(logits.T, groups)
    return (forward + backward) / 2, metrics


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
