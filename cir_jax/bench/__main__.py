"""`python -m cir_jax.bench encode|train|load|rank|step`: speed beside a peer, on this machine."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cir_jax import files
from cir_jax.bench.load import Load, load
from cir_jax.bench.measure import print_table
from cir_jax.bench.step import Step, step
from cir_jax.commands import Common
from cir_jax.compilation import keep_compiled

Name = Literal["clip-image", "clip-text", "blip-image", "beit3-image", "bert", "resnext"]
FAMILIES: tuple[Name, ...] = Name.__args__
Method = Literal["clip", "blip_cir", "blip_rerank", "cfir"]
METHODS: tuple[Method, ...] = Method.__args__


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
        check_counts(self)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Training steps in full size: loss, gradients, clipping and AdamW of what trains, with random weights.

    CLIP ViT-L/14 (contrastive), BLIP base's stages I and II at 384 pixels (their picture encoder is frozen, as in the
    paper) and BEiT-3 large, ours and PyTorch with its fused attention and fused AdamW, on the same sizes and in the same
    type. Each side runs in a new process, one after the other: both at once would need twice the memory. On a CPU
    a process is pinned to one core and its time is the processor's, on a GPU it is the clock's; the best of all repetitions counts.
    The use of the device is the arithmetic of the model's products by the time and by the peak: on a GPU that of its
    data sheet for bfloat16, on a CPU the best product of two matrices that either side makes.
    """

    family: tuple[Method, ...] = METHODS
    """which methods"""
    device: Literal["cpu", "gpu"] | None = None
    """where (default: what JAX finds)"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """the type of products on both sides (default: float32 on a CPU, bfloat16 on a GPU)"""
    peer: tuple[Literal["eager", "compile"], ...] = ()
    """PyTorch as it is or with torch.compile (default: eager on a CPU, compile on a GPU)"""
    batch: int | None = None
    """rows of a batch (default: 2 on a CPU; on a GPU 32, in stage II 16, which are 256 pairs)"""
    repeat: int = 3
    """repetitions of each measurement: a step on a CPU, ten on a GPU"""
    remat: bool = False
    """compute activations again on the way back, as our configs do by default and PyTorch does not"""
    output: Path | None = None
    """a file for the numbers, as JSON"""

    def __post_init__(self):
        check_counts(self)


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Seconds of an evaluation once its vectors are there, as large as FashionIQ's and CIRCO's, beside a full sort."""

    repeat: int = 3
    """rounds, of which the best counts"""

    def __post_init__(self):
        check_counts(self)


def check_counts(command) -> None:
    """ValueError for a batch or repetitions below 1."""
    for name in ("batch", "repeat"):
        value = getattr(command, name, None)
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}; it must be at least 1")


COMMANDS = {"encode": Encode, "train": Train, "load": Load, "rank": Rank, "step": Step}


def encode(command: Encode) -> None:
    """Measure, print the table and write the numbers."""
    from cir_jax.bench.encode import measured
    from cir_jax.bench.measure import versions

    if command.output:
        files.check_writable(command.output)
    keep_compiled(command.cache)
    machine = versions()
    families, dtypes = dict.fromkeys(command.family), dict.fromkeys(command.dtype)
    lines = measured(tuple(families), tuple(dtypes), command.batch, command.repeat, command.remat)
    results = collected(lines, 2 * len(families) * len(dtypes))
    print_encoders(results)
    print(f"one core of {machine['processor']}, jax {machine['jax']}, torch {machine['torch']}")
    write(command.output, machine, results)


def train(command: Train) -> None:
    """Measure, print the table and write the numbers."""
    from cir_jax.bench.measure import versions
    from cir_jax.bench.train import found_device, measured

    if command.output:
        files.check_writable(command.output)
    machine = versions()
    device, kind, peak = found_device(command.device)
    if device == "gpu":
        machine["processor"] = kind
    families = dict.fromkeys(command.family)
    peers = dict.fromkeys(command.peer or ("eager" if device == "cpu" else "compile",))
    dtype = command.dtype or ("float32" if device == "cpu" else "bfloat16")
    sizes = command.batch, command.repeat, command.remat
    lines = measured(tuple(families), tuple(peers), dtype, device, *sizes, peak)
    results = collected(lines, len(families) * (1 + len(peers)))
    print_training(results)
    where = "one core of " if device == "cpu" else ""
    print(f"{where}{machine['processor']}, jax {machine['jax']}, torch {machine['torch']}")
    write(command.output, machine, results)


def rank(command: Rank) -> None:
    """Measure and print the table."""
    from cir_jax.bench.ranking import measured

    rows = [
        (title, f"{ours:.1f}", f"{theirs:.1f}", f"{theirs / ours:.2f}")
        for title, ours, theirs in measured(command.repeat)
    ]
    print_table(["evaluation", "seconds", "full sort", "ratio"], rows, words=1)


def collected(lines: Iterable, count: int) -> list:
    """All lines of a measurement, with progress."""
    from cir_jax.progress import progress

    results = []
    with progress("measured", count) as advance:
        for result in lines:
            results.append(result)
            advance(1)
    return results


def write(output: Path | None, machine: dict[str, str], results) -> None:
    """The numbers as JSON, if they are wanted."""
    if output:
        numbers = {"machine": machine, "results": [result.as_json() for result in results]}
        with files.write_atomically(output) as part:
            files.write_json(part, numbers)


def print_encoders(results) -> None:
    """A line for each result; a ratio below its goal is marked."""
    titles = [
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
    ]
    rows = []
    for result in results:
        missed = result.goal is not None and result.ratio < result.goal
        rows.append(
            (
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
        )
    print_table(titles, rows, words=3)


def print_training(results) -> None:
    """A line for each side; the ratio is our rate by that of the line."""
    from cir_jax.bench.shares import KINDS

    titles = ["method", "side", "type", "batch", "steps/s", "ratio", "use", "MiB", *KINDS]
    optional = lambda value, shown: "" if value is None else format(value, shown)
    rows = [
        (
            result.title,
            result.side,
            result.dtype,
            str(result.batch),
            f"{result.steps_per_second:.3g}",
            optional(result.ratio, ".2f"),
            optional(result.utilization, ".0%"),
            f"{result.memory:,.0f}",
            *(optional(result.shares.get(kind), ".0%") for kind in KINDS),
        )
        for result in results
    ]
    print_table(titles, rows, words=3)


def main(argv: list[str] | None = None) -> None:
    """Run the measurement that the command line names."""
    import tyro

    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog="python -m cir_jax.bench", description=__doc__, args=argv
    )
    {Encode: encode, Train: train, Load: load, Rank: rank, Step: step}[type(command)](command)


if __name__ == "__main__":
    from cir_jax.commands import start

    start("bench")
