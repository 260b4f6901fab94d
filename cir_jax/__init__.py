"""Two-stage image retrieval in JAX: a query finds candidates in an index of picture vectors.

The names below are what most programs need. They load their modules on first use, so that `import cir_jax` costs
nothing.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "Model": "cir_jax.model",
    "load": "cir_jax.model",
    "Hits": "cir_jax.index",
    "ExactIndex": "cir_jax.index",
    "ScannIndex": "cir_jax.index",
    "open_index": "cir_jax.index",
}

__all__ = [*sorted(_HOMES), "search"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'cir_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def search(model, index, **query):
    """Search an index with one query; see `cir_jax.retrieval.search`, which this calls."""
    from cir_jax.retrieval import search

    return search(model, index, **query)
