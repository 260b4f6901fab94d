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
            self.look_again()
            return
        pending, self.pending = self.pending, None
        raise pending

    def look_again(self):
        signal.signal(signal.SIGALRM, self.raise_pending)
        signal.setitimer(signal.ITIMER_REAL, AGAIN)

    def unraisable(self, lost):
        """A stop that Python has dropped, because a finalizer or a callback of the collector was running, comes again."""
        if lost.exc_type is not None and issubclass(lost.exc_type, KeyboardInterrupt):
            self.pending = lost.exc_type
            self.look_again()
        else:
            sys.__unraisablehook__(lost)


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
    hook, sys.unraisablehook = sys.unraisablehook, _stops.unraisable
    try:
        yield
    finally:
        sys.unraisablehook = hook
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
