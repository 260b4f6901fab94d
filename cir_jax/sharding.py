"""Where arrays live: the device mesh and one table from parameter names to partition specs.

Models declare nothing about devices. A parameter's path is matched against `RULES`; optimizer moments carry the
same paths and therefore follow their parameters.
"""

import re

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

# The first match wins. A spec describes the last dimensions, so one rule serves plain and stacked kernels.
RULES = (
    (r".*/(query|key|value|up|merge|across|linear\d)/kernel", P("fsdp", "tensor")),
    (r".*project/kernel", P("fsdp", "tensor")),
    (r".*/(out|down)/kernel", P("tensor", "fsdp")),
    (r".*/embedding", P("tensor", "fsdp")),
    (r".*/positions", P(None, "fsdp")),
    # channels that come out
    (r".*/((conv\d|stem\d?|shortcut)/kernel|patch_kernel)", P("fsdp")),
    (r".*", P()),
)


def make_mesh(fsdp: int = 1, tensor: int = 1, devices=None) -> jax.sharding.Mesh:
    """A mesh over all devices of all processes; what `fsdp` and `tensor` leave over is `data`."""
    devices = np.asarray(jax.devices() if devices is None else devices).reshape(-1)
    data, rest = divmod(len(devices), fsdp * tensor)
    if rest or not data:
        raise ValueError(
            f"mesh fsdp={fsdp} x tensor={tensor} does not divide the {len(devices)} devices; "
            f"choose sizes whose product divides {len(devices)}"
        )
    return jax.make_mesh(
        (data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=list(devices)
    )


def path_name(path) -> str:
    """`("opt", 0, "mu", "text")` of a pytree path as `opt/0/mu/text`."""
    return "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def stacked(name: str) -> bool:
    """True if the first axis of a parameter counts blocks (`cir_jax.encoders.layers.stack`)."""
    return "/blocks/" in f"/{name}"


def spec(name: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> P:
    """The partition spec of one parameter; an axis that does not divide its dimension is dropped."""
    rule = next(spec for pattern, spec in RULES if re.fullmatch(pattern, name))
    if len(rule) > len(shape):
        return P()
    axes = (None,) * (len(shape) - len(rule)) + tuple(rule)
    return P(*(a if a and size % mesh.shape[a] == 0 else None for a, size in zip(axes, shape)))


def shardings(tree, mesh: jax.sharding.Mesh):
    """A `NamedSharding` for every leaf of a tree of arrays or shape structs."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, spec(path_name(path), x.shape, mesh)), tree
    )


def placed(abstract, places):
    """Shape structs that say where each array is to be restored."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract, places
    )


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_devices(mesh: jax.sharding.Mesh) -> int:
    """Over how many devices the rows of a batch are spread."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def put_batch(batch, mesh: jax.sharding.Mesh):
    """This process's rows of a batch as global arrays, rows spread over `data` and `fsdp`."""
    place = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(place, x), batch)


def gather(tree):
    """The whole arrays of a tree as numpy, in every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(
        lambda x: (
            multihost_utils.process_allgather(x, tiled=True) if isinstance(x, jax.Array) else x
        ),
        tree,
    )
