"""Parameters that training begins with instead of random ones: `Experiment.init`."""

from pathlib import Path

import jax
import numpy as np
from flax import traverse_util

from cir_jax import sharding
from cir_jax.config import Experiment
from cir_jax.methods import METHODS, method_name
from cir_jax.model import load
from cir_jax.training import optim


def warm_start(state, config: Experiment):
    """The first state of a run with the parts that `config.init` names taken from elsewhere.

    An entry `prefix: source` may name a model, whose parameters are put under the prefix ("" is the whole model), or
    `MODEL#PART`, of which those below PART are (`{"fusion": "runs/stage1/model#text"}`); later entries win. Or a
    `.npy` file (or `.npz` with an array `rows`), which becomes the parameter of that path or, if it has fewer rows, its
    first rows; or for "" a model of
    another method that this one says how to start from (`starts`).

    Raises:
      ValueError: the source has parameters for which this model has no place of that shape, or lacks the part.
    """
    params = optim.join(state["params"], state["frozen"])
    places = jax.tree.map(lambda x: x.sharding, params)
    for prefix, source in config.init.items():
        params = _started(params, prefix, source, config.method)
    params = jax.tree.map(jax.device_put, params, places)
    trained, frozen = optim.split_frozen(params, config.optim.frozen)
    return {**state, "params": trained, "frozen": frozen}


def _started(params, prefix: str, source: str, method):
    """The parameters with those of one entry of `init`."""
    if Path(source).suffix in (".npy", ".npz"):
        return _replaced(params, {prefix: _table(params, prefix, source)}, source)
    folder, _, part = source.partition("#")
    model = load(folder)
    starts = getattr(METHODS[method_name(method)][1], "starts", {})
    if not prefix and not part and type(model.config) in starts:
        theirs = traverse_util.flatten_dict(
            starts[type(model.config)](params, model.params), sep="/"
        )
    else:
        theirs = _below(part, traverse_util.flatten_dict(model.params, sep="/"), folder)
        theirs = {f"{prefix}/{name}" if prefix else name: x for name, x in theirs.items()}
    return _replaced(params, theirs, source)


def _below(part: str, params: dict, source: str) -> dict:
    """Parameters by path, or of those below a part with the rest of their paths."""
    start = f"{part}/" if part else ""
    found = {n.removeprefix(start): x for n, x in params.items() if n.startswith(start)}
    if not found:
        parts = sorted({name.partition("/")[0] for name in params})
        raise ValueError(f"init: {source} has no part {part!r}; there are {', '.join(parts)}")
    return found


def _table(params, name: str, source: str) -> np.ndarray:
    """The array of a file, completed with the last rows of the parameter it starts if it has fewer."""
    loaded = np.load(source, allow_pickle=False)
    rows = (loaded if isinstance(loaded, np.ndarray) else loaded["rows"]).astype(np.float32)
    own = traverse_util.flatten_dict(params, sep="/").get(name, rows)
    fits = own.ndim == rows.ndim > 0 and own.shape[1:] == rows.shape[1:] and len(rows) < len(own)
    return np.concatenate([rows, sharding.gather(own)[len(rows) :]]) if fits else rows


def _replaced(params, theirs: dict, source: str):
    """The parameters with `theirs`, by path, in their places."""
    flat = traverse_util.flatten_dict(params, sep="/")
    astray = sorted(n for n, x in theirs.items() if n not in flat or flat[n].shape != x.shape)
    if astray:
        raise ValueError(f"init: {source} does not fit the model at {', '.join(astray[:5])}")
    return traverse_util.unflatten_dict({**flat, **theirs}, sep="/")
