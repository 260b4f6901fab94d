"""Training batches; the only file that imports Grain.

The step number is the whole state: batch `s` depends on the seed and on `s` alone, never on how many processes or
threads made it, so a run resumes exactly at any step.
"""

from collections.abc import Iterator, Mapping, Sequence

import grain
import numpy as np

from cir_jax.data.augment import augment, drop_words
from cir_jax.data.benchmark import Dataset
from cir_jax.data.inputs import Inputs, prepare_batch


def _example(raw: Mapping, rng: np.random.Generator, inputs: Inputs, augmented: bool) -> dict:
    """Arrays of one training pair, without a batch axis."""
    example = {}
    for part in ("query", "item"):
        values = dict(raw[part])
        if "texts" in values:
            texts = values.pop("texts")
            values["text"] = texts[rng.integers(len(texts))]
            if augmented:
                values["text"] = drop_words(values["text"], rng)
        if augmented and "image" in values:
            values["image"] = augment(values["image"], rng)
        example[part] = {k: v[0] for k, v in prepare_batch([values], inputs).items()}
    if "group" in raw:
        example["item"]["group"] = np.int32(raw["group"])
    return example


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
    dataset: Dataset, inputs: Inputs, *, seed, batch_size, start, process, processes, augmented
):
    """Batches of one data set, from its own batch number `start` on."""
    transform = lambda raw, rng: _example(raw, rng, inputs, augmented)
    # The transform belongs to the endless data set: its random numbers are the row's, whoever computes it.
    rows = grain.MapDataset.source(dataset).seed(seed).shuffle().repeat(None).random_map(transform)
    part = grain.MapDataset.source(_Part(rows, start, batch_size, process, processes))
    options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=256)
    return iter(part.to_iter_dataset(options).batch(batch_size // processes, drop_remainder=True))


def turns(weights: Sequence[int]) -> list[int]:
    """The order of data sets within one round: data set d appears `weights[d]` times, evenly spread."""
    places = [((i + 0.5) / w, d) for d, w in enumerate(weights) for i in range(w)]
    return [d for _, d in sorted(places)]


def train_batches(
    datasets: Sequence[Dataset],
    weights: Sequence[int],
    inputs: Inputs,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    process: int = 0,
    processes: int = 1,
    augmented: bool = True,
) -> Iterator[dict]:
    """Endless batches from step `start`: `{"query": {…}, "item": {…}}` with this process's rows.

    Args:
      datasets: of raw pairs `{"query": …, "item": …, "group": int}`; `texts` offers several wordings, one is drawn.
      weights: batches of each data set per round (`turns`).
      batch_size: rows of the global batch; must divide by `processes`.
    """
    if batch_size % processes:
        raise ValueError(f"batch_size {batch_size} does not divide by {processes} processes")
    if min(weights) < 1:
        raise ValueError(f"data weights {list(weights)}: each must be at least 1")
    order = turns(weights)
    rounds, within = divmod(start, len(order))
    done = [rounds * w + order[:within].count(d) for d, w in enumerate(weights)]
    streams = [
        _stream(
            dataset,
            inputs,
            seed=seed + number,
            batch_size=batch_size,
            start=done[number],
            process=process,
            processes=processes,
            augmented=augmented,
        )
        for number, dataset in enumerate(datasets)
    ]
    step = start
    while True:
        yield next(streams[order[step % len(order)]])
        step += 1
