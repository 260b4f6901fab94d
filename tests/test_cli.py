"""The commands as a user starts them, with the packaged model, in processes of their own."""

import html
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import processes
import pytest
from test_methods import INPUTS, drawn

import cir_jax
from cir_jax.checkpoint import save_model
from cir_jax.commands import COMMANDS, start
from cir_jax.data import emoji
from cir_jax.methods import METHODS
from cir_jax.vectors import Vectors

BROKEN = "broken.png"
DOCUMENT = (
    "The café fox lives near the river. A red fox & its cubs hunt mice at night under the moon."
)


def run(*arguments, fails=False, **options) -> subprocess.CompletedProcess:
    done = processes.run(*arguments, **options)
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    assert "Traceback" not in done.stderr, done.stderr
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Sixty named pictures, one of them in a folder below, and a file that is none."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("gallery")
    (folder / "more of them").mkdir()
    for row in range(0, 2400, 40):
        name = re.sub(r"\W+", " ", emoji.items()[row].name)
        place = folder / ("more of them" if row == 0 else ".") / f"{name}.png"
        Image.fromarray(emoji.tiles("noto")[row]).save(place)
    (folder / BROKEN).write_text("not a picture")
    return folder


@pytest.fixture(scope="module")
def made(pictures, tmp_path_factory) -> Path:
    """A folder with `vectors`, `exact` and `scann`, made by the commands."""
    folder = tmp_path_factory.mktemp("made")
    done = run("cir_jax.embed", "emoji_text", pictures, folder / "vectors")
    assert BROKEN in done.stderr
    for kind in ("exact", "scann"):
        run("cir_jax.index", folder / "vectors", folder / kind, "--kind", kind)
    return folder


@pytest.fixture(scope="module")
def re_rankers(tmp_path_factory) -> Path:
    """A folder with an untrained `blip_itm` and `blip_rerank`, texts that are to be searched for, and one that is none."""
    folder = tmp_path_factory.mktemp("second stage")
    for name in ("blip_itm", "blip_rerank"):
        model = drawn(METHODS[name][0].tiny(INPUTS))
        save_model(folder / name, model.config, model.params)
    (folder / "fox.txt").write_text(DOCUMENT, encoding="utf-8")
    (folder / "latin.txt").write_bytes(DOCUMENT.encode("latin-1"))
    (folder / "empty.txt").write_text(" \n")
    return folder


def results(output: str) -> list[list[str]]:
    """Score, id and stage of each line that a search prints."""
    found = re.findall(r"^ *\d+ +(\S+) +(.+?) +([12]) *$", output, re.MULTILINE)
    return [list(line) for line in found]


def ranked(output: str) -> list[str]:
    return [name for _, name, _ in results(output)]


def test_vectors_know_their_pictures_their_model_and_what_was_skipped(made, pictures):
    vectors = Vectors(made / "vectors")
    assert len(vectors) == len({*vectors.ids}) == 60
    assert [item["id"] for item in vectors.skipped] == [BROKEN]
    assert vectors.checkpoint == "emoji_text"
    model = cir_jax.load("emoji_text")
    assert vectors.fingerprint == model.fingerprint
    again = model.encode("item", [pictures / name for name in vectors.ids[:5]])
    np.testing.assert_allclose(vectors.array()[:5], again, atol=1e-6)


def test_a_picture_finds_itself_and_a_page_shows_it(made, pictures, tmp_path):
    name = Vectors(made / "vectors").ids[7]
    page = tmp_path / "page.html"
    for kind in ("exact", "scann"):
        done = run(
            "cir_jax.search", made / kind, "--image", pictures / name, "--k", 4, "--html", page
        )
        assert ranked(done.stdout)[0] == name
        assert len(ranked(done.stdout)) == 4
    text = page.read_text()
    assert text.count("<figure") == 4
    assert text.count("data:image/") == 5  # the query's picture too
    assert html.escape(name) in text
    assert not re.search(r"(src|href)=['\"](?!data:)", text), "the page fetches something"


