"""What the benchmarks share: one core, new processes, memory, versions and a table. JAX is not needed here."""

import importlib.metadata
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")
MEBIBYTE = 2**20


def pin() -> None:
    """Keep this process, and what it starts, on one core.

    Raises:
      RuntimeError: the system is not Linux.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise RuntimeError(
            "a benchmark on the CPU pins itself to one core, which works on Linux alone"
        )
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def in_new_process(what: str, function: Callable[..., Result], *arguments) -> Result:
    """What a function of a module gives in a process of its own, which ends with all its memory.

    Raises:
      MemoryError: the process was killed while it measured `what`.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise MemoryError(
                f"the process that measures {what} was killed, as it is where memory runs out; "
                "give a smaller --batch"
            ) from None


def resident(which: str) -> int:
    """Bytes of this process in memory, now (`VmRSS`) or at most (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(which))


def versions() -> dict[str, str]:
    """The libraries and the processor, for the caption and the file.

    Raises:
      ImportError: PyTorch is missing.
    """
    from cir_jax.bench.peers import library

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
    except OSError:
        fields = {}
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    kinds = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    has = [kind for kind in kinds if kind in fields.get("flags", "").split()]
    processor = f"{fields.get('model name', 'unknown processor')} ({', '.join(has) or 'no AVX'})"
    jax, torch = importlib.metadata.version("jax"), library("torch").__version__
    return {"processor": processor, "jax": jax, "torch": torch}


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> None:
    """A table whose first columns, so many, hold words and the others numbers."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    for number, title in enumerate(titles):
        table.add_column(title, justify="left" if number < words else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 140, markup=False).print(table)
