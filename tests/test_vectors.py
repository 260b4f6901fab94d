import sys
import types

import numpy as np
import pytest

from cir_jax import files
from cir_jax.vectors import Items, Vectors, VectorWriter, check_vectors

STRANGE = [
    "plain.jpg",
    "two\nlines",
    "\u2028\x85\r\x0b",
    '"quoted"\\',
    "é🙂",
    "\udc80 not text",
    "",
]


def some(count, width=4, seed=0):
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def writer(folder, **changes):
    return VectorWriter(folder, **({"fingerprint": "abc", "gallery": {"folder": "p"}} | changes))


def written(folder, sizes=(3, 2), **changes):
    """A complete folder with shards of these sizes; returns all rows."""
    made, rows = writer(folder, **changes), some(sum(sizes))
    start = 0
    for size in sizes:
        made.add(rows[start : start + size], [f"i{row}" for row in range(start, start + size)])
        start += size
    made.finish()
    return rows


def test_round_trip_of_several_shards(tmp_path):
    rows = written(tmp_path / "v")
    vectors = Vectors(tmp_path / "v")
    assert np.array_equal(vectors.array(), rows) and vectors.array().dtype == np.float32
    assert vectors.ids == ["i0", "i1", "i2", "i3", "i4"]
    assert (len(vectors), vectors.width, vectors.fingerprint) == (5, 4, "abc")
    assert vectors.gallery == {"folder": "p"} and vectors.skipped == []
    assert [shard.shape for shard in vectors.shards] == [(3, 4), (2, 4)]
    assert [(s["start"], s["stop"]) for s in vectors.manifest["shards"]] == [(0, 3), (3, 5)]


def test_files_are_named_as_designed(tmp_path):
    written(tmp_path / "v")
    assert sorted(path.name for path in (tmp_path / "v").iterdir()) == [
        "ids-00000.txt",
        "ids-00001.txt",
        "manifest.json",
        "vectors-00000.npy",
        "vectors-00001.npy",
    ]


def test_one_float32_shard_stays_on_disk(tmp_path):
    written(tmp_path / "v", sizes=(5,))
    assert isinstance(Vectors(tmp_path / "v").array(), np.memmap)


def test_float16_is_stored_and_read_as_float32(tmp_path):
    rows = written(tmp_path / "v", dtype="float16")
    vectors = Vectors(tmp_path / "v")
    assert vectors.shards[0].dtype == np.float16
    assert vectors.array().dtype == np.float32
    assert np.array_equal(vectors.array(), rows.astype(np.float16).astype(np.float32))


def test_ids_may_hold_any_character(tmp_path):
    made = writer(tmp_path / "v")
    made.add(some(len(STRANGE)), STRANGE)
    made.finish()
    assert Vectors(tmp_path / "v").ids == STRANGE
    assert len((tmp_path / "v" / "ids-00000.txt").read_bytes().splitlines()) == len(STRANGE)


def test_an_interrupted_folder_is_refused_and_can_be_continued(tmp_path):
    rows = some(5)
    made = writer(tmp_path / "v")
    made.add(rows[:2], ["a", "b"], skipped=[{"id": "bad", "reason": "not a picture"}])
    with pytest.raises(ValueError, match=r"incomplete: it stops after 2 rows.*same embed command"):
        Vectors(tmp_path / "v")
    made.close()
    again = writer(tmp_path / "v")
    assert (again.rows, again.done) == (2, 3)
    again.add(rows[2:], ["c", "d", "e"])
    again.finish()
    vectors = Vectors(tmp_path / "v")
    assert np.array_equal(vectors.array(), rows) and vectors.ids == list("abcde")
    assert vectors.skipped == [{"id": "bad", "reason": "not a picture"}]


