"""CLIP's modified ResNet (Radford et al. 2021; openai/CLIP `clip/model.py`): the picture towers of the RN50 family.

Three convolutions as a stem, average pooling wherever a plain ResNet strides, and one attention step in place of the
final mean. Batch norm is frozen: it applies the stored mean and variance, in training too, where only its scale and
bias learn; so a row never depends on its batch.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from cir_jax.encoders.layers import Attention, Dtype, normal, product, run, stack

EPSILON = 1e-5
EXPANSION = 4


@dataclass(frozen=True)
class ResnetConfig:
    """Size of the modified ResNet; the defaults are RN50's.

    `size` in pixels, a multiple of 32; `width` channels of the stem, 32 times that enter the attention pool; `layers`
    blocks of the four stages; `heads` of the attention pool.
    """

    size: int = 224
    width: int = 64
    layers: tuple[int, int, int, int] = (3, 4, 6, 3)
    heads: int = 32


class FrozenNorm(nnx.Module):
    """Batch norm with fixed statistics over the last axis."""

    def __init__(self, width: int, *, scale: float = 1.0):
        self.scale = nnx.Param(jnp.full(width, scale, float))
        self.bias = nnx.Param(jnp.zeros(width))
        self.mean, self.variance = nnx.Param(jnp.zeros(width)), nnx.Param(jnp.ones(width))

    def __call__(self, x):
        mean, variance = jax.lax.stop_gradient((self.mean[...], self.variance[...]))
        return (x - mean) * (jax.lax.rsqrt(variance + EPSILON) * self.scale[...]) + self.bias[...]


class Convolution(nnx.Module):
    """A square convolution without bias, with as much padding as keeps the size, and its frozen norm.

    With `groups` a channel sees only those of its own group.
    """

    def __init__(self, inputs, outputs, side, *, stride=1, groups=1, scale=1.0, dtype: Dtype, rngs):
        each = inputs // groups
        self.kernel = normal(rngs, (side, side, each, outputs), (2 / (side**2 * each)) ** 0.5)
        self.norm = FrozenNorm(outputs, scale=scale)
        self.stride, self.groups, self.dtype = stride, groups, dtype

    def __call__(self, x):
        """`[B, H, W, inputs]` -> `[B, H / stride, W / stride, outputs]`, sizes rounded up."""
        return self.norm(convolve(x, self.kernel[...], self.stride, self.groups, self.dtype))


def convolve(x, kernel, stride, groups, dtype: Dtype):
    """A convolution of `[B, H, W, C]` by the rule of `layers`: operands as `dtype` says, result at least float32."""
    wide = jnp.promote_types(jnp.promote_types(x.dtype, kernel.dtype), jnp.float32)
    return _convolve(x.astype(wide), kernel.astype(wide), stride, groups, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolve(x, kernel, stride, groups, dtype):
    """Its gradient of the kernel is made of products: for XLA's own a CPU takes seconds a layer, with groups minutes."""
    edge = len(kernel) // 2
    return _plain(x, kernel, ((edge, edge),) * 2, groups, dtype, window_strides=(stride, stride))


def _plain(x, kernel, padding, groups, dtype, **options):
    wide = x.dtype
    narrow = jnp.bfloat16 if dtype == "bfloat16" else wide
    return jax.lax.conv_general_dilated(
        x.astype(narrow),
        kernel.astype(narrow),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        preferred_element_type=wide,
        **options,
    )


def _convolve_forward(x, kernel, *options):
    return _convolve(x, kernel, *options), (x, kernel)


def _convolve_backward(stride, groups, dtype, saved, slope):
    x, kernel = saved
    x_slope = _x_slope(kernel, slope, x.shape, stride, groups, dtype)
    return x_slope, _kernel_slope(x, kernel.shape, slope, stride, groups, dtype)


def _x_slope(kernel, slope, shape, stride, groups, dtype):
    """The convolution with the mirrored kernel, whose inputs and outputs change places, of slopes `stride` apart."""
    side, edge = len(kernel), len(kernel) // 2
    mirrored = kernel[::-1, ::-1].reshape(side, side, kernel.shape[2], groups, -1)
    turned = mirrored.transpose(0, 1, 4, 3, 2).reshape(side, side, -1, shape[-1])
    behind = (n + edge - stride * (m - 1) - 1 for n, m in zip(shape[1:3], slope.shape[1:3]))
    padding = [(side - 1 - edge, rest) for rest in behind]
    apart = {"window_strides": (1, 1), "lhs_dilation": (stride, stride)}
    return _plain(slope, turned, padding, groups, dtype, **apart)


