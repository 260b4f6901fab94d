"""A trace of some steps, for TensorBoard's or Perfetto's viewer."""

import re
from pathlib import Path


class Profile:
    """Traces steps, both included, into a folder."""

    def __init__(self, folder: Path, span: str):
        """`span` is `10:20`, or empty for no trace."""
        self.folder, self.running = folder, False
        self.first, self.last = steps_of(span)

    def before(self, step: int) -> None:
        """Begin, if this step is the first to be traced, or a run goes on among those."""
        if not self.running and self.first <= step <= self.last:
            import jax

            jax.profiler.start_trace(self.folder)
            self.running = True

    def after(self, step: int, state) -> None:
        """End, if this step is the last to be traced, as soon as the devices have finished it."""
        if self.running and step == self.last:
            import jax

            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Write the trace, also where the run ends before the last of its steps."""
        if self.running:
            import jax

            self.running = False
            jax.profiler.stop_trace()


def steps_of(span: str) -> tuple[int, int]:
    """(10, 20) of "10:20", (0, 0) of "".

    Raises:
      ValueError: it is something else.
    """
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", span) if span else ("", 0, 0)
    if not found or int(found[1]) > int(found[2]) or (span and not int(found[1])):
        raise ValueError(
            f"--profile is {span!r}; expected two steps from 1 on, as 10:20, both of which are traced"
        )
    return int(found[1]), int(found[2])
