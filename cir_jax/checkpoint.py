"""Checkpoints on disk; the only file that imports Orbax.

Two kinds. A *model* is what others use: `manifest.json` (method, config, fingerprint), `params/` and its own copy of
the vocabulary. A *training state* lives in `WORKDIR/checkpoints/STEP/` with separate items `params`, `opt`, `config`.
"""

import asyncio
import contextlib
import hashlib
import json
import math
import os
import reprlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax import nnx, traverse_util

from cir_jax import files, sharding
from cir_jax.methods import METHODS, build, method_name
from cir_jax.stopping import unstopped
from cir_jax.typed import from_json, to_json

# Bytes of an array that are compressed and written at once.
PIECE = 16 * 2**20


def abstract_params(config):
    """The tree of shapes that a method's config implies, and its graph definition."""
    graph, state = nnx.split(nnx.eval_shape(lambda: build(config, nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)


def initial_params(config, names: Sequence[str], seed: int = 0) -> dict[str, np.ndarray]:
    """Some parameters of a new model by path; the others are not made. Always on the CPU, for the same bytes anywhere."""

    def made():
        state = nnx.to_pure_dict(nnx.state(build(config, nnx.Rngs(seed))))
        flat = traverse_util.flatten_dict(state, sep="/")
        return {name: flat[name] for name in names}

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return jax.device_get(jax.jit(made)())


def fingerprint(config: Mapping, params, vocabulary: str) -> str:
    """16 hex digits over the stored config, every parameter as float32 and the digest of the vocabulary file."""
    digest = hashlib.sha256(json.dumps([config, vocabulary], sort_keys=True).encode())
    for name, x in sorted(traverse_util.flatten_dict(params, sep="/").items()):
        digest.update(f"{name}{x.shape}".encode())
        digest.update(np.ascontiguousarray(x, np.float32))
    return digest.hexdigest()[:16]


def _portable(config) -> dict:
    """A config as JSON without the place of the vocabulary on this machine."""
    value = to_json(config)
    if value["inputs"]["text"]["vocab"] != "clip":
        value["inputs"]["text"]["vocab"] = Path(value["inputs"]["text"]["vocab"]).name
    return value


def with_vocabulary(config, folder: Path):
    """The config whose own vocabulary file is the copy inside the checkpoint `folder`."""
    text = config.inputs.text
    if text.vocab == "clip":
        return config
    text = replace(text, vocab=str(folder / Path(text.vocab).name))
    return replace(config, inputs=replace(config.inputs, text=text))


def _vocabulary(config, sums: Mapping[str, str]) -> str:
    """The digest of the vocabulary file of a checkpoint, "clip" for the packaged one."""
    name = config.inputs.text.vocab
    return name if name == "clip" else sums[Path(name).name]


def _alone_options() -> ocp.options.MultiprocessingOptions:
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"p{me}"
    )


def _alone() -> ocp.StandardCheckpointer:
    """A checkpointer that waits for no other process: models are written by one and read by each for itself."""
    return ocp.StandardCheckpointer(multiprocessing_options=_alone_options())


class _Sparing(ocp.type_handlers.NumpyHandler):
    """Copies no array and writes large ones one after the other, in pieces: memory stays near the size of the model.

    Orbax by itself copies all arrays first and compresses all of them at once.
    """

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)
        self.turn = asyncio.Lock()

    async def _open_and_write(self, value, tspec, ts_context):
        if value.nbytes <= PIECE // 16:
            return await super()._open_and_write(value, tspec, ts_context)
        rows = max(1, PIECE // value[0].nbytes)
        tspec["metadata"]["chunks"] = (min(rows, len(value)), *value.shape[1:])
        async with self.turn:
            store = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
            for start in range(0, len(value), rows):
                piece = value[start : start + rows]
                await store[start : start + len(piece)].write(
                    piece, can_reference_source_data_indefinitely=True
                )


def _sparing() -> ocp.Checkpointer:
    """A checkpointer like `_alone`, for numpy arrays that nobody changes while they are written."""
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, _Sparing()), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    options = _alone_options()
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=registry, multiprocessing_options=options
    )
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def save_model(
    folder: str | os.PathLike, config, params, *, dtype="float32", about=None, modules=None
) -> str:
    """Write a model and return its fingerprint.

    Args:
      folder: must not exist; it appears only when it is whole.
      config: the method's config; its vocabulary file is copied in.
      params: nested dict of arrays; stored as `dtype` ("float32", "float16" or "bfloat16").
      about: JSON-able facts kept in the manifest (training config, metrics, step).
      modules: the fingerprint of each module, where they are known (`cir_jax.convert`).
    """
    params = jax.tree.map(lambda x: np.asarray(x, dtype), jax.device_get(params))
    with files.write_folder(folder) as part:
        files.refuse_full(part, sum(x.nbytes for x in jax.tree.leaves(params)))
        sums, vocabulary = {}, config.inputs.text.vocab
        if vocabulary != "clip":
            copy = part / Path(vocabulary).name
            shutil.copyfile(vocabulary, copy)
            sums[copy.name] = files.sha256(copy)
        # Orbax's threads complain at length about an event loop that a signal has closed under them.
        with unstopped(), _sparing() as checkpointer:
            checkpointer.save((part / "params").absolute(), ocp.args.PyTreeSave(params))
        sums |= {
            str(path.relative_to(part)): files.sha256(path)
            for path in sorted((part / "params").rglob("*"))
            if path.is_file()
        }
        mark = fingerprint(_portable(config), params, _vocabulary(config, sums))
        manifest = {
            "format": files.FORMAT,
            "kind": "checkpoint",
            "method": method_name(config),
            "config": _portable(config),
            "dtype": dtype,
            "parameters": int(sum(x.size for x in jax.tree.leaves(params))),
            "fingerprint": mark,
            "about": about or {},
            **({"modules": dict(modules)} if modules else {}),
            "sums": sums,
        }
        files.write_json(part / "manifest.json", manifest)
    return mark


