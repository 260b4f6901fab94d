"""Weights of other libraries: every format, read right or refused by name, with nothing executed."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile

import ml_dtypes
import numpy as np
import pytest
from flax.serialization import to_bytes
from safetensors.numpy import save
from torch_writer import Call, Global, New, Raw, Stored, Writer, pickled, safetensors, zipped

from cir_jax.conversion.sources import open_source

GRID = np.arange(24, dtype=np.float32).reshape(4, 6)
DTYPES = ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "b1"]


@pytest.fixture
def put(tmp_path):
    """Write bytes to a file and give its path."""

    def put(data, name="weights"):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return put


def read(path, **options):
    return dict(open_source(path, **options).tensors.items())


def same(found, expected):
    assert sorted(found) == sorted(expected)
    for key, array in expected.items():
        assert found[key].dtype == array.dtype and found[key].shape == array.shape, key
        np.testing.assert_array_equal(found[key], array)


def written(layout, value, writer):
    return writer.zip(value) if layout == "torch zip" else writer.stream(value)


both = pytest.mark.parametrize("layout", ["torch zip", "torch legacy"])


# ---- values ----


@both
def test_all_dtypes_and_shapes(put, layout):
    arrays = {code: np.arange(6).astype(code).reshape(2, 3) for code in DTYPES}
    arrays |= {"scalar": np.array(3, np.float32), "empty": np.zeros((0, 3), np.float32)}
    writer = Writer()
    value = {key: writer.tensor(array) for key, array in arrays.items()}
    brain = np.array([1.5, -2], ml_dtypes.bfloat16)
    value["bfloat16"] = writer.tensor(brain, "BFloat16")
    source = open_source(put(written(layout, value, writer)))
    same(dict(source.tensors), arrays | {"bfloat16": brain})
    assert source.layout == layout and not source.facts and source.config is None
    assert source.tensors.shape("f8") == (2, 3) and source.tensors.dtype("bfloat16") == brain.dtype


@both
def test_views_of_one_storage(put, layout):
    writer = Writer()
    storage = writer.storage(GRID)
    views = {
        "all": writer.view(storage, 0, (4, 6), (6, 1)),
        "transposed": writer.view(storage, 0, (6, 4), (1, 6)),
        "row": writer.view(storage, 6, (6,), (1,)),
        "columns": writer.view(storage, 1, (4, 2), (6, 2)),
        "expanded": writer.view(storage, 6, (3, 2), (0, 1)),
        "element": writer.view(storage, 23, (), ()),
    }
    same(
        read(put(written(layout, views, writer))),
        {
            "all": GRID,
            "transposed": GRID.T,
            "row": GRID[1],
            "columns": GRID[:, 1:4:2],
            "expanded": np.tile(GRID[1, :2], (3, 1)),
            "element": GRID[3, 5],
        },
    )


def test_big_endian_and_odd_truth_values(put):
    writer = Writer()
    value = {"x": writer.tensor(GRID.astype(">f4"), "Float")}
    same(read(put(writer.zip(value, order="big"))), {"x": GRID})
    writer = Writer()
    value = {"b": writer.tensor(np.array([0, 1, 2, 255], np.uint8), "Bool")}
    same(read(put(writer.zip(value))), {"b": np.array([False, True, True, True])})


def test_parameters_untyped_storages_and_numpy(put):
    writer = Writer()
    plain = writer.tensor(GRID)
    raw = writer.storage(GRID.astype("<u2").view(np.uint8), "Untyped")
    third = (Stored(raw), 2, (3,), (1,), False, Call("collections.OrderedDict"))
    dtype = Call("numpy.dtype", ("f8", False, True), (3, "<", None, None, None, -1, -1, 0))
    data = Call(
        "_codecs.encode", (GRID.T.astype("f8").tobytes(order="F").decode("latin1"), "latin1")
    )
    value = {
        "p": Call(
            "torch._utils._rebuild_parameter", (plain, True, Call("collections.OrderedDict"))
        ),
        "s": Call("torch._utils._rebuild_parameter_with_state", (plain, True, None, {"a": 1})),
        "u": Call("torch._utils._rebuild_tensor_v3", (*third, Global("torch.uint16"))),
        "n": Call(
            "numpy.core.multiarray._reconstruct",
            (Global("numpy.ndarray"), (0,), b"b"),
            (1, (6, 4), dtype, True, data),
        ),
        "best": Call("numpy.core.multiarray.scalar", (dtype, struct.pack("<d", 0.5))),
    }
    source = open_source(put(writer.zip(value)))
    same(
        dict(source.tensors),
        {"p": GRID, "s": GRID, "u": np.array([2, 3, 4], np.uint16), "n": GRID.T.astype("f8")},
    )
    assert source.facts == {"best": 0.5}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_protocols_of_python(put, protocol):
    """Frames, short texts, memo and sets as the standard library writes them."""
    fact = {"none": None, "list": [1, -(2**40), 1.5, True], "text": "é" * 300, "set": {1}}
    data = pickle.dumps([fact, fact, {"n": np.arange(6.0).reshape(2, 3)}], protocol)
    source = open_source(put(zipped({"a/data.pkl": data})))
    same(dict(source.tensors), {"n": np.arange(6.0).reshape(2, 3)})
    assert source.facts["0"] == {**fact, "set": [1]} == source.facts["1"]


def test_torchscript_gives_the_names_of_the_state(put):
    writer = Writer()
    halves = GRID.astype(np.float16)
    convolution = New("__torch__.torch.nn.Conv2d", {"weight": writer.tensor(halves), "bias": None})
    sizes = Call("torch.jit._pickle.build_intlist", ([1, 2],))
    tower = New("__torch__.Tower", {"training": True, "conv1": convolution, "sizes": sizes, "n": 7})
    whole = New(
        "__torch__.CLIP", {"visual": tower, "scale": writer.tensor(np.float32(2).reshape(()))}
    )
    source = open_source(put(writer.zip(whole, **{"constants.pkl": pickled(()), "code/a.py": b""})))
    assert source.layout == "torchscript"
    same(dict(source.tensors), {"visual.conv1.weight": halves, "scale": np.float32(2).reshape(())})
    assert source.facts == {"visual.sizes": [1, 2], "visual.n": 7}


@both
def test_the_module_of_fti4cir(put, layout):
    """Its parameters, and the attributes that its specification wants read from the object."""
    writer = Writer()
    parameter = lambda: Call("torch._utils._rebuild_parameter", (writer.tensor(GRID), True, None))
    module = lambda path, **parts: New(
        path,
        {
            "training": False,
            "_parameters": Call("collections.OrderedDict", ([],))
            if not parts
            else {"weight": parameter()},
            "_buffers": {"kept": writer.tensor(GRID), "gone": writer.tensor(GRID)},
            "_non_persistent_buffers_set": Call("builtins.set", (["gone"],)),
            "_modules": parts,
            "activation": Global("torch.nn.functional.relu"),
        },
    )
    linear = module("torch.nn.modules.linear.Linear")
    layers = module("torch.nn.modules.container.Sequential", **{"0": linear})
    whole = module("i2t_model.IMG2TEXT", phi_s=module("i2t_model.Phi", layers=layers))
    whole.state |= {"topk": 12, "epsilon": 0.05, "criterion_target": writer.tensor(GRID)}
    source = open_source(put(written(layout, whole, writer)))
    names = ["kept", "weight", "phi_s.kept", "phi_s.weight", "phi_s.layers.kept"]
    names += ["phi_s.layers.weight", "phi_s.layers.0.kept"]
    same(dict(source.tensors), dict.fromkeys(names, GRID))
    assert (source.facts["topk"], source.facts["epsilon"]) == (12, 0.05)


# ---- wrappers ----


def test_the_weights_of_a_training_checkpoint(put):
    writer = Writer()
    moments = {"state": {0: {"exp_avg": writer.tensor(GRID)}}, "param_groups": [{"lr": 0.1}]}
    value = {
        "epoch": 3,
        "args": New("argparse.Namespace", {"lr": 0.1, "size": (224, 224)}),
        "model": {"state_dict": {"a.weight": writer.tensor(GRID)}, "name": "ViT"},
        "opt": moments,
        "rng_state": writer.tensor(GRID),
    }
    source = open_source(put(writer.zip(value)))
    same(dict(source.tensors), {"a.weight": GRID})
    assert source.facts == {"epoch": 3, "args": {"lr": 0.1, "size": [224, 224]}, "name": "ViT"}
    assert source.left_out == {"opt": 1, "rng_state": 1}


def test_several_groups_need_a_choice(put):
    writer = Writer()
    value = {"model": {"w": writer.tensor(GRID)}, "ema": {"w": writer.tensor(GRID + 1)}}
    path = put(writer.zip(value))
    with pytest.raises(
        ValueError, match=r'several groups of tensors: "ema" \(1 tensors\), "model"'
    ):
        open_source(path)
    same(read(path, part="ema"), {"w": GRID + 1})
    same(read(path, part="*"), {"model.w": GRID, "ema.w": GRID + 1})
    with pytest.raises(ValueError, match='has no part "best"'):
        open_source(path, part="best")


def test_what_belongs_to_training_is_never_taken_for_weights(put):
    writer = Writer()
    moments = {"state": {0: {"exp_avg": writer.tensor(GRID)}}, "param_groups": []}
    path = put(
        writer.zip(
            {"w": writer.tensor(GRID), "opt_state": moments, "sample": {"v": writer.tensor(GRID)}}
        )
    )
    source = open_source(path)
    same(dict(source.tensors), {"w": GRID, "sample.v": GRID})
    assert source.left_out == {"opt_state": 1}
    writer = Writer()
    moments = {"state": {0: {"exp_avg": writer.tensor(GRID)}}, "param_groups": []}
    with pytest.raises(ValueError, match="holds no tensors of a model"):
        open_source(put(writer.zip({"anything": moments, "epoch": 3})))
    writer = Writer()
    inner = {"state_dict": {"w": writer.tensor(GRID)}, "epoch": 3}
    path = put(writer.zip({"best": inner, "last": {"w": writer.tensor(GRID)}}))
    same(read(path, part="best"), {"w": GRID})


# ---- safetensors and folders ----


def test_safetensors_as_its_package_writes_it(put):
    arrays = {code: np.arange(6).astype(code).reshape(2, 3) for code in DTYPES}
    arrays |= {"scalar": np.array(3, np.float32), "empty": np.zeros((0, 3), np.float32)}
    arrays["brain"] = np.array([1.5, -2], ml_dtypes.bfloat16)
    source = open_source(put(save(arrays, {"format": "pt"})))
    same(dict(source.tensors), arrays)
    assert source.layout == "safetensors" and source.facts == {"format": "pt"}


@pytest.mark.parametrize("length", [0x3C, 0x50, 0x7B, 0x80, 0x8050, 0x7B7B])
def test_a_header_whose_length_looks_like_another_format(put, length):
    """The first byte of the file is the end of a number: it may be that of JSON, a pickle or a page."""
    text = json.dumps({"x": entry([1], 0, 4)}, separators=(",", ":")).encode()
    assert len(text) <= length
    same(read(put(safetensors(text.ljust(length), b"\0\0\x80?"))), {"x": np.ones(1, np.float32)})


def entry(shape, start, stop, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


LIES = {
    "beyond the end": ({"x": entry([4], 0, 16)}, 8, "lies at"),
    "of another size": ({"x": entry([5], 0, 16)}, 16, "lies at"),
    "negative": ({"x": entry([-4], 0, 16)}, 16, "has shape"),
    "backwards": ({"x": entry([4], 16, 0)}, 16, "lies at"),
    "huge": ({"x": entry([10**18, 0], 0, 0)}, 0, "has shape"),
    "fractions": ({"x": entry([4.0], 0, 16)}, 16, "has shape"),
    "a hole": ({"x": entry([2], 0, 8), "y": entry([2], 12, 20)}, 20, "begins at byte"),
    "shared": ({"x": entry([2], 0, 8), "y": entry([2], 4, 12)}, 12, "begins at byte"),
    "a rest": ({"x": entry([2], 0, 8)}, 12, "its tensors end at byte"),
    "a dtype": ({"x": entry([4], 0, 4, "F8_E4M3")}, 4, "has the dtype"),
    "a list": (b"{}[1]", 0, "is no JSON"),
    "no entry": ({"x": 5}, 0, "has not dtype"),
    "nothing": ({}, 0, "holds no tensors"),
    "twice": (b'{"x": 1, "x": 1}', 0, "occurs twice"),
    "not a number": (b'{"x": NaN}', 0, "is no JSON"),
    "deep": (b'{"x": ' + b"[" * 100_000, 0, "too deep"),
    "a name": ({"a\nb": entry([1], 0, 4)}, 4, "printable name"),
    "metadata": ({"__metadata__": {"a": 1}, "x": entry([1], 0, 4)}, 4, "__metadata__"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_headers_of_safetensors(put, lie):
    header, size, told = LIES[lie]
    path = put(safetensors(header, bytes(size)))
    with pytest.raises(ValueError, match=told) as error:
        open_source(path)
    assert str(error.value).startswith(f"{path}: ")


def test_folders_with_configs_and_shards(tmp_path):
    def sharded(index, shards):
        names = {key: name for name, tensors in shards.items() for key in tensors}
        (tmp_path / index).write_text(json.dumps({"metadata": {}, "weight_map": names}))
        for name, tensors in shards.items():
            writer = Writer()
            torch = name.endswith(".bin")
            value = {key: writer.tensor(x) for key, x in tensors.items()}
            (tmp_path / name).write_bytes(writer.zip(value) if torch else save(tensors))

    with pytest.raises(ValueError, match="is a folder without"):
        open_source(tmp_path)
    sharded("pytorch_model.bin.index.json", {"1.bin": {"a": GRID}, "2.bin": {"b": GRID + 1}})
    same(read(tmp_path), {"a": GRID, "b": GRID + 1})
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    sharded("model.safetensors.index.json", {"1.st": {"a": GRID}, "2.st": {"b": GRID + 2}})
    source = open_source(tmp_path)
    same(dict(source.tensors), {"a": GRID, "b": GRID + 2})
    assert source.config == {"model_type": "clip"} and source.layout == "hugging face folder"
    assert len(source.files) == 3 and len(source.sha256) == 64
    same(read(tmp_path / "model.safetensors.index.json"), dict(source.tensors))
    (tmp_path / "model.safetensors").write_bytes(save({"c": GRID}))
    same(read(tmp_path), {"c": GRID})
    assert open_source(tmp_path / "model.safetensors").config == {"model_type": "clip"}


@pytest.mark.parametrize(
    "index, told",
    [
        ({"weight_map": {"a": "../x"}}, "expected a file beside it"),
        ({"weight_map": {"a": "/etc/passwd"}}, "expected a file beside it"),
        ({"weight_map": {"a": 5}}, "expected a file beside it"),
        ({"weight_map": {"a": "gone.bin"}}, "which is missing"),
        ({"weight_map": {"a": "x.st", "b": "x.st"}}, "lists 2 tensors, its shards hold 1"),
        ({"weight_map": {"b": "x.st"}}, 'and not "b"'),
        ({"weight_map": {}}, "without a weight_map"),
        ({"a": 1}, "without a weight_map"),
    ],
)
def test_lying_indexes_of_shards(put, index, told):
    put(save({"a": GRID}), "x.st")
    path = put(json.dumps(index).encode(), "model.safetensors.index.json")
    for place in (path, path.parent):
        with pytest.raises(ValueError, match=told):
            open_source(place)


# ---- refused ----


@pytest.mark.parametrize(
    "data, told",
    [
        (b"", "is empty"),
        (b"hello, these are no weights", "expected safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"<!DOCTYPE html>", "a web page"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"PK\x03\x04 and no more", "list of archive members"),
        (pickled({"a": 1}), "none of torch.save"),
        (zipped({"x.npy": b""}), "without the one data.pkl"),
        (
            zipped({"a/data.pkl": pickled({}), "b/data.pkl": pickled({})}),
            "without the one data.pkl",
        ),
        (zipped({"a/data.pkl": pickled({"a": 1})}), "holds no tensors"),
        (zipped({"a/data.pkl": pickled({})}, zipfile.ZIP_DEFLATED), "is compressed"),
        (zipped({"../data.pkl": pickled({})}), "leads out of the archive"),
        (zipped({"a/data.pkl": pickled({}), "/etc/x": b""}), "leads out of the archive"),
        (zipped({"a/data.pkl": pickled({}), "a\\..\\x": b""}), "leads out of the archive"),
        (zipped({"a/data.pkl": pickled({}), "a/byteorder": b"middle"}), "byte order"),
    ],
)
def test_other_files(put, data, told):
    path = put(data)
    with pytest.raises(ValueError, match=told) as error:
        open_source(path)
    assert str(error.value).startswith(f"{path}: ") and str(error.value).count(str(path)) == 1


def test_other_places(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_source(tmp_path / "gone.pt")
    with pytest.raises(ValueError, match="bucket"):
        open_source("gs://bucket/x.pt")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no regular file"):
        open_source(tmp_path / "pipe")


def test_doubled_and_overlapping_members(put):
    with pytest.warns(UserWarning, match="Duplicate name"):
        made = zipped({"a/data.pkl": pickled({}), "a/x": b"1"}).replace(b"a/x", b"a/y")
        box = io.BytesIO(made)
        with zipfile.ZipFile(box, "a") as archive:
            archive.writestr("a/y", b"2")
    with pytest.raises(ValueError, match="two of its members have the same name"):
        open_source(put(box.getvalue()))
    files = {"a/data.pkl": pickled({}), "a/data/0": b"12", "a/data/1": b"34"}
    made = bytearray(zipped(files))
    # The second member claims the place of the first.
    places = [at for at in range(len(made)) if made[at : at + 4] == b"PK\x01\x02"]
    made[places[2] + 42 : places[2] + 46] = made[places[1] + 42 : places[1] + 46]
    with pytest.raises(ValueError, match="overlap"):
        open_source(put(bytes(made)))


NAMES = ["posix.system", "os.system", "__torch__.a-b", "builtins.getattr", "subprocess.Popen"]
NAMES += ["torch.storage._load_from_bytes", "torch._utils._rebuild_qtensor", "builtins.eval"]
NAMES += ["copyreg._reconstructor", "pathlib.PosixPath", "numpy.load", "torch.Tensor"]


@both
@pytest.mark.parametrize("path", NAMES)
def test_names_outside_the_table_are_refused_by_name(put, tmp_path, layout, path):
    for value in (Call(path, (f"touch {tmp_path}/ran",)), New(path, {}), Global(path)):
        with pytest.raises(ValueError, match=f"refused: the file wants {path}, which is not on"):
            open_source(put(written(layout, {"x": value}, Writer())))
    assert not (tmp_path / "ran").exists()


REFUSED = {
    "a call of a type": (Call("torch.FloatStorage", ()), "the file calls torch.FloatStorage"),
    "a call of a function": (
        Call("torch.nn.functional.relu", (1,)),
        "calls torch.nn.functional.relu",
    ),
    "a call of arguments": (Call("argparse.Namespace", (1,)), "the file calls argparse.Namespace"),
    "an object of a type": (New("numpy.ndarray", {}), "makes an object of numpy.ndarray"),
    "the registry": (Raw(b"\x82\x01"), "uses the instruction EXT1"),
    "old instances": (Raw(b"(iposix\nsystem\n"), "uses the instruction INST"),
    "old objects": (Raw(b"(cos\nsystem\no"), "wants os.system"),
    "long numbers": (Raw(b"\x8b\xff\xff\xff\x7f"), "uses the instruction LONG4"),
    "texts as numbers": (Raw(b"I99999\n"), "uses the instruction INT"),
    "no instruction": (Raw(b"\xff"), "where an instruction should be"),
    "the memo": (Raw(b"h\x05"), "refers to entry 5 of its memo"),
    "an empty stack": (Raw(b"00000"), "from an empty stack"),
    "no mark": (Raw(b"ttt"), "ends a group that it did not begin"),
    "a cut text": (Raw(b"X\xff\xff\xff\x7fabc"), "breaks off in BINUNICODE"),
    "a long text": (Raw(b"\x8d" + b"\xff" * 8), "breaks off in BINUNICODE8"),
    "a long frame": (Raw(b"\x95" + b"\x7f" * 8 + b"h\x05"), "refers to entry"),
    "odd pairs": (Raw(b"}(K\x01u"), "a key without a value"),
    "keys of tuples": (Raw(b"}K\x01\x85K\x02s"), "has a tuple where"),
    "the state of a list": (Raw(b"]}b"), "sets the state of a list"),
    "too few arguments": (Call("torch._utils._rebuild_tensor_v2", (1,)), "1 arguments"),
    "no storage": (
        Call("torch._utils._rebuild_tensor_v2", (1, 0, (), (), 0, 0)),
        "has a int where",
    ),
    "an id": (Stored(("memory", 1)), "asks for something that is no storage"),
    "objects in arrays": (Call("numpy.dtype", ("O8", False, True)), "numpy array of dtype"),
    "a short scalar": (
        Call("numpy.core.multiarray.scalar", (Call("numpy.dtype", ("f8", 0, 1)), b"1")),
        "bytes",
    ),
}


@both
@pytest.mark.parametrize("case", REFUSED)
def test_pickles_are_refused_or_damaged(put, layout, case):
    value, told = REFUSED[case]
    with pytest.raises(ValueError, match=told):
        open_source(put(written(layout, {"x": value}, Writer())))


VIEWS = {
    "beyond": (20, (2, 6), (6, 1)),
    "negative offset": (-1, (1,), (1,)),
    "negative stride": (5, (2,), (-1,)),
    "negative size": (0, (-2,), (1,)),
    "overflow": (2**62, (4,), (1,)),
    "too many": (0, (10**18,), (0,)),
    "too many together": (0, (10**9, 10**9), (0, 0)),
    "wide": (0, (2,), (10**17,)),
    "axes": (0, (1,) * 100, (1,) * 100),
    "uneven": (0, (2, 2), (1,)),
    "truth": (0, (True,), (1,)),
    "texts": (0, ("2",), (1,)),
    "empty but huge": (0, (0, 2**40, 2**40), (1, 1, 1)),
}


@both
@pytest.mark.parametrize("case", VIEWS)
def test_tensors_that_lie_about_their_storage(put, layout, case):
    writer = Writer()
    value = {"x": writer.view(writer.storage(GRID), *VIEWS[case])}
    with pytest.raises(ValueError, match="a tensor"):
        open_source(put(written(layout, value, writer)))


def test_storages_that_lie_about_their_size(put):
    for count, told in ((25, "96 bytes, expected 100"), (-1, "no size"), (2**60, "no size")):
        writer = Writer()
        storage = (*writer.storage(GRID)[:4], count)
        path = put(writer.zip({"x": writer.view(storage, 0, (2,), (1,))}))
        with pytest.raises(ValueError, match=told):
            open_source(path)
    writer = Writer()
    value = {"x": writer.tensor(GRID)}
    whole = writer.stream(value)
    for data, told in ((whole[:-1], "ends at byte"), (whole[:-97], "elements")):
        with pytest.raises(ValueError, match=told):
            open_source(put(data))


def test_nested_shared_and_cyclic_structures_end_soon(put):
    """Lists of ten times the same list stand for more values than there are; a list may hold itself."""
    laughs = b"".join(
        b"](" + b"h" + bytes([i]) * 1 + (b"h" + bytes([i])) * 9 + b"e" + b"q" + bytes([i + 1])
        for i in range(60)
    )
    bombs = {
        "laughs": b"]q\x00" + laughs,
        "cycle": b"]q\x00h\x00a",
        "deep lists": b"]" * 100_000 + b"a" * 99_999,
        "deep tuples": b")" + b"\x85" * 300_000,
        "long": b"N" * 1_100_000,
        "memo": b"".join(b"r" + struct.pack("<I", 2**31 + i) for i in range(9)),
        "copies": b"c_codecs\nencode\nq\x00X\x00\x00\x10\x00"
        + b"a" * (1 << 20)
        + b"q\x01"
        + b"0h\x00h\x01\x85R" * 9,
    }
    for name, code in bombs.items():
        begun = time.process_time()
        with pytest.raises(ValueError):
            open_source(put(zipped({"a/data.pkl": b"\x80\x02" + code + b"."})))
        assert time.process_time() - begun < 6, name


def test_two_tensors_of_one_name(put):
    writer = Writer()
    value = {"a.b": writer.tensor(GRID), "a": {"b": writer.tensor(GRID)}}
    with pytest.raises(ValueError, match="two tensors are called"):
        open_source(put(writer.zip(value)))


def test_flipped_bytes_and_a_changed_file(put):
    writer = Writer()
    data = writer.zip({"x": writer.tensor(GRID)})
    at = data.index(GRID.tobytes())
    source = open_source(put(data[:at] + b"\x55" + data[at + 1 :]))
    with pytest.raises(ValueError, match="not those that were written"):
        source.tensors["x"]
    path = put(data)
    source = open_source(path)
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError, match="changed while it was being read"):
        source.tensors["x"]


# ---- memory ----

PEAK = """
import sys
from cir_jax.conversion.sources import open_source
# Not what getrusage tells: a process begins with the peak of the one that started it.
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
source = open_source(sys.argv[2])
if sys.argv[1] == "warm":
    source.tensors["t0"]  # what the first read costs once, a tensor in hand included
