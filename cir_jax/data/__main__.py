"""`python -m cir_jax.data NAME --root RAW --dest PACKED`: a data set packed into few large files, or checked."""

from collections.abc import Callable
from dataclasses import dataclass

import tyro

from cir_jax.data import parts_of
from cir_jax.data.packed import Packed, Part, is_packed, pack
from cir_jax.progress import printable


@dataclass(frozen=True)
class Arguments:
    """Pack a data set once into ArrayRecord, so that many machines read few large files; or check it.

    NAME is a data set (`emoji-text`), `pairs` or `triplets` with their table as --root, `benchmark` with a folder of
    queries and gallery, or `gallery` with a folder of pictures, a list or tar shards. The rows are those of the raw data, in the
    same order, and pictures keep the bytes of their files. What takes the raw root takes PACKED instead:
    `Data(NAME, root=PACKED)`, the benchmark `PACKED/VARIANT/SPLIT`, the gallery PACKED.
    """

    name: tyro.conf.Positional[str]
    root: str = ""
    """the raw data; a packed folder can be checked; built-in data has none"""
    dest: str = ""
    """the new folder, here or in a bucket (gs://…, s3://…)"""
    training: tuple[str, ...] | None = None
    """training sets to take, as VARIANT/SPLIT (default: all there are)"""
    benchmarks: tuple[str, ...] | None = None
    """benchmarks to take, as VARIANT/SPLIT (default: all there are)"""
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


def main(argv: list[str] | None = None) -> None:
    """Pack or check as the command line says."""
    arguments = tyro.cli(Arguments, args=argv, prog="python -m cir_jax.data")
    if not arguments.dest and not arguments.check:
        raise ValueError("there is nothing to do; give --dest PACKED, --check or both")
    given = (arguments.name, arguments.root, arguments.training, arguments.benchmarks)
    parts = parts_of(*given)
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
