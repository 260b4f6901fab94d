"""More than 1,000 changed manifests, configs, tables and JSON files: each is one clear error or a right result.

Deterministic and offline: hypothesis derives the same examples in every run. What is accepted must be right: rows equal
those stored, hits those of the original, parameters the same.
"""

import copy
import csv
import io
import json
import tempfile
import tokenize
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from test_methods import INPUTS, drawn

from cir_jax import files
from cir_jax.checkpoint import read_model, save_model
from cir_jax.config import Evaluation, Experiment, config_folder, load_config
from cir_jax.data.records import open_gallery
from cir_jax.index import ExactIndex, ScannIndex, open_index
from cir_jax.methods.clip import ClipConfig
from cir_jax.typed import from_json, to_json
from cir_jax.vectors import Vectors, VectorWriter

ABSURD = [None, True, False, -1, 0, 1, 2, 7, 10**12, 10**400, 1.5, 1e308, "", "x", "5", "é\n"]
ABSURD += ["\0", "\ud800", "../x", "/etc/passwd", "a" * 5000, "float16", "clip", "scann", "exact"]
ABSURD += [[], {}, [[]], {"": {}}, ["a"], [1, 2, 3], {"kind": "folder"}, {"kind": []}, "{0..9}.tar"]
# What Python says about its own workings; a person learns nothing from it.
INTERNALS = ["Error(", "object has no", "object is not", "unhashable", "indices must", "NoneType"]
INTERNALS += ["unexpected keyword", "argument", "codec can't", "embedded null", "not supported"]
ROWS = np.random.default_rng(0).standard_normal((220, 8)).astype(np.float32)
IDS = [f"i{row}" for row in range(220)]


def fuzz(examples):
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=quiet,
    )


def tried(call, *names, inside=()):
    """What a call gives, or None if it ends in one clear error that has one of these names in it."""
    try:
        value = call()
        event("accepted")  # pytest --hypothesis-show-statistics tells the shares
        return value
    except (ValueError, OSError, RuntimeError) as error:
        event("refused")
        told = str(error)
        assert not isinstance(error, RecursionError | UnicodeError | json.JSONDecodeError), told
        assert any(str(name) in told for name in names), told
        assert len(told) < 3000 and not [x for x in INTERNALS if x in told and x not in inside], (
            told
        )
        return None


def places(tree, path=()):
    """The path of every value in a JSON tree."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in inner:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


@st.composite
def changed(draw, tree):
    """A JSON tree with one or two changes: another value, a key less or more, an entry twice."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 2))):
        found = list(places(tree))
        if not found:
            break
        *parents, last = draw(st.sampled_from(found))
        place = tree
        for key in parents:
            place = place[key]
        change = draw(st.sampled_from(["value", "value", "less", "more", "more", "nested"]))
        value = copy.deepcopy(draw(st.sampled_from(ABSURD)))
        if change == "value":
            place[last] = value
        elif change == "less":
            del place[last]
        elif change == "nested":
            place[last] = [copy.deepcopy(place[last])]
        elif isinstance(place, dict):
            place[draw(st.sampled_from(["more", "", "Rows"]))] = value
        else:
            place.insert(last, copy.deepcopy(place[last]))
    return tree


@st.composite
def broken(draw, content: bytes):
    """Bytes with one to three changes: cut, removed, flipped, doubled, or with strange ones put in."""
    strange = [
        b"\0",
        b"\xff",
        b'"',
        b"{",
        b"[",
        b",",
        b"\n",
        b"\r",
        b"NaN",
        b"9" * 5000,
        b"../",
        b"\xef\xbb\xbf",
    ]
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        until = min(len(content), at + draw(st.integers(0, 12)))
        change = draw(st.sampled_from(["cut", "remove", "put in", "flip", "double"]))
        if change == "cut":
            content = content[:at]
        elif change == "remove":
            content = content[:at] + content[until:]
        elif change == "double":
            content = content[:until] + content[at:]
        elif change == "put in":
            content = content[:at] + draw(st.sampled_from(strange)) + content[at:]
        elif at < len(content):
            content = content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :]
    return content


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    with VectorWriter(folder / "vectors", fingerprint="abc", gallery={"kind": "emoji"}) as writer:
        writer.add(ROWS[:120], IDS[:120], [{"id": "bad", "reason": "no picture"}])
        writer.add(ROWS[120:], IDS[120:])
        writer.finish()
    vectors = Vectors(folder / "vectors")
    ExactIndex(vectors).save(folder / "exact")
    ScannIndex(vectors).save(folder / "scann")
    model = drawn(ClipConfig.tiny(INPUTS))
    save_model(folder / "model", model.config, model.params, about={"step": 3})
    for name in ("a.png", "b.png", "c d.png", "é.png"):
        (folder / name).touch()
    return folder


