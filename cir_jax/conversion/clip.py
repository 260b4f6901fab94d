"""CLIP: OpenAI's, open_clip's and Hugging Face's names, for vision transformers and modified ResNets.

Sizes come from the shapes. What shapes cannot tell, the activation and other head widths, comes from the file or from
the person who converts it; it is never guessed.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from cir_jax.conversion.rules import (
    CONV,
    FUSED,
    FUSED_BIAS,
    LINEAR,
    Options,
    Plan,
    Rule,
    Stripped,
    common_prefix,
    layer_count,
    linear,
    norm,
    refuse,
    rule,
)
from cir_jax.data.images import ImageSpec
from cir_jax.data.inputs import Inputs
from cir_jax.data.text import TextSpec, tokenizer
from cir_jax.encoders.clip import TextConfig, VisionConfig
from cir_jax.encoders.resnet import ResnetConfig
from cir_jax.methods.clip import ClipConfig

IGNORED = {
    r"input_resolution|context_length|vocab_size": "an integer about the architecture, which the shapes tell",
    r"(.*\.)?num_batches_tracked": "a count of training steps",
    r"(.*\.)?position_ids": "the numbers 0, 1, 2 … of the positions",
    r"(.*\.)?attn_mask": "the causal mask, which is computed here",
    r"logit_bias": "adds the same to all scores and changes no order",
}
OPEN_CLIP = "open_clip_config.json"
# Of models whose heads are not 64 wide (react.md 4.7); shapes do not tell.
HEAD_WIDTHS = {1280: 80, 1664: 104}
# name -> (width, patch, layers, size) of transformers, (width, layers, size) of ResNets; react.md 4.1.
VARIANTS = {
    "ViT-B-32": (768, 32, 12, 224),
    "ViT-B-16": (768, 16, 12, 224),
    "ViT-L-14": (1024, 14, 24, 224),
    "ViT-L-14-336": (1024, 14, 24, 336),
    "ViT-H-14": (1280, 14, 32, 224),
    "RN50": (64, (3, 4, 6, 3), 224),
    "RN101": (64, (3, 4, 23, 3), 224),
    "RN50x4": (80, (4, 6, 10, 6), 288),
    "RN50x16": (96, (6, 8, 18, 8), 384),
    "RN50x64": (128, (3, 15, 36, 10), 448),
}


# ---- the tables ----


def _openai_block(source: str, target: str) -> list[Rule]:
    fused = f"{target}/attention/{{query,key,value}}"
    return [
        rule(f"{source}.attn.in_proj_weight", f"{fused}/kernel", FUSED),
        rule(f"{source}.attn.in_proj_bias", f"{fused}/bias", FUSED_BIAS),
        *linear(f"{source}.attn.out_proj", f"{target}/attention/out"),
        *norm(f"{source}.ln_1", f"{target}/ln1"),
        *norm(f"{source}.ln_2", f"{target}/ln2"),
        *linear(f"{source}.mlp.c_fc", f"{target}/mlp/up"),
        *linear(f"{source}.mlp.c_proj", f"{target}/mlp/down"),
    ]


def _openai_transformer() -> list[Rule]:
    return [
        rule("visual.conv1.weight", "image/patch_kernel", CONV),
        rule("visual.class_embedding", "image/class_token"),
        rule("visual.positional_embedding", "image/positions"),
        *norm("visual.ln_pre", "image/ln_pre"),
        *_openai_block("visual.transformer.resblocks.*", "image/blocks"),
        *norm("visual.ln_post", "image/ln_post"),
        rule("visual.proj", "image/project/kernel"),
    ]


def _openai_text(prefix: str) -> list[Rule]:
    return [
        rule(f"{prefix}token_embedding.weight", "text/embedding"),
        rule(f"{prefix}positional_embedding", "text/positions"),
        *_openai_block(f"{prefix}transformer.resblocks.*", "text/blocks"),
        *norm(f"{prefix}ln_final", "text/ln_final"),
        rule(f"{prefix}text_projection", "text/project/kernel"),
    ]


def _convolution(source: str, normed: str, target: str, first: int = 0) -> list[Rule]:
    parts = (
        ("weight", "scale"),
        ("bias", "bias"),
        ("running_mean", "mean"),
        ("running_var", "variance"),
    )
    return [
        rule(f"{source}.weight", f"{target}/kernel", CONV, first),
        *(rule(f"{normed}.{a}", f"{target}/norm/{b}", first=first) for a, b in parts),
    ]


def _bottleneck(source: str, target: str, first: int = 0) -> list[Rule]:
    names = [(f"{source}.conv{n}", f"{source}.bn{n}", f"{target}/conv{n}") for n in (1, 2, 3)]
    return [each for name in names for each in _convolution(*name, first)]


def _openai_resnet(config: ResnetConfig) -> list[Rule]:
    rules = [rule("visual.attnpool.positional_embedding", "image/pool/positions")]
    for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("c", "out")):
        rules += linear(f"visual.attnpool.{theirs}_proj", f"image/pool/attention/{ours}")
    for n in (1, 2, 3):
        rules += _convolution(f"visual.conv{n}", f"visual.bn{n}", f"image/stem{n}")
    for n, layers in enumerate(config.layers, 1):
        first, source = f"visual.layer{n}.0", f"visual.layer{n}.*"
        rules += _bottleneck(first, f"image/stage{n}/first")
        shortcut = (f"{first}.downsample.0", f"{first}.downsample.1")
        rules += _convolution(*shortcut, f"image/stage{n}/first/shortcut")
        rules += _bottleneck(source, f"image/stage{n}/blocks", 1) if layers > 1 else []
    return rules


def openai_rules(config: ClipConfig, text_prefix: str = "") -> tuple[Rule, ...]:
    """The table of OpenAI's names, with `text.` before those of the text tower also open_clip's custom-text names."""
    resnet = isinstance(config.vision, ResnetConfig)
    vision = _openai_resnet(config.vision) if resnet else _openai_transformer()
    return (*vision, *_openai_text(text_prefix), rule("logit_scale", "logit_scale"))


def _hugging_face_block(source: str, target: str) -> list[Rule]:
    rules = []
    for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out")):
        rules += linear(f"{source}.self_attn.{theirs}_proj", f"{target}/attention/{ours}")
    for n in (1, 2):
        rules += norm(f"{source}.layer_norm{n}", f"{target}/ln{n}")
    return [
        *rules,
        *linear(f"{source}.mlp.fc1", f"{target}/mlp/up"),
        *linear(f"{source}.mlp.fc2", f"{target}/mlp/down"),
    ]


def hugging_face_rules() -> tuple[Rule, ...]:
    """The table of the names of `transformers.CLIPModel`."""
    vision, text = "vision_model.embeddings", "text_model.embeddings"
    return (
        rule(f"{vision}.patch_embedding.weight", "image/patch_kernel", CONV),
        rule(f"{vision}.class_embedding", "image/class_token"),
        rule(f"{vision}.position_embedding.weight", "image/positions"),
        *norm("vision_model.pre_layrnorm", "image/ln_pre"),  # their spelling
        *_hugging_face_block("vision_model.encoder.layers.*", "image/blocks"),
        *norm("vision_model.post_layernorm", "image/ln_post"),
        rule("visual_projection.weight", "image/project/kernel", LINEAR),
        rule(f"{text}.token_embedding.weight", "text/embedding"),
        rule(f"{text}.position_embedding.weight", "text/positions"),
        *_hugging_face_block("text_model.encoder.layers.*", "text/blocks"),
        *norm("text_model.final_layer_norm", "text/ln_final"),
        rule("text_projection.weight", "text/project/kernel", LINEAR),
        rule("logit_scale", "logit_scale"),
    )


def original(config: ClipConfig) -> tuple[tuple[Rule, ...], dict[str, str]]:
    """The table and the notes of an export; OpenAI's names do not say the activation, so the file notes it."""
    return openai_rules(config), {"activation": config.activation}