def read_model(folder: str | os.PathLike):
    """(config, graph, float32 params as numpy, manifest) of a model folder.

    ValueError if it is damaged or was changed: files by their checksums, config and parameters by the fingerprint.
    """
    folder = files.local_path(folder)
    manifest = files.read_manifest(folder, "checkpoint")
    if manifest["method"] not in METHODS:
        raise ValueError(
            f"{folder} holds a model of method {reprlib.repr(manifest['method'])}; this version knows {', '.join(METHODS)}"
        )
    config = _stored_config(folder, manifest)
    files.check_sums(folder, manifest["sums"])
    config = with_vocabulary(config, folder)
    graph, shapes = _fitting_params(folder, config, manifest["parameters"])
    params = _restore(folder, shapes, np.dtype(manifest["dtype"]))
    mark = fingerprint(manifest["config"], params, _vocabulary(config, manifest["sums"]))
    if mark != manifest["fingerprint"]:
        raise ValueError(
            f"{folder.absolute()} was changed: its config and parameters have the fingerprint {mark}, its manifest "
            f"says {files.shown(manifest['fingerprint'])}; copy the folder again"
        )
    return config, graph, params, manifest


def _stored_config(folder: Path, manifest: Mapping):
    """The config of a manifest; ValueError if it is none of this version or asks for a vocabulary that is not there."""
    place = f"{folder.absolute()}/{files.MANIFEST}"
    try:
        config = from_json(METHODS[manifest["method"]][0], manifest["config"])
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    name = config.inputs.text.vocab
    if name != "clip" and Path(name).name not in manifest["sums"]:
        fault = f"config.inputs.text.vocab is {files.shown(name)}, which is not among sums"
        files.refuse_manifest(folder, "checkpoint", [fault])
    return config


def _fitting_params(folder: Path, config, parameters: int):
    """Graph and shapes of a stored config; ValueError if no model of so many parameters can be made of it."""
    # Before anything is built: no side of an array is longer than the model, and absurd numbers take hours.
    faults = [
        f"{name} is {value}"
        for name, value in _whole_numbers(to_json(config))
        if value > parameters
    ]
    try:
        graph, shapes = (None, None) if faults else abstract_params(config)
    except Exception as error:  # whatever NumPy, JAX and Flax raise for sizes that fit no array
        faults.append(" ".join(str(error).split())[:300])
    else:
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
        if not faults and count != parameters:
            faults.append(f"its config describes {count}")
    if faults:
        raise ValueError(
            f"{folder.absolute()}/{files.MANIFEST} has a config that does not fit its {parameters} parameters: "
            f"{'; '.join(faults)}; copy the folder again"
        )
    return graph, shapes


def _whole_numbers(value, name: str = "config") -> list[tuple[str, int]]:
    """Every whole number in a JSON value, by its dotted name."""
    if isinstance(value, dict):
        return [found for k, v in value.items() for found in _whole_numbers(v, f"{name}.{k}")]
    return [(name, value)] if type(value) is int else []


def _restore(folder: Path, shapes, dtype):
    """Parameters of these shapes, stored as `dtype`, as float32."""
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=place), shapes)
    try:
        with unstopped(), _alone() as checkpointer:
            params = checkpointer.restore((folder / "params").absolute(), target)
    except Exception as error:  # Orbax and TensorStore raise many kinds, with pages of text
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{folder.absolute()}/params is not what the manifest describes ({reason}); copy the folder again"
        ) from error
    return jax.tree.map(lambda x: np.asarray(x, np.float32), params)


