"""Batches for training and for everything else; the only file that imports Grain.

The step number is the whole state: batch `s` depends on the seed and on `s` alone, never on how many processes, threads
or workers made it, so a run resumes exactly at any step. So does what stands in for an example that cannot be read:
which one it is depends on nothing but the row and what lies on the disk.
"""

import contextlib
import functools
import itertools
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import grain
import numpy as np

from cir_jax.data.augment import OF_DRAWINGS, Changes, augment, drop_words
from cir_jax.data.benchmark import Dataset
from cir_jax.data.images import ImageSpec, crop, random_crop
from cir_jax.data.inputs import Inputs, prepare_batch


def _examples(
    raws: Sequence[Mapping], rng: np.random.Generator, inputs: Inputs, changes: Changes
) -> dict:
    """Arrays of training pairs."""
    raws = [raw["draw"](rng) if "draw" in raw else raw for raw in raws]
    pairs = [
        {part: _drawn(raw[part], rng, inputs, changes) for part in ("query", "item")}
        for raw in raws
    ]
    batch = {part: prepare_batch([pair[part] for pair in pairs], inputs) for part in pairs[0]}
    if "group" in raws[0]:
        batch["item"]["group"] = np.array([raw["group"] for raw in raws], np.int32)
    return batch


def _drawn(side: Mapping, rng: np.random.Generator, inputs: Inputs, changes: Changes) -> dict:
    """One side of a pair as this step shows it: one of its wordings, its picture changed."""
    values = dict(side)
    if "texts" in values:
        texts = values.pop("texts")
        values["text"] = texts[rng.integers(len(texts))]
        if changes.augment:
            values["text"] = drop_words(values["text"], rng)
    if "image" in values:
        values["image"] = _changed(values["image"], inputs.image, rng, changes)
    return values


def _changed(image, spec: ImageSpec, rng: np.random.Generator, changes: Changes):
    """A picture, changed; where nothing changes it, as it is."""
    if changes.crop:
        image = random_crop(image, spec, changes.crop, rng)
    elif (changes.mirror or changes.augment) and not isinstance(image, np.ndarray):
        # A file is decoded and cut first: what would be cut off later shall not be computed.
        image = crop(image, spec)
    if changes.mirror and rng.random() < 0.5:
        image = np.ascontiguousarray(image[:, ::-1])
    return augment(image, rng) if changes.augment else image


TRIES = 10  # examples that may stand in for one that cannot be read, before something must be wrong with all


def substitutes(number: int, count: int) -> list[int]:
    """What stands in for one of `count` examples, in this order, where it cannot be read.

    They lie far apart, because what is damaged often lies together: so many times the nearest whole number from
    0.618 `count` on that has no divisor in common with `count`, modulo `count`.
    """
    apart = next(n for n in itertools.count(int(0.618 * count) or 1) if math.gcd(n, count) == 1)
    return [(number + n * apart) % count for n in range(1, min(TRIES, count - 1) + 1)]


@dataclass(frozen=True)
class _Prepared:
    """Makes the arrays of a block: consecutive rows of a data set, or of what stands in for them.

    They come with `rows`: which were `asked` for and which are `shown`, int32 `[block]`, and the number of their `set`.
    """

    dataset: Dataset
    set: int
    size: int
    inputs: Inputs
    changes: Changes
    strict: bool

    def __len__(self) -> int:
        """How many blocks there are; an incomplete last one is left out."""
        return len(self.dataset) // self.size

    def __call__(self, number: int, rng: np.random.Generator) -> dict:
        for shown in (number, *([] if self.strict else substitutes(number, len(self)))):
            try:
                made = self._examples(shown, rng)
            except (ValueError, OSError) as error:
                unreadable = error
                continue
            return made | {"rows": self._rows(number, shown)}
        if not self.strict:
            raise ValueError(
                f"the example {number} cannot be read, nor any of {TRIES} in its place; of the last: {unreadable}"
            ) from unreadable
        raise unreadable

    def _examples(self, block: int, rng: np.random.Generator) -> dict:
        raws = [self.dataset[row] for row in self._numbers(block)]
        return _examples(raws, rng, self.inputs, self.changes)

    def _numbers(self, block: int) -> range:
        return range(block * self.size, (block + 1) * self.size)

    def _rows(self, asked: int, shown: int) -> dict[str, np.ndarray]:
        numbers = {"asked": self._numbers(asked), "shown": self._numbers(shown)}
        arrays = {name: np.array(rows, np.int32) for name, rows in numbers.items()}
        return arrays | {"set": np.full(self.size, self.set, np.int32)}


def fault(dataset: Dataset, row: int, inputs: Inputs) -> str | None:
    """Why a training pair cannot be read, in words; None if it can."""
    try:
        _examples([dataset[row]], np.random.default_rng(0), inputs, Changes(False))
    except (ValueError, OSError) as error:
        return str(error)
    return None


