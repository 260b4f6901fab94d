"""Twenty optimiser steps beside PyTorch's: every loss with its optimiser, from the same weights on the same batches.

Small random networks, float32, no dropout. Needs `torchscale` beside the extra `[parity]`, as `.ci/run` installs it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import golden_inversion as golden
import jax
import numpy as np
import optax
import pytest
from flax import traverse_util
from test_parity_convert import small
from test_parity_fti4cir import CAPTIONS, KEPT, THRESHOLD, fti4cir_loss, made, written

from cir_jax.checkpoint import abstract_params
from cir_jax.config import Optim
from cir_jax.conversion import beit3, blip, clip, inversion, maria, rules
from cir_jax.data.images import ImageSpec
from cir_jax.data.inputs import Inputs
from cir_jax.data.text import TextSpec, tokenizer
from cir_jax.encoders.beit3 import Beit3Config
from cir_jax.encoders.bert import BertConfig
from cir_jax.encoders.clip import TextConfig, VisionConfig
from cir_jax.encoders.resnext import ResnextConfig
from cir_jax.encoders.vit import VitConfig
from cir_jax.methods.blip_cir import BlipCirConfig
from cir_jax.methods.blip_rerank import BlipRerankConfig
from cir_jax.methods.cfir import CfirConfig
from cir_jax.methods.clip import ClipConfig
from cir_jax.methods.fti4cir import Fti4cirConfig
from cir_jax.methods.inversion import FROZEN as CLIP_FROZEN
from cir_jax.methods.maria import FROZEN as BACKBONES_FROZEN
from cir_jax.methods.maria import MariaConfig
from cir_jax.training import optim
from cir_jax.training.step import make_step

try:
    import originals
    import torch
except ImportError:  # the tests are not selected then
    originals = torch = None

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
STEPS, BATCHES, ROWS, LENGTH, WORDS, SIZE = 20, 4, 6, 12, 60, 32
INPUTS = Inputs(image=ImageSpec(size=SIZE), text=TextSpec(length=LENGTH))


@dataclass
class Case:
    """A method of ours with its optimiser, and the original's side.

    Attributes:
      method, optim: of an experiment.
      table: of the converter.
      make: the original's network.
      loss: of (network, **batch).
      optimizer: of the parameters that the network trains: (optimizer, function that sets its rates before a step).
      batches: as ours reads them, and the arguments of `loss`.
      clip: bound of the norm of the original's gradients.
      tolerance: of an update, as a part of the largest.
    """

    method: Any
    optim: Optim
    table: tuple
    make: Callable
    loss: Callable
    optimizer: Callable
    batches: list[tuple[dict, dict]]
    clip: float | None = None
    tolerance: float = 1e-4


# ---- both sides ----


def carried(table, shapes, tensors):
    """Arrays under the original's names at the places of our parameters, by the converter's table."""
    wanted = {name for each in table for name in each.names(shapes)}
    tensors = golden.Tensors({n: x for n, x in tensors.items() if n in wanted})
    params, _ = rules.convert(tensors, rules.Plan(None, table, "the original's"), shapes)
    return params


def watched(tx):
    """The optimiser, with the gradients that it was given last in its state."""
    init = lambda params: (tx.init(params), params)

    def update(grads, state, params=None):
        updates, inner = tx.update(grads, state[0], params)
        return updates, (inner, grads)

    return optax.GradientTransformation(init, update)


def ours(case, params):
    """Losses of all steps, and the gradients of the first."""
    graph, _ = abstract_params(case.method)
    tx = watched(optim.optimizer(case.optim, STEPS))
    trained, frozen = split(case, params)
    state = {"params": trained, "frozen": frozen, "opt": tx.init(trained)}
    step, losses = jax.jit(make_step(graph, tx, seed=0)), []
    for number in range(STEPS):
        state, metrics = step(state, case.batches[number % BATCHES][0], np.int32(number))
        losses.append(float(metrics["loss"]))
        if number == 0:
            first = flat(state["opt"][1])
    return np.array(losses), first


def split(case, params):
    return optim.split_frozen(traverse_util.unflatten_dict(params, sep="/"), case.optim.frozen)


def flat(tree):
    return {k: np.asarray(x) for k, x in traverse_util.flatten_dict(tree, sep="/").items()}


def theirs(case, network):
    """Losses, gradients and weights of all steps, the last two by name; the weights those behind the step."""
    trained = [x for x in network.parameters() if x.requires_grad]
    optimizer, set_rates = case.optimizer(network, trained)
    losses, gradients, weights = [], [], []
    for step in range(STEPS):
        set_rates(step)
        optimizer.zero_grad()
        value = case.loss(network, **case.batches[step % BATCHES][1])
        value.backward()
        gradients.append(slopes(network))
        if case.clip:
            torch.nn.utils.clip_grad_norm_(trained, case.clip)
        optimizer.step()
        losses.append(value.item())
        weights.append(state_of(network))
    return np.array(losses), gradients, weights


def slopes(network):
    """Gradients by name; zero where there is none."""
    own = {n: x.grad for n, x in network.named_parameters() if x.grad is not None}
    return {
        n: own[n].numpy().copy() if n in own else np.zeros(x.shape, np.float32)
        for n, x in network.state_dict().items()
    }


def state_of(network):
    return {n: x.detach().numpy().copy() for n, x in network.state_dict().items()}


# ---- the cases ----


def random_batches(composed=False):
    """A few batches of random texts, with end and padding, and pictures; a `composed` query also has a picture."""
    draw, made = np.random.default_rng(0), []
    for _ in range(BATCHES):
        ids = draw.integers(5, WORDS - 2, (ROWS, LENGTH)).astype(np.int32)
        ends = draw.integers(2, LENGTH, (ROWS, 1))
        ids[:, 0], mask = 2, np.arange(LENGTH) <= ends
        np.put_along_axis(ids, ends, WORDS - 2, 1)  # for CLIP the largest
        images = draw.normal(size=(2, ROWS, SIZE, SIZE, 3)).astype(np.float32)
        query = {"text": np.where(mask, ids, 0), "text_mask": mask}
        reference = {"image": images[0]} if composed else {}
        batch = {"query": query | reference, "item": {"image": images[1]}}
        made.append((batch, jax.tree.map(torch.from_numpy, batch)))
    return made


def clip_case():
    method = ClipConfig(
        VisionConfig(SIZE, 16, 64, 2, 2), TextConfig(WORDS, LENGTH, 32, 2, 2), 16, inputs=INPUTS
    )
    rate, decay, warmup = 1e-3, 0.2, 4

    def optimizer(network, trained):
        groups = [
            {"params": [x for x in trained if x.ndim > 1], "weight_decay": decay},
            {"params": [x for x in trained if x.ndim < 2], "weight_decay": 0.0},
        ]
        made = torch.optim.AdamW(groups, rate, betas=(0.9, 0.98))
        scheduler = originals.library("transformers").get_cosine_schedule_with_warmup
        return made, originals.by_library(scheduler(made, warmup, STEPS))

    return Case(
        method,
        Optim(lr=rate, weight_decay=decay, warmup=warmup, clip_norm=None),
        clip.original(method)[0],
        partial(originals.clip, method),
        originals.clip_loss,
        optimizer,
        random_batches(),
    )


IMAGE = VitConfig(SIZE, 16, 48, 2, 4)
TEXT = BertConfig(WORDS, LENGTH, 32, 2, 4, hidden=64, types=0, image_width=48, dropout=0.0)


def blip_case(config, make, loss, frozen, steps_per_epoch, period):
    """Candidate-Reranking's optimiser: one group of all that trains, all of it decayed."""
    rate, decay = 1e-3, 0.05
    ours = {"hold": steps_per_epoch, "period": period * steps_per_epoch, "frozen": frozen}

    def optimizer(network, trained):
        made = torch.optim.AdamW(trained, rate, weight_decay=decay)
        return made, originals.per_epoch_cosine(made, steps_per_epoch, period, rate)

    return Case(
        config,
        Optim(rate, decay, (0.9, 0.999), clip_norm=None, decay="all", **ours),
        blip.original(config)[0],
        partial(make, config),
        loss,
        optimizer,
        random_batches(composed=True),
    )


