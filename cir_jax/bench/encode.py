"""Speed and memory of the encoders beside PyTorch on the CPU; the command is `python -m cir_jax.bench encode`.

One core computes, pinned, and both sides take turns in one process; a rate is rows per second of the processor's time,
the best of all repetitions. Memory is measured in a new process for each number.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cir_jax.bench.measure import MEBIBYTE, in_new_process, pin, resident
from cir_jax.encoders import beit3, bert, clip, resnext, vit
from cir_jax.encoders.layers import Dtype

RATE = 1e-6
# What forward passes are to reach of PyTorch's float32 (platform.md 3).
GOALS = {"float32": 0.85, "bfloat16": 3.0}


def _beit3_image(**options):
    """The picture expert without the mask token, which nothing here reads."""
    return beit3.ImageTower(beit3.Beit3Config(mask_token=False, initial="scratch"), **options)


@dataclass(frozen=True)
class Family:
    """An encoder: how it is built, what of it is called, and what it reads (`tokens` 0 for pictures of 224 pixels)."""

    title: str
    build: Callable[..., nnx.Module]
    call: Callable[[nnx.Module, dict[str, jax.Array]], jax.Array]
    tokens: int = 0
    words: int = 0


CLIP = {"embed": 512, "activation": "quick_gelu", "epsilon": 1e-5}
picture = lambda encoder, batch: encoder(batch["image"])
FAMILIES = {
    "clip-image": Family(
        "CLIP ViT-B/32, pictures",
        functools.partial(clip.ClipVision, clip.VisionConfig(), **CLIP),
        picture,
    ),
    "clip-text": Family(
        "CLIP ViT-B/32, texts of 77 tokens",
        functools.partial(clip.ClipText, clip.TextConfig(), **CLIP),
        lambda encoder, batch: encoder(batch["text"]),
        tokens=77,
        words=49406,
    ),
    "blip-image": Family(
        "BLIP ViT-B/16, pictures", functools.partial(vit.Vit, vit.VIT_B16_224), picture
    ),
    "beit3-image": Family(
        "BEiT-3 base, pictures", _beit3_image, lambda encoder, batch: encoder.tokens(batch["image"])
    ),
    "bert": Family(
        "BERT base, texts of 64 tokens",
        functools.partial(bert.Bert, bert.BERT_BASE),
        lambda encoder, batch: encoder(batch["text"], batch["text_mask"]),
        tokens=64,
        words=30522,
    ),
    "resnext": Family(
        "ResNeXt-101 32x8d, pictures",
        functools.partial(resnext.Resnext, resnext.RESNEXT_101),
        picture,
    ),
}


class Ours:
    """An encoder of this package with what is measured of it."""

    def __init__(
        self, family: str, batch: dict[str, np.ndarray], dtype: Dtype, remat: bool, rate: float
    ):
        self.batch = jax.device_put(batch)
        build = lambda: FAMILIES[family].build(dtype=dtype, remat=remat, rngs=nnx.Rngs(0))
        graph, shapes = nnx.split(nnx.eval_shape(build))
        self.params = drawn(nnx.to_pure_dict(shapes))
        call = lambda params, batch: FAMILIES[family].call(nnx.merge(graph, params), batch)

        def step(params, batch):
            grads = jax.grad(lambda params: jnp.mean(jnp.square(call(params, batch))))(params)
            return jax.tree.map(lambda p, g: p - rate * g, params, grads)

        self._forward, self._step = jax.jit(call), jax.jit(step, donate_argnums=0)

    @property
    def parameters(self) -> int:
        """Numbers in the parameters."""
        return sum(x.size for x in jax.tree.leaves(self.params))

    def forward(self) -> None:
        self._forward(self.params, self.batch).block_until_ready()

    def train(self) -> None:
        """Gradients of all parameters and a step of plain SGD."""
        self.params = jax.block_until_ready(self._step(self.params, self.batch))


def drawn(shapes):
    """Parameters of these shapes. numpy draws them: a compiled start would count as memory of the encoder."""
    draw = np.random.default_rng(0)

    def value(path, shape):
        if path[-1].key in ("scale", "variance") or not shape.shape:
            return jnp.ones(shape.shape)
        return jnp.asarray(0.02 * draw.standard_normal(shape.shape, np.float32))

    return jax.tree_util.tree_map_with_path(value, shapes)


@dataclass(frozen=True)
class Result:
    """One line of the table: rows per second, and MiB by which a process grows."""

    family: str
    step: str
    dtype: str
    batch: int
    rows_per_second: float
    torch_rows_per_second: float
    ratio: float
    goal: float | None
    memory: float
    torch_memory: float

    @property
    def title(self) -> str:
        """The encoder in words."""
        return FAMILIES[self.family].title

    def as_json(self) -> dict[str, str | float | None]:
        """What `--output` writes of it."""
        return asdict(self)


def examples(family: str, rows: int) -> dict[str, np.ndarray]:
    """A batch for an encoder, without padding."""
    kind, draw = FAMILIES[family], np.random.default_rng(0)
    if not kind.tokens:
        return {"image": draw.standard_normal((rows, 224, 224, 3), np.float32)}
    ids = draw.integers(1, kind.words, (rows, kind.tokens), np.int32)
    if family == "clip-text":
        ids[:, -1] = kind.words + 1  # the end token
    return {"text": ids, "text_mask": np.ones(ids.shape, bool)}


def measured(
    families: Sequence[str], dtypes: Sequence[Dtype], rows: int, repeats: int, remat: bool
) -> Iterator[Result]:
    """The lines of the table one by one, on the first core that this process may use.

    Raises:
      ImportError: PyTorch or a library of its models is missing.
      MemoryError: a process that measures memory was killed.
    """
    pin()
    for family in families:
        rates = _rates(family, dtypes, rows, repeats, remat)
        for step in ("forward", "train"):
            torch_memory = _memory(family, rows, step)
            for dtype in dtypes:
                ours, theirs, ratio = rates[step, dtype]
                goal = GOALS[dtype] if step == "forward" else None
                memory = _memory(family, rows, step, dtype, remat)
                line = (family, step, dtype, rows, ours, theirs, ratio, goal, memory, torch_memory)
                yield Result(*line)


def _rates(family, dtypes, rows, repeats, remat) -> dict[tuple[str, str], tuple[float, ...]]:
    """By step and type: our rate, PyTorch's and their ratio, all taking turns."""
    from cir_jax.bench.peers.encoders import Peer

    batch, found = examples(family, rows), {}
    peer = Peer(family, batch, 1, RATE)
    encoders = [Ours(family, batch, dtype, remat, RATE) for dtype in dtypes]
    if any(encoder.parameters != peer.parameters for encoder in encoders):
        raise RuntimeError(
            f"{family} has {encoders[0].parameters:,} parameters here, {peer.parameters:,} in PyTorch"
        )
    for step in ("forward", "train"):
        calls = [getattr(side, step) for side in (peer, *encoders)]
        seconds = _taking_turns(calls, repeats)
        torch_best = min(seconds[0])
        for dtype, ours in zip(dtypes, seconds[1:]):
            rates = rows / min(ours), rows / torch_best
            found[step, dtype] = (*rates, torch_best / min(ours))
    return found


