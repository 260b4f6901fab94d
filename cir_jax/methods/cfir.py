"""CFIR (Long et al. 2024, arXiv 2402.15276; GLA-IR/CFIR): documents find pictures, in two stages.

BEiT-3 as a dual encoder. Stage 1 asks once for every entity of a document, stage 2 once for its
summary; both compare with the same vectors of the pictures.
"""

import math
from dataclasses import dataclass, field
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cir_jax import losses
from cir_jax.data.inputs import Inputs
from cir_jax.data.text import tokenizer
from cir_jax.encoders.beit3 import (
    BEIT3_BASE,
    UNREAD,
    Beit3Config,
    ImageTower,
    TextTower,
    resize_positions,
)
from cir_jax.encoders.layers import Dtype, Linear, at_most, subkey, unit
from cir_jax.large_batches import in_chunks

# For `optim.frozen`: what stays as it was. Without an entry everything is trained.
FROZEN = {
    # adapters and enhancers are trained
    "adapters": (r"(?!.*/(adapter|enhancer)/).*",),
    # the text side is trained; vectors of pictures stay valid
    "pictures": (r"image/.*", r"image_project/.*"),
    # CFIR's --tune_text_only. original: it goes by names, so that of the text side only the table of words, the
    # feed-forward halves and their norms are trained, and of the picture side the adapters, which are called "text"
    "text_by_name": (
        r"(?!(text/embedding|text/expert/blocks/(mlp|ln2)/.*|image/expert/blocks/adapter/.*)$).*",
    ),
}


@dataclass(frozen=True)
class CfirConfig:
    """Architecture and inputs; the defaults are BEiT-3 base at 224 pixels.

    `largest_scale` bounds the learned inverse temperature; None as in the paper.
    """

    encoder: Beit3Config = BEIT3_BASE
    largest_scale: float | None = None
    dtype: Dtype = "float32"
    remat: bool = True
    inputs: Inputs = field(default_factory=Inputs)

    @classmethod
    def tiny(cls, inputs: Inputs) -> "CfirConfig":
        """A size for tests."""
        encoder = Beit3Config(
            size=inputs.image.size,
            vocabulary=tokenizer(inputs.text).size,
            length=inputs.text.length,
            width=32,
            layers=2,
            heads=2,
            hidden=64,
            mask_token=False,
            initial="scratch",
        )
        return cls(encoder, inputs=inputs)


def resized(own, theirs):
    """The parameters of a CFIR for one whose pictures have another size: the table of their positions is resized."""
    expert = theirs["image"]["expert"]
    places = len(own["image"]["expert"]["positions"]) - UNREAD - 1
    if len(expert["positions"]) == places + UNREAD + 1:
        return theirs
    positions = resize_positions(np.asarray(expert["positions"]), math.isqrt(places))
    image = {**theirs["image"], "expert": {**expert, "positions": positions}}
    return {**theirs, "image": image}


class Cfir(nnx.Module):
    """Retriever: `query` (text) and `item` (picture) give unit vectors; or pictures ask for texts."""

    query_kinds = ({"text"}, {"image"})
    item_kinds = ({"image"}, {"text"})
    special_rows = 0
    starts = MappingProxyType({CfirConfig: resized})

    def __init__(self, config: CfirConfig, rngs: nnx.Rngs):
        encoder = config.encoder
        if config.inputs.image.size != encoder.size:
            raise ValueError(
                f"inputs.image.size is {config.inputs.image.size}, the picture tower reads "
                f"{encoder.size}; set both to the same size"
            )
        if config.inputs.text.length > encoder.length:
            raise ValueError(
                f"inputs.text.length is {config.inputs.text.length}, the text tower reads at most "
                f"{encoder.length} tokens; lower it, or raise encoder.length"
            )
        options = {"dtype": config.dtype, "rngs": rngs}
        project = {"std": encoder.kernels(), "bias": False, **options}
        self.image = ImageTower(encoder, remat=config.remat, **options)
        self.text = TextTower(encoder, remat=config.remat, **options)
        self.image_project = Linear(encoder.width, encoder.width, **project)
        self.text_project = Linear(encoder.width, encoder.width, **project)
        self.logit_scale = nnx.Param(jnp.log(jnp.asarray(1 / 0.07, float)))
        self.config = config

    def query(self, query: dict[str, jax.Array], key: jax.Array | None = None) -> jax.Array:
        """`[B, D]`; a `key` turns drop-path and dropout on. A document's entities are a query each."""
        if not {"text", "image"} & query.keys():
            raise ValueError(f"a query needs `text` or `image`; this one has {sorted(query)}")
        return self._text(query, key) if "text" in query else self._picture(query, key)

    def item(self, item: dict[str, jax.Array], key: jax.Array | None = None) -> jax.Array:
        """`[B, D]`, of a picture, or of a text where texts are looked for; `key` as in `query`."""
        return self._picture(item, key) if "image" in item else self._text(item, key)

    def _text(self, example, key) -> jax.Array:
        return unit(self.text_project(self.text(example["text"], example["text_mask"], key)))

    def _picture(self, example, key) -> jax.Array:
        return unit(self.image_project(self.image(example["image"], key)))

    def scale(self) -> jax.Array:
        """The learned inverse temperature."""
        limit = math.inf if self.config.largest_scale is None else self.config.largest_scale
        return at_most(jnp.exp(self.logit_scale[...]), limit)

    def loss(self, batch, key) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Symmetric contrastive loss of one text and one picture per row.

        With `item["group"]` equal pictures count as right answers for each other; the paper has no
        groups, so there they are negatives.
        """
        queries = in_chunks(self.query, batch["query"], subkey(key, 0))
        items = in_chunks(self.item, batch["item"], subkey(key, 1))
        value, metrics = losses.contrastive(
            queries, items, self.scale(), batch["item"].get("group")
        )
        return value, metrics | {"scale": self.scale()}
