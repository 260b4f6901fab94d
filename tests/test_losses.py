"""Losses against plain numpy."""

import numpy as np
import pytest

from cir_jax.losses import contrastive


def rows(seed, n=6, d=4):
    x = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def by_hand(queries, items, scale, groups):
    logits = scale * queries @ items.T
    total = 0.0
    for table in (logits, logits.T):
        for i, row in enumerate(table):
            shares = np.exp(row) / np.exp(row).sum()
            right = [j for j in range(len(row)) if groups[j] == groups[i]]
            total -= np.mean([np.log(shares[j]) for j in right])
    return total / (2 * len(queries))


@pytest.mark.parametrize(
    "groups", [[0, 1, 2, 3, 4, 5], [0, 1, 0, 2, 2, 2]], ids=["alone", "shared"]
)
def test_contrastive_equals_its_definition(groups):
    value, _ = contrastive(rows(0), rows(1), 5.0, np.array(groups))
    np.testing.assert_allclose(value, by_hand(rows(0), rows(1), 5.0, groups), rtol=1e-6)


def test_without_groups_every_row_is_alone():
    alone, _ = contrastive(rows(0), rows(1), 5.0)
    numbered, _ = contrastive(rows(0), rows(1), 5.0, np.arange(6))
    np.testing.assert_array_equal(alone, numbered)


def test_accuracy_counts_group_members_as_right():
    queries = np.eye(3, dtype=np.float32)
    items = np.roll(queries, 1, axis=0)
    _, wrong = contrastive(queries, items, 5.0)
    _, right = contrastive(queries, items, 5.0, np.zeros(3, int))
    assert wrong["accuracy"] == 0
    assert right["accuracy"] == 1