def _taking_turns(calls: Sequence[Callable[[], None]], repeats: int) -> list[list[float]]:
    """Seconds of processor time of each call, `repeats` times, after a turn that warms up."""
    seconds = [[] for _ in calls]
    for _ in range(1 + repeats):
        for call, times in zip(calls, seconds):
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
    return [times[1:] for times in seconds]


def _memory(family: str, rows: int, step: str, dtype: str | None = None, remat=False) -> float:
    """MiB by which a new process grows at most when it does a step twice; PyTorch's without a dtype."""
    arguments = family, rows, step, dtype, remat
    return in_new_process(f"{family} ({step})", _growth, *arguments) / MEBIBYTE


def _growth(family, rows, step, dtype, remat) -> int:
    pin()
    batch = examples(family, rows)
    if dtype is None:
        from cir_jax.bench.peers import library
        from cir_jax.bench.peers.encoders import Peer

        for name in ("torch", "torchvision", "transformers"):
            library(name)
        make = lambda: Peer(family, batch, 1, RATE)
    else:
        jax.block_until_ready(jnp.zeros(1))
        make = lambda: Ours(family, batch, dtype, remat, RATE)
    before = resident("VmRSS")
    side = make()
    for _ in range(2):
        getattr(side, step)()
    return resident("VmHWM") - before