def test_what_an_interruption_leaves_behind_is_replaced(tmp_path):
    made = writer(tmp_path / "v")
    made.add(some(2), ["a", "b"])
    made.close()
    folder = tmp_path / "v"
    (folder / "vectors-00001.npy").write_bytes(b"a shard whose manifest was never written")
    (folder / ".tmp-1234-vectors-00001.npy").write_bytes(b"half")
    again = writer(folder)
    again.add(some(1), ["c"])
    again.finish()
    assert Vectors(folder).ids == ["a", "b", "c"]
    assert not list(folder.glob(".tmp-*"))


def test_a_complete_folder_can_grow(tmp_path):
    rows = written(tmp_path / "v")
    made = writer(tmp_path / "v")
    made.add(rows[:1], ["late"])
    with pytest.raises(ValueError, match="incomplete"):
        Vectors(tmp_path / "v")
    made.finish()
    assert Vectors(tmp_path / "v").ids[-1] == "late"


def test_all_differences_are_told_at_once(tmp_path):
    written(tmp_path / "v")
    with pytest.raises(ValueError) as error:
        writer(tmp_path / "v", fingerprint="xyz", gallery=None, dtype="float16", width=8)
    for part in ("fingerprint 'abc' there, 'xyz' now", "dtype", "width 4 there, 8 now"):
        assert part in str(error.value)


def test_a_locator_with_tuples_is_the_same_locator(tmp_path):
    writer(tmp_path / "v", gallery={"parts": ("a", "b")}).finish()
    assert writer(tmp_path / "v", gallery={"parts": ("a", "b")}).rows == 0


def test_another_width_is_refused(tmp_path):
    made = writer(tmp_path / "v", width=4)
    with pytest.raises(ValueError, match="holds vectors of width 4, these have width 6"):
        made.add(some(2, width=6), ["a", "b"])
    made.add(some(2), ["a", "b"])
    with pytest.raises(ValueError, match="width 4"):
        made.add(some(2, width=3), ["c", "d"])
    assert made.rows == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path, bad):
    rows = some(3)
    rows[1, 2] = bad
    made = writer(tmp_path / "v")
    with pytest.raises(ValueError, match="row 1 of 3 vectors has a NaN or infinite"):
        made.add(rows, ["a", "b", "c"])
    assert made.rows == 0 and not list((tmp_path / "v").glob("*.npy"))


def test_values_too_large_for_float16_are_refused(tmp_path):
    with pytest.raises(ValueError, match="infinite float16 value"):
        writer(tmp_path / "v", dtype="float16").add(np.full((1, 2), 1e6), ["a"])


def test_ids_must_match_the_vectors(tmp_path):
    with pytest.raises(ValueError, match="2 vectors with 1 ids"):
        writer(tmp_path / "v").add(some(2), ["a"])


def test_a_stretch_of_skipped_items_needs_no_shard(tmp_path):
    made = writer(tmp_path / "v")
    made.add(np.zeros((0, 4)), [], skipped=[{"id": "x", "reason": "cut"}])
    made.finish()
    vectors = Vectors(tmp_path / "v")
    assert (made.done, len(vectors), vectors.ids) == (1, 0, [])
    assert vectors.array().shape == (0, 0)


def test_an_empty_folder_is_a_place_to_start_and_a_full_one_is_not(tmp_path):
    (tmp_path / "empty").mkdir()
    written(tmp_path / "empty")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.jpg").touch()
    with pytest.raises(FileExistsError, match="holds no vectors"):
        writer(tmp_path / "full")
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="holds no vectors"):
        writer(tmp_path / "file")


def test_an_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dtype is 'int8', expected one of float32, float16"):
        writer(tmp_path / "v", dtype="int8")


@pytest.mark.parametrize("name", ["vectors-00001.npy", "ids-00000.txt"])
def test_damage_is_found_by_checksum(tmp_path, name):
    written(tmp_path / "v")
    path = tmp_path / "v" / name
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: changed or cut"):
        Vectors(tmp_path / "v")
    path.unlink()
    with pytest.raises(ValueError, match=rf"{name}: missing"):
        Vectors(tmp_path / "v")
    with pytest.raises(ValueError, match=f"lacks {name}"):
        writer(tmp_path / "v")


