"""The parts that all transformers here are made of.

Compute types follow one rule: with `dtype="bfloat16"` every product, those of gradients too, takes bfloat16 operands
and returns float32; biases, norms, softmax and activations stay in float32. With `dtype="float32"` products run in the type of the
parameters, so that the same code gives float64 under JAX's x64 mode.
"""

import functools
import re
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from cir_jax.large_batches import gathered, remembered

Activation = Literal["quick_gelu", "gelu", "relu"]
Dtype = Literal["float32", "bfloat16"]
Initial = float | Callable[[jax.Array, tuple[int, ...]], jax.Array]

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
}


def product(expression: str, x: jax.Array, y: jax.Array, dtype: Dtype) -> jax.Array:
    """`einsum` of two arrays by the rule of this module; the result is at least float32."""
    wide = jnp.promote_types(jnp.promote_types(x.dtype, y.dtype), jnp.float32)
    if dtype == "bfloat16":
        return _narrow(expression, x.astype(wide), y.astype(wide))
    return jnp.einsum(expression, x, y, preferred_element_type=wide)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _narrow(expression, x, y):
    """`product` in bfloat16; JAX's own gradients would multiply float32 by bfloat16, slower than float32 alone."""
    return _narrow_forward(expression, x, y)[0]


def _narrow_forward(expression, x, y):
    narrow = x.astype(jnp.bfloat16)
    made = jnp.einsum(expression, narrow, y.astype(jnp.bfloat16), preferred_element_type=x.dtype)
    # `y` may be parameters, whose copies a loop over layers would have to keep.
    return made, (narrow, y)


def _narrow_backward(expression, saved, slope):
    """Each gradient is the same kind of product, of the slope and the other operand."""
    (left, right, result), (x, y) = re.split(",|->", expression), saved
    y, narrow = y.astype(jnp.bfloat16), slope.astype(jnp.bfloat16)

    def gradient(wanted, *operands):
        # The operand with the last axis goes last: XLA may turn a transposed product into one that no CPU code exists for.
        (a, x), (b, y) = sorted(operands, key=lambda each: wanted[-1] in each[0])
        return jnp.einsum(f"{a},{b}->{wanted}", x, y, preferred_element_type=slope.dtype)

    outer = result, narrow
    return gradient(left, outer, (right, y)), gradient(right, (left, x), outer)


_narrow.defvjp(_narrow_forward, _narrow_backward)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: Initial) -> nnx.Param:
    """Normal with a standard deviation, or what a function `(key, shape)` such as `truncated` draws."""
    key = rngs.params()
    return nnx.Param(std(key, shape) if callable(std) else std * jax.random.normal(key, shape))


def truncated(std: float) -> Initial:
    """A normal distribution cut at one standard deviation, in place of a `std`."""
    return lambda key, shape: std * jax.random.truncated_normal(key, -1.0, 1.0, shape)


def uniform(limit: float) -> Initial:
    """Uniform from -limit to limit, in place of a `std`."""
    return lambda key, shape: jax.random.uniform(key, shape, minval=-limit, maxval=limit)


def base_std(width: int) -> float:
    """The initial standard deviation 0.02 of BERT's and ViT's base models, for layers of another width."""
    return 0.02 * (768 / width) ** 0.5


def layer_norm(width: int, rngs: nnx.Rngs, epsilon: float = 1e-5) -> nnx.LayerNorm:
    """Flax's defaults for epsilon and variance differ from PyTorch's; both are set here, once."""
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, rngs=rngs)


