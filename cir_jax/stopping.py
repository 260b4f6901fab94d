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
        self.raised = None

    def __call__(self, number, frame):
        for each in self.NUMBERS:
            signal.signal(each, signal.SIG_DFL)
        self.asked = self.pending = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        self.raise_pending()

    def raise_pending(self, *_):
        if not self.pending or self.held:
            return
        self.look_again()
        if importing():
            return
        self.raised, self.pending = self.pending, None
        raise self.raised

    def tick(self, *_):
        """Raise what waits for an import; and again what a library has caught and dropped."""
        if self.raised and not self.pending:
            if answered():
                self.look_again()
                return
            self.pending = self.raised
        self.raise_pending()

    def look_again(self):
        signal.signal(signal.SIGALRM, self.tick)
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
    return any(getattr(_spec(module), "_initializing", False) for module in [*sys.modules.values()])


def _spec(module):
    """The spec of a module; without its own lookup, which of lazy ones would begin to load them."""
    try:
        return object.__getattribute__(module, "__dict__").get("__spec__")
    except AttributeError:  # whatever else a library has put there
        return None


def answered() -> bool:
    """Whether a stop is on its way: the interrupted code unwinds because of it."""
    error = sys.exception()
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


@contextlib.contextmanager
def stoppable():
    """A block that the first SIGINT or SIGTERM unwinds, as Ctrl-C does, so that temporary files are removed."""
    _stops.asked = _stops.raised = None
    before = [signal.signal(number, _stops) for number in _Stops.NUMBERS]
    hook, sys.unraisablehook = sys.unraisablehook, _stops.unraisable
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
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
