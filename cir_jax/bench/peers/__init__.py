"""PyTorch, which the benchmarks compare with and nothing else here knows."""

import functools
import importlib

import numpy as np

INSTALL = "pip install 'cir_jax[bench]' torch==2.13.0"


def library(name: str):
    """`torch`, `transformers` or `torchvision`, imported.

    Raises:
      ImportError: it is not installed, or does not fit the others.
    """
    try:
        _torchvision()
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"bench compares with PyTorch, and {name} cannot be imported ({error}); {INSTALL}"
        ) from None


@functools.cache
def _torchvision():
    """What keeps torchvision importable; without it `transformers` breaks too.

    Its published wheel asks for two operators that the CPU build of torch lacks; there they are declared, and nothing
    calls them.
    """
    import torch

    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
        return library


def tensor(x: np.ndarray):
    """An array for PyTorch: pictures have their channels first, masks stay, ids are long."""
    torch = library("torch")
    if x.ndim == 4:
        return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    return torch.from_numpy(x) if x.dtype == bool else torch.from_numpy(x).long()
