"""Several processes, one program: joined before any device is touched; each computes a part, process 0 prints and writes.

How the processes find each other, in this order:

1. `CIR_JAX_COORDINATOR` (host:port of process 0), `CIR_JAX_PROCESSES` and `CIR_JAX_PROCESS`, as most of launch/* sets them;
2. `CIR_JAX_PROCESSES=auto`: JAX asks the machine (TPU pods, Open MPI), as `launch/tpu_pod.sh` has it;
3. what `srun` with several tasks, and Kubernetes on TPUs, set by themselves; JAX reads it.

Everything that exchanges something (`gather`, `from_first`, a search in an exact index) is called by all processes, in
the same order.
"""

import hashlib
import io
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:  # commands that show their help do without
    import numpy as np

VARIABLES = ("CIR_JAX_COORDINATOR", "CIR_JAX_PROCESSES", "CIR_JAX_PROCESS")
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
ARRIVAL = 600  # seconds in which all processes have to appear
SILENCE = 30  # seconds after which a process that gives no sign of life counts as lost
PATIENCE = (
    7 * 24 * 3600
)  # seconds that processes which are done wait for the others; a lost one ends that too
PARTING = 15  # seconds that a stopped process waits for the others to stop too
LOST = 134  # the exit code of a process that lost another: 128 + SIGABRT, by which JAX ends it
SIGNS = re.compile(r"Gloo|NCCL|UNAVAILABLE|[Hh]eartbeat|Connection (closed|reset)|Socket closed")

Arrays = Mapping[str, "np.ndarray"]


def asked() -> str:
    """How the environment says that there are several processes: "" (there are not), "given", "auto" or "slurm".

    Raises:
      ValueError: some of the variables are set and others are not, or they hold no such numbers.
    """
    found = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    if found == {"CIR_JAX_PROCESSES": "auto"}:
        return "auto"
    if found:
        return "given" if given()[2] > 1 else ""
    if int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1 and all(map(os.environ.get, SLURM)):
        return "slurm"
    return "auto" if "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") else ""


def given() -> tuple[str, int, int]:
    """(address of process 0, number of this process, how many there are) by our own variables."""
    place, count, number = values = [os.environ.get(name, "") for name in VARIABLES]
    if not all(values):
        absent = [name for name, value in zip(VARIABLES, values) if not value]
        raise ValueError(
            f"{', '.join(absent)} not set; several processes need {', '.join(VARIABLES)}"
        )
    if not (count.isdecimal() and number.isdecimal() and int(number) < int(count)):
        raise ValueError(
            f"CIR_JAX_PROCESSES is {count!r} and CIR_JAX_PROCESS {number!r}; expected a number from 1 on and one below it, "
            "or CIR_JAX_PROCESSES=auto alone"
        )
    return place, int(number), int(count)


def join(preemption: bool = True) -> None:
    """Connect to the other processes if there are any; from then on only process 0 has a stdout.

    Where not all of them come within ten minutes, JAX ends the process, with `LOST`.

    Args:
      preemption: a SIGTERM to one process is told to all, for `multihost_utils.reached_preemption_sync_point`, and does
        nothing else; without, it ends that process as always.

    Raises:
      ValueError: the environment contradicts itself; see `asked`.
    """
    how = asked()
    if not how:
        return
    import jax

    jax.config.update("jax_enable_preemption_service", preemption)
    limits = {
        "initialization_timeout": ARRIVAL,
        "heartbeat_timeout_seconds": SILENCE,
        "shutdown_timeout_seconds": PATIENCE,
    }
    if how == "given":
        place, number, count = given()
        # "deactivate": every process has all devices that it sees, whatever scheduler is around it.
        jax.distributed.initialize(
            place, count, number, cluster_detection_method="deactivate", **limits
        )
    else:
        method = "slurm" if how == "slurm" else None
        jax.distributed.initialize(cluster_detection_method=method, **limits)
    _hush()


