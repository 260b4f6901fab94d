"""Batches too large to be computed in one piece: encoders in chunks, losses in rings, parameters gathered layer by layer.

Methods are written as if there were one device with room for everything. The training step says around their loss how it is
to be computed (`computed`); what they call here looks it up. Neither changes a loss or its gradient. This is all that
encoders, methods and losses know of devices.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cir_jax.sharding import BATCH, path_name, spec, stacked

ROWS = BATCH[0]  # the axes of the mesh over which the rows of a batch are spread


@dataclass(frozen=True)
class Way:
    """How a loss is computed; `used` is what of it the loss has met."""

    chunks: int = 1
    ring: bool = False
    mesh: Mesh | None = None
    used: set[str] = field(default_factory=set)


_WAY: ContextVar[Way | None] = ContextVar("way", default=None)


def _way() -> Way:
    return _WAY.get() or Way()


@contextlib.contextmanager
def computed(chunks: int = 1, ring: bool = False, mesh: Mesh | None = None) -> Iterator[None]:
    """How the losses that are traced inside are computed.

    Args:
      chunks: encoders see so many parts of a batch, one after the other (`in_chunks`).
      ring: contrastive losses meet the rows of one device after the other (`meet_all`).
      mesh: the devices; None for one.

    Raises:
      ValueError: the loss did not meet what was asked for, so that it would have had no effect.
    """
    way = Way(chunks, ring, mesh if mesh is not None and mesh.size > 1 else None)
    token = _WAY.set(way)
    try:
        yield
    finally:
        _WAY.reset(token)
    if chunks > 1 and "chunks" not in way.used:
        raise ValueError(f"chunks is {chunks}, but this loss has no encoder of rows; set it to 1")
    if ring and "ring" not in way.used:
        raise ValueError("ring is set, but this loss does not compare all rows; leave it out")


def in_chunks(
    encode: Callable[[Any, jax.Array | None], Any], rows: Any, key: jax.Array | None = None
) -> Any:
    """`encode(rows, key)`, in chunks of the rows: each alone, and once more on the way back (gradient caching).

    Only what `encode` reads and returns is kept of a chunk, so the memory for activations is that of one. Without random
    numbers the result is the same; with them every chunk has a key of its own.

    Args:
      encode: from a tree of `[N, …]` and a key to a tree of `[N, …]`, every row by itself.
      rows: a tree of `[B, …]`.
      key: of dropout and the like; None for none.

    Returns:
      A tree of `[B, …]`.
    """
    way = _way()
    way.used.add("chunks")
    if way.chunks == 1:
        return encode(rows, key)
    keys = None if key is None else jax.random.split(key, way.chunks)
    parts = cut(rows, way.chunks, way.mesh)
    made = jax.lax.map(lambda part: jax.checkpoint(encode)(*part), (parts, keys))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), made)


def cut(rows: Any, parts: int, mesh: Mesh | None = None) -> Any:
    """A tree of `[B, …]` as one of `[parts, B / parts, …]`; part j has the rows j, j + parts, …

    So every part is spread over all devices as the batch is, and which rows share one does not depend on the devices.
    """

    def one(x):
        x = x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
        if mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(None, ROWS)))

    return jax.tree.map(one, rows)


def gathered(params: Any) -> Any:
    """Parameters of a layer, or a tree of them, put together over the axis `fsdp`; what `tensor` cuts stays cut.

    So parameters come to the rows of a batch, which stay where they are. Left to the compiler, activations may travel
    instead, and on a mesh of 2 x 2 x 2 XLA (jax 0.10.2) computes wrong gradients of FTI4CIR. Stacks of blocks are left
    alone: `cir_jax.encoders.layers.run` gathers a block when its turn has come.
    """
    mesh = _way().mesh
    if mesh is None:
        return params

    def one(path, x):
        name = path_name(path).removesuffix("/value")  # as leaves of modules are called
        if stacked(name):
            return x
        # The rules name a parameter by its module, which a block of its own does not have above it.
        kept = (axis if axis == "tensor" else None for axis in spec("/" + name, x.shape, mesh))
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*kept)))

    return jax.tree_util.tree_map_with_path(one, params)


def remembered(step: Callable, remat: bool) -> Callable:
    """A step of a loop over layers, and what of it is kept for the way back.

    With `remat` its input alone; without, its activations, but no gathered parameters: they are gathered again.
    """
    mesh = _way().mesh
    if remat:
        return jax.checkpoint(step)
    if mesh is None or mesh.shape["fsdp"] == 1:
        return step
    # A gathered parameter is the result of the only constraint inside a layer.
    return jax.checkpoint(step, policy=lambda made, *_, **__: made.name != "sharding_constraint")


def rings() -> bool:
    """True where losses are to be computed in a ring."""
    way = _way()
    way.used.add("ring")
    return way.ring


def meet_all(meet: Callable, start: Any, own: Any, others: Any, *shared: jax.Array) -> Any:
    """What `B` rows know after meeting all `B` others: in a ring those of one device after the other, else all at once.

    In a ring a device holds `[B / devices, B / devices]` of what is compared, and the others travel; on the way back it
    is computed once more.

    Args:
      meet: `(state, own, others, first, *shared) -> state`, where `first` is the row number of the first of `others`.
      start: the state before, a tree of `[B, …]`.
      own: a tree of `[B, …]`.
      others: a tree of `[B, …]`.
      shared: scalars that every meeting reads.
    """
    way = _way()
    if not rings() or way.mesh is None:
        return meet(start, own, others, 0, *shared)

    def turns(start, own, others, *shared):
        """On each device: its own rows meet those that arrive, and send them on to the left."""
        me, devices = jax.lax.axis_index(ROWS), jax.lax.axis_size(ROWS)
        size = len(jax.tree.leaves(own)[0])
        to_the_left = [(device, (device - 1) % devices) for device in range(devices)]

        @jax.checkpoint
        def turn(carry, number):
            state, others = carry
            state = meet(state, own, others, (me + number) % devices * size, *shared)
            pass_on = lambda x: jax.lax.ppermute(x, ROWS, to_the_left)
            return (state, jax.tree.map(pass_on, others)), None

        return jax.lax.scan(turn, (start, others), jnp.arange(devices))[0][0]

    shared = tuple(map(jnp.asarray, shared))
    specs = (BATCH, BATCH, BATCH) + (P(),) * len(shared)
    around = jax.shard_map(turns, mesh=way.mesh, in_specs=specs, out_specs=BATCH)
    return around(start, own, others, *shared)
