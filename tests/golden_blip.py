"""Tiny BLIP models with weights by formula, as the specification of the golden values defines them.

(candidate_reranking.md 14.1 to 14.3; names and shapes are those of the original state dicts.)
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cir_jax.data.images import ImageSpec
from cir_jax.data.inputs import Inputs
from cir_jax.encoders.bert import BertConfig
from cir_jax.encoders.vit import VitConfig
from cir_jax.methods.blip_cir import BlipCir, BlipCirConfig
from cir_jax.methods.blip_rerank import BlipRerank, BlipRerankConfig

WIDTH, LAYERS, MERGE_FROM = 32, 8, 6
IMAGE = VitConfig(size=32, patch=8, width=WIDTH, layers=3, heads=4)
TEXT = BertConfig(
    vocabulary=60,
    length=20,
    width=WIDTH,
    layers=LAYERS,
    heads=4,
    hidden=64,
    types=0,
    image_width=WIDTH,
)
INPUTS = Inputs(image=ImageSpec(size=32))
IDS = np.array([[2, 7, 19, 33, 4, 3], [2, 11, 5, 3, 0, 0], [2, 41, 28, 9, 3, 0]], np.int32)


def linears(sizes):
    """Weight and bias shapes of PyTorch linear layers (outputs, inputs) and of norms (width,)."""
    return {f"{k}.weight": s for k, s in sizes.items()} | {
        f"{k}.bias": s[:1] for k, s in sizes.items()
    }


def _vit_shapes(image):
    width, rows = image.width, 1 + (image.size // image.patch) ** 2
    sizes = {"patch_embed.proj": (width, 3, image.patch, image.patch), "norm": (width,)}
    for n in range(image.layers):
        block = {
            "norm1": (width,),
            "norm2": (width,),
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "mlp.fc1": (4 * width, width),
            "mlp.fc2": (width, 4 * width),
        }
        sizes |= {f"blocks.{n}.{k}": s for k, s in block.items()}
    shapes = linears(sizes) | {"cls_token": (1, 1, width), "pos_embed": (1, rows, width)}
    return {f"visual_encoder.{k}": s for k, s in shapes.items()}


def _text_shapes(text, branches, merge_from=None):
    """`branches`: pairs of suffixes, of linear layers and of norms; `merge_from` None: there are no merge layers."""
    width = text.width
    sizes = {"embeddings.LayerNorm": (width,)}
    for n in range(text.layers):
        layer = {
            "intermediate.dense": (text.hidden, width),
            "output.dense": (width, text.hidden),
            "output.LayerNorm": (width,),
        }
        for kind, seen in (("attention", width), ("crossattention", text.image_width)):
            for number, letter in branches:
                inputs = {"query": width, "key": seen, "value": seen}
                layer |= {f"{kind}.self{number}.{role}": (width, n) for role, n in inputs.items()}
                layer[f"{kind}.output.dense{number}"] = (width, width)
                layer[f"{kind}.output.LayerNorm{letter}"] = (width,)
        if merge_from is not None and n >= merge_from:
            layer["crossattention.output.merge_layer"] = (width, 2 * width)
        sizes |= {f"encoder.layer.{n}.{k}": s for k, s in layer.items()}
    shapes = linears(sizes) | {
        "embeddings.word_embeddings.weight": (text.vocabulary, width),
        "embeddings.position_embeddings.weight": (text.length, width),
    }
    return {f"text_encoder.{k}": s for k, s in shapes.items()}


def stage1_shapes(image=IMAGE, text=TEXT, embed=16):
    heads = linears({"vision_proj": (embed, image.width), "text_proj": (embed, text.width)})
    return _vit_shapes(image) | _text_shapes(text, [("", "")]) | heads | {"temp": ()}


def stage2_shapes(image=IMAGE, text=TEXT):
    width = text.width
    head = linears({"cls_head.0": (width, 2 * width), "cls_head.2": (2, width)})
    branches = [("0", "A"), ("1", "B")]
    return _vit_shapes(image) | _text_shapes(text, branches, MERGE_FROM) | head


def filled(shapes, base):
    """The tensors of a state dict, float32 values."""
    return {
        key: np.float32(_values(key, shapes[key], base + j)) for j, key in enumerate(sorted(shapes))
    }


def _values(key, shape, seed):
    if key == "temp":
        return 0.07
    w = np.random.RandomState(seed).standard_normal(shape)
    if key.endswith(".bias"):
        return 0.05 * w
    if len(shape) == 1:
        return 1 + 0.1 * w
    return (0.3 if key.endswith(("query.weight", "key.weight", "qkv.weight")) else 0.15) * w


def stage1_tensors():
    return filled(stage1_shapes(), 1000)


def stage2_tensors():
    return filled(stage2_shapes(), 5000)


def stage1_params(t):
    """The same numbers as parameters of `BlipCir`."""
    return {
        "image": vit_params(t),
        "text": text_params(t, 0, LAYERS, _block),
        "image_project": _linear(t, "vision_proj"),
        "text_project": _linear(t, "text_proj"),
        "temperature": t["temp"],
    }


def stage2_params(t, fusion, merge_from=MERGE_FROM):
    """The same numbers as parameters of `BlipRerank`; `fusion` are those of stage I's text encoder."""
    mean = text_params(t, 0, merge_from, _two_branch_block)
    blocks = {"mean": mean["blocks"]}
    if merge_from < LAYERS:
        blocks["linear"] = text_params(t, merge_from, LAYERS, _two_branch_block)["blocks"]
    return {
        "image": vit_params(t),
        "fusion": fusion,
        "text": {"embeddings": mean["embeddings"], "blocks": blocks},
        "head": {"up": _linear(t, "cls_head.0"), "down": _linear(t, "cls_head.2")},
    }


