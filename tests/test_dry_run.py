"""The dry run: what it counts, what it assumes of data that is not here, and that every config passes through it."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from test_configs import EXPERIMENTS
from test_methods import INPUTS

from cir_jax import sharding
from cir_jax.checkpoint import abstract_params
from cir_jax.config import Data, Experiment, Mesh, Optim, Train
from cir_jax.data import PARTS, PUBLISHED
from cir_jax.methods import METHODS
from cir_jax.methods.clip import ClipConfig
from cir_jax.train import Options
from cir_jax.training import dry_run
from cir_jax.training.step import program

PROGRAM = """
HloModule jit_step, entry_computation_layout={(f32[8,4]{1,0})->f32[8,4]{1,0}}

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%inner (arg: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %sent = (f32[8,4]{1,0}, bf16[16]{0}) all-reduce(%a, %b), replica_groups=[1,4]<=[4], to_apply=%add
}

%outer (arg: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %loop = (s32[], f32[8,4]{1,0}) while(%tuple), condition=%less, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  %whole = f32[32,4]{1,0} all-gather(%part), dimensions={0}
}

ENTRY %main (arg: f32[8,4]) -> f32[8,4] {
  %loop.1 = (s32[], f32[8,4]{1,0}) while(%tuple), condition=%less, body=%outer, backend_config={"known_trip_count":{"n":"5"}}
  %loss = f32[] all-reduce(%value), to_apply=%add
  %same = f32[8,4]{1,0} get-tuple-element(%all-gather), index=1
}
"""


def test_what_a_loop_sends_counts_in_every_turn():
    assert dry_run.collectives(PROGRAM) == {
        "all-gather": {"count": 5, "bytes": 5 * 32 * 4 * 4},
        "all-reduce": {"count": 16, "bytes": 15 * (8 * 4 * 4 + 16 * 2) + 4},
    }


@pytest.mark.slow
def test_numbers_of_a_step(tiny_experiment):
    """On four devices: what the run would really hold, and no more than it holds without its data."""
    config = dataclasses.replace(
        tiny_experiment, data=tiny_experiment.data[:1], mesh=Mesh(fsdp=2, tensor=2)
    )
    needs = dry_run.needed(config)
    zeros = lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding)
    state = jax.tree.map(zeros, program(config, sharding.make_mesh(2, 2)).state)
    held = {
        part: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
        for part, tree in state.items()
    }
    assert needs["state_bytes_per_device"] == held
    total = sum(x.size for x in jax.tree.leaves(state["params"]))
    assert needs["parameters"] == {"trained": total, "frozen": 0}
    [step] = needs["steps"]
    assert (step["query"], step["item"], step["assumed"]) == (["text"], ["image"], False)
    assert step["batch_bytes_per_device"] == 8 // 2 * (24 * 5 + 64 * 64 * 3 * 4 + 4)
    assert step["flops"] > 8 * total
    assert step["temporary_bytes_per_device"] > 0
    assert step["collectives"]["all-gather"]["count"] > 0
    text = "\n".join(dry_run.told(needs))
    assert "4 devices (data 1 x fsdp 2 x tensor 2), batch of 8 rows" in text
    assert "an estimate" in text


def command(*options):
    line = [sys.executable, "-m", "cir_jax.train", "emoji_rerank", "--dry-run", *options]
    return subprocess.run(line, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"devices": 64, "shape": "8,8"}, "expected three numbers data,fsdp,tensor, as 8,8,1"),
        ({"devices": 64, "shape": "8,4,1"}, "is a mesh of 32 devices, --devices is 64"),
        ({"devices": 64, "shape": "8,-8,-1"}, "expected three numbers"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(options, words, tmp_path):
    config = only(Data("emoji-text"))
    path = tmp_path / "none.json"
    with pytest.raises(ValueError, match=words):
        dry_run.dry_run(config, dry_run.DryRun(dry_run=True, json=path, **options))
    assert not path.exists()


def test_options_of_a_dry_run_are_refused_without_it():
    with pytest.raises(ValueError, match="belong to --dry-run"):
        dry_run.DryRun(devices=8)
    with pytest.raises(ValueError, match="--workdir is missing"):
        Options(workdir=None)


@pytest.mark.slow
def test_the_command_tells_of_sixty_four_devices(tmp_path):
    path = tmp_path / "needs.json"
    options = ["--devices", "64", "--mesh", "8,8,1", "--train.batch-size", "64"]
    done = command(*options, "--json", str(path))
    assert done.returncode == 0, done.stderr
    needs = json.loads(path.read_text())
    assert needs["mesh"] == {"data": 8, "fsdp": 8, "tensor": 1}
    assert "64 devices (data 8 x fsdp 8 x tensor 1), batch of 64 rows" in done.stdout
    parts = needs["state_bytes_per_device"]
    whole = 4 * sum(needs["parameters"].values()) + 8 * needs["parameters"]["trained"]
    assert whole / 8 < sum(parts.values()) < whole / 4


SMALL = [name for name in EXPERIMENTS if name.startswith("emoji")]


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_config_has_a_step(name):
    """Compiled where it is small; what is large is lowered, which is what can fail."""
    config = dataclasses.replace(EXPERIMENTS[name], mesh=Mesh(fsdp=4))
    needs = dry_run.needed(config, compiled=name in SMALL)
    assert all(step["flops"] > 0 for step in needs["steps"])
    assert len(needs["steps"]) >= 1


def test_what_is_assumed_of_published_sets_is_so(at_home):
    for name, published in PUBLISHED.items():
        for part in PARTS[name][0] if published.pairs else ():
            variant, split = part.split("/")
            there = Data(name, variant=variant, split=split)
            found = dry_run.kinds_of_batches(only(there))
            assumed = dry_run.kinds_of_batches(only(dataclasses.replace(there, root="absent")))
            assert not found[0].assumed and assumed[0].assumed
            assert found[0][:2] == assumed[0][:2], name


def only(data):
    return Experiment(ClipConfig.tiny(INPUTS), (data,), Train(1, 8))


# ---- what the compiled step does with parameters ----


FULL = {name: config() for name, (config, _) in METHODS.items()}
FULL |= {name: experiment.method for name, experiment in EXPERIMENTS.items()}


@pytest.mark.parametrize("name", FULL)
def test_under_fsdp_nothing_large_stays_whole(name):
    """Full size, eight devices: no parameter of more than 4 MB is the same on all of them."""
    mesh = AbstractMesh((1, 8, 1), sharding.AXES)
    _, shapes = abstract_params(FULL[name])
    whole = []
    for path, x in jax.tree_util.tree_leaves_with_path(shapes):
        spec = sharding.spec(sharding.path_name(path), x.shape, mesh)
        if x.size * 4 > 4e6 and "fsdp" not in spec:
            whole.append((sharding.path_name(path), x.shape))
    assert not whole


def narrow(name, **options):
    """A method's tiny size in bfloat16, as an experiment."""
    method = dataclasses.replace(METHODS[name][0].tiny(INPUTS), dtype="bfloat16")
    return Experiment(method, (Data("emoji-text"),), Train(2, 8, **options), Optim())


FAST = ("clip",)
ALL = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in METHODS]


@pytest.mark.parametrize("name", ALL)
def test_in_bfloat16_only_the_operands_of_products_are_narrow(name):
    from test_methods import training_batch

    config = narrow(name)
    made = program(config, sharding.make_mesh(devices=jax.devices()[:1]))
    traced = made.step.trace(made.state, training_batch(name), np.int32(0))
    state, metrics = traced.out_info
    for x in jax.tree.leaves((state["params"], metrics)):
        assert x.dtype == np.float32
    text = str(traced.jaxpr)
    products = [line for line in text.splitlines() if " = dot_general[" in line]
    assert any(":f32[" in line for line in products)
    assert not [line for line in products if ":bf16[" in line]
    assert "bf16[" in text
