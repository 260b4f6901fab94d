"""Whole training steps beside PyTorch; the command is `python -m cir_jax.bench train`.

Each side runs alone in a new process: parameters, gradients and both moments of a large model are 7 to 11 GB, and two
sides that take turns would need them twice. On the CPU a process is pinned to one core and its time is the processor's,
which other work on the machine disturbs little; on a GPU it is that of the clock.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from cir_jax import checkpoint, flops, memory
from cir_jax.bench.encode import drawn
from cir_jax.bench.measure import MEBIBYTE, in_new_process, pin, resident
from cir_jax.bench.shares import shares
from cir_jax.config import Experiment, Optim, Train
from cir_jax.encoders.beit3 import BEIT3_LARGE
from cir_jax.encoders.clip import OPENAI_VITS
from cir_jax.encoders.layers import Dtype
from cir_jax.methods.blip_cir import BlipCirConfig
from cir_jax.methods.blip_rerank import BlipRerankConfig
from cir_jax.methods.cfir import CfirConfig
from cir_jax.methods.clip import ClipConfig
from cir_jax.training import optim
from cir_jax.training.step import make_init, make_step

Device = Literal["cpu", "gpu"]
Side = Literal["cir_jax", "eager", "compile"]


@dataclass(frozen=True)
class Family:
    """A method in the size that is measured, and what of it does not train; `rows` of a batch on the CPU and on a GPU."""

    title: str
    config: Any
    tokens: int
    rows: dict[Device, int]
    frozen: tuple[str, ...] = ()
    query: tuple[str, ...] = ("text",)


BOTH = ("image", "text")
FAMILIES = {
    "clip": Family("CLIP ViT-L/14", ClipConfig(**OPENAI_VITS["L/14"]), 77, {"cpu": 2, "gpu": 32}),
    "blip_cir": Family(
        "BLIP base, stage I",
        BlipCirConfig(),
        32,
        {"cpu": 2, "gpu": 32},
        ("image/.*", "image_project/.*"),
        BOTH,
    ),
    "blip_rerank": Family(
        "BLIP base, stage II",
        BlipRerankConfig(),
        32,
        {"cpu": 2, "gpu": 16},
        ("image/.*", "fusion/.*"),
        BOTH,
    ),
    "cfir": Family(
        "BEiT-3 large",
        CfirConfig(replace(BEIT3_LARGE, mask_token=False)),
        64,
        {"cpu": 2, "gpu": 32},
    ),
}
# A rate at which nothing is learned: the numbers of a step do not depend on it.
OPTIM = Optim(lr=1e-6, schedule="constant")
STEPS: dict[Device, int] = {"cpu": 1, "gpu": 10}  # of a repetition
SIDE = 2048  # of the matrices whose product is the most that a processor does


def batch(family: Family, rows: int) -> dict[str, dict[str, np.ndarray]]:
    """Random queries and items, without padding."""
    draw, config = np.random.default_rng(0), family.config
    size, words = config.inputs.image.size, vocabulary(config)
    picture = lambda: draw.standard_normal((rows, size, size, 3), np.float32)
    ids = draw.integers(1, words - 2, (rows, family.tokens), np.int32)
    ids[:, -1] = words - 1  # where CLIP reads
    query = {"text": ids, "text_mask": np.ones(ids.shape, bool)}
    query |= {"image": picture()} if "image" in family.query else {}
    return {"query": query, "item": {"image": picture()}}


def vocabulary(config) -> int:
    """Rows of a method's table of words."""
    return (config.encoder if hasattr(config, "encoder") else config.text).vocabulary


# ---- one side ----


@dataclass(frozen=True)
class Task:
    """What a side is to do."""

    family: Family
    side: Side
    device: Device
    dtype: Dtype
    rows: int
    repeats: int
    remat: bool

    @property
    def experiment(self) -> Experiment:
        """The experiment whose step is measured."""
        method = replace(self.family.config, dtype=self.dtype, remat=self.remat)
        train = Train(steps=1000, batch_size=self.rows)
        return Experiment(method, (), train, replace(OPTIM, frozen=self.family.frozen))


