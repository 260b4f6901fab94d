"""The training loop through its command: what it writes, and that an interruption changes nothing."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import cir_jax
from cir_jax import optim
from cir_jax.config import Data, Optim, Train
from cir_jax.data import training_set
from cir_jax.data.pipeline import train_batches, turns
from cir_jax.train import check_experiment

CONFIG = """
from cir_jax.config import Data, Experiment, Optim, Train
from cir_jax.data.emoji import VOCABULARY
from cir_jax.data.images import ImageSpec
from cir_jax.data.inputs import Inputs
from cir_jax.data.text import TextSpec
from cir_jax.methods.clip import ClipConfig

config = Experiment(
    method=ClipConfig.tiny(
        Inputs(image=ImageSpec(size=64), text=TextSpec(vocab=str(VOCABULARY), length=24))
    ),
    data=(Data("emoji-text"), Data("emoji-composed", variant="noto-strict")),
    train=Train(steps=30, batch_size=8, log_every=1, save_every=5, eval_every=15),
    optim=Optim(lr=1e-3, warmup=2),
    evals=("emoji-text/noto/val",),
)
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("configs") / "tiny.py"
    path.write_text(CONFIG)
    return path


def start(config, workdir, *options) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "cir_jax.train",
        str(config),
        "--workdir",
        str(workdir),
        *options,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(config, workdir, *options) -> str:
    process = start(config, workdir, *options)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def losses(workdir) -> dict[int, float]:
    """The last logged loss of each step."""
    records = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss"] for r in records if "loss" in r}


def parameters(workdir):
    return jax.tree.leaves(cir_jax.load(workdir / "model").params)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    run(config, workdir)
    return workdir


def test_a_run_leaves_log_config_checkpoints_and_model(finished):
    assert sorted(losses(finished)) == list(range(1, 31))
    assert (finished / "config.json").is_file()
    assert {p.name for p in (finished / "checkpoints").iterdir()} == {"25", "30"}
    about = json.loads((finished / "model" / "manifest.json").read_text())["about"]
    assert about["step"] in (15, 30)
    assert about["metrics"]["emoji-text/noto/val/recall@10"] == about["score"]


def test_a_killed_run_resumes_to_the_same_bits(config, finished, tmp_path):
    workdir = tmp_path / "killed"
    process = start(config, workdir)
    for line in process.stdout:
        if line.startswith("step 12 "):
            break
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (workdir / "model").exists()
    output = run(config, workdir)
    assert "continuing from step" in output
    assert losses(workdir) == losses(finished)
    for ours, theirs in zip(parameters(workdir), parameters(finished)):
        np.testing.assert_array_equal(ours, theirs)


def test_a_finished_run_is_not_run_again(config, finished):
    before = (finished / "log.jsonl").read_text()
    assert "is finished" in run(config, finished)
    assert (finished / "log.jsonl").read_text() == before


def test_another_experiment_in_the_same_workdir_is_refused(config, finished):
    process = start(config, finished, "--optim.lr", "0.5")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "another experiment (different: optim.lr)" in output
    assert "Traceback" not in output


def test_best_model_is_kept_not_the_last(finished):
    records = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    name = "emoji-text/noto/val/recall@10"
    scores = {r["step"]: r[name] for r in records if name in r}
    about = json.loads((finished / "model" / "manifest.json").read_text())["about"]
    assert sorted(scores) == [15, 30]
    assert scores[about["step"]] == pytest.approx(max(scores.values()), rel=1e-5)


def test_the_best_of_many_evaluations_is_kept(tiny_experiment, tmp_path, monkeypatch):
    from cir_jax import checkpoint
    from cir_jax import eval as evaluation
    from cir_jax.train import Best, make_init

    scores = iter([0.3, 0.2, 0.4, 0.1])
    monkeypatch.setattr(evaluation, "measure", lambda model, name: {"recall@10": next(scores)})
    graph, _ = checkpoint.abstract_params(tiny_experiment.method)
    init = make_init(tiny_experiment, optim.optimizer(tiny_experiment.optim, 8))
    state = jax.jit(init)(jax.random.key(0))
    kept = []
    best = Best(tiny_experiment, graph, tmp_path)
    for step in (2, 4, 6, 8):
        best.consider(state, step)
        kept.append([folder.name for folder in best.kept()])
    assert kept == [["best-0000002"], ["best-0000002"], ["best-0000006"], ["best-0000006"]]
    assert Best(tiny_experiment, graph, tmp_path).score == 0.4
    # A removal that was cut short leaves a folder without a manifest: no model, and no obstacle.
    (tmp_path / "best-0000004" / "params").mkdir(parents=True)
    again = Best(tiny_experiment, graph, tmp_path)
    assert [folder.name for folder in again.kept()] == ["best-0000006"]
    scores = iter([0.5])
    again.consider(state, 6)
    assert again.score == 0.5
    assert again.publish() == tmp_path / "model"
    assert cir_jax.load(tmp_path / "model").config.embed == tiny_experiment.method.embed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"best": "recall@3"}, "best is 'recall@3'.*recall@1, recall@5"),
        ({"evals": ("emoji-txt/noto/val",)}, "did you mean 'emoji-text'"),
        ({"evals": ("emoji-text",)}, "name/variant/split"),
        ({"train": Train(steps=0, batch_size=8)}, "train.steps is 0"),
        ({"train": Train(steps=5, batch_size=8, eval_every=0)}, "train.eval_every is 0"),
    ],
    ids=["metric", "benchmark", "form", "steps", "rhythm"],
)
def test_mistakes_are_found_before_the_first_step(tiny_experiment, changes, message):
    with pytest.raises(ValueError, match=message):
        check_experiment(dataclasses.replace(tiny_experiment, **changes))


