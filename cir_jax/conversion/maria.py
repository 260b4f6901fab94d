"""Maria's retrieval model and Vokenization's (`BEST.pth` of jokieleung/Maria and airsplay/vokenization).

The names of the heads tell which of the two it is; all sizes come from the shapes. And either as its training begins, from
torchvision's ResNeXt and Hugging Face's BERT (`bert=SOURCE`), with new heads.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cir_jax.conversion import bert
from cir_jax.conversion.inversion import folder_of
from cir_jax.conversion.rules import (
    CONV,
    Options,
    Plan,
    Rule,
    Stripped,
    common_prefix,
    layer_count,
    linear,
    rule,
    shape_of,
    within,
)
from cir_jax.data.text import tokenizer
from cir_jax.encoders.resnext import ResnextConfig
from cir_jax.methods.maria import MariaConfig, maria, vokenization

TEXT, IMAGE = "lang_model.backbone.", "visn_model.backbone."
PARTS = {"maria": ("bert",)}  # further sources
PUBLISHED = {"sentence": maria, "token": vokenization}
IGNORED = {
    r".*\.position_ids": "the numbers 0, 1, 2 … of the positions",
    r".*\.token_type_ids": "zeros",
    r".*\.num_batches_tracked": "a count of training steps",
    r"lang_model\.backbone\.pooler\..*": "the pooler is trained for sentence pairs; the heads read the states",
    r"(visn_model\.backbone\.)?fc\..*": "ImageNet's classes",
}
NORM = (
    ("weight", "scale"),
    ("bias", "bias"),
    ("running_mean", "mean"),
    ("running_var", "variance"),
)


def _convolution(source: str, normed: str, target: str, first: int = 0) -> list[Rule]:
    return [
        rule(f"{source}.weight", f"{target}/kernel", CONV, first),
        *(rule(f"{normed}.{a}", f"{target}/norm/{b}", first=first) for a, b in NORM),
    ]


def _block(source: str, target: str, first: int = 0) -> list[Rule]:
    made = []
    for n in (1, 2, 3):
        made += _convolution(f"{source}.conv{n}", f"{source}.bn{n}", f"{target}/conv{n}", first)
    return made


def resnext_rules(config: ResnextConfig, prefix: str = "") -> list[Rule]:
    """The table of torchvision's names."""
    made = _convolution(f"{prefix}conv1", f"{prefix}bn1", "resnext/stem")
    for n, layers in enumerate(config.layers, 1):
        stage, first = f"{prefix}layer{n}", f"resnext/stage{n}/first"
        made += _block(f"{stage}.0", first)
        down = f"{stage}.0.downsample"
        made += _convolution(f"{down}.0", f"{down}.1", f"{first}/shortcut")
        made += _block(f"{stage}.*", f"resnext/stage{n}/blocks", 1) if layers > 1 else []
    return made


def _heads(config: MariaConfig) -> list[Rule]:
    names = _layer_names(config.level, len(config.hidden) + 1)
    pairs = (("lang_model", "text_head"), ("visn_model", "image_head"))
    return [
        each
        for theirs, ours in pairs
        for n, name in enumerate(names, 1)
        for each in linear(f"{theirs}.{name}", f"{ours}/linear{n}")
    ]


def _layer_names(level: str, count: int) -> list[str]:
    """What the original calls the layers of a head; between Vokenization's stand an activation and a dropout."""
    return [f"mlp.linears.{n}" if level == "sentence" else f"mlp.{3 * n}" for n in range(count)]


def rules(config: MariaConfig) -> tuple[Rule, ...]:
    """The table: BERT as `transformers` names it, torchvision's ResNeXt, two heads."""
    return (*bert.rules(TEXT), *resnext_rules(config.resnext, IMAGE), *_heads(config))


def original(config: MariaConfig) -> tuple[tuple[Rule, ...], dict[str, str]]:
    """The table and the notes of an export."""
    return rules(config), {"level": config.level}


def plan(sources: Mapping[str, Any], options: Options) -> Plan:
    """How to read a checkpoint, or {"": a ResNeXt, "bert": a BERT}; errors as of `cir_jax.conversion.clip.plan`."""
    if "bert" in sources:
        return _beginning(sources, options)
    source = sources[""]
    names = list(source.tensors)
    outer = common_prefix(names, "module.")
    tensors = Stripped(source.tensors, outer)
    levels = {"lang_model.mlp.linears.0.weight": "sentence", "lang_model.mlp.0.weight": "token"}
    found = [level for name, level in levels.items() if name in tensors]
    if len(found) != 1:
        raise ValueError(
            "this is no retrieval model of Maria or Vokenization: of lang_model.mlp.linears.0.weight (Maria) and "
            f"lang_model.mlp.0.weight (Vokenization) it has {len(found)}, expected one"
        )
    layout = "Maria's retrieval model" if found[0] == "sentence" else "Vokenization's model"
    config = _config(tensors, found[0], layout, source.config or {}, options)
    note = f'level "{config.level}" by the names of the heads'
    return Plan(config, rules(config), layout, IGNORED, outer, (note,))


