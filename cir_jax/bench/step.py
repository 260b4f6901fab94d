"""What a training step costs beside its compiled program; the command is `python -m cir_jax.bench step`.

The real loop runs, with its data, log and progress, on the parameters of a transformer of 24 layers; only the compiled step
is replaced by one that gives its state back.
"""

import contextlib
import io
import itertools
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

from cir_jax.commands import Common

GOAL = 5.0  # milliseconds


@dataclass(frozen=True, kw_only=True)
class Step(Common):
    """Milliseconds per training step outside the compiled step: data, dispatch, log. The goal is 5.

    The clock's time holds on an idle machine; the processor's time, of the thread that trains, on a busy one too.
    """

    steps: int = 600
    """steps to run; times are medians over all but the first 50"""
    batch: int = 8
    """pictures of a batch, 16 x 16 pixels each"""

    def __post_init__(self):
        if self.steps < 100 or self.batch < 1:
            raise ValueError(
                f"--steps is {self.steps} and --batch {self.batch}; expected at least 100 and 1"
            )


def step(command: Step) -> None:
    """Measure and print."""
    clock, processor = milliseconds(command.steps, command.batch)
    print(
        f"per step outside the compiled step: {clock:.2f} ms, of the processor {processor:.2f} ms"
    )
    print(f"the goal is {GOAL:.0f} ms")


def milliseconds(steps: int, batch: int) -> tuple[float, float]:
    """Per step of the real loop around a step that does nothing: by the clock, and of the thread's processor time."""
    from cir_jax.train import train
    from cir_jax.training import step as steps_of

    real, times = steps_of.program, []
    idle = lambda config, mesh: without_work(real(config, mesh), times)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(steps_of, "program", idle),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        train(experiment(steps, batch), Path(folder) / "run")
    apart = [[y - x for x, y in itertools.pairwise(each)][50:] for each in zip(*times)]
    return tuple(1000 * statistics.median(each) for each in apart)


def without_work(program, times: list[tuple[float, float]]):
    """A program whose step gives its state back; notes the times at which steps begin."""
    import jax
    import jax.numpy as jnp

    places = jax.tree.map(lambda x: x.sharding, program.state)
    zeros = ("loss", "grad_norm", "accuracy", "scale")
    same = lambda state, batch, number: (state, dict.fromkeys(zeros, jnp.float32(0)))
    compiled = jax.jit(same, donate_argnums=0, out_shardings=(places, None))

    def idle(*arguments):
        times.append((time.perf_counter(), time.thread_time()))
        return compiled(*arguments)

    return program._replace(step=idle)


def experiment(steps: int, batch: int):
    """A CLIP with the parameter tree of ViT-L/14, narrow, on the built-in data."""
    from cir_jax.config import Data, Experiment, Train
    from cir_jax.data.emoji import VOCABULARY
    from cir_jax.data.images import ImageSpec
    from cir_jax.data.inputs import Inputs
    from cir_jax.data.text import TextSpec
    from cir_jax.methods.clip import ClipConfig

    tiny = ClipConfig.tiny(Inputs(ImageSpec(size=16), TextSpec(vocab=str(VOCABULARY), length=16)))
    vision, text = replace(tiny.vision, layers=24), replace(tiny.text, layers=12)
    train = Train(steps, batch, log_every=20, save_every=10 * steps, eval_every=10 * steps)
    return Experiment(
        replace(tiny, vision=vision, text=text),
        (Data("emoji-text"),),
        replace(train, augment=False),
    )
