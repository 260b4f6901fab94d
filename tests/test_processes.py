"""Several processes give what one gives, byte for byte, and the loss of one ends the others with a message."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_train import losses, parameters

from cir_jax import commands, processes
from cir_jax.data import emoji
from cir_jax.retrieval import _units
from cir_jax.vectors import Vectors

LAUNCHER = Path(__file__).resolve().parents[1] / "launch" / "local.sh"
BROKEN = "0035 broken.png"


# ---- how they find each other ----


@pytest.fixture
def environment(monkeypatch):
    """A function that sets variables, and nothing else that tells of other processes."""
    for name in (*processes.VARIABLES, *processes.SLURM, "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)
    return lambda values: [monkeypatch.setenv(name, value) for name, value in values.items()]


def given(*values) -> dict[str, str]:
    return dict(zip(processes.VARIABLES, values))


STEP = dict.fromkeys(processes.SLURM, "1")


@pytest.mark.parametrize(
    ("variables", "how"),
    [
        ({}, ""),
        (given("a:1", "2", "1"), "given"),
        (given("a:1", "1", "0"), ""),
        ({"CIR_JAX_PROCESSES": "auto"}, "auto"),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "4"}, "slurm"),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1"}, ""),
        ({"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "4"}, ""),  # a shell in an allocation
        ({**STEP, "SLURM_STEP_NUM_TASKS": "4", **given("a:1", "2", "1")}, "given"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "auto"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, ""),
    ],
)
def test_the_environment_says_whether_there_are_others(variables, how, environment):
    environment(variables)
    assert processes.asked() == how


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("a:1", "2"), "CIR_JAX_PROCESS not set"),
        (("", "2", "0"), "CIR_JAX_COORDINATOR not set"),
        (("a:1", "2", "2"), "CIR_JAX_PROCESS '2'; expected a number from 1 on and one below"),
        (("a:1", "x", "0"), "CIR_JAX_PROCESSES is 'x'"),
        (("a:1", "auto", "0"), "or CIR_JAX_PROCESSES=auto alone"),
    ],
)
def test_variables_that_contradict_each_other_are_refused(values, message, environment):
    environment(given(*values))
    with pytest.raises(ValueError, match=message):
        processes.asked()


@pytest.mark.parametrize("name", sorted(commands.COMMANDS.keys() - commands.DISTRIBUTED))
def test_the_other_commands_run_as_one_process(name, environment, capsys):
    environment(given("localhost:1", "2", "0"))
    with pytest.raises(SystemExit) as stop:
        commands.start(name)
    assert stop.value.code == 1
    assert (
        f"{name} runs as one process; several compute together in train, embed, search, eval"
        in (capsys.readouterr().err)
    )


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize(("rows", "size"), [(0, 4), (3, 4), (37, 4), (40, 1)])
def test_shares_are_whole_blocks_that_cover_all(count, rows, size, monkeypatch):
    monkeypatch.setattr(processes, "joined", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: count)
    shares = []
    for process in range(count):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        shares.append(processes.share(rows, size))
    assert [row for share in shares for row in share] == [*range(rows)]
    assert all(share.start % size == 0 for share in shares if len(share))
    blocks = [-(-len(share) // size) for share in shares]
    assert max(blocks) - min(blocks) <= 1


def test_alone_nothing_is_exchanged():
    assert processes.first() and not processes.joined()
    assert processes.share(7, 2) == range(7)
    arrays = {"x": np.zeros(3)}
    assert processes.gather(arrays)[0] is arrays
    assert processes.from_first(lambda: None) is None
    processes.check_same("it", "\udce9")


# ---- several of them ----


def together(count: int, *command, **env) -> subprocess.CompletedProcess:
    """`python -m COMMAND` as so many processes, to their end."""
    arguments = [sys.executable, "-m", *map(str, command)]
    launcher = [str(LAUNCHER), str(count)] if count > 1 else []
    variables = {**os.environ, **env}
    done = subprocess.run(
        launcher + arguments, capture_output=True, text=True, timeout=550, env=variables
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def survivors(count: int, victim: int, true, folder: Path, *command) -> list[str]:
    """What the others say of so many processes without a launcher, one of which is killed when something is true."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = f"localhost:{free.getsockname()[1]}"
    arguments = [sys.executable, "-m", *map(str, command)]
    with contextlib.ExitStack() as opened:
        running = []
        for number in range(count):
            variables = {**os.environ, **given(place, str(count), str(number))}
            said = opened.enter_context((folder / f"said{number}").open("w"))
            started = subprocess.Popen(arguments, env=variables, stdout=said, stderr=said)
            running.append(opened.enter_context(started))
            opened.callback(started.kill)
        start = time.monotonic()
        while not true():
            assert time.monotonic() - start < 300
            assert all(process.poll() is None for process in running)
            time.sleep(0.02)
        running[victim].kill()
        start, others = time.monotonic(), [n for n in range(count) if n != victim]
        for number in others:
            running[number].wait(60)
        assert time.monotonic() - start < 60
    said = [(folder / f"said{number}").read_text() for number in others]
    assert {running[number].returncode for number in others} == {-signal.SIGABRT}, said
    return said


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Ninety pictures, and among them a file that is none."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("gallery")
    for row in range(90):
        Image.fromarray(emoji.tiles("noto")[20 * row]).save(folder / f"{row:04d}.png")
    (folder / BROKEN).write_text("not a picture")
    return folder


