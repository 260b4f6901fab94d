"""A trained model: its config, its parameters and the preprocessing that belongs to them."""

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from cir_jax import processes, sharding
from cir_jax.checkpoint import read_model
from cir_jax.data.benchmark import Chosen
from cir_jax.data.inputs import shorten
from cir_jax.memory import halved_once
from cir_jax.methods import kinds, reranks

PACKAGED = Path(__file__).resolve().parent / "weights"


@functools.partial(jax.jit, static_argnames=("graph", "part"))
def _encode(graph, params, part, batch):
    return getattr(nnx.merge(graph, params), part)(batch)


@functools.partial(jax.jit, static_argnames="graph")
def _score(graph, params, queries, items, query_rows, item_rows):
    take = lambda tree, rows: jax.tree.map(lambda x: jnp.take(x, rows, axis=0), tree)
    queries, items = take(queries, query_rows), take(items, item_rows[:, None])
    method = nnx.merge(graph, params)
    if not hasattr(method, "score"):  # a retriever: the inner product of its vectors
        return _products(queries, items)[:, 0]
    return method.score(queries, items)[:, 0]


def _products(queries, items):
    """Inner products `[P, K]` of query vectors `[P, D]` and items `[P, K, D]`; of several vectors, the largest."""
    if not isinstance(queries, tuple):
        return jnp.einsum("pd,pkd->pk", queries, items)
    vectors, mask = queries
    scores = jnp.einsum("pmd,pkd->pmk", vectors, items)
    return jnp.where(mask[:, :, None], scores, -jnp.inf).max(axis=1)


