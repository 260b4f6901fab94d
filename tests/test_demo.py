"""The main job on the built-in data: the table, the files, and that the numbers are really those of a trained model."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cir_jax
from cir_jax.config import Evaluation, Experiment, Run, load_config
from cir_jax.data import named_benchmark
from cir_jax.eval import evaluate, print_table
from cir_jax.evaluation import metrics
from cir_jax.model import PACKAGED
from cir_jax.typed import portable

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


def stages(rows, name, index="exact"):
    """Rows of both stages of a benchmark `name/variant`."""
    benchmark, variant = name.split("/")
    wanted = {"benchmark": benchmark, "variant": variant, "index_asked": index}
    return [chosen(rows, stage=stage, **wanted)[0] for stage in (1, 2)]


TWO_STAGES = (
    "emoji-text/noto",
    "emoji-composed/noto",
    "emoji-composed/noto-concepts",
    "emoji-documents/noto",
    "emoji-documents/noto-masked",
)


@pytest.mark.slow
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
    for name, index in itertools.product(TWO_STAGES, ("exact", "scann")):
        if (name, index) == ("emoji-composed/noto-concepts", "scann"):
            continue
        first, second = stages(rows, name, index)
        assert len(second["checkpoints"]) == 2 and second["reranker"] and second["k"] == 50
        assert second["queries"] == first["queries"]


@pytest.mark.slow
def test_galleries_and_queries_are_those_of_the_specification(rows):
    sizes = {
        name: (stages(rows, name)[0]["queries"], stages(rows, name)[0]["gallery"])
        for name in TWO_STAGES
    }
    assert sizes == {
        "emoji-text/noto": (417, 417),
        "emoji-composed/noto": (710, 2859),
        "emoji-composed/noto-concepts": (43, 2859),
        "emoji-documents/noto": (75, 417),
        "emoji-documents/noto-masked": (75, 417),
    }


# Floors a little below what the README reports; random orders reach a few percent at most.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stage", "metric", "floor"),
    (
        ("emoji-text/noto", 1, "recall@10", 0.35),
        ("emoji-composed/noto", 1, "recall@1", 0.8),
        ("emoji-composed/noto", 2, "recall@1", 0.8),
        ("emoji-documents/noto", 2, "recall@10", 0.2),
        ("emoji-documents/noto-masked", 2, "recall@10", 0.2),
    ),
)
def test_the_packaged_models_have_learned_their_task(rows, name, stage, metric, floor):
    assert stages(rows, name)[stage - 1]["metrics"][metric] >= floor


@pytest.mark.slow
@pytest.mark.parametrize("name", ["emoji-composed/noto", "emoji-text/noto"])
def test_the_second_stage_loses_nothing_and_says_what_it_gains(rows, name):
    first, second = stages(rows, name)
    gain = second["metrics"]["recall@1"] - first["metrics"]["recall@1"]
    assert second["gain"]["recall@1"] == pytest.approx(gain)
    assert gain >= 0 and 0 < second["p"]["recall@1"] <= 1


@pytest.mark.slow
def test_edits_are_reported_by_kind_in_both_stages(rows):
    first, second = stages(rows, "emoji-composed/noto")
    kinds = set(named_benchmark("emoji-composed/noto/test").rules)
    assert set(second["rules"]) == set(first["rules"]) == kinds


@pytest.mark.slow
def test_scann_agrees_with_the_exact_list_on_the_full_gallery(rows):
    for benchmark, variant in (("emoji-text", "noto-full"), ("emoji-composed", "noto")):
        (row,) = chosen(rows, benchmark=benchmark, variant=variant, index="scann", stage=1)
        assert row["index_recall@10"] >= 0.98
        (exact,) = chosen(rows, benchmark=benchmark, variant=variant, index="exact", stage=1)
        assert abs(exact["metrics"]["recall@10"] - row["metrics"]["recall@10"]) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO_STAGES)
def test_ranks_of_every_query_are_kept_and_give_the_metrics_again(output, rows, name):
    benchmark = named_benchmark(f"{name}/test")
    for row in stages(rows, name):
        with np.load(output[0] / row["ranks"]) as ranks:
            assert {"ids", "rows", "scores", "rank"} <= set(ranks.files)
            # Stage 2 scores every member of a subset, also those that the list does not hold.
            # Ranks go beyond the lists, which hold the first 200 hits.
            listed = {n: x for n, x in row["metrics"].items() if n.startswith("recall@")}
            assert metrics.evaluate(ranks["rows"], benchmark, tuple(listed)) == listed
            rank = ranks["rank"]
            mrr = np.where(rank < 0, 0, 1 / (1 + np.maximum(rank, 0))).mean()
            assert row["metrics"]["mrr"] == pytest.approx(mrr, abs=1e-12)
            hit = (ranks["rank"] >= 0) & (ranks["rank"] < 10)
            assert np.mean(hit) == row["metrics"]["recall@10"]
            found = np.where(ranks["rows"] >= 0, ranks["scores"], -np.inf)[:, :50]
            assert (np.diff(np.nan_to_num(found, neginf=-1e9), axis=1) <= 0).all()
            assert list(ranks["ids"]) == [query["id"] for query in benchmark.queries]


@pytest.mark.slow
def test_the_table_shows_every_row(output, rows):
    lines = [line for line in output[1].splitlines() if line.startswith(" emoji-")]
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        name, stage, model, index = line.split()[:4]
        assert name == f"{row['benchmark']}/{row['variant']}/{row['split']}"
        assert (stage, index) == (str(row["stage"]), row["index"])
        assert model == row["checkpoints"][-1]["name"]
        assert f" {100 * row['metrics']['recall@10']:.1f} (" in line


@pytest.mark.slow
def test_the_report_shows_pictures_of_both_stages_and_fetches_nothing(output, rows):
    page = (output[0] / "report.html").read_text(encoding="utf-8")
    assert 100_000 < len(page) < 8e6
    assert not re.search(r"(src|href)=.?https?://|<script|@import|url\(http", page)
    for name in TWO_STAGES:
        assert name.split("/")[0] in page
    _, second = stages(rows, "emoji-composed/noto")
    assert f"{100 * second['metrics']['recall@1']:.1f}" in page


@pytest.mark.slow
def test_the_models_that_serve_are_the_packaged_ones(rows):
    found = {(c["name"], c["fingerprint"]) for row in rows for c in row["checkpoints"]}
    assert found == {
        (path.name, cir_jax.load(path.name).fingerprint) for path in PACKAGED.iterdir()
    }


def test_packaged_weights_are_small_and_say_how_they_were_made():
    files = [path for path in PACKAGED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 24e6
    for folder in PACKAGED.iterdir():
        about = json.loads((folder / "manifest.json").read_text())["about"]
        assert {data["split"] for data in about["experiment"]["data"]} == {"train"}
        assert {name.split("/")[2] for name in about["experiment"]["evals"]} == {"val"}


@pytest.mark.parametrize("name", sorted(path.name for path in PACKAGED.iterdir()))
def test_a_packaged_model_is_what_its_config_trains(name):
    """The experiment that a packaged model remembers is the config of its name, up to fields added since."""
    about = json.loads((PACKAGED / name / "manifest.json").read_text())["about"]
    assert same(about["experiment"], portable(load_config(name, Experiment)))


def same(stored, now) -> bool:
    """Whether two JSON values agree in every field of the first."""
    if isinstance(stored, dict):
        return all(key in now and same(value, now[key]) for key, value in stored.items())
    if isinstance(stored, list):
        return len(stored) == len(now) and all(map(same, stored, now))
    return stored == now


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
    assert re.search(r"emoji-text/noto/val\s+1\s+emoji_text\s+exact", capsys.readouterr().out)


@pytest.mark.slow
def test_the_wheel_runs_the_demo_in_an_empty_folder(tmp_path):
    """Built, installed somewhere else without its dependencies, and started where no source is."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    wheel = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)]
    subprocess.run([*pip, *wheel], check=True, timeout=300)
    (built,) = tmp_path.glob("*.whl")
    assert built.stat().st_size < 32e6  # 24 of weights, 8 of data
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
    assert "emoji-documents/noto-masked/test" in done.stdout
    assert (tmp_path / "empty" / "results" / "emoji" / "results.json").is_file()
