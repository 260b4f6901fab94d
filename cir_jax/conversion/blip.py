"""BLIP (salesforce/BLIP, Hugging Face `BlipForImageTextRetrieval`) and both stages of Candidate-Reranking on it.

One text encoder of the originals becomes that of `blip_cir` and `blip_itm`; in `blip_rerank` there are two: stage II's,
whose layers have two branches, and stage I's, whose state it reads. A file of stage II holds only its own, so stage I's
comes from another (`stage1=SOURCE`); without a file of stage II all of them begin as the one of a plain BLIP.

Hugging Face's config.json is not followed: its defaults, 8 heads and an epsilon of 1e-5, are not those of the weights.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cir_jax import files
from cir_jax.conversion.rules import (
    CONV,
    FUSED,
    FUSED_BIAS,
    Change,
    Options,
    Plan,
    Rule,
    Shape,
    Stripped,
    common_prefix,
    layer_count,
    linear,
    norm,
    refuse,
    rule,
    shape_of,
)
from cir_jax.conversion.sources import joined
from cir_jax.data.images import ImageSpec
from cir_jax.data.inputs import Inputs
from cir_jax.data.text import TextSpec, tokenizer
from cir_jax.encoders.bert import BertConfig
from cir_jax.encoders.vit import EPSILON, VitConfig, resize_positions
from cir_jax.methods.blip_cir import BlipCirConfig
from cir_jax.methods.blip_itm import BlipItmConfig
from cir_jax.methods.blip_rerank import BlipRerankConfig
from cir_jax.typed import from_json, to_json

# Further sources of a method.
PARTS = {"blip_rerank": ("stage1",)}
IGNORED = {
    r"(stage1\.)?text_encoder\.embeddings\.position_ids": "the numbers 0, 1, 2 … of the positions",
    r"(stage1\.)?(visual_encoder|text_encoder|vision_proj|text_proj)_m\..*": "a slow copy that only pre-training uses",
    r"(stage1\.)?(image_queue|text_queue|idx_queue|queue_ptr|ptr_queue)": "examples of earlier steps of training",
    r"(stage1\.)?text_decoder\..*": "writes captions",
}
MATCH = {r"(stage1\.)?itm_head\..*": "matches a text with a picture, which --method blip_itm does"}
HEADS = {
    r"(stage1\.)?((vision|text)_proj\..*|temp)": "stage I compares vectors, which --method blip_cir does",
}
# Looked at all the same: `_other_pictures`.
STAGE1 = {r"stage1\.(visual_encoder|vision_model)\..*": "equal to stage II's own"}
# original name -> Hugging Face's, part by part in this order
HUGGING_FACE = (
    ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    ("visual_encoder.patch_embed.proj.", "vision_model.embeddings.patch_embedding."),
    ("visual_encoder.norm.", "vision_model.post_layernorm."),
    ("visual_encoder.blocks.", "vision_model.encoder.layers."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
)
HF, PRETRAINED = "Hugging Face BlipForImageTextRetrieval", "BLIP, pre-training"
RETRIEVAL = "BLIP, retrieval"
STAGE_I, STAGE_II = "Candidate-Reranking, stage I", "Candidate-Reranking, stage II"
POSITIONS = "visual_encoder.pos_embed"
TEXT, LAYER = "text_encoder.", "text_encoder.encoder.layer."
WORDS = f"{TEXT}embeddings.word_embeddings.weight"
MERGE = "crossattention.output.merge_layer"
# original: a stage II built from a BLIP merges by a linear map from this layer on, however many there are
MERGE_FROM = 6
HEAD_WIDTH = 64
# BLIP adds [DEC] and [ENC] to BERT's vocabulary; models trained here have [ENC] alone. It is the last row of either.
ADDED = (1, 2)
TOKEN, TABLE = Change(ones=2), Change(ones=1)
BLIP_PICTURES = ImageSpec(resize="squash")
RERANKING_PICTURES = ImageSpec(resize="targetpad", convert_first=False)


@dataclass(frozen=True)
class Resized(Change):
    """A position table `[1, 1 + side * side, width]` that becomes one of another grid; it has no way back."""

    side: int = 0
    grid: int = 0

    def forward(self, x: np.ndarray) -> list[np.ndarray]:
        return [resize_positions(x[0].astype(np.result_type(x, np.float32)), self.grid)]

    def source_shape(self, target: Shape) -> Shape:
        return (1, 1 + self.side**2, target[-1])


# ---- the tables ----


def _picture_rules() -> list[Rule]:
    block, to = "visual_encoder.blocks.*", "image/blocks"
    fused = f"{to}/attention/{{query,key,value}}"
    return [
        rule("visual_encoder.cls_token", "image/class_token", TOKEN),
        rule(POSITIONS, "image/positions", TABLE),
        rule("visual_encoder.patch_embed.proj.weight", "image/patch_kernel", CONV),
        rule("visual_encoder.patch_embed.proj.bias", "image/patch_bias"),
        *norm(f"{block}.norm1", f"{to}/ln1"),
        rule(f"{block}.attn.qkv.weight", f"{fused}/kernel", FUSED),
        rule(f"{block}.attn.qkv.bias", f"{fused}/bias", FUSED_BIAS),
        *linear(f"{block}.attn.proj", f"{to}/attention/out"),
        *norm(f"{block}.norm2", f"{to}/ln2"),
        *linear(f"{block}.mlp.fc1", f"{to}/mlp/up"),
        *linear(f"{block}.mlp.fc2", f"{to}/mlp/down"),
        *norm("visual_encoder.norm", "image/ln_post"),
    ]


def _embedding_rules(target: str) -> list[Rule]:
    at, to = f"{TEXT}embeddings", f"{target}/embeddings"
    return [
        rule(WORDS, f"{to}/embedding"),
        rule(f"{at}.position_embeddings.weight", f"{to}/positions"),
        *norm(f"{at}.LayerNorm", f"{to}/ln"),
    ]


def _branch_rules(target: str, number: str = "", letter: str = "", first: int = 0) -> list[Rule]:
    """Both kinds of attention of all layers from `first` on; the suffixes are those of a branch of stage II."""
    made = []
    for theirs, ours, normed in (
        ("attention", "attention", "ln1"),
        ("crossattention", "cross", "ln2"),
    ):
        at, to = f"{LAYER}*.{theirs}", f"{target}/{ours}"
        for part in ("query", "key", "value"):
            made += linear(f"{at}.self{number}.{part}", f"{to}/{part}", first)
        made += linear(f"{at}.output.dense{number}", f"{to}/out", first)
        made += norm(f"{at}.output.LayerNorm{letter}", f"{target}/{normed}", first=first)
    return made


def _feed_rules(target: str, first: int = 0) -> list[Rule]:
    return [
        *linear(f"{LAYER}*.intermediate.dense", f"{target}/mlp/up", first),
        *linear(f"{LAYER}*.output.dense", f"{target}/mlp/down", first),
        *norm(f"{LAYER}*.output.LayerNorm", f"{target}/ln3", first=first),
    ]


def _text_rules(target: str) -> list[Rule]:
    """A text encoder with one branch."""
    blocks = f"{target}/blocks"
    return [
        *_embedding_rules(target),
        *_branch_rules(f"{blocks}/branch"),
        *_feed_rules(blocks),
    ]


def _kinds(config: BlipRerankConfig) -> dict[str, int]:
    """The stacks of layers of stage II -> the number of their first layer."""
    layers, start = config.text.layers, config.merge_from
    kinds = {"mean": (0, start), "linear": (start, layers)}
    return {kind: first for kind, (first, behind) in kinds.items() if first < behind}


def _two_branch_rules(config: BlipRerankConfig, doubled: bool) -> list[Rule]:
    """Stage II's text encoder and head; `doubled`: both branches begin as the one of a BLIP, the rest is no table's."""
    suffixes = {"fused": ("", ""), "text": ("", "")} if doubled else {"fused": "0A", "text": "1B"}
    made = _embedding_rules("text")
    for kind, first in _kinds(config).items():
        blocks = f"text/blocks/{kind}"
        for branch, suffix in suffixes.items():
            made += _branch_rules(f"{blocks}/{branch}", *suffix, first=first)
        made += _feed_rules(blocks, first)
        if kind == "linear" and not doubled:
            made += linear(f"{LAYER}*.{MERGE}", f"{blocks}/merge", first)
    if doubled:
        return made
    return made + linear("cls_head.0", "head/up") + linear("cls_head.2", "head/down")


def _stage1_rules(behind: str) -> list[Rule]:
    """Stage I's text encoder inside stage II."""
    return [replace(each, source=f"{behind}{each.source}") for each in _text_rules("fusion")]


