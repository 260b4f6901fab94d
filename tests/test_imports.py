"""Who may import what: the arrows of the architecture, read from the source."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "cir_jax"
# What builds the built-in data is no part of the running program.
BUILDERS = {"data/emoji_v1/build.py", "data/emoji_v1/meanings.py"}
FILES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).as_posix() not in BUILDERS
)
ONLY_IN = {  # library -> the one file, or folder, that knows it
    "orbax": "checkpoint.py",
    "scann": "scann_index.py",
    "grain": "data/pipeline.py",
    "PIL": "data/images.py",
    # What is compared with; imported as importlib allows, too.
    "torch": "bench/peers/",
    "tensorflow_datasets": "data/packed.py",
}
NEVER = {"tensorflow", "transformers", "torchvision", "cv2"}
PEERS = "cir_jax.bench.peers"  # known to the command `bench` alone
FORBIDDEN = {  # part of the package -> parts it must not know
    "encoders": {"methods", "data", "train", "eval", "model", "checkpoint", "config", "sharding"},
    "methods": {"train", "eval", "model", "checkpoint", "sharding", "index", "retrieval"},
    "data": {"encoders", "methods", "train", "eval", "model", "checkpoint", "index", "retrieval"},
    "losses.py": {"encoders", "methods", "data", "train"},
    "index.py": {"encoders", "methods", "train", "eval", "model", "retrieval"},
}


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere, `from a import b` as `a.b`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", FILES, ids=name)
def test_libraries_are_known_in_one_place(path):
    roots = {dotted.split(".")[0] for dotted in imported(path) if not dotted.startswith("cir_jax")}
    assert not roots & NEVER
    for library, home in ONLY_IN.items():
        assert library not in roots or name(path).startswith(home)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_arrows_point_one_way(path):
    part = name(path).split("/")[0]
    known = {d.split(".")[1] for d in imported(path) if d.startswith("cir_jax.")}
    assert not known & FORBIDDEN.get(part, set())


def test_only_the_benchmark_knows_pytorch():
    knows = {name(path) for path in FILES if any(d.startswith(PEERS) for d in imported(path))}
    assert knows and all(each.startswith("bench/") for each in knows)


def test_nothing_imports_a_builder():
    names = {"cir_jax." + name.removesuffix(".py").replace("/", ".") for name in BUILDERS}
    assert all((PACKAGE / name).is_file() for name in BUILDERS)
    assert not [path for path in FILES if imported(path) & names]
