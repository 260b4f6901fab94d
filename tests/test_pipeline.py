"""Batches: the same whoever makes them, from any step on, by threads and by worker processes."""

import dataclasses
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from cir_jax.data.augment import Changes
from cir_jax.data.benchmark import Made
from cir_jax.data.images import ImageSpec
from cir_jax.data.inputs import Inputs
from cir_jax.data.pipeline import eval_batches, train_batches
from cir_jax.data.text import TextSpec

INPUTS = Inputs(ImageSpec(size=8), TextSpec(length=12))


class Asked:
    """Queries that say their row; those of `alone` have no picture."""

    def __init__(self, count, alone=()):
        self.count, self.alone = count, alone

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        text = {"text": f"number {row}"}
        return text if row in self.alone else {**text, "image": np.full((9, 8, 3), row, np.uint8)}


class Pairs(Asked):
    """Training pairs, whose pictures are changed at random."""

    def __getitem__(self, row):
        picture = np.random.default_rng(row).integers(0, 255, (8, 8, 3), np.uint8)
        return {"query": {"texts": (f"a {row}", f"one {row}")}, "item": {"image": picture}}


def same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def joined(parts):
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def rows(batches):
    return [batch["row"].tolist() for batch in batches]


def test_the_last_batch_is_padded_with_rows_of_minus_one():
    batches = list(eval_batches(Asked(10), INPUTS, 4))
    assert rows(batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, -1, -1]]
    assert all(batch["image"].shape == (4, 8, 8, 3) for batch in batches)
    assert all(batch["text"].shape == (4, 12) for batch in batches)
    assert rows(eval_batches(Asked(8), INPUTS, 4)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert rows(eval_batches(Asked(10), INPUTS, 4, pad=False))[-1] == [8, 9]
    # More rows than a thread prepares at a time, and a batch that is no multiple of them.
    found = np.concatenate(rows(eval_batches(Asked(70), INPUTS, 23, pad=False)))
    assert found.tolist() == list(range(70))


def test_examples_are_prepared_as_they_are_alone():
    from cir_jax.data.inputs import prepare_batch

    for batch in eval_batches(Asked(45), INPUTS, 20, pad=False):
        alone = [Asked(45)[row] for row in batch.pop("row")]
        same(batch, prepare_batch(alone, INPUTS))


class Numbered:
    """Training pairs of pictures in the colour of their row."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        return {"query": {"text": "a"}, "item": {"image": np.full((8, 8, 3), row, np.uint8)}}


def seen(steps, count=11, size=4, **options):
    """The rows of each batch of a training, and its pictures."""
    plain = Inputs(ImageSpec(size=8, mean=(0, 0, 0), std=(1 / 255,) * 3), TextSpec(length=12))
    options = {"batch_size": size, "seed": 5, "changes": Changes(False)} | options
    batches = itertools.islice(train_batches([Numbered(count)], [1], plain, **options), steps)
    pictures = [batch["item"]["image"] for batch in batches]
    return [np.rint(each[:, 0, 0, 0]).astype(int).tolist() for each in pictures], pictures


def test_epochs_end_with_their_last_whole_batch_or_run_on():
    rows, _ = seen(9, drop_last=True)
    epochs = [rows[step] + rows[step + 1] for step in range(0, 8, 2)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4, "another order in each"
    assert len({frozenset(epoch) for epoch in epochs}) > 1, "and other rows are left out"
    running = np.concatenate(seen(11)[0]).tolist()
    assert all(sorted(running[n : n + 11]) == list(range(11)) for n in (0, 11, 22, 33))
    with pytest.raises(ValueError, match="a data set of 3 rows has no batch of 4"):
        seen(1, count=3, drop_last=True)


def test_without_reshuffle_every_epoch_has_the_batches_of_the_first():
    """Other random changes, as in the original that does so."""
    options = {"drop_last": True, "reshuffle": False}
    rows, _ = seen(6, **options)
    assert rows[:2] == rows[2:4] == rows[4:]
    assert rows[2:] == seen(4, start=2, **options)[0]
    flipped = lambda row: {"query": {"text": "a"}, "item": {"image": PICTURE}}
    batches = train_batches(
        [Made(4, flipped)], [1], INPUTS, batch_size=4, seed=0, changes=MIRRORED, **options
    )
    first, second, third = (next(batches)["item"]["image"] for _ in range(3))
    assert not (np.array_equal(first, second) and np.array_equal(second, third))


PICTURE = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
MIRRORED = Changes(augment=False, mirror=True)


def test_about_half_of_the_pictures_are_mirrored():
    raw = {"query": {"text": "a"}, "item": {"image": PICTURE}}
    options = {"batch_size": 64, "seed": 0, "changes": MIRRORED}
    shown = next(train_batches([[raw] * 64], [1], INPUTS, **options))["item"]["image"]
    plain = next(train_batches([[raw] * 64], [1], INPUTS, **{**options, "changes": Changes(False)}))
    plain = plain["item"]["image"]
    same_way = (shown == plain).all(axis=(1, 2, 3))
    assert (shown == plain[:, :, ::-1]).all(axis=(1, 2, 3)).tolist() == (~same_way).tolist()
    assert 20 < same_way.sum() < 44


def test_a_row_may_draw_the_pair_of_a_step():
    def draw(rng):
        word = f"w{rng.integers(1000)}"
        return {"query": {"text": word}, "item": {"text": word}}

    raw = {"query": {"text": "x"}, "item": {"text": "x"}, "draw": draw}
    batches = train_batches([[raw] * 4], [1], INPUTS, batch_size=4, seed=0)
    first, second = next(batches), next(batches)
    for batch in (first, second):
        same(batch["query"]["text"], batch["item"]["text"])
    assert (
        len(np.unique(np.concatenate([first["item"]["text"], second["item"]["text"]]), axis=0)) > 4
    )


@pytest.mark.parametrize("count", [1, 3, 10, 64])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_batches(count, processes):
    one = list(eval_batches(Asked(count), INPUTS, 8))
    parts = [
        list(eval_batches(Asked(count), INPUTS, 8, process=p, processes=processes))
        for p in range(processes)
    ]
    assert {len(part) for part in parts} == {len(one)}
    for whole, *pieces in zip(one, *parts):
        same(whole, joined(pieces))


@pytest.mark.parametrize("start", range(5))
def test_evaluation_resumes_at_any_batch(start):
    whole = list(eval_batches(Asked(19), INPUTS, 4))
    late = list(eval_batches(Asked(19), INPUTS, 4, start=start))
    assert len(late) == 5 - start
    for ours, theirs in zip(late, whole[start:]):
        same(ours, theirs)


def test_a_batch_ends_where_the_parts_change():
    mixed = Asked(9, alone=(3, 4, 8))
    batches = list(eval_batches(mixed, INPUTS, 4, pad=False))
    assert rows(batches) == [[0, 1, 2], [3, 4], [5, 6, 7], [8]]
    assert ["image" in batch for batch in batches] == [True, False, True, False]
    with pytest.raises(ValueError, match="the examples 0 to 3 differ in their parts"):
        list(eval_batches(mixed, INPUTS, 4))


@pytest.mark.parametrize(
    ("count", "options"),
    [(0, {}), (3, {"processes": 3}), (3, {"pad": False, "processes": 2})],
)
def test_what_cannot_be_shared_is_refused(count, options):
    with pytest.raises(ValueError, match=r"examples in batches of 4 for|are padded"):
        next(eval_batches(Asked(count), INPUTS, 4, **options))


def test_a_picture_that_cannot_be_read_ends_the_batches_with_its_error(tmp_path):
    (tmp_path / "x.jpg").write_text("none")
    broken = [{"image": str(tmp_path / "x.jpg")}]
    with pytest.raises(ValueError, match=r"x.jpg: cannot be read as a picture"):
        next(eval_batches(broken, INPUTS, 4))


def trained(**options):
    return train_batches(
        [Pairs(11), Pairs(23)], [1, 2], INPUTS, blocks=[2, 1], batch_size=8, seed=5, **options
    )


@pytest.mark.parametrize("processes", [2, 4])
def test_training_is_the_same_for_any_number_of_processes_augmentation_included(processes):
    streams = [trained(process=p, processes=processes) for p in range(processes)]
    for whole, *pieces in itertools.islice(zip(trained(), *streams), 7):
        same(whole, joined(pieces))


def test_worker_processes_make_the_same_batches_and_end():
    make = lambda **options: train_batches(
        [Pairs(11)], [1], INPUTS, batch_size=4, seed=5, start=3, **options
    )
    workers = make(workers=2)
    for ours, theirs in zip(itertools.islice(make(), 5), workers):
        same(ours, theirs)
    assert len(multiprocessing.active_children()) == 2
    workers.close()
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_worker_processes_evaluate_and_train_on_several_sets():
    workers = trained(workers=1)
    for ours, theirs in zip(itertools.islice(trained(), 5), workers):
        same(ours, theirs)
    workers.close()
    asked = eval_batches(Asked(40), INPUTS, 16, workers=2)
    for ours, theirs in zip(eval_batches(Asked(40), INPUTS, 16), asked, strict=True):
        same(ours, theirs)
    assert not multiprocessing.active_children()


PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
from test_pipeline import trained
if __name__ == "__main__":
    import multiprocessing
    stream = trained(workers=1)
    next(stream)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_workers_end_with_a_killed_program(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM.format(tests=os.path.dirname(__file__)))
    command, pipe = [sys.executable, tmp_path / "program.py"], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as program:
        workers = [int(number) for number in program.stdout.readline().split()]
        assert len(workers) == 1  # the second data set has not been asked yet
        program.send_signal(signal.SIGKILL)
    end = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{worker}") for worker in workers):
        assert time.monotonic() < end, "workers outlive their program"
        time.sleep(0.2)


def test_the_configured_workers_are_used(tiny_experiment, monkeypatch):
    from cir_jax.data import pipeline
    from cir_jax.train import training_batches

    asked = []
    ahead = lambda dataset, buffer, workers: asked.append(workers) or dataset.to_iter_dataset()
    monkeypatch.setattr(pipeline, "_ahead", ahead)
    config = dataclasses.replace(
        tiny_experiment, train=dataclasses.replace(tiny_experiment.train, workers=3)
    )
    next(training_batches(config, 0))
    assert asked == [3, 3]
