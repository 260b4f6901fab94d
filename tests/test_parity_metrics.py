"""Metrics against other people's programs: trec_eval (through ir_measures) and ECCV Caption's for COCO."""

import numpy as np
import pytest
from reference import library
from test_metrics import made, random_case

from cir_jax.evaluation import metrics

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

# ours -> trec_eval's
TREC = {
    "recall@1": "Success@1",
    "recall@3": "Success@3",
    "trec_recall@1": "R@1",
    "trec_recall@3": "R@3",
    "trec_recall@9": "R@9",
    "mrr": "RR",
    "mrr@2": "RR@2",
    "ndcg@3": "nDCG@3",
    "ndcg@9": "nDCG@9",
    "map@9": "AP@9",
}


@pytest.mark.parametrize("seed", range(10))
def test_each_query_has_the_values_of_trec_eval(seed):
    ir = library("ir_measures")
    rows, case = random_case(seed)
    case = made(case.positives, 9)  # trec_eval knows no references
    judged = [
        ir.Qrel(str(query), str(row), int(grade))
        for query, right in enumerate(case.positives)
        for row, grade in right.items()
    ]
    run = [
        ir.ScoredDoc(str(query), str(row), -float(place))
        for query, found in enumerate(rows)
        for place, row in enumerate(found)
    ]
    names = {str(ir.parse_measure(theirs)): ours for ours, theirs in TREC.items()}
    found = metrics.per_query(rows, case, tuple(TREC))
    seen = 0
    for each in ir.iter_calc([ir.parse_measure(name) for name in TREC.values()], judged, run):
        ours = names[str(each.measure)]
        assert found[ours][int(each.query_id)] == pytest.approx(each.value, abs=1e-6), ours
        seen += 1
    assert seen == len(TREC) * len(rows)


def test_coco_recalls_in_both_directions_are_those_of_eccv_caption():
    """Random vectors for the 5,000 test pictures and their 25,010 captions, which know each other a little."""
    theirs = library("eccv_caption").Metrics()
    random = np.random.default_rng(0)
    asked = {"i2t": theirs.coco_gts["i2t"], "t2i": theirs.coco_gts["t2i"]}
    ids = {way: np.array([int(each) for each in found]) for way, found in asked.items()}
    place = {way: {each: row for row, each in enumerate(ids[way])} for way in ids}
    pictures = random.standard_normal((len(ids["i2t"]), 16)).astype(np.float32)
    own = [place["i2t"][int(asked["t2i"][each][0])] for each in asked["t2i"]]
    captions = pictures[own] + 0.7 * random.standard_normal((len(own), 16)).astype(np.float32)
    vectors, lists, found = {"i2t": pictures, "t2i": captions}, {}, {}
    for way, other in (("i2t", "t2i"), ("t2i", "i2t")):
        scores = vectors[way] @ vectors[other].T
        rows = np.argsort(-scores, axis=1, kind="stable")[:, :10]
        lists[way] = dict(zip(ids[way].tolist(), ids[other][rows].tolist(), strict=True))
        right = [
            {place[other][int(each)]: 1.0 for each in asked[way][query]} for query in asked[way]
        ]
        case = made(right, len(ids[other]))
        found[way] = metrics.evaluate(rows, case, ("recall@1", "recall@5", "recall@10"))
    expected = theirs.compute_all_metrics(
        lists["i2t"],
        lists["t2i"],
        target_metrics=("coco_5k_recalls",),
        Ks=(1, 5, 10),
        verbose=False,
    )
    for k in (1, 5, 10):
        for way in found:
            assert found[way][f"recall@{k}"] == pytest.approx(expected[f"coco_5k_r{k}"][way])
            assert 0.02 < found[way][f"recall@{k}"] < 0.98
