"""What training begins with: whole models, parts, tables, and the other stage's model."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import traverse_util
from test_methods import INPUTS, drawn

from cir_jax import sharding
from cir_jax.checkpoint import save_model
from cir_jax.config import Experiment, Optim, Train
from cir_jax.methods import METHODS, method_name
from cir_jax.training import optim
from cir_jax.training import warm_start as module
from cir_jax.training.warm_start import warm_start


def tiny(name):
    """The model with which every run of a method begins here."""
    return drawn(METHODS[name][0].tiny(INPUTS))


def other(config):
    """Parameters of a method's config that no run begins with."""
    return drawn(config, seed=7).params


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`method -> folder` of a tiny model with other parameters than those a run begins with."""
    folder = tmp_path_factory.mktemp("models")

    @functools.cache
    def save(name, **changes):
        config = dataclasses.replace(tiny(name).config, **changes)
        path = folder / "-".join([name, *changes])
        save_model(path, config, other(config))
        return str(path)

    return save


def experiment(name, init=None, frozen=()):
    return Experiment(
        method=tiny(name).config,
        data=(),
        train=Train(steps=4, batch_size=8),
        optim=Optim(lr=1e-2, frozen=frozen),
        init=init or {},
    )


def begun(config):
    """(state before, state after) the warm start, placed on the mesh as in training."""
    trained, frozen = optim.split_frozen(
        tiny(method_name(config.method)).params, config.optim.frozen
    )
    state = {"params": trained, "frozen": frozen}
    places = sharding.shardings(state, sharding.make_mesh(fsdp=2))
    state = {**jax.tree.map(jax.device_put, state, places), "opt": "as it was"}
    return state, warm_start(state, config)


def flat(params):
    return {name: np.asarray(x) for name, x in traverse_util.flatten_dict(params, sep="/").items()}


def parameters(state):
    return flat(optim.join(state["params"], state["frozen"]))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_array_equal(found[name], expected[name], name)


def test_without_init_nothing_changes():
    before, after = begun(experiment("clip"))
    assert_same(parameters(after), parameters(before))


def test_a_whole_model_of_the_same_method(saved):
    before, after = begun(experiment("clip", {"": saved("clip")}))
    assert_same(parameters(after), flat(other(tiny("clip").config)))
    same_place = lambda x, y: x.sharding == y.sharding and x.dtype == y.dtype
    assert jax.tree.all(jax.tree.map(same_place, after["params"], before["params"]))
    assert after["opt"] == "as it was"


def test_entries_apply_in_their_order(saved, tmp_path):
    np.save(tmp_path / "scale.npy", np.float32(1.5))
    init = {"": saved("clip"), "logit_scale": str(tmp_path / "scale.npy")}
    _, after = begun(experiment("clip", init))
    expected = flat(other(tiny("clip").config))
    assert_same(parameters(after), {**expected, "logit_scale": np.float32(1.5)})


def test_a_model_under_a_prefix(monkeypatch):
    """CLIP's picture tower alone, saved as the parameters of a model of its own, under `image`."""
    params = other(tiny("clip").config)
    part = dataclasses.replace(tiny("clip"), params=params["image"])
    monkeypatch.setattr(module, "load", lambda source: part)
    before, after = begun(experiment("clip", {"image": "the tower"}))
    before, after, theirs = parameters(before), parameters(after), flat(params)
    for name in after:
        source = theirs if name.startswith("image/") else before
        np.testing.assert_array_equal(after[name], source[name], name)


def test_a_part_of_a_model_under_a_prefix(saved):
    """Stage II as its original begins: everything from BLIP, then the text encoder of stage I for its fusion."""
    init = {"": saved("blip_cir"), "fusion": f"{saved('blip_cir', embed=8)}#text"}
    _, plain = begun(experiment("blip_rerank", {"": saved("blip_cir")}))
    _, found = begun(experiment("blip_rerank", init))
    config = dataclasses.replace(tiny("blip_cir").config, embed=8)
    fusion = {f"fusion/{name}": x for name, x in flat(other(config)["text"]).items()}
    assert_same(parameters(found), parameters(plain) | fusion)
    message = r"has no part 'video'; there are image, image_project, temperature, text"
    with pytest.raises(ValueError, match=message):
        begun(experiment("blip_rerank", {"fusion": f"{saved('blip_cir')}#video"}))


def test_a_table_may_lack_the_last_rows(tmp_path):
    full = parameters(begun(experiment("clip"))[0])["text/embedding"]
    rows = np.random.default_rng(0).standard_normal(full.shape).astype(np.float16)
    np.save(tmp_path / "all.npy", rows)
    np.savez_compressed(tmp_path / "some.npz", rows=rows[:-3])
    for name, kept in (("all.npy", 0), ("some.npz", 3)):
        before, after = begun(experiment("clip", {"text/embedding": str(tmp_path / name)}))
        expected = rows.astype(np.float32)
        expected[len(expected) - kept :] = full[len(full) - kept :]
        assert_same(parameters(after), parameters(before) | {"text/embedding": expected})