class Ours:
    """An experiment's state and compiled step."""

    title = "cir_jax"

    def __init__(self, config: Experiment, batch):
        tx = optim.optimizer(config.optim, config.train.steps)
        graph, _ = checkpoint.abstract_params(config.method)
        state = jax.eval_shape(make_init(config, tx), jax.random.key(0))
        moments = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state["opt"])
        # Copied, because a step takes over memory of XLA's only, not numpy's.
        params = {part: jax.tree.map(jnp.copy, drawn(state[part])) for part in ("params", "frozen")}
        self.state, self.batch, self.number = {**params, "opt": moments}, jax.device_put(batch), 0
        step = jax.jit(make_step(graph, tx, config.train.seed), donate_argnums=0)
        self._step = step.lower(self.state, self.batch, np.int32(0)).compile()

    @property
    def parameters(self) -> int:
        """Numbers in the parameters."""
        parts = self.state["params"], self.state["frozen"]
        return sum(x.size for x in jax.tree.leaves(parts))

    @property
    def value(self) -> float:
        """The loss before the last step."""
        return float(self.metrics["loss"])

    def step(self) -> None:
        self.state, self.metrics = self._step(self.state, self.batch, np.int32(self.number))
        self.number += 1

    def wait(self) -> None:
        jax.block_until_ready(self.state)

    def memory(self) -> int:
        """Bytes of a GPU at most."""
        return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]

    def shares(self) -> dict[str, float]:
        """Where the time of a step goes."""
        return shares(self._step.as_text(), lambda: (self.step(), self.wait()))

    @staticmethod
    def product(dtype: Dtype, size: int) -> None:
        """A product of two square matrices."""
        x = jnp.ones((size, size), dtype)
        _product(x, x).block_until_ready()


_product = jax.jit(functools.partial(jnp.dot, preferred_element_type=jnp.float32))


def operations(config: Experiment, batch) -> int:
    """Floating-point operations of the products of one step, without those that rematerialisation repeats."""
    tx = optim.optimizer(config.optim, config.train.steps)
    graph, _ = checkpoint.abstract_params(replace(config.method, remat=False))
    state = jax.eval_shape(make_init(config, tx), jax.random.key(0))
    return flops.count(make_step(graph, tx, 0), state, batch, np.int32(0))


@dataclass(frozen=True)
class Measured:
    """What the process of a side found.

    Attributes:
      side: what ran, in words.
      parameters: numbers in the parameters.
      seconds: of a step, the best repetition.
      memory: bytes, of the GPU or by which the process grew.
      shares: of the time of a step, by `shares.KINDS`.
      best: operations per second of the best product of the side, on the CPU.
      operations: of a step; ours alone counts them.
    """

    side: str
    parameters: int
    seconds: float
    memory: int
    shares: dict[str, float]
    best: float | None
    operations: int | None


def measure(task: Task) -> Measured:
    """Run one side, in a process that does nothing else.

    Raises:
      MemoryError: the device cannot hold it.
    """
    try:
        return _measure(task)
    except jax.errors.JaxRuntimeError as error:
        if not memory.full(error):
            raise
        raise MemoryError(
            f"a batch of {task.rows} does not fit {memory.devices()}; give a smaller --batch, or --remat"
        ) from None


def _measure(task):
    cpu = task.device == "cpu"
    if cpu:
        pin()
        jax.config.update("jax_platforms", "cpu")
    clock = time.process_time if cpu else time.perf_counter
    config, examples = task.experiment, batch(task.family, task.rows)
    if task.side == "cir_jax":
        jax.block_until_ready(jnp.zeros(1))
        kind, make = Ours, lambda: Ours(config, examples)
    else:
        from cir_jax.bench.peers.training import Peer as kind

        options = {"dtype": task.dtype, "device": task.device, "compiled": task.side == "compile"}
        make = lambda: kind(config, examples, **options)
    best = 2 * SIDE**3 / _best(lambda: kind.product(task.dtype, SIDE), clock, 5) if cpu else None
    before = resident("VmRSS")
    side = make()
    seconds = _best(lambda: _steps(side, STEPS[task.device]), clock, task.repeats)
    return Measured(
        side.title,
        side.parameters,
        seconds / STEPS[task.device],
        resident("VmHWM") - before if cpu else side.memory(),
        side.shares(),
        best,
        operations(config, examples) if task.side == "cir_jax" else None,
    )


