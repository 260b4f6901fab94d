"""Weights and inputs by formula, as the specification of the golden values defines them (fti4cir.md 4.1)."""

import numpy as np


class Tensors(dict):
    """Tensors as a converter reads them from a file."""

    def shape(self, name):
        return self[name].shape

    def dtype(self, name):
        return self[name].dtype


def sine(shape, a, b):
    return np.sin(a * np.arange(np.prod(shape)) + b).reshape(shape)


def filled(shapes) -> Tensors:
    """A state dict, float64, whose numbers depend on the place of each key."""
    made = Tensors()
    for place, (key, shape) in enumerate(shapes.items()):
        made[key] = 0.1 * sine(shape, 0.13, 0.7 * place)
        if "norm" in key and key.endswith("weight"):
            made[key] += 1
    return made


def linear_shapes(name, inputs, outputs, bias=True):
    shapes = {f"{name}.weight": (outputs, inputs)}
    return shapes | {f"{name}.bias": (outputs,)} if bias else shapes


def phi_shapes(name, inputs, hidden, outputs):
    """`Phi` of FTI4CIR, SEARLE and LinCIR, in the order of its state dict."""
    sizes = {"0": (inputs, hidden), "3": (hidden, hidden), "6": (hidden, outputs)}
    shapes = {}
    for layer, size in sizes.items():
        shapes |= linear_shapes(f"{name}layers.{layer}", *size)
    return shapes


def norm_shapes(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def fti4cir_shapes(width, embed, count, layers, hidden):
    """`IMG2TEXT` of FTI4CIR, in the order of its state dict."""
    shapes = {"templates": (1, count, width)}
    for name in ("phi_s.", "phi_a."):
        shapes |= phi_shapes(name, embed, hidden, embed)
    shapes |= linear_shapes("local_atte_fc.0", width, embed)
    for layer in range(layers):
        name = f"transformer.layers.{layer}"
        shapes |= norm_shapes(f"{name}.norm1", width)
        shapes |= linear_shapes(f"{name}.attn.to_queries", width, width, bias=False)
        shapes |= linear_shapes(f"{name}.attn.to_keys_values", width, 2 * width, bias=False)
        shapes |= linear_shapes(f"{name}.attn.project", width, width)
        shapes |= norm_shapes(f"{name}.norm2", width)
        shapes |= linear_shapes(f"{name}.mlp.fc1", width, 2 * width)
        shapes |= linear_shapes(f"{name}.mlp.fc2", 2 * width, width)
    return shapes
