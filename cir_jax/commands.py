"""The commands, and what they have in common: how they start, how they fail and how they are stopped."""

import importlib
import os
import sys
import warnings
from dataclasses import dataclass

from cir_jax.stopping import Terminated, stoppable

COMMANDS = {
    "eval": "evaluate retrieval on benchmarks: table, report with pictures, results.json, ranks",
    "train": "train a model from a config",
    "convert": "turn a checkpoint of PyTorch or Hugging Face into one of ours, and back",
    "embed": "turn a gallery of pictures into vectors on disk",
    "index": "build a search index from vectors",
    "search": "search an index with a text, a picture or a document, in one stage or two",
}
DISTRIBUTED = ("train",)
# Seen by a shell as after the default action of the signal: 128 and its number.
INTERRUPTED, TERMINATED, BROKEN_PIPE = 130, 143, 141


@dataclass(frozen=True, kw_only=True)
class Common:
    """Options of every command that computes."""

    cache: str | None = None
    """folder that keeps compiled programs for the next start (default ~/.cache/cir_jax); `none` keeps none"""


@dataclass(frozen=True, kw_only=True)
class Limited(Common):
    """Options of the commands that go through a collection."""

    limit: int | None = None
    """only the first so many, for a quick try"""

    def __post_init__(self):
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit is {self.limit}; it must be at least 1")


def start(name: str) -> None:
    """Run one command; a foreseeable failure is one error on stderr and a non-zero exit code.

    `CIR_JAX_TRACEBACK=1` in the environment shows where an error came from. SIGINT and SIGTERM end the command in
    order with the exit codes 130 and 143; a second one ends it at once.
    """
    if name not in DISTRIBUTED and int(os.environ.get("CIR_JAX_PROCESSES", 1)) > 1:
        sys.exit(
            f"error: {name} runs as one process; several compute together in {', '.join(DISTRIBUTED)}"
        )
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # names of files may hold any bytes
    warnings.filterwarnings("ignore", message="Image size .* could be decompression bomb")
    try:
        with stoppable():
            importlib.import_module(f"cir_jax.{name}").main()
            sys.stdout.flush()
    except KeyboardInterrupt as stop:
        terminated = isinstance(stop, Terminated)
        word = "terminated" if terminated else "interrupted"
        print(f"{word}; finished parts are kept", file=sys.stderr)
        sys.exit(TERMINATED if terminated else INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output (head, a pager) has left; a second failure at exit is avoided.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)
    except (ValueError, OSError, RuntimeError, ArithmeticError, MemoryError) as error:
        if os.environ.get("CIR_JAX_TRACEBACK"):
            raise
        print(f"error: {explained(error)}", file=sys.stderr)
        sys.exit(1)


def explained(error: BaseException) -> str:
    """What an error says to a person; never empty."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, MemoryError) and not str(error):
        return "the memory of this machine does not suffice; take fewer or smaller pictures at once"
    return str(error) or type(error).__name__