def test_batches_do_not_depend_on_the_number_of_processes(tiny_experiment):
    def global_batches(processes):
        sets = [training_set(data) for data in tiny_experiment.data]
        streams = [
            train_batches(
                sets,
                [1, 2],
                tiny_experiment.method.inputs,
                batch_size=8,
                seed=3,
                start=2,
                process=p,
                processes=processes,
            )
            for p in range(processes)
        ]
        return [[next(stream) for stream in streams] for _ in range(3)]

    for one, four in zip(global_batches(1), global_batches(4)):
        merged = jax.tree.map(lambda *x: np.concatenate(x), *four)
        jax.tree.map(np.testing.assert_array_equal, one[0], merged)


def test_a_stream_started_later_continues_the_earlier_one(tiny_experiment):
    sets = [training_set(data) for data in tiny_experiment.data]
    begin = lambda start: train_batches(
        sets, [2, 1], tiny_experiment.method.inputs, batch_size=4, seed=0, start=start
    )
    whole, late = begin(0), begin(4)
    skipped = [next(whole) for _ in range(4)]
    for _ in range(3):
        jax.tree.map(np.testing.assert_array_equal, next(whole), next(late))
    assert "image" not in skipped[0]["query"] or "image" not in skipped[1]["query"]


def test_turns_are_spread_evenly():
    assert turns([1]) == [0]
    assert turns([1, 2]) == [1, 0, 1]
    assert sorted(turns([3, 2])) == [0, 0, 0, 1, 1]


def test_frozen_parameters_stay_and_unmatched_patterns_are_refused():
    params = {"image": {"kernel": np.ones((2, 2))}, "text": {"kernel": np.ones((2, 2))}}
    trained, frozen = optim.split_frozen(params, ("text/.*",))
    assert trained == {"image": params["image"]}
    assert optim.join(trained, frozen) == params
    with pytest.raises(ValueError, match=r"'video/\.\*' matches none"):
        optim.split_frozen(params, ("video/.*",))


def test_decay_spares_vectors_also_in_stacked_blocks():
    params = {
        "blocks": {"ln": {"scale": np.ones((3, 4))}, "up": {"kernel": np.ones((3, 4, 4))}},
        "class_token": np.ones(4),
        "embedding": np.ones((5, 4)),
    }
    assert optim.decays(params) == {
        "blocks": {"ln": {"scale": False}, "up": {"kernel": True}},
        "class_token": False,
        "embedding": True,
    }


def test_schedule_warms_up_and_ends_at_zero():
    rate = optim.schedule(Optim(lr=2.0, warmup=10), 100)
    assert [float(rate(s)) for s in (0, 5, 10)] == [0.0, 1.0, 2.0]
    assert float(rate(55)) == pytest.approx(1.0)
    assert float(rate(100)) == pytest.approx(0.0, abs=1e-6)
    assert float(optim.schedule(Optim(lr=2.0, schedule="constant"), 100)(99)) == 2.0


def test_unknown_data_set_is_one_clear_error():
    with pytest.raises(ValueError, match="emoji-text"):
        training_set(Data("emoji-txet"))


@pytest.mark.slow
def test_two_processes_train_like_one(config, finished, tmp_path):
    """The launcher, two processes with four devices each, the same losses and one model."""
    launcher = Path(__file__).resolve().parents[1] / "launch" / "local.sh"
    command = [
        launcher,
        "2",
        sys.executable,
        "-m",
        "cir_jax.train",
        config,
        "--workdir",
        tmp_path / "two",
    ]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = losses(finished), losses(tmp_path / "two")
    assert one.keys() == two.keys()
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-4)
    for ours, theirs in zip(parameters(tmp_path / "two"), parameters(finished)):
        np.testing.assert_allclose(ours, theirs, atol=1e-3)
