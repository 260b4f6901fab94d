"""Weights by formula, as the specification of the golden values defines them (react.md 4.10)."""

import numpy as np


def filled(shapes: dict[str, tuple[int, ...]], logit_scale: float) -> dict[str, np.ndarray]:
    """A PyTorch-style state dict, float64, whose numbers depend on the sorted position of each key."""
    return {
        key: _values(i, key, shape, logit_scale)
        for i, (key, shape) in enumerate(sorted(shapes.items()))
    }


def _values(position, key, shape, logit_scale):
    if key == "logit_scale":
        return np.asarray(logit_scale)
    j = np.arange(int(np.prod(shape)), dtype=np.int64)
    v = ((j * 1103515245 + position * 12345 + 777) % 2**31) / 2**31 - 0.5
    v = 4 * v / np.sqrt(np.prod(shape[1:])) if len(shape) == 4 else 0.2 * v
    if len(shape) == 1 and key.endswith(".weight"):
        v = v + 1.0
    return v.reshape(shape)


def clip_shapes(embed, patch, grid, width, layers, text_width, text_layers, context, vocabulary):
    """Keys and shapes of OpenAI's CLIP with a vision transformer."""
    shapes = {
        "positional_embedding": (context, text_width),
        "text_projection": (text_width, embed),
        "logit_scale": (),
        "token_embedding.weight": (vocabulary, text_width),
        "ln_final.weight": (text_width,),
        "ln_final.bias": (text_width,),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (grid**2 + 1, width),
        "visual.proj": (width, embed),
        "visual.conv1.weight": (width, 3, patch, patch),
    }
    for norm in ("ln_pre", "ln_post"):
        shapes |= {f"visual.{norm}.weight": (width,), f"visual.{norm}.bias": (width,)}
    for tower, n, w in (("visual.", layers, width), ("", text_layers, text_width)):
        for layer in range(n):
            shapes |= _block_shapes(f"{tower}transformer.resblocks.{layer}.", w)
    return shapes


def _block_shapes(prefix, w):
    shapes = {
        "attn.in_proj_weight": (3 * w, w),
        "attn.in_proj_bias": (3 * w,),
        "attn.out_proj.weight": (w, w),
        "attn.out_proj.bias": (w,),
        "mlp.c_fc.weight": (4 * w, w),
        "mlp.c_fc.bias": (4 * w,),
        "mlp.c_proj.weight": (w, 4 * w),
        "mlp.c_proj.bias": (w,),
    }
    for norm in ("ln_1", "ln_2"):
        shapes |= {f"{norm}.weight": (w,), f"{norm}.bias": (w,)}
    return {prefix + key: shape for key, shape in shapes.items()}


def clip_params(tensors: dict[str, np.ndarray]) -> dict:
    """The same numbers as parameters of `cir_jax.methods.clip.Clip`."""
    t = tensors
    return {
        "logit_scale": t["logit_scale"],
        "image": {
            "patch_kernel": t["visual.conv1.weight"].transpose(2, 3, 1, 0),
            "class_token": t["visual.class_embedding"],
            "positions": t["visual.positional_embedding"],
            "ln_pre": _norm(t, "visual.ln_pre"),
            "ln_post": _norm(t, "visual.ln_post"),
            "project": {"kernel": t["visual.proj"]},
            "blocks": _blocks(t, "visual."),
        },
        "text": {
            "embedding": t["token_embedding.weight"],
            "positions": t["positional_embedding"],
            "ln_final": _norm(t, "ln_final"),
            "project": {"kernel": t["text_projection"]},
            "blocks": _blocks(t, ""),
        },
    }


def _norm(t, name):
    return {"scale": t[f"{name}.weight"], "bias": t[f"{name}.bias"]}


def _blocks(t, tower):
    layers = len({k for k in t if k.startswith(f"{tower}transformer.") and k.endswith("ln_1.bias")})
    blocks = [_block(t, f"{tower}transformer.resblocks.{i}") for i in range(layers)]
    import jax

    return jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)


def _block(t, name):
    linear = lambda weight, bias: {"kernel": weight.T, "bias": bias}
    weights = np.split(t[f"{name}.attn.in_proj_weight"], 3)
    biases = np.split(t[f"{name}.attn.in_proj_bias"], 3)
    attention = {
        part: linear(w, b) for part, w, b in zip(("query", "key", "value"), weights, biases)
    }
    attention["out"] = linear(t[f"{name}.attn.out_proj.weight"], t[f"{name}.attn.out_proj.bias"])
    return {
        "ln1": _norm(t, f"{name}.ln_1"),
        "ln2": _norm(t, f"{name}.ln_2"),
        "attention": attention,
        "mlp": {
            "up": linear(t[f"{name}.mlp.c_fc.weight"], t[f"{name}.mlp.c_fc.bias"]),
            "down": linear(t[f"{name}.mlp.c_proj.weight"], t[f"{name}.mlp.c_proj.bias"]),
        },
    }
