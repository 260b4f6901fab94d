"""SIGINT and SIGTERM: where they unwind a program, and where they have to wait."""

import contextlib
import signal


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


class _Stops:
    """SIGINT and SIGTERM while a command runs: the first unwinds it, the next of either takes its default action."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.held, self.pending = 0, None

    def __call__(self, number, frame):
        for each in self.NUMBERS:
            signal.signal(each, signal.SIG_DFL)
        self.pending = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        self.raise_pending()

    def raise_pending(self):
        if self.pending and not self.held:
            pending, self.pending = self.pending, None
            raise pending


_stops = _Stops()


@contextlib.contextmanager
def stoppable():
    """A block that the first SIGINT or SIGTERM unwinds, as Ctrl-C does, so that temporary files are removed."""
    before = [signal.signal(number, _stops) for number in _Stops.NUMBERS]
    try:
        yield
    finally:
        for number, handler in zip(_Stops.NUMBERS, before):
            signal.signal(number, handler)


@contextlib.contextmanager
def unstopped():
    """A block that a signal does not break up: it is answered when the block has ended."""
    _stops.held += 1
    try:
        yield
    finally:
        _stops.held -= 1
    _stops.raise_pending()
