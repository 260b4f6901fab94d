"""Where the time of one training step of ours goes: from the profiler's trace, by the kind of each instruction."""

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

# Products, those of attention (for PyTorch, its fused attention whole), the optimizer with its clipping, and the rest:
# norms, activations, softmax, dropout, copies.
KINDS = ("products", "attention", "optimizer", "rest")
CONTAINERS = ("while", "call", "conditional")
LIBRARY_PRODUCT = re.compile(r'custom_call_target="[^"]*(gemm|matmul)')
HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = .*? ([\w\-]+)\(")


def normed(seconds: Counter) -> dict[str, float]:
    """The share of each kind; empty if nothing was seen."""
    total = sum(seconds.values())
    return {kind: seconds[kind] / total for kind in KINDS} if total else {}


def shares(program: str, call: Callable[[], None]) -> dict[str, float]:
    """The share of each of `KINDS` in the time of a call.

    Args:
      program: the text of the compiled program (`compiled.as_text()`).
      call: runs it once, and waits for it.
    """
    known, seconds = kinds(program), Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        (trace,) = Path(folder).rglob("*.xplane.pb")
        for name, duration in _events(jax.profiler.ProfileData.from_file(str(trace))):
            if kind := known.get(name):
                seconds[kind] += duration
    return normed(seconds)


def _events(trace) -> Iterator[tuple[str, float]]:
    """Name and duration of each instruction: on the devices, or on the CPU where there are none."""
    planes = list(trace.planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    for plane in devices or planes:
        for line in plane.lines:
            for event in line.events:
                yield dict(event.stats).get("hlo_op", event.name), event.duration_ns


def kinds(program: str) -> dict[str, str]:
    """The kind of each instruction of a compiled training step by its name, without loops and the like."""
    inside, computation = {}, ""
    lines = []
    for line in program.splitlines():
        if head := HEAD.match(line):
            computation = head[1]
        elif found := LINE.match(line):
            name, opcode = found.groups()
            lines.append((name, opcode, line))
            if opcode in ("dot", "convolution"):
                inside[computation] = line
    return {
        name: _kind(line, inside.get(_called(line), line))
        for name, opcode, line in lines
        if opcode not in CONTAINERS
    }


def _called(line: str) -> str | None:
    found = re.search(r"calls=%?([\w.\-]+)", line)
    return found[1] if found else None


def _kind(line: str, product: str) -> str:
    """The kind of an instruction; `product` is that of its fusion, if it has one."""
    _, opcode = LINE.match(product).groups()
    source = re.search(r'op_name="([^"]*)"', product)
    source = source[1] if source else ""
    if opcode in ("dot", "convolution") or LIBRARY_PRODUCT.search(line):
        return "attention" if "bhnm" in source else "products"
    # What is neither differentiated nor a derivative comes behind the gradients.
    return "optimizer" if source and "jvp(" not in source else "rest"