def stage1_case():
    """Two steps an epoch; as on CIRR, more epochs than the period of the schedule."""
    config = BlipCirConfig(IMAGE, TEXT, 16, inputs=INPUTS)
    frozen = ("image/.*", "image_project/.*")
    return blip_case(config, originals.stage1, originals.stage1_loss, frozen, 2, 8)


def stage2_case():
    config = BlipRerankConfig(IMAGE, TEXT, 1, inputs=INPUTS)
    frozen = ("image/.*", "fusion/.*")
    return blip_case(config, originals.stage2, originals.stage2_loss, frozen, 2, 16)


def cfir_case():
    encoder = Beit3Config(SIZE, 16, WORDS, LENGTH, 32, 3, 4, 64)
    method = CfirConfig(encoder, inputs=INPUTS)
    rate, least, decay, layer_decay, warmup = 2e-3, 1e-6, 0.05, 0.65, 5

    def optimizer(network, trained):
        groups = originals.beit3_groups(network, encoder.layers, layer_decay, decay)
        made = torch.optim.AdamW(groups, rate)
        table = originals.cosine_table(rate, least, warmup, STEPS)
        return made, originals.by_table(made, table)

    return Case(
        method,
        Optim(
            rate,
            decay,
            (0.9, 0.999),
            warmup=warmup,
            warmup_includes="both",
            min_lr=least,
            clip_norm=None,
            undecayed=("image/expert/positions",),
            layer_decay=layer_decay,
        ),
        beit3.original(method)[0],
        partial(originals.beit3, encoder),
        originals.beit3_loss,
        optimizer,
        random_batches(),
    )


