"""The main job on the built-in data: the table, the files, and that the numbers are really those of a trained model."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cir_jax
from cir_jax import metrics
from cir_jax.config import Evaluation, Run
from cir_jax.eval import evaluate, named_benchmark, print_table
from cir_jax.model import PACKAGED

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "cir_jax.eval", "emoji", "--output", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.fixture(scope="module")
def rows(output):
    result = json.loads((output[0] / "results.json").read_text())
    assert result["format"] == 1
    assert {"python", "machine", "precision", "versions"} <= result["environment"].keys()
    return result["rows"]


def chosen(rows, **wanted):
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def test_every_run_has_a_row_with_everything(rows):
    fields = {"benchmark", "variant", "split", "run", "stage", "index", "queries", "gallery"}
    fields |= {"metrics", "interval", "random", "milliseconds_per_query", "checkpoints"}
    assert {row["index"] for row in rows} == {"exact", "scann"}
    for row in rows:
        assert fields <= row.keys()
        assert row["split"] == "test"
        for name in ("recall@1", "recall@5", "recall@10", "mrr"):
            low, high = row["interval"][name]
            assert 0 <= low <= row["metrics"][name] <= high <= 1
        assert row["random"]["recall@10"] < row["interval"]["recall@10"][0]
    for style in ("noto", "twemoji"):
        (row,) = chosen(rows, variant=style, index="exact")
        assert (row["queries"], row["gallery"]) == (417, 417)
        (row,) = chosen(rows, variant=f"{style}-full", index="exact")
        assert (row["queries"], row["gallery"]) == (417, 2859)


def test_unseen_concepts_are_found_far_above_chance(rows):
    (row,) = chosen(rows, variant="noto+twemoji", index="exact")
    assert row["queries"] == 417
    single = [chosen(rows, variant=s, index="exact")[0]["metrics"] for s in ("noto", "twemoji")]
    assert row["metrics"]["recall@10"] == pytest.approx(np.mean([m["recall@10"] for m in single]))
    assert row["metrics"]["recall@10"] >= 0.35  # measured: see the README; a random order has 0.024
    assert row["random"]["recall@10"] < 0.03


def test_scann_agrees_with_the_exact_list_on_the_full_gallery(rows):
    for style in ("noto", "twemoji"):
        (row,) = chosen(rows, variant=f"{style}-full", index="scann")
        assert row["index_recall@10"] >= 0.98
        (exact,) = chosen(rows, variant=f"{style}-full", index="exact")
        assert abs(exact["metrics"]["recall@10"] - row["metrics"]["recall@10"]) < 0.02


def test_ranks_of_every_query_are_kept_and_give_the_metrics_again(output, rows):
    (row,) = chosen(rows, variant="noto", index="exact")
    with np.load(output[0] / row["ranks"]) as ranks:
        assert {"ids", "rows", "scores", "rank"} <= set(ranks.files)
        benchmark = named_benchmark("emoji-text/noto/test")
        assert metrics.evaluate(ranks["rows"], benchmark) == row["metrics"]
        assert np.mean((ranks["rank"] >= 0) & (ranks["rank"] < 10)) == row["metrics"]["recall@10"]
        assert (np.diff(ranks["scores"], axis=1) <= 0).all()
        assert list(ranks["ids"]) == [query["id"] for query in benchmark.queries]


def test_the_table_shows_every_row(output, rows):
    lines = [line for line in output[1].splitlines() if line.startswith(" emoji-text/")]
    assert len(lines) == len(rows)
    for row in rows:
        assert any(f"{100 * row['metrics']['recall@10']:.1f} (" in line for line in lines)


def test_the_model_that_serves_is_the_packaged_one(rows):
    fingerprint = cir_jax.load("emoji_text").fingerprint
    assert {c["fingerprint"] for row in rows for c in row["checkpoints"]} == {fingerprint}


def test_packaged_weights_are_small_and_say_how_they_were_made():
    files = [path for path in PACKAGED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 24e6
    about = json.loads((PACKAGED / "emoji_text" / "manifest.json").read_text())["about"]
    assert about["experiment"]["data"][0]["split"] == "train"
    assert {name.split("/")[2] for name in about["experiment"]["evals"]} == {"val"}


def test_where_scann_is_missing_the_exact_index_serves_and_says_so(monkeypatch, tmp_path, capsys):
    from cir_jax import index, scann_index

    def absent():
        raise RuntimeError("ScaNN cannot be imported (simulated)")

    monkeypatch.setattr(scann_index, "import_scann", absent)
    index._say_once.cache_clear()
    run = Run("emoji-text/noto/val", "emoji_text", index="scann")
    (row,) = evaluate(Evaluation((run,)), tmp_path)
    assert row["index"] == "exact"
    assert "exact index serves instead" in capsys.readouterr().err
    print_table([row])
    assert re.search(r"emoji-text/noto/val\s+exact", capsys.readouterr().out)


@pytest.mark.slow
def test_the_wheel_runs_the_demo_in_an_empty_folder(tmp_path):
    """Built, installed somewhere else without its dependencies, and started where no source is."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    wheel = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)]
    subprocess.run([*pip, *wheel], check=True, timeout=300)
    (built,) = tmp_path.glob("*.whl")
    assert built.stat().st_size < 24e6
    install = ["install", "--no-deps", "--target", str(tmp_path / "site"), str(built)]
    subprocess.run([*pip, *install], check=True, timeout=300)
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "cir_jax.eval", "emoji"],
        cwd=tmp_path / "empty",
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert "noto+twemoji" in done.stdout
    assert (tmp_path / "empty" / "results" / "emoji" / "results.json").is_file()