class Linear(nnx.Module):
    """`x @ kernel + bias` for x `[..., inputs]`; the kernel is `[inputs, outputs]`."""

    def __init__(self, inputs, outputs, *, std=None, bias=True, dtype: Dtype = "float32", rngs):
        self.kernel = normal(rngs, (inputs, outputs), inputs**-0.5 if std is None else std)
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        y = product("...i,io->...o", x, self.kernel[...], self.dtype)
        return y if self.bias is None else y + self.bias[...]


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero a share `rate` of the entries and scale up the rest; without a key nothing happens."""
    if key is None or not rate:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def drop_path(x: jax.Array, rate: float | jax.Array, key: jax.Array | None) -> jax.Array:
    """Drop a residual branch `[B, …]` of whole rows with probability `rate`; without a key nothing happens."""
    if key is None:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, (len(x),) + (1,) * (x.ndim - 1))
    return jnp.where(kept, x / (1 - rate), 0)


class Attention(nnx.Module):
    """Multi-head attention, self or cross; kernels stay two-dimensional so that conversion is a transpose.

    `norm` is the epsilon of a LayerNorm between the heads and `out` (sub-LayerNorm); None leaves it out. `out_width`
    is the width of the result, None for `width`.
    """

    def __init__(
        self,
        width,
        heads,
        *,
        kv_width=None,
        out_width=None,
        std=None,
        out_std=None,
        dropout=0.0,
        norm=None,
        dtype="float32",
        rngs,
    ):
        if width % heads:
            raise ValueError(f"width {width} does not divide into {heads} heads")
        self.heads, self.dropout, self.dtype = heads, dropout, dtype
        wide = kv_width or width
        self.query = Linear(width, width, std=std, dtype=dtype, rngs=rngs)
        self.key = Linear(wide, width, std=std, dtype=dtype, rngs=rngs)
        self.value = Linear(wide, width, std=std, dtype=dtype, rngs=rngs)
        self.ln = None if norm is None else layer_norm(width, rngs, norm)
        self.out = Linear(width, out_width or width, std=out_std, dtype=dtype, rngs=rngs)

    def project(self, x, kv):
        """Queries `[B, N, H, D / H]` of x, keys and values `[B, M, H, D / H]` of kv."""
        split = lambda y: y.reshape(*y.shape[:-1], self.heads, -1)
        return split(self.query(x)), split(self.key(kv)), split(self.value(kv))

    def mix(self, q, k, v, mask=None, key=None):
        """Values mixed by the attention weights, heads side by side: `[B, N, D]`."""
        logits = product("bnhd,bmhd->bhnm", q * q.shape[-1] ** -0.5, k, self.dtype)
        if mask is not None:
            logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
        weights = dropout(jax.nn.softmax(logits, axis=-1), self.dropout, key)
        return product("bhnm,bmhd->bnhd", weights, v, self.dtype).reshape(*q.shape[:2], -1)

    def finish(self, mixed):
        """The output layer, behind the inner norm if there is one."""
        return self.out(mixed if self.ln is None else self.ln(mixed))

    def __call__(self, x, kv=None, mask=None, key=None):
        """x `[B, N, D]`, kv `[B, M, D']` or None for x itself; mask (True = visible) broadcasts to `[B, H, N, M]`.

        With a `key` the attention weights go through dropout.
        """
        kv = x if kv is None else kv
        return self.finish(self.mix(*self.project(x, kv), mask, key))


class Mlp(nnx.Module):
    """Two linear layers with an activation between them, and with `norm` (an epsilon) a LayerNorm behind that."""

    def __init__(
        self, width, hidden, *, activation, std=None, out_std=None, norm=None, dtype="float32", rngs
    ):
        self.up = Linear(width, hidden, std=std, dtype=dtype, rngs=rngs)
        self.ln = None if norm is None else layer_norm(hidden, rngs, norm)
        self.down = Linear(hidden, width, std=out_std, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        y = ACTIVATIONS[self.activation](self.up(x))
        return self.down(y if self.ln is None else self.ln(y))


def stack(make_block, layers: int, rngs: nnx.Rngs):
    """`layers` blocks as one module whose parameters carry a leading layer axis."""
    return nnx.vmap(make_block)(rngs.split(layers))


def run(blocks, x, *args, each: tuple = (), remat: bool = True):
    """Apply stacked blocks in order: one compiled body; with `remat` activations are recomputed going back.

    Args:
      blocks: what `stack` made.
      x: an array, or a tree of arrays, that every block maps to its like.
      args: passed to every block.
      each: trees with a leading layer axis; block i gets their slices i behind `args` (None stays None).
    """
    step = lambda x, layer: (gathered(layer[0])(x, *args, *layer[1]), None)
    return jax.lax.scan(remembered(step, remat), x, (blocks, each))[0]


def run_to_first(blocks, x, *args, each: tuple = (), remat: bool = True):
    """Like `run`, for readers of position 0 only: the last block, called with `first=True`, computes just that.

    The last turn of the loop branches: to cut the last block off the stack would copy all others for every batch.
    """
    layers = len(jax.tree.leaves(blocks)[0])

    def step(x, layer):
        block, (*rest, is_last) = gathered(layer[0]), layer[1]
        whole = lambda: block(x, *args, *rest)
        put = lambda x, first: x.at[:, :1].set(first)
        first = lambda: jax.tree.map(put, x, block(x, *args, *rest, first=True))
        return jax.lax.cond(is_last, first, whole), None

    last = jnp.arange(layers) == layers - 1
    x, _ = jax.lax.scan(remembered(step, remat), x, (blocks, (*each, last)))
    return jax.tree.map(lambda x: x[:, :1], x)


def layer_keys(key: jax.Array | None, layers: int) -> jax.Array | None:
    """A key for each of `layers` blocks, for `run(…, each=)`; None without a key."""
    return None if key is None else jax.random.split(key, layers)


def subkey(key: jax.Array | None, number: int) -> jax.Array | None:
    """One of the independent keys that a key stands for; None without a key."""
    return None if key is None else jax.random.fold_in(key, number)


def patches(images: jax.Array, size: int) -> jax.Array:
    """`[B, H, W, C]` cut into squares, row by row: `[B, N, size * size * C]` in the order row, column, channel."""
    b, h, w, c = images.shape
    squares = images.reshape(b, h // size, size, w // size, size, c).transpose(0, 1, 3, 2, 4, 5)
    return squares.reshape(b, -1, size * size * c)


def unit(x: jax.Array) -> jax.Array:
    """Rows of length one, float32 or wider. A zero row stays zero instead of becoming NaN."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def at_most(x: jax.Array, limit: float) -> jax.Array:
    """The smaller of both. From the limit on only slopes that lead back below it pass: x may leave it again."""
    return jnp.minimum(x, limit)


at_most.defvjp(
    lambda x, limit: (jnp.minimum(x, limit), x),
    lambda limit, x, slope: (jnp.where((x >= limit) & (slope < 0), 0, slope),),
)
