"""The commands, and what they have in common: how they start and how they fail."""

import importlib
import os
import sys

COMMANDS = {
    "eval": "evaluate retrieval on benchmarks: table, report with pictures, results.json, ranks",
    "train": "train a model from a config",
    "embed": "turn a gallery of pictures into vectors on disk",
    "index": "build a search index from vectors",
    "search": "search an index with a text, a picture or a document, in one stage or two",
}
DISTRIBUTED = ("train",)


def start(name: str) -> None:
    """Run one command; a foreseeable failure is one line on stderr and a non-zero exit code.

    `CIR_JAX_TRACEBACK=1` in the environment shows where an error came from.
    """
    if name not in DISTRIBUTED and int(os.environ.get("CIR_JAX_PROCESSES", 1)) > 1:
        sys.exit(
            f"error: {name} runs as one process; several compute together in {', '.join(DISTRIBUTED)}"
        )
    module = importlib.import_module(f"cir_jax.{name}")
    try:
        module.main()
    except KeyboardInterrupt:
        print("interrupted; finished parts are kept", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output (head, a pager) has left; a second failure at exit is avoided.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        if os.environ.get("CIR_JAX_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
