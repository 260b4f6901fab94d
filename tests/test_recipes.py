"""Recipes of the originals: rates and groups as the specifications have them, and each trains on a small copy of its data."""

import dataclasses
import functools
import json
import shutil
import tarfile
from dataclasses import replace

import jax
import numpy as np
import pytest
from data_layouts import paint, searle, write
from flax import traverse_util
from test_methods import drawn

from cir_jax import sharding
from cir_jax.checkpoint import abstract_params, save_model
from cir_jax.config import Experiment, load_config
from cir_jax.data import named_benchmark
from cir_jax.data.emoji import VOCABULARY
from cir_jax.data.lincir import write_keys
from cir_jax.data.records import open_gallery
from cir_jax.data.searle import read_phrases
from cir_jax.data.text import TextSpec
from cir_jax.encoders.beit3 import BEIT3_BASE
from cir_jax.methods.blip_cir import BlipCirConfig
from cir_jax.methods.blip_rerank import BlipRerankConfig
from cir_jax.methods.cfir import CfirConfig
from cir_jax.methods.clip import ClipConfig
from cir_jax.methods.maria import MariaConfig
from cir_jax.model import load
from cir_jax.train import train
from cir_jax.training import optim
from cir_jax.training.step import make_init
from cir_jax.training.words import write_words
from cir_jax.vectors import Vectors

NAMES = (
    *("blip_cir_fashioniq", "blip_cir_cirr", "blip_rerank_fashioniq", "blip_rerank_cirr"),
    *("fti4cir_l14", "pic2word_l14", "searle_l14", "lincir_l14"),
    *("cfir_stage2", "cfir_adapters", "cfir_adapters_all", "cfir_text_only", "cfir_pictures_kept"),
    *("maria_coco", "vokenization_coco", "clip_cc3m", "clip_locked_text"),
)
RECIPES = {name: load_config(name, Experiment) for name in NAMES}


abstract = functools.cache(abstract_params)


def trained(config) -> dict:
    """The shapes of what an experiment trains, by path."""
    _, shapes = abstract(config.method)
    return traverse_util.flatten_dict(optim.split_frozen(shapes, config.optim.frozen)[0], sep="/")


def size(params) -> int:
    return sum(x.size for x in params.values())


def decayed(config) -> set[str]:
    params = traverse_util.unflatten_dict(trained(config), sep="/")
    flags = traverse_util.flatten_dict(optim.decays(params, config.optim), sep="/")
    return {name for name, flag in flags.items() if flag}


def rates(name, *steps) -> list[float]:
    config = RECIPES[name]
    rate = optim.schedule(config.optim, config.train.steps)
    return [float(rate(np.int32(step))) for step in steps]


# ---- the numbers of the specifications ----


@pytest.mark.parametrize(
    ("name", "steps", "expected"),
    [
        # candidate_reranking.md 3: steps of an epoch, learning rate by epoch
        ("blip_cir_fashioniq", 20 * 35, {0: 2e-5, 5 * 35: 1.70711e-5, 10 * 35: 1e-5}),
        ("blip_cir_cirr", 40 * 55, {0: 2e-5, 5 * 55: 1e-5, 10 * 55: 0, 15 * 55: 1e-5}),
        ("blip_cir_cirr", 40 * 55, {20 * 55: 2e-5, 30 * 55 + 54: 0, 39 * 55: 1.95106e-5}),
        ("blip_rerank_fashioniq", 50 * 1125, {1124: 2e-5, 25 * 1125: 1e-5}),
        ("blip_rerank_cirr", 100 * 1764, {80 * 1764: 0, 99 * 1764: 2.65685e-6}),
        # fti4cir.md 2.3: divided by ten once, at epoch 10
        ("fti4cir_l14", 60 * 390, {0: 4e-5, 3899: 4e-5, 3900: 4e-6, 23399: 4e-6}),
        # 5.1: base * (step + 1) / warmup, then a cosine to 0
        ("pic2word_l14", 30 * 3240, {0: 1e-8, 4999: 5e-5, 9999: 1e-4, 10000: 1e-4, 53600: 5e-5}),
        ("searle_l14", 100 * 390, {0: 1e-4, 38999: 1e-4}),
        ("lincir_l14", 20_000, {0: 1e-4, 19_999: 1e-4}),
        # cfir.md 7.4, here in epochs of 8,597 steps: peak at both sides of the warm-up's end, then down to 1e-6
        ("cfir_stage2", 30 * 8597, {0: 0, 25790: 2e-4, 25791: 2e-4, 141850: 1.005e-4}),
        # maria.md 4.2
        ("maria_coco", 25 * 1156, {0: 1e-3, 28899: 1e-3}),
        ("vokenization_coco", 20 * 2312, {0: 1e-3}),
    ],
)  # fmt: skip
def test_length_and_learning_rates(name, steps, expected):
    assert RECIPES[name].train.steps == steps
    assert rates(name, *expected) == pytest.approx([*expected.values()], rel=2e-4, abs=1e-10)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # candidate_reranking.md 1.5, without the projection of pictures, which gets no gradient (Q3)
        ("blip_cir_fashioniq", 137_652_225 - 196_864),
        ("blip_cir_cirr", 137_652_225 - 196_864),
        ("blip_rerank_fashioniq", 202_256_642),
        ("blip_rerank_cirr", 202_256_642),
        ("pic2word_l14", 1_050_368),  # fti4cir.md 5.1
        ("cfir_stage2", 674_799_617),  # cfir.md 1.1
        # 24 layers, two towers, linear layers of 1024 and 64; and of 1024 and 128 with a norm
        ("cfir_adapters", 48 * ((1024 * 64 * 2 + 64 + 1024) + (1024 * 128 * 2 + 3 * 128 + 1024))),
        # words; the text's feed-forward halves with their norms
        (
            "cfir_text_only",
            64010 * 1024 + 24 * (2 * 1024 * 4096 + 3 * 4096 + 1024 + 2 * 1024),
        ),
        # heads of 4 * 768 and 2048 over 1024, 1024 and 512
        ("maria_coco", 2 * (1024 * 1024 + 1024 + 1024 * 512 + 512) + (3072 + 2048 + 2) * 1024),
    ],
)  # fmt: skip
def test_how_much_is_trained(name, count):
    assert size(trained(RECIPES[name])) == count


