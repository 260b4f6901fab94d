"""Compiled programs kept on disk between starts: JAX's persistent compilation cache, private to the user."""

import hashlib
import os
import platform
import stat
import sys
from pathlib import Path

SMALLEST_SECONDS = 0.2  # programs that compile faster are not kept
MOST_BYTES = 2 * 2**30  # the least recently used ones go first
NONE = "none"


def keep_compiled(folder: str | None = None) -> None:
    """Turn the cache on, in `folder` or in the user's own cache folder; "none" leaves it off.

    JAX's variable `JAX_COMPILATION_CACHE_DIR`, where set, stands for a missing `folder`. Compiled programs run with the
    rights of whoever loads them, so a folder that others may write to is not used, and stderr says so.
    """
    folder = folder or os.environ.get("JAX_COMPILATION_CACHE_DIR") or _default()
    if folder == NONE:
        return
    try:
        place = Path(folder).expanduser().absolute() / _machine()
        fault = _fault(place)
    except RuntimeError as error:  # there is no home
        fault = str(error)
    if fault:
        print(f"compiled programs are not kept: {fault}; name another --cache", file=sys.stderr)
        return
    import jax

    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SMALLEST_SECONDS)
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)


def _default() -> str:
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "cir_jax")


def _machine() -> str:
    """A name for this kind of processor: a home may be shared by machines that cannot run each other's programs."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def _fault(place: Path) -> str | None:
    """Why `place` cannot hold programs that only this user can change; None if it does. It is made if missing."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        place.mkdir(exist_ok=True, mode=0o700)
        found = place.stat()
    except OSError as error:
        return f"{place} ({error.strerror})"
    if hasattr(os, "getuid") and found.st_uid != os.getuid():
        return f"{place} belongs to another user"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{place} can be written by others"
    if not os.access(place, os.W_OK | os.X_OK):
        return f"{place} cannot be written"
    return None
