"""Commands stopped by Ctrl-C, SIGTERM and kill -9 at any moment: exit codes, what is kept, what is computed again."""

import functools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import run

from cir_jax import files
from cir_jax.data import emoji
from cir_jax.vectors import Vectors, VectorWriter
from cir_jax.workspace import Workspace, digest

STOPS = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}
KILLS = 10


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_stopped(done: subprocess.CompletedProcess, number) -> None:
    code, word = STOPS[number]
    said = done.stderr.decode()
    assert done.returncode == code, said
    assert said.splitlines()[-1] == f"{word}; finished parts are kept"
    assert "Traceback" not in said


def draw_pictures(folder: Path, count: int) -> Path:
    """So many small pictures; equal ones are one file on the disk."""
    for n in range(count // 10):
        Image.fromarray(emoji.tiles("noto")[5 * n]).resize((24, 24)).save(folder / f"{n:04d}.png")
    for n in range(count // 10, count):
        os.link(folder / f"{n % (count // 10):04d}.png", folder / f"{n:04d}.png")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("pictures"), 500)


@pytest.fixture(scope="module")
def undisturbed(pictures, tmp_path_factory) -> Path:
    """The vectors of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed") / "vectors"
    assert embed(pictures, folder).returncode == 0
    return folder


def embed(pictures, folder, shard_size=10, **options):
    sizes = ("--shard-size", shard_size, "--batch-size", shard_size)
    return run("cir_jax.embed", "emoji_text", pictures, folder, *sizes, **options)


def shards(folder: Path) -> dict[str, tuple]:
    """What tells for each finished shard whether it was ever written again."""
    if not (folder / files.MANIFEST).exists():
        return {}
    named = json.loads((folder / files.MANIFEST).read_text())["shards"]
    stats = {shard["vectors"]: (folder / shard["vectors"]).stat() for shard in named}
    return {name: (found.st_ino, found.st_mtime_ns) for name, found in stats.items()}


@pytest.mark.slow
def test_ten_kills_change_no_byte_and_no_finished_shard_of_5000_pictures(tmp_path):
    (tmp_path / "pictures").mkdir()
    pictures, whole = draw_pictures(tmp_path / "pictures", 5000), tmp_path / "whole"
    start = time.monotonic()
    assert embed(pictures, whole, 100).returncode == 0
    seconds = time.monotonic() - start
    seed = int(os.environ.get("CIR_JAX_KILL_SEED", 20261121))
    draw = random.Random(seed)
    # Uniform over the run: after so many finished shards of 50, and somewhere within the next one.
    moments = sorted(draw.uniform(0, 50) for _ in range(KILLS))
    folder, before, killed = tmp_path / "vectors", {}, []
    for moment in moments:
        kill = functools.partial(_passed, folder, moment, seconds / 60, {})
        done = embed(pictures, folder, 100, stop=(signal.SIGKILL, kill))
        after = shards(folder)
        killed.append((round(moment, 2), done.returncode, len(after)))
        assert before.items() <= after.items(), "a finished shard was lost or written again"
        before = after
    print(f"seed {seed}; (moment in shards, exit code, finished shards): {killed}")
    assert {code for _, code, _ in killed} == {-signal.SIGKILL}
    assert embed(pictures, folder, 100).returncode == 0
    assert before.items() <= shards(folder).items()
    assert contents(folder) == contents(whole)


def _passed(folder: Path, moment: float, per_shard: float, seen: dict) -> bool:
    """True from the given fraction of the shard on that follows `int(moment)` finished ones."""
    if len(list(folder.glob("ids-*.txt"))) >= int(moment):
        seen.setdefault("since", time.monotonic())
    return "since" in seen and time.monotonic() - seen["since"] > moment % 1 * per_shard


@pytest.mark.parametrize("number", STOPS)
def test_a_stopped_embedding_keeps_its_shards_and_goes_on(number, pictures, undisturbed, tmp_path):
    folder = tmp_path / "vectors"
    begun = lambda: (folder / "vectors-00002.npy").exists()
    assert_stopped(embed(pictures, folder, stop=(number, begun)), number)
    kept = shards(folder)
    assert 2 <= len(kept) < 50
    assert not list(folder.glob(f"{files.TEMPORARY}*"))
    with pytest.raises(ValueError, match="incomplete"):
        Vectors(folder)
    assert embed(pictures, folder).returncode == 0
    assert kept.items() <= shards(folder).items()
    assert contents(folder) == contents(undisturbed)


@pytest.mark.parametrize("number", STOPS)
def test_a_stopped_index_leaves_nothing(number, tmp_path):
    rows = np.random.default_rng(0).standard_normal((60_000, 32), np.float32)
    writer = VectorWriter(tmp_path / "vectors", fingerprint=None)
    writer.add(rows, [str(n) for n in range(len(rows))])
    writer.finish()
    before, start = contents(tmp_path), time.monotonic()
    running = lambda: time.monotonic() - start > 0.7
    arguments = (tmp_path / "vectors", tmp_path / "index", "--kind", "scann", "--recall", 0.999)
    assert_stopped(run("cir_jax.index", *arguments, stop=(number, running)), number)
    assert contents(tmp_path) == before


TRAIN = """
import dataclasses
from cir_jax.config import Data, Experiment, Optim, Train
from cir_jax.data.emoji import VOCABULARY
from cir_jax.data.images import ImageSpec
from cir_jax.data.inputs import Inputs
from cir_jax.data.text import TextSpec
from cir_jax.methods.clip import ClipConfig

inputs = Inputs(image=ImageSpec(size=64), text=TextSpec(vocab=str(VOCABULARY), length=24))
config = Experiment(
    method=ClipConfig.tiny(inputs),
    data=(Data("emoji-text"),),
    train=Train(steps=24, batch_size=8, log_every=1, save_every=4, eval_every=24),
)
"""


@pytest.mark.slow  # test_train kills a run with -9 in the fast suite
@pytest.mark.parametrize("number", STOPS)
def test_a_stopped_training_goes_on_from_its_checkpoint(number, tmp_path):
    (tmp_path / "tiny.py").write_text(TRAIN)
    workdir, command = tmp_path / "run", ("cir_jax.train", tmp_path / "tiny.py", "--workdir")
    saved = lambda: (workdir / "checkpoints" / "4" / "params").is_dir()
    assert_stopped(run(*command, workdir, stop=(number, saved)), number)
    assert not (workdir / "model").exists()
    done = run(*command, workdir)
    assert done.returncode == 0, done.stderr.decode()
    assert "continuing from step" in done.stderr.decode()
    assert run(*command, tmp_path / "other").returncode == 0
    fingerprints = [
        files.read_manifest(folder / "model", "checkpoint")["fingerprint"]
        for folder in (workdir, tmp_path / "other")
    ]
    assert fingerprints[0] == fingerprints[1]


EVAL = """
from cir_jax.config import Evaluation, Run

text = "emoji-text/noto/val"
config = Evaluation(
    runs=(
        Run(text, "emoji_text", reranker="emoji_itm", k=10),
        Run("emoji-text/twemoji/val", "emoji_text"),
        Run("emoji-composed/noto-concepts/val", "emoji_cir", reranker="emoji_rerank", k=5),
    )
)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", STOPS)
def test_a_stopped_evaluation_keeps_its_runs_and_goes_on(number, tmp_path):
    (tmp_path / "some.py").write_text(EVAL)
    output = tmp_path / "results"
    command = ("cir_jax.eval", tmp_path / "some.py", "--output", output)
    finished = lambda: list(output.glob("parts/run-*"))
    assert_stopped(run(*command, stop=(number, finished)), number)
    assert not (output / "results.json").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in output.glob("parts/run-*")}
    assert 1 <= len(kept) < 3
    (first,) = (row for row in json.loads(str(np.load(output / "parts" / min(kept))["rows"]))[:1])
    done = run(*command)
    assert done.returncode == 0, done.stderr.decode()
    rows = json.loads((output / "results.json").read_text())["rows"]
    # The milliseconds were measured in the first process: nothing computed them again.
    assert first["milliseconds"] in [row["milliseconds"] for row in rows]
    assert not (output / "parts").exists() and not (output / files.LOCK).exists()
    assert [row["stage"] for row in rows[:5]] == [1, 2, 1, 1, 2]


