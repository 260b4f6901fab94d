"""Conversion of FTI4CIR, Pic2Word, SEARLE, LinCIR and MagicLens: files as published, there and back, and searched with."""

import functools
import json
import pickle

import golden_inversion as golden
import jax
import numpy as np
import processes
import pytest
from flax import nnx, serialization, traverse_util
from golden_convert import (
    HUGGING_FACE,
    hugging_face,
    openai,
    save,
    save_folder,
    single,
)
from PIL import Image
from safetensors.numpy import load_file
from torch_writer import Call, Global, New, Writer

import cir_jax
from cir_jax.checkpoint import abstract_params
from cir_jax.conversion import magiclens
from cir_jax.conversion.sources import open_source
from cir_jax.convert import convert, export
from cir_jax.methods.magiclens import MagicLensConfig

# Of the CLIP here: features, width of its words, width of its patches.
EMBED, WORD, PATCH = 24, 64, 128
NAMES = ("fti4cir", "pic2word", "searle", "lincir", "magiclens")


def drawn(shapes, seed=0):
    draw = np.random.default_rng(seed)
    return {
        name: (0.2 * draw.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()
    }


@functools.cache
def clip():
    """A CLIP with random numbers, by OpenAI's names."""
    made = drawn({name: x.shape for name, x in openai().items()})
    return {name: x + 1 if ".ln_" in name and "weight" in name else x for name, x in made.items()}


def network(name):
    """The tensors of a system's network, by their published names."""
    if name == "fti4cir":
        # A word is as wide as CLIP's features in every CLIP that FTI4CIR was made for; this one is none.
        shapes = golden.fti4cir_shapes(PATCH, EMBED, 6, 2, 32)
        shapes |= {f"phi_{x}.layers.6.weight": (WORD, 32) for x in "sa"}
        return drawn(shapes | {f"phi_{x}.layers.6.bias": (WORD,) for x in "sa"})
    if name == "pic2word":
        shapes = golden.linear_shapes("layers.0.0", EMBED, 32)
        shapes |= golden.linear_shapes("layers.1.0", 32, 32)
        return drawn(shapes | golden.linear_shapes("fc_out", 32, WORD))
    return drawn(golden.phi_shapes("", EMBED, 4 * EMBED, WORD))


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Many small programs run once each here: compiling them costs more than running them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# ---- the files, as their systems write them ----

HEADS, LAYERS = 2, 2


def module(writer, tensors, **attributes):
    """A pickled `IMG2TEXT`, whose parts are modules of the published classes."""
    parts = {}
    for name, x in tensors.items():
        *path, last = name.split(".")
        functools.reduce(lambda at, key: at.setdefault(key, {}), path, parts)[last] = x

    def made(tree, kind):
        ordered = lambda items: Call("collections.OrderedDict", ([*items],))
        wrap = lambda x: Call("torch._utils._rebuild_parameter", (writer.tensor(x), True, None))
        leaves = {k: x for k, x in tree.items() if isinstance(x, np.ndarray)}
        branches = {k: x for k, x in tree.items() if isinstance(x, dict)}
        state = {
            "training": True,
            "_parameters": ordered((k, wrap(x)) for k, x in leaves.items()),
            "_buffers": ordered(()),
            "_modules": ordered((k, made(x, kinds.get(k, LINEAR))) for k, x in branches.items()),
        }
        if kind.endswith("MultiHeadAttention"):
            state["num_heads"] = attributes.get("heads", 1)
        return New(kind, state)

    kinds = {
        "phi_s": "i2t_model.Phi",
        "phi_a": "i2t_model.Phi",
        "attn": f"{TOWER}MultiHeadAttention",
    }
    kinds |= {"transformer": f"{TOWER}Transformer", "mlp": f"{TOWER}MlpTransformer"}
    whole = made(parts, "i2t_model.IMG2TEXT")
    whole.state |= {"topk": 3, "epsilon": 0.17, "hy_regLoss": 1.4, "temperature": 0.2, "num_k": 6}
    whole.state |= {"criterion_target": writer.tensor(np.ones(1, np.int64))} | attributes
    whole.state["act"] = Global("torch.nn.functional.relu")
    return whole


LINEAR, TOWER = "torch.nn.modules.linear.Linear", "MHTransformer."


def magiclens_tree(width=EMBED, hidden=4 * EMBED, heads=HEADS):
    """Flax's parameters: the CLIP as Scenic lays it out, and random fusion layers."""
    flat, head = {}, 64
    for name, x in clip().items():
        tower = "visual" if name.startswith("visual.") else "text"
        name = name.removeprefix("visual.").replace("resblocks.", "resblocks_")
        *path, last = name.split(".")
        at = (tower, *path)
        if name == "logit_scale":
            flat["logit_scale",] = x
        elif last in ("in_proj_weight", "in_proj_bias"):
            for part, y in zip(("query", "key", "value"), np.split(x, 3)):
                y = y.T if y.ndim == 2 else y
                leaf = "kernel" if y.ndim == 2 else "bias"
                flat[*at, part, leaf] = y.reshape(*y.shape[:-1], -1, head)
        elif path and path[-1] == "out_proj":
            at = (*at[:-1], "out")
            flat[*at, "kernel" if x.ndim == 2 else "bias"] = (
                x.T.reshape(-1, head, len(x)) if x.ndim == 2 else x
            )
        elif last in ("proj", "text_projection"):
            flat[*at, last, "kernel"] = x
        elif last in ("class_embedding", "positional_embedding"):
            flat[*at, last] = x
        elif path[-1] == "token_embedding":
            flat[*at, "embedding"] = x
        elif path[-1] == "conv1":
            flat[*at, "kernel"] = x.transpose(2, 3, 1, 0)
        elif path[-1].startswith("ln_"):
            flat[*at, "scale" if last == "weight" else "bias"] = x
        else:
            flat[*at, "kernel" if last == "weight" else "bias"] = x.T
    head = drawn(magiclens_shapes(width, hidden, heads))
    whole = {("clip", *k): x for k, x in flat.items()} | {
        tuple(k.split("/")): x for k, x in head.items()
    }
    return {"params": traverse_util.unflatten_dict(whole)}


def magiclens_shapes(width, hidden, heads, layers=LAYERS):
    """What MagicLens has besides CLIP (fti4cir.md 5.4)."""

    def attention(name, inner):
        made = {f"{name}/post/w": (width, heads, inner // heads), f"{name}/post/b": (width,)}
        for part in ("query", "key", "value"):
            made[f"{name}/{part}/w"] = (width, heads, inner // heads)
            made[f"{name}/{part}/b"] = (heads, inner // heads)
        return made

    def norm(name):
        return {f"{name}/scale": (width,), f"{name}/bias": (width,)}

    shapes = {}
    for n in range(layers):
        at = f"multimodal_encoder/x_layers_{n}"
        shapes |= norm(f"{at}/layer_norm") | attention(f"{at}/self_attention", width)
        shapes |= norm(f"{at}/ff_layer/layer_norm")
        for layer, (a, b) in (("1", (width, hidden)), ("2", (hidden, width))):
            shapes[f"{at}/ff_layer/ffn_layer{layer}/linear/w"] = (a, b)
            shapes[f"{at}/ff_layer/ffn_layer{layer}/bias/b"] = (b,)
    at = "contrastive_multimodal_pooler"
    shapes |= attention(f"{at}/pool_attn", 4 * width) | norm(f"{at}/pool_attn_ln")
    shapes[f"{at}/pooling_attn_query"] = (1, width)
    shapes[f"{at}/pool_attn/per_dim_scale/per_dim_scale"] = (4 * width // heads,)
    return shapes


def source_of(name, folder):
    """(file, parts, options, tensors that an export of its model has) of a system."""
    path, writer, own = folder / f"{name}.pt", Writer(), {}
    beside = {"clip": str(save(folder / "clip.safetensors", clip()))}
    options = {"activation": "quick_gelu"}
    if name == "magiclens":
        tree = magiclens_tree()
        path.write_bytes(pickle.dumps(serialization.to_bytes(tree)))
        return path, {}, {}, traverse_util.flatten_dict(tree, sep=".")
    own = network(name)
    tensors = {key: writer.tensor(x) for key, x in own.items()}
    if name == "fti4cir":
        value = module(writer, own)
    elif name == "pic2word":
        inside = {f"module.{key}": writer.tensor(np.asarray(x)) for key, x in clip().items()}
        moments = {"state": {0: {"exp_avg": writer.tensor(np.ones(3, np.float32))}}}
        value = {
            "epoch": 30,
            "name": "pic2word",
            "state_dict": inside,
            "state_dict_img2text": {f"module.{key}": x for key, x in tensors.items()},
            "optimizer": moments | {"param_groups": [{"lr": 0.1}]},
        }
        beside = {}
    else:
        value = {"epoch": 7, "Phi": tensors}
    path.write_bytes(writer.zip(value))
    return path, beside, options, own | {f"clip.{key}": x for key, x in clip().items()}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """By name: (folder of the model, what its export should hold, what was converted)."""

    @functools.cache
    def make(name):
        folder = tmp_path_factory.mktemp(name)
        path, parts, options, tensors = source_of(name, folder)
        done = convert(path, folder / "model", name, parts=parts, **options)
        return folder / "model", tensors, done

    return make


# ---- numbers ----


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The parameters of the CLIP, converted by itself."""
    folder = tmp_path_factory.mktemp("clip")
    source = save(folder / "clip.safetensors", clip())
    convert(source, folder / "model", "clip", activation="quick_gelu")
    return cir_jax.load(folder / "model")


@pytest.mark.parametrize("name", NAMES)
def test_its_clip_is_that_clip(name, converted, alone):
    folder, _, done = converted(name)
    model = cir_jax.load(folder)
    jax.tree.map(np.testing.assert_array_equal, model.params["clip"], alone.params)
    for field in ("vision", "text", "embed", "activation", "epsilon"):
        assert getattr(model.config, field) == getattr(alone.config, field)
    image = model.config.inputs.image
    expected = {"fti4cir": "targetpad", "searle": "targetpad", "magiclens": "squash"}
    assert image.resize == expected.get(name, "short")
    assert image.crop_offset == ("floor" if name == "lincir" else "round")
    assert image.scale_by_brightest == (name == "magiclens")
    assert sum("state of training" in why for why in done.ignored.values()) == (name == "pic2word")


def phi(tensors, x, names, activation):
    for n, name in enumerate(names):
        x = x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]
        x = activation(x) if n < 2 else x
    return x


@pytest.mark.parametrize("name", ["pic2word", "searle", "lincir"])
def test_the_network_computes_what_its_tensors_say(name, converted):
    folder, tensors, _ = converted(name)
    model = cir_jax.load(folder)
    features = np.random.default_rng(0).normal(size=(3, EMBED)).astype(np.float32)
    found = nnx.merge(model.graph, model.params).tokens(features)[:, 0]
    names = [f"layers.{n}" for n in (0, 3, 6)]
    act = functools.partial(jax.nn.gelu, approximate=False)
    if name == "pic2word":
        names, act = ["layers.0.0", "layers.1.0", "fc_out"], jax.nn.relu
    np.testing.assert_allclose(found, phi(tensors, features, names, act), atol=1e-5)


def test_the_module_of_fti4cir_tells_its_settings(converted):
    config = cir_jax.load(converted("fti4cir")[0]).config
    assert (config.attributes, config.kept, config.threshold) == (6, 3, 0.17)
    assert (config.attribute_layers, config.attribute_heads, config.mapper_hidden) == (2, 1, 32)
    assert "topk 3, epsilon 0.17, num_heads 1" in converted("fti4cir")[2].notes[0]


def test_a_state_dict_of_fti4cir_needs_a_word(tmp_path, converted):
    source = save(tmp_path / "state.safetensors", network("fti4cir"))
    parts = {"clip": save(tmp_path / "clip.safetensors", clip())}
    with pytest.raises(ValueError, match=r"does not tell topk, epsilon, .*--variant published"):
        convert(source, tmp_path / "a", "fti4cir", parts=parts, activation="quick_gelu")
    options = {"parts": parts, "activation": "quick_gelu", "variant": "published"}
    # Six attributes are fewer than the published twelve that are kept.
    with pytest.raises(ValueError, match="kept is 12 of 6"):
        convert(source, tmp_path / "a", "fti4cir", **options)
    wide = network("fti4cir") | drawn({"templates": (1, 24, PATCH)})
    convert(save(tmp_path / "b.safetensors", wide), tmp_path / "b", "fti4cir", **options)
    config = cir_jax.load(tmp_path / "b").config
    assert (config.attributes, config.kept, config.threshold) == (24, 12, 0.05)
    assert not (tmp_path / "a").exists()


def test_clip_of_hugging_face(tmp_path, converted):
    """Another layout of the same CLIP gives the same numbers, its folder the same transform but for LinCIR's."""
    path, _, _, _ = source_of("searle", tmp_path)
    folder = save_folder(tmp_path / "hf", hugging_face(clip()), HUGGING_FACE)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3}))
    done = convert(path, tmp_path / "model", "searle", parts={"clip": folder})
    assert done.modules == converted("searle")[2].modules
    assert cir_jax.load(tmp_path / "model").config.inputs.image.mean == (0.5, 0.5, 0.5)


# ---- there and back ----


@pytest.mark.parametrize("name", NAMES)
def test_an_export_comes_back(name, converted, tmp_path):
    folder, tensors, done = converted(name)
    assert export(folder, tmp_path / "x.safetensors") == len(tensors)
    back = load_file(tmp_path / "x.safetensors")
    assert back.keys() == tensors.keys()
    for key, x in tensors.items():
        np.testing.assert_array_equal(back[key], x, err_msg=key, strict=True)
    # All that the original's names do not say is noted in the file, so no options.
    again = convert(tmp_path / "x.safetensors", tmp_path / "again", name)
    assert again.fingerprint == done.fingerprint and again.modules == done.modules


def test_the_command(tmp_path, converted):
    path, parts, _, _ = source_of("lincir", tmp_path)
    arguments = [path, f"clip={parts['clip']}", tmp_path / "model", "--method", "lincir"]
    done = processes.run("cir_jax.convert", *arguments, "--activation", "quick_gelu")
    assert done.returncode == 0, done.stderr.decode()
    assert converted("lincir")[2].fingerprint in done.stdout.decode()
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert manifest["about"]["converted"]["source"] == "lincir.pt clip=clip.safetensors"


# ---- searched with ----


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_and_a_text_find_pictures(name, converted):
    model = cir_jax.load(converted(name)[0])
    draw = np.random.default_rng(0)
    pictures = [
        Image.fromarray(draw.integers(0, 255, (h, w, 3), np.uint8))
        for h, w in ((64, 96), (90, 64), (64, 64))
    ]
    items = model.encode("item", [{"image": each} for each in pictures])
    asked = [{"image": x, "text": text} for x in pictures[:2] for text in ("is red", "is blue")]
    queries = model.encode("query", asked)
    assert items.shape == (3, EMBED) and queries.shape == (4, EMBED)
    np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1, atol=1e-5)
    index = cir_jax.ExactIndex(items, ids=["a", "b", "c"])
    hits = index.search(queries, 2)
    np.testing.assert_array_equal(hits.rows, np.argsort(-(queries @ items.T), kind="stable")[:, :2])
    for first, second in ((0, 1), (0, 2)):  # the text matters, and the picture does
        assert np.abs(queries[first] - queries[second]).max() > 1e-3


# ---- faults ----

FAULTS = {
    "missing": ("missing layers.3.bias", {"layers.3.bias": None}),
    "left over": ("left over surprise", {"surprise": np.zeros(2, np.float32)}),
    "shape": (
        r"layers\.3\.weight: found shape \[96, 95\], expected \[96, 96\]",
        {"layers.3.weight": np.zeros((96, 95), np.float32)},
    ),
    "type": ("layers.3.bias: found int64", {"layers.3.bias": np.zeros(96, np.int64)}),
    "CLIP's": (r"missing clip\.visual\.proj", {"clip.visual.proj": None}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told(fault, tmp_path):
    message, change = FAULTS[fault]
    made = {"": network("searle"), "clip": dict(clip())}
    for name, x in change.items():
        part = made["clip" if name.startswith("clip.") else ""]
        name = name.removeprefix("clip.")
        part.pop(name, None)
        part |= {} if x is None else {name: x}
    source = save(tmp_path / "phi.safetensors", made[""])
    parts = {"clip": save(tmp_path / "clip.safetensors", made["clip"])}
    with pytest.raises(ValueError, match=message) as error:
        convert(source, tmp_path / "model", "searle", parts=parts, activation="quick_gelu")
    assert "1 fault:" in str(error.value)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "name, parts, message",
    [
        ("lincir", {}, "does not hold the CLIP .* put clip=FILE"),
        ("lincir", {"text": "x"}, "one source, perhaps with clip=SOURCE; found text besides"),
        ("magiclens", {"clip": "x"}, "magiclens is made of one source; found clip besides"),
        ("lincir", {"clip": "itself"}, "this is no CLIP in a known layout"),
        ("fti4cir", {"clip": "itself"}, "no FTI4CIR's IMG2TEXT: .* 0 are called templates"),
        ("pic2word", {"clip": "itself"}, "0 are called layers.0.0.weight"),
        ("magiclens", {}, "this is no MagicLens"),
    ],
)
def test_sources_that_do_not_fit(name, parts, message, tmp_path):
    source = save(tmp_path / "phi.safetensors", network("searle"))
    parts = {key: source if x == "itself" else x for key, x in parts.items()}
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "model", name, parts=parts, activation="quick_gelu")
    assert not (tmp_path / "model").exists()


def test_words_of_single_pictures_are_no_model(tmp_path):
    writer = Writer()
    (tmp_path / "oti.pt").write_bytes(writer.zip(writer.tensor(np.zeros((5, WORD), np.float32))))
    with pytest.raises(ValueError, match=r"SEARLE-OTI .* are no model"):
        convert(tmp_path / "oti.pt", tmp_path / "model", "searle")


def test_two_clips_are_one_too_many(tmp_path):
    path, _, options, _ = source_of("pic2word", tmp_path)
    parts = {"clip": tmp_path / "clip.safetensors"}
    with pytest.raises(
        ValueError,
        match=r"there are several CLIPs, in the file behind 'state_dict\.module\.', by clip=;",
    ):
        convert(path, tmp_path / "model", "pic2word", parts=parts, **options)


@pytest.mark.parametrize(
    "change, message",
    [({"topk": "x"}, "topk 'x'"), ({"topk": 2.5}, "topk 2.5"), ({"epsilon": -1.0}, "epsilon -1.0")]
    + [({"topk": None}, "topk"), ({"epsilon": float("nan")}, "epsilon nan")],
)
def test_settings_that_are_no_numbers(change, message, tmp_path):
    writer = Writer()
    (tmp_path / "a.pt").write_bytes(writer.zip(module(writer, network("fti4cir"), **change)))
    parts = {"clip": save(tmp_path / "clip.safetensors", clip())}
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "a.pt", tmp_path / "b", "fti4cir", parts=parts, activation="gelu")


@pytest.mark.parametrize("change", ["missing", "left over", "shape"])
def test_a_fault_of_magiclens_is_told(change, tmp_path):
    tree = single(traverse_util.flatten_dict(magiclens_tree(), sep="/"))
    name = "params/contrastive_multimodal_pooler/pool_attn/post/w"
    if change == "missing":
        del tree[name]
    else:
        tree[name if change == "shape" else f"{name}2"] = np.zeros((24, 96), np.float32)
    (tmp_path / "a").write_bytes(
        serialization.to_bytes(traverse_util.unflatten_dict(tree, sep="/"))
    )
    with pytest.raises(ValueError, match=r"pool_attn\.post\.w") as error:
        convert(tmp_path / "a", tmp_path / "model", "magiclens")
    assert "1 fault:" in str(error.value) and change in str(error.value)


# ---- files of flax ----

TREE = {
    "a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "c": np.ones((), np.int64)},
    "long": {f"x{n}": np.full((n, 1), n, np.float16) for n in range(40)},
    "big": np.zeros(70_000, np.float32),
}


@pytest.mark.parametrize("protocol", [None, 3, 4, 5])
@pytest.mark.parametrize("tree", [TREE, TREE["a"]], ids=["large", "small"])
def test_what_flax_writes_is_read_as_flax_reads_it(protocol, tree, tmp_path):
    data = serialization.to_bytes(tree)
    expected = traverse_util.flatten_dict(serialization.msgpack_restore(data), sep=".")
    (tmp_path / "x").write_bytes(data if protocol is None else pickle.dumps(data, protocol))
    source = open_source(tmp_path / "x")
    assert source.layout == "flax" and source.tensors.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(source.tensors[name], x, strict=True)


def text(word):
    return bytes([0xA0 + len(word)]) + word.encode()


def array(shape=b"\x91\x02", dtype="float32", data=b"\xc4\x08" + bytes(8), kind=1):
    body = b"\x93" + shape + text(dtype) + data
    return bytes([0xC7, len(body), kind]) + body


@pytest.mark.parametrize(
    "data, message",
    [
        (b"\x81" + text("a") + b"\xc3", "kind 0xc3, no dictionary or array"),
        (b"\x81" + text("a") + array(kind=2), "extension of kind 2"),
        (b"\x81" + text("a") + array(dtype="object"), 'dtype "object"'),
        (b"\x81" + text("a") + array(shape=b"\x91\x03"), "float32 has 8 bytes"),
        (b"\x81" + text("a") + array(shape=b"\x91\xa0"), "no list of numbers"),
        (b"\x81" + text("a") + array()[:-1], "should lie at byte"),
        (b"\x81" + text("a") + array() + b"\0", "ends at byte"),
        (b"\x82" + 2 * (text("a") + array()), "two entries are called"),
        (b"\x81" + text("a") + b"\x80", "holds no tensors"),
        (b"\xdf\xff\xff\xff\xff" + text("a") + array(), "should lie at byte"),
        ((b"\x81" + text("a")) * 70 + array(), "nested deeper"),
        (b"\x81" + text("__msgpack_chunked_array__") + b"\xc3", "in pieces"),
        (pickle.dumps(serialization.to_bytes(TREE))[:-100_000], "the file ends at"),
        (pickle.dumps((serialization.to_bytes(TREE["a"]), 1)), "more than that"),
        (pickle.dumps(b"text"), "MessagePack"),
    ],
)
def test_other_files_are_refused(data, message, tmp_path):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / "x")
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / "x", "*")


def test_published_sizes_of_magiclens():
    for size, leaves, parameters in (("base", 474, 166_433_025), ("large", 666, 465_417_665)):
        config = MagicLensConfig.paper(size)
        _, tree = abstract_params(config)
        shapes = {k: x.shape for k, x in traverse_util.flatten_dict(tree, sep="/").items()}
        found = {
            name: each.source_shape(shapes)
            for each in magiclens.rules(config)
            for name in each.names(shapes)
        }
        assert (len(found), sum(map(np.prod, found.values()))) == (leaves, parameters)
        heads, width = config.fusion_heads, config.embed
        expected = magiclens_shapes(width, 4 * width, heads, 4)
        assert {k.replace("/", "."): x for k, x in expected.items()}.items() <= found.items()
        tower = config.vision
        kernel = "clip.visual.transformer.resblocks_3.attn.query.kernel"
        assert found[kernel] == (tower.width, tower.heads, 64)
        assert found[kernel.replace("query", "out")] == (tower.heads, 64, tower.width)
        assert found["clip.visual.conv1.kernel"] == (tower.patch, tower.patch, 3, tower.width)