before = peak()
total = 0
for name in source.tensors:
    x = source.tensors[name]
    total += x.nbytes + int(x[0, -1] != 1)
    del x
print(total, (peak() - before) * 1024)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux to see the peak")
@pytest.mark.parametrize("layout", ["torch zip", "torch legacy", "safetensors", "flax"])
def test_one_tensor_at_a_time_in_memory(tmp_path, layout):
    """288 MB in 12 tensors: reading them all costs no more memory than reading the first."""
    path = tmp_path / "large"
    large_file(path, layout, 12, 24 << 20)
    command = [sys.executable, "-c", PEAK, "warm", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    total, grown = map(int, done.stdout.split())
    assert total == 12 * (24 << 20) and grown < 4 << 20, done.stdout


def large_file(path, layout, count, size):
    """A file of `count` tensors of ones, each of `size` bytes."""
    ones = np.ones((size // 4096, 1024), np.float32)
    if layout == "safetensors":
        header = {f"t{i}": entry(ones.shape, i * size, (i + 1) * size) for i in range(count)}
        pieces = [safetensors(header, b""), *[ones] * count]
    elif layout == "flax":
        whole = to_bytes({f"t{i}": ones for i in range(count)})
        pieces = [pickle.dumps(whole)]
    else:
        writer = Writer()
        value = {f"t{i}": writer.tensor(ones) for i in range(count)}
        pieces = [writer.stream(value)] if layout == "torch legacy" else [writer.zip(value)]
    with open(path, "wb") as file:
        for piece in pieces:
            file.write(piece)