EMBED = ("--shard-size", 20, "--batch-size", 4)


@pytest.fixture(scope="module")
def embedded(pictures, tmp_path_factory) -> Path:
    """The vectors of one process."""
    folder = tmp_path_factory.mktemp("one") / "v"
    together(1, "cir_jax.embed", "emoji_text", pictures, folder, *EMBED)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_embedding_writes_the_same_bytes(count, pictures, embedded, tmp_path):
    folder = tmp_path / "v"
    done = together(count, "cir_jax.embed", "emoji_text", pictures, folder, *EMBED)
    assert content(folder) == content(embedded)
    assert done.stdout == f"90 vectors of width {Vectors(embedded).width} in {folder}\n"
    assert done.stderr.count(f"{BROKEN}: cannot be read") == 1  # process 0 prints


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_embedding_and_four_go_on(victim, pictures, embedded, tmp_path):
    command = ("cir_jax.embed", "emoji_text", pictures, tmp_path / "v", *EMBED)
    begun = lambda: [*tmp_path.glob("v/vectors-*1.npy")]
    (said,) = survivors(2, victim, begun, tmp_path, *command)
    assert f"process {1 - victim} of 2: error: lost another process" in said
    # JAX knows the coordinator by its silence, and the others by their number.
    assert ("unhealthy (stopped sending heartbeats):\n1" if victim else "leader task") in said
    assert not json.loads((tmp_path / "v" / "manifest.json").read_text())["complete"]
    if victim:
        together(4, *command)
        assert content(tmp_path / "v") == content(embedded)


@pytest.mark.slow
def test_several_processes_that_are_told_to_stop_keep_what_they_have(pictures, embedded, tmp_path):
    """SIGTERM to the launcher reaches all; another number of processes goes on."""
    command = ("cir_jax.embed", "emoji_text", pictures, tmp_path / "v", *EMBED)
    arguments = [sys.executable, "-m", *map(str, command)]
    with subprocess.Popen(
        [LAUNCHER, "2", *arguments], stderr=subprocess.PIPE, text=True
    ) as running:
        while not (tmp_path / "v" / "vectors-00001.npy").exists():
            assert running.poll() is None
            time.sleep(0.02)
        running.terminate()
        said = running.communicate(timeout=60)[1]
    assert running.returncode == 143 and "Traceback" not in said, said
    assert "terminated; finished parts are kept" in said
    assert not json.loads((tmp_path / "v" / "manifest.json").read_text())["complete"]
    together(1, *command)
    assert content(tmp_path / "v") == content(embedded)


@pytest.mark.slow
def test_an_error_of_one_process_is_said_once_and_ends_all(pictures, tmp_path):
    command = ("cir_jax.embed", "emoji_text", pictures, tmp_path / "v", *EMBED, "--strict")
    with pytest.raises(AssertionError, match="without --strict it would be skipped"):
        together(2, *command)
    assert len([*tmp_path.glob("v/vectors-*.npy")]) == 1  # of the shards before it


EVALUATION = """
from cir_jax.config import Evaluation, Run
config = Evaluation(runs=(
    Run("emoji-documents/noto/val", "emoji_documents", "exact", "emoji_text", k=10),
    Run("emoji-text/noto/val", "emoji_text", "scann", "emoji_itm", k=50),
))
"""


