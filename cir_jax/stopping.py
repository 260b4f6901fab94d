"""SIGINT and SIGTERM: where they unwind a program, and where they have to wait."""

import contextlib
import signal
import sys

AGAIN = 0.05  # seconds until a signal that met an import is looked at again


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


class _Stops:
    """SIGINT and SIGTERM while a command runs: the first unwinds it, the next of either takes its default action."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.held, self.pending, self.asked = 0, None, None

    def __call__(self, number, frame):
        for each in self.NUMBERS:
            signal.signal(each, signal.SIG_DFL)
        self.asked = self.pending = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        self.raise_pending()

    def raise_pending(self, *_):
        if not self.pending or self.held:
            return
        if importing():
            signal.signal(signal.SIGALRM, self.raise_pending)
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
            return
        pending, self.pending = self.pending, None
        raise pending


_stops = _Stops()


def asked() -> type[KeyboardInterrupt] | None:
    """What a signal has asked for, answered or not."""
    return _stops.asked


def importing() -> bool:
    """Whether a module is being imported: libraries crash when that is broken up."""
    specs = [getattr(module, "__spec__", None) for module in list(sys.modules.values())]
    return any(getattr(spec, "_initializing", False) for spec in specs)


@contextlib.contextmanager
def stoppable():
    """A block that the first SIGINT or SIGTERM unwinds, as Ctrl-C does, so that temporary files are removed."""
    _stops.asked = None
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
