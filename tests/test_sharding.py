"""The mesh, the rule table, and that the number of devices does not change a training run."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from cir_jax import sharding
from cir_jax.train import training_batches
from cir_jax.training import optim
from cir_jax.training.checks import check_batch
from cir_jax.training.step import make_init, program


def losses(config, mesh, steps=4):
    """The first losses of a run on a mesh, without files."""
    _, init, step, _ = program(config, mesh)
    state = init(jax.random.key(config.train.seed))
    batches, values = training_batches(config, 0), []
    for number in range(steps):
        state, metrics = step(state, sharding.put_batch(next(batches), mesh), np.int32(number))
        values.append(float(metrics["loss"]))
    return values, state


@pytest.mark.slow
def test_four_devices_give_the_losses_of_one(tiny_experiment):
    """With the data of a run; `test_large_batches.py` has other meshes, and all methods."""
    one, _ = losses(tiny_experiment, sharding.make_mesh(devices=jax.devices()[:1]))
    four, state = losses(tiny_experiment, sharding.make_mesh(2, 2))
    np.testing.assert_allclose(four, one, rtol=2e-5)
    assert len(set(one)) == len(one)
    kernel = state["params"]["image"]["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.num_devices == 4
    assert not kernel.sharding.is_fully_replicated


def test_moments_are_placed_like_their_parameters(tiny_experiment):
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    tx = optim.optimizer(tiny_experiment.optim, 10)
    abstract = jax.eval_shape(make_init(tiny_experiment, tx), jax.random.key(0))
    places = jax.tree_util.tree_leaves_with_path(sharding.shardings(abstract, mesh))
    found = {
        sharding.path_name(path): place.spec
        for path, place in places
        if sharding.path_name(path).endswith("image/blocks/mlp/up/kernel")
    }
    assert len(found) == 3  # the parameter and two moments
    assert set(found.values()) == {P(None, "fsdp", "tensor")}


def test_an_axis_that_does_not_divide_is_dropped():
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    assert sharding.spec("text/embedding", (7, 6), mesh) == P(None, "fsdp")
    assert sharding.spec("x/query/kernel", (8, 8), mesh) == P("fsdp", "tensor")
    assert sharding.spec("x/ln1/scale", (8,), mesh) == P(None)


def test_impossible_mesh_and_batch_are_refused(tiny_experiment):
    with pytest.raises(ValueError, match="fsdp=3 x tensor=1 does not divide the 4 devices"):
        sharding.make_mesh(fsdp=3)
    odd = dataclasses.replace(
        tiny_experiment, train=dataclasses.replace(tiny_experiment.train, batch_size=10)
    )
    with pytest.raises(
        ValueError, match=r"batch_size 10 does not divide by 4 devices.*use 8 or 12"
    ):
        check_batch(odd, sharding.make_mesh())