# ---- from a source to a plan ----


def plan(sources: Mapping[str, Any], options: Options) -> Plan:
    """How to read a CLIP.

    Args:
      sources: {"": source}, as from `open_source`.
      options: what else is known.

    Raises:
      ValueError: names of no known layout, sizes that cannot be found, an activation that nobody tells.
    """
    source = sources[""]
    names = list(source.tensors)
    prefix = common_prefix(names, "module.")
    tensors = Stripped(source.tensors, prefix)
    if "vision_model.embeddings.patch_embedding.weight" in tensors:
        made = _hugging_face(tensors, source, options)
    elif "visual.conv1.weight" in tensors:
        made = _openai(tensors, source, options)
    else:
        raise ValueError(
            "this is no CLIP in a known layout: there is neither visual.conv1.weight (OpenAI, open_clip) nor "
            "vision_model.embeddings.patch_embedding.weight (Hugging Face CLIPModel) among its "
            f"{len(names)} tensors, which begin with {', '.join(map(repr, sorted(names)[:3])) or 'none'}"
        )
    words, room = tokenizer(made.config.inputs.text).size, made.config.text.vocabulary
    faults = _variant_faults(made.config, options.variant)
    if words != room:
        faults.append(
            f"the text tower has {room:,} ids, the tokenizer gives {words:,}; give its own with --tokenizer FILE"
        )
    layout = f"{made.layout}{' behind module.' if prefix else ''}"
    return Plan(made.config, made.rules, layout, IGNORED, prefix, made.notes, tuple(faults))


