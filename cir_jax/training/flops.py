"""The arithmetic of a step, and how fast a device is at it: what model-FLOP utilisation is made of."""

import math
from collections.abc import Callable, Iterator

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

# Floating-point operations per second of dense bfloat16 products, as the makers' data sheets have them, by a part of
# JAX's `device_kind`; the first that fits counts.
PEAKS = {
    "B200": 2250e12,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "TPU v6": 918e12,
    "TPU v5p": 459e12,
    "TPU v5": 197e12,  # "TPU v5 lite"
    "TPU v4": 275e12,
}


def peak(device_kind: str) -> float | None:
    """Floating-point operations per second of a device in bfloat16; None for one that is not in the table."""
    return next((peak for name, peak in PEAKS.items() if name in device_kind), None)


def operations(function: Callable, *arguments) -> int:
    """Floating-point operations of all matrix products and convolutions of a call; nothing is computed.

    A loop counts as often as it goes round and a choice as its longest branch. What rematerialisation computes again
    counts too: for those of a model, turn it off.

    Args:
      function: what `jax.make_jaxpr` takes.
      arguments: arrays, or their shapes and types.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Jaxpr) -> int:
    return sum(_count_one(equation) for equation in jaxpr.eqns)


def _count_one(equation) -> int:
    made = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * made * math.prod(shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, numbers = equation.invars[1].aval.shape, params["dimension_numbers"]
        return 2 * made * math.prod(kernel) // kernel[numbers.rhs_spec[0]]
    inner = [_count(each) for value in params.values() for each in _inner(value)]
    if name == "cond":
        return max(inner)
    return sum(inner) * params.get("length", 1)


def _inner(value) -> Iterator[Jaxpr]:
    if isinstance(value, ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, Jaxpr):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _inner(each)
