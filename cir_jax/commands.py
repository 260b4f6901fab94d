"""The commands, and what they have in common: how they start, how they fail and how they are stopped."""

import importlib
import os
import sys
import traceback
import warnings
from dataclasses import dataclass
from typing import NoReturn

from cir_jax import processes
from cir_jax.stopping import Terminated, asked, stoppable

COMMANDS = {
    "eval": "evaluate retrieval on benchmarks: table, report with pictures, results.json, ranks",
    "data": "pack a data set into few large files, or report everything that is wrong with it",
    "train": "train a model from a config",
    "convert": "turn a checkpoint of PyTorch or Hugging Face into one of ours, and back",
    "embed": "turn a gallery of pictures into vectors on disk",
    "index": "build a search index from vectors",
    "search": "search an index with a text, a picture or a document, in one stage or two",
    "bench": "measure speed and memory beside PyTorch (needs the extra [bench])",
}
DISTRIBUTED = ("train", "embed", "search", "eval")
# Seen by a shell as after the default action of the signal: 128 and its number. Launchers start a command that ended
# with TERMINATED again: training has saved its step before, and the others have kept their finished parts.
INTERRUPTED, TERMINATED, BROKEN_PIPE = 130, 143, 141
FORESEEN = (ValueError, OSError, RuntimeError, ArithmeticError, MemoryError, ImportError)


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
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it was closed
        stream.reconfigure(errors="backslashreplace")  # names of files may hold any bytes
    warnings.filterwarnings("ignore", message="Image size .* could be decompression bomb")
    try:
        with stoppable():
            if processes.asked() and name not in DISTRIBUTED:
                several = ", ".join(DISTRIBUTED)
                raise ValueError(
                    f"{name} runs as one process; several compute together in {several}"
                )
            module = importlib.import_module(f"cir_jax.{name}")
            if hasattr(module, "__path__"):  # a package is run by its __main__
                module = importlib.import_module(f"cir_jax.{name}.__main__")
            module.main()
            print(end="", flush=True)
    except KeyboardInterrupt as stop:
        end_stopped(type(stop))
    except BrokenPipeError:
        # The reader of our output (head, a pager) has left; a second failure at exit is avoided.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        processes.end(BROKEN_PIPE)
    except Exception as error:
        if asked():  # whatever a library makes of being stopped
            end_stopped(asked())
        if os.environ.get("CIR_JAX_TRACEBACK") or not isinstance(error, FORESEEN):
            if not processes.joined():
                raise
            traceback.print_exc()
        processes.end_failed(error, reason(error))


def end_stopped(how: type[KeyboardInterrupt]) -> NoReturn:
    """End a command that a signal has stopped."""
    terminated = issubclass(how, Terminated)
    word = "terminated" if terminated else "interrupted"
    print(f"{word}; finished parts are kept", file=sys.stderr)
    processes.end(TERMINATED if terminated else INTERRUPTED, told=True)


def reason(error: BaseException) -> str:
    """What an error says to a person; never empty."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, MemoryError) and not str(error):
        return "the memory of this machine does not suffice; take fewer or smaller pictures at once"
    return str(error) or type(error).__name__