def _kernel_slope(x, shape, slope, stride, groups, dtype):
    """For each place of the kernel, what it saw times what came of it."""
    side, edge = shape[0], shape[0] // 2
    split = lambda y: y.reshape(*y.shape[:3], groups, -1)
    padded = split(jnp.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0))))
    rows, columns = (stride * (n - 1) + 1 for n in slope.shape[1:3])

    def weight(i, j):
        seen = padded[:, i : i + rows : stride, j : j + columns : stride]
        return product("bhwgi,bhwgo->igo", seen, split(slope), dtype)

    places = [weight(i, j) for i in range(side) for j in range(side)]
    return jnp.stack(places).reshape(shape)


_convolve.defvjp(_convolve_forward, _convolve_backward)


def pooled(x: jax.Array, stride: int) -> jax.Array:
    """The mean of each square of `stride` pixels; a rest at the right and lower edge is cut off, as PyTorch does."""
    if stride == 1:
        return x
    b, h, w, c = x.shape
    h, w = h // stride, w // stride
    squares = x[:, : h * stride, : w * stride].reshape(b, h, stride, w, stride, c)
    return squares.mean(axis=(2, 4))


class Bottleneck(nnx.Module):
    """One residual block; `shortcut` where it changes the number of channels, with pooling by `stride`."""

    def __init__(self, inputs, width, *, stride=1, shortcut=False, dtype: Dtype, rngs):
        options = {"dtype": dtype, "rngs": rngs}
        self.conv1 = Convolution(inputs, width, 1, **options)
        self.conv2 = Convolution(width, width, 3, **options)
        # A scale of zero: each block begins as the identity.
        self.conv3 = Convolution(width, EXPANSION * width, 1, scale=0.0, **options)
        self.shortcut = Convolution(inputs, EXPANSION * width, 1, **options) if shortcut else None
        self.stride = stride

    def __call__(self, x):
        y = jax.nn.relu(self.conv2(jax.nn.relu(self.conv1(x))))
        y = self.conv3(pooled(y, self.stride))
        if self.shortcut is not None:
            x = self.shortcut(pooled(x, self.stride))
        return jax.nn.relu(x + y)


class Stage(nnx.Module):
    """A first block that changes the shape, and the equal ones behind it as one stack (None if there are none)."""

    def __init__(self, inputs, width, layers, *, stride, dtype: Dtype, rngs):
        options = {"width": width, "dtype": dtype}
        self.first = Bottleneck(inputs, stride=stride, shortcut=True, rngs=rngs, **options)
        make = lambda rngs: Bottleneck(EXPANSION * width, rngs=rngs, **options)
        self.blocks = stack(make, layers - 1, rngs) if layers > 1 else None

    def __call__(self, x, remat):
        x = self.first(x)
        return x if self.blocks is None else run(self.blocks, x, remat=remat)


class AttentionPool(nnx.Module):
    """The mean of all places asks them all: `[B, H, W, width]` -> `[B, embed]`."""

    def __init__(self, places, width, heads, embed, *, dtype: Dtype, rngs):
        std = width**-0.5
        self.positions = normal(rngs, (places + 1, width), std)
        self.attention = Attention(
            width, heads, std=std, out_std=std, out_width=embed, dtype=dtype, rngs=rngs
        )

    def __call__(self, x):
        x = x.reshape(len(x), -1, x.shape[-1])
        x = jnp.concatenate([x.mean(axis=1, keepdims=True), x], axis=1) + self.positions[...]
        return self.attention(x[:, :1], x)[:, 0]


class ClipResnet(nnx.Module):
    """Pictures `[B, S, S, 3]` -> `[B, embed]`, not normalised."""

    def __init__(self, config: ResnetConfig, embed, *, dtype: Dtype, remat: bool, rngs):
        if config.size % 32 or config.size < 32:
            raise ValueError(f"picture size {config.size} is not a multiple of 32")
        if min(config.layers) < 1:
            raise ValueError(f"layers {config.layers}; every stage needs at least one block")
        width, half, options = config.width, config.width // 2, {"dtype": dtype, "rngs": rngs}
        self.config, self.remat = config, remat
        self.stem1 = Convolution(3, half, 3, stride=2, **options)
        self.stem2 = Convolution(half, half, 3, **options)
        self.stem3 = Convolution(half, width, 3, **options)
        inputs = (width, *(EXPANSION * width * 2**n for n in range(3)))
        stages = [
            Stage(inputs[n], width * 2**n, config.layers[n], stride=min(n + 1, 2), **options)
            for n in range(4)
        ]
        self.stage1, self.stage2, self.stage3, self.stage4 = stages
        places = (config.size // 32) ** 2
        self.pool = AttentionPool(places, 32 * width, config.heads, embed, **options)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for convolution in (self.stem1, self.stem2, self.stem3):
            x = jax.nn.relu(convolution(x))
        x = pooled(x, 2)
        for stage in (self.stage1, self.stage2, self.stage3, self.stage4):
            x = stage(x, self.remat)
        return self.pool(x)
