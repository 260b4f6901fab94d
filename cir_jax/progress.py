"""What people see while a command works: progress with an estimate, and names made fit to print.

Progress is a bar on a terminal, plain lines with numbers elsewhere, and always on stderr.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from cir_jax import processes

SECONDS_BETWEEN_LINES = 10.0

JOINERS = "\u200c\u200d"  # not printable by Python's rule, but part of many emoji and scripts


def printable(text: str) -> str:
    """`text` on one line, with what a terminal would obey or cannot show (controls, stray bytes) as escapes."""
    show = lambda c: c if c.isprintable() or c in JOINERS else c.encode("unicode_escape").decode()
    return "".join(map(show, text))


@contextlib.contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yield `advance(n)`, to be called when n more of `total` are done; `done` were finished before.

    Of several processes, the first shows it.
    """
    show = _bar if sys.stderr.isatty() else _lines
    with (show if processes.first() else _nothing)(what, total, done) as advance:
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


@contextlib.contextmanager
def _nothing(what, total, done):
    yield lambda n: None
