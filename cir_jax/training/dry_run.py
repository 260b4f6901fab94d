"""What a training run would need on devices that are not here: `python -m cir_jax.train CONFIG --dry-run --devices 64`.

The step is compiled for so many simulated CPU devices. No parameter is made and no training data is read but, where it
is at hand, one example.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from cir_jax import files
from cir_jax.commands import Limited
from cir_jax.config import Data, Experiment

# The parts of queries and items of training sets that need not be here; of all others a text and a picture.
COMPOSED = (("image", "text"), ("image",))
ASSUMED = {
    "fashioniq": COMPOSED,
    "cirr": COMPOSED,
    "triplets": COMPOSED,
    "captions": (("text",), ("text",)),
    "imagenet/searle": (("text",), ("image", "text", "token")),
}
# The program is planned, not run: machine code need not be good.
PLANNED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Bytes of an element by XLA's names of types.
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}
BYTES |= {"u64": 8, "f64": 8}


@dataclass(frozen=True, kw_only=True)
class DryRun(Limited):
    """Options of `python -m cir_jax.train` for trying a mesh that is not here."""

    dry_run: bool = False
    """do not train: print what a step would need (parameters, memory per device, communication, FLOPs)"""
    devices: int = 1
    """with --dry-run: how many devices there would be"""
    shape: Annotated[str, tyro.conf.arg(name="mesh", metavar="DATA,FSDP,TENSOR")] = ""
    """with --dry-run: their mesh, as 8,8,1; without it, mesh.fsdp and mesh.tensor"""
    json: Path | None = None
    """with --dry-run: a file for the numbers"""

    def __post_init__(self):
        super().__post_init__()
        if not self.dry_run and (self.devices != 1 or self.shape or self.json):
            raise ValueError("--devices, --mesh and --json belong to --dry-run, which is not set")
        if self.devices < 1:
            raise ValueError(f"--devices is {self.devices}; it must be at least 1")


def dry_run(config: Experiment, options: DryRun) -> None:
    """Compile the step of an experiment for simulated devices, print what it needs and write it where asked."""
    from cir_jax.training.checks import check_numbers

    if options.json:
        files.check_writable(options.json)
    config = with_mesh(config, options.devices, options.shape)
    check_numbers(config)
    simulate(options.devices)
    needs = needed(config)
    print("\n".join(told(needs)))
    if options.json:
        with files.write_atomically(options.json) as part:
            files.write_json(part, needs)


def with_mesh(config: Experiment, devices: int, shape: str) -> Experiment:
    """The experiment on a mesh given as `data,fsdp,tensor`; ValueError if it is none of so many devices."""
    if not shape:
        return config
    sizes = shape.split(",")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) for size in sizes):
        raise ValueError(f"--mesh is {shape!r}; expected three numbers data,fsdp,tensor, as 8,8,1")
    data, fsdp, tensor = map(int, sizes)
    if data * fsdp * tensor != devices:
        raise ValueError(
            f"--mesh {shape} is a mesh of {data * fsdp * tensor} devices, --devices is {devices}"
        )
    return replace(config, mesh=replace(config.mesh, fsdp=fsdp, tensor=tensor))


def simulate(devices: int) -> None:
    """Let this process have so many CPU devices, and no others; before any device was used."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)


def needed(config: Experiment, compiled: bool = True) -> dict[str, Any]:
    """What a step of an experiment needs on this process's devices, as JSON values; sizes in bytes.

    Without `compiled` the step is only traced and lowered, which leaves out temporaries and collectives.
    """
    import jax
    import jax.numpy as jnp

    from cir_jax import flops, sharding
    from cir_jax.training.checks import check_batch
    from cir_jax.training.step import program

    mesh = sharding.make_mesh(config.mesh.fsdp, config.mesh.tensor)
    check_batch(config, mesh)
    run = program(config, mesh)
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    needs = {
        "mesh": dict(mesh.shape),
        "batch_size": config.train.batch_size,
        "parameters": {"trained": count(run.state["params"]), "frozen": count(run.state["frozen"])},
        "state_bytes_per_device": {part: bytes_here(tree) for part, tree in run.state.items()},
        "steps": [],
    }
    for kind in kinds_of_batches(config):
        batch = batch_shapes(config, kind, mesh)
        number = jax.ShapeDtypeStruct((), jnp.int32)
        found = {
            "query": list(kind.query),
            "item": list(kind.item),
            "assumed": kind.assumed,
            "batch_bytes_per_device": bytes_here(batch),
            "flops": flops.count(run.step, run.state, batch, number),
        }
        lowered = run.step.lower(run.state, batch, number)
        if compiled:
            made = lowered.compile(compiler_options=PLANNED)
            found["temporary_bytes_per_device"] = made.memory_analysis().temp_size_in_bytes
            found["collectives"] = collectives(made.as_text())
        needs["steps"].append(found)
    return needs


# ---- what a batch consists of ----


class Kind(NamedTuple):
    """The parts of queries and items of a batch, and whether they are assumed because the data is not here."""

    query: tuple[str, ...]
    item: tuple[str, ...]
    assumed: bool = False