@dataclass(frozen=True)
class Model:
    """What `cir_jax.load` returns.

    `fingerprint` identifies config, parameters and vocabulary; vectors and indexes remember it and refuse others.
    `modules` are those of its parts, of a converted model (`cir_jax.convert`).
    """

    config: Any
    graph: Any
    params: Any
    fingerprint: str = ""
    name: str = ""
    modules: Mapping[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """Name and fingerprints in a line."""
        parts = ", ".join(f"{name} {mark}" for name, mark in self.modules.items())
        return f"{self.name} {self.fingerprint}{f' ({parts})' if parts else ''}"

    def encode(
        self,
        part: Literal["query", "item"],
        examples: Sequence,
        batch_size: int = 128,
        progress: Callable[[int], None] | None = None,
        together: bool = False,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Unit vectors `[N, D]` float32 of queries or items, in their order.

        Queries that ask several times, `{"texts": […]}` (the entities of a document), give `([N, M, D], mask [N, M])`,
        a vector for each text and True where there is one; M is the largest number of texts. So do all queries of a
        method by whose `query` every token asks; there M counts tokens. Queries that say one thing in several ways,
        `{"wordings": […]}`, give one vector, the unit mean of those of the wordings.

        Args:
          part: the side of the model; an item is a picture (of a model of texts a text), a query may be text, a
            picture, or both.
          examples: mappings with `image` (path, bytes, PIL picture or uint8 array `[H, W, 3]`) and/or `text`;
            anything else in the sequence is taken as a picture (`item`) or, if a string, as a text (`query`, and items
            of a model of texts).
          batch_size: most rows computed at once; spread over this process's devices.
          progress: called with the number of rows done after each batch.
          together: every process calls this with the same examples, computes a part of the batches, and gets the
            vectors of all; the same bits as from one process, where all examples have the same parts.

        Raises:
          ValueError: an example without what the method needs, a picture that cannot be read, or a re-ranker, which
            scores pairs instead (`features`, `score`).
        """
        if reranks(self.config):
            raise ValueError(
                f"{self.name or 'this model'} is a re-ranker: it scores pairs and makes no vectors to search with; "
                "use it for the second stage, behind a retriever"
            )
        first = examples[0] if len(examples) else None
        if part == "query" and isinstance(first, Mapping) and "texts" in first:
            texts = [query.get("texts") for query in examples]
            return self._encode_asks(texts, batch_size, progress, together)
        if part == "query" and isinstance(first, Mapping) and "wordings" in first:
            return self._encode_wordings(examples, batch_size, progress, together)
        return self.features(part, examples, batch_size, progress, together)

    def _encode_wordings(self, queries, batch_size, progress, together):
        """Every wording of every query as a query of its own, then their unit mean."""
        counts = [len(query.get("wordings", ())) for query in queries]
        if not all(counts):
            raise ValueError("some queries have `wordings` and some have not; encode these apart")
        asks = [{**query, "text": text} for query in queries for text in query["wordings"]]
        vectors = self.features("query", asks, batch_size, progress, together)
        if isinstance(vectors, tuple):
            raise ValueError(f"{self.name or 'this model'} asks with tokens, which have no mean")
        sums = np.add.reduceat(vectors, np.cumsum([0, *counts[:-1]]))
        return sums / np.linalg.norm(sums, axis=1, keepdims=True)

    def _encode_asks(self, texts, batch_size, progress, together):
        """Every text of every query as a query of its own, then put back together."""
        if None in texts:
            raise ValueError(
                "some queries have `texts` and some have not; encode those that ask once by themselves"
            )
        asks = [{"text": text} for each in texts for text in each]
        found = self.features("query", asks, batch_size, progress, together)
        counts = np.array([len(each) for each in texts])
        mask = np.arange(max(counts)) < counts[:, None]

        def spread(x):
            out = np.zeros((*mask.shape, *x.shape[1:]), x.dtype)
            out[mask] = x
            return out

        if not isinstance(found, tuple):
            return spread(found), mask
        vectors, tokens = map(spread, found)
        return vectors.reshape(len(mask), -1, vectors.shape[-1]), tokens.reshape(len(mask), -1)

    def features(
        self,
        part: Literal["query", "item"],
        examples: Sequence,
        batch_size: int = 128,
        progress: Callable[[int], None] | None = None,
        together: bool = False,
    ):
        """What the method's `query` or `item` computes: a tree of float32 (or bool) arrays `[N, …]`, on the host.

        For a retriever that is one array of unit vectors; for a re-ranker whatever `score` needs of one side. Texts of
        different batches are padded to the longest. Arguments and errors as for `encode`; `together` is for retrievers.
        """
        if part not in ("query", "item"):
            raise ValueError(f"part is {part!r}; expected 'query' or 'item'")
        mesh = sharding.make_mesh(devices=jax.local_devices())
        params = jax.device_put(self.params, sharding.replicated(mesh))
        batches, size, count = [], batch_size, len(examples)
        if together:
            examples = Chosen(examples, processes.share(count, batch_size))
        for rows, batch in _batches(part, examples, batch_size, self):
            compute = lambda size, batch=batch: [
                self._encode_batch(params, part, piece, mesh) for piece in _pieces(batch, size)
            ]
            found, size = halved_once(compute, size, batch_size, "batch size")
            batches += found
            if progress:
                progress(len(rows))
        if together:
            batches = _everybodys(batches)
            if progress:
                progress(count - len(examples))
        if not batches:
            return np.zeros((0, 0), np.float32)
        return jax.tree.map(lambda *parts: _stacked(parts), *batches)

    def feature_bytes(self, part: Literal["query", "item"]) -> int:
        """The size of the features of one query (of the method's main kind) or item, without computing any."""
        inputs = self.config.inputs
        shapes = {
            "image": jax.ShapeDtypeStruct((1, inputs.image.size, inputs.image.size, 3), np.float32),
            "text": jax.ShapeDtypeStruct((1, inputs.text.length), np.int32),
            "text_mask": jax.ShapeDtypeStruct((1, inputs.text.length), bool),
        }
        kind = kinds(self.config, part)[0]
        batch = {name: x for name, x in shapes.items() if name.partition("_")[0] in kind}
        leaves = jax.tree.leaves(_encode.eval_shape(self.graph, self.params, part, batch))
        return sum(x.size * x.dtype.itemsize for x in leaves)

    def score(self, queries, items, rows: np.ndarray, pairs: int = 512) -> np.ndarray:
        """Scores `[Q, K]` float32 of each query with its own candidates; larger is better.

        Args:
          queries: features of Q queries.
          items: features of the candidates of all of them.
          rows: `[Q, K]`, for each query the places of its candidates in `items`; where -1 the score is -inf.
          pairs: most pairs computed at once, on all devices together.
        """
        out = np.full(rows.shape, -np.inf, np.float32)
        present = rows >= 0
        query_rows, item_rows = np.nonzero(present)[0], rows[present]
        if not len(item_rows):
            return out
        mesh = sharding.make_mesh(devices=jax.local_devices())
        held = (self.params, _few_sizes(queries), _few_sizes(items))
        params, queries, items = jax.device_put(held, sharding.replicated(mesh))
        places = NamedSharding(mesh, sharding.P(sharding.AXES))
        most = size = min(_padded(pairs, mesh.size), _padded(len(item_rows), mesh.size))
        scores = np.zeros(len(item_rows), np.float32)

        def compute(size, first):
            for start in range(first, min(first + most, len(scores)), size):
                chosen = np.arange(start, start + size).clip(max=len(scores) - 1)
                these = jax.device_put((query_rows[chosen], item_rows[chosen]), places)
                found = _score(self.graph, params, queries, items, *these)
                scores[start : start + size] = np.asarray(found)[: len(scores) - start]

        for first in range(0, len(scores), most):
            _, size = halved_once(functools.partial(compute, first=first), size, most, "pairs")
        out[present] = scores
        return out

    def _encode_batch(self, params, part, batch, mesh):
        n = len(next(iter(batch.values())))
        places = NamedSharding(mesh, sharding.P(sharding.AXES))
        size = _padded(n, mesh.size)
        pad = lambda x: np.concatenate([x, np.repeat(x[-1:], size - n, axis=0)])
        batch = jax.device_put(jax.tree.map(pad, shorten(batch)), places)
        return jax.tree.map(lambda x: np.asarray(x)[:n], _encode(self.graph, params, part, batch))


def _everybodys(batches: list) -> list:
    """What the processes have computed, each for its part of the batches; a batch is an array, or a tuple of arrays."""
    leaves = [jax.tree.leaves(batch) for batch in batches]
    joined = dict(enumerate(map(_stacked, zip(*leaves)))) if leaves else {}
    parts = processes.gather({str(place): x for place, x in joined.items()})
    found = [tuple(part[str(place)] for place in range(len(part))) for part in parts if part]
    return [part if len(part) > 1 else part[0] for part in found]


def _pieces(batch: dict[str, np.ndarray], size: int) -> list[dict[str, np.ndarray]]:
    """A batch in parts of at most `size` rows."""
    rows = len(next(iter(batch.values())))
    return [{k: x[i : i + size] for k, x in batch.items()} for i in range(0, rows, size)]


def _padded(rows: int, devices: int) -> int:
    """The number of rows, rounded up to a power of two for each device: few shapes to compile."""
    return devices * 2 ** int(np.ceil(np.log2(max(1, rows / devices))))


def _few_sizes(tree):
    """Leaves `[n, …]` with their last row repeated up to a power of two."""
    pad = lambda x: np.concatenate([x, np.repeat(x[-1:], _padded(len(x), 1) - len(x), axis=0)])
    return jax.tree.map(pad, tree)


def _stacked(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays of batches `[n, …]` as one, the second axis, if any, padded with zeros to the longest."""
    if parts[0].ndim == 1:
        return np.concatenate(parts)
    longest = max(x.shape[1] for x in parts)
    width = lambda x: [(0, 0), (0, longest - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
    return np.concatenate([np.pad(x, width(x)) for x in parts])


def as_example(part: str, value, kinds: Sequence[set[str]], model: str = "") -> Mapping:
    """A raw example as a mapping of one of the `kinds`; see `Model.encode` for what may stand in for one."""
    if isinstance(value, Mapping):
        example = {k: v for k, v in value.items() if k in ("image", "text") and v is not None}
    elif isinstance(value, str) and (part == "query" or kinds == ({"text"},)):
        example = {"text": value}
    else:
        example = {"image": value}
    if part == "item":  # a gallery may know more of an item than a model reads
        known = next((kind for kind in kinds if kind <= example.keys()), example.keys())
        example = {k: v for k, v in example.items() if k in known}
    if set(example) not in kinds:
        wanted = ", or ".join(" and ".join(sorted(kind)) for kind in kinds)
        found = " and ".join(sorted(example)) or "neither text nor image"
        raise ValueError(
            f"a {part} of {model or 'this model'} consists of {wanted}; this one has {found}"
        )
    return example


class _Examples:
    """Raw examples as the mappings that a side of a method reads; made when they are read."""

    def __init__(self, part: str, examples: Sequence, model: "Model"):
        self.part, self.examples, self.model = part, examples, model
        self.kinds = kinds(model.config, part)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, row: int) -> Mapping:
        return as_example(self.part, self.examples[row], self.kinds, self.model.name)


def _batches(part, examples, batch_size, model) -> Iterator[tuple[np.ndarray, dict]]:
    """(rows, arrays) of examples that have the same parts, in their order, at most `batch_size` at a time.

    Threads prepare the next ones meanwhile.
    """
    from cir_jax.data.pipeline import eval_batches

    if not len(examples):
        return
    asked = _Examples(part, examples, model)
    for batch in eval_batches(asked, model.config.inputs, batch_size, pad=False):
        yield batch.pop("row"), batch


def find_model(name: str | os.PathLike) -> Path:
    """The folder of a model given by path or by the name of a packaged one, which wins over a folder of that name.

    `./emoji_text` is the folder, as with built-in galleries.
    """
    folder = Path(name)
    if (PACKAGED / folder).is_dir() and len(folder.parts) == 1 and os.fspath(name) == folder.name:
        return PACKAGED / folder
    if folder.is_dir():
        return folder
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
    modules = manifest.get("modules", {})
    return Model(config, graph, params, manifest["fingerprint"], Path(name).name, modules)
