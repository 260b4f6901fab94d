"""Training batches; the only file that imports Grain.

The step number is the whole state: batch `s` depends on the seed and on `s` alone, never on how many processes or
threads made it, so a run resumes exactly at any step.
"""

from collections.abc import Iterator, Mapping, Sequence

import grain
import numpy as np

from cir_jax.data.augment import augment, drop_words
from cir_jax.data.benchmark import Dataset
from cir_jax.data.images import crop
from cir_jax.data.inputs import Inputs, prepare_batch


def _examples(
    raws: Sequence[Mapping], rng: np.random.Generator, inputs: Inputs, augmented: bool
) -> dict:
    """Arrays of training pairs."""
    pairs = [
        {part: _drawn(raw[part], rng, inputs, augmented) for part in ("query", "item")}
        for raw in raws
    ]
    batch = {part: prepare_batch([pair[part] for pair in pairs], inputs) for part in pairs[0]}
    if "group" in raws[0]:
        batch["item"]["group"] = np.array([raw["group"] for raw in raws], np.int32)
    return batch


def _drawn(side: Mapping, rng: np.random.Generator, inputs: Inputs, augmented: bool) -> dict:
    """One side of a pair as this step shows it: one of its wordings, its picture changed a little."""
    values = dict(side)
    if "texts" in values:
        texts = values.pop("texts")
        values["text"] = texts[rng.integers(len(texts))]
        if augmented:
            values["text"] = drop_words(values["text"], rng)
    if augmented and "image" in values:
        image = values["image"]
        # A file is decoded and cut first: what would be cut off later shall not be computed.
        pixels = image if isinstance(image, np.ndarray) else crop(image, inputs.image)
        values["image"] = augment(pixels, rng)
    return values


class _Blocks:
    """A data set as runs of consecutive rows; an incomplete last run is left out."""

    def __init__(self, dataset: Dataset, size: int):
        self.dataset, self.size = dataset, size

    def __len__(self) -> int:
        return len(self.dataset) // self.size

    def __getitem__(self, number: int) -> list[Mapping]:
        return [self.dataset[number * self.size + row] for row in range(self.size)]


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
    dataset: Dataset,
    block,
    inputs: Inputs,
    *,
    seed,
    batch_size,
    start,
    process,
    processes,
    augmented,
):
    """Batches of one data set, from its own batch number `start` on."""
    transform = lambda raws, rng: _examples(raws, rng, inputs, augmented)
    blocks = grain.MapDataset.source(_Blocks(dataset, block)).seed(seed)
    # The transform belongs to the endless data set: its random numbers are the block's, whoever computes it.
    blocks = blocks.shuffle().repeat(None).random_map(transform)
    size = batch_size // block
    part = grain.MapDataset.source(_Part(blocks, start, size, process, processes))
    options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=max(2, 256 // block))
    batches = part.to_iter_dataset(options).batch(size // processes, drop_remainder=True)
    return iter(batches.map(_joined))


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
    augmented: bool = True,
) -> Iterator[dict]:
    """Endless batches from step `start`: `{"query": {…}, "item": {…}}` with this process's rows.

    Args:
      datasets: of raw pairs `{"query": …, "item": …, "group": int}`; `texts` offers several wordings, one is drawn.
      weights: batches of each data set per round (`turns`).
      blocks: per data set, how many of its consecutive rows stay together in a batch; empty: one each.
      batch_size: rows of the global batch; must divide by `processes` times every block.
    """
    blocks = blocks or [1] * len(datasets)
    if min(blocks) < 1 or any(batch_size % (processes * block) for block in blocks):
        raise ValueError(
            f"batch_size {batch_size} does not divide into blocks of {list(blocks)} rows for each of "
            f"{processes} processes"
        )
    for dataset, block in zip(datasets, blocks):
        if len(dataset) < block:
            raise ValueError(f"a data set of {len(dataset)} rows has no block of {block}")
    if min(weights) < 1:
        raise ValueError(f"data weights {list(weights)}: each must be at least 1")
    order = turns(weights)
    rounds, within = divmod(start, len(order))
    done = [rounds * w + order[:within].count(d) for d, w in enumerate(weights)]
    streams = [
        _stream(
            dataset,
            blocks[number],
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