def manifests(name: str):
    """A function that draws a changed manifest of an artefact, writes it and returns its folder."""

    def write(made, data):
        folder = made / name
        whole = folder / "whole.json"
        if not whole.exists():
            (folder / files.MANIFEST).rename(whole)
        text = whole.read_bytes()
        if data.draw(st.integers(0, 5)):
            tree = data.draw(changed(json.loads(text)))
            text = json.dumps(tree).encode()
        else:
            text = data.draw(broken(text))
        (folder / files.MANIFEST).write_bytes(text)
        return folder

    return write


def check_vectors(folder):
    vectors = tried(lambda: Vectors(folder), folder)
    if vectors is not None:
        assert np.array_equal(vectors.array(), ROWS) and vectors.ids == IDS
        assert len(vectors) == 220 and vectors.width == 8


def check_index(folder):
    index = tried(lambda: open_index(folder), folder)
    if index is None:
        return
    assert index.ids == IDS and len(index) == 220
    hits = index.search(ROWS[:8], 5)
    exact = np.sort(-(ROWS[:8] @ ROWS.T), axis=1)[:, :5]
    expected = np.einsum("qd,qkd->qk", ROWS[:8], ROWS[np.maximum(hits.rows, 0)])
    found = hits.rows >= 0
    assert (hits.rows < 220).all() and found[:, 0].all()
    np.testing.assert_allclose(hits.scores[found], expected[found], rtol=0, atol=1e-4)
    if index.kind == "exact":
        np.testing.assert_allclose(hits.scores, -exact, rtol=0, atol=1e-4)


@fuzz(250)
@given(data=st.data())
def test_changed_manifests_of_vectors(made, data):
    check_vectors(manifests("vectors")(made, data))


@fuzz(200)
@given(data=st.data(), kind=st.sampled_from(["exact", "scann"]))
def test_changed_manifests_of_indexes(made, data, kind):
    check_index(manifests(kind)(made, data))


@fuzz(120)
@given(data=st.data())
def test_changed_manifests_of_checkpoints(made, data):
    """What is accepted has the original's config and parameters: all the rest decides nothing."""
    folder = manifests("model")(made, data)
    found = tried(lambda: read_model(folder), folder)
    if found is None:
        return
    model = drawn(ClipConfig.tiny(INPUTS))
    vocabulary = found[0].inputs.text.vocab
    assert Path(vocabulary).parent == folder
    expected, stored = to_json(model.config), to_json(found[0])
    expected["inputs"]["text"]["vocab"] = vocabulary
    assert stored == expected
    assert jax.tree.all(
        jax.tree.map(np.array_equal, found[2], jax.tree.map(np.asarray, model.params))
    )


def experiment():
    return load_config("emoji_text", Experiment)


