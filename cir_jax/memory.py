"""When something does not fit the memory of the devices."""

import contextlib
import sys
from collections.abc import Callable
from typing import TypeVar

import jax

Result = TypeVar("Result")


def full(error: BaseException) -> bool:
    """Whether an error of JAX says that memory ran out."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def halved_once(
    compute: Callable[[int], Result], size: int, most: int, what: str
) -> tuple[Result, int]:
    """`compute(size)` and the size that served: where memory does not hold the whole `most`, half of it, with a notice.

    Raises:
      MemoryError: half does not fit either; the message names the sizes.
    """
    try:
        return compute(size), size
    except jax.errors.JaxRuntimeError as error:
        if not full(error):
            raise
        if size < most or size < 2:
            raise MemoryError(
                f"{what} {size} does not fit {devices()}; give a smaller one"
            ) from None
    print(f"{what} {size} does not fit {devices()}; going on with {size // 2}", file=sys.stderr)
    return halved_once(compute, size // 2, most, what)


def peaks() -> dict[str, float]:
    """The most memory that was in use so far, in GiB: of the fullest device, where it tells, else of this process."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    used = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    if used:
        return {"device_memory_gib": max(used) / 2**30}
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"host_memory_gib": used / (2**30 if sys.platform == "darwin" else 2**20)}
    return {}


def devices() -> str:
    """The memory that did not suffice, in words."""
    found = jax.local_devices()
    return f"the memory of {len(found)} x {found[0].device_kind}"
