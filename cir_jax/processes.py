"""Several processes, one program: joined from the environment before any device is touched.

`launch/local.sh` sets `CIR_JAX_COORDINATOR` (host:port), `CIR_JAX_PROCESSES` and `CIR_JAX_PROCESS`.
"""

import os


def count() -> int:
    """How many processes the environment says there are.

    Raises:
      ValueError: it says no number.
    """
    value = os.environ.get("CIR_JAX_PROCESSES", "1")
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"CIR_JAX_PROCESSES is {value!r}; expected a number from 1 on, or nothing")
    return int(value)


def join() -> None:
    """Connect to the other processes if the environment says that there are any.

    Raises:
      ValueError: some of the three variables are set and others are not.
    """
    names = ("CIR_JAX_COORDINATOR", "CIR_JAX_PROCESSES", "CIR_JAX_PROCESS")
    values = [os.environ.get(name) for name in names]
    if not any(values):
        return
    if not all(values):
        absent = [name for name, value in zip(names, values) if not value]
        raise ValueError(f"{', '.join(absent)} not set; several processes need {', '.join(names)}")
    import jax

    jax.distributed.initialize(values[0], count(), int(values[2]))


def first() -> bool:
    """True in the one process that prints and writes."""
    import jax

    return jax.process_index() == 0