def test_a_second_signal_ends_a_command_that_does_not_end(tmp_path):
    program = (
        "import os, signal, time, sys, types\n"
        "module = types.ModuleType('cir_jax.embed')\n"
        "def main():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\n"
        "    finally:\n"
        "        os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\n"
        "module.main = main\n"
        "sys.modules['cir_jax.embed'] = module\n"
        "from cir_jax.commands import start\n"
        "start('embed')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], timeout=50)
    assert done.returncode == -signal.SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize("room", [5_000, 300_000])
def test_training_on_a_full_disk_ends_in_one_line_and_goes_on_when_there_is_room(room, tmp_path):
    (tmp_path / "tiny.py").write_text(TRAIN)
    workdir, command = tmp_path / "run", ("cir_jax.train", tmp_path / "tiny.py", "--workdir")
    done = run(*command, workdir, limits=[(resource.RLIMIT_FSIZE, room)])
    said = done.stderr.decode()
    assert done.returncode == 1 and "Traceback" not in said, said
    (line,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert "could not be written" in line and "make room" in line and str(workdir) in line
    assert not (workdir / "model").exists()
    again = run(*command, workdir)
    assert again.returncode == 0 and (workdir / "model").is_dir(), again.stderr.decode()


# A shell lets what it runs in the background ignore SIGINT, and so does all that is started from there.
HEEDING = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", STOPS)
def test_a_stop_during_imports_is_no_crash(number, tmp_path):
    """Libraries that are broken up while they are imported end the process with a segmentation fault, now and then."""
    for seconds in (0.3, 0.5, 0.7, 0.9, 1.2, 1.5):
        command = [sys.executable, "-m", "cir_jax.eval", "emoji", "--output", str(tmp_path / "r")]
        running = subprocess.Popen(
            [sys.executable, "-c", HEEDING, *command],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        time.sleep(seconds)
        running.send_signal(number)
        said = running.communicate(timeout=100)[1].decode()
        # Before the command has begun, the signal's default action is all there is.
        assert running.returncode in (STOPS[number][0], -number), said
        assert "Traceback" not in said or running.returncode == -number


def test_names_in_a_part_lead_no_deletion_out_of_the_folder(tmp_path):
    folder, outside = tmp_path / "results" / "parts", tmp_path / "results" / "kept"
    folder.mkdir(parents=True)
    outside.write_text("mine")
    names = np.array(json.dumps(["..", "../kept", str(outside), "items-1"]))
    np.savez(folder / f"run-{digest('key')}.npz", rows=np.array("[]"), parts=names)
    (folder / "items-1").mkdir()
    work = Workspace(folder)
    assert work.outcome("key", lambda: pytest.fail("computed again")) == []
    work.remove()
    assert outside.read_text() == "mine" and not folder.exists()


READING = """
import os, signal, sys, types
from cir_jax.commands import start

def shipped():
    import cir_jax, orbax.checkpoint as ocp
    restore = ocp.StandardCheckpointer.restore

    def stopped(*args):
        os.kill(os.getpid(), signal.SIGINT)
        restored = restore(*args)
        print("read", flush=True)
        return restored

    ocp.StandardCheckpointer.restore = stopped
    cir_jax.load("emoji_text")
    print("loaded")

sys.modules["cir_jax.embed"] = types.SimpleNamespace(main=shipped)
start("embed")
"""


def test_a_stop_waits_until_a_checkpoint_is_read():
    """Orbax's threads would print tracebacks of an event loop that is closed, now and then."""
    done = subprocess.run([sys.executable, "-c", READING], capture_output=True, timeout=100)
    assert done.stdout.split() == [b"read"], done.stderr.decode()
    assert done.returncode == 130
    assert done.stderr.decode().splitlines() == ["interrupted; finished parts are kept"]


SWALLOWED = """
import os, signal, sys, time, types
from cir_jax.commands import start

def main():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    except BaseException:
        pass  # as a library may
    try:
        time.sleep(60)
    finally:
        time.sleep(0.3)  # longer than until the next look
        print("removed", flush=True)

sys.modules["cir_jax.embed"] = types.SimpleNamespace(main=main)
start("embed")
"""


def test_a_stop_that_a_library_swallows_comes_again_and_breaks_no_cleaning_up():
    done = subprocess.run([sys.executable, "-c", SWALLOWED], capture_output=True, timeout=30)
    assert done.stdout.split() == [b"removed"], done.stderr.decode()
    assert done.returncode == 130
    assert done.stderr.decode().splitlines() == ["interrupted; finished parts are kept"]
