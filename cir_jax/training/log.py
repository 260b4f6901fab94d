"""What a run prints and writes while it trains."""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from cir_jax import files, processes


class Log:
    """JSON lines in a file and one readable line per record on stdout, from process 0 only."""

    def __init__(self, path: Path, rows_per_step: int, first: int = 0):
        """Go on behind step `first`; what an interrupted run logged after it will be logged again."""
        self.path, self.rows_per_step = path, rows_per_step
        self.start, self.last = time.monotonic(), None
        if processes.first() and path.exists():
            with files.write_atomically(path) as part:
                part.write_text("".join(_records_until(path, first)))

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Write one record; a record with a loss also gets the rows per second since the one before."""
        if not processes.first():
            return
        now = time.monotonic()
        record = {"step": step, "seconds": round(now - self.start, 1)}
        record |= {name: float(f"{float(value):.6g}") for name, value in values.items()}
        if "loss" in values:
            if self.last:
                record["rows_per_second"] = round(
                    (step - self.last[0]) * self.rows_per_step / (now - self.last[1]), 1
                )
            self.last = (step, now)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print("  ".join(f"{name} {value:.5g}" for name, value in record.items()), flush=True)


def _records_until(path: Path, step: int) -> Iterator[str]:
    """The lines of a log up to a step; a line that was cut off is none."""
    for line in path.read_text().splitlines(keepends=True):
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= step:
                yield line


def check_finite(metrics: Mapping, step: int) -> Mapping:
    """The metrics, or an error if the loss is NaN or infinite."""
    if not abs(float(metrics["loss"])) < float("inf"):
        raise FloatingPointError(
            f"the loss is {metrics['loss']} at step {step}; lower optim.lr or raise optim.warmup"
        )
    return metrics
