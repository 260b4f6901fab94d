"""ResNeXt (Xie et al. 2017, arXiv 1611.05431) as torchvision builds it, and with other numbers its ResNets.

The stride of a stage sits on the grouped 3x3 convolution of its first block. Batch norm is frozen, as it is wherever a
backbone is given and not trained.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from cir_jax.encoders.layers import Dtype, run, stack
from cir_jax.encoders.resnet import EXPANSION, Convolution

STAGES = ("stage1", "stage2", "stage3", "stage4")


@dataclass(frozen=True)
class ResnextConfig:
    """Size of the network; the defaults are ResNeXt-101 32x8d.

    Attributes:
      layers: blocks of each stage.
      width: channels of the stem; stage n gives 4 * width * 2 ** n of them, n from 0.
      groups: of the 3x3 convolutions; 1 for a plain ResNet.
      group_width: channels of a group in the first stage, doubled in each further one.
    """

    layers: tuple[int, int, int, int] = (3, 4, 23, 3)
    width: int = 64
    groups: int = 32
    group_width: int = 8

    @property
    def features(self) -> int:
        """Channels of the result."""
        return EXPANSION * self.width * 2 ** (len(STAGES) - 1)


RESNEXT_101 = ResnextConfig()
RESNEXT_50 = ResnextConfig(layers=(3, 4, 6, 3), group_width=4)
RESNET_101 = ResnextConfig(groups=1, group_width=64)


class Bottleneck(nnx.Module):
    """Three convolutions beside a shortcut, which in the `first` block of a stage is one too."""

    def __init__(self, inputs, inner, outputs, *, groups, stride=1, first=False, **options):
        self.conv1 = Convolution(inputs, inner, 1, **options)
        self.conv2 = Convolution(inner, inner, 3, stride=stride, groups=groups, **options)
        self.conv3 = Convolution(inner, outputs, 1, **options)
        self.shortcut = Convolution(inputs, outputs, 1, stride=stride, **options) if first else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.nn.relu(self.conv2(jax.nn.relu(self.conv1(x))))
        return jax.nn.relu(self.conv3(y) + (x if self.shortcut is None else self.shortcut(x)))


class Stage(nnx.Module):
    """A first block that changes the shape, and the equal ones behind it as one stack (None without)."""

    def __init__(self, inputs, inner, outputs, layers, *, stride, groups, dtype: Dtype, rngs):
        options = {"groups": groups, "dtype": dtype}
        self.first = Bottleneck(
            inputs, inner, outputs, stride=stride, first=True, rngs=rngs, **options
        )
        make = lambda rngs: Bottleneck(outputs, inner, outputs, rngs=rngs, **options)
        self.blocks = stack(make, layers - 1, rngs) if layers > 1 else None

    def __call__(self, x: jax.Array, remat: bool) -> jax.Array:
        x = self.first(x)
        return x if self.blocks is None else run(self.blocks, x, remat=remat)


class Resnext(nnx.Module):
    """Pictures `[B, H, W, 3]` of any size, already normalised -> `[B, features]`, the mean over all places."""

    def __init__(self, config: ResnextConfig, *, dtype: Dtype, remat: bool, rngs):
        if min(config.layers) < 1:
            raise ValueError(f"layers {config.layers}; every stage needs at least one block")
        options = {"dtype": dtype, "rngs": rngs}
        self.config, self.remat = config, remat
        self.stem = Convolution(3, config.width, 7, stride=2, **options)
        inputs = config.width
        for n, (name, layers) in enumerate(zip(STAGES, config.layers)):
            inner = config.groups * config.group_width * 2**n
            outputs = EXPANSION * config.width * 2**n
            shape = {"stride": min(n + 1, 2), "groups": config.groups}
            setattr(self, name, Stage(inputs, inner, outputs, layers, **shape, **options))
            inputs = outputs

    def __call__(self, images: jax.Array) -> jax.Array:
        x = most(jax.nn.relu(self.stem(images)))
        for name in STAGES:
            x = getattr(self, name)(x, self.remat)
        return x.mean(axis=(1, 2))


def most(x: jax.Array) -> jax.Array:
    """The largest of every 3x3 places, in steps of two: `[B, H, W, C]` -> `[B, ceil(H / 2), ceil(W / 2), C]`."""
    edges = ((0, 0), (1, 1), (1, 1), (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), edges)
