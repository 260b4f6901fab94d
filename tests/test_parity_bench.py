"""`python -m cir_jax.bench` beside PyTorch. Needs the extra `[parity]`."""

import json
import re
from dataclasses import replace

import jax
import numpy as np
import processes
import pytest
from flax import traverse_util
from reference import library
from test_bench import SMALL, count, task

from cir_jax import checkpoint
from cir_jax.bench import __main__ as bench
from cir_jax.bench import encode, train
from cir_jax.bench.load import write_pictures
from cir_jax.conversion.clip import hugging_face_rules
from cir_jax.conversion.rules import original
from cir_jax.training import optim

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("family", bench.FAMILIES)
def test_both_sides_have_the_same_parameters(family):
    library("transformers"), library("torchvision")
    from cir_jax.bench.peers.encoders import Peer

    assert Peer(family, encode.examples(family, 1), 1, 1e-6).parameters == count(family)


def test_the_command_measures_and_writes(tmp_path):
    library("transformers")
    written, few = tmp_path / "numbers.json", ("--batch", 1, "--repeat", 1, "--dtype", "float32")
    done = processes.run(
        "cir_jax.bench", "encode", "--family", "clip-text", *few, "--output", written
    )
    assert done.returncode == 0, done.stderr.decode()
    forward, train = json.loads(written.read_text())["results"]
    assert (forward["step"], forward["goal"]) == ("forward", 0.85)
    assert (train["step"], train["goal"]) == ("train", None)
    weights = 4 * count("clip-text") / 2**20
    for line in (forward, train):
        assert line["ratio"] == pytest.approx(
            line["rows_per_second"] / line["torch_rows_per_second"]
        )
        assert min(line["memory"], line["torch_memory"]) > weights
    assert forward["rows_per_second"] > train["rows_per_second"] > 0
    assert done.stdout.decode().count("CLIP ViT-B/32, texts") == 2


def test_loading_gives_the_same_pictures_and_a_table(tmp_path):
    library("torchvision")
    write_pictures(tmp_path / "pictures", 12)
    few = ("--repeat", 1, "--epochs", 1, "--batch", 4)
    done = processes.run("cir_jax.bench", "load", "--folder", tmp_path / "pictures", *few)
    assert done.returncode == 0, done.stderr.decode()
    shown = done.stdout.decode()
    assert "pictures differ by at most 0.0e+00" in shown
    for reader in ("DataLoader, folder", "folder", "tar", "ArrayRecord"):
        assert re.search(rf"^ *{reader} +\d+ ", shown, re.MULTILINE), shown


# ---- training steps ----


def peer(experiment, batch, compiled=False):
    library("transformers")
    from cir_jax.bench.peers.training import Peer

    return Peer(experiment, batch, dtype="float32", device="cpu", compiled=compiled)


def their_names(method: str, params) -> dict[str, np.ndarray]:
    """Our parameters under the names of the model in PyTorch."""
    flat = {name: np.asarray(x) for name, x in traverse_util.flatten_dict(params, sep="/").items()}
    if method == "clip":
        return {f"model.{name}": make() for name, _, make in original(flat, hugging_face_rules())}
    found = {}
    for name, x in flat.items():
        for layer in range(len(x)) if "/blocks/" in name else [None]:
            found |= [one(name, x, layer)]
    return found


def one(name: str, x: np.ndarray, layer: int | None) -> tuple[str, np.ndarray]:
    if layer is not None:
        # The two-branch encoder's layers of the second kind come behind those of the first.
        kind = 1 if "/linear/" in name else 0
        name = re.sub("/blocks/(mean/|linear/)?", f"/blocks/{layer + kind}/", name)
        x = x[layer]
    name = name.replace("text/embedding", "embedding") if name == "text/embedding" else name
    name = name.replace("/expert", "").replace("ln_final", "ln_post").replace("patch_", "patch/")
    if name.endswith("/kernel"):
        x = x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T
    name = re.sub("/(kernel|scale)$|(?<=embedding)$", "/weight", name)
    return name.replace("/", "."), x


