"""MagicLens (google-deepmind/magiclens): the parameters that flax wrote, of Scenic's CLIP and of what fuses its features.

Sizes and numbers of heads come from the shapes. An export has the same names with dots between their parts.
"""

from collections.abc import Mapping
from typing import Any

from cir_jax.conversion.clip import _side
from cir_jax.conversion.rules import (
    Change,
    Options,
    Plan,
    Rule,
    Stripped,
    common_prefix,
    layer_count,
    norm,
    rule,
    shape_of,
    within,
)
from cir_jax.data.images import ImageSpec
from cir_jax.data.inputs import Inputs
from cir_jax.data.text import TextSpec, tokenizer
from cir_jax.encoders.clip import TextConfig, VisionConfig
from cir_jax.methods.magiclens import MagicLensConfig

LAYOUT = "MagicLens"
PREFIX = "params."
LAYERS = "multimodal_encoder.x_layers_"
POOL = "contrastive_multimodal_pooler"
NORM = ("scale", "bias")


def _dense(source: str, target: str) -> list[Rule]:
    return [rule(f"{source}.{part}", f"{target}/{part}") for part in ("kernel", "bias")]


def _clip_block(source: str, target: str, heads: int) -> list[Rule]:
    made = [
        *norm(f"{source}.ln_1", f"{target}/ln1", NORM),
        *norm(f"{source}.ln_2", f"{target}/ln2", NORM),
        *_dense(f"{source}.mlp.c_fc", f"{target}/mlp/up"),
        *_dense(f"{source}.mlp.c_proj", f"{target}/mlp/down"),
        rule(
            f"{source}.attn.out.kernel", f"{target}/attention/out/kernel", Change(heads=(0, heads))
        ),
        rule(f"{source}.attn.out.bias", f"{target}/attention/out/bias"),
    ]
    for name in ("query", "key", "value"):
        theirs, ours = f"{source}.attn.{name}", f"{target}/attention/{name}"
        made.append(rule(f"{theirs}.kernel", f"{ours}/kernel", Change(heads=(1, heads))))
        made.append(rule(f"{theirs}.bias", f"{ours}/bias", Change(heads=(0, heads))))
    return made


def _clip(config: MagicLensConfig) -> list[Rule]:
    blocks = "transformer.resblocks_*"
    return [
        rule("visual.conv1.kernel", "image/patch_kernel"),
        rule("visual.class_embedding", "image/class_token"),
        rule("visual.positional_embedding", "image/positions"),
        *norm("visual.ln_pre", "image/ln_pre", NORM),
        *_clip_block(f"visual.{blocks}", "image/blocks", config.vision.heads),
        *norm("visual.ln_post", "image/ln_post", NORM),
        rule("visual.proj.kernel", "image/project/kernel"),
        rule("text.token_embedding.embedding", "text/embedding"),
        rule("text.positional_embedding", "text/positions"),
        *_clip_block(f"text.{blocks}", "text/blocks", config.text.heads),
        *norm("text.ln_final", "text/ln_final", NORM),
        rule("text.text_projection.kernel", "text/project/kernel"),
        rule("logit_scale", "logit_scale"),
    ]


def _attention(source: str, target: str, heads: int) -> list[Rule]:
    made = [
        # [width, heads, head]: to the right side of a product only turned round
        rule(f"{source}.post.w", f"{target}/out/kernel", Change(heads=(1, heads), axes=(1, 0))),
        rule(f"{source}.post.b", f"{target}/out/bias"),
    ]
    for name in ("query", "key", "value"):
        made.append(rule(f"{source}.{name}.w", f"{target}/{name}/kernel", Change(heads=(1, heads))))
        made.append(rule(f"{source}.{name}.b", f"{target}/{name}/bias", Change(heads=(0, heads))))
    return made


