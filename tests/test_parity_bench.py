"""`python -m cir_jax.bench` beside PyTorch. Needs the extra `[parity]`."""

import json
import re

import processes
import pytest
from reference import library
from test_bench import count

from cir_jax.bench import __main__ as bench
from cir_jax.bench import encode
from cir_jax.bench.load import write_pictures

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("family", bench.FAMILIES)
def test_both_sides_have_the_same_parameters(family):
    library("transformers"), library("torchvision")
    from cir_jax.bench.peers import Peer

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