def test_moments_and_clipping():
    """(betas, epsilon, weight decay, longest gradient) of each."""
    usual, one = ((0.9, 0.999), 1e-8), lambda o: (o.betas, o.epsilon, o.weight_decay, o.clip_norm)
    found = {name: one(config.optim) for name, config in RECIPES.items()}
    expected = dict.fromkeys([n for n in NAMES if n.startswith("blip")], (*usual, 0.05, None))
    expected |= dict.fromkeys([n for n in NAMES if n.startswith("cfir")], (*usual, 0.05, None))
    expected |= dict.fromkeys(["fti4cir_l14", "searle_l14", "lincir_l14"], (*usual, 0.01, None))
    expected["pic2word_l14"] = ((0.9, 0.98), 1e-6, 0.1, None)
    expected |= dict.fromkeys(["clip_cc3m", "clip_locked_text"], ((0.9, 0.98), 1e-6, 0.2, None))
    expected |= dict.fromkeys(["maria_coco", "vokenization_coco"], (*usual, 0, 5.0))
    assert found == expected


def test_what_decays():
    for name in NAMES:
        params, config = trained(RECIPES[name]), RECIPES[name].optim
        matrices = {n for n, x in params.items() if x.ndim - sharding.stacked(n) >= 2}
        everything = name.startswith(("blip", "fti4cir", "searle", "lincir"))
        assert config.decay == ("all" if everything else "matrices")
        kept = {"image/expert/positions"} if "cfir" in name else set()
        assert decayed(RECIPES[name]) == (set(params) if everything else matrices - kept), name


def test_344_tensors_of_beit3_do_not_decay():
    """cfir.md 7.3, of the base model; the token that hides patches has no gradient, so that nothing happens to it."""
    stage2 = RECIPES["cfir_stage2"]
    config = replace(stage2, method=replace(stage2.method, encoder=BEIT3_BASE))
    params = trained(config)
    spared = params.keys() - decayed(config) - {"image/mask_token"}
    assert sum(len(params[n]) if sharding.stacked(n) else 1 for n in spared) == 344


def test_layers_of_beit3_large():
    """cfir.md 7.3; the norm behind the blocks, the projections and the scale learn at the full rate."""
    scales = optim.layer_scales(
        traverse_util.unflatten_dict(trained(RECIPES["cfir_stage2"]), sep="/"), 0.65
    )
    flat = traverse_util.flatten_dict(scales, sep="/")
    inputs = {n for n, x in flat.items() if not sharding.stacked(n) and x < 1}
    assert inputs == {
        *("text/embedding", "text/expert/positions", "image/expert/positions"),
        *("image/class_token", "image/mask_token", "image/patch_kernel", "image/patch_bias"),
    }
    assert all(flat[name] == pytest.approx(2.10e-5, rel=3e-3) for name in inputs)
    blocks = {n for n in flat if sharding.stacked(n)}
    assert len(blocks) == 2 * 20
    for name in blocks:
        assert flat[name].ravel()[[0, -1]] == pytest.approx([0.65**24, 0.65])


