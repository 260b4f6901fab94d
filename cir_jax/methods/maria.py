"""Maria's retrieval model (Liang et al. 2021, arXiv 2105.13073; jokieleung/Maria `retrieval_model`).

A sentence finds pictures: BERT and a ResNeXt, which stay as they are, and a small head behind each, which learns. With
`level="token"` it is the model that Maria was made from, where every token of a text finds a picture of its own
(Tan & Bansal 2020, "Vokenization", arXiv 2010.06775; airsplay/vokenization).
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from cir_jax import losses
from cir_jax.data.images import IMAGENET_MEAN, IMAGENET_STD, ImageSpec
from cir_jax.data.inputs import Inputs
from cir_jax.data.text import TextSpec, tokenizer
from cir_jax.encoders.bert import BERT_BASE, Bert, BertConfig
from cir_jax.encoders.layers import Dtype, Linear, dropout, normal, subkey, uniform, unit
from cir_jax.encoders.resnext import RESNEXT_101, Resnext, ResnextConfig
from cir_jax.large_batches import in_chunks

# For `optim.frozen`: what the papers leave as it was, and what stays when the rest is tuned too.
FROZEN = ("bert/.*", "resnext/.*")
FROZEN_IN_TUNING = ("resnext/(stem|stage1)/.*", "resnext/.*norm/.*")
# A frozen BERT is read as at inference.
# original: by an accident of its loop one process of several trains with BERT's dropout on
FROZEN_BERT = replace(BERT_BASE, dropout=0.0)


@dataclass(frozen=True)
class MariaConfig:
    """Architecture, loss and inputs; the defaults are Maria's, except for what it does by accident (`maria`).

    Attributes:
      bert: the text tower.
      resnext: the picture tower.
      level: "sentence" takes the state of the start token for the text; "token" gives a vector for every token.
      text_layers: how many of BERT's last layers a head reads side by side.
      hidden: widths of the hidden layers of both heads.
      embed: width of the vectors.
      dropout: behind the hidden layers, in training.
      loss: "paired_hinge" shows each text one wrong picture, "batch_hinge" all of the batch, "contrastive" (InfoNCE)
        compares all in both directions.
      margin: of the hinges.
      scale: inverse temperature of "contrastive".
      summed: sum "paired_hinge" over the batch instead of taking its mean, as Maria does; the size of its gradients
        then depends on that of the batch.
      loss_parts: parts of a batch that "paired_hinge" treats alone, as Maria's processes do.
    """

    bert: BertConfig = FROZEN_BERT
    resnext: ResnextConfig = RESNEXT_101
    level: Literal["sentence", "token"] = "sentence"
    text_layers: int = 4
    hidden: tuple[int, ...] = (1024, 1024)
    embed: int = 512
    dropout: float = 0.2
    loss: Literal["paired_hinge", "batch_hinge", "contrastive"] = "paired_hinge"
    margin: float = 0.5
    scale: float = 20.0
    summed: bool = False
    loss_parts: int = 1
    dtype: Dtype = "float32"
    remat: bool = True
    inputs: Inputs = field(default_factory=Inputs)

    @classmethod
    def tiny(cls, inputs: Inputs) -> "MariaConfig":
        """A size for tests."""
        words = tokenizer(inputs.text)
        bert = BertConfig(
            words.size, words.length, width=32, layers=2, heads=2, hidden=64, dropout=0.0
        )
        resnext = ResnextConfig((1, 1, 1, 1), width=4, groups=2, group_width=2)
        return cls(bert, resnext, text_layers=2, hidden=(32, 32), embed=16, inputs=inputs)


def maria(vocabulary: str) -> MariaConfig:
    """The paper's model; `vocabulary` is the file `vocab.txt` of bert-base-uncased."""
    return MariaConfig(summed=True, inputs=_inputs(vocabulary, 75))


def vokenization(vocabulary: str) -> MariaConfig:
    """The released model of Vokenization (`coco_hinge05_dim64_resxt101_bertl4`)."""
    sizes = {"hidden": (256,), "embed": 64, "dropout": 0.3}
    return MariaConfig(level="token", inputs=_inputs(vocabulary, 20), **sizes)


def _inputs(vocabulary: str, length: int) -> Inputs:
    image = ImageSpec(size=224, short=256, filter="bilinear", mean=IMAGENET_MEAN, std=IMAGENET_STD)
    return Inputs(image, TextSpec("wordpiece", vocabulary, length))


class Head(nnx.Module):
    """Linear layers with ReLU and dropout between them: `[…, sizes[0]]` -> unit vectors `[…, sizes[-1]]`."""

    def __init__(self, sizes: tuple[int, ...], rate: float, *, dtype: Dtype, rngs):
        self.rate, self.layers = rate, len(sizes) - 1
        for n in range(self.layers):
            # original: PyTorch's initialisation of a linear layer
            draw = uniform(sizes[n] ** -0.5)
            layer = Linear(sizes[n], sizes[n + 1], std=draw, dtype=dtype, rngs=rngs)
            layer.bias = normal(rngs, (sizes[n + 1],), draw)
            setattr(self, f"linear{n + 1}", layer)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        for n in range(1, self.layers):
            hidden = jax.nn.relu(getattr(self, f"linear{n}")(x))
            x = dropout(hidden, self.rate, subkey(key, n))
        return unit(getattr(self, f"linear{self.layers}")(x))


