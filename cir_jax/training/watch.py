"""What the steps of a run cost and show, fetched from the devices only when it is asked for."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from cir_jax import checkpoint, files, flops, memory, processes
from cir_jax.config import Experiment
from cir_jax.data.benchmark import Dataset
from cir_jax.data.pipeline import fault
from cir_jax.progress import printable
from cir_jax.training import optim
from cir_jax.training.log import records_until, write_records
from cir_jax.training.step import make_step

UNREADABLE = "unreadable.jsonl"
AHEAD = 2  # steps that are under way on the devices at most: more would only hold their batches in memory


class Step(NamedTuple):
    """One step: metrics on the devices, and the rows of its batch that this process has, int32 `[b]` each."""

    number: int
    metrics: Mapping[str, jax.Array]
    rows: Mapping[str, np.ndarray]


@dataclass
class Watch:
    """The steps since the last look.

    Attributes:
      first: the step behind which the run begins; what was noted after it is noted again.
      operations: floating-point operations of a step with this batch, None where nobody asks.
    """

    config: Experiment
    workdir: Path
    datasets: Sequence[Dataset]
    first: int = 0
    operations: Callable[[Mapping], int] | None = None
    steps: list[Step] = field(default_factory=list)
    last: Mapping[str, float] = field(default_factory=dict)
    unreadable: dict[tuple[int, int], dict] = field(default_factory=dict)

    def __post_init__(self):
        self.restart(self.first)
        path = self.workdir / UNREADABLE
        if path.exists():
            listed = list(records_until(path, self.first))
            self.unreadable = {(found["set"], found["row"]): found for found in listed}
            if processes.first():
                write_records(path, listed)

    def restart(self, step: int) -> None:
        """Measure from here on: what lies before (an evaluation) is none of the steps' time."""
        self.since, self.start = step, time.monotonic()
        self.waited, self.computed = 0.0, 0

    def next(self, batches: Iterator[dict]) -> tuple[dict, dict]:
        """The next batch and its rows, when no more than `AHEAD` steps are under way."""
        if len(self.steps) >= AHEAD:
            jax.block_until_ready(self.steps[-AHEAD].metrics["loss"])
        start = time.monotonic()
        batch = next(batches)
        if not self.steps or self.steps[-1].metrics["loss"].is_ready():  # the devices are idle
            self.waited += time.monotonic() - start
        rows = batch.pop("rows")
        if self.operations:
            self.computed += self.operations(batch)
        return batch, rows

    def add(self, step: int, metrics: Mapping, rows: Mapping) -> None:
        """Remember a step that is under way."""
        self.steps.append(Step(step, metrics, rows))
        if step == self.first + 1:  # the time until here went into compiling
            jax.block_until_ready(metrics["loss"])
            self.restart(step)

    def look(self) -> Mapping[str, float]:
        """The metrics of the last step, when all steps since the last look were sound.

        Raises:
          FloatingPointError: a loss or a gradient is not finite; the rows of the batch are in a file that it names.
          ValueError: more examples cannot be read than `train.unreadable` allows.
        """
        if self.steps:
            shown = jax.device_get([step.metrics for step in self.steps])
            rows = _of_all_processes([step.rows for step in self.steps])
            for step, metrics, batch in zip(self.steps, shown, rows):
                self._refuse_non_finite(step.number, metrics, batch)
                self._list_unreadable(step.number, batch)
            self.last, self.steps = shown[-1], []
        return self.last

    def values(self, step: int) -> dict[str, float]:
        """What the log says behind step `step`, about all steps since it was asked last.

        `rows_per_second`, without the first step, which compiles; `waiting_for_data`, the share of the time in which the
        devices had nothing to do because the next batch was not there; `utilisation`, the operations of the model by
        those that the devices can do at most; memory (`memory.peaks`); and how many examples could not be read so far.
        """
        values = dict(self.look())
        seconds, steps = time.monotonic() - self.start, step - self.since
        if steps:
            values["rows_per_second"] = steps * self.config.train.batch_size / seconds
            values["waiting_for_data"] = self.waited / seconds
        if steps and self.operations:
            values["utilisation"] = self.computed / seconds / flops.peak()
        values |= memory.peaks()
        if self.unreadable:
            values["unreadable"] = len(self.unreadable)
        self.restart(step)
        return values

    def _refuse_non_finite(self, step: int, metrics: Mapping, rows: Mapping) -> None:
        wrong = {
            n: float(metrics[n]) for n in ("loss", "grad_norm") if not math.isfinite(metrics[n])
        }
        if not wrong:
            return
        path = self.workdir / f"not-finite-{step:07d}.json"
        if processes.first():
            batch = [
                {"set": self._name(number), "row": int(row)} | _told(self.datasets[number][row])
                for number, row in zip(rows["set"], rows["shown"])
            ]
            told = {name: str(value) for name, value in wrong.items()}
            files.write_json(path, {"step": step, **told, "batch": batch})
        listed = " and ".join(f"the {name} is {value}" for name, value in wrong.items())
        raise FloatingPointError(
            f"{listed} at step {step}; its batch is in {path.absolute()}. Lower optim.lr, raise optim.warmup or mend "
            "the data, and start again: the run goes on from its last checkpoint, before this step"
        )

    def _list_unreadable(self, step: int, rows: Mapping) -> None:
        """List the rows that others stand in for, with the reasons; end a run that has too many of them."""
        replaced = rows["asked"] != rows["shown"]
        for number, row, shown in zip(
            *(rows[n][replaced].tolist() for n in ("set", "asked", "shown"))
        ):
            if (number, row) in self.unreadable:
                continue
            reason = fault(self.datasets[number], row, self.config.method.inputs)
            if reason is None and self.config.data[number].block > 1:
                continue  # another row of its block
            reason = reason or "could be read when it was tried again"
            found = {"step": step, "set": number, "row": row, "shown": shown, "reason": reason}
            self.unreadable[number, row] = found
            if processes.first():
                with (self.workdir / UNREADABLE).open("a") as file:
                    file.write(json.dumps(found) + "\n")
                told = f"row {row} of {self._name(number)} cannot be read, row {shown} stands in"
                print(printable(f"{told}: {reason}"), file=sys.stderr)
            self._refuse_many(number, reason)

    def _refuse_many(self, number: int, reason: str) -> None:
        count = sum(one == number for one, _ in self.unreadable)
        most, rows = self.config.train.unreadable, len(self.datasets[number])
        if count > most * rows:
            raise ValueError(
                f"{count} of the {rows} rows of {self._name(number)} cannot be read, more than train.unreadable "
                f"{most} allows; they are in {(self.workdir / UNREADABLE).absolute()}, the last: {reason}"
            )

    def _name(self, number: int) -> str:
        return self.config.data[number].root or self.config.data[number].name