class TrainingStates:
    """The checkpoints of one run: `{"params", "frozen", "opt"}` by step, and the experiment each is of.

    `WORKDIR/checkpoints/STEP` holds `params`, `opt` and `config`. What is frozen never changes and is written once, to
    `WORKDIR/frozen`. A step appears under its name only when it is complete, and after what is frozen; what a killed
    process left half written is removed at the next start. In several processes all call every method.
    """

    def __init__(self, workdir: Path, config: Mapping, keep: int = 2):
        """`config` is the experiment as JSON (`cir_jax.typed.portable`); the last `keep` steps are kept."""
        self.folder, self.config = (workdir / "checkpoints").absolute(), dict(config)
        self.frozen, self.frozen_writer = (
            (workdir / "frozen").absolute(),
            ocp.StandardCheckpointer(),
        )
        arrays, values = ocp.StandardCheckpointHandler, ocp.JsonCheckpointHandler
        self.manager = ocp.CheckpointManager(
            self.folder,
            item_handlers={"params": arrays(), "opt": arrays(), "config": values()},
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
        )

    def latest(self) -> int:
        """The newest complete step, or the one that is being written; 0 if there is none."""
        return self.manager.latest_step() or 0

    def save(self, step: int, state) -> None:
        """Write a state in the background; the loop goes on as soon as the devices' memory is copied.

        If the state before is still being written, its end is waited for: with several processes all have to
        decide alike, and a disk that is too slow shall be seen (save less often).

        OSError if the disk is full, of this state or of the one before, whose writing ends here.
        """
        files.refuse_full(self.folder, _nbytes([state["params"], state["opt"]]))
        with files.reported(self.folder):
            self.frozen_writer.wait_until_finished()
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(_kept(state["params"])),
                    opt=ocp.args.StandardSave(_kept(state["opt"])),
                    config=ocp.args.JsonSave(self.config),
                ),
                force=True,
            )

    def save_frozen(self, frozen) -> None:
        """Write what is frozen in the background; called once, when a run begins, and not where it goes on."""
        if not jax.tree.leaves(frozen):
            return
        files.refuse_full(self.folder, _nbytes(frozen))
        with files.reported(self.frozen):
            self.frozen_writer.save(self.frozen, _kept(frozen), force=True)

    def saved_config(self, step: int) -> dict:
        """The experiment of a step, as JSON."""
        with unstopped():
            return self.manager.restore(
                step, args=ocp.args.Composite(config=ocp.args.JsonRestore())
            )["config"]

    def restore(self, step: int, abstract):
        """The state of `step`, placed as the shape structs of `abstract` say, on whatever mesh and processes.

        Raises:
          ValueError: the arrays of the step have other names or shapes, so it is a state of another model.
        """
        with unstopped():
            self._refuse_others(step, abstract)
            args = {name: ocp.args.StandardRestore(abstract[name]) for name in ("params", "opt")}
            restored = self.manager.restore(step, args=ocp.args.Composite(**args))
            state = {**abstract, **{name: restored[name] for name in args}}
            if jax.tree.leaves(abstract["frozen"]):
                state["frozen"] = self.frozen_writer.restore(self.frozen, abstract["frozen"])
        return state

    def _refuse_others(self, step: int, abstract) -> None:
        stored = self.manager.item_metadata(step)
        there = {name: stored[name].tree for name in ("params", "opt")}
        if self.frozen.is_dir() and jax.tree.leaves(abstract["frozen"]):
            with _alone() as reader:
                there["frozen"] = reader.metadata(self.frozen).item_metadata.tree
        found, wanted = _shapes(there), _shapes(abstract)
        names = sorted(n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n))
        if names:
            told = [f"{n} ({found.get(n)} saved, {wanted.get(n)} wanted)" for n in names[:5]]
            raise ValueError(
                f"{self.folder}/{step} is a state of another model or optimizer: {len(names)} arrays differ, "
                f"{', '.join(told)}; choose another --workdir"
            )

    def close(self) -> None:
        with files.reported(self.folder):
            self.manager.wait_until_finished()
            self.manager.close()
            self.frozen_writer.close()


def _kept(tree):
    """Arrays that the next step cannot overwrite while they are written.

    Orbax copies them from the memory of an accelerator. On a CPU it reads them where they lie, and the step that they
    are donated to would wait until they are written.
    """
    return jax.tree.map(jnp.copy, tree) if jax.default_backend() == "cpu" else tree


def _nbytes(tree) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    """The shape of every array of a tree by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {sharding.path_name(path): tuple(x.shape) for path, x in leaves if hasattr(x, "shape")}


@contextlib.contextmanager
def training_states(workdir: Path, config: Mapping, keep: int = 2):
    """`TrainingStates` that wait for their last write when the block ends."""
    states = TrainingStates(workdir, config, keep)
    try:
        yield states
    finally:
        with unstopped():
            states.close()
