"""BERT as a sentence encoder: Hugging Face `BertModel`, alone or behind `bert.`, old files and sentence-transformers."""

from collections.abc import Mapping
from typing import Any

from cir_jax.conversion.rules import (
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
from cir_jax.data.inputs import Inputs
from cir_jax.data.text import TextSpec, tokenizer
from cir_jax.encoders.bert import BertConfig
from cir_jax.methods.bert import BertSentenceConfig

IGNORED = {
    r"(bert\.)?embeddings\.position_ids": "the numbers 0, 1, 2 … of the positions",
    r"(bert\.)?pooler\.dense\.(weight|bias)": "the pooler is trained for sentence pairs; vectors come from the last state",
    r"cls\..*": "heads of pre-training",
}
# Of models without config.json: BERT's published sizes.
HEADS = {768: 12, 1024: 16}
POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


def rules(prefix: str = "", names: tuple[str, str] = ("weight", "bias")) -> tuple[Rule, ...]:
    """The table of Hugging Face's names; `names` are those of LayerNorm's two vectors, in old files gamma and beta."""
    at, layer, block = f"{prefix}embeddings", f"{prefix}encoder.layer.*", "bert/blocks"
    attention = f"{layer}.attention"
    made = [
        rule(f"{at}.word_embeddings.weight", "bert/embeddings/embedding"),
        rule(f"{at}.position_embeddings.weight", "bert/embeddings/positions"),
        rule(f"{at}.token_type_embeddings.weight", "bert/embeddings/types"),
        *norm(f"{at}.LayerNorm", "bert/embeddings/ln", names),
    ]
    for part in ("query", "key", "value"):
        made += linear(f"{attention}.self.{part}", f"{block}/branch/attention/{part}")
    return (
        *made,
        *linear(f"{attention}.output.dense", f"{block}/branch/attention/out"),
        *norm(f"{attention}.output.LayerNorm", f"{block}/branch/ln1", names),
        *linear(f"{layer}.intermediate.dense", f"{block}/mlp/up"),
        *linear(f"{layer}.output.dense", f"{block}/mlp/down"),
        *norm(f"{layer}.output.LayerNorm", f"{block}/ln3", names),
    )


def plan(sources: Mapping[str, Any], options: Options) -> Plan:
    """How to read a BERT; arguments and errors as of `cir_jax.conversion.clip.plan`."""
    source = sources[""]
    names = list(source.tensors)
    outer = common_prefix(names, "module.")
    tensors = Stripped(source.tensors, outer)
    word = "embeddings.word_embeddings.weight"
    prefix = next((p for p in ("", "bert.") if p + word in tensors), None)
    if prefix is None:
        raise ValueError(
            f"this is no BERT in a known layout: there is neither {word} nor bert.{word} among its {len(names)} "
            f"tensors, which begin with {', '.join(map(repr, sorted(names)[:3])) or 'none'}"
        )
    old = f"{prefix}embeddings.LayerNorm.gamma" in tensors
    layout = f"Hugging Face BertModel{' behind bert.' if prefix else ''}"
    bert = sizes(tensors, prefix, layout, source.config or {})
    pooling, why = _pooling(options)
    config = BertSentenceConfig(bert, pooling, inputs=_inputs(bert, options))
    made = rules(prefix, ("gamma", "beta") if old else ("weight", "bias"))
    return Plan(config, made, layout, IGNORED, outer, (why,))


def sizes(tensors, prefix: str, layout: str, said: Mapping) -> BertConfig:
    """The sizes: from the shapes, and the number of heads and the epsilon from config.json."""
    faults = _config_faults(said)
    shapes = {}
    for part, name in {
        "words": "embeddings.word_embeddings.weight",
        "positions": "embeddings.position_embeddings.weight",
        "types": "embeddings.token_type_embeddings.weight",
        "hidden": "encoder.layer.0.intermediate.dense.weight",
    }.items():
        name = prefix + name
        if name not in tensors:
            faults.append(f"missing {name}, from which the sizes are read")
        elif len(tensors.shape(name)) != 2:
            faults.append(f"{name} has shape {list(tensors.shape(name))}, expected two axes")
        else:
            shapes[part] = tensors.shape(name)
    refuse(faults, layout)
    vocabulary, width = shapes["words"]
    heads = said.get("num_attention_heads", HEADS.get(width))
    if heads is None:
        raise ValueError(
            f"{layout}: a width of {width} does not tell the number of heads; put config.json into the same folder "
            "and convert the folder"
        )
    return BertConfig(
        vocabulary=vocabulary,
        length=shapes["positions"][0],
        width=width,
        layers=layer_count(tensors, f"{prefix}encoder.layer."),
        heads=heads,
        hidden=shapes["hidden"][0],
        types=shapes["types"][0],
        epsilon=float(said.get("layer_norm_eps", 1e-12)),
    )


def _config_faults(said: Mapping) -> list[str]:
    """What a config.json says that this BERT does not compute."""
    expected = {
        "hidden_act": ("gelu",),
        "position_embedding_type": ("absolute",),
        "is_decoder": (False,),
        "model_type": ("bert",),
    }
    faults = [
        f"config.json has {key} {said[key]!r}, expected {values[0]!r}"
        for key, values in expected.items()
        if said.get(key, values[0]) not in values
    ]
    heads, epsilon = said.get("num_attention_heads", 1), said.get("layer_norm_eps", 1e-12)
    if type(heads) is not int or not 0 < heads < 10_000:
        faults.append(f"config.json has num_attention_heads {heads!r}, expected a whole number")
    if type(epsilon) not in (int, float) or not 0 < epsilon < 1:
        faults.append(
            f"config.json has layer_norm_eps {epsilon!r}, expected a small positive number"
        )
    return faults


def _pooling(options: Options) -> tuple[str, str]:
    """(pooling, why), from sentence-transformers' file or the command."""
    file = "1_Pooling/config.json"
    said = options.beside(file)
    modes = [name for name, on in said.items() if name.startswith("pooling_mode_") and on is True]
    told = {POOLINGS.get(mode, mode) for mode in modes}
    if options.variant is not None:
        told.add(options.variant)
    if len(told) != 1 or not told <= {*POOLINGS.values()}:
        found = ", ".join(sorted(told)) or "nothing"
        raise ValueError(
            f"how the states of a sentence become one vector is told by {file} of sentence-transformers or by "
            f"--variant mean or --variant cls; found {found}"
        )
    return told.pop(), f"pooling by {'--variant' if options.variant else file}"


def _inputs(bert: BertConfig, options: Options) -> Inputs:
    """Texts as the original reads them: its own vocabulary, cut where sentence-transformers cuts."""
    path = options.tokenizer or (options.folder and options.folder / "vocab.txt")
    if path is None or not path.is_file():
        raise ValueError(
            "a BERT needs its vocabulary, a file vocab.txt with a piece per line; give it with --tokenizer FILE"
        )
    if options.beside("tokenizer_config.json").get("do_lower_case", True) is not True:
        raise ValueError(
            "tokenizer_config.json says do_lower_case false; cased vocabularies are not supported"
        )
    length = options.beside("sentence_bert_config.json").get("max_seq_length") or bert.length
    if type(length) is not int or not 2 <= length <= bert.length:
        raise ValueError(
            f"sentence_bert_config.json has max_seq_length {length!r}, expected 2 to {bert.length}"
        )
    spec = TextSpec(kind="wordpiece", vocab=str(path), length=length)
    if (words := tokenizer(spec).size) != bert.vocabulary:
        raise ValueError(
            f"the table of words has {bert.vocabulary:,} rows, {path} gives {words:,} ids; give its own vocabulary "
            "with --tokenizer FILE"
        )
    return Inputs(text=spec)


def original(config: BertSentenceConfig) -> tuple[tuple[Rule, ...], dict[str, str]]:
    """The table and the notes of an export."""
    return rules(), {"pooling": config.pooling}
