"""The first state of a run, and the pure step from one state to the next."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from cir_jax import checkpoint, large_batches, methods, sharding
from cir_jax.config import Experiment
from cir_jax.training import optim


def make_step(graph, tx, seed: int, gradients: Callable | None = None) -> Callable:
    """The pure training step `(state, batch, number) -> (state, metrics)`; `gradients` are of `make_gradients`."""
    gradients = gradients or make_gradients(graph)

    def step(state, batch, number):
        key = jax.random.fold_in(jax.random.key(seed), number)
        (value, metrics), grads = gradients(state["params"], state["frozen"], batch, key)
        updates, opt = tx.update(grads, state["opt"], state["params"])
        metrics |= {"loss": value, "grad_norm": optax.tree.norm(grads)}
        return {
            **state,
            "params": optax.apply_updates(state["params"], updates),
            "opt": opt,
        }, metrics

    return step


def make_gradients(
    graph,
    accumulate: int = 1,
    chunks: int = 1,
    ring: bool = False,
    mesh: jax.sharding.Mesh | None = None,
) -> Callable:
    """`(params, frozen, batch, key) -> ((loss, metrics), gradients of params)`.

    With `accumulate` they are the means over that many micro-batches, computed one after the other, each with negatives of
    its own only: less memory, and another loss than that of the whole batch. `chunks` and `ring` change no loss
    (`cir_jax.large_batches`).
    """

    def loss(params, frozen, batch, key):
        with large_batches.computed(chunks, ring, mesh):
            params = large_batches.gathered(optim.join(params, frozen))
            return nnx.merge(graph, params).loss(batch, key)

    slopes = jax.value_and_grad(loss, has_aux=True)
    if accumulate == 1:
        return slopes

    def accumulated(params, frozen, batch, key):
        parts = large_batches.cut(batch, accumulate, mesh)
        keys = jax.random.split(key, accumulate)
        one = lambda part: slopes(params, frozen, *part)
        shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], (parts, keys)))
        total, _ = jax.lax.scan(
            lambda total, part: (jax.tree.map(jnp.add, total, one(part)), None),
            jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
            (parts, keys),
        )
        return jax.tree.map(lambda x: x / accumulate, total)

    return accumulated


class Program(NamedTuple):
    """What a training run computes on a mesh; nothing of it is compiled before its first use.

    Attributes:
      graph: of the method's module.
      init: `key -> state`, random parameters in their places.
      step: `(state, batch, number) -> (state, metrics)`; the state given is used up.
      state: shapes and places of the state.
    """

    graph: Any
    init: Callable
    step: Callable
    state: Any


def program(config: Experiment, mesh: jax.sharding.Mesh) -> Program:
    """The training of an experiment on a mesh."""
    graph, _ = checkpoint.abstract_params(config.method)
    tx = optim.optimizer(config.optim, config.train.steps)
    init = make_init(config, tx)
    abstract = jax.eval_shape(init, jax.random.key(config.train.seed))
    places = sharding.shardings(abstract, mesh)
    train = config.train
    gradients = make_gradients(graph, train.accumulate, train.chunks, train.ring, mesh)
    step = jax.jit(
        make_step(graph, tx, train.seed, gradients),
        donate_argnums=0,
        out_shardings=(places, sharding.replicated(mesh)),
    )
    init = jax.jit(init, out_shardings=places)
    return Program(graph, init, step, sharding.placed(abstract, places))


def make_init(config: Experiment, tx) -> Callable:
    """`key -> state`: random parameters, split into trained and frozen, and the optimizer's state."""

    def init(key):
        params = nnx.to_pure_dict(nnx.state(methods.build(config.method, nnx.Rngs(key))))
        trained, frozen = optim.split_frozen(params, config.optim.frozen)
        return {"params": trained, "frozen": frozen, "opt": tx.init(trained)}

    return init
