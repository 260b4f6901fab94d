"""The libraries that parity tests compare with, made fit to import."""

import functools
import importlib.util

import pytest


@functools.cache
def library(name: str):
    """`torch`, `transformers` or another by its name; a test without it is skipped, which `.ci/run` counts as a failure.

    The published wheel of torchvision is built for GPUs and asks for operators that the CPU build of torch lacks; where
    it is broken, `transformers` and `open_clip` break too. Two of them are declared, and nothing here calls them.
    """
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed; .ci/run shows what parity tests need")
    _declared()
    return importlib.import_module(name)


def photo() -> str:
    """The file of a real photograph, Grace Hopper's, which comes with matplotlib."""
    from matplotlib import cbook

    return str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))


@functools.cache
def _declared():
    import torch

    declared = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        declared.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return declared
