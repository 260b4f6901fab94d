"""Commands in processes of their own, as a user starts them, without paying for imports every time.

A server process imports the libraries once, touches no device, and forks for each command: what runs is a new process
with its own arguments, folder, streams, signals and exit code.
"""

import atexit
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

SERVER = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
import jax, flax.nnx, orbax.checkpoint, optax, grain, PIL.Image, tokenizers, tyro, rich.table, rich.console
import cir_jax.commands, cir_jax.retrieval, cir_jax.report.page, cir_jax.report.evaluation, cir_jax.train
import cir_jax.embed, cir_jax.eval, cir_jax.index, cir_jax.search
for line in sys.stdin:
    asked = json.loads(line)
    pid = os.fork()
    if not pid:
        os.setsid()
        os.environ.clear(); os.environ.update(asked["env"])
        if "JAX_NUM_CPU_DEVICES" in os.environ:
            jax.config.update("jax_num_cpu_devices", int(os.environ["JAX_NUM_CPU_DEVICES"]))
        os.chdir(asked["cwd"])
        for number, name in ((0, os.devnull), (1, asked["out"]), (2, asked["err"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), number)
        sys.argv = [asked["name"], *map(os.fsdecode, map(bytes.fromhex, asked["arguments"]))]
        for number, limit in asked["limits"]:
            import resource
            resource.setrlimit(number, (limit, limit))
        code = 1
        try:
            cir_jax.commands.start(asked["name"])
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush(); sys.stderr.flush()
            os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@functools.cache
def _server() -> subprocess.Popen:
    program = [sys.executable, "-c", SERVER]
    server = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.kill)
    return server


def run(
    name: str, *arguments, cwd=None, env=None, limits=(), timeout=280, stop=None
) -> subprocess.CompletedProcess:
    """Run `python -m NAME ARGUMENTS` to its end.

    Args:
      limits: (resource, value) each, for `setrlimit`.
      stop: (signal, when): the signal is sent as soon as `when()` is true.
    """
    encoded = [
        os.fsencode(a if isinstance(a, (str, bytes, os.PathLike)) else str(a)) for a in arguments
    ]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        asked = {
            "name": name.removeprefix("cir_jax."),
            "arguments": [each.hex() for each in encoded],
            "cwd": os.fspath(cwd or os.getcwd()),
            "env": {**os.environ, **(env or {})},
            "out": str(out),
            "err": str(err),
            "limits": list(limits),
        }
        server = _server()
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        pid = int(server.stdout.readline())
        with _watched(pid, timeout, stop):
            code = int(server.stdout.readline())
        done = subprocess.CompletedProcess([name, *arguments], code)
        # A process that was killed as soon as it was made has opened neither.
        said = [path.read_bytes() if path.exists() else b"" for path in (out, err)]
        done.stdout, done.stderr = said
        return done


@contextlib.contextmanager
def _watched(pid: int, timeout: float, stop):
    """Kill the process when its time is over, and send it the signal that is asked for."""
    ended = threading.Event()

    def watch():
        start, waiting = time.monotonic(), stop
        while not ended.wait(0.002):
            if waiting and waiting[1]():
                os.kill(pid, waiting[0])
                waiting = None
            if time.monotonic() - start > timeout:
                os.kill(pid, signal.SIGKILL)
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