def test_what_the_presets_of_cfir_train():
    adapters = trained(RECIPES["cfir_adapters"])
    assert {n.split("/blocks/")[1].split("/")[0] for n in adapters} == {"adapter", "enhancer"}
    assert trained(RECIPES["cfir_adapters_all"]).keys() > adapters.keys()
    text = trained(RECIPES["cfir_text_only"])
    assert {n.replace("text/expert/blocks/", "").split("/")[0] for n in text} == {
        *("text", "mlp", "ln2")
    }
    kept = trained(RECIPES["cfir_pictures_kept"])
    assert {n.split("/")[0] for n in kept} == {"text", "text_project", "logit_scale"}


def test_noise_in_what_is_frozen_and_what_pictures_become():
    second = RECIPES["blip_rerank_cirr"].method
    assert second.fusion_dropout and second.image.drop_path == 0.1 and second.text.dropout == 0.1
    first = RECIPES["blip_cir_cirr"].method
    assert first.image.drop_path == 0 and first.text.dropout == 0.1
    assert RECIPES["cfir_stage2"].method.encoder.drop_path == 0.2
    dropouts = {n: RECIPES[n].method.dropout for n in ("fti4cir_l14", "pic2word_l14", "searle_l14")}
    assert dropouts == {"fti4cir_l14": 0.5, "pic2word_l14": 0.1, "searle_l14": 0.5}
    shown = {name: (c.train.crop, c.train.mirror) for name, c in RECIPES.items()}
    assert shown["pic2word_l14"] == shown["clip_cc3m"] == ((0.9, 1.0), False)
    assert shown["cfir_stage2"] == ((0.5, 1.0), True) and shown["maria_coco"] == ((0.08, 1.0), True)
    assert shown["blip_cir_cirr"] == shown["fti4cir_l14"] == (None, False)
    assert not any(config.train.augment for config in RECIPES.values())


@pytest.mark.parametrize("name", NAMES)
def test_validation_is_possible_where_the_data_is(name, at_home):
    """The benchmarks exist, know the metric by which the best model is chosen, and are none of the test splits."""
    config = RECIPES[name]
    for each in config.evals:
        benchmark = named_benchmark(each)
        assert config.best in benchmark.metrics and "val" in benchmark.split


# ---- two steps of each on small copies of the data ----