def _fusion(config: MagicLensConfig) -> list[Rule]:
    layer, block, heads = f"{LAYERS}*", "blocks", config.fusion_heads
    made = [
        *norm(f"{layer}.layer_norm", f"{block}/ln1", NORM),
        *_attention(f"{layer}.self_attention", f"{block}/attention", heads),
        *norm(f"{layer}.ff_layer.layer_norm", f"{block}/ln2", NORM),
        rule(f"{POOL}.pooling_attn_query", "pool_query"),
        *_attention(f"{POOL}.pool_attn", "pool", heads),
        rule(f"{POOL}.pool_attn.per_dim_scale.per_dim_scale", "pool/scale"),
        *norm(f"{POOL}.pool_attn_ln", "ln_pool", NORM),
    ]
    for theirs, ours in (("ffn_layer1", "up"), ("ffn_layer2", "down")):
        made.append(rule(f"{layer}.ff_layer.{theirs}.linear.w", f"{block}/mlp/{ours}/kernel"))
        made.append(rule(f"{layer}.ff_layer.{theirs}.bias.b", f"{block}/mlp/{ours}/bias"))
    return made


def rules(config: MagicLensConfig) -> tuple[Rule, ...]:
    """The table, of 474 tensors for the base model and of 666 for the large one."""
    return (*within(_clip(config), "clip.", "clip/"), *within(_fusion(config), "", "fusion/"))


def original(config: MagicLensConfig) -> tuple[tuple[Rule, ...], dict[str, str]]:
    """The table and the notes of an export."""
    return within(rules(config), PREFIX), {}


def plan(sources: Mapping[str, Any], options: Options) -> Plan:
    """How to read the parameters; arguments and errors as of `cir_jax.conversion.clip.plan`."""
    source = sources[""]
    prefix = common_prefix(list(source.tensors), PREFIX)
    tensors = Stripped(source.tensors, prefix)
    if f"{POOL}.pooling_attn_query" not in tensors:
        raise ValueError(
            f"this is no MagicLens: there is no {POOL}.pooling_attn_query among its {len(tensors)} tensors"
        )
    config = _config(tensors, options)
    words, room = tokenizer(config.inputs.text).size, config.text.vocabulary
    faults = () if words == room else (f"the text tower has {room:,} ids, the tokenizer {words:,}",)
    note = "as published, a picture is divided by its largest value and the id 0 hidden; RGB comes first"
    return Plan(config, rules(config), LAYOUT, {}, prefix, (note,), faults)


def _config(tensors, options: Options) -> MagicLensConfig:
    patch, _, _, width = shape_of(tensors, "clip.visual.conv1.kernel", LAYOUT, 4)
    name = "clip.visual.positional_embedding"
    size = patch * _side(shape_of(tensors, name, LAYOUT)[0] - 1, name)
    length, text_width = shape_of(tensors, "clip.text.positional_embedding", LAYOUT)
    vocabulary = "clip" if options.tokenizer is None else str(options.tokenizer)
    image = ImageSpec(size, "squash", filter="bilinear", scale_by_brightest=True)
    return MagicLensConfig(
        vision=VisionConfig(size, patch, width, *_tower(tensors, "clip.visual.")),
        text=TextConfig(
            shape_of(tensors, "clip.text.token_embedding.embedding", LAYOUT)[0],
            length,
            text_width,
            *_tower(tensors, "clip.text."),
        ),
        embed=shape_of(tensors, "clip.visual.proj.kernel", LAYOUT)[1],
        inputs=Inputs(image, TextSpec(vocab=vocabulary, length=length)),
        fusion_layers=layer_count(tensors, LAYERS),
        fusion_heads=shape_of(tensors, f"{LAYERS}0.self_attention.query.w", LAYOUT, 3)[1],
        hide_id_zero=True,
    )


def _tower(tensors, prefix: str) -> tuple[int, int]:
    """(layers, heads)"""
    blocks = f"{prefix}transformer.resblocks_"
    heads = shape_of(tensors, f"{blocks}0.attn.query.kernel", LAYOUT, 3)[1]
    return layer_count(tensors, blocks), heads
