"""Four simulated devices, exact products, warnings as errors, and an account of every skipped test."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

if "CIR_JAX_TEST_CACHE" not in os.environ:
    # Compiled programs are shared by the processes of this test run, and by no other.
    os.environ["CIR_JAX_TEST_CACHE"] = tempfile.mkdtemp(prefix="cir_jax-tests-")
    atexit.register(shutil.rmtree, os.environ["CIR_JAX_TEST_CACHE"], ignore_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["CIR_JAX_TEST_CACHE"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_default_matmul_precision", "highest")

QUICK = "not slow and not parity"  # the marks of the README's command, as pyproject.toml has them


def pytest_configure(config):
    # Compiling takes most of their time, and without optimising half as long; the slow ones compile as in use.
    jax.config.update("jax_disable_most_optimizations", config.option.markexpr == QUICK)


SHARED = Path(__file__).resolve().parents[2] / "shared"
NEEDS_SHARED = "needs ../shared"


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """The folder of small copies of all published data sets, by name."""
    from data_layouts import LAYOUTS

    folder = tmp_path_factory.mktemp("data")
    for name, write in LAYOUTS.items():
        write(folder / name)
    return folder


@pytest.fixture
def at_home(made, monkeypatch):
    """They are where published data sets are looked for."""
    monkeypatch.setenv("CIR_JAX_DATA", str(made))
    monkeypatch.setattr("cir_jax.data.circo.GALLERY", 6)


@pytest.fixture
def copied(made, tmp_path):
    """A function: a copy of a small data set, to be changed."""
    return lambda name: shutil.copytree(made / name, tmp_path / name)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real annotation files beside the project; a test without it is skipped."""
    if not SHARED.is_dir():
        pytest.skip(NEEDS_SHARED)
    return SHARED


@pytest.fixture(params=["float64", "float32"])
def precision(request):
    """(dtype, tolerance): 1e-6 of the printed digits in x64 mode, the design's 1e-5 in float32."""
    if request.param == "float32":
        yield np.float32, 1e-5
        return
    with jax.enable_x64(True):
        yield np.float64, 1e-6


@pytest.fixture
def tiny_experiment():
    """A CLIP of a few thousand parameters on the built-in pictures, with and without reference pictures."""
    from cir_jax.config import Data, Experiment, Optim, Train
    from cir_jax.data.emoji import VOCABULARY
    from cir_jax.data.images import ImageSpec
    from cir_jax.data.inputs import Inputs
    from cir_jax.data.text import TextSpec
    from cir_jax.methods.clip import ClipConfig

    inputs = Inputs(image=ImageSpec(size=64), text=TextSpec(vocab=str(VOCABULARY), length=24))
    return Experiment(
        method=ClipConfig.tiny(inputs),
        data=(Data("emoji-text"), Data("emoji-composed", variant="noto-strict")),
        train=Train(steps=8, batch_size=8, log_every=1, save_every=2, eval_every=4),
        optim=Optim(lr=1e-3, warmup=2),
        evals=("emoji-text/noto/val",),
    )


def pytest_terminal_summary(terminalreporter, config):
    unexplained = _unexplained(terminalreporter)
    if unexplained and os.environ.get("CI") == "true":
        terminalreporter.section("skipped without need (fails under CI=true)")
        for nodeid, reason in unexplained:
            terminalreporter.write_line(f"{nodeid}: {reason}")


def pytest_sessionfinish(session, exitstatus):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") == "true" and exitstatus == 0 and reporter and _unexplained(reporter):
        session.exitstatus = 1


def _unexplained(reporter):
    """Skipped tests whose reason is not a missing ../shared."""
    skipped = reporter.stats.get("skipped", [])
    reason = lambda report: str(
        report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
    )
    return [(r.nodeid, reason(r)) for r in skipped if NEEDS_SHARED not in reason(r)]
