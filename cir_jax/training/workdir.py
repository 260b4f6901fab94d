"""The folder of a run: it belongs to one experiment and one state of its data."""

import os
import shutil
import sys
from pathlib import Path

from cir_jax import files, processes
from cir_jax.config import Experiment
from cir_jax.typed import from_json, portable


def prepare_workdir(config: Experiment, workdir: Path, accept_changes: bool = False) -> None:
    """Make the folder of a run, or check that it belongs to the same experiment and data."""
    check_workdir(config, workdir, accept_changes)
    workdir.mkdir(parents=True, exist_ok=True)
    check_tables(config, workdir / "tables.json")
    if processes.first() and not (workdir / "config.json").exists():
        files.write_json(workdir / "config.json", portable(config))


def change_workdir(config: Experiment, workdir: Path) -> None:
    """Make the folder of a run that of a changed experiment, and print what differs.

    A finished run goes on: its model is the best so far again.
    """
    changed = check_workdir(config, workdir, accept_changes=True)
    if not changed or not processes.first():
        return
    print(f"going on with another experiment: {', '.join(changed)}", file=sys.stderr)
    if (workdir / "model").exists():
        step = files.read_manifest(workdir / "model", "checkpoint")["about"]["step"]
        (workdir / "model").rename(workdir / f"best-{step:07d}")
    files.write_json(workdir / "config.json", portable(config))


def check_workdir(config: Experiment, workdir: Path, accept_changes: bool = False) -> list[str]:
    """What differs from the experiment that the folder belongs to; nothing is written.

    Raises:
      FileExistsError: the folder is a file.
      ValueError: something differs, without `accept_changes`.
    """
    if workdir.exists() and not workdir.is_dir():
        raise FileExistsError(f"{workdir.absolute()} is a file; choose another --workdir")
    path = workdir / "config.json"
    return (
        refuse_changes(files.read_json(path), config, str(workdir), accept_changes)
        if path.exists()
        else []
    )


def refuse_changes(stored, config: Experiment, place: str, accept: bool) -> list[str]:
    """The fields in which a stored experiment differs, with both values; ValueError if there are any, unless accepted."""
    changed = differences(_completed(stored, config), portable(config))
    if changed and not accept:
        raise ValueError(
            f"{place} holds a run of another experiment (different: {', '.join(changed)}); choose another --workdir, "
            "give the values it began with, or go on with these by --accept-changes"
        )
    return changed


def remove_leftovers(workdir: Path) -> None:
    """Remove what a run left that was killed while it wrote."""
    for leftover in [*workdir.glob(f"{files.TEMPORARY}*"), *workdir.glob("frozen.orbax-*")]:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


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
    if processes.first() and before != sums:
        files.write_json(path, sums)


def _completed(stored, config: Experiment):
    """A stored experiment with the defaults of fields that are younger than it; as it is if it is of another kind."""
    try:
        return portable(from_json(Experiment[type(config.method)], stored))
    except ValueError:
        return stored


def differences(a, b, path: str = "") -> list[str]:
    """The fields in which two JSON values differ by their dotted names, with both values: `train.steps 30, now 60`."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            d
            for k in sorted(a.keys() | b.keys())
            for d in differences(a.get(k), b.get(k), f"{path}.{k}".strip("."))
        ]
    return [] if a == b else [f"{path} {files.shown(a)}, now {files.shown(b)}"]
