"""Rates, groups and clipping against the numbers of the originals, as the specifications print them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cir_jax.config import Optim
from cir_jax.sharding import path_name
from cir_jax.training import optim
from cir_jax.training.checks import LEAST, check_numbers


def rates(config: Optim, steps: int, at) -> list[float]:
    rate = optim.schedule(config, steps)
    return [float(rate(np.int32(step))) for step in at]


def test_every_number_of_optim_has_a_least_value():
    values = vars(Optim())
    numbers = {name for name, value in values.items() if type(value) in (int, float)}
    assert numbers == {name.removeprefix("optim.") for name in LEAST if name.startswith("optim.")}


def test_beit3_rates():
    """cfir.md 7.4."""
    config = Optim(lr=2e-4, min_lr=1e-6, warmup=30, warmup_includes="both")
    expected = {0: 0, 1: 6.89655e-6, 15: 1.03448e-4, 28: 1.93103e-4, 29: 2e-4, 30: 2e-4}
    expected |= {31: 1.99993265e-4, 100: 1.68781e-4, 165: 1.005e-4, 299: 1.00673535e-6}
    assert rates(config, 300, expected) == pytest.approx(list(expected.values()), rel=3e-6)
    small = Optim(lr=1e-3, min_lr=1e-6, warmup=4, warmup_includes="both")
    expected = [0, 3.3333e-4, 6.6667e-4, 1e-3, 1e-3, 8.537e-4, 5.005e-4, 1.473e-4]
    assert rates(small, 8, range(8)) == pytest.approx(expected, rel=1e-4)


def test_a_rate_by_epoch_rises_again_behind_its_period():
    """candidate_reranking.md 3, Q6; stage I and stage II of CIRR."""
    config = Optim(lr=2e-5, period=10 * 55, hold=55)
    epochs = {0: 2e-5, 5: 1e-5, 10: 0, 15: 1e-5, 20: 2e-5, 30: 0, 39: 1.951e-5}
    for inside in (0, 54):
        steps = [epoch * 55 + inside for epoch in epochs]
        assert rates(config, 40 * 55, steps) == pytest.approx([*epochs.values()], abs=3e-9)
    second = Optim(lr=2e-5, period=80 * 1764, hold=1764)
    assert rates(second, 100 * 1764, [80 * 1764, 100 * 1764 - 1]) == pytest.approx(
        [0, 2.7e-6], abs=5e-8
    )


def test_what_a_warm_up_includes():
    made = {
        ends: Optim(lr=1.0, warmup=4, warmup_includes=ends) for ends in ("zero", "peak", "both")
    }
    assert rates(made["zero"], 8, range(5)) == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert rates(made["peak"], 8, range(5)) == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert rates(made["both"], 8, range(5)) == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])


def test_drops_and_straight_lines():
    config = Optim(lr=4e-5, schedule="constant", drops=(10, 20))
    assert rates(config, 30, (9, 10, 19, 20)) == pytest.approx([4e-5, 4e-6, 4e-6, 4e-7])
    config = Optim(lr=1.0, schedule="linear", warmup=2, min_lr=0.2)
    assert rates(config, 10, (2, 6, 9)) == pytest.approx([1, 0.6, 0.3])


PARAMS = {
    "image": {
        "patch_kernel": np.ones((2, 2, 3, 4)),
        "expert": {"positions": np.ones((7, 4)), "blocks": {"up": {"kernel": np.ones((12, 4, 8))}}},
    },
    "text": {"embedding": np.ones((9, 4)), "blocks": {"ln": {"scale": np.ones((3, 4))}}},
    "logit_scale": np.ones(()),
}


def test_decay_of_all_of_matrices_and_of_what_is_not_spared():
    named = lambda tree: {path_name(path) for path, flag in jax.tree.leaves_with_path(tree) if flag}
    every = {"image/patch_kernel", "image/expert/positions", "image/expert/blocks/up/kernel"}
    every |= {"text/embedding", "text/blocks/ln/scale", "logit_scale"}
    assert named(optim.decays(PARAMS, Optim(decay="all"))) == every
    assert named(optim.decays(PARAMS, Optim())) == every - {"text/blocks/ln/scale", "logit_scale"}
    spared = optim.decays(PARAMS, Optim(undecayed=(".*/positions", "text/.*")))
    assert named(spared) == {"image/patch_kernel", "image/expert/blocks/up/kernel"}
    with pytest.raises(ValueError, match=r"optim.undecayed pattern 'video/\.\*' matches none"):
        optim.decays(PARAMS, Optim(undecayed=("video/.*",)))


def test_statistics_of_a_batch_norm_never_decay():
    params = {"stem": {"norm": {"mean": np.ones(3), "scale": np.ones(3)}}}
    assert optim.decays(params, Optim(decay="all")) == {
        "stem": {"norm": {"mean": False, "scale": True}}
    }


def test_layers_learn_slower_towards_the_inputs():
    """cfir.md 7.3: twelve layers at 0.65; a tower of another depth counts its own."""
    scales = optim.layer_scales(PARAMS, 0.65)
    assert scales["image"]["patch_kernel"] == pytest.approx(0.00369721, abs=5e-9)
    assert scales["image"]["expert"]["positions"] == pytest.approx(0.00369721, abs=5e-9)
    blocks = scales["image"]["expert"]["blocks"]["up"]["kernel"]
    assert blocks.shape == (12, 1, 1)
    assert blocks[[0, 1, 10, 11], 0, 0] == pytest.approx([0.00568801, 0.00875078, 0.4225, 0.65])
    assert scales["text"]["embedding"] == pytest.approx(0.65**4)
    assert scales["logit_scale"] == 1
    deep = {"blocks": {"kernel": np.ones((24, 2, 2))}, "embedding": np.ones((3, 2))}
    assert optim.layer_scales(deep, 0.65)["embedding"] == pytest.approx(2.10e-5, rel=3e-3)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"stage1": {"conv": np.ones((2, 2))}}, "is of no transformer"),
        ({"text": {"embedding": np.ones((2, 2))}, "head": np.ones(2)}, "no blocks are trained"),
    ],
)
def test_layer_decay_of_what_has_no_layers_is_refused(params, words):
    with pytest.raises(ValueError, match=words):
        optim.layer_scales(params, 0.5)


def test_a_step_is_the_formula():
    """One update of each group, by hand: decay and gradient both at the rate of the layer, no clipping."""
    config = Optim(
        lr=0.1,
        weight_decay=0.05,
        schedule="constant",
        clip_norm=None,
        layer_decay=0.5,
        epsilon=1e-3,
    )
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), PARAMS)
    tx = optim.optimizer(config, 3)
    grads = jax.tree.map(lambda x: jnp.full_like(x, 3.0), params)
    updates, _ = tx.update(grads, tx.init(params), params)
    moved = 3 / (3 + 1e-3)
    kernel = updates["image"]["expert"]["blocks"]["up"]["kernel"]
    expected = -0.1 * 0.5 ** np.arange(12, 0, -1) * (moved + 0.05)
    np.testing.assert_allclose(kernel[:, 0, 0], expected, rtol=1e-5)
    assert float(updates["logit_scale"]) == pytest.approx(-0.1 * moved, rel=1e-5)


@pytest.mark.parametrize(("norm", "length"), [(None, 50.0), (5.0, 5.0), (100.0, 50.0)])
def test_clipping_is_of_the_whole_gradient(norm, length):
    tx = optim.optimizer(Optim(lr=1.0, clip_norm=norm), 3)
    grads = {"a": jnp.full((2,), 30 / 2**0.5), "b": jnp.full((1,), 40.0)}
    _, state = tx.update(grads, tx.init(grads), grads)
    mean = optax.tree.norm(optax.tree.get(state, "mu")) / (1 - Optim.betas[0])
    assert float(mean) == pytest.approx(length, rel=1e-5)


@pytest.mark.parametrize("crop", [(0.0, 1.0), (0.5, 0.2), (0.5, 1.5)])
def test_shares_of_a_picture_that_cannot_be(crop, tiny_experiment):
    train = dataclasses.replace(tiny_experiment.train, crop=crop)
    with pytest.raises(ValueError, match=r"train.crop is \(0\.[05], .*; expected two shares"):
        check_numbers(dataclasses.replace(tiny_experiment, train=train))