PROJECT = [*linear("vision_proj", "image_project"), *linear("text_proj", "text_project")]
TEMPERATURE = rule("temp", "temperature")


def original(config) -> tuple[tuple[Rule, ...], dict[str, str]]:
    """The table and the notes of an export.

    The notes are what shapes do not tell: heads, what the pictures go through, where texts are cut.
    """
    if isinstance(config, BlipRerankConfig):
        text = [*_two_branch_rules(config, doubled=False), *_stage1_rules("stage1.")]
    else:
        text = [*_text_rules("text"), *PROJECT, TEMPERATURE]
    match = linear("itm_head", "match") if isinstance(config, BlipItmConfig) else []
    notes = {
        "image_heads": str(config.image.heads),
        "text_heads": str(config.text.heads),
        "pictures": json.dumps(to_json(config.inputs.image)),
        "text_length": str(config.inputs.text.length),
    }
    return (*_picture_rules(), *text, *match), notes


# ---- reading a source ----


def plan(sources: Mapping[str, Any], options: Options) -> Plan:
    """How to read a BLIP.

    Args:
      sources: {"": source}, as from `open_source`, for stage II perhaps {"stage1": source} besides.
      options: `variant` is the side of the pictures, if it is not that of the file: the positions are resized.

    Raises:
      ValueError: names of no known layout, sizes that cannot be found, a vocabulary that does not fit.
    """
    source = joined(sources)
    outer = common_prefix(list(source.tensors), "module.")
    tensors = Stripped(source.tensors, outer)
    found = _read(tensors, source, options)
    if options.method == "blip_rerank":
        made = _rerank(found)
    else:
        made = {"blip_cir": _cir, "blip_itm": _itm}[options.method](found)
    return replace(made, prefix=outer, notes=(*found.notes, *made.notes))


