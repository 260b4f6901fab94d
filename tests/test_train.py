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
from test_eval import edits
from test_methods import INPUTS, drawn

import cir_jax
from cir_jax.checkpoint import save_model
from cir_jax.config import Data, Experiment, Optim, Train
from cir_jax.data import BENCHMARKS, training_set
from cir_jax.data.images import ImageSpec
from cir_jax.data.pipeline import train_batches, turns
from cir_jax.evaluation.runs import measure
from cir_jax.methods.blip_cir import BlipCirConfig
from cir_jax.methods.blip_rerank import BlipRerankConfig
from cir_jax.train import train
from cir_jax.training import optim
from cir_jax.training.checks import check_experiment
from cir_jax.training.workdir import prepare_workdir

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


@pytest.mark.slow
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
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "another experiment (different: optim.lr 0.001, now 0.5)" in output
    assert "Traceback" not in output


def test_best_model_is_kept_not_the_last(finished):
    records = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    name = "emoji-text/noto/val/recall@10"
    scores = {r["step"]: r[name] for r in records if name in r}
    about = json.loads((finished / "model" / "manifest.json").read_text())["about"]
    assert sorted(scores) == [15, 30]
    assert scores[about["step"]] == pytest.approx(max(scores.values()), rel=1e-5)


@pytest.mark.slow
def test_the_best_of_many_evaluations_is_kept(tiny_experiment, tmp_path, monkeypatch):
    from cir_jax import checkpoint
    from cir_jax.training.best import Best
    from cir_jax.training.step import make_init

    scores = iter([0.3, 0.2, 0.4, 0.1])
    measure = lambda model, name, retriever, k, work: {"recall@10": next(scores)}
    monkeypatch.setattr("cir_jax.training.best.measure", measure)
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
        ({"retriever": "emoji_text"}, "retriever is 'emoji_text'; .* a retriever none"),
    ],
    ids=["metric", "benchmark", "form", "steps", "rhythm", "retriever"],
)
def test_mistakes_are_found_before_the_first_step(tiny_experiment, changes, message):
    with pytest.raises(ValueError, match=message):
        check_experiment(dataclasses.replace(tiny_experiment, **changes))


@pytest.mark.slow
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


