"""Training among faults: stops and kills at any moment, losses that are not finite, damaged pictures, changed experiments.

`python tests/test_faults.py --kills 20 [--seed N]` kills one run so many times and compares its end with an undisturbed one.
"""

import argparse
import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from processes import run

import cir_jax
from cir_jax import checkpoint, files, flops, sharding, stopping, typed
from cir_jax.config import Data, Experiment, Mesh, Optim, Train
from cir_jax.data import emoji
from cir_jax.data.augment import Changes
from cir_jax.data.emoji import VOCABULARY
from cir_jax.data.images import ImageSpec
from cir_jax.data.inputs import Inputs
from cir_jax.data.pipeline import TRIES, substitutes, train_batches
from cir_jax.data.text import TextSpec
from cir_jax.methods.clip import ClipConfig
from cir_jax.train import train
from cir_jax.training.log import Log, records_until
from cir_jax.training.watch import Watch

INPUTS = Inputs(image=ImageSpec(size=64), text=TextSpec(vocab=str(VOCABULARY), length=24))
ROWS, BATCH, STEPS = 40, 8, 12


def parameters(workdir) -> list[np.ndarray]:
    return jax.tree.leaves(cir_jax.load(workdir / "model").params)


def same_bits(ours: Path, theirs: Path) -> None:
    """Both runs ended with the same parameters."""
    jax.tree.map(np.testing.assert_array_equal, parameters(ours), parameters(theirs))


def records(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]


def losses(workdir) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(workdir) if "loss" in record}


def saved(workdir) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """Pictures with captions; those of the rows 3, 17 and 18 are damaged, each in its own way."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = []
    for row in range(ROWS):
        Image.fromarray(emoji.tiles("noto")[7 * row]).save(folder / f"{row}.png")
        lines.append(json.dumps({"image": f"{row}.png", "text": f"picture number {row}"}))
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:200])
    (folder / "17.png").write_bytes(b"")
    (folder / "18.png").write_text("<html>404</html>")
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "pairs.jsonl"


@pytest.fixture(scope="module")
def experiment(table) -> Experiment:
    return Experiment(
        method=ClipConfig.tiny(INPUTS),
        data=(Data("pairs", root=str(table)),),
        train=Train(
            steps=STEPS,
            batch_size=BATCH,
            log_every=1,
            save_every=4,
            eval_every=STEPS,
            unreadable=0.1,
        ),
        optim=Optim(lr=1e-3, warmup=2, frozen=("text/.*",)),
    )


def changed(config: Experiment, **fields) -> Experiment:
    """The experiment with other fields of `train`."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **fields))


