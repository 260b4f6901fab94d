"""Textual inversion with one pseudo-word a picture: Pic2Word, SEARLE and LinCIR over a frozen CLIP.

They differ in the network that makes the word, in the prompt and in the loss. Pic2Word (Saito et al. 2023, arXiv
2302.03084; google-research/composed_image_retrieval) trains on pictures, SEARLE (Baldrati et al. 2023, arXiv
2303.15247; miccunifi/SEARLE) on words found one by one (`cir_jax.methods.oti`), LinCIR (Gu et al. 2024, arXiv
2312.01998; navervision/lincir) on texts. Experiments set `optim.frozen` to `FROZEN`.
"""

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from cir_jax import losses
from cir_jax.data.images import ImageSpec
from cir_jax.data.inputs import Inputs
from cir_jax.data.text import tokenizer
from cir_jax.encoders.clip import OPENAI_VITS
from cir_jax.encoders.layers import Activation, subkey, unit
from cir_jax.encoders.pseudo_words import Mapper, Prompt, content, joined, read, starred, vocabulary
from cir_jax.large_batches import in_chunks
from cir_jax.methods.clip import Clip, ClipConfig

FROZEN = ("clip/.*",)
Size = Literal["L/14", "B/32", "B/16"]


@dataclass(frozen=True)
class Pic2WordConfig(ClipConfig):
    """CLIP and a mapping network of width `mapper_hidden`."""

    star: ClassVar[str] = "*"
    link: ClassVar[str] = ","
    activation_of_mapper: ClassVar[Activation] = "relu"
    first_star_only: ClassVar[bool] = False
    stars_in_texts: ClassVar[bool] = False

    mapper_hidden: int | None = 512
    dropout: float = 0.1

    @classmethod
    def tiny(cls, inputs: Inputs) -> "Pic2WordConfig":
        """A size for tests."""
        return cls(**tiny_clip(inputs), mapper_hidden=32)

    @classmethod
    def paper(cls, size: Size = "L/14") -> "Pic2WordConfig":
        """The paper's model on one of OpenAI's, with CLIP's own picture transform (RGB comes last)."""
        return cls(**OPENAI_VITS[size], inputs=Inputs(image=ImageSpec(convert_first=False)))


@dataclass(frozen=True)
class SearleConfig(ClipConfig):
    """CLIP and a mapping network of width `mapper_hidden`, None for four times CLIP's.

    The loss is the sum of the distance to the words found by optimisation, with weight `distillation` and
    `temperature`, and of that between phrases with and without the word, with weight `phrases`. `first_star_only` puts
    the word at the first star of a phrase alone and reads further ones as stars.
    """

    star: ClassVar[str] = "$"
    link: ClassVar[str] = "that"
    activation_of_mapper: ClassVar[Activation] = "gelu"
    stars_in_texts: ClassVar[bool] = False

    mapper_hidden: int | None = None
    dropout: float = 0.5
    distillation: float = 1.0
    phrases: float = 0.75
    temperature: float = 0.25
    first_star_only: bool = False

    @classmethod
    def tiny(cls, inputs: Inputs) -> "SearleConfig":
        """A size for tests."""
        return cls(**tiny_clip(inputs), mapper_hidden=32, dropout=0.1)

    @classmethod
    def paper(cls, size: Size = "B/32") -> "SearleConfig":
        """The paper's model (L/14 is SEARLE-XL).

        Original: src/encode_with_pseudo_tokens.py, replaces the first star of a text although the training phrases
        may have several; src/data_utils.py, makes pictures RGB last.
        """
        image = ImageSpec(resize="targetpad", convert_first=False)
        return cls(**OPENAI_VITS[size], inputs=Inputs(image=image), first_star_only=True)


