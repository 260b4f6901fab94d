"""The first state of a run, and the pure step from one state to the next."""

from collections.abc import Callable

import jax
import optax
from flax import nnx

from cir_jax import methods
from cir_jax.config import Experiment
from cir_jax.training import optim


def make_step(graph, tx, seed: int) -> Callable:
    """The pure training step `(state, batch, number) -> (state, metrics)`."""

    def step(state, batch, number):
        key = jax.random.fold_in(jax.random.key(seed), number)

        def loss(params):
            return nnx.merge(graph, optim.join(params, state["frozen"])).loss(batch, key)

        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state["params"])
        updates, opt = tx.update(grads, state["opt"], state["params"])
        metrics |= {"loss": value, "grad_norm": optax.tree.norm(grads)}
        return {
            **state,
            "params": optax.apply_updates(state["params"], updates),
            "opt": opt,
        }, metrics

    return step


def make_init(config: Experiment, tx) -> Callable:
    """`key -> state`: random parameters, split into trained and frozen, and the optimizer's state."""

    def init(key):
        params = nnx.to_pure_dict(nnx.state(methods.build(config.method, nnx.Rngs(key))))
        trained, frozen = optim.split_frozen(params, config.optim.frozen)
        return {"params": trained, "frozen": frozen, "opt": tx.init(trained)}

    return init