class _Part:
    """One process's rows of an endless data set, so that all processes' rows in turn are the global batches."""

    def __init__(self, rows, start: int, batch_size: int, process: int, processes: int):
        self.rows, self.start, self.batch_size = rows, start, batch_size
        self.mine, self.first = batch_size // processes, process * (batch_size // processes)

    def __len__(self) -> int:
        return len(self.rows) // self.batch_size * self.mine

    def __getitem__(self, number: int):
        step, row = divmod(number, self.mine)
        return self.rows[(self.start + step) * self.batch_size + self.first + row]


def _stream(
    prepared: _Prepared,
    *,
    seed,
    batch_size,
    start,
    process,
    processes,
    drop_last,
    reshuffle,
    workers,
):
    """Batches of one data set, from its own batch number `start` on."""
    size = batch_size // prepared.size
    blocks = grain.MapDataset.range(len(prepared)).seed(seed).shuffle()
    if drop_last:
        blocks = blocks[: len(blocks) // size * size]
    # The transform belongs to the endless data set: its random numbers are the block's, whoever computes it.
    blocks = blocks.repeat(None, reseed_each_epoch=reshuffle).random_map(prepared)
    part = grain.MapDataset.source(_Part(blocks, start, size, process, processes))
    elements = _ahead(part, max(2, 256 // prepared.size), workers)
    return iter(elements.batch(size // processes, drop_remainder=True).map(_joined))


def _ahead(dataset: grain.MapDataset, buffer: int, workers: int = 0) -> grain.IterDataset:
    """The elements in their order, at most `buffer` of them made ahead, by threads or by worker processes.

    A program that uses workers starts under `if __name__ == "__main__"`, because they import it.
    """
    threads = min(os.cpu_count() or 1, 16)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(buffer, threads))
    elements = dataset.to_iter_dataset(options)
    if not workers:
        return elements
    from absl import flags

    # Grain asks absl for its flags, which only a program of absl's own has read.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    per_worker = max(1, buffer // workers)
    elements = dataset.to_iter_dataset(grain.ReadOptions(1, per_worker))
    options = grain.MultiprocessingOptions(workers, per_worker)
    return elements.mp_prefetch(options, worker_init_fn=functools.partial(_attend, os.getpid()))


def _attend(program: int, worker: int, workers: int) -> None:
    """End a worker process with its program, and only then: a signal may reach both, and the program ends its workers."""

    def watch():
        while os.getppid() == program:
            time.sleep(1)
        os._exit(1)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def _joined(batch: Mapping) -> dict:
    """Blocks `[N, block, …]` as rows `[N * block, …]`."""
    rows = lambda x: x.reshape(-1, *x.shape[2:])
    return {part: {name: rows(x) for name, x in arrays.items()} for part, arrays in batch.items()}


def turns(weights: Sequence[int]) -> list[int]:
    """The order of data sets within one round: data set d appears `weights[d]` times, evenly spread."""
    places = [((i + 0.5) / w, d) for d, w in enumerate(weights) for i in range(w)]
    return [d for _, d in sorted(places)]


def train_batches(
    datasets: Sequence[Dataset],
    weights: Sequence[int],
    inputs: Inputs,
    *,
    blocks: Sequence[int] = (),
    batch_size: int,
    seed: int,
    start: int = 0,
    process: int = 0,
    processes: int = 1,
    changes: Changes = OF_DRAWINGS,
    drop_last: bool = False,
    reshuffle: bool = True,
    workers: int = 0,
    strict: bool = False,
) -> Iterator[dict]:
    """Endless batches from step `start`: `{"query": {…}, "item": {…}, "rows": {…}}` with this process's rows.

    An example that cannot be read is replaced, with its whole block, by another (`substitutes`). `rows` tells by
    int32 `[b]` arrays: the number of the `set`, which of its rows the order `asked` for and which are `shown`.

    Args:
      datasets: of raw pairs `{"query": …, "item": …, "group": int}`; `texts` offers several wordings, one is drawn. A row
        may also have `draw`, a function of a numpy generator that gives the pair that a step sees.
      weights: batches of each data set per round (`turns`).
      blocks: per data set, how many of its consecutive rows stay together in a batch; empty: one each.
      batch_size: rows of the global batch; must divide by `processes` times every block.
      changes: what happens to pictures and wordings.
      drop_last, reshuffle: as the fields of `cir_jax.config.Train`.
      workers: processes that prepare the examples of each data set, 0 for threads; close the iterator to end them.
      strict: an example that cannot be read is an error.

    Raises:
      ValueError: sizes that do not fit each other; an example that cannot be read, and none of ten in its place.
      ValueError, OSError: with `strict`, whatever is wrong with the first example that cannot be read.
    """
    blocks = blocks or [1] * len(datasets)
    if min(blocks) < 1 or any(batch_size % (processes * block) for block in blocks):
        raise ValueError(
            f"batch_size {batch_size} does not divide into blocks of {list(blocks)} rows for each of "
            f"{processes} processes"
        )
    for dataset, block in zip(datasets, blocks):
        least = batch_size if drop_last else block
        if len(dataset) // block * block < least:
            what = "batch" if drop_last else "block"
            raise ValueError(f"a data set of {len(dataset)} rows has no {what} of {least}")
    if min(weights) < 1:
        raise ValueError(f"data weights {list(weights)}: each must be at least 1")
    order = turns(weights)
    rounds, within = divmod(start, len(order))
    done = [rounds * w + order[:within].count(d) for d, w in enumerate(weights)]
    streams = [
        _stream(
            _Prepared(dataset, number, blocks[number], inputs, changes, strict),
            seed=seed + number,
            batch_size=batch_size,
            start=done[number],
            process=process,
            processes=processes,
            drop_last=drop_last,
            reshuffle=reshuffle,
            workers=workers,
        )
        for number, dataset in enumerate(datasets)
    ]
    step = start
    with contextlib.ExitStack() as opened:
        for stream in streams:
            opened.callback(stream.close)
        while True:
            yield next(streams[order[step % len(order)]])
            step += 1


# ---- evaluation ----

CHUNK = 16  # rows that one thread prepares at a time


class _Chunks:
    """Rows of a data set, some at a time: `(rows, arrays)` of each run of examples with the same parts."""

    def __init__(self, examples: Dataset, rows: Sequence[int], inputs: Inputs, size: int):
        self.examples, self.rows, self.inputs, self.size = examples, rows, inputs, size

    def __len__(self) -> int:
        return -(-len(self.rows) // self.size)

    def __getitem__(self, number: int) -> list[tuple[list[int], dict]]:
        rows = self.rows[number * self.size : (number + 1) * self.size]
        runs = []
        for row in rows:
            example = self.examples[min(row, len(self.examples) - 1)]
            if not runs or runs[-1][1][0].keys() != example.keys():
                runs.append(([], []))
            runs[-1][0].append(row)
            runs[-1][1].append(example)
        return [(rows, prepare_batch(examples, self.inputs)) for rows, examples in runs]


def eval_batches(
    examples: Dataset,
    inputs: Inputs,
    batch_size: int,
    *,
    start: int = 0,
    process: int = 0,
    processes: int = 1,
    pad: bool = True,
    workers: int = 0,
) -> Iterator[dict]:
    """The batches of a data set in its order, from batch `start` on: `row` `[b]` int32 and the parts of the examples.

    Args:
      examples: queries or items with some of `image` and `text`, and nothing else.
      batch_size: rows of the global batch; this process gets `b = batch_size / processes` of them, those after the rows
        of the process before it.
      pad: fill the last batch, with the last example, whose `row` is then -1, so that all batches have one shape; every
        process has the same number of batches. Then all examples must have the same parts. Otherwise a batch ends
        where the parts change.
      workers: processes that prepare the examples, 0 for threads; close the iterator to end them.

    Raises:
      ValueError: no examples, a batch that the processes cannot share, parts that change.
    """
    count, share = len(examples), batch_size // processes
    if not count or batch_size % processes or batch_size < 1:
        raise ValueError(
            f"{count} examples in batches of {batch_size} for {processes} processes; expected at least one, and a batch "
            "that divides by the processes"
        )
    if not pad and processes > 1:
        raise ValueError("batches that several processes share are padded")
    firsts = range(start * batch_size + process * share, count + process * share, batch_size)
    rows = [row for first in firsts for row in range(first, first + share)]
    if not pad:
        rows = range(start * batch_size, count)
    chunks = grain.MapDataset.source(_Chunks(examples, rows, inputs, min(CHUNK, share)))
    with contextlib.closing(iter(_ahead(chunks, 2 + 2 * share // CHUNK, workers))) as stream:
        for rows, batch in _batches((run for runs in stream for run in runs), share):
            if pad and len(rows) < share:
                raise ValueError(f"the examples {rows[0]} to {rows[-1] + 1} differ in their parts")
            numbers = np.array([row if row < count else -1 for row in rows], np.int32)
            yield {"row": numbers, **batch}


def _batches(runs: Iterator[tuple[list[int], dict]], size: int) -> Iterator[tuple[list[int], dict]]:
    """Runs of rows put together, and cut, to batches of `size`; one ends earlier where the parts change."""
    waiting, arrays = [], []
    for rows, values in runs:
        while rows:
            if waiting and (len(waiting) == size or arrays[0].keys() != values.keys()):
                yield waiting, _concatenated(arrays)
                waiting, arrays = [], []
            room = size - len(waiting)
            waiting = [*waiting, *rows[:room]]
            arrays.append({name: x[:room] for name, x in values.items()})
            rows, values = rows[room:], {name: x[room:] for name, x in values.items()}
    if waiting:
        yield waiting, _concatenated(arrays)


def _concatenated(parts: Sequence[Mapping]) -> dict:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