@dataclass(frozen=True)
class LinCirConfig(ClipConfig):
    """CLIP and a mapping network of width `mapper_hidden`, None for four times CLIP's.

    With `stars_in_texts` a star that a person writes becomes the pseudo-word too.
    """

    star: ClassVar[str] = "$"
    link: ClassVar[str] = "that"
    activation_of_mapper: ClassVar[Activation] = "gelu"
    first_star_only: ClassVar[bool] = False

    mapper_hidden: int | None = None
    dropout: float = 0.5
    stars_in_texts: bool = False

    @classmethod
    def tiny(cls, inputs: Inputs) -> "LinCirConfig":
        """A size for tests."""
        return cls(**tiny_clip(inputs), mapper_hidden=32, dropout=0.1)

    @classmethod
    def paper(cls, size: Size = "L/14") -> "LinCirConfig":
        """The paper's model, with Hugging Face's picture transform; original: every star of a prompt is replaced."""
        image = ImageSpec(crop_offset="floor")
        return cls(**OPENAI_VITS[size], inputs=Inputs(image=image), stars_in_texts=True)


def tiny_clip(inputs: Inputs) -> dict:
    """The fields of a CLIP in a size for tests, whose tower reads a prompt and a text together."""
    clip = ClipConfig.tiny(inputs)
    return {
        "vision": clip.vision,
        "text": replace(clip.text, length=inputs.text.length + 8),
        "embed": clip.embed,
        "inputs": inputs,
    }


def check_whole(config: ClipConfig, method: str) -> None:
    """Refuse a config of CLIP that leaves out patches, for a method that cannot."""
    if config.patches_kept != 1:
        raise ValueError(
            f"patches_kept is {config.patches_kept}; {method} reads whole pictures, set it to 1"
        )