@dataclass(frozen=True)
class Found:
    """What all methods ask of a source.

    Attributes:
      tensors, layout: as the table reads them, and as in `Plan`.
      image, text, inputs: of a config.
      pictures: the table of the pictures' encoder.
      notes: as in `Plan`.
    """

    tensors: Stripped
    layout: str
    image: VitConfig
    text: BertConfig
    inputs: Inputs
    pictures: tuple[Rule, ...]
    notes: tuple[str, ...]

    def has(self, name: str) -> bool:
        """Whether the source has a tensor."""
        return name in self.tensors


def _layout(tensors) -> str:
    """What the source is, in words; ValueError if it is none of them."""
    if "vision_model.embeddings.class_embedding" in tensors:
        return HF
    if "visual_encoder.cls_token" not in tensors:
        raise ValueError(
            "this is no BLIP in a known layout: there is neither visual_encoder.cls_token (BLIP, Candidate-Reranking) "
            "nor vision_model.embeddings.class_embedding (Hugging Face) among its "
            f"{len(tensors)} tensors, which begin with {', '.join(map(repr, sorted(tensors)[:3])) or 'none'}"
        )
    if f"{LAYER}0.attention.self0.query.weight" in tensors:
        return STAGE_II
    decoder = any(name.startswith("text_decoder.") for name in tensors)
    if decoder or "itm_head.weight" in tensors:
        return PRETRAINED if decoder else RETRIEVAL
    return STAGE_I


def _read(tensors, source, options: Options) -> Found:
    layout = _layout(tensors)
    noted = _noted(source.facts, layout)
    image, text, table, notes = _sizes(tensors, layout, noted, options)
    reranking = options.method == "blip_rerank" or layout in (STAGE_I, STAGE_II)
    pictures = noted.get("pictures", RERANKING_PICTURES if reranking else BLIP_PICTURES)
    words = _texts(text, min(noted.get("text_length", text.length), text.length), options)
    inputs = Inputs(replace(pictures, size=image.size), words)
    return Found(
        tensors,
        layout,
        image,
        text,
        inputs,
        tuple(table),
        (*notes, *_unheeded(source.config, image, text)),
    )


def _noted(facts: Mapping[str, Any], layout: str) -> dict[str, Any]:
    """What an export of ours says besides its tensors."""
    if "cir_jax" not in facts:
        return {}
    try:
        noted = {name: int(facts[name]) for name in ("image_heads", "text_heads", "text_length")}
        pictures = from_json(ImageSpec, json.loads(facts["pictures"]))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        refuse([f"its notes are not those that --export writes ({error})"], layout)
    if not all(0 < value < 10_000 for value in noted.values()):
        refuse([f"its notes are not those that --export writes ({noted})"], layout)
    return noted | {"pictures": pictures}