class Numbered:
    """Pairs that say their row, with several wordings and a picture to be changed."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return self.rows

    def __getitem__(self, row):
        picture = np.full((8, 8, 3), row % 251, np.uint8)
        texts = (f"a red {row}", f"the blue one of {row}", f"{row}")
        return {"query": {"texts": texts}, "item": {"image": picture}, "group": row}


def numbered_batches(tiny_experiment, rows=(22, 9), **options):
    """Batches of two sets, the first in blocks of 4 and the second of single rows."""
    inputs = dataclasses.replace(tiny_experiment.method.inputs, image=ImageSpec(size=8))
    options = {"blocks": [4, 1], "batch_size": 8, "seed": 1} | options
    sets = [Numbered(n) for n in rows]
    return train_batches(sets, [2, 1][: len(sets)], inputs, **options)


def test_rows_of_a_block_share_a_batch_and_each_comes_once_per_epoch(tiny_experiment):
    stream = numbered_batches(tiny_experiment, rows=(22,), blocks=[4])
    groups = [next(stream)["item"]["group"].reshape(-1, 4) for _ in range(15)]
    assert all((group == group[:, :1] + np.arange(4)).all() for group in groups)
    numbers = np.concatenate(groups)[:, 0] // 4
    epochs = numbers.reshape(-1, 5)  # five blocks; the rows 20 and 21 make no whole one
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    single = numbered_batches(tiny_experiment, rows=(16,), blocks=[1])
    for _ in range(3):
        epoch = [*next(single)["item"]["group"], *next(single)["item"]["group"]]
        assert sorted(epoch) == list(range(16))
        assert np.diff(epoch).tolist() != [1] * 15


def test_blocks_do_not_depend_on_the_number_of_processes(tiny_experiment):
    def global_batches(processes):
        streams = [
            numbered_batches(tiny_experiment, start=3, process=p, processes=processes)
            for p in range(processes)
        ]
        return [[next(stream) for stream in streams] for _ in range(6)]

    for one, two in zip(global_batches(1), global_batches(2)):
        merged = jax.tree.map(lambda *x: np.concatenate(x), *two)
        jax.tree.map(np.testing.assert_array_equal, one[0], merged)


@pytest.mark.parametrize("start", [1, 2, 3, 7])
def test_blocks_resume_at_any_step(tiny_experiment, start):
    whole, late = (numbered_batches(tiny_experiment, start=s) for s in (0, start))
    for _ in range(start):
        next(whole)
    for _ in range(5):
        jax.tree.map(np.testing.assert_array_equal, next(whole), next(late))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 6}, r"batch_size 6 does not divide into blocks of \[4, 1\] rows"),
        ({"processes": 4}, "for each of 4 processes"),
        ({"blocks": [0, 1]}, r"blocks of \[0, 1\]"),
        ({"rows": (3, 9)}, "a data set of 3 rows has no block of 4"),
        ({"rows": (0, 9), "blocks": ()}, "a data set of 0 rows has no block of 1"),
    ],
    ids=["batch", "processes", "none", "short", "empty"],
)
def test_blocks_that_do_not_fit_are_refused(tiny_experiment, options, message):
    with pytest.raises(ValueError, match=message):
        next(numbered_batches(tiny_experiment, **options))


def test_turns_are_spread_evenly():
    assert turns([1]) == [0]
    assert turns([1, 2]) == [1, 0, 1]
    assert sorted(turns([3, 2])) == [0, 0, 0, 1, 1]


@pytest.fixture
def re_ranking(tmp_path, monkeypatch):
    """An experiment that trains a tiny re-ranker behind a tiny retriever, measured on a tiny benchmark."""
    monkeypatch.setitem(BENCHMARKS, "small-edits", edits)
    stage1 = drawn(BlipCirConfig.tiny(INPUTS))
    save_model(tmp_path / "stage1", stage1.config, stage1.params)
    jax.config.update("jax_disable_most_optimizations", True)
    yield Experiment(
        method=BlipRerankConfig.tiny(INPUTS),
        data=(Data("emoji-composed", variant="noto-strict-near", block=2),),
        train=Train(steps=2, batch_size=8, log_every=1, save_every=2, eval_every=1),
        optim=Optim(lr=1e-3, frozen=("image/.*", "fusion/.*")),
        init={"": str(tmp_path / "stage1")},
        evals=("small-edits/noto/val",),
        retriever=str(tmp_path / "stage1"),
        best="mrr",
    )
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.slow
def test_a_re_ranker_trains_and_keeps_its_best_model(re_ranking, tmp_path):
    prepare_workdir(re_ranking, tmp_path / "run")
    folder = train(re_ranking, tmp_path / "run")
    assert folder == tmp_path / "run" / "model"
    assert sorted(losses(tmp_path / "run")) == [1, 2]
    best, stage1 = cir_jax.load(folder), cir_jax.load(tmp_path / "stage1")
    about = json.loads((folder / "manifest.json").read_text())["about"]
    found = measure(best, "small-edits/noto/val", re_ranking.retriever)
    assert about["metrics"] == {f"small-edits/noto/val/{name}": x for name, x in found.items()}
    assert about["score"] == found["mrr"]
    assert about["experiment"]["retriever"] == re_ranking.retriever
    jax.tree.map(np.testing.assert_array_equal, best.params["image"], stage1.params["image"])
    jax.tree.map(np.testing.assert_array_equal, best.params["fusion"], stage1.params["text"])
    branches = best.params["text"]["blocks"]["linear"]
    queries = [branches[name]["cross"]["query"]["kernel"] for name in ("fused", "text")]
    assert 0 < np.abs(queries[0] - queries[1]).max() < 0.1


def test_a_re_ranker_needs_a_retriever_to_be_measured(re_ranking):
    alone = dataclasses.replace(re_ranking, retriever="")
    with pytest.raises(ValueError, match="retriever is ''; a re-ranker needs one"):
        check_experiment(alone)
    check_experiment(dataclasses.replace(alone, evals=()))


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
    assert optim.decays(params, Optim()) == {
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
def test_a_batch_that_the_devices_cannot_hold_is_named(tiny_experiment, tmp_path, monkeypatch):
    def full(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.")

    monkeypatch.setattr("cir_jax.training.step.make_step", lambda *_: full)
    with pytest.raises(MemoryError, match=r"batch_size 8 does not fit .*; lower train.batch_size"):
        train(tiny_experiment, tmp_path)