def _of_all_processes(steps: list[Mapping[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """The rows of whole batches, in every process."""
    names = list(steps[0])
    mine = np.array([[step[name] for name in names] for step in steps])
    parts = [part["rows"] for part in processes.gather({"rows": mine})]
    return [dict(zip(names, step)) for step in np.concatenate(parts, axis=-1)]


def _told(value) -> object:
    """A raw example as JSON: texts, numbers and paths as they are, of pictures in memory their size."""
    if isinstance(value, Mapping):
        return {name: _told(part) for name, part in value.items() if not callable(part)}
    if isinstance(value, list | tuple):
        return [_told(part) for part in value]
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, np.ndarray):
        return f"array {value.dtype} {value.shape}"
    return value if isinstance(value, int | float) else str(value)


def operations(config: Experiment, abstract) -> Callable[[Mapping], int] | None:
    """A function from a batch to the floating-point operations of a step of the model (`flops.count`).

    Without rematerialisation and chunks, whose work is none of the model's. None where the devices' peak is not known.
    """
    if not flops.peak():
        return None
    graph, _ = checkpoint.abstract_params(replace(config.method, remat=False))
    tx = optim.optimizer(config.optim, config.train.steps)
    step, known = make_step(graph, tx, config.train.seed), {}

    def count(batch: Mapping) -> int:
        whole = lambda x: (len(x) * jax.process_count(), *x.shape[1:])  # of all processes
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(whole(x), x.dtype), batch)
        if (key := str(shapes)) not in known:
            known[key] = flops.count(step, abstract, shapes, np.int32(0))
        return known[key]

    return count
