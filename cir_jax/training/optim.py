"""From the `Optim` of an experiment to one optax transformation, and parameters that do not train."""

import re

import optax
from flax import traverse_util

from cir_jax.config import Optim


def schedule(optim: Optim, steps: int) -> optax.Schedule:
    """Linear warm-up to `lr`, then constant or half a cosine down to zero at the last step."""
    if optim.schedule == "constant":
        after = optax.constant_schedule(optim.lr)
    else:
        after = optax.cosine_decay_schedule(optim.lr, max(1, steps - optim.warmup))
    if not optim.warmup:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(0.0, optim.lr, optim.warmup), after], [optim.warmup]
    )


def decays(params):
    """True for matrices; vectors (biases, norms, class tokens) and scalars are not decayed."""
    flat = traverse_util.flatten_dict(params, sep="/")
    stacked = lambda name: "/blocks/" in name or name.startswith("blocks/")
    flags = {name: x.ndim - stacked(name) >= 2 for name, x in flat.items()}
    return traverse_util.unflatten_dict(flags, sep="/")


def optimizer(optim: Optim, steps: int) -> optax.GradientTransformation:
    """AdamW with clipped gradients and decay on matrices only."""
    return optax.chain(
        optax.clip_by_global_norm(optim.clip_norm),
        optax.adamw(
            schedule(optim, steps),
            b1=optim.betas[0],
            b2=optim.betas[1],
            weight_decay=optim.weight_decay,
            mask=decays,
        ),
    )


def split_frozen(params, patterns: tuple[str, ...]):
    """(trained, frozen) parts of a parameter tree; a parameter is frozen if a pattern matches its whole path."""
    flat = traverse_util.flatten_dict(params, sep="/")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"optim.frozen pattern {pattern!r} is malformed: {error}") from None
    held = {name for name in flat if any(re.fullmatch(pattern, name) for pattern in patterns)}
    unused = [p for p in patterns if not any(re.fullmatch(p, name) for name in flat)]
    if unused:
        raise ValueError(
            f"optim.frozen pattern {unused[0]!r} matches none of the parameters {sorted(flat)}"
        )
    if len(held) == len(flat):
        raise ValueError(
            f"optim.frozen {list(patterns)} holds every parameter; nothing would train"
        )
    part = lambda frozen: {name: x for name, x in flat.items() if (name in held) == frozen}
    unflatten = lambda flat: traverse_util.unflatten_dict(flat, sep="/")
    return unflatten(part(False)), unflatten(part(True))


def join(trained, frozen):
    """The whole tree again, from the two parts of `split_frozen`."""
    flatten = traverse_util.flatten_dict
    return traverse_util.unflatten_dict({**flatten(trained), **flatten(frozen)})
