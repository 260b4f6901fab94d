"""What SEARLE and LinCIR train on beside pictures: words, phrases with concepts, captions with their key words."""

import json

import numpy as np
import pytest

from cir_jax.config import Data
from cir_jax.data import training_set
from cir_jax.data.lincir import write_keys
from cir_jax.data.searle import read_phrases
from cir_jax.training.checks import check_parts


def searle(root):
    return training_set(Data("imagenet", root=str(root), variant="searle", split="test"))


def test_every_step_sees_a_phrase_with_one_of_the_concepts(made):
    """A concept that one of its phrases lacks is left out; every occurrence of the drawn one becomes a star."""
    dataset, rng = searle(made / "imagenet"), np.random.default_rng(0)
    assert len(dataset) == 3
    for row, raw in enumerate(dataset):
        pairs = [raw, *(raw["draw"](rng) for _ in range(30))]
        for pair in pairs:
            assert pair["item"]["image"].endswith(f"test/ILSVRC2012_test_0000000{row + 1}.JPEG")
            np.testing.assert_array_equal(pair["item"]["token"], np.arange(8) + 8 * row)
        found = {(pair["item"]["text"], pair["query"]["text"]) for pair in pairs}
        assert found == {
            *(("a dog runs", "a  $  runs"), ("dog and dog", " $  and  $ "), ("a hat", "a  $ "))
        }


def test_phrases_of_a_picture(made):
    assert read_phrases(made / "imagenet").of("test/ILSVRC2012_test_00000002.JPEG") == [
        *(("a dog runs", "dog"), ("dog and dog", "dog"), ("a hat", "hat"))
    ]
    nearest = read_phrases(made / "imagenet", concepts=1)
    assert [concept for _, concept in nearest.of("ILSVRC2012_test_00000002")] == ["dog", "dog"]
    assert nearest.of("unknown") == []


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("concepts.csv", "", "no table of concepts"),
        ("concepts.csv", "Name,1\n", r"its columns are \['Name', '1'\], expected Image Name"),
        ("concepts.csv", 'Image Name,1\n"a', "no table of concepts: unexpected end"),
        ("concepts.csv", "Image Name,1\nx.JPEG,dog\n", "00000001 has no concepts with phrases"),
        ("phrases.json", '{"dog": ["a cat"]}', "no concept that is in all of its phrases"),
        ("phrases.json", '{"dog": "a dog"}', "another form than the published file"),
    ],
)
def test_faulty_files_are_named(file, text, message, copied):
    root = copied("imagenet")
    (root / "searle" / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        searle(root)


@pytest.mark.parametrize("file", ["concepts.csv", "phrases.json", "words"])
def test_missing_files_are_named(file, copied):
    root = copied("imagenet")
    (root / "searle" / file).rename(root / "gone")
    with pytest.raises((FileNotFoundError, ValueError), match=file):
        searle(root)


TAGS = {"dog": "NOUN", "big": "ADJ", "a": "DET", "park": "NOUN"}


def tagged(text):
    return [(word, TAGS.get(word, "X")) for word in text.replace(".", " .").split()]


def test_key_words_are_written_and_masked(tmp_path):
    texts = ["A big dog runs.", "  ", "nothing", "dog in <PERSON> park"]
    assert write_keys(tmp_path / "captions.jsonl", texts, tagged) == 3
    rows = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert [row["keys"] for row in rows] == [["a big dog"], [], ["dog", "park"]]
    dataset = training_set(Data("captions", root=str(tmp_path / "captions.jsonl")))
    first, second, third = dataset
    assert first["item"] == {"text": "a big dog runs."} and first["query"] == {"text": "$ runs."}
    assert second["query"] == {"text": "$"}
    assert third["query"] == {"text": "$ in person $"}
    (tmp_path / "two.csv").write_text("text,keys\none two,\na dog in a park,dog|park\n")
    dataset = training_set(Data("captions", root=str(tmp_path / "two.csv")))
    rng = np.random.default_rng(0)
    assert {dataset[0]["draw"](rng)["query"]["text"] for _ in range(30)} == {"$ two", "one $"}
    assert dataset[1]["query"]["text"] == "a $ in a $"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"keys": ["a"]}, "line 1: `text` is empty"),
        ({"text": "a", "keys": {}}, "line 1: `keys` is {}"),
    ],
)
def test_a_row_that_cannot_be_trained_on(row, message, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=message):
        training_set(Data("captions", root=str(tmp_path / "a.jsonl")))


def test_groups_may_be_left_out(made):
    data = Data("fashioniq", root=str(made / "fashioniq"), grouped=False)
    assert [row.keys() for row in training_set(data)] == [{"query", "item"}] * 6
    assert "group" in training_set(Data("fashioniq", root=str(made / "fashioniq")))[0]


def test_a_set_without_what_the_loss_reads_is_refused(made, tiny_experiment):
    """Captions have no pictures, which only LinCIR does without; words are SEARLE's alone."""
    from dataclasses import replace

    from cir_jax.methods.inversion import LinCirConfig, Pic2WordConfig, SearleConfig

    inputs = tiny_experiment.method.inputs
    words, captions = searle(made / "imagenet"), [{"query": {"text": "$"}, "item": {"text": "a"}}]
    pictures = [{"query": {"text": "a"}, "item": {"image": "a.png"}}]
    config = lambda kind: replace(tiny_experiment, method=kind.tiny(inputs), data=(Data("x"),))
    check_parts([words], config(SearleConfig))
    check_parts([captions], config(LinCirConfig))
    check_parts([pictures], config(Pic2WordConfig))
    for dataset, kind, needed in (
        (captions, Pic2WordConfig, "image"),
        (pictures, SearleConfig, "image and text and token"),
        (pictures, LinCirConfig, "text"),
    ):
        with pytest.raises(ValueError, match=f"needs {needed}"):
            check_parts([dataset], config(kind))
