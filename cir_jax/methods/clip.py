"""CLIP as a retriever (Radford et al. 2021): a text and a vision tower that meet in one space.

REACT retrieves with it, and it is the baseline that everyone compares with. A query of text, of a picture, or of
both: with both, the unit vectors are added, the field's zero-shot baseline for composed retrieval.
"""

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from cir_jax import losses
from cir_jax.data.inputs import Inputs
from cir_jax.data.text import tokenizer
from cir_jax.encoders.clip import ClipText, ClipVision, TextConfig, VisionConfig
from cir_jax.encoders.layers import Activation, Dtype, at_most, unit
from cir_jax.encoders.resnet import ClipResnet, ResnetConfig
from cir_jax.large_batches import in_chunks


@dataclass(frozen=True)
class ClipConfig:
    """Architecture, inputs and training; the defaults are OpenAI's ViT-B/32.

    `vision` is a transformer or a modified ResNet; `epsilon` that of every LayerNorm. `largest_scale` caps the learned inverse temperature (100 in the paper); `patches_kept` is the share of each
    picture's patches that training reads (Li et al. 2023, "FLIP"): cheaper steps, and harder to learn by heart. The `loss` "sigmoid" (SigLIP) learns a bias of the logits as well.
    """

    vision: VisionConfig | ResnetConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    embed: int = 512
    activation: Activation = "quick_gelu"
    epsilon: float = 1e-5
    dtype: Dtype = "float32"
    remat: bool = True
    largest_scale: float = 100.0
    patches_kept: float = 1.0
    loss: Literal["softmax", "sigmoid"] = "softmax"
    inputs: Inputs = field(default_factory=Inputs)

    @classmethod
    def tiny(cls, inputs: Inputs) -> "ClipConfig":
        """A size for tests."""
        vision = VisionConfig(size=inputs.image.size, patch=16, width=32, layers=2, heads=2)
        text = TextConfig(
            tokenizer(inputs.text).size, inputs.text.length, width=32, layers=2, heads=2
        )
        return cls(vision, text, embed=16, inputs=inputs)


class Clip(nnx.Module):
    """Retriever: `query` and `item` give unit vectors `[B, embed]`."""

    query_kinds = ({"text"}, {"image"}, {"image", "text"})
    item_kinds = ({"image"}, {"text"})
    special_rows = 0

    def __init__(self, config: ClipConfig, rngs: nnx.Rngs):
        if config.inputs.image.size != config.vision.size:
            raise ValueError(
                f"inputs.image.size is {config.inputs.image.size}, the vision tower reads "
                f"{config.vision.size}; set both to the same size"
            )
        if config.inputs.text.length > config.text.length:
            raise ValueError(
                f"inputs.text.length is {config.inputs.text.length}, the text tower has "
                f"{config.text.length} positions; lower it, or raise text.length"
            )
        common = {"dtype": config.dtype, "remat": config.remat, "rngs": rngs}
        options = {**common, "activation": config.activation, "epsilon": config.epsilon}
        if isinstance(config.vision, ResnetConfig):
            if config.patches_kept < 1:
                raise ValueError(
                    f"patches_kept is {config.patches_kept}, but a ResNet has no patches to leave out; set it to 1"
                )
            self.image = ClipResnet(config.vision, config.embed, **common)
        else:
            self.image = ClipVision(config.vision, config.embed, **options)
        self.text = ClipText(config.text, config.embed, **options)
        softmax = config.loss == "softmax"
        self.logit_scale = nnx.Param(jnp.log(jnp.asarray(1 / 0.07 if softmax else 10.0, float)))
        self.logit_bias = None if softmax else nnx.Param(jnp.asarray(-10.0, float))
        self.config = config

    def query(self, query: dict[str, jax.Array]) -> jax.Array:
        return self._fused(query, None)

    def item(self, item: dict[str, jax.Array]) -> jax.Array:
        """A picture, or a text where texts are looked for."""
        if "image" not in item:
            return unit(self.text(item["text"]))
        return unit(self.image(item["image"]))

    def _fused(self, query, key) -> jax.Array:
        """The unit sum of the parts a query has; with a key, pictures are read in part."""
        parts = []
        if "text" in query:
            parts.append(unit(self.text(query["text"])))
        if "image" in query:
            parts.append(self._picture(query["image"], key))
        if not parts:
            raise ValueError(f"a query needs `text` or `image`; this one has {sorted(query)}")
        return parts[0] if len(parts) == 1 else unit(parts[0] + parts[1])

    def _picture(self, images, key) -> jax.Array:
        share = self.config.patches_kept
        if key is None or share == 1:
            return unit(self.image(images))
        return unit(self.image(images, self.image.random_patches(len(images), share, key)))

    def scale(self) -> jax.Array:
        """The learned inverse temperature, capped; that of the released models begins at the cap."""
        return at_most(jnp.exp(self.logit_scale[...]), self.config.largest_scale)

    def match(self, queries, items, groups=None) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The config's loss of matching unit vectors `[B, embed]`, at the learned scale."""
        if self.config.loss == "softmax":
            return losses.contrastive(queries, items, self.scale(), groups)
        return losses.sigmoid(queries, items, self.scale(), self.logit_bias[...], groups)

    def loss(self, batch, key) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Contrastive loss of matching queries and items.

        `item["group"]` marks rows that match each other. Items that come with a text are pulled to it as well, with
        equal weight: a composed batch then also teaches the names of its targets.
        """
        first, second = jax.random.split(key)
        item, group = batch["item"], batch["item"].get("group")
        items = in_chunks(self._picture, item["image"], first)
        queries = in_chunks(self._fused, batch["query"], second)
        value, metrics = self.match(queries, items, group)
        if "text" in item:
            names = in_chunks(lambda text, _: unit(self.text(text)), item["text"])
            named, more = self.match(names, items, group)
            value, metrics = value + named, metrics | {"item_accuracy": more["accuracy"]}
        return value, metrics | {"scale": self.scale()}