def _beginning(sources: Mapping[str, Any], options: Options) -> Plan:
    """The model before its training; --variant token is Vokenization's."""
    tensors, level = sources[""].tensors, options.variant or "sentence"
    if level not in PUBLISHED:
        raise ValueError(f"--variant is {level!r}; expected {' or '.join(PUBLISHED)}")
    if "layer1.0.conv2.weight" not in tensors:
        raise ValueError(
            "this is no ResNeXt of torchvision: there is no layer1.0.conv2.weight; with bert=SOURCE the first source is "
            "one, as resnext101_32x8d-8ba56ff5.pth"
        )
    folder = folder_of(sources["bert"])
    # How a sentence becomes one vector is another method's question.
    text = bert.plan({"": sources["bert"]}, replace(options, variant="mean", folder=folder))
    config = replace(
        PUBLISHED[level](text.config.inputs.text.vocab),
        bert=replace(text.config.bert, dropout=0.0),
        resnext=_resnext(tensors, "torchvision's ResNeXt", ""),
    )
    fresh = tuple(name for each in _heads(config) for name in each.targets)
    return Plan(
        config,
        (*resnext_rules(config.resnext), *within(text.rules, f"bert.{text.prefix}")),
        f"torchvision's ResNeXt with {text.layout}",
        IGNORED | {rf"bert\.(module\.)?({name})": why for name, why in text.ignored.items()},
        notes=(
            f'level "{level}"',
            "both heads begin at random (seed 0); train it before it searches",
        ),
        fresh=fresh,
    )


def _config(tensors, level: str, layout: str, said: Mapping, options: Options) -> MariaConfig:
    text = replace(bert.sizes(tensors, TEXT, layout, said), dropout=0.0)
    shapes = [
        shape_of(tensors, f"lang_model.{name}.weight", layout) for name in _present(tensors, level)
    ]
    read = shapes[0][1]
    if read % text.width:
        raise ValueError(
            f"the text head reads {read} numbers, which are no whole states of {text.width}"
        )
    if read == text.width and options.variant != "last":
        # original: --lang-layers is negated, so that its default "-1" reads the first layer and "1" the last
        raise ValueError(
            "the text head reads one layer of BERT, and the file does not tell which: add --variant last if it was "
            'trained with --lang-layers 1; with the default, "-1", it reads the first, which this model cannot do'
        )
    published = maria if level == "sentence" else vokenization
    return replace(
        published(str(_vocabulary(text, options))),
        bert=text,
        resnext=_resnext(tensors, layout),
        text_layers=read // text.width,
        hidden=tuple(shape[0] for shape in shapes[:-1]),
        embed=shapes[-1][0],
    )


def _present(tensors, level: str) -> list[str]:
    """The layers of the text head, in order."""
    names, made = set(tensors), []
    for name in _layer_names(level, 100):
        if f"lang_model.{name}.weight" not in names:
            return made
        made.append(name)
    return made


def _resnext(tensors, layout: str, prefix: str = IMAGE) -> ResnextConfig:
    inner, group_width, *_ = shape_of(tensors, f"{prefix}layer1.0.conv2.weight", layout, 4)
    return ResnextConfig(
        layers=tuple(layer_count(tensors, f"{prefix}layer{n}.") for n in (1, 2, 3, 4)),
        width=shape_of(tensors, f"{prefix}conv1.weight", layout, 4)[0],
        groups=max(1, inner // group_width),
        group_width=group_width,
    )


def _vocabulary(text, options: Options):
    if options.tokenizer is None:
        raise ValueError(
            "the file does not hold its vocabulary; give the vocab.txt of bert-base-uncased with --tokenizer FILE"
        )
    spec = maria(str(options.tokenizer)).inputs.text
    if (words := tokenizer(spec).size) != text.vocabulary:
        raise ValueError(
            f"the table of words has {text.vocabulary:,} rows, {options.tokenizer} gives {words:,} ids; give its own "
            "vocabulary with --tokenizer FILE"
        )
    return options.tokenizer
