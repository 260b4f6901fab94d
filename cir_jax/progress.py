"""Progress with an estimate: a bar on a terminal, plain lines with numbers elsewhere. Always on stderr."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yield `advance(n)`, to be called when n more of `total` are done; `done` were finished before."""
    show = _bar if sys.stderr.isatty() else _lines
    with show(what, total, done) as advance:
        yield advance


@contextlib.contextmanager
def _bar(what, total, done):
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=total, completed=done)
        yield lambda n: bars.advance(task, n)


@contextlib.contextmanager
def _lines(what, total, done):
    start = last = time.monotonic()
    first = done

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last < SECONDS_BETWEEN_LINES:
            return
        last = now
        left = (now - start) / max(1, done - first) * (total - done)
        print(f"{what}: {done} of {total}, about {left:.0f} s left", file=sys.stderr, flush=True)

    yield advance