@pytest.fixture(scope="module")
def undisturbed(experiment, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed")
    train(experiment, workdir, tensorboard=True, profile="3:4")
    return workdir


@pytest.fixture
def signalled(monkeypatch):
    """A function: send this process a signal when a step is under way."""

    def at(step, number):
        add = Watch.add

        def added(watch, done, *rest):
            add(watch, done, *rest)
            if done == step:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(Watch, "add", added)

    return at


# ---- stops ----


def test_a_stop_saves_the_step_under_way_and_the_run_ends_as_undisturbed(
    experiment, undisturbed, signalled, tmp_path
):
    signalled(6, signal.SIGTERM)
    with pytest.raises(stopping.Terminated), stopping.stoppable():
        train(experiment, tmp_path)
    assert saved(tmp_path) == [4, 6]
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4, 5, 6]
    train(experiment, tmp_path)
    assert losses(tmp_path) == losses(undisturbed)
    same_bits(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_stop_in_an_evaluation_saves_the_step_and_evaluates_it_later(
    experiment, signalled, tmp_path, monkeypatch
):
    from cir_jax.training.best import Best

    config, considered = changed(experiment, steps=4, eval_every=2, save_every=4), []
    consider = Best.consider

    def stopped(best, state, step):
        considered.append(step)
        if considered == [2]:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        return consider(best, state, step)

    monkeypatch.setattr(Best, "consider", stopped)
    with pytest.raises(KeyboardInterrupt), stopping.stoppable():
        train(config, tmp_path)
    assert saved(tmp_path) == [2] and considered == [2]
    train(config, tmp_path)
    assert considered == [2, 2, 4]
    assert [record["step"] for record in records(tmp_path) if "loss" not in record] == [2, 4]


# ---- checkpoints ----


def test_checkpoints_hold_their_parts_and_their_experiment(experiment, undisturbed):
    assert saved(undisturbed) == [8, 12]
    items = {path.name for path in (undisturbed / "checkpoints" / "12").iterdir() if path.is_dir()}
    assert items == {"params", "opt", "config"}
    assert (undisturbed / "frozen").is_dir()
    with checkpoint.training_states(undisturbed, {}) as states:
        assert states.saved_config(12) == json.loads((undisturbed / "config.json").read_text())


def state(mesh, frozen=3.0):
    """A state whose arrays are spread over a mesh by the rules."""
    kernel = jnp.arange(64.0 * 32).reshape(64, 32)
    params = {"mlp": {"up": {"kernel": kernel}, "down": {"kernel": kernel.T + 0.5}}}
    moments = jax.tree.map(lambda x: x / 3, params)
    whole = {"params": params, "frozen": {"embedding": jnp.full((8, 4), frozen)}, "opt": moments}
    return jax.device_put(whole, sharding.shardings(whole, mesh))


def test_a_state_comes_back_exactly_on_another_mesh(tmp_path):
    meshes = [sharding.make_mesh(fsdp, tensor) for fsdp, tensor in ((4, 1), (1, 2), (2, 2))]
    with checkpoint.training_states(tmp_path, {}) as states:
        states.save_frozen(state(meshes[0])["frozen"])
        states.save(5, state(meshes[0]))
    for mesh in meshes:
        wanted = state(mesh)
        abstract = sharding.placed(wanted, jax.tree.map(lambda x: x.sharding, wanted))
        with checkpoint.training_states(tmp_path, {}) as states:
            found = states.restore(5, abstract)
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
        assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(
            lambda x: x.sharding, wanted
        )


def test_what_is_frozen_is_written_apart_and_whole_before_any_step(tmp_path):
    mesh = sharding.make_mesh()
    for value in (3.0, 4.0):  # a run that was killed before its first step was complete begins anew
        begun = state(mesh, value)
        with checkpoint.training_states(tmp_path, {}) as states:
            states.save_frozen(begun["frozen"])
            assert not saved(tmp_path)
            if value == 4:
                states.save(1, begun)
                assert (tmp_path / "frozen").is_dir()
                states.save(2, {**begun, "frozen": "not looked at"})
    with checkpoint.training_states(tmp_path, {}) as states:
        found = states.restore(2, state(mesh))
    jax.tree.map(np.testing.assert_array_equal, found, begun)


def test_the_next_step_does_not_wait_for_a_save_and_the_next_save_does(tmp_path, monkeypatch):
    held, let_go = threading.Event(), threading.Event()
    from orbax.checkpoint._src.serialization import jax_array_handlers

    write = jax_array_handlers._async_serialize_replica_slices

    async def slowly(*arguments, **options):
        held.set()
        let_go.wait(30)
        return await write(*arguments, **options)

    monkeypatch.setattr(jax_array_handlers, "_async_serialize_replica_slices", slowly)
    mesh = sharding.make_mesh()
    step = jax.jit(lambda x: jax.tree.map(lambda y: y + 1, x), donate_argnums=0)
    first = {**state(mesh), "frozen": {}}
    before = jax.tree.map(np.array, first)
    with checkpoint.training_states(tmp_path, {}) as states:
        states.save(1, first)
        second = step(first)
        jax.block_until_ready(second)
        assert states.manager.is_saving_in_progress() and not saved(tmp_path)
        threading.Timer(0.3, let_go.set).start()
        states.save(2, second)
        assert saved(tmp_path) == [1]
    assert held.is_set()
    with checkpoint.training_states(tmp_path, {}) as states:
        found = states.restore(1, second)
    jax.tree.map(np.testing.assert_array_equal, found["params"], before["params"])


# ---- another experiment ----


@pytest.mark.slow
def test_a_changed_experiment_is_refused_unless_told(experiment, undisturbed, tmp_path, capsys):
    config = changed(experiment, steps=4)
    train(config, tmp_path)
    longer = dataclasses.replace(changed(experiment, log_every=2), mesh=Mesh(fsdp=2))
    with pytest.raises(ValueError, match=r"mesh.fsdp 1, now 2, train.log_every 1, now 2, train.st"):
        train(longer, tmp_path)
    assert (tmp_path / "model").is_dir()
    # A checkpoint is asked too, wherever the folder's config comes from.
    files.write_json(
        tmp_path / "config.json", json.loads((undisturbed / "config.json").read_text())
    )
    with pytest.raises(ValueError, match=r"checkpoints/4 holds .* experiment \(different: train.s"):
        train(experiment, tmp_path)
    files.write_json(tmp_path / "config.json", typed.portable(config))
    train(longer, tmp_path, accept_changes=True)
    assert "going on with another experiment: mesh.fsdp 1, now 2" in capsys.readouterr().err
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4, 6, 8, 10, 12]
    about = json.loads((tmp_path / "model" / "manifest.json").read_text())["about"]
    assert about["step"] == STEPS and about["experiment"]["mesh"]["fsdp"] == 2


