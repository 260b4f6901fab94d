"""Stage II of Candidate-Reranking (Liu et al. 2024, arXiv 2305.16304; `src/blip_stage2.py`), on BLIP.

Two branches read each candidate picture: one starts from the fused state of stage I (reference picture and text),
the other from the text. A small head scores what both found.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import jax
from flax import nnx

from cir_jax import losses
from cir_jax.data.inputs import Inputs
from cir_jax.encoders.bert import BLIP_BASE, Bert, BertConfig
from cir_jax.encoders.blip import (
    TwoBranchBert,
    score_lists,
    score_pairs,
    two_branches,
    with_encode_token,
)
from cir_jax.encoders.layers import Dtype, Linear, subkey
from cir_jax.encoders.vit import VIT_B16_384, Vit, VitConfig
from cir_jax.large_batches import in_chunks
from cir_jax.methods.blip_cir import (
    BLIP_INPUTS,
    BlipCirConfig,
    check_query,
    check_towers,
    tiny_towers,
)


@dataclass(frozen=True)
class BlipRerankConfig:
    """Architecture and inputs; the defaults are the paper's, on BLIP base at 384 pixels.

    From layer `merge_from` on the branches are merged by a linear map, below by their mean. `fusion_dropout` keeps
    the dropout of stage I's text encoder in training; the paper does, and also sets `image.drop_path` to 0.1, both
    in parts that do not train. Its experiments set `optim.frozen` to `("image/.*", "fusion/.*")`.
    """

    image: VitConfig = VIT_B16_384
    text: BertConfig = BLIP_BASE
    merge_from: int = 6
    fusion_dropout: bool = False
    dtype: Dtype = "float32"
    remat: bool = True
    inputs: Inputs = BLIP_INPUTS

    @classmethod
    def tiny(cls, inputs: Inputs) -> "BlipRerankConfig":
        """A size for tests, with a layer of each kind of merging."""
        return cls(*tiny_towers(inputs), merge_from=1, inputs=inputs)


class Head(nnx.Module):
    """`[N, 2 * width]` -> `[N]`. Of the two outputs of the original only the first is a score."""

    def __init__(self, width, *, dtype: Dtype, rngs):
        torch_std = lambda inputs: (3 * inputs) ** -0.5
        self.up = Linear(2 * width, width, std=torch_std(2 * width), dtype=dtype, rngs=rngs)
        self.down = Linear(width, 2, std=torch_std(width), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.relu(self.up(x)))[..., 0]


def start_from_stage1(params: Mapping, stage1: Mapping) -> dict:
    """Parameters of a `BlipRerank` started from those of a `BlipCir` with the same encoders.

    The picture encoder is taken over, the text encoder becomes `fusion` and, doubled, the start of both branches.
    Head and merging layers keep their values from `params`.
    """
    text = two_branches(stage1["text"], params["text"]["blocks"])
    return {**params, "image": stage1["image"], "fusion": stage1["text"], "text": text}


class BlipRerank(nnx.Module):
    """Reranker for queries of a reference picture and a text.

    `fusion` is the text encoder of the stage I model; it reads the reference through the picture encoder of this
    one, so both stages must share theirs, as two copies of one BLIP do.
    """

    query_kinds = ({"image", "text"},)
    special_rows = 1  # [ENC]
    starts = MappingProxyType({BlipCirConfig: start_from_stage1})

    def __init__(self, config: BlipRerankConfig, rngs: nnx.Rngs):
        check_towers(config)
        options = {"dtype": config.dtype, "remat": config.remat, "rngs": rngs}
        self.image = Vit(config.image, **options)
        self.fusion = Bert(config.text, **options)
        self.text = TwoBranchBert(config.text, config.merge_from, **options)
        self.head = Head(config.text.width, dtype=config.dtype, rngs=rngs)
        self.config = config

    def query(self, query: dict[str, jax.Array], key: jax.Array | None = None) -> dict:
        """What depends on the query alone: `fused` and `text` `[B, L, width]`, `mask` `[B, L]`."""
        check_query(query, "image", "text")
        mask = query["text_mask"]
        ids = with_encode_token(query["text"], self.config.text)
        reference = self.image(query["image"], subkey(key, 0))
        fused = self.fusion(
            ids, mask, reference, subkey(key, 1) if self.config.fusion_dropout else None
        )
        return {"fused": fused, "text": self.text.embeddings(ids, subkey(key, 2)), "mask": mask}

    def item(self, item: dict[str, jax.Array], key: jax.Array | None = None) -> dict:
        """What depends on the candidate alone: `tokens` `[B, M, width]` of its picture."""
        return {"tokens": self.image(item["image"], key)}

    def score(self, queries, items) -> jax.Array:
        """`[B, K]` for queries `[B, …]` and their own candidates `[B, K, …]`, unbounded; larger is better."""
        return score_lists(self._rows, queries, items["tokens"])

    def score_all(self, queries, items, key: jax.Array | None = None) -> jax.Array:
        """`[B, N]` of every query with every one of N candidates; a `key` turns dropout on."""
        rows = lambda queries, tokens: self._rows(queries, tokens, key)
        return score_pairs(rows, queries, items["tokens"])

    def _rows(self, queries, tokens, key=None):
        parts = queries["fused"], queries["text"], queries["mask"]
        return self.head(self.text.first(*parts, tokens, key))

    def loss(self, batch, key) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Cross-entropy of each query's scores over the targets of the batch, as in the paper.

        With `item["group"]` equal targets count as right answers for each other, as in stage I.
        """
        queries = in_chunks(self.query, batch["query"], subkey(key, 0))
        items = in_chunks(self.item, batch["item"], subkey(key, 1))
        # A chunk of candidates meets all queries: their keys and values are then computed once.
        meet = lambda items, key: self.score_all(queries, items, key).T
        scores = in_chunks(meet, items, subkey(key, 2)).T
        return losses.listwise(scores, batch["item"].get("group"))
