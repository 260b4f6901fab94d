"""Every packaged config loads, builds and shards; bad ones are named clearly."""

import functools
import json
import subprocess
import sys

import jax
import pytest

from cir_jax import sharding
from cir_jax.config import Evaluation, Experiment, find_config, load_config, packaged_configs
from cir_jax.data import benchmark_parts, named_benchmark
from cir_jax.data.inputs import Inputs
from cir_jax.data.text import tokenizer
from cir_jax.methods import method_name
from cir_jax.methods.clip import ClipConfig
from cir_jax.model import PACKAGED, find_model
from cir_jax.training import optim
from cir_jax.training.step import make_init
from cir_jax.typed import from_json, to_json


def loaded():
    for name in packaged_configs():
        try:
            yield name, load_config(name, Experiment)
        except ValueError:
            yield name, load_config(name, Evaluation)


CONFIGS = dict(loaded())
EXPERIMENTS = {name: c for name, c in CONFIGS.items() if isinstance(c, Experiment)}
EVALUATIONS = {name: c for name, c in CONFIGS.items() if isinstance(c, Evaluation)}
DEMO = {name for name in EXPERIMENTS if (PACKAGED / name).is_dir()}  # the others are recipes


def test_the_demo_has_an_evaluation_and_a_model():
    assert "emoji" in EVALUATIONS
    used = {m for run in EVALUATIONS["emoji"].runs for m in (run.retriever, run.reranker) if m}
    assert used == DEMO


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_builds_and_shards(name):
    config, mesh = EXPERIMENTS[name], sharding.make_mesh(fsdp=2, tensor=2)
    tx = optim.optimizer(config.optim, config.train.steps)
    init = make_init(config, tx)
    abstract = jax.eval_shape(init, jax.random.key(0))
    places = sharding.shardings(abstract, mesh)
    assert jax.tree.structure(places) == jax.tree.structure(abstract)
    updates, _ = jax.eval_shape(tx.update, abstract["params"], abstract["opt"], abstract["params"])
    assert updates == abstract["params"]
    assert not config.train.batch_size % 8
    assert config.train.eval_every <= config.train.steps
    for benchmark in config.evals:
        assert "val" in benchmark_parts(benchmark)[2], "choices are made on val"


@pytest.mark.parametrize("name", sorted(DEMO))
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


def test_runs_of_the_demo_exist():
    for run in EVALUATIONS["emoji"].runs:
        assert len(named_benchmark(run.benchmark).queries)
        for model in filter(None, (run.retriever, run.reranker)):
            assert find_model(model).is_dir()


@pytest.mark.parametrize("name", EVALUATIONS)
def test_benchmarks_of_an_evaluation_exist(name, at_home):
    for run in EVALUATIONS[name].runs:
        assert len(named_benchmark(run.benchmark).queries)


def test_unknown_names_list_the_known_ones(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'emojis'; there are .*, emoji, emoji_cir,"):
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
    ("path", "value", "words"),
    [
        ("embed", "5", 'embed is "5", expected a whole number'),
        ("embed", 5.0, "embed is 5.0, expected a whole number"),
        ("embed", True, "embed is true, expected a whole number"),
        ("activation", 1, "activation is 1, expected one of 'quick_gelu', 'gelu', 'relu'"),
        ("remat", "no", 'remat is "no", expected true or false'),
        ("largest_scale", "1", 'largest_scale is "1", expected a finite number'),
        ("largest_scale", 10**400, "expected a finite number"),
        ("vision", None, "vision is null, expected an object"),
        ("visoin", {}, 'no field "visoin"; did you mean "vision"?'),
        ("vision.widht", 3, 'no field "vision.widht"; did you mean "vision.width"?'),
        ("inputs.text.vocab", None, "inputs.text.vocab is null, expected text"),
        ("inputs.image.mean", "abc", 'inputs.image.mean is "abc", expected a list of 3'),
        ("inputs.image.mean", [0, 1, "2"], r'inputs.image.mean\[2\] is "2", expected a finite num'),
        ("inputs.image.background", [1, 2], "expected a list of 3 or null"),
        ("inputs.image.size", 0, "image size 0; expected at least 1"),
    ],
)
def test_nothing_is_converted_to_fit_a_stored_config(path, value, words):
    stored = json.loads(json.dumps(to_json(ClipConfig(inputs=Inputs()))))
    *parents, last = path.split(".")
    functools.reduce(dict.__getitem__, parents, stored)[last] = value
    with pytest.raises(ValueError, match=f"this is not a ClipConfig of this version:\n  .*{words}"):
        from_json(ClipConfig, stored)


def test_whole_numbers_are_numbers_and_defaults_may_be_absent():
    assert from_json(ClipConfig, {"largest_scale": 7}) == ClipConfig(largest_scale=7.0)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("config = Optim(lr_rate=3)", 'line 2: Optim has no field "lr_rate"; did you mean "lr"?'),
        ("config = (", "line 2: SyntaxError: '.' was never closed"),
        ("raise SystemExit(0)", "line 2: the file ends the program; it must only define"),
        ("config = {}['a']", "line 2: KeyError: 'a'"),
        ("config = Run('a', 'b', k=0)", "line 2: k is 0 and fusion None; expected k from 1 on"),
        (
            "config = Experiment(3, (), Train(1, 1))",
            "config.method is a int, expected one of ClipC",
        ),
        (
            "config = Experiment(ClipConfig(), (), Train(1, 'x'), Optim(betas=(1,)))",
            r'config.train.batch_size is "x", .*\n.*optim.betas is \[1\], expected a list of 2',
        ),
    ],
)
def test_whatever_a_config_file_does_is_one_error_with_its_line(tmp_path, line, words):
    path = tmp_path / "own.py"
    used = "from cir_jax.config import *; from cir_jax.config import Optim, Run, Train"
    path.write_text(f"{used}; from cir_jax.methods.clip import ClipConfig\n{line}\n")
    with pytest.raises(ValueError, match=words) as error:
        load_config(str(path), Experiment)
    assert str(path) in str(error.value)


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