TAGS = {"dog": "NOUN", "a": "DET", "red": "ADJ"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the data and the models of all recipes, small."""
    from data_layouts import LAYOUTS

    root = tmp_path_factory.mktemp("home")
    for name in ("fashioniq", "cirr", "atomic", "coco", "coco-lxmert"):
        LAYOUTS[name](root / "data" / name)
    imagenet, names = (
        root / "data/imagenet",
        [f"ILSVRC2012_test_{number:08}" for number in range(1, 5)],
    )
    records = [{"img_id": n[-8:], "subject": "a red dog", "attribute": "on it"} for n in names]
    paint(imagenet / "test", *(f"{name}.JPEG" for name in names))
    write(imagenet / "blip_pairs.json", records)
    searle(imagenet, names)
    shutil.rmtree(imagenet / "searle/words")
    texts = ["A red dog.", "nothing here", "a dog in <PERSON>'s red hat", " "] * 2
    tag = lambda text: [(word, TAGS.get(word, "X")) for word in text.split()]
    (root / "data/lincir").mkdir()
    assert write_keys(root / "data/lincir/captions.jsonl", texts, tag) == 6
    paint(root / "pictures", *(f"{number}.jpg" for number in range(8)))
    for name in ("cc3m", "react"):
        (root / "data" / name).mkdir()
        with tarfile.open(root / f"data/{name}/00000.tar", "w") as shard:
            for file in sorted((root / "pictures").iterdir()):
                text = root / "text.txt"
                text.write_text(f"number {file.stem}")
                shard.add(file, file.name)
                shard.add(text, f"{file.stem}.txt")
    model = drawn(small(RECIPES["blip_cir_cirr"]).method)
    for name in ("cirr", "fashioniq"):
        save_model(root / f"runs/blip_cir_{name}/model", model.config, model.params)
    clip = drawn(small(RECIPES["clip_cc3m"]).method)
    save_model(root / "models/clip", clip.config, clip.params)
    pictures, said = open_gallery(imagenet / "test"), read_phrases(imagenet)
    write_words(load(root / "models/clip"), pictures, imagenet / "searle/words", said.of, steps=2)
    return root


@pytest.fixture
def inside(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setenv("CIR_JAX_DATA", str(home / "data"))
    jax.config.update("jax_disable_most_optimizations", True)
    yield home
    jax.config.update("jax_disable_most_optimizations", False)


def small(config: Experiment) -> Experiment:
    """The recipe with a tiny model, two steps and eight rows, or four where there are no more; all else is its own."""
    method, inputs = config.method, config.method.inputs
    image = replace(inputs.image, size=32, short=inputs.image.short and 40)
    inputs = replace(inputs, image=image, text=TextSpec(vocab=str(VOCABULARY), length=16))
    tiny = type(method).tiny(inputs)
    if isinstance(method, CfirConfig):
        adapter, enhancer = replace(method.encoder.adapter, width=4), method.encoder.enhancer and 8
        own = {"drop_path": method.encoder.drop_path, "adapter": adapter, "enhancer": enhancer}
        tiny = replace(tiny, encoder=replace(tiny.encoder, **own))
    elif isinstance(method, BlipCirConfig | BlipRerankConfig):
        tower = replace(tiny.image, drop_path=method.image.drop_path)
        tiny = replace(tiny, image=tower, text=replace(tiny.text, dropout=method.text.dropout))
        if isinstance(method, BlipRerankConfig):
            tiny = replace(tiny, fusion_dropout=method.fusion_dropout)
    else:
        kept = {"level", "loss_parts", "summed", "first_star_only", "stars_in_texts", "dropout"}
        names = {each.name for each in dataclasses.fields(method)} & kept
        tiny = replace(tiny, **{name: getattr(method, name) for name in names})
    rows = 8 if isinstance(method, MariaConfig | ClipConfig) else 4
    few = {"cirr": 4, "imagenet": 4, "captions": 4}
    rows = few.get(config.data[0].name, rows)
    train = replace(
        config.train,
        steps=2,
        batch_size=rows,
        log_every=1,
        save_every=2,
        eval_every=2,
        drop_last=config.train.drop_last and config.data[0].name != "cirr",
    )
    changed = {"warmup": 0, "period": 0, "hold": 1, "drops": tuple(0 for _ in config.optim.drops)}
    return replace(
        config, method=tiny, train=train, optim=replace(config.optim, **changed), init={}
    )


# The others differ from one of these in numbers, or in another one's data.
TRIED = (
    *("blip_cir_fashioniq", "blip_rerank_cirr"),
    *("fti4cir_l14", "pic2word_l14", "searle_l14", "lincir_l14"),
    *("cfir_stage2", "cfir_adapters", "cfir_text_only"),
    *("maria_coco", "vokenization_coco", "clip_locked_text"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIED)
def test_two_steps(name, inside, tmp_path):
    """A model comes out whose trained parameters have moved, all of them that get a gradient, and whose others have not."""
    config = small(RECIPES[name])
    model = load(train(config, tmp_path / "run"))
    records = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 2 and np.isfinite(losses).all()
    before, after = (
        traverse_util.flatten_dict(params, sep="/") for params in (initial(config), model.params)
    )
    moved = {n for n in after if not np.array_equal(before[n], np.asarray(after[n], np.float32))}
    params = trained(config).keys()
    assert moved <= params
    # What no example touches: words, places and texts that none has, tokens without a use
    idle = {n for n in params if n.endswith(("types", "mask_token", "key/bias"))}
    assert params - moved <= idle | {n for n in params if "adapter" in n and "/up/" in n}, name
    measured = {key.rpartition("/")[0] for record in records for key in record if "/" in key}
    assert measured == {*config.evals}


def initial(config) -> dict:
    """The parameters that the run begins with."""
    init, key = make_init(config, optim.optimizer(config.optim, 2)), jax.random.key
    # Compiled as the run does it, so that it is compiled once.
    places = sharding.shardings(jax.eval_shape(init, key(0)), sharding.make_mesh())
    state = jax.jit(init, out_shardings=places)(key(config.train.seed))
    return jax.device_get(optim.join(state["params"], state["frozen"]))


@pytest.mark.slow
def test_words_are_found_again_from_where_they_stopped(inside, tmp_path):
    clip, pictures = load("models/clip"), open_gallery("data/imagenet/test")
    phrases = read_phrases("data/imagenet").of
    options = {"steps": 2, "batch_size": 2, "shard_size": 2}

    def stopping(name):
        if name == pictures.ids[3]:
            raise KeyboardInterrupt
        return phrases(name)

    with pytest.raises(KeyboardInterrupt):
        write_words(clip, pictures, tmp_path / "words", stopping, **options)
    write_words(clip, pictures, tmp_path / "words", phrases, **options)
    write_words(clip, pictures, tmp_path / "once", phrases, **options)
    words, once = Vectors(tmp_path / "words"), Vectors(tmp_path / "once")
    assert words.ids == once.ids == pictures.ids and words.fingerprint == clip.fingerprint
    np.testing.assert_array_equal(words.array(), once.array())
    assert words.width == clip.config.text.width
    with pytest.raises(ValueError, match="is no clip"):
        write_words(load("runs/blip_cir_cirr/model"), pictures, tmp_path / "no", phrases)
