"""BEiT-3 for retrieval (microsoft/unilm `beit3`), and CFIR, which adds adapters to it (GLA-IR/CFIR).

Expert A is the picture tower, B the text tower. Sizes come from the shapes; the factor of adapters, which a file tells
only if it was learned, comes from the name of the system.
"""

import math
from collections.abc import Mapping
from typing import Any

from cir_jax.conversion.rules import (
    CONV,
    LINEAR,
    Change,
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
    shape_of,
)
from cir_jax.data.images import ImageSpec
from cir_jax.data.inputs import Inputs
from cir_jax.data.text import TextSpec, tokenizer
from cir_jax.encoders.beit3 import UNREAD, AdapterConfig, Beit3Config
from cir_jax.methods.cfir import CfirConfig

LAYOUT, PRETRAINED = "BEiT-3 for retrieval", "BEiT-3, pre-training"
FRESH = (
    "not trained for retrieval: vision_head.weight and language_head.weight begin at random (seed 0), logit_scale at "
    "ln(1 / 0.07); train it before it searches"
)
LAYER = "beit3.encoder.layers."
# What retrieval adds to the pre-trained model -> the parameters.
HEADS = {
    "vision_head.weight": "image_project/kernel",
    "language_head.weight": "text_project/kernel",
    "logit_scale": "logit_scale",
}
IGNORED = {
    r"(?!beit3\.|vision_head\.|language_head\.|logit_scale).*": "a head of pre-training or of another task",
}
EXPERTS = {"image": "A", "text": "B"}
# original: the adapter called "text" runs in the picture tower, and the other way round
ADAPTERS = {"image": "adaptmlp_text", "text": "adaptmlp_vision"}
HEAD_WIDTH = 64
LENGTH = 64  # tokens of a text in CFIR's second stage and in its training
# Factors of adapters by --variant; CFIR's default and that of longkukuhi/MultiWay-Adapter's commands.
SCALES = {"cfir": 0.3, "multiway-adapter": 0.6}
# Rows of the published table of words that no id reaches.
SPARE_ROWS = 8
TOKEN, SCALAR = Change(ones=2), Change(ones=1)


def _feed(source: str, target: str) -> list[Rule]:
    return [
        *linear(f"{source}.fc1", f"{target}/up"),
        *norm(f"{source}.ffn_layernorm", f"{target}/ln"),
        *linear(f"{source}.fc2", f"{target}/down"),
    ]


def _adapter(source: str, target: str, config: AdapterConfig) -> list[Rule]:
    made = [
        *linear(f"{source}.down_proj", f"{target}/down"),
        *linear(f"{source}.up_proj", f"{target}/up"),
    ]
    if config.norm != "none":
        made += norm(f"{source}.adapter_layer_norm_before", f"{target}/ln")
    return made + [rule(f"{source}.scale", f"{target}/scale", SCALAR)] * (config.scale is None)


def _expert(tower: str, config: Beit3Config) -> list[Rule]:
    e, source, target = EXPERTS[tower], f"{LAYER}*", f"{tower}/expert/blocks"
    made = [
        rule(f"beit3.encoder.embed_positions.{e}.weight", f"{tower}/expert/positions"),
        *norm(f"beit3.encoder.layer_norm.{e}", f"{tower}/expert/ln_final"),
        *norm(f"{source}.self_attn_layer_norm.{e}", f"{target}/ln1"),
        *norm(f"{source}.self_attn.inner_attn_ln.{e}", f"{target}/attention/ln"),
        *norm(f"{source}.final_layer_norm.{e}", f"{target}/ln2"),
        *_feed(f"{source}.ffn.{e}", f"{target}/mlp"),
    ]
    for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out")):
        made += linear(f"{source}.self_attn.{theirs}_proj.{e}", f"{target}/attention/{ours}")
    if tower in config.adapter.towers:
        made += _adapter(f"{source}.{ADAPTERS[tower]}", f"{target}/adapter", config.adapter)
    return made + (
        _feed(f"{source}.enhancemlp.{e}", f"{target}/enhancer") if config.enhancer else []
    )


def rules(config: Beit3Config) -> tuple[Rule, ...]:
    """The table, of 494 tensors for the base model and of 974 for the large one."""
    hidden = [rule("beit3.vision_embed.mask_token", "image/mask_token", TOKEN)]
    return (
        rule("logit_scale", "logit_scale"),
        rule("beit3.text_embed.weight", "text/embedding"),
        rule("beit3.vision_embed.proj.weight", "image/patch_kernel", CONV),
        rule("beit3.vision_embed.proj.bias", "image/patch_bias"),
        rule("beit3.vision_embed.cls_token", "image/class_token", TOKEN),
        *(hidden if config.mask_token else []),
        *_expert("image", config),
        *_expert("text", config),
        rule("vision_head.weight", "image_project/kernel", LINEAR),
        rule("language_head.weight", "text_project/kernel", LINEAR),
    )


