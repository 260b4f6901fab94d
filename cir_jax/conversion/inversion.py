"""Textual inversion: FTI4CIR's module `IMG2TEXT`, `Phi` of SEARLE and LinCIR, `IM2TEXT` of Pic2Word, and their CLIP.

The file of a system holds its network. The CLIP that it belongs to is a file of its own, `clip=SOURCE`, or lies in the
same file (Pic2Word's checkpoints). An export puts CLIP's names behind `clip.`.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from cir_jax.conversion import clip
from cir_jax.conversion.rules import (
    LINEAR,
    Change,
    Options,
    Plan,
    Rule,
    layer_count,
    linear,
    norm,
    rule,
    shape_of,
    within,
)
from cir_jax.conversion.sources import Source, Tensors
from cir_jax.methods.clip import ClipConfig
from cir_jax.methods.fti4cir import Fti4cirConfig
from cir_jax.methods.inversion import LinCirConfig, Pic2WordConfig, SearleConfig

KEYS_VALUES = Change(parts=2, axes=(1, 0))  # one projection of key and value
# Names of the three layers of `Phi` in a `Sequential` with activation and dropout between them.
PHI = {"0": "up", "3": "across", "6": "down"}
IM2TEXT = {"layers.0.0": "up", "layers.1.0": "across", "fc_out": "down"}
IGNORED = {
    r"(.*\.)?criterion_target": "the constant 1 that the loss compares with",
    r"(optimizer|scheduler|scaler)\..*": "the state of training",
}
CLIP = "clip."  # before the names of the tensors of `clip=SOURCE`, and before those of an export
CLIP_ANCHOR = "visual.conv1.weight"
BLOCK = "transformer.layers."
# Attribute of `IMG2TEXT` -> (field, the published value); a state dict does not hold them.
ATTRIBUTES = {
    "topk": ("kept", 12),
    "epsilon": ("threshold", 0.05),
    f"{BLOCK}0.attn.num_heads": ("attribute_heads", 1),
    "temperature": ("temperature", 0.2),
    "hy_regLoss": ("regularisation", 1.4),
}
PUBLISHED = "published"


# ---- the tables ----


def phi_rules(source: str = "layers", target: str = "mapper") -> tuple[Rule, ...]:
    """The table of a mapping network of SEARLE, LinCIR or FTI4CIR."""
    layers = (linear(f"{source}.{name}", f"{target}/{ours}") for name, ours in PHI.items())
    return tuple(each for layer in layers for each in layer)


def pic2word_rules() -> tuple[Rule, ...]:
    """The table of Pic2Word's mapping network (`state_dict_img2text`)."""
    layers = (linear(name, f"mapper/{ours}") for name, ours in IM2TEXT.items())
    return tuple(each for layer in layers for each in layer)


def fti4cir_rules() -> tuple[Rule, ...]:
    """The table of FTI4CIR's module."""
    layer, block = f"{BLOCK}*", "attributes/blocks"
    attention = f"{block}/attention"
    return (
        rule("templates", "attributes/queries"),
        *phi_rules("phi_s.layers", "subject_mapper"),
        *phi_rules("phi_a.layers", "attribute_mapper"),
        *linear("local_atte_fc.0", "attributes/project"),
        *norm(f"{layer}.norm1", f"{block}/ln1"),
        rule(f"{layer}.attn.to_queries.weight", f"{attention}/query/kernel", LINEAR),
        rule(
            f"{layer}.attn.to_keys_values.weight", f"{attention}/{{key,value}}/kernel", KEYS_VALUES
        ),
        *linear(f"{layer}.attn.project", f"{attention}/out"),
        *norm(f"{layer}.norm2", f"{block}/ln2"),
        *linear(f"{layer}.mlp.fc1", f"{block}/mlp/up"),
        *linear(f"{layer}.mlp.fc2", f"{block}/mlp/down"),
    )


# ---- from sources to a plan ----