def test_without_checksums_a_cut_file_is_still_named(tmp_path):
    written(tmp_path / "v")
    path = tmp_path / "v" / "vectors-00000.npy"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"vectors-00000\.npy is damaged"):
        Vectors(tmp_path / "v", verify=False)


def test_without_checksums_shapes_and_ids_are_still_checked(tmp_path):
    written(tmp_path / "v")
    np.save(tmp_path / "v" / "vectors-00000.npy", some(2))
    with pytest.raises(ValueError, match=r"holds float32 \(2, 4\), expected float32 \(3, 4\)"):
        Vectors(tmp_path / "v", verify=False)
    written(tmp_path / "w")
    (tmp_path / "w" / "ids-00000.txt").write_text('"a"\n')
    with pytest.raises(ValueError, match="holds 1 lines, expected 3 ids"):
        Vectors(tmp_path / "w", verify=False)


def test_a_manifest_without_fields_is_refused(tmp_path):
    files.write_json(tmp_path / "manifest.json", {"format": 1, "kind": "vectors"})
    with pytest.raises(ValueError, match="lacks complete, rows"):
        Vectors(tmp_path)


@pytest.mark.parametrize("dtype", ["float64", "float16", "int8", "uint32", "bfloat16"])
def test_real_numbers_are_converted(dtype):
    import ml_dtypes

    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    made = check_vectors(np.asfortranarray(np.arange(6).reshape(2, 3).astype(kind)))
    assert made.dtype == np.float32 and made.flags.c_contiguous
    assert made.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_jax_arrays_and_lists_are_converted():
    import jax.numpy as jnp

    assert check_vectors(jnp.ones((2, 3), jnp.bfloat16)).tolist() == [[1, 1, 1]] * 2
    assert check_vectors([[1, 2]]).dtype == np.float32


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (), (5, 0)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \[N, D\] with D > 0"):
        check_vectors(np.zeros(shape))


@pytest.mark.parametrize("values", [[["a"]], [[1j]], [[None]], [[True]]])
def test_other_types_are_refused(values):
    with pytest.raises(ValueError, match="expected real numbers"):
        check_vectors(values)


def test_an_overflow_to_float32_is_refused():
    with pytest.raises(ValueError, match="row 0 of 1"):
        check_vectors(np.array([[1e300]]))


def gallery_of(monkeypatch, ids):
    """Let `open_gallery` return a list of items with these ids."""

    class Gallery(list):
        pass

    def open_gallery(locator):
        assert locator == {"folder": "p"}
        made = Gallery({"id": name, "text": name.upper()} for name in ids)
        made.ids = ids
        return made

    module = types.SimpleNamespace(open_gallery=open_gallery)
    monkeypatch.setitem(sys.modules, "cir_jax.data.records", module)


def test_items_go_by_id_not_by_place(monkeypatch):
    gallery_of(monkeypatch, ["a", "skipped", "b"])
    items = Items(["a", "b"], {"folder": "p"})
    assert [item["text"] for item in items(np.array([1, 0, 1]))] == ["B", "A", "B"]
    assert items([]) == []


def test_items_that_are_gone_or_none_are_named(monkeypatch):
    gallery_of(monkeypatch, ["a"])
    items = Items(["a", "b"], {"folder": "p"})
    with pytest.raises(ValueError, match=r"no longer has \['b'\]"):
        items([0, 1])
    with pytest.raises(ValueError, match=r"rows \[-1, 2\] are not in this index of 2 rows"):
        items([-1, 0, 2])


def test_items_without_a_gallery_say_what_to_do():
    with pytest.raises(ValueError, match="does not know its pictures; give gallery="):
        Items(["a"], None)([0])
