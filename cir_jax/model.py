"""A trained model: its config, its parameters and the preprocessing that belongs to them."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from cir_jax import sharding
from cir_jax.checkpoint import read_model
from cir_jax.data.inputs import prepare_batch, shorten
from cir_jax.methods import METHODS, method_name

PACKAGED = Path(__file__).resolve().parent / "weights"


@functools.partial(jax.jit, static_argnames=("graph", "part"))
def _encode(graph, params, part, batch):
    return getattr(nnx.merge(graph, params), part)(batch)


@dataclass(frozen=True)
class Model:
    """What `cir_jax.load` returns.

    `fingerprint` identifies config, parameters and vocabulary; vectors and indexes remember it and refuse others.
    """

    config: Any
    graph: Any
    params: Any
    fingerprint: str = ""
    name: str = ""

    def encode(
        self,
        part: Literal["query", "item"],
        examples: Sequence,
        batch_size: int = 128,
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Unit vectors `[N, D]` float32 of queries or items, in their order.

        Args:
          part: the side of the model; an item is a picture, a query may be text, a picture, or both.
          examples: mappings with `image` (path, bytes, PIL picture or uint8 array `[H, W, 3]`) and/or `text`;
            anything else in the sequence is taken as a picture (`item`) or, if a string, as a text (`query`).
          batch_size: most rows computed at once; spread over this process's devices.
          progress: called with the number of rows done after each batch.

        Raises:
          ValueError: an example without what the method needs, or a picture that cannot be read.
        """
        if part not in ("query", "item"):
            raise ValueError(f"part is {part!r}; expected 'query' or 'item'")
        mesh = sharding.make_mesh(devices=jax.local_devices())
        params = jax.device_put(self.params, sharding.replicated(mesh))
        out = np.zeros((len(examples), 0), np.float32)
        for rows, batch in _batches(part, examples, batch_size, self.config):
            vectors = self._encode_batch(params, part, batch, mesh)
            if not out.shape[1]:
                out = np.zeros((len(examples), vectors.shape[1]), np.float32)
            out[rows] = vectors
            if progress:
                progress(len(rows))
        return out

    def _encode_batch(self, params, part, batch, mesh) -> np.ndarray:
        n = len(next(iter(batch.values())))
        places = NamedSharding(mesh, sharding.P(sharding.AXES))
        size = mesh.size * 2 ** int(np.ceil(np.log2(max(1, n / mesh.size))))
        pad = lambda x: np.concatenate([x, np.repeat(x[-1:], size - n, axis=0)])
        batch = jax.device_put(jax.tree.map(pad, shorten(batch)), places)
        return np.asarray(_encode(self.graph, params, part, batch))[:n]


def as_example(part: str, value, kinds: Sequence[set[str]]) -> Mapping:
    """A raw example as a mapping of one of the `kinds`; see `Model.encode` for what may stand in for one."""
    if isinstance(value, Mapping):
        example = {k: v for k, v in value.items() if k in ("image", "text") and v is not None}
    elif part == "query" and isinstance(value, str):
        example = {"text": value}
    else:
        example = {"image": value}
    if part == "item":
        example = {k: v for k, v in example.items() if k == "image"}
    if set(example) not in kinds:
        wanted = ", or ".join(" and ".join(sorted(kind)) for kind in kinds)
        found = " and ".join(sorted(example)) or "neither text nor image"
        raise ValueError(f"a {part} of this model consists of {wanted}; this one has {found}")
    return example


def _batches(part, examples, batch_size, config):
    """(rows, arrays) of examples that have the same parts, at most `batch_size` at a time.

    Examples are read once, in order; those of another kind than the current batch start the next one.
    """
    kinds = METHODS[method_name(config)][1].query_kinds if part == "query" else ({"image"},)
    rows, waiting = [], []
    for row in range(len(examples)):
        example = as_example(part, examples[row], kinds)
        if waiting and (len(waiting) == batch_size or waiting[0].keys() != example.keys()):
            yield rows, prepare_batch(waiting, config.inputs)
            rows, waiting = [], []
        rows.append(row)
        waiting.append(example)
    if waiting:
        yield rows, prepare_batch(waiting, config.inputs)


def find_model(name: str | os.PathLike) -> Path:
    """The folder of a model given by path or by the name of a packaged one."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if (PACKAGED / folder).is_dir() and len(folder.parts) == 1:
        return PACKAGED / folder
    packaged = ", ".join(sorted(p.name for p in PACKAGED.iterdir() if p.is_dir()))
    raise FileNotFoundError(
        f"there is no model {str(name)!r}: it is neither a folder nor one of the packaged models ({packaged})"
    )


def lasting_name(name: str | os.PathLike) -> str:
    """How artefacts remember a model: a packaged one by name, any other by its absolute path."""
    folder = find_model(name)
    return folder.name if folder.parent == PACKAGED else str(folder.resolve())


def load(name: str | os.PathLike) -> Model:
    """The model in a checkpoint folder, or a packaged one by its name (`"emoji_text"`)."""
    config, graph, params, manifest = read_model(find_model(name))
    return Model(config, graph, params, manifest["fingerprint"], Path(name).name)
