"""Twenty optimiser steps beside PyTorch's: every loss with its optimiser, from the same weights on the same batches.

Small random networks, float32, no dropout; ours with the optimisers of the recipes in configs/, whose epochs are made
short and whose rates are raised, so that the losses move. Needs `torchscale` beside the extra `[parity]`, as `.ci/run`
installs it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
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
from cir_jax.config import Experiment, Optim, load_config
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
from cir_jax.methods.maria import MariaConfig
from cir_jax.training import optim
from cir_jax.training.step import make_step

try:
    import originals
    import torch
except ImportError:  # the tests are not selected then
    originals = torch = None

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
STEPS, BATCHES, ROWS, LENGTH, WORDS, SIZE = 20, 4, 8, 12, 60, 32
INPUTS = Inputs(image=ImageSpec(size=SIZE), text=TextSpec(length=LENGTH))


@dataclass
class Case:
    """A method of ours with its optimiser, and the original's side.

    Attributes:
      method, optim: of an experiment.
      table: of the converter.
      network: makes the original's.
      loss: of (network, **batch).
      optimizer: of the network: (optimizer, function that sets its rates before a step).
      batches: as ours reads them, and the arguments of `loss`.
      clip_norm: bound of the original's gradients.
      clear, tolerance: how near updates by the same gradients are, as a part of the largest, where all gradients were
        0 or at least `clear`.
    """

    method: Any
    optim: Optim
    table: tuple
    network: Callable
    loss: Callable
    optimizer: Callable
    batches: list[tuple[dict, dict]]
    clip_norm: float | None = None
    clear: float = 0.0
    tolerance: float = 1e-4


# ---- the cases ----


def recipe(name, **changes):
    """The optimiser of a packaged experiment."""
    return replace(load_config(name, Experiment).optim, **changes)


def random_batches(composed=False):
    """A few batches of random texts, with end and padding, and pictures; a `composed` query also has a picture."""
    draw, batches = np.random.default_rng(0), []
    for _ in range(BATCHES):
        ids = draw.integers(5, WORDS - 2, (ROWS, LENGTH)).astype(np.int32)
        ends = draw.integers(2, LENGTH, (ROWS, 1))
        ids[:, 0], mask = 2, np.arange(LENGTH) <= ends
        np.put_along_axis(ids, ends, WORDS - 2, 1)  # for CLIP the largest
        images = draw.normal(size=(2, ROWS, SIZE, SIZE, 3)).astype(np.float32)
        query = {"text": np.where(mask, ids, 0), "text_mask": mask}
        reference = {"image": images[0]} if composed else {}
        batch = {"query": query | reference, "item": {"image": images[1]}}
        batches.append((batch, jax.tree.map(torch.from_numpy, batch)))
    return batches


def clip_case():
    vision, text = VisionConfig(SIZE, 16, 64, 2, 2), TextConfig(WORDS, LENGTH, 32, 2, 2)
    method, rate, warmup = ClipConfig(vision, text, 16, inputs=INPUTS), 1e-3, 4
    return Case(
        method,
        recipe("clip_cc3m", lr=rate, warmup=warmup),
        clip.original(method)[0],
        partial(originals.clip, method),
        originals.clip_loss,
        partial(originals.clip_optimizer, rate=rate, weight_decay=0.2, warmup=warmup, steps=STEPS),
        random_batches(),
    )


IMAGE = VitConfig(SIZE, 16, 48, 2, 4)
TEXT = BertConfig(WORDS, LENGTH, 32, 2, 4, hidden=64, types=0, image_width=48, dropout=0.0)


def reranking_case(name, method, network, loss, period):
    """Epochs of two steps."""
    rate, epoch = 1e-3, 2
    lengths = {"epoch": epoch, "period": period}
    return Case(
        method,
        recipe(name, lr=rate, hold=epoch, period=period * epoch),
        blip.original(method)[0],
        partial(network, method),
        loss,
        partial(originals.reranking_optimizer, rate=rate, weight_decay=0.05, **lengths),
        random_batches(composed=True),
    )


def stage1_case():
    """As on CIRR the period is shorter than the run."""
    method = BlipCirConfig(IMAGE, TEXT, 16, inputs=INPUTS)
    return reranking_case("blip_cir_cirr", method, originals.stage1, originals.stage1_loss, 8)


def stage2_case():
    method = BlipRerankConfig(IMAGE, TEXT, merge_from=1, inputs=INPUTS)
    return reranking_case("blip_rerank_cirr", method, originals.stage2, originals.stage2_loss, 9)


def fti4cir_case():
    """On CLIP's real vocabulary, for the loss writes prompts; epochs of one step."""
    method = Fti4cirConfig(
        VisionConfig(64, 16, 128, 3, 2),
        TextConfig(width=128, layers=2, heads=2),
        64,
        attributes=6,
        kept=KEPT,
        threshold=THRESHOLD,
        attribute_layers=2,
        dropout=0.0,
        inputs=Inputs(image=ImageSpec(size=64)),
    )
    rate, drop = 1e-3, 10

    def network():
        whole = made("fti4cir", 128, 64, 128)
        whole.clip = small().requires_grad_(False)
        with torch.no_grad():  # else prompts hardly depend on their words
            whole.clip.token_embedding.weight.mul_(20)
        return whole

    return Case(
        method,
        recipe("fti4cir_l14", lr=rate, drops=(drop,)),
        inversion.original(method)[0],
        network,
        lambda network, **batch: fti4cir_loss(network, network.clip, **batch),
        partial(originals.fti4cir_optimizer, rate=rate, weight_decay=0.01, drop=drop),
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


def cfir_case():
    encoder = Beit3Config(SIZE, 16, WORDS, LENGTH, width=32, layers=3, heads=4, hidden=64)
    method, rate, warmup = CfirConfig(encoder, inputs=INPUTS), 2e-3, 5
    lengths = {"layers": encoder.layers, "warmup": warmup, "steps": STEPS}
    rates = {"rate": rate, "weight_decay": 0.05, "layer_decay": 0.65, "least": 1e-6}
    return Case(
        method,
        recipe("cfir_stage2", lr=rate, warmup=warmup),
        beit3.original(method)[0],
        partial(originals.beit3, encoder),
        originals.beit3_loss,
        partial(originals.cfir_optimizer, **lengths, **rates),
        random_batches(),
    )


def maria_case():
    return paired_case(
        originals.maria_loss,
        partial(originals.adam, rate=1e-3),
        recipe("maria_coco"),
        hidden=(32, 32),
        summed=True,
    )


def vokenization_case():
    return paired_case(
        originals.vokenization_loss,
        partial(originals.adam, rate=1e-3),
        recipe("vokenization_coco"),
        hidden=(32,),
        level="token",
    )


def bert_case():
    """Vokenization's loss with the optimiser that is its code's default, of which there is no recipe."""
    rate, decay, warmup = 1e-3, 0.01, 4
    own = {"weight_decay": decay, "warmup": warmup, "schedule": "linear"}
    case = paired_case(
        originals.vokenization_loss,
        partial(originals.bert_adamw, rate=rate, weight_decay=decay, warmup=warmup, steps=STEPS),
        recipe("vokenization_coco", **own),
        hidden=(32,),
        level="token",
    )
    # It adds its epsilon to a root that is not yet corrected for its start at zero, which small gradients feel.
    return replace(case, clear=1e-3, tolerance=5e-4)


def paired_case(loss, optimizer, own, **fields):
    """Two processes, each with its own half of the batch."""
    text = BertConfig(WORDS, LENGTH, 32, 2, 4, hidden=64, dropout=0.0)
    image = ResnextConfig((1, 1, 1, 1), groups=4, group_width=4)
    common = {"text_layers": 2, "embed": 16, "dropout": 0.0, "loss_parts": 2}
    method = MariaConfig(text, image, inputs=INPUTS, **common, **fields)
    return Case(
        method,
        own,
        maria.original(method)[0],
        partial(originals.maria, method),
        partial(loss, text_layers=2, parts=2),
        optimizer,
        random_batches(),
        clip_norm=5.0,
    )


CASES = {
    "clip": clip_case,
    "blip_cir": stage1_case,
    "blip_rerank": stage2_case,
    "fti4cir": fti4cir_case,
    "cfir": cfir_case,
    "maria": maria_case,
    "vokenization": vokenization_case,
    "vokenization, bert": bert_case,
}


# ---- both sides ----


@pytest.fixture(scope="module", params=CASES)
def run(request):
    """(case, function that carries over, parameters before, what ours did, what the original's did)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for so little, more only wait for each other
    case = CASES[request.param]()
    shapes = {name: x.shape for name, x in by_path(abstract_params(case.method)[1]).items()}
    network, carry = case.network(), partial(carried, case.table, shapes)
    before = carry(arrays(network))
    yield case, carry, before, ours(case, before), theirs(case, network)
    torch.set_num_threads(threads)


def by_path(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def carried(table, shapes, tensors):
    """Arrays under the original's names at the places of our parameters, by the converter's table."""
    wanted = {name for each in table for name in each.names(shapes)}
    tensors = golden.Tensors({name: x for name, x in tensors.items() if name in wanted})
    return rules.convert(tensors, rules.Plan(None, table, "the original's"), shapes)[0]


def split(case, params):
    """(trained, frozen)."""
    return optim.split_frozen(traverse_util.unflatten_dict(params, sep="/"), case.optim.frozen)


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
            first = by_path(jax.device_get(state["opt"][1]))
    return np.array(losses), first


def watched(tx):
    """The optimiser, with the gradients that it was given last in its state."""

    def update(grads, state, params=None):
        updates, inner = tx.update(grads, state[0], params)
        return updates, (inner, grads)

    return optax.GradientTransformation(lambda params: (tx.init(params), params), update)


def theirs(case, network):
    """Losses of all steps; gradients of each, and the weights behind it, by name."""
    optimizer, set_rates = case.optimizer(network)
    losses, gradients, weights = [], [], []
    for step in range(STEPS):
        set_rates(step)
        optimizer.zero_grad()
        value = case.loss(network, **case.batches[step % BATCHES][1])
        value.backward()
        gradients.append(slopes(network))
        if case.clip_norm:
            torch.nn.utils.clip_grad_norm_(network.parameters(), case.clip_norm)
        optimizer.step()
        losses.append(value.item())
        weights.append(arrays(network))
    return np.array(losses), gradients, weights


def arrays(network):
    return {name: x.detach().numpy().copy() for name, x in network.state_dict().items()}


def slopes(network):
    """Gradients by name; zero where there is none."""
    found = {n: x.grad for n, x in network.named_parameters() if x.grad is not None}
    zero = lambda x: torch.zeros(x.shape)
    return {n: found.get(n, zero(x)).numpy().copy() for n, x in network.state_dict().items()}


# ---- the tests ----


def test_losses(run, capsys):
    *_, (found, _), (expected, *_) = run
    apart = np.abs(found - expected) / np.abs(expected)
    moved = np.abs(expected[-BATCHES:] / expected[:BATCHES] - 1)  # of the same batches
    with capsys.disabled():
        told = f"{expected[0]:.3f} to {expected[-1]:.3f}, moved by {moved.min():.0%} or more"
        print(f"\nlosses {told}; apart by {apart.max():.1e} or less")
    assert moved.min() > 0.1
    assert apart.max() <= 1e-4


def test_gradients_of_the_first_step(run):
    _, carry, _, (_, found), (_, gradients, _) = run
    expected = carry(gradients[0])
    largest = max(np.abs(expected[name]).max() for name in found)
    for name, x in found.items():
        # Some have none but for rounding: of keys the biases, of scores what is added to all.
        atol = 1e-5 * np.abs(expected[name]).max() + 1e-6 * largest
        np.testing.assert_allclose(x, expected[name], rtol=0, atol=atol, err_msg=name)


def test_every_update(run):
    """From the original's parameters and gradients before each step, ours makes its parameters behind it."""
    case, carry, before, _, (_, gradients, weights) = run
    tx = optim.optimizer(case.optim, STEPS)
    state, update = tx.init(split(case, before)[0]), jax.jit(tx.update)
    counted = dict.fromkeys(before, True)
    for step in range(STEPS):
        (params, frozen), behind = split(case, before), carry(weights[step])
        given = carry(gradients[step])
        updates, state = update(split(case, given)[0], state, params)
        for name, x in by_path(jax.device_get(optax.apply_updates(params, updates))).items():
            clear = (given[name] == 0) | (np.abs(given[name]) >= case.clear)
            counted[name] &= clear
            change = np.abs(behind[name] - before[name]).max()
            atol = case.tolerance * change + 2.4e-7 * np.abs(before[name]).max()
            told = f"{name}, step {step}"
            expected = np.where(counted[name], behind[name], x)
            np.testing.assert_allclose(x, expected, rtol=0, atol=atol, err_msg=told)
        for name, x in by_path(frozen).items():
            np.testing.assert_array_equal(x, behind[name], err_msg=name)
        before = behind
