"""What is learned and scored. A method is one file and one line in `METHODS`."""

from typing import Any, Protocol

import jax

from cir_jax.methods.bert import BertSentence, BertSentenceConfig
from cir_jax.methods.blip_cir import BlipCir, BlipCirConfig
from cir_jax.methods.blip_itm import BlipItm, BlipItmConfig
from cir_jax.methods.blip_rerank import BlipRerank, BlipRerankConfig
from cir_jax.methods.cfir import Cfir, CfirConfig
from cir_jax.methods.clip import Clip, ClipConfig
from cir_jax.methods.fti4cir import Fti4cir, Fti4cirConfig
from cir_jax.methods.inversion import Inversion, LinCirConfig, Pic2WordConfig, SearleConfig
from cir_jax.methods.magiclens import MagicLens, MagicLensConfig
from cir_jax.methods.maria import Maria, MariaConfig

Batch = dict[str, dict[str, jax.Array]]
Tree = Any


class Retriever(Protocol):
    """Stage 1: queries and items become vectors whose inner product ranks.

    `query` gives unit rows `[B, D]` (`Model.encode` asks several times where one query has several texts); `item` gives
    unit rows `[B, D]`. A larger score is better. Queries of several vectors are `([B, M, D], mask [B, M])`; the best of
    them counts. `query_kinds` names the parts that a query may consist of, the main kind first, and `item_kinds`, if a
    method has it, those of an item (a picture, if it has not): what a gallery knows more of an item is not read;
    `special_rows` is how many rows of the table of words a
    method has beyond the tokenizer's.
    """

    query_kinds: tuple[set[str], ...]
    special_rows: int

    def query(self, query: dict[str, jax.Array]) -> jax.Array: ...

    def item(self, item: dict[str, jax.Array]) -> jax.Array: ...

    def loss(self, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]: ...


class Reranker(Protocol):
    """Stage 2: a query and each of its candidates are scored together.

    `query` and `item` compute what depends on one side alone, as trees whose leaves begin with the batch axis, so
    that each is computed once however many pairs it is part of. `score` takes queries `[B, …]` and for each its own
    candidates, items `[B, K, …]`, and gives `[B, K]`; a larger score is better. A class may have `starts`: by the type
    of another method's config, a function of own and other parameters that gives those to begin training with.
    """

    query_kinds: tuple[set[str], ...]
    special_rows: int

    def query(self, query: dict[str, jax.Array]) -> Tree: ...

    def item(self, item: dict[str, jax.Array]) -> Tree: ...

    def score(self, queries: Tree, items: Tree) -> jax.Array: ...

    def loss(self, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]: ...


METHODS = {
    "clip": (ClipConfig, Clip),
    "bert": (BertSentenceConfig, BertSentence),
    "cfir": (CfirConfig, Cfir),
    "maria": (MariaConfig, Maria),
    "blip_cir": (BlipCirConfig, BlipCir),
    "blip_rerank": (BlipRerankConfig, BlipRerank),
    "blip_itm": (BlipItmConfig, BlipItm),
    "magiclens": (MagicLensConfig, MagicLens),
    "pic2word": (Pic2WordConfig, Inversion),
    "searle": (SearleConfig, Inversion),
    "lincir": (LinCirConfig, Inversion),
    "fti4cir": (Fti4cirConfig, Fti4cir),
}


def method_name(config) -> str:
    """The registered name of a method's config."""
    return next(name for name, (kind, _) in METHODS.items() if type(config) is kind)


def reranks(config) -> bool:
    """True if a method's config describes a `Reranker`, False for a `Retriever`."""
    return hasattr(METHODS[method_name(config)][1], "score")


def kinds(config, part: str) -> tuple[set[str], ...]:
    """The parts that a "query" or an "item" of a method may consist of, the main kind first."""
    return getattr(METHODS[method_name(config)][1], f"{part}_kinds", ({"image"},))


def build(config, rngs):
    """The module that a method's config describes."""
    return METHODS[method_name(config)][1](config, rngs)