@pytest.mark.parametrize("method", bench.METHODS)
def test_both_sides_train_alike(method):
    """The same losses over steps that change the weights: the same model, loss, gradients, clipping and AdamW."""
    torch = library("torch")
    experiment = task(method).experiment
    experiment = replace(experiment, optim=replace(experiment.optim, lr=3e-3))
    batch = train.batch(SMALL[method], 4)
    ours, theirs = train.Ours(experiment, batch), peer(experiment, batch)
    assert ours.parameters == theirs.parameters
    size = 0.2 if method == "blip_rerank" else 0.1  # so that the loss of each moves
    shaken = lambda x: x + size * np.random.default_rng(x.size).standard_normal(x.shape, np.float32)
    parts = {part: jax.tree.map(shaken, ours.state[part]) for part in ("params", "frozen")}
    ours.state |= jax.device_put(parts)
    names = their_names(method, optim.join(parts["params"], parts["frozen"]))
    theirs.model.load_state_dict({name: torch.tensor(x) for name, x in names.items()}, strict=True)
    losses = []
    for _ in range(4):
        ours.step(), theirs.step()
        losses.append((ours.value, float(theirs.value)))
    found, expected = np.array(losses).T
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert np.ptp(expected) > 0.05


@pytest.mark.parametrize("method", bench.METHODS)
def test_full_sizes_have_the_same_parameters(method):
    torch = library("torch")
    library("transformers")
    from cir_jax.bench.peers.training import METHODS

    config = train.FAMILIES[method].config
    with torch.device("meta"):
        theirs = METHODS[type(config)](config)
    _, shapes = checkpoint.abstract_params(config)
    ours = sum(x.size for x in jax.tree.leaves(shapes))
    assert sum(x.numel() for x in theirs.parameters()) == ours
    frozen = train.FAMILIES[method].frozen
    _, held = optim.split_frozen(shapes, frozen)
    names = [name.replace(".", "/") for name, _ in theirs.named_parameters()]
    count = sum(
        x.numel()
        for name, x in zip(names, theirs.parameters())
        if any(re.fullmatch(each, name) for each in frozen)
    )
    assert count == sum(x.size for x in jax.tree.leaves(held))


def test_the_command_measures_training_and_writes(tmp_path, monkeypatch, capsys):
    library("transformers")
    monkeypatch.setattr(train, "FAMILIES", SMALL)
    written = tmp_path / "numbers.json"
    few = ["--family", "blip_cir", "--batch", "3", "--repeat", "1", "--device", "cpu"]
    bench.main(["train", *few, "--output", str(written)])
    ours, theirs = json.loads(written.read_text())["results"]
    assert (ours["side"], theirs["side"]) == ("cir_jax", "PyTorch, eager")
    rates = [line["steps_per_second"] for line in (ours, theirs)]
    assert ours["ratio"] is None and theirs["ratio"] == pytest.approx(rates[0] / rates[1])
    uses = [line["utilization"] for line in (ours, theirs)]
    assert uses[0] / uses[1] == pytest.approx(theirs["ratio"]) and 0 < max(uses) < 1
    for line in (ours, theirs):
        assert (line["batch"], line["dtype"]) == (3, "float32") and line["memory"] > 0
        assert sum(line["shares"].values()) == pytest.approx(1)
        assert min(line["shares"].values()) > 0
    assert capsys.readouterr().out.count("BLIP base, stage I ") == 2
    with pytest.raises(RuntimeError, match=r"JAX finds no gpu .*cir_jax\[cuda\]"):
        bench.main(["train", *few[:-1], "gpu"])


def test_where_compiling_fails_pytorch_runs_eagerly_and_says_so(monkeypatch, capsys):
    torch = library("torch")

    def broken(model):
        raise RuntimeError("no compiler\nof any kind")

    monkeypatch.setattr(torch, "compile", lambda model: broken)
    theirs = peer(task("clip").experiment, train.batch(SMALL["clip"], 4), compiled=True)
    theirs.step()
    assert theirs.title == "PyTorch, eager (compile fails)" and np.isfinite(float(theirs.value))
    told = capsys.readouterr().err
    assert told == "torch.compile fails, eager instead: RuntimeError: no compiler\n"
