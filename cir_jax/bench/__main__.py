"""`python -m cir_jax.bench encode|load|rank`: speed beside a peer, on this machine."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cir_jax import files
from cir_jax.bench.load import Load, load
from cir_jax.bench.step import Step, step
from cir_jax.commands import Common
from cir_jax.compilation import keep_compiled

Name = Literal["clip-image", "clip-text", "blip-image", "beit3-image", "bert", "resnext"]
FAMILIES: tuple[Name, ...] = Name.__args__


@dataclass(frozen=True, kw_only=True)
class Encode(Common):
    """Encoders of full size with random weights: rows per second and memory, forward and in a training step.

    Both sides run in turns, pinned to one core; a rate is rows per second of processor time, the best of all
    repetitions. A training step is the gradients of all parameters and a step of plain SGD. Memory is the growth of a
    new process over its imports, compilation included. PyTorch always computes in float32, with its fused attention.
    """

    family: tuple[Name, ...] = FAMILIES
    """which encoders"""
    dtype: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """types that we compute in"""
    batch: int = 8
    """pictures or texts computed at once"""
    repeat: int = 5
    """repetitions of each measurement"""
    remat: bool = False
    """compute activations again on the way back, as our configs do by default and PyTorch does not"""
    output: Path | None = None
    """a file for the numbers, as JSON"""

    def __post_init__(self):
        for name in ("batch", "repeat"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Seconds of an evaluation once its vectors are there, as large as FashionIQ's and CIRCO's, beside a full sort."""

    repeat: int = 3
    """rounds, of which the best counts"""

    def __post_init__(self):
        if self.repeat < 1:
            raise ValueError(f"--repeat is {self.repeat}; it must be at least 1")


COMMANDS = {"encode": Encode, "load": Load, "rank": Rank, "step": Step}


def encode(command: Encode) -> None:
    """Measure, print the table and write the numbers."""
    from cir_jax.bench.encode import measured, versions
    from cir_jax.progress import progress

    if command.output:
        files.check_writable(command.output)
    keep_compiled(command.cache)
    machine, results = versions(), []
    families, dtypes = dict.fromkeys(command.family), dict.fromkeys(command.dtype)
    lines = measured(tuple(families), tuple(dtypes), command.batch, command.repeat, command.remat)
    with progress("measured", 2 * len(families) * len(dtypes)) as advance:
        for result in lines:
            results.append(result)
            advance(1)
    print_table(results)
    print(f"one core of {machine['processor']}, jax {machine['jax']}, torch {machine['torch']}")
    if command.output:
        numbers = {"machine": machine, "results": [result.as_json() for result in results]}
        with files.write_atomically(command.output) as part:
            files.write_json(part, numbers)


def rank(command: Rank) -> None:
    """Measure and print the table."""
    from rich.console import Console
    from rich.table import Table

    from cir_jax.bench.ranking import measured

    table = Table("evaluation", "seconds", "full sort", "ratio", box=None)
    for title, ours, theirs in measured(command.repeat):
        table.add_row(title, f"{ours:.1f}", f"{theirs:.1f}", f"{theirs / ours:.2f}")
    Console(markup=False).print(table)


def print_table(results) -> None:
    """A line for each result; a ratio below its goal is marked."""
    from rich.console import Console
    from rich.table import Table

    titles = (
        "encoder",
        "step",
        "type",
        "batch",
        "rows/s",
        "torch",
        "ratio",
        "goal",
        "MiB",
        "torch",
    )
    table = Table(box=None)
    for title in titles:
        table.add_column(title, justify="left" if title in titles[:3] else "right")
    for result in results:
        missed = result.goal is not None and result.ratio < result.goal
        table.add_row(
            result.title,
            result.step,
            result.dtype,
            str(result.batch),
            f"{result.rows_per_second:.2f}",
            f"{result.torch_rows_per_second:.2f}",
            f"{result.ratio:.2f}{' below' if missed else ''}",
            "" if result.goal is None else f"{result.goal:.2f}",
            f"{result.memory:,.0f}",
            f"{result.torch_memory:,.0f}",
        )
    Console(width=None if sys.stdout.isatty() else 140, markup=False).print(table)


def main(argv: list[str] | None = None) -> None:
    """Run the measurement that the command line names."""
    import tyro

    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog="python -m cir_jax.bench", description=__doc__, args=argv
    )
    {Encode: encode, Load: load, Rank: rank, Step: step}[type(command)](command)


if __name__ == "__main__":
    from cir_jax.commands import start

    start("bench")
