"""`python -m cir_jax.search INDEX [--text …] [--image …]`: the command; the functions are in `cir_jax.retrieval`."""

import sys
import types
from dataclasses import dataclass
from pathlib import Path

import tyro

from cir_jax import files, processes
from cir_jax.commands import Common
from cir_jax.compilation import keep_compiled
from cir_jax.progress import printable


@dataclass(frozen=True)
class Arguments(Common):
    """Search an index with a text, a picture, both, or a document; prints a table, and writes a page with the pictures.

    INDEX is a folder made by `python -m cir_jax.index`. The model that made its vectors encodes the query; a second
    model may order the best candidates again (--rerank).
    """

    index: tyro.conf.Positional[Path]
    text: str | None = None
    """what to look for"""
    image: Path | None = None
    """a picture to look for, or to be changed by --text"""
    document: Path | None = None
    """a text file to find pictures for: its entities ask one by one, its summary in the second stage"""
    rerank: str | None = None
    """a model for the second stage; for documents also the first one again"""
    candidates: int = 50
    """how many of the best the second stage looks at"""
    fusion: float | None = None
    """weight, 0 to 1, of the first stage's score in the second stage's order"""
    exclude: str | None = None
    """id of an item that is no answer, such as the picture that --text changes"""
    extracts: Path | None = None
    """entities and summaries in a .jsonl file; the document's id there is its file name without the ending"""
    k: int = 10
    """how many results"""
    html: Path | None = None
    """write the results with their pictures to this file, one self-contained page"""
    checkpoint: str | None = None
    """the model, if it is no longer where the index remembers it"""
    gallery: str | None = None
    """the pictures, if they are no longer where the index remembers them"""


def read_document(path: Path) -> str:
    """The text of a UTF-8 file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no UTF-8 text ({error.reason} at byte {error.start})"
        ) from None


def load_or_ask(checkpoint: str):
    """The model that an index remembers; where it is gone, the error names the option that tells where it is now."""
    from cir_jax.model import load

    try:
        return load(checkpoint)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; if it was moved, say where with --checkpoint") from None


def report_cut(text: str, spec) -> None:
    """Say so if a model does not read all of a text."""
    from cir_jax.data.text import tokenizer

    words = tokenizer(spec)
    found, room = len(words.content([text])[0]), words.length - 2
    if found > room:
        print(f"the text has {found:,} pieces; the model reads the first {room}", file=sys.stderr)


def print_results(results) -> None:
    """A table of rank, score, id and the stage that gave the score on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table("rank", "score", "id", "stage", box=None)
    for rank, result in enumerate(results, 1):
        table.add_row(str(rank), f"{result.score:.4f}", printable(result.id), str(result.stage))
    Console(width=None if sys.stdout.isatty() else 160, markup=False).print(table)


def main(argv: list[str] | None = None) -> None:
    """Search as the command line says; print the results, and write the page if one was asked for."""
    arguments = tyro.cli(Arguments, args=argv, prog="python -m cir_jax.search")
    if arguments.text is None and arguments.image is None and arguments.document is None:
        raise ValueError("a query needs --text, --image, both, or --document; none was given")
    if arguments.fusion is not None and arguments.rerank is None:
        raise ValueError("--fusion weighs two stages; it needs --rerank")
    processes.join(preemption=False)
    if arguments.html:
        files.check_writable(arguments.html)
    document = read_document(arguments.document) if arguments.document else None
    keep_compiled(arguments.cache)

    from cir_jax.data.documents import DocumentSpec
    from cir_jax.data.records import open_gallery
    from cir_jax.index import open_index
    from cir_jax.model import load
    from cir_jax.retrieval import search
    from cir_jax.vectors import Items

    index = open_index(arguments.index)
    if arguments.gallery is not None:
        index.gallery = open_gallery(arguments.gallery).locator
        index.items = Items(index.ids, index.gallery)
    checkpoint = arguments.checkpoint or index.checkpoint
    if not checkpoint:
        raise ValueError(
            f"{arguments.index} does not say which model made it; name it with --checkpoint"
        )
    model = load_or_ask(checkpoint)
    reranker = load(arguments.rerank) if arguments.rerank else None
    if arguments.text is not None:
        report_cut(arguments.text, model.config.inputs.text)
    results = search(
        model,
        index,
        text=arguments.text,
        image=arguments.image,
        document=document,
        k=arguments.k,
        reranker=reranker,
        candidates=arguments.candidates,
        fusion=arguments.fusion,
        exclude=arguments.exclude,
        documents=DocumentSpec(str(arguments.extracts)) if arguments.extracts else None,
        document_id=arguments.document.stem if arguments.document else "",
    )
    print_results(results)
    for each in filter(None, (model, reranker)):
        print(f"model {printable(each.identity)}", file=sys.stderr)
    if arguments.html:
        from cir_jax.report.page import search_page

        text = document if arguments.text is None else arguments.text
        search_page(arguments.html, results, index, text=text, image=arguments.image)
        print(f"pictures in {arguments.html}")


class _Both(types.ModuleType):
    """Importing this module binds the name `cir_jax.search`, which is also that of a function: it is both."""

    def __call__(self, model, index, **query):
        from cir_jax.retrieval import search

        return search(model, index, **query)


sys.modules[__name__].__class__ = _Both


if __name__ == "__main__":
    from cir_jax.commands import start

    start("search")
