"""Against PyTorch: the same random weights in the published library and here (extra `[parity]`)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_weights import clip_params
from reference import library

from cir_jax.data.images import ImageSpec, open_image, random_crop
from cir_jax.data.inputs import Inputs
from cir_jax.data.text import TextSpec
from cir_jax.encoders.clip import TextConfig, VisionConfig
from cir_jax.methods.clip import Clip, ClipConfig

pytestmark = pytest.mark.parity

# Hugging Face name -> OpenAI name, for what lies outside the blocks (react.md 4.8).
OUTSIDE = {
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "logit_scale": "logit_scale",
}
NORMS = {
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "text_model.final_layer_norm": "ln_final",
}


def openai_tensors(state: dict[str, np.ndarray], layers: dict[str, int]) -> dict[str, np.ndarray]:
    """A `transformers` CLIP state dict under OpenAI's names."""
    out = {ours: state[theirs] for theirs, ours in OUTSIDE.items()}
    out["visual.proj"] = state["visual_projection.weight"].T
    out["text_projection"] = state["text_projection.weight"].T
    parts = ("weight", "bias")
    for theirs, ours in NORMS.items():
        out |= {f"{ours}.{part}": state[f"{theirs}.{part}"] for part in parts}
    for tower, prefix in (("vision", "visual."), ("text", "")):
        for layer in range(layers[tower]):
            theirs = f"{tower}_model.encoder.layers.{layer}"
            ours = f"{prefix}transformer.resblocks.{layer}"
            for part in parts:
                fused = [state[f"{theirs}.self_attn.{x}_proj.{part}"] for x in "qkv"]
                out[f"{ours}.attn.in_proj_{part}"] = np.concatenate(fused)
                out[f"{ours}.attn.out_proj.{part}"] = state[f"{theirs}.self_attn.out_proj.{part}"]
                out[f"{ours}.ln_1.{part}"] = state[f"{theirs}.layer_norm1.{part}"]
                out[f"{ours}.ln_2.{part}"] = state[f"{theirs}.layer_norm2.{part}"]
                out[f"{ours}.mlp.c_fc.{part}"] = state[f"{theirs}.mlp.fc1.{part}"]
                out[f"{ours}.mlp.c_proj.{part}"] = state[f"{theirs}.mlp.fc2.{part}"]
    return out


class Draws:
    """PyTorch's random numbers behind the two calls of a numpy generator that `random_box` makes."""

    def uniform(self, low, high):
        return library("torch").empty(1).uniform_(low, high).item()

    def integers(self, stop):
        return library("torch").randint(0, stop, size=(1,)).item()


@pytest.mark.parametrize("share", [(0.08, 1.0), (0.5, 1.0), (0.9, 1.0)])
@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
def test_random_crops_are_torchvisions(share, filter):
    """The same parts of pictures of all shapes, those too long for any part included, and the same pixels."""
    torch, transforms = library("torch"), library("torchvision").transforms
    spec, draw = ImageSpec(size=32, filter=filter), np.random.default_rng(0)
    mode = transforms.InterpolationMode[filter.upper()]
    theirs = transforms.RandomResizedCrop(32, scale=share, interpolation=mode)
    for seed, size in enumerate([(40, 30), (30, 40), (400, 20), (20, 400), (64, 64), (7, 5)] * 5):
        pixels = draw.integers(0, 255, (*size, 3), np.uint8)
        torch.manual_seed(seed)
        expected = np.asarray(theirs(open_image(pixels)))
        torch.manual_seed(seed)
        np.testing.assert_array_equal(random_crop(pixels, spec, share, Draws()), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip_equals_transformers(activation):
    torch, transformers = library("torch"), library("transformers")
    TheirConfig, CLIPModel = transformers.CLIPConfig, transformers.CLIPModel

    layers = {"vision": 3, "text": 2}
    sizes = {"hidden_act": activation, "attention_dropout": 0.0, "projection_dim": 32}
    vision = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": layers["vision"]}
    vision |= {"num_attention_heads": 3, "patch_size": 16, "image_size": 64, **sizes}
    text = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": layers["text"]}
    text |= {"num_attention_heads": 2, "vocab_size": 1000, "max_position_embeddings": 20, **sizes}
    text |= {"eos_token_id": 999, "bos_token_id": 998, "pad_token_id": 0}
    torch.manual_seed(0)
    theirs = CLIPModel(
        TheirConfig(text_config=text, vision_config=vision, projection_dim=32)
    ).eval()
    state = {name: tensor.detach().numpy() for name, tensor in theirs.state_dict().items()}

    rng = np.random.default_rng(0)
    images = rng.normal(size=(3, 64, 64, 3)).astype(np.float32)
    ids = rng.integers(1, 998, (3, 20)).astype(np.int32)
    ids[:, 0], ids[[0, 1, 2], [19, 9, 4]] = 998, 999
    for row, end in enumerate((19, 9, 4)):
        ids[row, end + 1 :] = 0
    with torch.no_grad():
        pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        out = theirs(input_ids=torch.from_numpy(ids).long(), pixel_values=pixels)
    config = ClipConfig(
        vision=VisionConfig(size=64, patch=16, width=96, layers=3, heads=3),
        text=TextConfig(vocabulary=1000, length=20, width=64, layers=2, heads=2),
        embed=32,
        activation=activation,
        inputs=Inputs(image=ImageSpec(size=64), text=TextSpec(length=20)),
    )
    graph, _ = nnx.split(nnx.eval_shape(lambda: Clip(config, nnx.Rngs(0))))
    params = jax.tree.map(jnp.asarray, clip_params(openai_tensors(state, layers)))
    ours = nnx.merge(graph, params)
    np.testing.assert_allclose(ours.item({"image": images}), out.image_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(ours.query({"text": ids}), out.text_embeds.numpy(), atol=1e-5)