def test_words_find_what_training_has_named(made):
    item = emoji.items()[480]
    assert item.split == "train"
    found = ranked(run("cir_jax.search", made / "exact", "--text", item.name, "--k", 3).stdout)
    assert re.sub(r"\W+", " ", item.name) + ".png" in found


def test_python_gives_what_the_command_prints(made):
    model, index = cir_jax.load("emoji_text"), cir_jax.open_index(made / "exact")
    results = cir_jax.search(model, index, text="a red heart", k=5)
    printed = ranked(
        run("cir_jax.search", made / "exact", "--text", "a red heart", "--k", 5).stdout
    )
    assert [result.id for result in results] == printed
    assert [r.score for r in results] == sorted((r.score for r in results), reverse=True)
    assert all(index.ids[r.row] == r.id for r in results)


def test_k_beyond_the_gallery_gives_the_gallery(made):
    assert (
        len(ranked(run("cir_jax.search", made / "exact", "--text", "x", "--k", 500).stdout)) == 60
    )


def printed(results) -> list[list[str]]:
    return [[f"{r.score:.4f}", r.id, str(r.stage)] for r in results]


def test_a_second_model_orders_the_best_again(made, re_rankers):
    model, index = cir_jax.load("emoji_text"), cir_jax.open_index(made / "scann")
    second = cir_jax.load(re_rankers / "blip_itm")
    options = {"text": "a red heart", "k": 7}
    expected = cir_jax.search(model, index, **options, reranker=second, candidates=5)
    command = ["--text", "a red heart", "--k", 7, "--rerank", re_rankers / "blip_itm"]
    done = run("cir_jax.search", made / "scann", *command, "--candidates", 5)
    assert results(done.stdout) == printed(expected)
    assert [stage for *_, stage in results(done.stdout)] == ["2"] * 5 + ["1"] * 2
    first = cir_jax.search(model, index, **options)
    assert {r.id for r in expected[:5]} == {r.id for r in first[:5]}
    assert [r.id for r in expected] != [r.id for r in first]