def holds(whole, part) -> bool:
    """True if every value of `part` is in `whole`, of the same type except whole numbers for numbers."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(
            k in whole and holds(whole[k], part[k]) for k in part
        )
    if isinstance(part, list):
        same = isinstance(whole, list) and len(whole) == len(part)
        return same and all(map(holds, whole, part))
    return whole == part and (
        type(whole) is type(part) or (type(whole), type(part)) == (float, int)
    )


EXPERIMENT = json.loads(json.dumps(to_json(experiment())))


@fuzz(250)
@given(value=changed(EXPERIMENT))
def test_changed_configs_in_json(value):
    kind = Experiment[ClipConfig]
    config = tried(lambda: from_json(kind, value), "this is not a Experiment of this version")
    if config is not None:
        assert holds(json.loads(json.dumps(to_json(config))), value)


TOKENS = [
    "",
    "None",
    "-1",
    "0",
    "'x'",
    "(",
    ")",
    "[]",
    "{}",
    "=",
    ",",
    "lr_rate",
    "10**12",
    "1e400",
]
TOKENS += [
    "raise SystemExit(3)",
    "lambda: 0",
    "1/0",
    "{}['a']",
    "open('/nowhere')",
    "\0",
    "*",
    "True",
]


@st.composite
def programs(draw):
    """(name of a packaged config, its text with one or two tokens removed or replaced)."""
    name = draw(st.sampled_from(["emoji", "emoji_text", "emoji_documents", "emoji_rerank"]))
    text = (config_folder() / f"{name}.py").read_text()
    for _ in range(draw(st.integers(1, 2))):
        try:
            tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        except (tokenize.TokenError, SyntaxError):
            break
        kinds = (tokenize.NAME, tokenize.NUMBER, tokenize.STRING, tokenize.OP)
        chosen = draw(st.sampled_from([token for token in tokens if token.type in kinds]))
        (row, first), (_, last) = chosen.start, chosen.end
        lines = text.splitlines(keepends=True)
        if chosen.start[0] == chosen.end[0]:
            new = draw(st.sampled_from(TOKENS))
            lines[row - 1] = lines[row - 1][:first] + new + lines[row - 1][last:]
        text = "".join(lines)
    return name, text


@fuzz(250)
@given(program=programs())
def test_changed_config_files(program):
    name, text = program
    kind = Evaluation if name == "emoji" else Experiment
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "changed.py"
        path.write_text(text)
        told = ("object is not", "not supported", "object has no", "argument", "indices must")
        # Python's own words are right here: it is the person's program that they are about.
        config = tried(lambda: load_config(str(path), kind), path, inside=(*told, "NoneType"))
    if config is not None:
        whole = kind[type(config.method)] if kind is Experiment else kind
        value = json.loads(json.dumps(to_json(config)))
        assert json.loads(json.dumps(to_json(from_json(whole, value)))) == value


def table(kind: str) -> bytes:
    rows = [{"image": "a.png", "id": "one", "text": "a, b"}, {"image": "b.png", "id": "two"}]
    rows += [{"image": "c d.png", "id": "three", "text": '"é"'}, {"image": "é.png", "id": "é"}]
    if kind == "txt":
        return "\n".join(row["image"] for row in rows).encode()
    if kind == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    out = io.StringIO()
    writer = csv.DictWriter(out, ["image", "id", "text"])
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


@fuzz(200)
@given(data=st.data(), kind=st.sampled_from(["csv", "jsonl", "txt"]))
def test_changed_lists_of_pictures(made, data, kind):
    """An accepted list gives items inside its folder, each with its own id."""
    path, content = made / f"list.{kind}", data.draw(broken(table(kind)))
    path.write_bytes(content)
    gallery = tried(lambda: open_gallery(path), path, inside=("codec can't",))
    if gallery is None:
        return
    assert 1 <= len(gallery) == len(set(gallery.ids))
    for row in range(len(gallery)):
        item = tried(lambda row=row: gallery[row], made, inside=("embedded null",))
        if item is not None:
            assert Path(item["image"]).resolve().is_relative_to(made)
            assert item["id"] == gallery.ids[row]
    if content == table(kind):
        assert len(gallery) == 4


@fuzz(120)
@given(data=st.data(), kind=st.sampled_from(["folder", "list", "tar", "emoji"]))
def test_changed_locators(made, data, kind):
    value = {"folder": "root", "list": "file", "tar": "shards", "emoji": "style"}[kind]
    place = {"folder": made, "list": made / "whole.csv", "tar": made / "x.tar", "emoji": "noto"}
    (made / "whole.csv").write_bytes(table("csv"))
    whole = {"kind": kind, value: str(place[kind]), "note": ["not read"]}
    locator = data.draw(changed(whole))
    gallery = tried(lambda: open_gallery(locator), "gallery", "shards", "style", "pictures")
    if gallery is not None:
        assert open_gallery(gallery.locator).ids == gallery.ids
        assert all(gallery[row]["id"] == gallery.ids[row] for row in range(min(3, len(gallery))))


RESULTS = {
    "format": 1,
    "rows": [{"run": "a", "metrics": {"recall@1": 0.5}, "interval": [0.1, 0.9]}],
}


@fuzz(120)
@given(content=broken(json.dumps(RESULTS, indent=1).encode()))
def test_changed_json_files(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        path.write_bytes(content)
        value = tried(lambda: files.read_json(path), path)
    if value is not None:
        assert isinstance(value, dict) and value == json.loads(content)
        json.dumps(value, allow_nan=False)