@dataclass(frozen=True)
class Network:
    """How the file of one system is read.

    Attributes:
      config: type of the method's.
      layout: what the file is, in words.
      anchor: a tensor that every such file has; what stands before its name stands before all names of the network.
      rules: makes the table of the network.
      fields: (fields of the config besides CLIP's, notes) from (tensors, prefix, facts, options).
      image: fields of the picture transform that are not CLIP's own; whether RGB comes first is `--resize-first`.
      hint: what else to say where a file is none of the system's.
    """

    config: type
    layout: str
    anchor: str
    rules: Callable[[], tuple[Rule, ...]]
    fields: Callable[[Tensors, str, Mapping[str, Any], Options], tuple[dict, tuple[str, ...]]]
    image: Mapping[str, Any]
    hint: str = ""

    def prefix(self, tensors: Mapping) -> str:
        """What the names of the network begin with."""
        found = _before(tensors, self.anchor)
        if len(found) != 1:
            raise ValueError(
                f"this is no {self.layout}: of its {len(tensors)} tensors {len(found)} are called {self.anchor}, "
                f"whatever stands before it; expected one{self.hint}"
            )
        return found[0]


def original(config) -> tuple[tuple[Rule, ...], dict[str, str]]:
    """The table and the notes of an export."""
    network = next(each for each in NETWORKS.values() if each.config is type(config))
    table, notes = clip.original(config)
    if network is FTI4CIR:
        notes |= {name: str(getattr(config, field)) for name, (field, _) in ATTRIBUTES.items()}
    return (*network.rules(), *within(table, CLIP, "clip/")), notes


def plan(sources: Mapping[str, Any], options: Options) -> Plan:
    """How to read {"": the network, "clip": its CLIP, if that is a source of its own}; errors as of `clip.plan`."""
    source, network = sources[""], NETWORKS[options.method]
    prefix = network.prefix(source.tensors)
    own, notes = network.fields(source.tensors, prefix, source.facts, options)
    place, found = _clip(sources, network.layout)
    variant = None if options.variant == PUBLISHED else options.variant
    base = clip.plan({"": found}, replace(options, variant=variant, folder=folder_of(found)))
    place += base.prefix
    inputs = base.config.inputs
    image = replace(inputs.image, **{"resize": "short", "crop_offset": "round", **network.image})
    shared = {each.name: getattr(base.config, each.name) for each in fields(ClipConfig)}
    ignored = {f"{re.escape(place)}({pattern})": why for pattern, why in base.ignored.items()}
    return Plan(
        config=network.config(**{**shared, "inputs": replace(inputs, image=image), **own}),
        rules=(*within(network.rules(), prefix), *within(base.rules, place, "clip/")),
        layout=f"{network.layout} with {base.layout}",
        ignored=IGNORED | ignored,
        notes=(*notes, *base.notes),
        faults=base.faults,
    )


def _clip(sources: Mapping[str, Source], layout: str) -> tuple[str, Source]:
    """(what the names of CLIP's tensors begin with among all, the source of CLIP)."""
    source = sources[""]
    inside = _before(source.tensors, CLIP_ANCHOR)
    if len(inside) + ("clip" in sources) > 1:
        places = [f"in the file behind {each!r}" for each in inside]
        places += ["by clip="] if "clip" in sources else []
        raise ValueError(f"{layout}: there are several CLIPs, {', '.join(places)}; expected one")
    if "clip" in sources:
        return CLIP, sources["clip"]
    if not inside:
        raise ValueError(
            f"{layout}: the file does not hold the CLIP that it was trained on; put clip=FILE (OpenAI's ViT-L-14.pt, "
            "ViT-B-32.pt, …) between SOURCE and DEST"
        )
    (prefix,) = inside
    records = source.tensors.records.items()
    kept = {name.removeprefix(prefix): x for name, x in records if name.startswith(prefix)}
    return prefix, replace(source, tensors=Tensors(kept), files=())


