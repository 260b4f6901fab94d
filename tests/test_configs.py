"""Every packaged config loads, builds and shards; bad ones are named clearly."""

import json
import subprocess
import sys

import jax
import pytest

from cir_jax import optim, sharding
from cir_jax.config import (
    Evaluation,
    Experiment,
    find_config,
    from_json,
    load_config,
    packaged_configs,
    to_json,
)
from cir_jax.data.inputs import Inputs
from cir_jax.data.text import tokenizer
from cir_jax.eval import named_benchmark
from cir_jax.methods import method_name
from cir_jax.methods.clip import ClipConfig
from cir_jax.model import find_model
from cir_jax.train import make_init


def loaded():
    for name in packaged_configs():
        try:
            yield name, load_config(name, Experiment)
        except ValueError:
            yield name, load_config(name, Evaluation)


CONFIGS = dict(loaded())
EXPERIMENTS = {name: c for name, c in CONFIGS.items() if isinstance(c, Experiment)}
EVALUATIONS = {name: c for name, c in CONFIGS.items() if isinstance(c, Evaluation)}


def test_the_demo_has_an_evaluation_and_a_model():
    assert "emoji" in EVALUATIONS
    used = {m for run in EVALUATIONS["emoji"].runs for m in (run.retriever, run.reranker) if m}
    assert used == EXPERIMENTS.keys()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_builds_and_shards(name):
    config, mesh = EXPERIMENTS[name], sharding.make_mesh(fsdp=2, tensor=2)
    init = make_init(config, optim.optimizer(config.optim, config.train.steps))
    abstract = jax.eval_shape(init, jax.random.key(0))
    places = sharding.shardings(abstract, mesh)
    assert jax.tree.structure(places) == jax.tree.structure(abstract)
    assert not config.train.batch_size % 8
    for benchmark in config.evals:
        assert named_benchmark(benchmark).split == "val", "choices are made on val"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_vocabulary_fits_the_model(name):
    """One row for each entry; BLIP's models have one more, [ENC]."""
    method = EXPERIMENTS[name].method
    rows = (method.encoder if hasattr(method, "encoder") else method.text).vocabulary
    assert rows == tokenizer(method.inputs.text).size + method_name(method).startswith("blip")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_round_trips_through_json(name):
    config = EXPERIMENTS[name]
    value = json.loads(json.dumps(to_json(config)))
    assert from_json(Experiment[type(config.method)], value) == config


@pytest.mark.parametrize("name", EVALUATIONS)
def test_runs_of_an_evaluation_exist(name):
    for run in EVALUATIONS[name].runs:
        assert len(named_benchmark(run.benchmark).queries)
        for model in filter(None, (run.retriever, run.reranker)):
            assert find_model(model).is_dir()


def test_unknown_names_list_the_known_ones(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'emojis'; there are emoji, emoji_cir,"):
        find_config("emojis")
    with pytest.raises(FileNotFoundError, match=r"missing\.py"):
        find_config(str(tmp_path / "missing.py"))


def test_a_config_of_another_kind_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"must define `config = Experiment.*it defines a Evaluation"
    ):
        load_config("emoji", Experiment)
    (tmp_path / "empty.py").write_text("confg = 3\n")
    with pytest.raises(ValueError, match="it defines nothing of that name"):
        load_config(str(tmp_path / "empty.py"), Experiment)


def test_all_faults_of_a_stored_config_are_one_message():
    value = to_json(ClipConfig(inputs=Inputs()))
    value["embed"], value["vision"]["patches"] = "many", 7
    with pytest.raises(ValueError, match="this is not a ClipConfig") as error:
        from_json(ClipConfig, value)
    assert "embed" in str(error.value)
    assert "patches" in str(error.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--optim.weight-decy", "1"], "--optim.weight-decay"),
        (["--optim.lr", "fast"], "Error parsing --optim.lr"),
        (["--mesh.fsdp", "3"], "fsdp=3 x tensor=1 does not divide"),
    ],
)
def test_wrong_overrides_end_in_one_clear_error(options, expected, tmp_path):
    command = [
        sys.executable,
        "-m",
        "cir_jax.train",
        "emoji_text",
        "--workdir",
        str(tmp_path / "run"),
    ]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode in (1, 2)
    assert expected in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
