"""The benchmark of encoders, without PyTorch; beside it in test_parity_bench.py."""

import dataclasses
import functools
import json
import re
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from cir_jax import checkpoint
from cir_jax.bench import __main__ as bench
from cir_jax.bench import encode, peers, shares, train
from cir_jax.bench.step import milliseconds
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


def task(method, **options):
    """What `bench train` asks of a side, in a size for tests."""
    given = {"side": "cir_jax", "device": "cpu", "dtype": "float32", "rows": 4, "repeats": 1}
    return train.Task(SMALL[method], **{**given, "remat": False, **options})


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


@pytest.mark.slow
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


@pytest.mark.parametrize("command", [bench.Encode, bench.Train])
def test_counts_begin_at_one(command):
    with pytest.raises(ValueError, match="--batch is 0; it must be at least 1"):
        command(batch=0)


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
        (["train"], "pip install 'cir_jax[bench]' torch==2.13.0"),
        (["train", "--output", "{folder}/none/x.json"], "none"),
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


# ---- training steps ----


def test_every_method_is_measured_in_its_published_size():
    assert set(bench.METHODS) == set(train.FAMILIES)
    # react.md 4.5; candidate_reranking.md 13; BEiT-3's experts twice, with words, positions and both projections.
    expert = 24 * (4 * 1024 * 1025 + 2 * 4096 * 1024 + 4096 + 1024 + 2 * (3 * 1024 + 4096))
    beit3 = 2 * (expert + 2 * 1024) + 1024 * (64010 + 1024 + 199 + 768 + 2) + 2 * 1024**2 + 1
    sizes = {"clip": 427_616_513, "blip_cir": 223_742_721, "cfir": beit3}
    found = {}
    for name in sizes:
        _, shapes = checkpoint.abstract_params(train.FAMILIES[name].config)
        found[name] = sum(x.size for x in jax.tree.leaves(shapes))
    assert found == sizes


@pytest.fixture(scope="module")
def step():
    config, batch = task("clip").experiment, train.batch(SMALL["clip"], 4)
    assert (batch["query"]["text"].argmax(axis=1) == 7).all()
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=1e-2))
    return train.Ours(config, batch)


@pytest.mark.slow
def test_a_measured_step_learns(step):
    losses = []
    for _ in range(3):
        step.step()
        losses.append(step.value)
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.slow
def test_the_time_of_a_step_is_shared_among_products_attention_optimizer_and_rest(step):
    program = step._step.as_text()
    known, loops = shares.kinds(program), re.findall(r"%?([\w.]+) = .* while\(", program)
    assert set(known.values()) == set(shares.KINDS)
    assert loops and not known.keys() & set(loops)
    found = step.shares()
    assert sum(found.values()) == pytest.approx(1) and min(found.values()) > 0


PROGRAM = """
%inner (a: f32[2,3], b: f32[3,2]) -> f32[2,2] {
  %a = f32[2,3]{1,0} parameter(0)
  ROOT %dot.1 = f32[2,2]{1,0} dot(%a, %b), metadata={op_name="jit(step)/jvp()/...i,io->...o/dot_general"}
}
ENTRY %main (x: f32[2,3]) -> f32[2,2] {
  %fusion.1 = f32[2,2]{1,0} fusion(%x, %y), kind=kCustom, calls=%inner, metadata={op_name="jit(step)/jvp()/add"}
  %dot.2 = f32[2,2]{1,0} dot(%x, %y), metadata={op_name="jit(step)/jvp()/while/body/bnhd,bmhd->bhnm/transpose"}
  %custom.3 = (f32[2,2]{1,0}, s8[4]{0}) custom-call(%x), custom_call_target="__cublas$gemm", metadata={op_name="x"}
  %fusion.4 = f32[2,2]{1,0} fusion(%x), kind=kLoop, calls=%other, metadata={op_name="jit(step)/jit(_where)/select_n"}
  %copy.5 = f32[2,2]{0,1} copy(%x)
  %exp.6 = f32[2,2]{1,0} exponential(%x), metadata={op_name="jit(step)/transpose(jvp())/exp"}
  %while.7 = (s32[], f32[2,2]{1,0}) while(%x), condition=%c, body=%b, metadata={op_name="jit(step)/jvp()/while"}
}
"""


def test_instructions_are_of_the_kind_that_they_compute():
    found = shares.kinds(PROGRAM)
    assert found["fusion.1"] == found["custom.3"] == "products"
    assert found["dot.2"] == "attention" and found["fusion.4"] == "optimizer"
    assert found["copy.5"] == found["exp.6"] == "rest" and "while.7" not in found


def test_what_is_computed_again_is_no_work_of_the_model():
    batch, again = train.batch(SMALL["cfir"], 4), task("cfir", remat=True).experiment
    work = train.operations(task("cfir").experiment, batch)
    assert train.operations(again, batch) == work
    tokens, width, hidden = 4 * 5, 32, 64
    forward = 2 * tokens * (4 * width**2 + 2 * width * hidden)  # a layer of the picture expert
    assert 3 * 2 * forward < work < 3 * 2 * 2 * (forward + 4 * 8 * forward / tokens)


def test_ratios_are_rates_by_rates_and_sides_of_other_sizes_are_refused(monkeypatch):
    side = train.Measured("cir_jax", 7, 2.0, 2**20, {}, best=1e9, operations=10**9)
    sides = {
        "cir_jax": side,
        "eager": dataclasses.replace(side, side="PyTorch", seconds=3.0, best=2e9, operations=None),
    }
    monkeypatch.setattr(train, "in_new_process", lambda what, measure, task: sides[task.side])
    lines = lambda: list(
        train.measured(["clip"], ["eager"], "float32", "cpu", None, 1, False, None)
    )
    ours, theirs = lines()
    assert (ours.ratio, theirs.ratio) == (None, 1.5) and ours.batch == 2
    assert (ours.utilization, theirs.utilization) == (0.25, pytest.approx(1 / 6))
    sides["eager"] = dataclasses.replace(sides["eager"], parameters=8)
    with pytest.raises(RuntimeError, match="clip has 7 parameters here, 8 in PyTorch"):
        lines()


def test_a_line_for_each_side(capsys):
    shown = {"products": 0.6, "attention": 0.1, "optimizer": 0.1, "rest": 0.2}
    ours = train.Result("clip", "CLIP", "cir_jax", "float32", 2, 0.1234, None, 0.5, 1e4, shown)
    bench.print_training([ours, dataclasses.replace(ours, side="PyTorch", ratio=1.5, shares={})])
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.split() == [
        "CLIP",
        "cir_jax",
        "float32",
        "2",
        "0.123",
        "50%",
        "10,000",
        "60%",
        "10%",
        "10%",
        "20%",
    ]
    assert second.split() == ["CLIP", "PyTorch", "float32", "2", "0.123", "1.50", "50%", "10,000"]


@pytest.mark.slow
def test_what_the_loop_costs_is_measured():
    """On the real loop, whose every step is seen."""
    assert all(0 < each < 1000 for each in milliseconds(100, 4))