def _before(tensors: Mapping, anchor: str) -> list[str]:
    """What stands before the name of a tensor, for each tensor that ends with it."""
    return [
        name.removesuffix(anchor)
        for name in tensors
        if name == anchor or name.endswith(f".{anchor}")
    ]


def folder_of(source: Source):
    """The folder in which a model of Hugging Face says more about itself."""
    beside = source.files and source.layout == "hugging face folder"
    return source.files[0].parent if beside else None


def _hidden(layout: str, layer: str) -> Callable:
    """The one field of a network whose first layer is called so."""

    def made(tensors, prefix, facts, options):
        return {"mapper_hidden": shape_of(tensors, f"{prefix}{layer}.weight", layout)[0]}, ()

    return made


def _fti4cir(tensors, prefix, facts, options) -> tuple[dict, tuple[str, ...]]:
    """The sizes, and what only the pickled module or an export of ours knows."""
    layout = FTI4CIR.layout
    values = _attributes(prefix, facts, options)
    made = {
        "attributes": shape_of(tensors, f"{prefix}templates", layout, 3)[1],
        "attribute_layers": layer_count(tensors, f"{prefix}{BLOCK}"),
        "mapper_hidden": shape_of(tensors, f"{prefix}phi_s.layers.0.weight", layout)[0],
    }
    told = ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in values.items())
    note = f"{told} by {'--variant' if options.variant == PUBLISHED else 'the file'}"
    return made | {ATTRIBUTES[name][0]: value for name, value in values.items()}, (note,)


def _attributes(prefix: str, facts: Mapping[str, Any], options: Options) -> dict[str, float]:
    """The values of `ATTRIBUTES`, which only who converts knows where the file is a state dict."""
    published = {name: value for name, (_, value) in ATTRIBUTES.items()}
    if options.variant == PUBLISHED:
        return published
    missing = [name for name in published if prefix + name not in facts]
    if missing:
        raise ValueError(
            f"{FTI4CIR.layout}: a state dict does not tell {', '.join(missing)}; convert the pickled module itself, or "
            "add --variant published for the published values (at most 12 attributes, those above 0.05)"
        )
    return {name: _number(name, facts[prefix + name], like) for name, like in published.items()}


def _number(name: str, value: Any, like: float) -> float:
    """A number that the file holds as one, or, in the notes of an export, as text."""
    try:
        number = type(like)(value) if type(value) in (str, int, float) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not 0 <= number < 10_000 or (type(value) is not str and number != value):
        raise ValueError(
            f"{FTI4CIR.layout}: it has {name} {value!r}, expected a number such as {like}"
        )
    return number


FTI4CIR = Network(
    Fti4cirConfig,
    "FTI4CIR's IMG2TEXT",
    "templates",
    fti4cir_rules,
    _fti4cir,
    {"resize": "targetpad"},
)
PIC2WORD = Network(
    Pic2WordConfig,
    "Pic2Word's IM2TEXT",
    "layers.0.0.weight",
    pic2word_rules,
    _hidden("Pic2Word's IM2TEXT", "layers.0.0"),
    {},
)
SEARLE = Network(
    SearleConfig,
    "SEARLE's phi",
    "layers.0.weight",
    phi_rules,
    _hidden("SEARLE's phi", "layers.0"),
    {"resize": "targetpad"},
    "; the words of SEARLE-OTI (oti_pseudo_tokens.pt) belong to single pictures and are no model, cir_jax.methods.oti "
    "finds such",
)
LINCIR = Network(
    LinCirConfig,
    "LinCIR's phi",
    "layers.0.weight",
    phi_rules,
    _hidden("LinCIR's phi", "layers.0"),
    {"crop_offset": "floor"},
)
NETWORKS = {"fti4cir": FTI4CIR, "pic2word": PIC2WORD, "searle": SEARLE, "lincir": LINCIR}
# The further sources of each method, and what is read of the first one: all groups of tensors.
PARTS = dict.fromkeys(NETWORKS, ("clip",))
GROUP = "*"