def _best(call: Callable[[], None], clock: Callable[[], float], repeats: int) -> float:
    """The seconds of the fastest of so many calls, after one that warms up."""
    seconds = []
    for _ in range(1 + repeats):
        start = clock()
        call()
        seconds.append(clock() - start)
    return min(seconds[1:])


def _steps(side, count: int) -> None:
    for _ in range(count):
        side.step()
    side.wait()


# ---- all of them ----


@dataclass(frozen=True)
class Result:
    """One line of the table; `ratio` is our rate by that of this side, and `utilization` a share of the peak."""

    family: str
    title: str
    side: str
    dtype: str
    batch: int
    steps_per_second: float
    ratio: float | None
    utilization: float | None
    memory: float
    shares: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """What `--output` writes of it."""
        return asdict(self)


def measured(
    families: Sequence[str],
    sides: Sequence[Side],
    dtype: Dtype,
    device: Device,
    rows: int | None,
    repeats: int,
    remat: bool,
    peak: float | None,
) -> Iterator[Result]:
    """The lines of the table one by one: of each family first ours, then PyTorch's `sides`.

    Args:
      rows: of a batch; None for those of each family.
      peak: operations per second of the device in bfloat16, if known; on a CPU the best product of a side takes its place.

    Raises:
      ImportError: PyTorch or a library of its models is missing.
      MemoryError: a process was killed.
    """
    for name in families:
        family, found = FAMILIES[name], []
        count = rows or family.rows[device]
        for side in ("cir_jax", *sides):
            task = Task(family, side, device, dtype, count, repeats, remat)
            found.append(in_new_process(f"{name} ({side})", measure, task))
        ours = found[0]
        known = peak if dtype == "bfloat16" else None
        most = max(each.best for each in found) if device == "cpu" else known
        for each in found:
            if each.parameters != ours.parameters:
                raise RuntimeError(
                    f"{name} has {ours.parameters:,} parameters here, {each.parameters:,} in PyTorch"
                )
            yield Result(
                name,
                family.title,
                each.side,
                dtype,
                count,
                1 / each.seconds,
                None if each is ours else each.seconds / ours.seconds,
                ours.operations / each.seconds / most if most else None,
                each.memory / MEBIBYTE,
                each.shares,
            )


def found_device(wanted: Device | None) -> tuple[Device, str, float | None]:
    """Where to measure, its name in JAX and its peak in bfloat16 if that is known.

    A new process asks for it: whoever does keeps most of a GPU's memory.

    Raises:
      RuntimeError: there is no such device, or PyTorch cannot use it.
    """
    device, kind, peak = in_new_process("the device", _found_device, wanted)
    if device not in ("cpu", "gpu"):
        raise RuntimeError(
            f"JAX finds a {kind} here, which PyTorch cannot use; measure on the CPU: --device cpu"
        )
    if device == "gpu":
        from cir_jax.bench.peers import library

        torch = library("torch")
        if not torch.cuda.is_available():
            raise RuntimeError(
                f"JAX finds {kind}, but torch {torch.__version__} finds no GPU; install PyTorch's build for CUDA, "
                "or measure on the CPU: --device cpu"
            )
    return device, kind, peak


def _found_device(wanted: Device | None) -> tuple[str, str, float | None]:
    try:
        device = jax.devices(wanted)[0]
    except RuntimeError as error:
        raise RuntimeError(
            f"JAX finds no {wanted} ({error}); for a GPU: pip install 'cir_jax[cuda]'"
        ) from None
    peak = flops.peak() if device.platform == "gpu" else None
    return device.platform, device.device_kind, peak and peak / jax.device_count()
