"""Changed weight files: each is one clear error or named tensors that can be read, soon and in little memory.

500 files of each format in the suite; for 10,000: CIR_JAX_FUZZ=10000 python -m pytest tests/test_fuzz_sources.py -s
Every format runs in a process of its own, whose memory the operating system limits and which ends at once if anything
is imported, compiled, executed or started after the first file. The changes follow from the number of the file alone.
"""

import copy
import json
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from flax.serialization import to_bytes
from safetensors.numpy import save
from torch_writer import Call, New, Writer, pickled, safetensors, zipped

from cir_jax.conversion.sources import open_source

ROOM = 192 << 20  # bytes that a process may take in addition to what it has when it begins
SECONDS = 3  # for one file, on a busy machine
# What Python says about its own workings; a person learns nothing from it.
INTERNALS = ["Error(", "object has no", "object is not", "unhashable", "indices must", "NoneType"]
INTERNALS += ["not enough values", "too many values", "codec can't", "unsupported operand"]
EVENTS = ("import", "compile", "exec", "os.system", "os.exec", "os.fork", "subprocess.Popen")
EVENTS += ("pickle.find_class", "socket.connect", "ctypes.dlopen", "shutil.rmtree", "os.remove")
WATCHED = []  # the file that is being read
# Bytes that mean something: instructions of pickles, signatures, quotes and brackets.
TELLING = b'\x80\x82\x83\x84\x85\x87\x8a\x8b\x8c\x8d\x8e\x93\x94\x95\x96()Q]}RbcehijKJMNqrstuX.0iol\x81{}[],:"0-'
NUMBERS = [0, 1, 2, 127, 128, 255, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63]
VALUES = [-1, 0, 3, 2**31, 2**63, 10**18, 10**400, 0.5, "", "x", "F64", "BOOL", None, True, [], {}]
VALUES += [[0], [1, 2], [-1], [10**18], [2**40, 2**40], "\ud800", "a" * 5000, {"shape": [1]}]


def state(writer):
    grid = np.arange(24, dtype=np.float32).reshape(4, 6)
    storage = writer.storage(grid)
    return {
        "model": {
            "a.weight": writer.tensor(grid),
            "a.bias": writer.view(storage, 6, (6, 3), (1, 6)),
            "b": Call("torch._utils._rebuild_parameter", (writer.tensor(grid > 3), True, None)),
            "c": writer.tensor(np.int64(5)),
        },
        "args": New("argparse.Namespace", {"lr": 0.1, "size": (2, 3)}),
        "epoch": 3,
    }


def module(writer):
    inner = New("__torch__.Inner", {"weight": writer.tensor(np.ones((3, 2), np.float16)), "n": 3})
    return New("__torch__.Whole", {"visual": inner, "scale": writer.tensor(np.float32(1))})


def originals():
    """A small sound file of every format."""
    writer = Writer()
    made = {"torch zip": writer.zip(state(writer))}
    writer = Writer()
    made["torch legacy"] = writer.stream(state(writer))
    writer = Writer()
    made["torchscript"] = writer.zip(module(writer), **{"constants.pkl": pickled(())})
    writer = Writer()
    parts = {"_parameters": {"w": writer.tensor(np.ones(3))}, "_buffers": {}, "_modules": {}}
    whole = {**parts, "_modules": {"phi_s": New("i2t_model.Phi", parts)}, "topk": 12}
    made["module"] = writer.zip(New("i2t_model.IMG2TEXT", whole))
    arrays = {"c": np.ones((2, 3)), "f": np.ones((2, 3), "i2").T, "best": np.float32(2), "s": {1}}
    made["numpy"] = zipped({"a/data.pkl": pickle.dumps([arrays, arrays["c"]], 4)})
    tensors = {"a": np.ones((3, 4), np.float32), "b": np.zeros((), np.int64), "c": np.ones(5) > 0}
    made["safetensors"] = save(tensors, {"format": "pt"})
    made["flax"] = pickle.dumps(to_bytes({"params": {"x": tensors, "y": {"z": tensors["a"]}}}))
    names = {"weight_map": {"a": "1.bin", "b": "1.bin"}, "metadata": {"total_size": 8}}
    made["sharded"] = json.dumps(names).encode()
    return made


# ---- changes ----


