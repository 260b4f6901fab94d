"""Checkpoints on disk; the only file that imports Orbax.

Two kinds. A *model* is what others use: `manifest.json` (method, config, fingerprint), `params/` and its own copy of
the vocabulary. A *training state* lives in `WORKDIR/checkpoints/STEP/` with separate items `params`, `frozen`, `opt`.
"""

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx, traverse_util

from cir_jax import files
from cir_jax.config import from_json, to_json
from cir_jax.methods import METHODS, build, method_name


def abstract_params(config):
    """The tree of shapes that a method's config implies, and its graph definition."""
    graph, state = nnx.split(nnx.eval_shape(lambda: build(config, nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)


def fingerprint(config, params, vocabulary: str) -> str:
    """16 hex digits over the config, every parameter as float32 and the digest of the vocabulary file."""
    digest = hashlib.sha256(json.dumps([_portable(config), vocabulary], sort_keys=True).encode())
    for name, x in sorted(traverse_util.flatten_dict(params, sep="/").items()):
        digest.update(f"{name}{x.shape}".encode())
        digest.update(np.ascontiguousarray(x, np.float32).tobytes())
    return digest.hexdigest()[:16]


def _portable(config) -> dict:
    """A config as JSON without the place of the vocabulary on this machine."""
    value = to_json(config)
    if value["inputs"]["text"]["vocab"] != "clip":
        value["inputs"]["text"]["vocab"] = Path(value["inputs"]["text"]["vocab"]).name
    return value


def _with_vocabulary(config, folder: Path):
    """The config whose own vocabulary file is the copy inside the checkpoint `folder`."""
    text = config.inputs.text
    if text.vocab == "clip":
        return config
    text = replace(text, vocab=str(folder / Path(text.vocab).name))
    return replace(config, inputs=replace(config.inputs, text=text))


def _alone() -> ocp.StandardCheckpointer:
    """A checkpointer that waits for no other process: models are written by one and read by each for itself."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"p{me}"
    )
    return ocp.StandardCheckpointer(multiprocessing_options=alone)


def save_model(folder: str | os.PathLike, config, params, *, dtype="float32", about=None) -> str:
    """Write a model and return its fingerprint.

    Args:
      folder: must not exist; it appears only when it is whole.
      config: the method's config; its vocabulary file is copied in.
      params: nested dict of arrays; stored as `dtype` ("float32", "float16" or "bfloat16").
      about: JSON-able facts kept in the manifest (training config, metrics, step).
    """
    params = jax.tree.map(lambda x: np.asarray(x).astype(dtype), jax.device_get(params))
    with files.write_folder(folder) as part:
        sums, vocabulary = {}, config.inputs.text.vocab
        if vocabulary != "clip":
            copy = part / Path(vocabulary).name
            shutil.copyfile(vocabulary, copy)
            sums[copy.name] = files.sha256(copy)
        with _alone() as checkpointer:
            checkpointer.save((part / "params").absolute(), params)
        sums |= {
            str(path.relative_to(part)): files.sha256(path)
            for path in sorted((part / "params").rglob("*"))
            if path.is_file()
        }
        mark = fingerprint(
            config, params, next(iter(sums.values())) if vocabulary != "clip" else "clip"
        )
        manifest = {
            "format": files.FORMAT,
            "kind": "checkpoint",
            "method": method_name(config),
            "config": _portable(config),
            "dtype": dtype,
            "parameters": int(sum(x.size for x in jax.tree.leaves(params))),
            "fingerprint": mark,
            "about": about or {},
            "sums": sums,
        }
        files.write_json(part / "manifest.json", manifest)
    return mark


def read_model(folder: str | os.PathLike):
    """(config, graph, float32 params as numpy, manifest) of a model folder; its checksums are verified."""
    folder = Path(folder)
    manifest = files.read_manifest(folder, "checkpoint")
    if manifest["method"] not in METHODS:
        raise ValueError(
            f"{folder} holds a model of method {manifest['method']!r}; this version knows {', '.join(METHODS)}"
        )
    files.check_sums(folder, manifest["sums"])
    config = from_json(METHODS[manifest["method"]][0], manifest["config"])
    config = _with_vocabulary(config, folder)
    graph, shapes = abstract_params(config)
    with _alone() as checkpointer:
        dtype = np.dtype(manifest["dtype"])
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=place), shapes
        )
        params = checkpointer.restore((folder / "params").absolute(), target)
    return config, graph, jax.tree.map(lambda x: np.asarray(x, np.float32), params), manifest


class TrainingStates:
    """The checkpoints of one workdir: save and restore `{"params", "frozen", "opt"}` by step."""

    def __init__(self, workdir: Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=2, step_prefix=None)
        self.manager = ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)

    def latest(self) -> int:
        """The newest complete step, 0 if there is none."""
        return self.manager.latest_step() or 0

    def save(self, step: int, state) -> None:
        """Write a state in the background; an empty part (nothing frozen) is left out."""
        items = {
            name: ocp.args.StandardSave(tree)
            for name, tree in state.items()
            if jax.tree.leaves(tree)
        }
        self.manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, step: int, abstract):
        """The state of `step`, placed as the shape structs of `abstract` say."""
        args = {n: ocp.args.StandardRestore(t) for n, t in abstract.items() if jax.tree.leaves(t)}
        restored = self.manager.restore(step, args=ocp.args.Composite(**args))
        return {name: restored[name] if name in args else tree for name, tree in abstract.items()}

    def close(self) -> None:
        self.manager.wait_until_finished()
        self.manager.close()


@contextlib.contextmanager
def training_states(workdir: Path):
    """`TrainingStates` that wait for their last write when the block ends."""
    states = TrainingStates(workdir)
    try:
        yield states
    finally:
        states.close()
