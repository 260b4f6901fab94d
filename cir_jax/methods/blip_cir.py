"""Stage I of Candidate-Reranking (Liu et al. 2024, arXiv 2305.16304; `src/blip_stage1.py`), on BLIP.

A reference picture and a text about its change are fused by BLIP's cross-attending text encoder into one vector;
candidates are the projected class tokens of BLIP's picture encoder.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from cir_jax import losses
from cir_jax.data.images import ImageSpec
from cir_jax.data.inputs import Inputs
from cir_jax.data.text import tokenizer
from cir_jax.encoders.bert import BLIP_BASE, Bert, BertConfig
from cir_jax.encoders.blip import with_encode_token
from cir_jax.encoders.layers import Dtype, Linear, subkey, unit
from cir_jax.encoders.vit import VIT_B16_384, Vit, VitConfig
from cir_jax.large_batches import in_chunks

# The pictures of BLIP base; which vocabulary the texts use is for the experiment to say.
BLIP_INPUTS = Inputs(image=ImageSpec(size=VIT_B16_384.size))


@dataclass(frozen=True)
class BlipCirConfig:
    """Architecture and inputs; the defaults are BLIP base at 384 pixels.

    `temperature` is the first value of the learned divisor of the logits. `temperature_range` bounds it in the loss:
    None as in the paper, `(0.001, 0.5)` as in BLIP's pre-training.

    The paper trains on a pre-trained BLIP whose candidate side never changes: its experiments set `optim.frozen` to
    `("image/.*", "image_project/.*")`.
    """

    image: VitConfig = VIT_B16_384
    text: BertConfig = BLIP_BASE
    embed: int = 256
    temperature: float = 0.07
    temperature_range: tuple[float, float] | None = None
    dtype: Dtype = "float32"
    remat: bool = True
    inputs: Inputs = BLIP_INPUTS

    @classmethod
    def tiny(cls, inputs: Inputs) -> "BlipCirConfig":
        """A size for tests."""
        return cls(*tiny_towers(inputs), embed=16, inputs=inputs)


def tiny_towers(inputs: Inputs) -> tuple[VitConfig, BertConfig]:
    """Both encoders in a size for tests; the vocabulary is the tokenizer's and [ENC]."""
    image = VitConfig(size=inputs.image.size, patch=16, width=32, layers=2, heads=2)
    text = BertConfig(
        vocabulary=tokenizer(inputs.text).size + 1,
        length=inputs.text.length,
        width=32,
        layers=2,
        heads=2,
        hidden=64,
        types=0,
        image_width=32,
        dropout=0.0,
    )
    return image, text


def check_towers(config) -> None:
    """Refuse a config of a BLIP method whose parts do not fit each other."""
    if config.inputs.image.size != config.image.size:
        raise ValueError(
            f"inputs.image.size is {config.inputs.image.size}, the picture encoder reads {config.image.size}; "
            "set both to the same size"
        )
    if config.text.image_width != config.image.width:
        raise ValueError(
            f"text.image_width is {config.text.image_width}, picture tokens are {config.image.width} wide; "
            "set text.image_width to image.width"
        )


def check_query(query: Mapping, *parts: str) -> None:
    """Refuse a query without the parts that the method reads."""
    if any(part not in query for part in parts):
        raise ValueError(
            f"a query needs {' and '.join(f'`{p}`' for p in parts)}; this one has {sorted(query)}"
        )


class BlipCir(nnx.Module):
    """Retriever: `query` (reference picture and text) and `item` (picture) give unit vectors `[B, embed]`.

    A query of text alone is read without a picture and one of a picture alone like an item, both as in BLIP.
    """

    query_kinds = ({"image", "text"}, {"text"}, {"image"})
    special_rows = 1  # [ENC]

    def __init__(self, config: BlipCirConfig, rngs: nnx.Rngs):
        check_towers(config)
        options = {"dtype": config.dtype, "remat": config.remat}
        project = {"std": 0.02, "dtype": config.dtype, "rngs": rngs}
        self.image = Vit(config.image, **options, rngs=rngs)
        self.text = Bert(config.text, **options, rngs=rngs)
        self.image_project = Linear(config.image.width, config.embed, **project)
        self.text_project = Linear(config.text.width, config.embed, **project)
        self.temperature = nnx.Param(jnp.asarray(config.temperature, float))
        self.config = config

    def query(self, query: dict[str, jax.Array], key: jax.Array | None = None) -> jax.Array:
        """`[B, embed]`; a `key` turns dropout on."""
        if "text" not in query:
            check_query(query, "image")
            return self.item(query, key)
        ids, tokens = query["text"], None
        if "image" in query:
            ids = with_encode_token(ids, self.config.text)
            tokens = self.image(query["image"], subkey(key, 0))
        first = self.text.first(ids, query["text_mask"], tokens, subkey(key, 1))
        return unit(self.text_project(first))

    def item(self, item: dict[str, jax.Array], key: jax.Array | None = None) -> jax.Array:
        """`[B, embed]`; a `key` turns drop-path on."""
        return unit(self.image_project(self.image(item["image"], key)[:, 0]))

    def scale(self) -> jax.Array:
        """The inverse temperature."""
        bounds = self.config.temperature_range
        value = self.temperature[...]
        return 1 / (value if bounds is None else jnp.clip(value, *bounds))

    def loss(self, batch, key) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Cross-entropy of each query over the targets of the batch; no symmetric term, as in the paper.

        With `item["group"]` equal targets count as right answers for each other; the paper's data has no groups, so
        there they are negatives.
        """
        queries = in_chunks(self.query, batch["query"], subkey(key, 0))
        items = in_chunks(self.item, batch["item"], subkey(key, 1))
        group = batch["item"].get("group")
        value, metrics = losses.contrastive(queries, items, self.scale(), group, one_way=True)
        return value, metrics | {"scale": self.scale()}
