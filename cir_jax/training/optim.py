"""From the `Optim` of an experiment to one optax transformation, and parameters that do not train."""

import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from cir_jax.config import Optim
from cir_jax.sharding import stacked

# What the first block of a transformer reads.
INPUTS = r"(.*/)?(embedding|positions|types|class_token|mask_token|patch_kernel|patch_bias|embeddings/.*|ln_pre/.*)"
# Statistics of a batch norm: no parameters, though they are kept among them.
STATISTICS = r".*/norm/(mean|variance)"


def schedule(optim: Optim, steps: int) -> optax.Schedule:
    """The learning rate of each step, from 0 to `steps` - 1."""
    lr, low, warmup = optim.lr, optim.min_lr, optim.warmup
    period = optim.period or max(1, steps - warmup)
    after = {
        "constant": lambda step: jnp.asarray(lr, float),
        "linear": lambda step: low + (lr - low) * (1 - step / period),
        "cosine": lambda step: low + (lr - low) * (0.5 * (1 + jnp.cos(jnp.pi * step / period))),
    }[optim.schedule]
    before = {
        "zero": optax.linear_schedule(0.0, lr, warmup),
        "peak": optax.linear_schedule(lr / max(1, warmup), lr, warmup - 1),
        "both": optax.linear_schedule(0.0, lr, warmup - 1),
    }[optim.warmup_includes]
    whole = optax.join_schedules([before, after], [warmup]) if warmup else after
    factor = optax.piecewise_constant_schedule(1.0, dict.fromkeys(optim.drops, optim.drop_factor))

    def rate(step):
        first = step // optim.hold * optim.hold
        return whole(first) * factor(first)

    return rate


def decays(params, optim: Optim):
    """True for what weight decay shrinks: matrices (or everything) except for `undecayed`."""
    flat = traverse_util.flatten_dict(params, sep="/")
    spared = matching(optim.undecayed, flat, "undecayed")
    spared |= {name for name in flat if re.fullmatch(STATISTICS, name)}
    least = 2 if optim.decay == "matrices" else 0
    flags = {name: x.ndim - stacked(name) >= least for name, x in flat.items()}
    return _tree({name: flag and name not in spared for name, flag in flags.items()})


def layer_scales(params, decay: float):
    """The factor of each parameter's learning rate; for stacked blocks `[L, 1, …]`, one for each of them.

    Layers are counted from the head down, as BEiT-3 does (`microsoft/unilm`, `beit3/optim_factory.py`): `decay` to the
    power of 0 for what follows the blocks, of 1 for the last block, of L for the first, of L + 1 for its inputs.

    Raises:
      ValueError: parameters of a convolutional network, or inputs of no blocks.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    depths = {name.partition("blocks/")[0]: len(x) for name, x in flat.items() if stacked(name)}

    def scale(name, x):
        if re.search(r"(^|/)(stem\d?|stage\d)/", name):
            raise ValueError(
                f"optim.layer_decay is {decay}, but {name} is of no transformer; set it to 1"
            )
        if stacked(name):
            return decay ** np.arange(len(x), 0, -1).reshape(-1, *[1] * (x.ndim - 1))
        return decay ** (1 + _blocks_behind(name, depths)) if re.fullmatch(INPUTS, name) else 1.0

    return _tree({name: scale(name, x) for name, x in flat.items()})


def _blocks_behind(name: str, depths: Mapping[str, int]) -> int:
    """How many blocks the nearest stack has, by folders of the path."""
    parts = name.split("/")
    for end in range(len(parts) - 1, -1, -1):
        tower = "".join(f"{part}/" for part in parts[:end])
        if found := [depth for start, depth in depths.items() if start.startswith(tower)]:
            return max(found)
    raise ValueError(f"optim.layer_decay: no blocks are trained behind {name}; set it to 1")


def optimizer(optim: Optim, steps: int) -> optax.GradientTransformation:
    """AdamW as `Optim` describes it."""
    clip = optim.clip_norm
    adamw = optax.adamw(
        schedule(optim, steps),
        b1=optim.betas[0],
        b2=optim.betas[1],
        eps=optim.epsilon,
        weight_decay=optim.weight_decay,
        mask=lambda params: decays(params, optim),
    )
    chain = [optax.identity() if clip is None else optax.clip_by_global_norm(clip), adamw]
    if optim.layer_decay != 1:
        chain.append(scaled_by_layer(optim.layer_decay))
    return optax.chain(*chain)


def scaled_by_layer(decay: float) -> optax.GradientTransformation:
    """Multiplies updates, weight decay included, by `layer_scales`."""
    scale = lambda updates, scales: updates * jnp.asarray(scales, updates.dtype)
    return optax.stateless(
        lambda updates, _: jax.tree.map(scale, updates, layer_scales(updates, decay))
    )


def matching(patterns: Sequence[str], names: Sequence[str], field: str) -> set[str]:
    """The names that one of the patterns matches whole; ValueError for a pattern that is malformed or matches none."""
    found = set()
    for pattern in patterns:
        try:
            matched = {name for name in names if re.fullmatch(pattern, name)}
        except re.error as error:
            raise ValueError(f"optim.{field} pattern {pattern!r} is malformed: {error}") from None
        if not matched:
            raise ValueError(
                f"optim.{field} pattern {pattern!r} matches none of the parameters {sorted(names)}"
            )
        found |= matched
    return found


def split_frozen(params, patterns: tuple[str, ...]):
    """(trained, frozen) parts of a parameter tree; a parameter is frozen if a pattern matches its whole path."""
    flat = traverse_util.flatten_dict(params, sep="/")
    held = matching(patterns, flat, "frozen")
    if len(held) == len(flat):
        raise ValueError(
            f"optim.frozen {list(patterns)} holds every parameter; nothing would train"
        )
    part = lambda frozen: _tree({name: x for name, x in flat.items() if (name in held) == frozen})
    return part(False), part(True)


def join(trained, frozen):
    """The whole tree again, from the two parts of `split_frozen`."""
    flatten = traverse_util.flatten_dict
    return traverse_util.unflatten_dict({**flatten(trained), **flatten(frozen)})


def _tree(flat: Mapping):
    """Nested dictionaries of what paths name."""
    return traverse_util.unflatten_dict(flat, sep="/")
