"""SIGINT and SIGTERM: where they unwind a program, and where they have to wait."""

import contextlib
import os
import signal
import sys

AGAIN = 0.05  # seconds until a stop is looked at again


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


class _Stops:
    """SIGINT and SIGTERM while a command runs: the first unwinds it, the next of either takes its default action."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.running, self.held, self.asked, self.together = False, 0, None, False

    def __call__(self, number, frame):
        # Together, SIGTERM is not ours: it is what tells the other processes.
        for each in (number,) if self.together else self.NUMBERS:
            signal.signal(each, signal.SIG_DFL)
        self.asked = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        if self.together:
            os.kill(os.getpid(), signal.SIGTERM)
        self.look()

    def look(self, *_):
        """Raise what was asked for, unless it has to wait or is on its way; and look again until the command has ended.

        A library may catch a stop and drop it, and so does Python itself in finalizers and callbacks of the collector.
        """
        if not (self.running and self.asked):
            return
        signal.signal(signal.SIGALRM, self.look)
        signal.setitimer(signal.ITIMER_REAL, AGAIN)
        if not (self.held or importing() or answered()):
            raise self.asked

    def unraisable(self, lost):
        """Nothing is said of a stop that Python has dropped: it comes again."""
        if lost.exc_type is None or not issubclass(lost.exc_type, KeyboardInterrupt):
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
    _stops.running, _stops.asked = True, None
    before = [signal.signal(number, _stops) for number in _Stops.NUMBERS]
    hook, sys.unraisablehook = sys.unraisablehook, _stops.unraisable
    try:
        yield
    finally:
        _stops.running = False
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
    _stops.look()


# ---- several processes: all of them stop after the same step ----


@contextlib.contextmanager
def together():
    """A block in which a stop of one of several processes waits until all stop (`stop_together`); alone, it does not.

    The signal that `jax.distributed` passes on is SIGTERM, for which it has put its own handler in the place of ours.
    """
    import jax

    if jax.process_count() == 1:
        yield
        return
    with unstopped():
        _stops.together = True
        try:
            yield
        finally:
            _stops.together = False


def stop_together(step: int) -> None:
    """Raise the stop that any of several processes was asked for, in all of them after the same step.

    Called by every process after each of its steps.
    """
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
        for each in _Stops.NUMBERS:  # the next signal ends the process at once
            signal.signal(each, signal.SIG_DFL)
        _stops.asked = _stops.asked or Terminated
        raise _stops.asked
