"""The tables of textual inversion: FTI4CIR's module `IMG2TEXT`, `Phi` of SEARLE and LinCIR, `IM2TEXT` of Pic2Word.

Each file holds the mapping network alone; the CLIP that it belongs to is a file of its own, whose table is put under
the method's `clip/` by `clip_rules`.
"""

from dataclasses import replace

from cir_jax.conversion.clip import openai_rules
from cir_jax.conversion.rules import LINEAR, Change, Rule, linear, norm, rule
from cir_jax.methods.clip import ClipConfig

KEYS_VALUES = Change(parts=2, axes=(1, 0))  # one projection of key and value
# Names of the three layers of `Phi` in a `Sequential` with activation and dropout between them.
PHI = {"0": "up", "3": "across", "6": "down"}
IM2TEXT = {"layers.0.0": "up", "layers.1.0": "across", "fc_out": "down"}
IGNORED = {"criterion_target": "the constant 1 that the loss compares with"}


def clip_rules(config: ClipConfig) -> tuple[Rule, ...]:
    """OpenAI's table of the CLIP inside a method of textual inversion."""
    below = lambda each: replace(each, targets=tuple(f"clip/{name}" for name in each.targets))
    return tuple(below(each) for each in openai_rules(config))


def phi_rules(source: str = "layers", target: str = "mapper") -> tuple[Rule, ...]:
    """The table of a mapping network of SEARLE, LinCIR or FTI4CIR."""
    layers = (linear(f"{source}.{name}", f"{target}/{ours}") for name, ours in PHI.items())
    return tuple(each for layer in layers for each in layer)


def pic2word_rules() -> tuple[Rule, ...]:
    """The table of Pic2Word's mapping network (`state_dict_img2text`, its names perhaps behind `module.`)."""
    layers = (linear(name, f"mapper/{ours}") for name, ours in IM2TEXT.items())
    return tuple(each for layer in layers for each in layer)


def fti4cir_rules() -> tuple[Rule, ...]:
    """The table of FTI4CIR's module."""
    layer, block = "transformer.layers.*", "attributes/blocks"
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
