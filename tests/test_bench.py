"""The benchmark of encoders, without PyTorch; beside it in test_parity_bench.py."""

import dataclasses
import functools
import json
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from cir_jax.bench import __main__ as bench
from cir_jax.bench import encode, peers, shares, train
from cir_jax.commands import start
from cir_jax.data.images import ImageSpec
from cir_jax.data.inputs import Inputs
from cir_jax.data.text import TextSpec
from cir_jax.encoders import clip
from cir_jax.encoders.beit3 import Beit3Config
from cir_jax.encoders.bert import BertConfig
from cir_jax.encoders.vit import VitConfig
from cir_jax.methods.blip_cir import BlipCirConfig
from cir_jax.methods.blip_rerank import BlipRerankConfig
from cir_jax.methods.cfir import CfirConfig
from cir_jax.methods.clip import ClipConfig

# Of the published models (react.md 4.5, cfir.md 2.2, maria.md): one tower each.
PARAMETERS = {
    "clip-image": 87_849_216,
    "clip-text": 63_428_096,
    "blip-image": 85_798_656,
    "beit3-image": 85_798_656 + 12 * 2 * (768 + 3072) + 2 * 768,
    "bert": 108_891_648,
    "resnext": 86_742_336 + 2 * 101_440,
}

INPUTS = Inputs(ImageSpec(size=32), TextSpec(length=8))
PICTURES = VitConfig(size=32, patch=16, width=32, layers=2, heads=2)
TEXTS = BertConfig(60, 8, 32, 2, 2, 64, types=0, image_width=32, dropout=0.0)
CLIP = (
    clip.VisionConfig(size=32, patch=16, width=32, layers=2, heads=2),
    clip.TextConfig(60, 8, width=32, layers=2, heads=2),
)
MULTIWAY = Beit3Config(32, 16, 60, 8, 32, 2, 2, 64, mask_token=False, initial="scratch")
# The methods that `bench train` measures, in a size for tests and without dropout.
CONFIGS = {
    "clip": ClipConfig(*CLIP, embed=16, inputs=INPUTS),
    "blip_cir": BlipCirConfig(PICTURES, TEXTS, embed=16, inputs=INPUTS),
    "blip_rerank": BlipRerankConfig(PICTURES, TEXTS, merge_from=1, inputs=INPUTS),
    "cfir": CfirConfig(MULTIWAY, inputs=INPUTS),
}
SMALL = {
    name: dataclasses.replace(train.FAMILIES[name], config=config, tokens=8)
    for name, config in CONFIGS.items()
}


def count(family):
    shapes = nnx.eval_shape(
        lambda: encode.FAMILIES[family].build(dtype="float32", remat=False, rngs=nnx.Rngs(0))
    )
    return sum(x.size for x in jax.tree.leaves(nnx.state(shapes)))


def test_every_family_is_measured_in_its_published_size():
    assert set(bench.FAMILIES) == set(encode.FAMILIES)
    assert {family: count(family) for family in bench.FAMILIES} == PARAMETERS


@pytest.fixture
def small(monkeypatch):
    tower = functools.partial(
        clip.ClipText,
        clip.TextConfig(50, 6, width=16, layers=2, heads=2),
        8,
        activation="gelu",
        epsilon=1e-5,
    )
    kind = dataclasses.replace(encode.FAMILIES["clip-text"], build=tower, tokens=6, words=48)
    monkeypatch.setitem(encode.FAMILIES, "clip-text", kind)


def test_a_training_step_moves_every_parameter_down(small):
    batch = encode.examples("clip-text", 4)
    assert (batch["text"].argmax(axis=1) == 5).all() and batch["text"].max() == 49
    ours = encode.Ours("clip-text", batch, "float32", remat=False, rate=0.1)
    before = jax.device_get(ours.params)
    loss = lambda: float((np.asarray(ours._forward(ours.params, ours.batch)) ** 2).mean())
    first = loss()
    ours.forward()
    ours.train()
    assert loss() < first
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max() > 0, before, jax.device_get(ours.params))
    still = [path for path, each in jax.tree_util.tree_leaves_with_path(moved) if not each]
    # The bias of keys shifts all logits of a row alike.
    assert all("key" in jax.tree_util.keystr(path) for path in still)


def test_counts_begin_at_one():
    with pytest.raises(ValueError, match="--batch is 0; it must be at least 1"):
        bench.Encode(batch=0)


def test_sides_take_turns_and_the_first_turn_does_not_count():
    order = []
    seconds = encode._taking_turns([lambda: order.append("a"), lambda: order.append("b")], 3)
    assert "".join(order) == "ab" * 4
    assert [len(each) for each in seconds] == [3, 3] and min(map(min, seconds)) >= 0


def test_the_table_marks_what_misses_its_goal(capsys):
    line = encode.Result("bert", "forward", "float32", 8, 4.0, 5.0, 0.8, 0.85, 900.0, 800.0)
    bench.print_encoders(
        [line, dataclasses.replace(line, ratio=0.9), dataclasses.replace(line, goal=None)]
    )
    _, missed, reached, without = capsys.readouterr().out.splitlines()
    assert "0.80 below" in missed and "BERT base" in missed
    assert "below" not in reached + without
    assert json.loads(json.dumps(line.as_json()))["rows_per_second"] == 4.0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["encode"], "pip install 'cir_jax[bench]' torch==2.13.0"),
        (["encode", "--output", "{folder}/none/x.json"], "none"),
    ],
)
def test_mistakes_end_in_one_clear_line(arguments, expected, monkeypatch, capsys, tmp_path):
    def missing():
        raise ModuleNotFoundError("No module named 'torch'")

    monkeypatch.setattr(peers, "_torchvision", missing)
    filled = [each.format(folder=tmp_path) for each in arguments]
    monkeypatch.setattr(sys, "argv", ["bench", *filled])
    with pytest.raises(SystemExit) as stop:
        start("bench")
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and expected in line
