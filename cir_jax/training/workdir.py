"""The folder of a run: it belongs to one experiment and one state of its data."""

import os
from pathlib import Path

from cir_jax import files
from cir_jax.config import Experiment
from cir_jax.typed import from_json, portable


def prepare_workdir(config: Experiment, workdir: Path) -> None:
    """Make the folder of a run, or check that it belongs to the same experiment and data."""
    if workdir.exists() and not workdir.is_dir():
        raise FileExistsError(f"{workdir.absolute()} is a file; choose another --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    path, value = workdir / "config.json", portable(config)
    check_tables(config, workdir / "tables.json")
    if not path.exists():
        files.write_json(path, value)
        return
    before = _completed(files.read_json(path), config)
    if before != value:
        changed = ", ".join(differences(before, value))
        raise ValueError(
            f"{workdir} holds a run of another experiment (different: {changed}); "
            "choose another --workdir, or give the values it began with"
        )


def check_tables(config: Experiment, path: Path) -> None:
    """Remember the checksums of own tables and of packed data sets beside a run.

    ValueError if it was begun when they held something else.
    """
    roots = [data.root for data in config.data]
    # The manifest of a packed one has the checksums of the rest.
    places = [(root, place) for root in roots for place in (root, f"{root}/{files.MANIFEST}")]
    sums = {root: files.sha256(place) for root, place in places if root and os.path.isfile(place)}
    before = files.read_json(path) if path.exists() else {}
    changed = [root for root in sums if before.get(root, sums[root]) != sums[root]]
    if changed:
        raise ValueError(
            f"{path.parent} was begun with other contents of {', '.join(changed)}; choose another --workdir"
        )
    if before != sums:
        files.write_json(path, sums)


def _completed(stored, config: Experiment):
    """A stored experiment with the defaults of fields that are younger than it; as it is if it is of another kind."""
    try:
        return portable(from_json(Experiment[type(config.method)], stored))
    except ValueError:
        return stored


def differences(a, b, path: str = "") -> list[str]:
    """Dotted names of the fields in which two JSON values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            d
            for k in sorted(a.keys() | b.keys())
            for d in differences(a.get(k), b.get(k), f"{path}.{k}".strip("."))
        ]
    return [] if a == b else [path]