def kinds_of_batches(config: Experiment) -> list[Kind]:
    """The different kinds of batches that the training sets of an experiment give."""
    return list(dict.fromkeys(_kind(data) for data in config.data))


def _kind(data: Data) -> Kind:
    import numpy as np

    from cir_jax.data import training_set

    try:
        pair = training_set(data)[0]
    except FileNotFoundError:
        name = f"{data.name}/{data.variant}" if data.variant else data.name
        usual = ASSUMED.get(data.name, (("text",), ("image",)))
        return Kind(*ASSUMED.get(name, usual), assumed=True)
    if "draw" in pair:
        pair = pair["draw"](np.random.default_rng(0))
    known = {"image", "text", "texts", "token"}
    parts = lambda side: tuple(sorted({part.removesuffix("s") for part in side if part in known}))
    return Kind(parts(pair["query"]), parts(pair["item"]))


def batch_shapes(config: Experiment, kind: Kind, mesh):
    """Shapes and places of a batch, as the pipeline would make it."""
    import jax
    import numpy as np

    from cir_jax import sharding

    place = jax.sharding.NamedSharding(mesh, sharding.BATCH)
    method, rows = config.method, config.train.batch_size
    inputs = method.inputs
    shape = lambda shape, kind: jax.ShapeDtypeStruct((rows, *shape), kind, sharding=place)
    arrays = {
        "image": {"image": shape((inputs.image.size, inputs.image.size, 3), np.float32)},
        "text": {
            "text": shape((inputs.text.length,), np.int32),
            "text_mask": shape((inputs.text.length,), bool),
        },
    }
    if "token" in kind.item:
        arrays["token"] = {"token": shape((method.text.width,), np.float32)}
    side = lambda parts: {k: x for part in parts for k, x in arrays[part].items()}
    return {"query": side(kind.query), "item": side(kind.item) | {"group": shape((), np.int32)}}


# ---- counting ----


def bytes_here(tree) -> int:
    """The bytes that one device holds of a tree of shapes with places."""
    import jax

    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def collectives(text: str) -> dict[str, dict[str, int]]:
    """What a compiled program sends around in a step: by kind, how often, and the bytes of the results on one device.

    Args:
      text: the program in XLA's notation, whose loops say how often they run.
    """
    bodies = dict(_computations(text))
    count, size = Counter(), Counter()

    def visit(name, times):
        for line in bodies[name]:
            if found := re.search(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(", line):
                count[found[2]] += times
                size[found[2]] += times * _bytes(found[1])
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            for inner in re.findall(r"(?:body|to_apply|calls)=%?([\w.-]+)", line):
                visit(inner, times * (int(trips[1]) if trips else 1))
            for branches in re.findall(r"branch_computations=\{(.*?)\}", line):
                for inner in branches.split(","):
                    visit(inner.strip(" %"), times)

    visit(next(name for name in bodies if name.startswith("ENTRY ")), 1)
    return {kind: {"count": count[kind], "bytes": size[kind]} for kind in KINDS if count[kind]}


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """(name, lines) of each; the name of the whole program begins with ENTRY."""
    for head, body in re.findall(r"^((?:ENTRY )?%?[\w.-]+) [^\n]*\{\n(.*?)^\}", text, re.M | re.S):
        yield head.replace("%", ""), body.splitlines()


def _bytes(shapes: str) -> int:
    """The size of arrays written as `f32[8,3]{1,0}`, one or several."""
    found = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    return sum(BYTES[kind] * math.prod(map(int, filter(None, s.split(",")))) for kind, s in found)


# ---- telling ----


def told(needs: Mapping[str, Any]) -> Iterator[str]:
    """The lines that the command prints."""
    mesh, count, held = needs["mesh"], needs["parameters"], needs["state_bytes_per_device"]
    devices = math.prod(mesh.values())
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.items())
    yield f"{devices} devices ({shape}), batch of {needs['batch_size']:,} rows"
    yield f"parameters   {count['trained'] / 1e6:,.1f} M trained, {count['frozen'] / 1e6:,.1f} M frozen"
    parts = {"params": "trained", "frozen": "frozen", "opt": "optimiser"}
    listed = ", ".join(f"{name} {mebibytes(held[part])}" for part, name in parts.items())
    yield f"state        {mebibytes(sum(held.values()))} per device, exactly ({listed})"
    for step in needs["steps"]:
        kind = f"{' and '.join(step['query'])} -> {' and '.join(step['item'])}"
        yield f"step         {kind}{', as assumed: the data is not here' if step['assumed'] else ''}"
        yield f"  batch        {mebibytes(step['batch_bytes_per_device'])} per device"
        yield f"  FLOPs        {step['flops']:.3g} in products, on all devices together"
        if "collectives" in step:
            estimate = "an estimate: planned by XLA for CPUs; for a GPU or TPU it plans otherwise"
            yield f"  temporaries  {mebibytes(step['temporary_bytes_per_device'])} per device, {estimate}"
            for kind, sent in step["collectives"].items():
                yield f"  {kind:18} {sent['count']:6,} times, {mebibytes(sent['bytes'])} of results per device"


def mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
