"""What a run prints and writes while it trains."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from cir_jax import files, processes


class Log:
    """JSON lines in a file and one readable line per record on stdout, from process 0 only.

    Attributes:
      evaluated: whether step `first` was evaluated before the run was interrupted; the same in every process.
    """

    def __init__(self, path: Path, first: int = 0, also: Callable | None = None):
        """Go on behind step `first`; what an interrupted run logged after it will be logged again.

        `also` gets every record too, as `also(step, values)` (TensorBoard).
        """
        self.path, self.also, self.start = path, also, time.monotonic()
        before = list(records_until(path, first)) if path.exists() else []
        self.evaluated = bool(before) and before[-1]["step"] == first and "loss" not in before[-1]
        if processes.first() and path.exists():
            write_records(path, before)

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Write one record."""
        if not processes.first():
            return
        values = {name: float(f"{float(value):.6g}") for name, value in values.items()}
        record = {"step": step, "seconds": round(time.monotonic() - self.start, 1), **values}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print("  ".join(f"{name} {value:.5g}" for name, value in record.items()), flush=True)
        if self.also:
            self.also(step, values)


def records_until(path: Path, step: int) -> Iterator[dict]:
    """The records of a file of JSON lines up to a step; a line that was cut off is none."""
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if record["step"] <= step:
                yield record


def write_records(path: Path, records: list[dict]) -> None:
    """Replace a file of JSON lines."""
    with files.write_atomically(path) as part:
        part.write_text("".join(json.dumps(record) + "\n" for record in records))


@contextlib.contextmanager
def event_file(folder: Path, first: int = 0) -> Iterator[Callable]:
    """Yield `write(step, values)`, which adds scalars to an event file of TensorBoard's in `folder`.

    TensorBoard forgets what an interrupted run wrote behind step `first`.

    Raises:
      ModuleNotFoundError: the extra [tensorboard] is not installed.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"--tensorboard needs the package tensorboard ({error}); "
            "install it with: pip install 'cir_jax[tensorboard]'"
        ) from None

    writer = EventFileWriter(str(folder))
    started = SessionLog(status=SessionLog.START)
    writer.add_event(Event(wall_time=time.time(), step=first + 1, session_log=started))

    def write(step: int, values: Mapping[str, float]) -> None:
        scalars = [Summary.Value(tag=name, simple_value=x) for name, x in values.items()]
        writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))
        writer.flush()

    try:
        yield write
    finally:
        writer.close()
