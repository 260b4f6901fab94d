"""BERT as a sentence encoder (Reimers & Gurevych 2019, "Sentence-BERT"): texts that are found by texts.

A query and an item are read alike: one vector for each, the mean of the last states or the state of [CLS].
"""

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from cir_jax import losses
from cir_jax.data.inputs import Inputs
from cir_jax.data.text import tokenizer
from cir_jax.encoders.bert import Bert, BertConfig
from cir_jax.encoders.layers import Dtype, unit
from cir_jax.large_batches import in_chunks


@dataclass(frozen=True)
class BertSentenceConfig:
    """Architecture, inputs and training.

    `pooling` is "mean" over the tokens of a text or "cls", the first of them; `scale` multiplies cosines in the loss.
    """

    bert: BertConfig = field(default_factory=BertConfig)
    pooling: Literal["mean", "cls"] = "mean"
    scale: float = 20.0
    dtype: Dtype = "float32"
    remat: bool = True
    inputs: Inputs = field(default_factory=Inputs)

    @classmethod
    def tiny(cls, inputs: Inputs) -> "BertSentenceConfig":
        """A size for tests."""
        words = tokenizer(inputs.text)
        bert = BertConfig(words.size, words.length, width=32, layers=2, heads=2, hidden=64)
        return cls(bert, inputs=inputs)


class BertSentence(nnx.Module):
    """Retriever of texts: `query` and `item` give unit vectors `[B, width]`."""

    query_kinds = ({"text"},)
    item_kinds = ({"text"},)
    special_rows = 0

    def __init__(self, config: BertSentenceConfig, rngs: nnx.Rngs):
        if config.inputs.text.length > config.bert.length:
            raise ValueError(
                f"inputs.text.length is {config.inputs.text.length}, the model has {config.bert.length} positions; "
                "lower it, or raise bert.length"
            )
        self.bert = Bert(config.bert, dtype=config.dtype, remat=config.remat, rngs=rngs)
        self.config = config

    def query(self, query: dict[str, jax.Array]) -> jax.Array:
        return self._text(query)

    def item(self, item: dict[str, jax.Array]) -> jax.Array:
        return self._text(item)

    def _text(self, example, key=None) -> jax.Array:
        ids, mask = example["text"], example["text_mask"]
        if self.config.pooling == "cls":
            return unit(self.bert.first(ids, mask, key=key))
        states = self.bert(ids, mask, key=key)
        # The mean and the sum have one direction.
        return unit(jnp.sum(states * mask[..., None], axis=1))

    def loss(self, batch, key) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Contrastive loss of matching texts; `item["group"]` marks rows that match each other."""
        first, second = jax.random.split(key)
        queries = in_chunks(self._text, batch["query"], first)
        items = in_chunks(self._text, batch["item"], second)
        return losses.contrastive(queries, items, self.config.scale, batch["item"].get("group"))
