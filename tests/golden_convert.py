"""Golden weights (react.md 4.10) as files in the layouts in which CLIPs are published, and what must come out of them."""

import json
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from golden_weights import clip_shapes, filled
from safetensors.numpy import save_file
from test_clip import IMAGE, TEXT, pictures, texts

VISION = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3}
VISION |= {"num_attention_heads": 2, "patch_size": 16, "image_size": 64}
WORDS = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
WORDS |= {"num_attention_heads": 1, "vocab_size": 49408, "max_position_embeddings": 77}
BOTH = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
HUGGING_FACE = {"vision_config": VISION | BOTH, "text_config": WORDS | BOTH | {"eos_token_id": 2}}
# OpenAI's name -> Hugging Face's (react.md 4.8).
OUTSIDE = {
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "logit_scale": "logit_scale",
}
INSIDE = {
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "ln_final.": "text_model.final_layer_norm.",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
    ".attn.out_proj.": ".self_attn.out_proj.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}
RESNET = {0: (4.047679, 1.638432, (1.184568, 0.643746, 0.492524, 0.121047, -0.808513, -1.193565))}


def openai() -> dict[str, np.ndarray]:
    """The golden vision transformer, float32."""
    shapes = clip_shapes(24, 16, 4, 128, 3, 64, 2, 77, 49408)
    return single(filled(shapes, np.log(100)))


def single(tensors) -> dict[str, np.ndarray]:
    return {name: np.asarray(x, np.float32) for name, x in tensors.items()}


def hugging_face(tensors) -> dict[str, np.ndarray]:
    """The same numbers under the names of `transformers.CLIPModel`."""
    out = {}
    for name, x in tensors.items():
        if name in OUTSIDE:
            out[OUTSIDE[name]] = x
        elif name in ("visual.proj", "text_projection"):
            out[{"visual.proj": "visual"}.get(name, "text") + "_projection.weight"] = x.T
        else:
            for theirs, ours in INSIDE.items():
                name = ours + name.removeprefix(theirs) if name.startswith(theirs) else name
                name = name.replace(theirs, ours) if theirs.startswith(".") else name
            if ".attn.in_proj_" in name:
                for letter, part in zip("qkv", np.split(x, 3)):
                    out[name.replace(".attn.in_proj_", f".self_attn.{letter}_proj.")] = part
            else:
                out[name] = x
    return out


def resnet_shapes(layers, width, embed, grid) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of OpenAI's CLIP with a modified ResNet and the golden text tower (react.md 4.6)."""
    shapes = clip_shapes(embed, 1, 1, 64, 0, 64, 2, 77, 49408)
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith("visual.")}

    def convolution(name, normed, inputs, outputs, side):
        shapes[f"{name}.weight"] = (outputs, inputs, side, side)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{normed}.{part}"] = (outputs,)
        shapes[f"{normed}.num_batches_tracked"] = ()

    for n, (a, b) in enumerate(((3, width // 2), (width // 2, width // 2), (width // 2, width)), 1):
        convolution(f"visual.conv{n}", f"visual.bn{n}", a, b, 3)
    inputs = width
    for stage, blocks in enumerate(layers):
        inner = width * 2**stage
        for block in range(blocks):
            at = f"visual.layer{stage + 1}.{block}"
            sides = ((inputs, inner, 1), (inner, inner, 3), (inner, 4 * inner, 1))
            for n, each in enumerate(sides, 1):
                convolution(f"{at}.conv{n}", f"{at}.bn{n}", *each)
            if block == 0:
                down = f"{at}.downsample"
                convolution(f"{down}.0", f"{down}.1", inputs, 4 * inner, 1)
            inputs = 4 * inner
    shapes["visual.attnpool.positional_embedding"] = (grid**2 + 1, inputs)
    for letter in "qkvc":
        outputs = embed if letter == "c" else inputs
        shapes[f"visual.attnpool.{letter}_proj.weight"] = (outputs, inputs)
        shapes[f"visual.attnpool.{letter}_proj.bias"] = (outputs,)
    return shapes


def resnet() -> dict[str, np.ndarray]:
    """The golden ResNet, 171 keys."""
    tensors = single(filled(resnet_shapes((1, 2, 1, 1), 16, 24, 2), np.log(100)))
    for name in tensors:
        if name.endswith("running_var"):
            tensors[name] = tensors[name] + 1
        if name.endswith("num_batches_tracked"):
            tensors[name] = np.zeros((), np.int64)
    return tensors


def save(path: Path, tensors) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(x).reshape(x.shape) for name, x in tensors.items()}, path)
    return path


def save_folder(folder: Path, tensors, config) -> Path:
    save(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def golden_error(model, image=IMAGE, text=TEXT, x64=False) -> float:
    """The largest deviation of a converted model from the golden numbers: norm, sum and first six of each row."""
    with jax.enable_x64(x64):
        dtype = np.float64 if x64 else np.float32
        method = nnx.merge(
            model.graph, jax.tree.map(lambda x: jax.numpy.asarray(x, dtype), model.params)
        )
        found = (method.image(pictures(dtype)), image), (method.text(texts()), text)
        return max(_error(np.asarray(x), golden) for x, golden in found)


def _error(features, golden) -> float:
    errors = [
        np.abs(np.array([np.linalg.norm(x), x.sum(), *x[:6]]) - (norm, total, *first)).max()
        for row, (norm, total, first) in golden.items()
        for x in (features[row],)
    ]
    return float(max(errors))