def bytewise(data, rng):
    """One to eight changes of bytes, of pieces, of the length."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        at, length = rng.randrange(len(data) + 1), rng.choice([1, 1, 2, 4, 8, 40])
        match rng.randrange(8):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                data[at : at + 1] = bytes([rng.choice(TELLING)])
            case 2:
                del data[at:]
            case 3:
                del data[at : at + length]
            case 4:
                data[at:at] = rng.randbytes(length)
            case 5:
                data[at:at] = bytes(rng.choices(TELLING, k=length))
            case 6:
                form = rng.choice(["<H", "<I", "<Q", ">I"])
                number = rng.choice(NUMBERS) % 256 ** struct.calcsize(form)
                data[at : at + struct.calcsize(form)] = struct.pack(form, number)
            case 7:
                other = rng.randrange(len(data) + 1)
                piece = data[other : other + length]
                data[other : other + length] = data[at : at + length]
                data[at : at + length] = piece
    return bytes(data)


def zipwise(data, rng):
    """A change in a header of the archive, or, with right checksums, in or of a member."""
    if rng.random() < 0.4:
        places = [i for i in range(len(data)) if data[i : i + 2] == b"PK"]
        at = rng.choice(places) + rng.randrange(46)
        form = rng.choice(["<B", "<H", "<I"])
        number = rng.choice(NUMBERS) % 256 ** struct.calcsize(form)
        return data[:at] + struct.pack(form, number) + data[at + struct.calcsize(form) :]
    with tempfile.TemporaryFile() as file:
        file.write(data)
        with zipfile.ZipFile(file) as archive:
            files = {info.filename: archive.read(info) for info in archive.infolist()}
    pickles = [name for name in files if name.endswith("data.pkl")]
    name = rng.choice(pickles * 6 + sorted(files))
    match rng.randrange(8):
        case 0:
            files.pop(name)
        case 1:
            files[rng.choice(["../x", "/x", "archive/data/x", "b/data.pkl", "a\\b"])] = files[name]
        case 2:
            return zipped(files, zipfile.ZIP_DEFLATED)
        case _:
            files[name] = bytewise(files[name], rng)
    return zipped(files)


def jsonwise(data, rng):
    """A JSON header that lies."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    for _ in range(rng.choice([1, 1, 2])):
        _replace(header, rng)
    text = json.dumps(header).encode()
    if rng.random() < 0.5:  # offsets count from the header's end, which the original's length keeps
        text = text.ljust(length)
    return safetensors(text, data[8 + length :])


def indexwise(data, rng):
    index = json.loads(data)
    _replace(index, rng)
    return json.dumps(index).encode()


def _replace(tree, rng):
    while True:
        keys = list(tree) if type(tree) is dict else range(len(tree))
        if not keys:
            return
        key = rng.choice(list(keys))
        if type(tree[key]) in (dict, list) and tree[key] and rng.random() < 0.8:
            tree = tree[key]
            continue
        if type(tree) is dict and rng.random() < 0.3:
            tree[rng.choice(["", "x", "dtype", "__metadata__", "a\n"])] = tree.pop(key)
        else:
            value = rng.choice([*VALUES, "../1.bin", "/etc/passwd", "1.bin", "gone"])
            tree[key] = copy.deepcopy(value)
        return


OWN = dict.fromkeys(("torch zip", "torchscript", "module", "numpy"), zipwise)
OWN |= {"safetensors": jsonwise, "sharded": indexwise}


def changed(layout, data, number):
    rng = random.Random(f"{layout} {number}")
    change = rng.choice([bytewise, OWN.get(layout, bytewise)])
    return change(data, rng)


# ---- one process ----


def attempt(path, opened):
    """ "refused" or "read"; AssertionError for any other end."""
    size = path.stat().st_size
    try:
        source = open_source(opened)
        for key in source.tensors:
            array = source.tensors[key]
            assert key.isprintable() and array.nbytes <= max(size, 1 << 20)
            assert array.shape == source.tensors.shape(key)
            assert array.dtype == source.tensors.dtype(key)
            array.tobytes()
        json.dumps([dict(source.facts), dict(source.left_out)])
        assert len(source.sha256) == 64
    except ValueError as error:
        told = str(error)
        assert type(error) is ValueError, repr(error)
        assert told.startswith(str(opened)), told
        assert len(told) < 800 and told.isprintable() and told.count(str(path)) <= 2, told
        assert not [x for x in INTERNALS if x in told], told
        return "refused"
    return "read"


def main(layout, count):
    data = originals()[layout]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        writer = Writer()
        shard = {"a": writer.tensor(np.ones(1, "f4")), "b": writer.tensor(np.ones(1, "f4"))}
        (Path(folder) / "1.bin").write_bytes(writer.zip(shard))
        path.write_bytes(data)
        assert attempt(path, path) == "read"  # imports what is needed, before nothing may be
        for number in range(50):
            path.write_bytes(changed(layout, data, -number))
            attempt(path, path)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
        sys.addaudithook(watch)
        ends, longest = Counter(), 0.0
        for number in range(count):
            path.write_bytes(changed(layout, data, number))
            begun = time.perf_counter()
            try:
                ends[attempt(path, path)] += 1
            except BaseException as error:
                raise AssertionError(
                    f"{layout} {number}: {type(error).__name__}: {error}"
                ) from error
            longest = max(longest, time.perf_counter() - begun)
    assert longest < SECONDS, longest
    print(f"{layout}: {count} files, {dict(ends)}, longest {longest * 1000:.0f} ms", end="")
    # Not what getrusage tells: a process begins with the peak of the one that started it.
    peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    print(f", peak {int(peak) // 1024} MB")


def watch(event, arguments):
    if WATCHED and event.startswith(EVENTS):
        raise AssertionError(f"{event} {arguments}")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to limit memory")
@pytest.mark.parametrize("layout", list(originals()))
def test_changed_files(layout):
    count = int(os.environ.get("CIR_JAX_FUZZ", "500"))
    command = [sys.executable, __file__, layout, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 + count)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout, end="")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
