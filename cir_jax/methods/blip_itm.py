"""Image-text matching with BLIP (Li et al. 2022, arXiv 2201.12086): a second stage for text queries.

The text encoder reads the text and looks at the picture in every layer; a head says whether they belong together.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from cir_jax import losses
from cir_jax.data.inputs import Inputs
from cir_jax.encoders.bert import BLIP_BASE, Bert, BertConfig
from cir_jax.encoders.blip import score_lists, score_pairs, with_encode_token
from cir_jax.encoders.layers import Dtype, Linear, subkey, unit
from cir_jax.encoders.vit import VIT_B16_384, Vit, VitConfig
from cir_jax.large_batches import in_chunks
from cir_jax.methods.blip_cir import BLIP_INPUTS, check_query, check_towers, tiny_towers

# As in BLIP: the temperature stays in this range, and every negative keeps this much weight.
TEMPERATURES = (0.001, 0.5)
LEAST_WEIGHT = 1e-4


@dataclass(frozen=True)
class BlipItmConfig:
    """Architecture and inputs; the defaults are BLIP base at 384 pixels."""

    image: VitConfig = VIT_B16_384
    text: BertConfig = BLIP_BASE
    embed: int = 256
    dtype: Dtype = "float32"
    remat: bool = True
    inputs: Inputs = BLIP_INPUTS

    @classmethod
    def tiny(cls, inputs: Inputs) -> "BlipItmConfig":
        """A size for tests."""
        return cls(*tiny_towers(inputs), embed=16, inputs=inputs)


class BlipItm(nnx.Module):
    """Reranker for queries of text.

    The projections are those of BLIP's retrieval model (`blip_cir` has the same names); here they only choose hard
    negatives in training.
    """

    query_kinds = ({"text"},)
    special_rows = 1  # [ENC]

    def __init__(self, config: BlipItmConfig, rngs: nnx.Rngs):
        check_towers(config)
        options = {"dtype": config.dtype, "rngs": rngs}
        self.image = Vit(config.image, remat=config.remat, **options)
        self.text = Bert(config.text, remat=config.remat, **options)
        self.image_project = Linear(config.image.width, config.embed, std=0.02, **options)
        self.text_project = Linear(config.text.width, config.embed, std=0.02, **options)
        self.match = Linear(config.text.width, 2, std=0.02, **options)
        self.temperature = nnx.Param(jnp.asarray(0.07, float))
        self.config = config

    def query(self, query: dict[str, jax.Array], key: jax.Array | None = None) -> dict:
        """What depends on the query alone: `text` `[B, L, width]`, `mask` `[B, L]`."""
        check_query(query, "text")
        ids = with_encode_token(query["text"], self.config.text)
        return {"text": self.text.embeddings(ids, key), "mask": query["text_mask"]}

    def item(self, item: dict[str, jax.Array], key: jax.Array | None = None) -> dict:
        """What depends on the candidate alone: `tokens` `[B, M, width]` of its picture."""
        return {"tokens": self.image(item["image"], key)}

    def score(self, queries, items) -> jax.Array:
        """`[B, K]` for queries `[B, …]` and their own candidates `[B, K, …]`: the log odds of a match."""
        return score_lists(self._rows, queries, items["tokens"])

    def score_all(self, queries, items) -> jax.Array:
        """`[B, N]` of every query with every one of N candidates."""
        return score_pairs(self._rows, queries, items["tokens"])

    def _rows(self, queries, tokens, key=None):
        logits = self.match(self.text.first_of(queries["text"], queries["mask"], tokens, key))
        return logits[..., 1] - logits[..., 0]

    def loss(self, batch, key) -> tuple[jax.Array, dict[str, jax.Array]]:
        """BLIP's two losses for pairs of text and picture, added.

        Contrastive: text and picture are encoded apart and their projections compared, in both directions. Matching:
        binary cross-entropy over three pairs per row of the batch: the right one, its text with a wrong picture, and
        its picture with a wrong text. The wrong ones are drawn from the batch with probabilities that grow with the
        contrastive similarity, never from rows of the same `item["group"]`. All of it is over the global batch.
        """
        query, items = batch["query"], in_chunks(self.item, batch["item"], subkey(key, 0))
        groups = batch["item"].get("group")
        first = lambda query, key: self.text.first(query["text"], query["text_mask"], key=key)
        texts = in_chunks(first, query, subkey(key, 1))
        texts, images = (
            unit(self.text_project(texts)),
            unit(self.image_project(items["tokens"][:, 0])),
        )
        scale = 1 / jnp.clip(self.temperature[...], *TEMPERATURES)
        contrast, metrics = losses.contrastive(texts, images, scale, groups)
        similarity = jax.lax.stop_gradient(scale * jnp.einsum("td,id->ti", texts, images))
        groups = jnp.arange(len(texts)) if groups is None else groups
        image_rows, alone = hard_negatives(similarity, groups, subkey(key, 2))
        text_rows, _ = hard_negatives(similarity.T, groups, subkey(key, 3))
        matching, accuracy = self._matching(query, items, text_rows, image_rows, ~alone, key)
        metrics |= {"contrast": contrast, "matching": matching, "matching_accuracy": accuracy}
        return contrast + matching, metrics

    def _matching(self, query, items, text_rows, image_rows, usable, key):
        """Mean cross-entropy and accuracy over right pairs and both kinds of wrong ones."""
        queries, rows = self.query(query, subkey(key, 4)), jnp.arange(len(usable))
        texts = jnp.concatenate([rows, rows, text_rows])
        images = jnp.concatenate([rows, image_rows, rows])
        take = lambda tree, rows: jax.tree.map(lambda x: jnp.take(x, rows, axis=0), tree)

        def score(pairs, key):
            return self._rows(take(queries, pairs[0]), take(items["tokens"], pairs[1]), key)

        scores = in_chunks(score, (texts, images), subkey(key, 5))
        right = jnp.arange(len(scores)) < len(rows)
        weight = right | jnp.tile(usable, 3)
        signed = jnp.where(right, scores, -scores)
        mean = lambda x: (x * weight).sum() / weight.sum()
        return mean(-jax.nn.log_sigmoid(signed)), mean(signed > 0)


def hard_negatives(
    similarity: jax.Array, groups: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """For each row a column of another group, drawn with BLIP's probabilities (softmax of the row, plus 1e-4).

    Args:
      similarity: `[B, B]` logits.
      groups: `[B]`; of rows and of columns.
      key: of the draw.

    Returns:
      The columns `[B]`, and `[B]` True where no other group exists and the column therefore means nothing.
    """
    wrong = groups[:, None] != groups[None, :]
    weights = jnp.log(jax.nn.softmax(similarity) + LEAST_WEIGHT)
    drawn = jax.random.categorical(key, jnp.where(wrong, weights, -jnp.inf))
    return drawn, ~wrong.any(axis=1)