class Maria(nnx.Module):
    """Retriever: `query` (text) and `item` (picture) give unit vectors."""

    query_kinds = ({"text"},)
    special_rows = 0

    def __init__(self, config: MariaConfig, rngs: nnx.Rngs):
        if config.inputs.text.length > config.bert.length:
            raise ValueError(
                f"inputs.text.length is {config.inputs.text.length}, BERT has {config.bert.length} "
                "positions; lower it, or raise bert.length"
            )
        if not 1 <= config.text_layers <= config.bert.layers:
            raise ValueError(
                f"text_layers is {config.text_layers}; BERT has 1 to {config.bert.layers} layers"
            )
        options = {"dtype": config.dtype, "rngs": rngs}
        read = config.text_layers * config.bert.width
        head = lambda inputs: Head(
            (inputs, *config.hidden, config.embed), config.dropout, **options
        )
        self.bert = Bert(config.bert, remat=config.remat, **options)
        self.resnext = Resnext(config.resnext, remat=config.remat, **options)
        self.text_head, self.image_head = head(read), head(config.resnext.features)
        self.config = config

    def query(self, query: dict[str, jax.Array]):
        """`[B, embed]`; at level "token" `([B, L, embed], [B, L])`, a vector for every token and True where it asks.

        Start and end do not ask, except in a text that has nothing else. A picture's score is that of the best token.
        """
        vectors = self.texts(query)
        if self.config.level == "sentence":
            return vectors[:, 0]
        return vectors, words_of(query["text_mask"])

    def item(self, item: dict[str, jax.Array], key: jax.Array | None = None) -> jax.Array:
        """`[B, embed]`; a `key` turns dropout on."""
        return self.image_head(self.resnext(item["image"]), key)

    def texts(self, query: dict[str, jax.Array], key: jax.Array | None = None) -> jax.Array:
        """Unit vectors of all tokens, `[B, L, embed]`; at level "sentence" of the first alone, `[B, 1, embed]`."""
        if "text" not in query:
            raise ValueError(f"a query needs `text`; this one has {sorted(query)}")
        states = self.bert.last_states(
            query["text"],
            query["text_mask"],
            self.config.text_layers,
            subkey(key, 0),
            first=self.config.level == "sentence",
        )
        return self.text_head(states, subkey(key, 1))

    def loss(self, batch, key) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The config's loss, and the share of tokens (or sentences) whose best picture of the batch is right.

        `item["group"]` marks rows that match each other: no negatives. The original has no groups, so there two
        captions of one picture can be.
        """
        config, group = self.config, batch["item"].get("group")
        queries = in_chunks(self.texts, batch["query"], subkey(key, 0))
        items = in_chunks(self.item, batch["item"], subkey(key, 1))
        # original: start and end count like the words between them
        mask = batch["query"]["text_mask"][:, : queries.shape[1]]
        metrics = {"accuracy": losses.token_accuracy(queries, items, mask, group)}
        pairs = (queries, items, mask, config.margin)
        if config.loss == "paired_hinge":
            options = {"parts": config.loss_parts, "summed": config.summed}
            return losses.paired_hinge(*pairs, groups=group, **options), metrics
        if config.loss == "batch_hinge":
            return losses.batch_hinge(*pairs, group), metrics
        whole = (queries * mask[:, :, None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
        return losses.contrastive(whole, items, config.scale, group)[0], metrics


def words_of(mask: jax.Array) -> jax.Array:
    """The mask `[B, L]` of texts without start and end; with the start where there is nothing else."""
    places, counts = jnp.arange(mask.shape[1]), mask.sum(axis=1, keepdims=True)
    inside = (places > 0) & (places < counts - 1)
    return inside | ((places == 0) & (counts <= 2))


def legacy_batch_recall(queries: jax.Array, items: jax.Array, mask: jax.Array, k: int) -> jax.Array:
    """The "R@k" that the original prints while it trains, to compare logs with; `cir_jax.evaluation.metrics` has the true one.

    The share of tokens whose own picture is among the k + 1 best of the batch, equal scores counting as better. Shapes
    as of `cir_jax.losses.paired_hinge`.
    """
    # original: Maria `xmatching/metric.py`, the threshold is the (k + 1)-th largest score with the right one included
    if not 1 <= k < len(items):
        raise ValueError(f"k is {k}; a batch of {len(items)} allows 1 to {len(items) - 1}")
    scores = jnp.einsum("bld,id->bli", queries, items)
    right = jnp.diagonal(scores, axis1=0, axis2=2).T
    threshold = jnp.sort(scores, axis=2)[:, :, -k - 1]
    return (mask & (right >= threshold)).sum() / mask.sum()
