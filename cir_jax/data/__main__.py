"""`python -m cir_jax.data NAME --root RAW`: a data set counted, checked, or packed into few large files."""

from collections.abc import Callable
from dataclasses import dataclass

import tyro

from cir_jax.commands import reason
from cir_jax.data import parts_of
from cir_jax.data.counts import counted
from cir_jax.data.packed import Packed, Part, is_packed, pack
from cir_jax.progress import printable


@dataclass(frozen=True)
class Arguments:
    """Say what a data set holds; check it; or pack it once into ArrayRecord, so that many machines read few large files.

    NAME is a data set (`emoji-text`, `fashioniq`), `pairs` or `triplets` with their table as --root, `benchmark` with a folder of
    queries and gallery, or `gallery` with a folder of pictures, a list or tar shards. The rows are those of the raw data, in the
    same order, and pictures keep the bytes of their files. What takes the raw root takes PACKED instead:
    `Data(NAME, root=PACKED)`, the benchmark `PACKED/VARIANT/SPLIT` or `fashioniq:PACKED/dress/val`, the gallery PACKED.
    Without --check and --dest the parts are counted, from annotations alone.
    """

    name: tyro.conf.Positional[str]
    root: str = ""
    """the raw data, for a published set $CIR_JAX_DATA/NAME or data/NAME if not given; a packed folder can be counted and checked; built-in data has none"""
    dest: str = ""
    """the new folder, here or in a bucket (gs://…, s3://…)"""
    training: tuple[str, ...] | None = None
    """training sets to take, as VARIANT/SPLIT (default: the usual ones; none, if only benchmarks are named)"""
    benchmarks: tuple[str, ...] | None = None
    """benchmarks to take, as VARIANT/SPLIT (default: the usual ones; none, if only training sets are named)"""
    check: bool = False
    """report everything that is missing or wrong, and pack nothing if there is a fault"""


def check_parts(arguments: Arguments, parts: dict[Part, Callable]) -> None:
    """Print what is wrong; ValueError if anything is."""
    from cir_jax.data.check import check

    if arguments.root and is_packed(arguments.root):
        Packed(arguments.root).check()
    report = check(parts)
    print(*map(printable, str(report).split("\n")), sep="\n")
    if report.faults:
        raise ValueError(f"{arguments.name} has {len(report.faults)} faults, listed above")


def count_parts(arguments: Arguments, parts: dict[Part, Callable]) -> None:
    """Print what there is; ValueError if a part cannot be opened, behind those that can."""
    failed = 0
    for part, opened in parts.items():
        try:
            lines = list(counted(part, opened))
        except (ValueError, OSError) as error:
            lines, failed = [f"{part}: {reason(error)}"], failed + 1
        print(*map(printable, lines), sep="\n")
    if failed:
        raise ValueError(
            f"{failed} of {len(parts)} parts of {arguments.name} cannot be opened, see above; "
            "--training and --benchmarks choose others"
        )


def main(argv: list[str] | None = None) -> None:
    """Count, check or pack as the command line says."""
    arguments = tyro.cli(Arguments, args=argv, prog="python -m cir_jax.data")
    given = (arguments.name, arguments.root, arguments.training, arguments.benchmarks)
    parts = parts_of(*given)
    if not arguments.check and not arguments.dest:
        count_parts(arguments, parts)
    if arguments.check:
        check_parts(arguments, parts)
    if arguments.dest:
        pack(arguments.name, {part: opened() for part, opened in parts.items()}, arguments.dest)
        packed = Packed(arguments.dest)
        print(f"{packed.rows} rows and {packed.pictures} pictures in {arguments.dest}")
        for part in packed.parts:
            print(f"  {part}")


if __name__ == "__main__":
    from cir_jax.commands import start

    start("data")