class Inversion(nnx.Module):
    """Retriever: a query of a picture, or of a picture and a text about its change, against pictures.

    A query of text alone is CLIP's.
    """

    query_kinds = ({"image", "text"}, {"image"}, {"text"})
    special_rows = 0

    def __init__(self, config: Pic2WordConfig | SearleConfig | LinCirConfig, rngs: nnx.Rngs):
        check_whole(config, "textual inversion")
        self.clip = Clip(config, rngs)
        self.mapper = Mapper(
            config.embed,
            config.mapper_hidden or 4 * config.embed,
            config.text.width,
            activation=config.activation_of_mapper,
            dropout=config.dropout,
            dtype=config.dtype,
            rngs=rngs,
        )
        self.words = vocabulary(
            tokenizer(config.inputs.text), config.star, ("a photo of", config.link)
        )
        self.config = config

    @staticmethod
    def training_item(config) -> set[str]:
        """What an item needs for the loss of the config's paper, where queries have no reference picture."""
        if isinstance(config, LinCirConfig):
            return {"text"}
        searle = isinstance(config, SearleConfig)
        parts = {"token": searle and config.distillation, "text": searle and config.phrases}
        return {"image"} | {name for name, weight in parts.items() if weight}

    def tokens(self, features: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """The pseudo-words `[B, 1, width]` of CLIP's features `[B, embed]`, which are not normalised."""
        return self.mapper(features, key)[:, None]

    def prompt(self, text: jax.Array | None = None) -> Prompt:
        """`a photo of *`, and with ids `[B, L]` of a text `… , ` (or `… that `) that text."""
        parts = [self.words("a photo of"), self.words.stars(1)]
        if text is not None:
            said = content(text, self.words.end)
            if self.config.stars_in_texts:
                said = starred(said, self.words.star)
            parts += [self.words(self.config.link), said]
        return joined(parts, self.words, self.config.text.length)

    def phrase(self, text: jax.Array) -> Prompt:
        """A text `[B, L]` whose stars are places of the pseudo-word."""
        said = content(text, self.words.end)
        part = starred(said, self.words.star, self.config.first_star_only)
        return joined([part], self.words, self.config.text.length)

    def read(self, prompt: Prompt, tokens: jax.Array) -> jax.Array:
        """The features `[B, embed]` of prompts with pseudo-words, not normalised."""
        return read(self.clip.text, prompt, tokens)

    def query(self, query: dict[str, jax.Array], key: jax.Array | None = None) -> jax.Array:
        """`[B, embed]`; a `key` turns dropout on."""
        if "image" not in query:
            return self.clip.query(query)
        tokens = self.tokens(self.clip.image(query["image"]), key)
        return unit(self.read(self.prompt(query.get("text")), tokens))

    def item(self, item: dict[str, jax.Array]) -> jax.Array:
        return self.clip.item(item)

    def loss(self, batch, key) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of the config's paper; see `LOSSES` for what it reads of a batch.

        None of them has queries with a reference picture; such queries are pulled to their targets instead, by CLIP's
        contrastive loss.
        """
        if "image" in batch["query"]:
            return composed(self, batch, key)
        return LOSSES[type(self.config)](self, batch, key)


def composed(method, batch, key) -> tuple[jax.Array, dict[str, jax.Array]]:
    """CLIP's contrastive loss between queries and items, for a method that has a `clip`."""
    queries = in_chunks(method.query, batch["query"], key)
    items = in_chunks(lambda item, _: method.item(item), batch["item"])
    return method.clip.match(queries, items, batch["item"].get("group"))


def pic2word_loss(method: Inversion, batch, key) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Contrastive loss between `a photo of *` and the picture `item["image"]` that made the word, at CLIP's scale."""

    def encode(images, key):
        features = method.clip.image(images)
        prompts = method.read(method.prompt(), method.tokens(features, key))
        return unit(prompts), unit(features)

    prompts, features = in_chunks(encode, needed(batch, "item", "image"), key)
    return method.clip.match(prompts, features, batch["item"].get("group"))


def searle_loss(method: Inversion, batch, key) -> tuple[jax.Array, dict[str, jax.Array]]:
    """SEARLE's distillation.

    The word of a picture `item["image"]` shall resemble the one that optimisation found, `item["token"]` `[B, width]`,
    and stand for the picture's concept in a phrase: `item["text"]` is the phrase and `query["text"]` the same with
    stars in the concept's place. A weight of zero leaves a part out.
    """
    config, parts = method.config, {}
    word = lambda images, key: method.tokens(method.clip.image(images), key)
    tokens = in_chunks(word, needed(batch, "item", "image"), key)
    if config.distillation:
        found = needed(batch, "item", "token")
        parts["distillation"] = losses.nt_xent(unit(found), unit(tokens[:, 0]), config.temperature)
    if config.phrases:
        read = lambda x, _: (method.clip.text(x[0]), method.read(method.phrase(x[1]), x[2]))
        texts = needed(batch, "item", "text"), needed(batch, "query", "text")
        parts["phrases"] = losses.cosine(*in_chunks(read, (*texts, tokens)))
    if not parts:
        raise ValueError("distillation and phrases are both 0, so that there is no loss; set one")
    return sum(getattr(config, name) * value for name, value in parts.items()), parts


def lincir_loss(method: Inversion, batch, key) -> tuple[jax.Array, dict[str, jax.Array]]:
    """LinCIR's self-masking projection, on texts alone.

    `item["text"]` is a caption and `query["text"]` the same with stars in place of its key words. The words made of
    the caption's own feature, to which noise of random size is added, shall restore it. Without a key no noise.
    """

    def encode(texts, key):
        caption, starry = texts
        features = noisy = method.clip.text(caption)
        if key is not None:
            size = jax.random.uniform(subkey(key, 0), (len(features), 1), features.dtype)
            noisy += size * jax.random.normal(subkey(key, 1), features.shape, features.dtype)
        tokens = method.tokens(noisy, subkey(key, 2))
        return features, method.read(method.phrase(starry), tokens)

    texts = needed(batch, "item", "text"), needed(batch, "query", "text")
    features, masked = in_chunks(encode, texts, key)
    return jnp.mean((masked - jax.lax.stop_gradient(features)) ** 2), {}


LOSSES = MappingProxyType(
    {Pic2WordConfig: pic2word_loss, SearleConfig: searle_loss, LinCirConfig: lincir_loss}
)


def needed(batch, side: str, part: str) -> jax.Array:
    """What a loss reads of a batch, or one clear error."""
    if part not in batch[side]:
        raise ValueError(
            f"the loss reads `{part}` of each {side}; this batch has {', '.join(sorted(batch[side]))}"
        )
    return batch[side][part]