@pytest.mark.slow
def test_a_state_of_other_shapes_is_refused_even_if_told(experiment, tmp_path):
    config = changed(experiment, steps=1)
    train(config, tmp_path)
    wider = dataclasses.replace(config, method=dataclasses.replace(config.method, embed=20))
    with pytest.raises(ValueError, match=r"another model or optimizer: \d+ arrays differ, .*saved"):
        train(wider, tmp_path, accept_changes=True)
    thawed = dataclasses.replace(config, optim=Optim(lr=1e-3, warmup=2))
    with pytest.raises(ValueError, match=r"opt/\S*/mu/text/\S* \(None saved, \(2, 32\) wanted"):
        train(thawed, tmp_path, accept_changes=True)
    # The folder still belongs to the run that is in it.
    assert (tmp_path / "model").is_dir()
    train(changed(experiment, steps=2), tmp_path, accept_changes=True)


def test_arrays_of_other_shapes_are_refused(tmp_path):
    mesh = sharding.make_mesh()
    with checkpoint.training_states(tmp_path, {}) as states:
        states.save_frozen(state(mesh)["frozen"])
        states.save(1, state(mesh))
    other = state(mesh)
    other["params"]["mlp"]["up"]["kernel"] = jnp.ones((64, 16))
    other["opt"] = {"count": jnp.ones(())}
    told = r"4 arrays differ, opt/count \(None saved, \(\) wanted\), opt/mlp/down/kernel \(\(32"
    with (
        checkpoint.training_states(tmp_path, {}) as states,
        pytest.raises(ValueError, match=told),
    ):
        states.restore(1, other)


def test_two_runs_cannot_write_one_folder(experiment, tmp_path):
    with files.lock(tmp_path), pytest.raises(BlockingIOError, match="another process is writing"):
        train(experiment, tmp_path)


# ---- losses and data ----


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_with_its_batch_and_no_checkpoint_of_it(
    experiment, tmp_path
):
    config = changed(experiment, log_every=10, save_every=1, eval_every=5)
    config = dataclasses.replace(config, optim=Optim(lr=1e30, schedule="constant"))
    with pytest.raises(FloatingPointError, match=r"the loss is nan.* at step 2; its batch is in"):
        train(config, tmp_path)
    assert saved(tmp_path) == [1]
    told = json.loads((tmp_path / "not-finite-0000002.json").read_text())
    assert told["step"] == 2 and told["loss"] == "nan" and len(told["batch"]) == BATCH
    assert told["batch"][0]["item"]["image"].endswith(f"/{told['batch'][0]['row']}.png")
    assert told["batch"][0]["query"]["texts"] == [f"picture number {told['batch'][0]['row']}"]