def test_frozen_parameters_start_too(saved, tmp_path):
    frozen = ("image/.*", "text/embedding")
    _, after = begun(experiment("clip", {"": saved("clip")}, frozen))
    assert set(after["frozen"]) == {"image", "text"}
    assert_same(parameters(after), flat(other(tiny("clip").config)))


def test_stage_2_starts_from_stage_1(saved):
    before, after = begun(experiment("blip_rerank", {"": saved("blip_cir")}))
    stage1, found = flat(other(tiny("blip_cir").config)), parameters(after)
    part = lambda params, prefix: {
        name.removeprefix(prefix): x for name, x in params.items() if name.startswith(prefix)
    }
    assert_same(part(found, "image/"), part(stage1, "image/"))
    assert_same(part(found, "fusion/"), part(stage1, "text/"))
    assert_same(part(found, "text/embeddings/"), part(stage1, "text/embeddings/"))
    layers = {"mean": 0, "linear": 1}  # the tiny re-ranker has a layer of each
    for kind, layer in layers.items():
        theirs = {name: x[[layer]] for name, x in part(stage1, "text/blocks/").items()}
        for branch in ("fused", "text"):
            mine = part(found, f"text/blocks/{kind}/{branch}/")
            assert_same(mine, part(theirs, "branch/"))
        for shared in ("mlp/", "ln3/"):
            mine = part(found, f"text/blocks/{kind}/{shared}")
            assert_same(mine, part(theirs, shared))
    own = lambda params: part(params, "head/") | part(params, "text/blocks/linear/merge/")
    assert_same(own(found), own(parameters(before)))
    assert part(found, "head/")["up/kernel"].any() and part(found, "head/")["down/kernel"].any()


def test_a_text_re_ranker_takes_what_stage_1_has(saved):
    before, after = begun(experiment("blip_itm", {"": saved("blip_cir")}))
    stage1 = flat(other(tiny("blip_cir").config))
    assert_same(parameters(after), {**parameters(before), **stage1})


def test_equal_branches_are_not_the_same_memory(saved):
    """Training donates its state: a step writes over it."""
    _, state = begun(experiment("blip_rerank", {"": saved("blip_cir")}, ("image/.*", "fusion/.*")))
    before, params = parameters(state), {name: state[name] for name in ("params", "frozen")}
    step = jax.jit(lambda params: jax.tree.map(lambda x: x + 1, params), donate_argnums=0)
    found = parameters(step(step(params)))
    assert_same(found, {name: x + 1 + 1 for name, x in before.items()})


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ({"": "blip_cir"}, "does not fit the model at image/.*text"),
        ({"text": "clip"}, "does not fit the model at text/image/"),
        ({"text/embeding": "table"}, "table.npy does not fit the model at text/embeding"),
        ({"text/embedding": "wide"}, "wide.npy does not fit the model at text/embedding"),
        ({"text/embedding": "long"}, "long.npy does not fit the model at text/embedding"),
        ({"logit_scale": "table"}, "table.npy does not fit the model at logit_scale"),
        ({"": "table"}, "table.npy does not fit the model at"),
    ],
    ids=["method", "prefix", "name", "width", "rows", "shape", "whole"],
)
def test_misfits_are_refused_by_name(saved, tmp_path, init, message):
    rows = tiny("clip").params["text"]["embedding"]
    tables = {"table": rows, "wide": np.zeros((9, 7)), "long": np.concatenate([rows, rows])}
    for name, table in tables.items():
        np.save(tmp_path / f"{name}.npy", table)
    place = lambda name: f"{tmp_path / name}.npy" if name in tables else saved(name)
    with pytest.raises(ValueError, match=message):
        begun(experiment("clip", {prefix: place(name) for prefix, name in init.items()}))


def test_a_stage_1_of_another_size_is_refused(saved):
    from cir_jax.methods.blip_cir import tiny_towers

    image, text = tiny_towers(INPUTS)
    deeper = dataclasses.replace(text, layers=1)
    with pytest.raises(ValueError, match=r"does not fit the model at .*fusion/blocks"):
        begun(experiment("blip_rerank", {"": saved("blip_cir", image=image, text=deeper)}))


def test_a_source_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model 'nothing'"):
        begun(experiment("clip", {"": "nothing"}))
    with pytest.raises(FileNotFoundError, match=r"none\.npy"):
        begun(experiment("clip", {"logit_scale": str(tmp_path / "none.npy")}))
