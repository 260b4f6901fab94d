"""Weights by formula under the original's names, and their places in `Cfir` (cfir.md 2.2, 2.5)."""

import jax
import numpy as np

from cir_jax.encoders.beit3 import Beit3Config

EXPERTS = {"image": "A", "text": "B"}
# original: the adapter called "text" runs in the picture tower, and the other way round
ADAPTERS = {"image": "adaptmlp_text", "text": "adaptmlp_vision"}


def shapes(config: Beit3Config) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a retrieval checkpoint without adapters and enhancer."""
    d, patches = config.width, (config.size // config.patch) ** 2
    table = {
        "logit_scale": (),
        "beit3.text_embed.weight": (config.vocabulary, d),
        "beit3.vision_embed.mask_token": (1, 1, d),
        "beit3.vision_embed.cls_token": (1, 1, d),
        "beit3.vision_embed.proj.weight": (d, 3, config.patch, config.patch),
        "beit3.vision_embed.proj.bias": (d,),
        "beit3.encoder.embed_positions.A.weight": (patches + 3, d),
        "beit3.encoder.embed_positions.B.weight": (config.length + 2, d),
        "language_head.weight": (d, d),
        "vision_head.weight": (d, d),
    }
    for e in "AB":
        table |= _norm_shapes(f"beit3.encoder.layer_norm.{e}", d)
        for i in range(config.layers):
            table |= _layer_shapes(f"beit3.encoder.layers.{i}", e, d, config.hidden)
    return table


def _layer_shapes(layer, e, d, hidden):
    table = {}
    for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
        table |= _linear_shapes(f"{layer}.self_attn.{name}.{e}", d, d)
    for name in ("self_attn.inner_attn_ln", "self_attn_layer_norm", "final_layer_norm"):
        table |= _norm_shapes(f"{layer}.{name}.{e}", d)
    return table | _feed_shapes(f"{layer}.ffn.{e}", d, hidden)


def _feed_shapes(name, d, hidden):
    return {
        **_linear_shapes(f"{name}.fc1", d, hidden),
        **_linear_shapes(f"{name}.fc2", hidden, d),
        **_norm_shapes(f"{name}.ffn_layernorm", hidden),
    }


def _linear_shapes(name, inputs, outputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm_shapes(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def adapter_shapes(config: Beit3Config) -> dict[str, tuple[int, ...]]:
    """Keys that the adapters of a config add."""
    table = {}
    for i in range(config.layers):
        for tower in config.adapter.towers:
            name = f"beit3.encoder.layers.{i}.{ADAPTERS[tower]}"
            table |= _linear_shapes(f"{name}.down_proj", config.width, config.adapter.width)
            table |= _linear_shapes(f"{name}.up_proj", config.adapter.width, config.width)
    return table


def enhancer_shapes(config: Beit3Config) -> dict[str, tuple[int, ...]]:
    """Keys that the enhancer of a config adds."""
    table = {}
    for i in range(config.layers):
        for e in EXPERTS.values():
            name = f"beit3.encoder.layers.{i}.enhancemlp.{e}"
            table |= _feed_shapes(name, config.width, config.enhancer)
    return table


def filled(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Key number k in sorted order from seed k."""
    return _filled(shapes, 0) | {"logit_scale": np.asarray(2.0)}


def filled_adapters(shapes) -> dict[str, np.ndarray]:
    """Weights and biases of adapters alike."""
    return {
        key: _rounded(0.3 * np.random.RandomState(500 + j).standard_normal(shapes[key]))
        for j, key in enumerate(sorted(shapes))
    }


def filled_enhancer(shapes) -> dict[str, np.ndarray]:
    return _filled(shapes, 700)


def _filled(shapes, first):
    return {
        key: _rounded(_values(key, np.random.RandomState(first + k).standard_normal(shapes[key])))
        for k, key in enumerate(sorted(shapes))
    }


def _values(key, w):
    if np.ndim(w) == 1 and key.endswith("weight"):
        return 1 + 0.1 * w
    return (0.1 if key.endswith("bias") else 0.3) * w


def _rounded(w):
    """The formula ends in float32; float64 carries the same numbers."""
    return np.asarray(w, np.float32).astype(np.float64)


def params(tensors: dict[str, np.ndarray], config: Beit3Config) -> dict:
    """The tensors as parameters of `Cfir`."""
    t = tensors
    image = {
        "patch_kernel": t["beit3.vision_embed.proj.weight"].transpose(2, 3, 1, 0),
        "patch_bias": t["beit3.vision_embed.proj.bias"],
        "class_token": t["beit3.vision_embed.cls_token"].reshape(-1),
        "mask_token": t["beit3.vision_embed.mask_token"].reshape(-1),
        "expert": _expert(t, "image", config),
    }
    text = {"embedding": t["beit3.text_embed.weight"], "expert": _expert(t, "text", config)}
    return {
        "logit_scale": t["logit_scale"],
        "image": image,
        "text": text,
        "image_project": {"kernel": t["vision_head.weight"].T},
        "text_project": {"kernel": t["language_head.weight"].T},
    }


def _expert(t, tower, config):
    e = EXPERTS[tower]
    blocks = [_block(t, f"beit3.encoder.layers.{i}", tower, config) for i in range(config.layers)]
    return {
        "positions": t[f"beit3.encoder.embed_positions.{e}.weight"],
        "blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *blocks),
        "ln_final": _norm(t, f"beit3.encoder.layer_norm.{e}"),
    }


def _block(t, layer, tower, config):
    e = EXPERTS[tower]
    attention = {
        name: _linear(t, f"{layer}.self_attn.{original}.{e}")
        for name, original in (
            ("query", "q_proj"),
            ("key", "k_proj"),
            ("value", "v_proj"),
            ("out", "out_proj"),
        )
    }
    block = {
        "ln1": _norm(t, f"{layer}.self_attn_layer_norm.{e}"),
        "attention": {**attention, "ln": _norm(t, f"{layer}.self_attn.inner_attn_ln.{e}")},
        "ln2": _norm(t, f"{layer}.final_layer_norm.{e}"),
        "mlp": _feed(t, f"{layer}.ffn.{e}"),
    }
    if tower in config.adapter.towers:
        name = f"{layer}.{ADAPTERS[tower]}"
        block["adapter"] = {
            "down": _linear(t, f"{name}.down_proj"),
            "up": _linear(t, f"{name}.up_proj"),
        }
    if config.enhancer:
        block["enhancer"] = _feed(t, f"{layer}.enhancemlp.{e}")
    return block


def _feed(t, name):
    return {
        "up": _linear(t, f"{name}.fc1"),
        "ln": _norm(t, f"{name}.ffn_layernorm"),
        "down": _linear(t, f"{name}.fc2"),
    }


def _linear(t, name):
    return {"kernel": t[f"{name}.weight"].T, "bias": t[f"{name}.bias"]}


def _norm(t, name):
    return {"scale": t[f"{name}.weight"], "bias": t[f"{name}.bias"]}