def test_damaged_pictures_end_no_run_and_are_listed(undisturbed, table):
    listed = [json.loads(x) for x in (undisturbed / "unreadable.jsonl").read_text().splitlines()]
    # Two epochs and more: each damaged picture was asked for, and is listed once.
    assert sorted(found["row"] for found in listed) == [3, 17, 18]
    reasons = {found["row"]: found["reason"] for found in listed}
    assert "3.png: cannot be read" in reasons[3] and "the file is empty" in reasons[17]
    assert all(found["shown"] == substitutes(found["row"], ROWS)[0] for found in listed)
    assert records(undisturbed)[-2]["unreadable"] == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("unreadable", "message"),
    [(0.05, r"3 of the 40 rows"), (0.0, r"cannot be read as a picture")],
    ids=["many", "strict"],
)
def test_too_many_damaged_pictures_end_a_run(experiment, unreadable, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(changed(experiment, unreadable=unreadable), tmp_path)
    assert not (tmp_path / "model").exists()


def shown(watch, step, loss=1.0, asked=range(4), instead=()):
    """Tell a watch of a step whose batch had the rows `asked`, for some of which others were shown."""
    rows = np.array(list(asked), np.int32)
    others = np.array([dict(instead).get(row, row) for row in asked], np.int32)
    metrics = {"loss": jnp.float32(loss), "grad_norm": jnp.float32(2)}
    watch.add(step, metrics, {"set": np.zeros_like(rows), "asked": rows, "shown": others})


@pytest.fixture
def watch(experiment, table, tmp_path):
    """A watch over the damaged pictures; two of the forty are too many."""
    from cir_jax.data import training_set

    config = changed(experiment, unreadable=0.04)
    return Watch(config, tmp_path, [training_set(experiment.data[0])], operations=lambda batch: 5)


def test_the_first_loss_that_is_not_finite_is_found_whenever_one_looks(watch, tmp_path):
    for step, loss in ((1, 1.0), (2, np.inf), (3, np.nan)):
        shown(watch, step, loss, asked=range(4 * step, 4 * step + 4))
    with pytest.raises(
        FloatingPointError, match=r"the loss is inf at step 2; its batch is in .*02"
    ):
        watch.look()
    told = json.loads((tmp_path / "not-finite-0000002.json").read_text())
    assert [row["row"] for row in told["batch"]] == [8, 9, 10, 11]


def test_rows_that_cannot_be_read_are_counted_once_up_to_a_share(watch, tmp_path, monkeypatch):
    monkeypatch.setattr(flops, "peak", lambda: 1e12)
    path = tmp_path / "unreadable.jsonl"
    listed = lambda: [json.loads(line)["row"] for line in path.read_text().splitlines()]
    shown(watch, 1, asked=[0, 3], instead={3: 28})
    shown(watch, 2, asked=[3, 5], instead={3: 28})
    assert watch.values(2)["unreadable"] == 1 and listed() == [3]
    # A run that goes on behind step 1 knows what was found until then, and nothing later.
    path.write_text(path.read_text() + '{"step": 9, "set": 0, "row": 30}\n{"step"')
    again = dataclasses.replace(watch, first=1, unreadable={})
    assert list(again.unreadable) == [(0, 3)] and listed() == [3]
    shown(again, 2, asked=[17], instead={17: 2})
    told = (
        r"2 of the 40 rows of .*pairs.jsonl cannot be read, more than train.unreadable 0.04 allows"
    )
    with pytest.raises(ValueError, match=told):
        again.look()
    assert listed() == [3, 17]


class Damaged:
    """Pairs that say their row; some cannot be read."""

    def __init__(self, count, bad):
        self.count, self.bad = count, bad

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        picture = b"" if row in self.bad else np.full((8, 8, 3), row, np.uint8)
        return {"query": {"text": f"{row}"}, "item": {"image": picture}, "group": row}


def damaged_batches(count=20, bad=(2, 3, 11), **options):
    inputs = dataclasses.replace(INPUTS, image=ImageSpec(size=8))
    options = {"batch_size": 4, "seed": 1, "changes": Changes(False)} | options
    return train_batches([Damaged(count, bad)], [1], inputs, **options)


@pytest.mark.parametrize("block", [1, 2])
def test_what_stands_in_depends_on_the_row_alone(block):
    whole = damaged_batches(blocks=[block])
    batches = [next(whole) for _ in range(10)]
    replaced = 0
    for batch in batches:
        rows = batch["rows"]
        np.testing.assert_array_equal(batch["item"]["group"], rows["shown"])
        for asked, shown in zip(rows["asked"].tolist(), rows["shown"].tolist()):
            bad = {row // block for row in (2, 3, 11)}
            allowed = [n for n in substitutes(asked // block, 20 // block) if n not in bad]
            expected = allowed[0] if asked // block in bad else asked // block
            assert shown == expected * block + asked % block
            replaced += asked != shown
    assert replaced
    for processes, start in ((2, 0), (1, 3), (2, 7)):
        parts = [
            damaged_batches(blocks=[block], start=start, process=p, processes=processes)
            for p in range(processes)
        ]
        for batch in batches[start:]:
            joined = jax.tree.map(lambda *x: np.concatenate(x), *(next(part) for part in parts))
            jax.tree.map(np.testing.assert_array_equal, joined, batch)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 11, 1000, 1001])
def test_substitutes_are_distinct_and_others(count):
    found = substitutes(count // 2, count)
    assert len(set(found)) == len(found) == min(TRIES, count - 1)
    assert count // 2 not in found and all(0 <= number < count for number in found)


def test_a_folder_that_is_gone_ends_a_run_at_once():
    with pytest.raises(ValueError, match=r"nor any of 10 in its place; .*the file is empty|bytes"):
        next(damaged_batches(bad=range(20)))


# ---- what the loop tells ----


def test_each_record_says_how_fast_and_how_large(undisturbed):
    record = records(undisturbed)[3]
    assert record["step"] == 4 and record["grad_norm"] > 0
    assert record["learning_rate"] == pytest.approx(1e-3 * (1 + np.cos(np.pi / 10)) / 2, rel=1e-5)
    assert record["rows_per_second"] > 0 and 0 <= record["waiting_for_data"] <= 1
    assert 0.05 < record["host_memory_gib"] < 100
    assert "utilisation" not in record  # nobody knows the peak of this processor


def test_tensorboard_gets_every_record(undisturbed):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    (path,) = (undisturbed / "tensorboard").iterdir()
    found = {}
    for event in EventFileLoader(str(path)).Load():
        for value in event.summary.value:
            found[event.step, value.tag] = value.tensor.float_val[0]
    assert {step for step, _ in found} == set(range(1, STEPS + 1))
    for step, loss in losses(undisturbed).items():
        assert found[step, "loss"] == pytest.approx(loss, rel=1e-6)


def test_tensorboard_without_its_package_says_what_to_install(monkeypatch, tmp_path):
    from cir_jax.training.log import event_file

    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    with (
        pytest.raises(ModuleNotFoundError, match=r"pip install 'cir_jax\[tensorboard\]'"),
        event_file(tmp_path),
    ):
        pass


def test_a_profile_leaves_a_trace(undisturbed):
    assert list((undisturbed / "profile").rglob("*.xplane.pb"))


def test_a_run_that_goes_on_within_the_span_is_traced(tmp_path, monkeypatch):
    from cir_jax.training.profile import Profile

    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    trace = Profile(tmp_path, "3:6")
    for step in (5, 6, 7):
        trace.before(step), trace.after(step, ())
    assert calls == ["start", "stop"]


@pytest.mark.parametrize("span", ["10", "20:10", "0:5", "a:b", "1:2:3"])
def test_a_span_that_is_none_is_refused(span):
    from cir_jax.training.profile import steps_of

    assert steps_of("10:20") == (10, 20)
    with pytest.raises(ValueError, match=r"--profile is .* as 10:20"):
        steps_of(span)


def test_operations_count_every_turn_of_a_loop():
    product = lambda x, w: jnp.tanh(x @ w)
    blocks = lambda x, w: jax.lax.scan(lambda x, w: (product(x, w), None), x, w)[0].sum()
    x, w = jnp.ones((4, 16)), jnp.ones((24, 16, 16))
    forward = 24 * 2 * 4 * 16 * 16
    assert flops.count(blocks, x, w) == forward
    assert flops.count(jax.grad(blocks, argnums=1), x, w) == 3 * forward
    # XLA's own count, for a function without loops.
    convolve = lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "VALID")
    x, w = jnp.ones((2, 6, 9, 9)), jnp.ones((8, 6, 3, 3))
    known = jax.jit(convolve).lower(x, w).cost_analysis()["flops"]
    assert flops.count(convolve, x, w) == known
    mesh = sharding.make_mesh()
    shared = jax.shard_map(
        lambda x: x @ x.T @ x, mesh=mesh, in_specs=sharding.BATCH, out_specs=sharding.BATCH
    )
    assert flops.count(shared, jnp.ones((8, 4))) == 4 * (2 * 2 * 4 * 2 + 2 * 2 * 2 * 4)


@pytest.mark.slow
def test_utilisation_takes_the_operations_of_the_model_where_a_peak_is_known(
    experiment, monkeypatch
):
    from cir_jax.training import optim
    from cir_jax.training.step import make_init, make_step
    from cir_jax.training.watch import operations

    tx = optim.optimizer(experiment.optim, STEPS)
    abstract = jax.eval_shape(make_init(experiment, tx), jax.random.key(0))
    assert operations(experiment, abstract) is None  # nobody knows the peak of this processor
    monkeypatch.setitem(flops.PEAKS, jax.devices()[0].device_kind, 1e9)
    assert flops.peak() == 4e9
    batch = next(train_batches([Damaged(20, ())], [1], INPUTS, batch_size=4, seed=1))
    count = operations(experiment, abstract)(batch)
    graph, params = checkpoint.abstract_params(experiment.method)
    whole = flops.count(make_step(graph, tx, 0), abstract, batch, np.int32(0))
    # The texts are frozen and go forward alone; what is computed again is not the model's.
    assert 0 < count < whole
    kernels = lambda tree: sum(x.size for x in jax.tree.leaves(tree["blocks"]) if x.ndim > 2)
    tokens = (INPUTS.image.size // experiment.method.vision.patch) ** 2 + 1
    least = 4 * 2 * (3 * tokens * kernels(params["image"]) + 24 * kernels(params["text"]))
    assert least < count < 2 * least  # and the pictures' patches, and attention


# ---- kill -9 ----


def test_the_log_of_a_run_that_saved_nothing_begins_anew(tmp_path):
    for _ in range(2):  # killed behind step 2
        log = Log(tmp_path / "log.jsonl")
        log(1, {"loss": 2.0}), log(2, {"loss": 1.0})
    assert [record["step"] for record in records_until(tmp_path / "log.jsonl", 9)] == [1, 2]


KILLS = """
import dataclasses
from cir_jax.config import Data, Experiment, Optim, Train
from cir_jax.data.emoji import VOCABULARY
from cir_jax.data.images import ImageSpec
from cir_jax.data.inputs import Inputs
from cir_jax.data.text import TextSpec
from cir_jax.methods.clip import ClipConfig

inputs = Inputs(image=ImageSpec(size=64), text=TextSpec(vocab=str(VOCABULARY), length=24))
config = Experiment(
    method=ClipConfig.tiny(inputs),
    data=(Data("emoji-text"), Data("emoji-composed", variant="noto-strict")),
    train=Train(steps=60, batch_size=8, log_every=1, save_every=6, eval_every=30),
    optim=Optim(lr=1e-3, warmup=5, frozen=("image/.*",)),
    evals=("emoji-text/noto-first20/val",),
)
"""
RUN, SAVE, LONG = 60, 6, 900  # steps, steps, seconds
EVERY = 4  # of so many kills one is inside a save


class Kill:
    """When to kill a run: at a moment in steps (5.3: when 0.3 of a step has passed since step 5 ended), or in the save after it."""

    STEP = 0.03  # seconds, nearly

    def __init__(self, workdir: Path, moment: float, inside: bool):
        self.workdir, self.moment, self.inside, self.since = workdir, moment, inside, None
        self.left = self.written()

    def written(self) -> tuple | None:
        """Which log there is, and when it was last written: a new process first cuts off what is to be computed again."""
        log = self.workdir / "log.jsonl"
        return (log.stat().st_ino, log.stat().st_mtime_ns) if log.exists() else None

    def step(self) -> int:
        """The last step that is logged."""
        try:
            lines = (self.workdir / "log.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return 0
        return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0

    def half_written(self) -> list[str]:
        return [path.name for path in self.workdir.glob("checkpoints/*tmp*")]

    def __call__(self) -> bool:
        begun = int(self.moment) == 0 or self.written() != self.left
        if self.since is None and begun and self.step() >= int(self.moment):
            self.since = time.monotonic()
        if self.since is None:
            return False
        if self.inside:
            return bool(self.half_written())
        return time.monotonic() - self.since >= self.moment % 1 * self.STEP


def kill_and_compare(folder: Path, count: int, seed: int) -> None:
    """Kill one run `count` times and compare its end with an undisturbed one; AssertionError if they differ."""
    (folder / "tiny.py").write_text(KILLS)
    command = ("cir_jax.train", folder / "tiny.py", "--workdir")
    done = run(*command, folder / "whole", timeout=LONG)
    assert done.returncode == 0, done.stderr.decode()
    draw, workdir = random.Random(seed), folder / "killed"
    moments = sorted(draw.uniform(0, RUN) for _ in range(count))
    # After the moments of the last saves there may be no other.
    early = [number for number, moment in enumerate(moments) if moment < RUN - 2 * SAVE]
    inside = set(draw.sample(early, min(len(early), -(-count // EVERY))))
    print(f"seed {seed}: kills at the steps {[round(moment, 2) for moment in moments]}", flush=True)
    for number, moment in enumerate(moments):
        for _ in range(3 if number in inside else 1):  # a save may end before the signal arrives
            kill = Kill(workdir, moment, number in inside)
            done = run(*command, workdir, stop=(signal.SIGKILL, kill), timeout=LONG)
            assert done.returncode == -signal.SIGKILL, (moment, done.stderr.decode())
            half = kill.half_written()
            place = "inside a save" if number in inside else "anywhere"
            print(f"killed {place} after step {kill.step()}, half written: {half}", flush=True)
            if half:
                break
        assert half or number not in inside
    done = run(*command, workdir, timeout=LONG)
    assert done.returncode == 0, done.stderr.decode()
    assert losses(workdir) == losses(folder / "whole")
    same_bits(workdir, folder / "whole")
    assert not kill.half_written()


@pytest.mark.slow
def test_three_kills_change_no_bit(tmp_path):
    kill_and_compare(tmp_path, 3, int(os.environ.get("CIR_JAX_KILL_SEED", 20261121)))


# ---- several processes ----

PARTS = """
import os, sys
sys.path.insert(0, sys.argv[1])
from cir_jax import processes
processes.join()
import jax
from test_faults import state
from cir_jax import checkpoint, sharding
from pathlib import Path
with checkpoint.training_states(Path(sys.argv[2]), {"of": jax.process_count()}) as states:
    begun = state(sharding.make_mesh(fsdp=2))
    states.save_frozen(begun["frozen"])
    states.save(7, begun)
"""


def several(count, *command, **options) -> list[subprocess.Popen]:
    """A command as so many processes that compute together."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    place = {"CIR_JAX_COORDINATOR": f"localhost:{port}", "CIR_JAX_PROCESSES": str(count)}
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env={**os.environ, **place, "CIR_JAX_PROCESS": str(number), **options},
            **streams,
        )
        for number in range(count)
    ]


def ended(processes) -> list[tuple[int, str]]:
    """The exit code of each process and what it said."""
    said = [process.communicate(timeout=LONG)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said)]


@pytest.mark.slow
def test_a_state_of_two_processes_comes_back_exactly_in_one(tmp_path):
    (tmp_path / "parts.py").write_text(PARTS)
    ends = ended(several(2, tmp_path / "parts.py", Path(__file__).parent, tmp_path))
    assert [code for code, _ in ends] == [0, 0], ends
    wanted = state(sharding.make_mesh(tensor=4))
    with checkpoint.training_states(tmp_path, {}) as states:
        assert states.saved_config(7) == {"of": 2}
        found = states.restore(7, wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_of_two_processes_saves_the_same_step_in_both(number, tmp_path):
    other = ', Data("emoji-composed", variant="noto-strict")'
    assert other in KILLS and "steps=60" in KILLS  # one shape of batches: less to compile
    (tmp_path / "tiny.py").write_text(KILLS.replace(other, ",").replace("steps=60", "steps=3000"))
    workdir = tmp_path / "run"
    command = ("-m", "cir_jax.train", tmp_path / "tiny.py", "--workdir", workdir)
    options = ("--train.save-every", 1000, "--train.eval-every", 3000)
    both = several(2, *command, *options, JAX_DISABLE_MOST_OPTIMIZATIONS="true")
    kill, end = Kill(workdir, 3, False), time.monotonic() + LONG
    while not kill() and time.monotonic() < end:
        time.sleep(0.05)
    both[1].send_signal(number)
    ends = ended(both)
    codes = [code for code, _ in ends]
    # The one that was asked, and the one that was told by it.
    assert codes == [143, 143 if number == signal.SIGTERM else 130], ends
    (step,) = saved(workdir)
    assert kill.step() == step >= 3
    # One process goes on where two stopped.
    more = ("--train.steps", step + 2, "--accept-changes")
    done = run("cir_jax.train", *command[2:], *options, *more, timeout=LONG)
    assert done.returncode == 0, done.stderr.decode()
    assert f"continuing from step {step}" in done.stderr.decode()
    assert sorted(losses(workdir)) == list(range(1, step + 3))


def main() -> None:
    """Kill a run as often as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kill_and_compare(Path(folder), given.kills, given.seed)
    print(f"{given.kills} kills changed no bit")


if __name__ == "__main__":
    main()