def _sizes(tensors, layout, noted, options: Options):
    """(picture tower, text tower, table of the first, notes)."""
    name = _their_name if layout == HF else str
    shape = lambda theirs, axes=2: shape_of(tensors, name(theirs), layout, axes)
    width, _, _, patch = shape("visual_encoder.patch_embed.proj.weight", 4)
    rows = shape(POSITIONS, 3)[1]
    side = math.isqrt(max(0, rows - 1))
    if side < 1 or side**2 + 1 != rows:
        refuse([f"{name(POSITIONS)} has {rows} rows, expected 1 and a square"], layout)
    size = _wanted_size(options.variant, patch) or patch * side
    image = VitConfig(
        size=size,
        patch=patch,
        width=width,
        layers=layer_count(tensors, name("visual_encoder.blocks.")),
        heads=_heads(width, noted.get("image_heads"), layout),
    )
    vocabulary, words = shape(WORDS)
    text = BertConfig(
        vocabulary=vocabulary,
        length=shape(f"{TEXT}embeddings.position_embeddings.weight")[0],
        width=words,
        layers=layer_count(tensors, LAYER),
        heads=_heads(words, noted.get("text_heads"), layout),
        hidden=shape(f"{LAYER}0.intermediate.dense.weight")[0],
        types=0,
        image_width=width,
    )
    table, notes = _picture_rules(), []
    if size != patch * side:
        change = Resized(side=side, grid=size // patch)
        table = [replace(r, change=change) if r.source == POSITIONS else r for r in table]
        notes = [
            f"positions of {patch * side} pixels resized for {size} (bicubic, as BLIP does), by --variant"
        ]
    return image, text, [replace(each, source=name(each.source)) for each in table], notes


def _their_name(name: str) -> str:
    """Hugging Face's name of a tensor; those of the text encoder are the original's."""
    for ours, theirs in HUGGING_FACE if name.startswith("visual_encoder.") else ():
        name = name.replace(ours, theirs)
    return name


def _wanted_size(variant: str | None, patch: int) -> int | None:
    """The side of the pictures that --variant asks for."""
    if variant is None:
        return None
    if not re.fullmatch("[1-9][0-9]{0,3}", variant) or int(variant) % patch:
        raise ValueError(
            f"--variant of a BLIP is the side of its pictures in pixels, a multiple of {patch} such as 384; found {variant}"
        )
    return int(variant)


def _heads(width: int, noted: int | None, layout: str) -> int:
    if noted is None and width % HEAD_WIDTH:
        refuse(
            [f"a width of {width} does not tell the heads; BLIP's are {HEAD_WIDTH} wide"], layout
        )
    return noted or width // HEAD_WIDTH


def _unheeded(config: Mapping | None, image: VitConfig, text: BertConfig) -> list[str]:
    """A note if Hugging Face's config.json says what is not so."""
    used = {
        "vision_config": {"num_attention_heads": image.heads, "layer_norm_eps": EPSILON},
        "text_config": {"num_attention_heads": text.heads, "layer_norm_eps": text.epsilon},
    }
    wrong = [
        f"{part}.{key} {files.shown(said[key])} (BLIP has {value})"
        for part, values in used.items()
        if isinstance(said := (config or {}).get(part), Mapping)
        for key, value in values.items()
        if key in said and said[key] != value
    ]
    return [f"config.json is not followed in {', '.join(wrong)}"] if wrong else []


def _texts(text: BertConfig, length: int, options: Options) -> TextSpec:
    """Texts up to the last position: Candidate-Reranking never cuts any."""
    path = options.tokenizer or (options.folder and options.folder / "vocab.txt")
    if path is None or not path.is_file():
        raise ValueError(
            "the file does not hold its vocabulary; give the vocab.txt of bert-base-uncased with --tokenizer FILE"
        )
    spec = TextSpec("wordpiece", str(path), length)
    words = tokenizer(spec).size
    if text.vocabulary - words not in ADDED:
        raise ValueError(
            f"the table of words has {text.vocabulary:,} rows, expected the {words:,} ids of {path} and two more, [DEC] "
            "and [ENC]; give its own vocabulary with --tokenizer FILE"
        )
    return spec


# ---- the methods ----


def _cir(found: Found) -> Plan:
    _refuse_stage2(found, "blip_cir")
    config = BlipCirConfig(found.image, found.text, _embed(found), inputs=found.inputs)
    return _with_temperature(config, found, [], IGNORED | MATCH)


def _itm(found: Found) -> Plan:
    _refuse_stage2(found, "blip_itm")
    if not found.has("itm_head.weight"):
        raise ValueError(
            f"{found.layout}: there is no itm_head.weight, which says whether a text and a picture match; take a BLIP "
            "of retrieval or of pre-training, or --method blip_cir"
        )
    config = BlipItmConfig(found.image, found.text, _embed(found), inputs=found.inputs)
    return _with_temperature(config, found, linear("itm_head", "match"), IGNORED)


def _refuse_stage2(found: Found, method: str) -> None:
    if found.layout == STAGE_II:
        raise ValueError(
            f"this is a stage II of Candidate-Reranking, no {method}; use --method blip_rerank"
        )


def _embed(found: Found) -> int:
    return shape_of(found.tensors, "vision_proj.weight", found.layout)[0]


def _with_temperature(config, found: Found, more: list[Rule], ignored) -> Plan:
    table = [*found.pictures, *_text_rules("text"), *PROJECT, *more]
    # A file for using the model alone has none; that of a training without it is damaged.
    trained = found.layout not in (HF, RETRIEVAL) or found.has("vision_proj_m.weight")
    if trained or found.has("temp"):
        return Plan(config, (*table, TEMPERATURE), found.layout, ignored)
    note = "the temperature is not in the file and begins at 0.07; only training reads it"
    return Plan(config, tuple(table), found.layout, ignored, notes=(note,), fresh=("temperature",))


def _rerank(found: Found) -> Plan:
    doubled = found.layout != STAGE_II
    apart = any(name.startswith("stage1.") for name in found.tensors)
    if not doubled and not apart:
        raise ValueError(
            "a file of stage II does not hold the text encoder of stage I, whose state it reads; give that file too: "
            "python -m cir_jax.convert STAGE2 stage1=STAGE1 DEST --method blip_rerank"
        )
    layers = found.text.layers
    merge_from = min(MERGE_FROM, layers) if doubled else _merge_from(found.tensors, layers)
    config = BlipRerankConfig(found.image, found.text, merge_from, inputs=found.inputs)
    fresh, notes = _fresh(config) if doubled else ((), [])
    notes += ["the text encoder of stage I is that of stage1"] if apart else []
    table = [
        *found.pictures,
        *_two_branch_rules(config, doubled),
        *_stage1_rules("stage1." if apart else ""),
    ]
    ignored = IGNORED | MATCH | HEADS | STAGE1
    seen = any(re.fullmatch(pattern, name) for pattern in STAGE1 for name in found.tensors)
    faults = _other_pictures(found) if seen else ()
    return Plan(config, tuple(table), found.layout, ignored, "", tuple(notes), tuple(faults), fresh)


def _merge_from(tensors, layers: int) -> int:
    """The first layer of stage II that merges by a linear map."""
    merged = (f"{LAYER}{n}.{MERGE}.weight" in tensors for n in range(layers))
    return next((n for n, linear in enumerate(merged) if linear), layers)


def _fresh(config: BlipRerankConfig) -> tuple[tuple[str, ...], list[str]]:
    """The parameters of stage II that no BLIP has, and the note with the names of their tensors."""
    first, last = config.merge_from, config.text.layers - 1
    parts = ["head/up", "head/down"]
    names = ["cls_head.{0,2}.{weight,bias}"]
    count = 4
    if first <= last:
        parts.append("text/blocks/linear/merge")
        names.insert(0, f"{LAYER}{{{first}…{last}}}.{MERGE}.{{weight,bias}}")
        count += 2 * (last - first + 1)
    note = f"{count} tensors that no BLIP has begin at random (seed 0): {', '.join(names)}"
    return tuple(f"{part}/{each}" for part in parts for each in ("kernel", "bias")), [note]


def _other_pictures(found: Found) -> list[str]:
    """Faults if stage I reads pictures by other numbers than stage II: here both share one encoder."""
    own = {each.source for each in found.pictures}
    names = [n for n in found.tensors if re.sub(r"\.[0-9]+\.", ".*.", n, count=1) in own]
    differ = [name for name in names if not _same(found, name)]
    if not differ:
        return []
    return [
        f"stage1 has not the picture encoder of stage II: {len(differ)} of its {len(names)} tensors are not there or "
        f"differ, such as {differ[0]}; expected two stages of one BLIP"
    ]


def _same(found: Found, name: str) -> bool:
    tensors, theirs = found.tensors, f"stage1.{name}"
    if theirs not in tensors or len(tensors.shape(name)) != len(tensors.shape(theirs)):
        return False
    if not name.endswith((POSITIONS, _their_name(POSITIONS))):
        return np.array_equal(tensors[name], tensors[theirs])
    # One of the two may be of another size, and PyTorch resized the other.
    grid = found.image.size // found.image.patch
    try:
        x, y = (resize_positions(tensors[each][0], grid) for each in (name, theirs))
    except ValueError:
        return False
    return x.shape == y.shape and np.allclose(x, y, rtol=0, atol=1e-5 * max(1, np.abs(x).max()))