def maria_method(**changes):
    text = BertConfig(WORDS, LENGTH, 32, 2, 4, hidden=64, dropout=0.0)
    image = ResnextConfig((1, 1, 1, 1), groups=4, group_width=4)
    return MariaConfig(text, image, text_layers=2, dropout=0.0, inputs=INPUTS, **changes)


def maria_case():
    method = maria_method(hidden=(32, 32), embed=16, summed=True)
    rate = 1e-3

    def optimizer(network, trained):
        return torch.optim.Adam(trained, rate), lambda step: None

    return Case(
        method,
        Optim(rate, 0.0, (0.9, 0.999), schedule="constant", clip_norm=5.0, frozen=BACKBONES_FROZEN),
        maria.original(method)[0],
        partial(originals.maria, method),
        partial(originals.maria_loss, text_layers=2),
        optimizer,
        random_batches(),
        clip=5.0,
    )


def vokenization_case():
    method = maria_method(level="token", hidden=(32,), embed=16)
    rate, decay, warmup = 1e-3, 0.01, 4

    def optimizer(network, trained):
        names = {x: n for n, x in network.named_parameters()}
        undecayed = lambda x: any(part in names[x] for part in ("bias", "LayerNorm.weight"))
        groups = [
            {"params": [x for x in trained if not undecayed(x)], "weight_decay": decay},
            {"params": [x for x in trained if undecayed(x)], "weight_decay": 0.0},
        ]
        made = originals.BertAdamW(groups, rate, decay)
        scheduler = originals.library("transformers").get_linear_schedule_with_warmup
        return made, originals.by_library(scheduler(made, warmup, STEPS))

    return Case(
        method,
        Optim(
            rate,
            decay,
            (0.9, 0.999),
            warmup=warmup,
            schedule="linear",
            clip_norm=5.0,
            frozen=BACKBONES_FROZEN,
        ),
        maria.original(method)[0],
        partial(originals.maria, method),
        partial(originals.vokenization_loss, text_layers=2),
        optimizer,
        random_batches(),
        clip=5.0,
        # Their epsilon is added to a root that is still too small, before the means are corrected for their start.
        tolerance=1e-2,
    )


