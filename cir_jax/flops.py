"""Floating-point operations of a function, counted in what it traces to, and what devices can do at most.

XLA's own count (`cost_analysis`) takes the body of a loop once, however often it runs: of 24 stacked blocks it sees one.
"""

import math
from collections.abc import Callable

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

# Dense bfloat16 products per second of one JAX device, from the makers' data sheets, by `device_kind`.
PEAKS = {
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def peak() -> float | None:
    """Operations per second of all devices together; None where the kind is not in `PEAKS`."""
    return PEAKS.get(jax.devices()[0].device_kind, 0) * jax.device_count() or None


def count(function: Callable, *args) -> int:
    """Operations of the matrix products and convolutions of `function(*args)`; nothing is computed.

    A multiplication and an addition are two. Every turn of a scan counts, a `while` loop of unknown length once; of
    several branches the longest; what a rematerialised function computes again counts again.

    Args:
      args: arrays or shape structs.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: Jaxpr) -> int:
    return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        depth = math.prod(shape[axis] for axis in contracted)
        return 2 * depth * math.prod(equation.outvars[0].aval.shape)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        features = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2 * math.prod(kernel) // features * math.prod(equation.outvars[0].aval.shape)
    inner = [_count(each) for each in _inner(params)]
    if name == "cond":
        return max(inner)
    times = {"scan": params.get("length"), "shard_map": _devices(params)}.get(name)
    return sum(inner) * (times or 1)


def _devices(params) -> int:
    """Over how many devices a `shard_map` runs its body."""
    mesh, axes = params.get("mesh"), params.get("manual_axes", ())
    return math.prod(mesh.shape[axis] for axis in axes) if mesh is not None else 1


def _inner(params) -> list[Jaxpr]:
    """The functions that an operation calls."""
    values = [v for x in params.values() for v in (x if isinstance(x, tuple | list) else [x])]
    closed = [v.jaxpr if isinstance(v, ClosedJaxpr) else v for v in values]
    return [v for v in closed if isinstance(v, Jaxpr)]