def measured(folder: Path) -> dict:
    """results.json without times and without the number of devices."""

    def without_times(x):
        if isinstance(x, list):
            return [without_times(each) for each in x]
        return (
            {k: without_times(v) for k, v in x.items() if k not in timed}
            if isinstance(x, dict)
            else x
        )

    timed = ("milliseconds", "milliseconds_per_query", "time", "machine")
    return without_times(json.loads((folder / "results.json").read_text()))


@pytest.mark.slow
def test_evaluation_writes_the_same_bytes(tmp_path):
    (tmp_path / "small.py").write_text(EVALUATION)
    options = ("--limit", 16, "--batch-size", 16, "--lists")
    for count in (1, 2, 4):
        done = together(
            count,
            "cir_jax.eval",
            tmp_path / "small.py",
            *options,
            "--output",
            tmp_path / str(count),
        )
        assert done.stdout.count("model emoji_itm") == 1
    found = [content(tmp_path / str(count)) for count in (1, 2, 4)]
    for folder in found:
        del folder["results.json"], folder["report.html"]  # these tell times
        assert sorted({Path(name).suffix for name in folder}) == [".npz", ".txt"]
        assert folder == found[0]
    assert measured(tmp_path / "1") == measured(tmp_path / "2") == measured(tmp_path / "4")


def test_candidates_are_scored_in_several_blocks():
    """Else the evaluation above would leave the second stage to process 0."""
    small = SimpleNamespace(feature_bytes=lambda part: 1000)
    rows = np.arange(16 * 50).reshape(16, 50) % 300
    assert [len(block) for _, block in _units(small, rows)] == [256, 44]


@pytest.mark.slow
def test_a_search_is_printed_once(embedded, tmp_path):
    subprocess.run(
        [sys.executable, "-m", "cir_jax.index", embedded, tmp_path / "index"], check=True
    )
    ask = ("cir_jax.search", tmp_path / "index", "--text", "a red heart", "--k", 90)
    one, two = together(1, *ask), together(2, *ask)
    assert one.stdout == two.stdout
    assert one.stdout.count(".png") == 90


QUICKLY = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiling is most of their time
TRAINING = """
from cir_jax.config import Data, Experiment, Mesh, Optim, Train
from cir_jax.data.emoji import VOCABULARY
from cir_jax.data.images import ImageSpec
from cir_jax.data.inputs import Inputs
from cir_jax.data.text import TextSpec
from cir_jax.methods.clip import ClipConfig

config = Experiment(
    method=ClipConfig.tiny(
        Inputs(image=ImageSpec(size=64), text=TextSpec(vocab=str(VOCABULARY), length=24))
    ),
    data=(Data("emoji-text"), Data("emoji-composed", variant="noto-strict")),
    train=Train(steps=6, batch_size=8, log_every=1, save_every=3, eval_every=6),
    optim=Optim(lr=1e-3, warmup=2),
    evals=("emoji-text/noto/val",),
)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a training file, and the run of one process."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.py").write_text(TRAINING)
    together(1, "cir_jax.train", folder / "tiny.py", "--workdir", folder / "one", **QUICKLY)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("count", "fsdp"), [(2, 2), (4, 2)])
def test_parameters_shared_among_processes_train_like_one(count, fsdp, trained, tmp_path):
    """Processes of one device each, so that an axis of the mesh spans processes."""
    command = ("cir_jax.train", trained / "tiny.py", "--workdir", tmp_path, "--mesh.fsdp", fsdp)
    done = together(count, *command, **QUICKLY)
    assert done.stdout.count("the best model is") == 1
    one, several = losses(trained / "one"), losses(tmp_path)
    assert one.keys() == several.keys() == {*range(1, 7)}
    np.testing.assert_allclose([*several.values()], [*one.values()], rtol=1e-4)
    for ours, theirs in zip(parameters(tmp_path), parameters(trained / "one")):
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_training(victim, trained, tmp_path):
    command = ("cir_jax.train", trained / "tiny.py", "--workdir", tmp_path / "run")
    begun = lambda: (tmp_path / "run" / "log.jsonl").exists()
    (said,) = survivors(2, victim, begun, tmp_path, *command, "--train.steps", 10000)
    assert ("unhealthy (stopped sending heartbeats):\n1" if victim else "leader task") in said