def _hush() -> None:
    """Leave stdout to process 0, and there to Python: what Gloo prints goes to stderr."""
    if sys.stdout is None:  # closed
        return
    sys.stdout.flush()
    ours = os.dup(1) if first() else os.open(os.devnull, os.O_WRONLY)
    os.dup2(2 if first() else ours, 1)
    sys.stdout = open(ours, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 - until the end


def joined() -> bool:
    """Whether this process has others beside it."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """True in the one process that prints and writes."""
    return not joined() or sys.modules["jax"].process_index() == 0


def share(count: int, size: int = 1) -> range:
    """This process's part of `count` things: whole blocks of `size`, one behind the other, about as many for each.

    Blocks are the same for any number of processes, so that whatever is computed block by block has the same bits.
    """
    if not joined():
        return range(count)
    jax, blocks = sys.modules["jax"], -(-count // size)
    bound = lambda process: min(count, process * blocks // jax.process_count() * size)
    return range(bound(jax.process_index()), bound(jax.process_index() + 1))


def gather(arrays: Arrays) -> list[Arrays]:
    """What each process gives, in the order of the processes: arrays by name, of any shapes and dtypes."""
    if not joined():
        return [arrays]
    return [_unpacked(data) for data in _exchanged(_packed(arrays))]


def from_first(make: Callable[[], Arrays | None]) -> Arrays | None:
    """What `make` gives in process 0; it is not called in the others."""
    if not joined():
        return make()
    found = make() if first() else None
    data = _exchanged(b"" if found is None else _packed(found))[0]
    return _unpacked(data) if data else None


def check_same(what: str, value: str) -> None:
    """ValueError in all processes if `value` is another text in some of them; `what` is the subject of the message."""
    import numpy as np

    mark = np.frombuffer(hashlib.sha256(value.encode("utf-8", "surrogatepass")).digest(), np.uint8)
    found = [bytes(each["mark"]) for each in gather({"mark": mark})]
    other = [process for process, each in enumerate(found) if each != found[0]]
    if other:
        raise ValueError(
            f"{what} differs between process 0 and {', '.join(map(str, other))} of {len(found)}; all need the same files"
        )


def end(code: int, *, told: bool = False) -> NoReturn:
    """End this process, one of several too: these would wait for it, and it for them.

    Args:
      told: the others are about to end as well, so that there is somebody to take leave of.
    """
    if not joined():
        sys.exit(code)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    if told:
        import jax

        parting = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        parting.start()
        parting.join(PARTING)
    os._exit(code)


def end_failed(error: BaseException, words: str) -> NoReturn:
    """End this process, whose command failed; where that is because another one was lost, JAX names it first.

    Args:
      words: what the error says.
    """
    who = ""
    if joined():
        jax = sys.modules["jax"]
        who = f"process {jax.process_index()} of {jax.process_count()}: "
    if who and SIGNS.search(str(error)):
        print(
            f"{who}error: lost another process ({words.splitlines()[0]}); JAX names it below, within {SILENCE} s",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(SILENCE + PARTING)  # ended by JAX meanwhile, with LOST
        end(LOST)
    print(f"{who}error: {words}", file=sys.stderr)
    end(1)


def _packed(arrays: Arrays) -> bytes:
    import numpy as np

    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _unpacked(data: bytes) -> Arrays:
    import numpy as np

    with np.load(io.BytesIO(data), allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def _exchanged(data: bytes) -> list[bytes]:
    """The bytes of every process."""
    import numpy as np
    from jax.experimental.multihost_utils import process_allgather

    # Sizes as two halves: JAX has no 64-bit numbers.
    sizes = process_allgather(np.array(divmod(len(data), 2**24), np.int32))
    sizes = [int(high) * 2**24 + int(low) for high, low in sizes]
    mine = np.zeros(max(sizes), np.uint8)
    mine[: len(data)] = np.frombuffer(data, np.uint8)
    return [each[:size].tobytes() for each, size in zip(process_allgather(mine), sizes)]
