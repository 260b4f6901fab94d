"""The libraries that parity tests compare with, made fit to import."""

import functools
import importlib.util

import pytest


@functools.cache
def library(name: str):
    """`torch`, `transformers`, `open_clip`, `ir_measures` or `eccv_caption`; a test without it is skipped, which `.ci/run` counts as a failure.

    The published wheel of torchvision is built for GPUs and asks for operators that the CPU build of torch lacks; where
    it is broken, `transformers` and `open_clip` break too. Two of them are declared, and nothing here calls them.
    """
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed; pip install '.[parity]' torch==2.13.0")
    _declared()
    return importlib.import_module(name)


@functools.cache
def _declared():
    import torch

    declared = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        declared.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return declared
