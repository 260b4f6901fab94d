"""`python -m cir_jax.search INDEX [--text …] [--image …]`: the command; the functions are in `cir_jax.retrieval`."""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Arguments:
    """Search an index with a text, a picture, or both; prints a table, and writes a page with the pictures.

    INDEX is a folder made by `python -m cir_jax.index`. The model that made its vectors encodes the query.
    """

    index: tyro.conf.Positional[Path]
    text: str | None = None
    """what to look for"""
    image: Path | None = None
    """a picture to look for, or to be changed by --text"""
    k: int = 10
    """how many results"""
    html: Path | None = None
    """write the results with their pictures to this file, one self-contained page"""
    checkpoint: str | None = None
    """the model, if it is no longer where the index remembers it"""


def print_results(results) -> None:
    """A table of rank, score and id on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table("rank", "score", "id", box=None)
    for rank, result in enumerate(results, 1):
        table.add_row(str(rank), f"{result.score:.4f}", result.id)
    Console(width=None if sys.stdout.isatty() else 160, markup=False).print(table)


def main(argv: list[str] | None = None) -> None:
    arguments = tyro.cli(Arguments, args=argv, prog="python -m cir_jax.search")
    if arguments.text is None and arguments.image is None:
        raise ValueError("a query needs --text, --image, or both; none was given")

    from cir_jax.index import open_index
    from cir_jax.model import load
    from cir_jax.retrieval import search

    index = open_index(arguments.index)
    checkpoint = arguments.checkpoint or index.checkpoint
    if not checkpoint:
        raise ValueError(
            f"{arguments.index} does not say which model made it; name it with --checkpoint"
        )
    results = search(
        load(checkpoint), index, text=arguments.text, image=arguments.image, k=arguments.k
    )
    print_results(results)
    if arguments.html:
        from cir_jax.report import search_page

        search_page(arguments.html, results, index, text=arguments.text, image=arguments.image)
        print(f"pictures in {arguments.html}")


if __name__ == "__main__":
    from cir_jax.commands import start

    start("search")