def fti4cir_case():
    """The network on CLIP's real vocabulary, whose prompts the loss writes; the rate drops at step 10."""
    fields = {"activation": "quick_gelu", "attribute_layers": 2, "dropout": 0.0}
    method = Fti4cirConfig(
        VisionConfig(64, 16, 128, 3, 2),
        TextConfig(width=128, layers=2, heads=2),
        64,
        attributes=6,
        kept=KEPT,
        threshold=THRESHOLD,
        inputs=Inputs(image=ImageSpec(size=64)),
        **fields,
    )
    rate, decay, drop = 1e-3, 0.01, 10

    def make():
        network = made("fti4cir", 128, 64, 128)
        network.clip = small().requires_grad_(False)
        with torch.no_grad():  # else prompts hardly depend on their words
            network.clip.token_embedding.weight.mul_(20)
        return network

    def optimizer(network, trained):
        made = torch.optim.AdamW(trained, rate, weight_decay=decay)
        return made, originals.divided_once(made, 1, drop, 0.1)

    return Case(
        method,
        Optim(
            rate,
            decay,
            (0.9, 0.999),
            schedule="constant",
            drops=(drop,),
            clip_norm=None,
            decay="all",
            frozen=CLIP_FROZEN,
        ),
        inversion.original(method)[0],
        make,
        lambda network, **batch: fti4cir_loss(network, network.clip, **batch),
        optimizer,
        captioned_batches(),
    )


def captioned_batches():
    draw, batches = np.random.default_rng(0), []
    for n in range(BATCHES):
        captions = CAPTIONS[n:] + CAPTIONS[:n]
        images = draw.normal(size=(len(captions), 64, 64, 3)).astype(np.float32)
        text = tokenizer(TextSpec())(written(captions))[0]
        theirs = {"images": originals.pixels(torch.from_numpy(images)), "captions": captions}
        batches.append(({"query": {"text": text}, "item": {"image": images}}, theirs))
    return batches


CASES = {
    "clip": clip_case,
    "blip_cir": stage1_case,
    "blip_rerank": stage2_case,
    "fti4cir": fti4cir_case,
    "cfir": cfir_case,
    "maria": maria_case,
    "vokenization": vokenization_case,
}


@pytest.fixture(scope="module", params=CASES)
def run(request):
    """(case, shapes of our parameters, their first values, what ours and the original's side did)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for so little, more only wait for each other
    case = CASES[request.param]()
    shapes = {name: x.shape for name, x in flat_shapes(case.method).items()}
    network = case.make()
    before = carried(case.table, shapes, state_of(network))
    yield case, shapes, before, ours(case, before), theirs(case, network)
    torch.set_num_threads(threads)


def flat_shapes(method):
    return traverse_util.flatten_dict(abstract_params(method)[1], sep="/")


def test_losses_follow(run, capsys):
    _, _, _, (found, _), (expected, *_) = run
    apart = np.abs(found - expected) / np.abs(expected)
    moved = np.abs(expected[-BATCHES:] / expected[:BATCHES] - 1)
    with capsys.disabled():
        print(
            f"\nlosses {expected[0]:.4f} to {expected[-1]:.4f}, apart by {apart.max():.1e}, moved {moved.min():.2f}"
        )
    assert moved.min() > 0.02  # the same batch, a few rounds later
    assert apart.max() <= 1e-4


def test_first_gradients(run):
    case, shapes, _, (_, found), (_, gradients, _) = run
    expected = carried(case.table, shapes, gradients[0])
    largest = max(np.abs(expected[name]).max() for name in found)
    for name, x in found.items():
        assert expected[name].any() or not x.any(), name
        # Some have none but for rounding: of keys the biases, of scores what is added to all.
        atol = 1e-5 * np.abs(expected[name]).max() + 1e-6 * largest
        np.testing.assert_allclose(x, expected[name], rtol=0, atol=atol, err_msg=name)


def test_every_update_from_their_gradients(run):
    """Ours, given the gradients of the original's side at every step, changes every parameter as it did."""
    case, shapes, before, _, (_, gradients, weights) = run
    params, frozen = split(case, before)
    tx = optim.optimizer(case.optim, STEPS)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(STEPS):
        given, _ = split(case, carried(case.table, shapes, gradients[step]))
        updates, state = update(given, state, params)
        params = optax.apply_updates(params, updates)
        expected = carried(case.table, shapes, weights[step])
        for name, x in flat(params).items():
            change = np.abs(expected[name] - before[name]).max()
            atol = case.tolerance * change + 2e-7 * np.abs(before[name]).max()
            np.testing.assert_allclose(
                x, expected[name], rtol=0, atol=atol, err_msg=f"{name}, step {step}"
            )
    for name, x in flat(frozen).items():
        np.testing.assert_array_equal(x, expected[name], err_msg=name)
