"""A top-k file as PyTorch itself writes it, in the size of the published one of CIRR."""

import numpy as np
import pytest

from cir_jax.evaluation.candidates import read_candidates

try:
    import torch
except ImportError:  # the test is not selected then
    torch = None

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]


def test_a_file_of_the_published_size(tmp_path):
    """Candidate-Reranking saves a slice of the label matrix, and with it the whole matrix: 59.95 MB."""
    random = np.random.default_rng(0)
    gallery = np.array([f"dev-{n}-{n % 4}-img{n % 2}".ljust(15, "0") for n in range(2297)])
    rows = random.permuted(np.tile(np.arange(2297), (4181, 1)), axis=1)[:, :200]
    targets = gallery[random.integers(2297, size=4181)]
    whole = torch.zeros((4181, 2296), dtype=torch.bool)
    whole[:, :200] = torch.from_numpy(gallery[rows] == targets[:, None])
    saved = {
        "sorted_index_names": gallery[rows],
        "target_names": targets.tolist(),
        "index_names": gallery.tolist(),
        "labels": whole[:, :200],
        "group_labels": torch.zeros((4181, 5), dtype=torch.bool),
        "split": "val",
    }
    torch.save(saved, tmp_path / "cirr_top_200_val.pt")
    assert (tmp_path / "cirr_top_200_val.pt").stat().st_size == pytest.approx(59.95e6, rel=0.01)
    found = read_candidates(tmp_path / "cirr_top_200_val.pt")
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_array_equal(found.targets, targets)
    expected = (gallery[rows] == targets[:, None])[:, :50].any(axis=1).mean()
    assert found.scored()["recall@50"].mean() == expected