def test_a_document_in_a_file_is_searched_for(made, re_rankers, tmp_path):
    model, index = cir_jax.load("emoji_text"), cir_jax.open_index(made / "exact")
    page = tmp_path / "page.html"
    command = ["--document", re_rankers / "fox.txt", "--rerank", "emoji_text", "--k", 6]
    done = run("cir_jax.search", made / "exact", *command, "--candidates", 4, "--html", page)
    expected = cir_jax.search(model, index, document=DOCUMENT, k=6, reranker=model, candidates=4)
    assert results(done.stdout) == printed(expected)
    text = page.read_text()
    assert html.escape(DOCUMENT) in text and text.count("<figure") == 6


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--document", "{re_rankers}/latin.txt"], "latin.txt is no UTF-8 text"),
        (["--document", "{re_rankers}/empty.txt"], "document is empty"),
        (["--document", "{re_rankers}/none.txt"], "none.txt"),
        (["--document", "{re_rankers}"], "second stage"),
        (["--document", "{re_rankers}/fox.txt", "--text", "a fox"], "a document asks alone"),
        (["--text", "x", "--rerank", "{re_rankers}/none"], "there is no model"),
        (["--text", "x", "--rerank", "{re_rankers}/blip_rerank"], "image and text; this one has"),
        (["--text", "x", "--rerank", "emoji_text", "--candidates", "0"], "at least 1"),
        (["--text", "x", "--checkpoint", "{re_rankers}/blip_itm"], "the index holds vectors of"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_mistakes_with_two_stages_end_in_one_clear_line(
    made, re_rankers, arguments, expected, monkeypatch, capsys
):
    filled = [argument.format(re_rankers=re_rankers) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["search", str(made / "exact"), *filled])
    with pytest.raises(SystemExit) as stop:
        start("search")
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and expected in line


def test_an_interrupted_embedding_continues(made, pictures, tmp_path, capsys):
    from cir_jax.embed import embed

    class Stop(Exception):
        pass

    calls = []

    def stop_at_third(self, *arguments, **options):
        calls.append(len(arguments[1]))
        if len(calls) == 3:
            raise Stop
        return encode(self, *arguments, **options)

    encode = cir_jax.Model.encode
    options = {"batch_size": 10, "shard_size": 20}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(cir_jax.Model, "encode", stop_at_third)
        embed("emoji_text", pictures, tmp_path / "v", **options)
    assert json.loads((tmp_path / "v" / "manifest.json").read_text())["rows"] > 0
    with pytest.raises(ValueError, match="is incomplete"):
        Vectors(tmp_path / "v")
    embed("emoji_text", pictures, tmp_path / "v", **options)
    whole = Vectors(made / "vectors")
    assert Vectors(tmp_path / "v").ids == whole.ids
    np.testing.assert_allclose(Vectors(tmp_path / "v").array(), whole.array(), atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["cir_jax.search", "{made}/exact"], "--text, --image, both, or --document"),
        (["cir_jax.search", "{made}/exact", "--text", " "], "text is empty"),
        (["cir_jax.search", "{made}/exact", "--text", "x", "--k", "0"], "at least 1"),
        (["cir_jax.search", "{made}/exact", "--image", "{pictures}/broken.png"], "broken.png"),
        (["cir_jax.search", "{made}/exact", "--image", "{pictures}/none.png"], "none.png"),
        (["cir_jax.search", "{made}/vectors", "--text", "x"], "expected 'index'"),
        (["cir_jax.search", "{made}/nothing", "--text", "x"], "is not a folder"),
        (["cir_jax.index", "{made}/vectors", "{made}/exact"], "already exists"),
        (["cir_jax.embed", "emoji_txt", "{pictures}", "{made}/new"], "emoji_text"),
        (["cir_jax.embed", "emoji_text", "{made}/nothing", "{made}/new"], "nothing"),
        (["cir_jax.embed", "emoji_text", "{pictures}", "{made}/strict", "--strict"], "broken.png"),
        (["cir_jax.eval", "emojis"], "no packaged config is named 'emojis'; there are "),
        (["cir_jax.train", "--workdir", "x"], "config"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_mistakes_end_in_one_clear_error(made, pictures, arguments, expected, tmp_path):
    filled = [a.format(made=made, pictures=pictures) for a in arguments]
    done = run(*filled, fails=True, cwd=tmp_path)
    assert expected in done.stderr + done.stdout


def test_the_command_does_not_hide_the_function_of_its_name(made):
    import cir_jax.search

    model, index = cir_jax.load("emoji_text"), cir_jax.open_index(made / "exact")
    assert len(cir_jax.search(model, index, text="a fox", k=2)) == 2


def test_vectors_of_another_model_are_refused(made):
    model = cir_jax.load("emoji_text")
    other = cir_jax.Model(model.config, model.graph, model.params, "0" * 16, "other")
    with pytest.raises(ValueError, match=f"{model.fingerprint}.*{'0' * 16}"):
        cir_jax.search(other, cir_jax.open_index(made / "exact"), text="x")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_answers_without_jax(name):
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['{name}', '--help']\n"
        "try:\n"
        f"    runpy.run_module('cir_jax.{name}', run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code\n"
        "heavy = {'jax', 'flax', 'scann', 'grain', 'PIL', 'orbax', 'tokenizers'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "--help" in done.stdout


def test_the_package_lists_its_commands():
    command = [sys.executable, "-m", "cir_jax"]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    assert all(f"python -m cir_jax.{name} " in listed for name in COMMANDS)
    package = Path(cir_jax.__file__).parent
    for name in COMMANDS:
        assert any((package / file).is_file() for file in (f"{name}.py", f"{name}/__main__.py"))


def test_importing_the_package_costs_nothing():
    program = "import sys, cir_jax; assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    assert time.perf_counter() - start < 10


def test_unknown_names_of_the_package_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'serch'"):
        cir_jax.serch  # noqa: B018