def original(config: CfirConfig) -> tuple[tuple[Rule, ...], dict[str, str]]:
    """The table and the notes of an export."""
    return rules(config.encoder), {}


def plan(sources: Mapping[str, Any], options: Options) -> Plan:
    """How to read a checkpoint; arguments and errors as of `cir_jax.conversion.clip.plan`."""
    source = sources[""]
    outer = common_prefix(list(source.tensors), "module.")
    tensors = Stripped(source.tensors, outer)
    if "beit3.text_embed.weight" not in tensors:
        raise ValueError(
            f"this is no BEiT-3: there is no beit3.text_embed.weight among its {len(tensors)} tensors"
        )
    adapter, note = _adapters(tensors, options)
    encoder = _sizes(tensors, adapter)
    text = _text(encoder, options)
    image = ImageSpec(encoder.size, "squash", mean=(0.5,) * 3, std=(0.5,) * 3)
    config = CfirConfig(encoder, inputs=Inputs(image, text))
    whole = rules(encoder)
    if any(name in tensors for name in HEADS):
        return Plan(config, whole, LAYOUT, IGNORED, outer, note)
    table = tuple(each for each in whole if each.source not in HEADS)
    fresh = tuple(HEADS.values())
    return Plan(config, table, PRETRAINED, IGNORED, outer, (*note, FRESH), fresh=fresh)


def _sizes(tensors, adapter: AdapterConfig) -> Beit3Config:
    vocabulary, width = shape_of(tensors, "beit3.text_embed.weight", LAYOUT)
    patch = shape_of(tensors, "beit3.vision_embed.proj.weight", LAYOUT, 4)[-1]
    rows = shape_of(tensors, "beit3.encoder.embed_positions.A.weight", LAYOUT)[0]
    grid = math.isqrt(max(0, rows - UNREAD - 1))
    if grid < 1 or grid**2 + UNREAD + 1 != rows:
        refuse(
            [f"beit3.encoder.embed_positions.A.weight has {rows} rows, expected 3 and a square"],
            LAYOUT,
        )
    enhancer = f"{LAYER}0.enhancemlp.A.fc1.weight"
    return Beit3Config(
        size=patch * grid,
        patch=patch,
        vocabulary=vocabulary,
        length=max(
            1, shape_of(tensors, "beit3.encoder.embed_positions.B.weight", LAYOUT)[0] - UNREAD
        ),
        width=width,
        layers=layer_count(tensors, LAYER),
        heads=max(1, width // HEAD_WIDTH),
        hidden=shape_of(tensors, f"{LAYER}0.ffn.A.fc1.weight", LAYOUT)[0],
        mask_token="beit3.vision_embed.mask_token" in tensors,
        adapter=adapter,
        enhancer=shape_of(tensors, enhancer, LAYOUT)[0] if enhancer in tensors else 0,
    )


def _adapters(tensors, options: Options) -> tuple[AdapterConfig, tuple[str, ...]]:
    """What the names tell of adapters, and by --variant what they do not."""
    first = {tower: f"{LAYER}0.{name}." for tower, name in ADAPTERS.items()}
    towers = tuple(t for t, name in first.items() if f"{name}down_proj.weight" in tensors)
    if not towers:
        return AdapterConfig(), ()
    at = first[towers[0]]
    system, _, place = (options.variant or "").partition("+norm-")
    normed, learned = f"{at}adapter_layer_norm_before.weight" in tensors, f"{at}scale" in tensors
    if (not learned and system not in SCALES) or (normed and place not in ("in", "out")):
        raise ValueError(
            "this file has adapters, and does not tell all about them: add --variant cfir (their result times 0.3) or "
            "--variant multiway-adapter (times 0.6), followed by +norm-in or +norm-out if they have a LayerNorm"
        )
    scale = None if learned else SCALES[system]
    width = shape_of(tensors, f"{at}down_proj.weight", LAYOUT)[0]
    factor = "a learned factor" if learned else f"the factor {scale}, by --variant"
    note = f"adapters of width {width} beside the {' and '.join(towers)} tower, with {factor}"
    return AdapterConfig(towers, width, scale, place if normed else "none"), (note,)


def _text(encoder: Beit3Config, options: Options) -> TextSpec:
    if options.tokenizer is None:
        raise ValueError(
            "the file does not hold its vocabulary; give BEiT-3's beit3.spm with --tokenizer FILE"
        )
    spec = TextSpec("sentencepiece", str(options.tokenizer), min(LENGTH, encoder.length))
    words = tokenizer(spec).size
    if not words <= encoder.vocabulary <= words + SPARE_ROWS:
        raise ValueError(
            f"the table of words has {encoder.vocabulary:,} rows, {options.tokenizer} gives {words:,} ids; give its "
            "own vocabulary with --tokenizer FILE"
        )
    return spec