def vit_params(t):
    name = "visual_encoder"
    return {
        "patch_kernel": t[f"{name}.patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "patch_bias": t[f"{name}.patch_embed.proj.bias"],
        "class_token": t[f"{name}.cls_token"][0, 0],
        "positions": t[f"{name}.pos_embed"][0],
        "blocks": stacked([_vit_block(t, f"{name}.blocks.{n}") for n in range(IMAGE.layers)]),
        "ln_post": _norm(t, f"{name}.norm"),
    }


def text_params(t, start, stop, block):
    """Embeddings, and the layers from `start` to before `stop` stacked."""
    name = "text_encoder.embeddings"
    layers = [block(t, f"text_encoder.encoder.layer.{n}") for n in range(start, stop)]
    embeddings = {
        "embedding": t[f"{name}.word_embeddings.weight"],
        "positions": t[f"{name}.position_embeddings.weight"],
        "ln": _norm(t, f"{name}.LayerNorm"),
    }
    return {"embeddings": embeddings, "blocks": stacked(layers)}


def stacked(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def _linear(t, name):
    return {"kernel": t[f"{name}.weight"].T, "bias": t[f"{name}.bias"]}


def _norm(t, name):
    return {"scale": t[f"{name}.weight"], "bias": t[f"{name}.bias"]}


def _vit_block(t, name):
    weights = np.split(t[f"{name}.attn.qkv.weight"], 3)
    biases = np.split(t[f"{name}.attn.qkv.bias"], 3)
    attention = {
        role: {"kernel": w.T, "bias": b}
        for role, w, b in zip(("query", "key", "value"), weights, biases)
    }
    return {
        "ln1": _norm(t, f"{name}.norm1"),
        "attention": attention | {"out": _linear(t, f"{name}.attn.proj")},
        "ln2": _norm(t, f"{name}.norm2"),
        "mlp": {"up": _linear(t, f"{name}.mlp.fc1"), "down": _linear(t, f"{name}.mlp.fc2")},
    }


def _branch(t, name, number="", letter=""):
    attention = lambda kind: {
        **{r: _linear(t, f"{name}.{kind}.self{number}.{r}") for r in ("query", "key", "value")},
        "out": _linear(t, f"{name}.{kind}.output.dense{number}"),
    }
    return {
        "attention": attention("attention"),
        "ln1": _norm(t, f"{name}.attention.output.LayerNorm{letter}"),
        "cross": attention("crossattention"),
        "ln2": _norm(t, f"{name}.crossattention.output.LayerNorm{letter}"),
    }


def _feed_forward(t, name):
    return {
        "mlp": {
            "up": _linear(t, f"{name}.intermediate.dense"),
            "down": _linear(t, f"{name}.output.dense"),
        },
        "ln3": _norm(t, f"{name}.output.LayerNorm"),
    }


def _block(t, name):
    return {"branch": _branch(t, name), **_feed_forward(t, name)}


def _two_branch_block(t, name):
    merge = f"{name}.crossattention.output.merge_layer"
    return {
        "fused": _branch(t, name, "0", "A"),
        "text": _branch(t, name, "1", "B"),
        **({"merge": _linear(t, merge)} if f"{merge}.weight" in t else {}),
        **_feed_forward(t, name),
    }


def module(kind, config, params, dtype):
    """A method's module with given parameters, whose shapes must be exactly those of the config."""
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    graph, state = nnx.split(nnx.eval_shape(lambda: kind(config, nnx.Rngs(0))))
    expected = jax.tree.map(lambda x: x.shape, nnx.to_pure_dict(state))
    assert jax.tree.map(lambda x: x.shape, params) == expected
    return nnx.merge(graph, params)


def stage1(dtype, params=None, **changes):
    """The stage I model."""
    config = BlipCirConfig(image=IMAGE, text=TEXT, embed=16, inputs=INPUTS, **changes)
    params = stage1_params(stage1_tensors()) if params is None else params
    return module(BlipCir, config, params, dtype)


def stage2(dtype, params=None, merge_from=MERGE_FROM, **changes):
    """The stage II model, whose fusion encoder is that of the stage I model."""
    config = BlipRerankConfig(
        image=IMAGE, text=TEXT, merge_from=merge_from, inputs=INPUTS, **changes
    )
    if params is None:
        fusion = stage1_params(stage1_tensors())["text"]
        params = stage2_params(stage2_tensors(), fusion, merge_from)
    return module(BlipRerank, config, params, dtype)


def references(dtype):
    return _pictures(1, 3).astype(dtype)


def candidates(dtype):
    """Candidates 0, 1 and 2 are the targets of the three queries."""
    return _pictures(2, 4).astype(dtype)


def _pictures(seed, count):
    pixels = np.random.RandomState(seed).uniform(-1, 1, (count, 3, 32, 32))
    return np.float32(pixels).transpose(0, 2, 3, 1)


def query(dtype):
    """The three queries as a model reads them."""
    return {"image": references(dtype), "text": IDS, "text_mask": IDS != 0}
