"""Candidate lists: ours, the original's, and files that lie."""

import io
import zipfile

import numpy as np
import pytest
from torch_writer import Writer

from cir_jax.conversion.sources import open_source
from cir_jax.evaluation.candidates import Candidates, read_candidates, write_candidates

GALLERY = np.array(["B1", "B2", "B3", "B4"])
NAMES = np.array([["B1", "B2"], ["B3", "B4"], ["B4", "B1"]])
TARGETS = np.array(["B2", "B1", "B4"])
SCORES = np.arange(6, dtype=np.float32).reshape(3, 2)


def original(writer=None, **changed):
    """What the original's validate.py saves: `labels` is a view of a wider matrix."""
    writer = writer or Writer()
    whole = np.zeros((3, 4), bool)
    whole[:, :2] = TARGETS[:, None] == NAMES
    labels = writer.view(writer.storage(whole), 0, (3, 2), (4, 1))
    value = {
        "sorted_index_names": NAMES,
        "target_names": TARGETS.tolist(),
        "index_names": GALLERY.tolist(),
        "labels": labels,
        "split": "val",
        "dress_types": "dress",
    }
    value |= changed
    return writer, {k: v for k, v in value.items() if v is not None}


def test_ours_come_back(tmp_path):
    found = Candidates(NAMES, GALLERY, TARGETS, SCORES, "val", "dress", "0123")
    write_candidates(tmp_path / "a.npz", found)
    again = read_candidates(tmp_path / "a.npz")
    for name in ("names", "gallery", "targets", "scores"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
    assert (again.split, again.category, again.model) == ("val", "dress", "0123")
    hidden = Candidates(NAMES, GALLERY)
    write_candidates(tmp_path / "a.npz", hidden)
    assert read_candidates(tmp_path / "a.npz").targets is None
    with pytest.raises(ValueError, match="no targets"):
        hidden.scored()


@pytest.mark.parametrize("layout", ["zip", "stream"])
def test_those_of_candidate_reranking_are_read(layout, tmp_path):
    writer, value = original()
    (tmp_path / "top.pt").write_bytes(getattr(writer, layout)(value))
    found = read_candidates(tmp_path / "top.pt")
    np.testing.assert_array_equal(found.names, NAMES)
    assert (found.split, found.category, found.scores) == ("val", "dress", None)
    np.testing.assert_array_equal(found.rows, [[0, 1], [2, 3], [3, 0]])
    values = found.scored()
    assert {name: v.tolist() for name, v in values.items()} == {
        "recall@1": [0, 0, 1],
        "recall@2": [1, 0, 1],
    }


def test_text_is_no_weight(tmp_path):
    writer, value = original()
    (tmp_path / "top.pt").write_bytes(writer.zip(value))
    with pytest.raises(ValueError, match="refused: the file holds a numpy array of dtype"):
        open_source(tmp_path / "top.pt", part="*")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"index_names": None}, "expected sorted_index_names, index_names"),
        ({"sorted_index_names": None}, "expected sorted_index_names"),
        ({"index_names": ["B1", "B2", "B3", "B4", "B1"]}, '"B1" twice'),
        ({"index_names": ["B1", "B2", "B3"]}, 'a name that the gallery of 3 lacks: "B4"'),
        ({"index_names": [1, 2]}, "index_names is no list of names"),
        ({"target_names": ["B2", "B1", "B9"]}, 'a target that the gallery of 4 lacks: "B9"'),
        ({"target_names": ["B2", "B1"]}, "3 queries, targets"),
        ({"target_names": ["B1", "B1", "B4"]}, "labels are not where"),
        ({"sorted_index_names": NAMES[:, [0, 0]]}, "more than once"),
        ({"sorted_index_names": np.zeros((3, 2))}, "arrays of text"),
        ({"sorted_index_names": NAMES[0]}, r"expected \[Q, K\]"),
        ({"split": 3}, "no text"),
    ],
)  # fmt: skip
def test_originals_that_contradict_themselves(changed, told, tmp_path):
    writer, value = original(**changed)
    (tmp_path / "top.pt").write_bytes(writer.zip(value))
    with pytest.raises(ValueError, match=told) as error:
        read_candidates(tmp_path / "top.pt")
    assert str(error.value).startswith(str(tmp_path / "top.pt"))


def test_numbers_that_are_no_characters(tmp_path):
    writer, value = original()
    bad = np.frombuffer(np.full(12, 0x110000, np.uint32).tobytes(), "<U2").reshape(3, 2)
    value["sorted_index_names"] = bad
    (tmp_path / "top.pt").write_bytes(writer.zip(value))
    with pytest.raises(ValueError, match="no characters"):
        read_candidates(tmp_path / "top.pt")


def arrays_file(path, **arrays):
    made = {"format": np.array(1), "names": NAMES, "gallery": GALLERY} | arrays
    np.savez(path, **{name: each for name, each in made.items() if each is not None})
    return path


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"format": np.array(2)}, "format 1"),
        ({"gallery": None}, "format 1"),
        ({"names": np.array([["B1", None]], dtype=object)}, "no complete file"),
        ({"scores": SCORES[:2]}, "scores"),
        ({"more": SCORES}, "unknown arrays"),
        ({"names": np.arange(6).reshape(3, 2)}, "arrays of text"),
    ],
)
def test_files_of_ours_that_are_wrong(arrays, told, tmp_path):
    with pytest.raises(ValueError, match=told) as error:
        read_candidates(arrays_file(tmp_path / "a.npz", **arrays))
    assert str(error.value).startswith(str(tmp_path / "a.npz"))


def test_files_that_are_cut_or_unpack_to_too_much(tmp_path, monkeypatch):
    path = arrays_file(tmp_path / "a.npz")
    content = path.read_bytes()
    for end in (10, 200, len(content) - 30):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match=r"a\.npz"):
            read_candidates(path)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("names.npy", bytes(1 << 20))
    path.write_bytes(made.getvalue())
    monkeypatch.setattr("cir_jax.evaluation.candidates.MOST_BYTES", 1 << 19)
    with pytest.raises(ValueError, match="it unpacks to"):
        read_candidates(path)