def _openai(tensors, source, options) -> Plan:
    text_prefix = "text." if "text.token_embedding.weight" in tensors else ""
    images = _object(source.config, "preprocess_cfg")
    said = _object(source.config, "model_cfg") if "model_cfg" in (source.config or {}) else None
    sizes = ("input_resolution", "context_length", "vocab_size")
    integers = all(name in tensors or name in source.facts for name in sizes)
    layout = "OpenAI's JIT archive" if integers else "OpenAI's or open_clip's CLIP"
    layout = "open_clip's CustomTextCLIP" if text_prefix else layout
    activation, why = _activation(layout, integers, said, source.facts, options)
    shape = lambda name: _shape(tensors, name, layout)
    resnet = "visual.attnpool.positional_embedding" in tensors
    vision = (_resnet if resnet else _transformer)(tensors, shape, said or {})
    length, width = _two(f"{text_prefix}positional_embedding", shape)
    text = TextConfig(
        vocabulary=shape(f"{text_prefix}token_embedding.weight")[0],
        length=length,
        width=width,
        layers=layer_count(tensors, f"{text_prefix}transformer.resblocks."),
        heads=max(1, width // 64),
    )
    config = ClipConfig(
        vision=vision,
        text=text,
        embed=shape(f"{text_prefix}text_projection")[-1],
        activation=activation,
        inputs=_inputs(vision.size, length, options, crop="round", said=_open_clip_images(images)),
    )
    return Plan(config, openai_rules(config, text_prefix), layout, notes=(why,))


def _activation(
    layout, is_jit: bool, said: Mapping | None, facts: Mapping, options
) -> tuple[str, str]:
    """(activation, why), from the file or the command; ValueError if nobody says it, or they disagree."""
    told = {}
    if is_jit:
        told["quick_gelu", "OpenAI's own archives"] = None
    if said is not None:
        told["quick_gelu" if said.get("quick_gelu", False) else "gelu", OPEN_CLIP] = None
    noted = facts.get("activation")
    if noted in ("quick_gelu", "gelu"):
        told[noted, "a note in the file"] = None
    if options.variant and (named := _variant_activation(options.variant)):
        told[named, f"--variant {options.variant}"] = None
    if options.activation:
        told[options.activation, "--activation"] = None
    if not told:
        raise ValueError(
            f"{layout}: nothing in the file says whether the model computes with QuickGELU or GELU, and the wrong one "
            "makes every vector slightly wrong without an error. Add --activation quick_gelu (OpenAI's weights, "
            "MetaCLIP, most DFN, open_clip names that end in -quickgelu) or --activation gelu (LAION-2B, DataComp), or "
            "--variant with the name it was published under (ViT-B/32 as OpenAI, ViT-B-32 or ViT-B-32-quickgelu as "
            "open_clip)"
        )
    values = {value for value, _ in told}
    if len(values) > 1:
        each = ", ".join(f"{where} says {value}" for value, where in told)
        raise ValueError(f"the activation is told in two ways: {each}; leave out the wrong one")
    return values.pop(), "activation by " + " and ".join(where for _, where in told)


def _variant_name(variant: str) -> str:
    name = re.sub(r"-(quickgelu|openai)$", "", variant.replace("/", "-").replace("@", "-"))
    return name.removesuffix("px")


def _variant_activation(variant: str) -> str | None:
    """What a published name implies; None for the ResNets, whose names OpenAI and open_clip share."""
    if variant.endswith(("-quickgelu", "-openai")) or "/" in variant:
        return "quick_gelu"
    return None if variant.startswith("RN") else "gelu"


def _variant_faults(config: ClipConfig, variant: str | None) -> list[str]:
    """Where the sizes are not those of the model that a variant names."""
    if variant is None:
        return []
    name, vision = _variant_name(variant), config.vision
    if name not in VARIANTS:
        return [f"--variant {variant} is unknown; there are {', '.join(VARIANTS)}"]
    if isinstance(vision, ResnetConfig):
        found = (vision.width, tuple(vision.layers), vision.size)
    else:
        found = (vision.width, vision.patch, vision.layers, vision.size)
    expected = VARIANTS[name]
    return [] if found == expected else [f"found vision sizes {found}, {variant} has {expected}"]


def _transformer(tensors, shape: Callable, said: Mapping) -> VisionConfig:
    width, _, patch, _ = _four(shape("visual.conv1.weight"), "visual.conv1.weight")
    grid = _side(shape("visual.positional_embedding")[0] - 1, "visual.positional_embedding")
    head = (said.get("vision_cfg") or {}).get("head_width", HEAD_WIDTHS.get(width, 64))
    if type(head) is not int or head < 1 or width % min(head, width):
        raise ValueError(f"heads of width {head} do not divide the vision width {width}")
    layers = layer_count(tensors, "visual.transformer.resblocks.")
    return VisionConfig(patch * grid, patch, width, layers, max(1, width // head))


def _resnet(tensors, shape: Callable, said: Mapping) -> ResnetConfig:
    places = shape("visual.attnpool.positional_embedding")[0] - 1
    width = _four(shape("visual.layer1.0.conv1.weight"), "visual.layer1.0.conv1.weight")[0]
    layers = tuple(layer_count(tensors, f"visual.layer{n}.") for n in (1, 2, 3, 4))
    size = 32 * _side(places, "visual.attnpool.positional_embedding")
    return ResnetConfig(size, width, layers, max(1, width * 32 // 64))


def _shape(tensors, name: str, layout: str) -> tuple[int, ...]:
    if name not in tensors or not tensors.shape(name):
        refuse([f"missing {name}, from which the sizes are read"], layout)
    return tensors.shape(name)


def _object(config: Mapping | None, name: str) -> Mapping:
    """A part of a JSON config; empty if it is not there."""
    part = (config or {}).get(name)
    return part if isinstance(part, Mapping) else {}


def _four(shape, name: str) -> tuple[int, ...]:
    if len(shape) != 4 or 0 in shape:
        raise ValueError(f"{name} has shape {list(shape)}, expected the four axes of a convolution")
    return shape


def _two(name: str, shape: Callable) -> tuple[int, int]:
    if len(shape(name)) != 2 or 0 in shape(name):
        raise ValueError(f"{name} has shape {list(shape(name))}, expected rows and columns")
    return shape(name)


def _side(places: int, name: str) -> int:
    side = math.isqrt(max(0, places))
    if side < 1 or side * side != places:
        raise ValueError(
            f"{name} has {places + 1} rows, expected a square number and one (a square grid of places)"
        )
    return side


def _hugging_face(tensors, source, options) -> Plan:
    layout = "Hugging Face CLIPModel"
    if not source.config:
        raise ValueError(
            f"{layout}: its config.json says activation and number of heads, which the tensors do not; put it into "
            "the same folder and convert the folder"
        )
    vision, text = (_part(source.config, f"{name}_config", layout) for name in ("vision", "text"))
    words = "text_model.embeddings.token_embedding.weight"
    faults = _config_faults(vision, text, _shape(tensors, words, layout)[0] - 1)
    activation = vision.get("hidden_act", "quick_gelu")
    if options.activation not in (None, activation):
        faults.append(f"--activation {options.activation}, but config.json says {activation}")
    if options.variant and (_variant_activation(options.variant) or activation) != activation:
        faults.append(f"--variant {options.variant} differs from config.json's {activation}")
    refuse(faults, layout)
    images = _hugging_face_images(options.beside("preprocessor_config.json"))
    shape = lambda name: _shape(tensors, name, layout)
    name = "vision_model.embeddings.patch_embedding.weight"
    width, _, patch, _ = _four(shape(name), name)
    name = "vision_model.embeddings.position_embedding.weight"
    size = patch * _side(shape(name)[0] - 1, name)
    length, text_width = _two("text_model.embeddings.position_embedding.weight", shape)
    config = ClipConfig(
        vision=VisionConfig(
            size=size,
            patch=patch,
            width=width,
            layers=layer_count(tensors, "vision_model.encoder.layers."),
            heads=vision.get("num_attention_heads", 12),
        ),
        text=TextConfig(
            vocabulary=shape("text_model.embeddings.token_embedding.weight")[0],
            length=length,
            width=text_width,
            layers=layer_count(tensors, "text_model.encoder.layers."),
            heads=text.get("num_attention_heads", 8),
        ),
        embed=shape("text_projection.weight")[0],
        activation=activation,
        epsilon=float(vision.get("layer_norm_eps", 1e-5)),
        inputs=_inputs(size, length, options, crop="floor", said=images),
    )
    return Plan(config, hugging_face_rules(), layout, notes=("activation by config.json",))


def _part(config: Mapping, name: str, layout: str) -> Mapping:
    """One tower's part of a config.json, whose missing fields have the defaults of `transformers`."""
    part = {**_object(config, f"{name}_dict"), **_object(config, name)}
    if not part:
        raise ValueError(f"{layout}: config.json has no {name}; expected that of a CLIPModel")
    return part


def _config_faults(vision: Mapping, text: Mapping, last: int) -> list[str]:
    """What a config.json says that this CLIP does not compute; `last` is the largest id."""
    faults = []
    for key, default in (("hidden_act", "quick_gelu"), ("layer_norm_eps", 1e-5)):
        both = [part.get(key, default) for part in (vision, text)]
        if both[0] != both[1]:
            faults.append(
                f"config.json has {key} {both[0]!r} and {both[1]!r}, expected one for both towers"
            )
    if vision.get("hidden_act", "quick_gelu") not in ("quick_gelu", "gelu"):
        faults.append(
            f"config.json has hidden_act {vision['hidden_act']!r}, expected quick_gelu or gelu"
        )
    epsilon = vision.get("layer_norm_eps", 1e-5)
    if type(epsilon) not in (int, float) or not 0 < epsilon < 1:
        faults.append(
            f"config.json has layer_norm_eps {epsilon!r}, expected a small positive number"
        )
    for name, part in (("vision", vision), ("text", text)):
        heads = part.get("num_attention_heads", 1)
        if type(heads) is not int or not 0 < heads < 10_000:
            faults.append(
                f"config.json has {name} num_attention_heads {heads!r}, expected a whole number"
            )
    end = text.get("eos_token_id", 2)
    # 2 is a mistake of old files under which transformers, too, takes the largest id of a text (react.md 4.8).
    if end not in (2, last):
        faults.append(
            f"config.json has eos_token_id {end!r}; this model reads texts at their largest id, expected {last}"
        )
    return faults


# ---- preprocessing ----


def _inputs(size: int, length: int, options, *, crop: str, said: Mapping) -> Inputs:
    """Pictures and texts as the original reads them.

    RGB comes first (react.md 4.11): Hugging Face does so, REACT does so, and for ordinary pictures the order changes
    nothing. OpenAI's and open_clip's code resizes pictures with a palette or transparency before it makes them RGB;
    `--resize-first` does that too. Hugging Face cuts the centre at the lower pixel where torchvision rounds.
    """
    vocabulary = "clip" if options.tokenizer is None else str(options.tokenizer)
    image = ImageSpec(size=size, crop_offset=crop, convert_first=not options.resize_first, **said)
    return Inputs(image, TextSpec(vocab=vocabulary, length=length))


def _open_clip_images(said: Mapping) -> dict:
    """What `preprocess_cfg` of open_clip_config.json says of pictures."""
    return _image_fields(
        said.get("mean"),
        said.get("std"),
        _known(said.get("interpolation"), {"bicubic": "bicubic", "bilinear": "bilinear"}),
        _known(said.get("resize_mode"), {"shortest": "short", "squash": "squash"}),
    )


def _hugging_face_images(said: Mapping) -> dict:
    """What preprocessor_config.json says of pictures."""
    kind = _known(said.get("resample"), {3: "bicubic", 2: "bilinear"})
    return _image_fields(said.get("image_mean"), said.get("image_std"), kind, None)


def _known(value, names: Mapping) -> str | None:
    """Our name for a value of theirs: None if they say nothing, "" for something unknown."""
    return None if value is None else next((ours for x, ours in names.items() if x == value), "")


def _image_fields(mean, std, filter, resize) -> dict:
    found = {"mean": mean, "std": std, "filter": filter, "resize": resize}
    found = {name: value for name, value in found.items() if value is not None}
    for name in ("mean", "std"):
        if name in found:
            values = found[name]
            if (
                not isinstance(values, list)
                or len(values) != 3
                or not all(type(x) in (int, float) and math.isfinite(x) for x in values)
            ):
                raise ValueError(
                    f"the preprocessing of the source has {name} {values!r}, expected three numbers"
                )
            found[name] = tuple(map(float, values))
    if "" in found.values():
        raise ValueError("the preprocessing of the source resizes in a way that is unknown here")
    return found
