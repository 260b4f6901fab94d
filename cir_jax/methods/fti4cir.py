"""FTI4CIR (Lin et al. 2024, SIGIR; ZiChao111/FTI4CIR `src/i2t_model.py`): fine-grained textual inversion on CLIP.

A picture becomes several pseudo-words: one for its subject and one for each attribute that stands out. They fill a
prompt together with the text of a change, and CLIP's text tower reads it; items are CLIP's vectors of pictures. CLIP
is not trained: experiments set `optim.frozen` to `cir_jax.methods.inversion.FROZEN`.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from cir_jax import losses
from cir_jax.data.images import ImageSpec
from cir_jax.data.inputs import Inputs
from cir_jax.data.text import tokenizer
from cir_jax.encoders.clip import OPENAI_VITS, VisionConfig
from cir_jax.encoders.layers import (
    Attention,
    Mlp,
    layer_norm,
    normal,
    product,
    run,
    stack,
    subkey,
    unit,
)
from cir_jax.encoders.pseudo_words import (
    Mapper,
    Prompt,
    content,
    divided,
    joined,
    read,
    uniform_linear,
    vocabulary,
)
from cir_jax.large_batches import in_chunks
from cir_jax.methods.clip import Clip, ClipConfig
from cir_jax.methods.inversion import Size, check_whole, composed, needed

# Between the subject and the attributes of a caption: "a brown dog | laying on the grass".
SEPARATOR = "|"


@dataclass(frozen=True)
class Fti4cirConfig(ClipConfig):
    """CLIP, and what reads its patches; the defaults are the paper's on ViT-B/32.

    Of `attributes` learned queries the `kept` best serve the loss, and of these a prompt gets those whose share of
    attention is above `threshold` (at least one; in bfloat16, one within rounding of it may come or go). `mapper_hidden` is None for four times CLIP's width.
    `regularisation` is the weight of the three losses against the caption in words.
    """

    attributes: int = 24
    kept: int = 12
    threshold: float = 0.05
    attribute_layers: int = 3
    attribute_heads: int = 1
    mapper_hidden: int | None = None
    dropout: float = 0.5
    temperature: float = 0.2
    regularisation: float = 1.4

    @classmethod
    def tiny(cls, inputs: Inputs) -> "Fti4cirConfig":
        """A size for tests."""
        clip = ClipConfig.tiny(inputs)
        # The tower reads more than a text is long, so that prompt and text fit together.
        text = replace(clip.text, length=inputs.text.length + 16)
        small = {"attributes": 6, "kept": 3, "threshold": 0.17, "attribute_layers": 2}
        return cls(clip.vision, text, clip.embed, inputs=inputs, dropout=0.1, **small)

    @classmethod
    def paper(cls, size: Size = "L/14") -> "Fti4cirConfig":
        """The paper's model on one of OpenAI's, with the order of its picture transform (RGB comes last)."""
        image = ImageSpec(resize="targetpad", convert_first=False)
        return cls(**OPENAI_VITS[size], inputs=Inputs(image=image))


class AttributeBlock(nnx.Module):
    """Pre-norm transformer block whose projections of queries, keys and values have no bias."""

    def __init__(self, width, heads, *, dtype, rngs):
        options = {"dtype": dtype, "rngs": rngs}
        self.ln1 = layer_norm(width, rngs)
        self.attention = Attention(width, heads, **options)
        for name in ("query", "key", "value"):
            setattr(self.attention, name, uniform_linear(width, width, bias=False, **options))
        self.attention.out = uniform_linear(width, width, **options)
        self.ln2 = layer_norm(width, rngs)
        self.mlp = Mlp(width, 2 * width, activation="relu", **options)
        self.mlp.up = uniform_linear(width, 2 * width, **options)
        self.mlp.down = uniform_linear(2 * width, width, **options)

    def __call__(self, x):
        x = x + self.attention(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class LocalAttributes(nnx.Module):
    """A picture's tokens `[B, N, width]` -> candidates for its attributes `[B, count, embed]` in (0, 1)."""

    def __init__(self, count, width, embed, layers, heads, *, remat=True, dtype="float32", rngs):
        self.queries = normal(rngs, (1, count, width), 1.0)
        make = lambda rngs: AttributeBlock(width, heads, dtype=dtype, rngs=rngs)
        self.blocks = stack(make, layers, rngs)
        self.project = uniform_linear(width, embed, dtype=dtype, rngs=rngs)
        self.remat = remat

    def __call__(self, tokens: jax.Array) -> jax.Array:
        queries = jnp.repeat(self.queries[...], len(tokens), axis=0)
        x = run(self.blocks, jnp.concatenate([queries, tokens], axis=1), remat=self.remat)
        return jax.nn.sigmoid(self.project(x[:, : queries.shape[1]]))


class Chosen(NamedTuple):
    """The attributes that stand out: unit rows `[B, K, embed]`, how many of them count `[B]`, their numbers `[B, K]`."""

    features: jax.Array
    counts: jax.Array
    rows: jax.Array


def attention_shares(candidates: jax.Array, feature: jax.Array) -> jax.Array:
    """How much of a picture's feature `[B, D]` each of its candidates `[B, N, D]` has, `[B, N]` with sum one."""
    return jax.nn.softmax(product("bnd,bd->bn", candidates, feature, "float32"), axis=-1)


def choose(candidates: jax.Array, feature: jax.Array, kept: int, threshold: float) -> Chosen:
    """The `kept` candidates with the largest shares; those above the threshold come first, in their own order.

    Equal shares are taken by their number, where the original leaves the order open.
    """
    shares = jax.lax.stop_gradient(attention_shares(candidates, feature))
    best = jnp.argsort(-shares, axis=-1, stable=True)[:, :kept]
    counts = jnp.clip((shares > threshold).sum(axis=-1), 1, kept)
    rank = jnp.arange(kept)
    place = jnp.where(rank < counts[:, None], best, candidates.shape[1] + rank)
    rows = jnp.take_along_axis(best, jnp.argsort(place, axis=-1), axis=-1)
    return Chosen(unit(jnp.take_along_axis(candidates, rows[..., None], axis=1)), counts, rows)


def orthogonality(features: jax.Array) -> jax.Array:
    """How far unit rows `[B, K, D]` are from being orthogonal: mean squared error of their cosines against identity."""
    cosines = product("bkd,bld->bkl", features, features, "float32")
    return jnp.mean((cosines - jnp.eye(features.shape[1])) ** 2)


class Inverted(NamedTuple):
    """What a picture became: CLIP's feature `[B, embed]`, pseudo-words `[B, 1 + K, width]` and attributes.

    Word 0 is the subject's, the next `chosen.counts` are those of the attributes that stand out.
    """

    feature: jax.Array
    tokens: jax.Array
    chosen: Chosen


class Fti4cir(nnx.Module):
    """Retriever: a query of a picture, or of a picture and a text about its change, against pictures.

    A query of text alone is CLIP's.
    """

    query_kinds = ({"image", "text"}, {"image"}, {"text"})
    special_rows = 0

    def __init__(self, config: Fti4cirConfig, rngs: nnx.Rngs):
        check(config)
        embed, width, options = config.embed, config.text.width, {"dtype": config.dtype}
        self.clip = Clip(config, rngs)
        self.attributes = LocalAttributes(
            config.attributes,
            config.vision.width,
            embed,
            config.attribute_layers,
            config.attribute_heads,
            remat=config.remat,
            **options,
            rngs=rngs,
        )
        hidden = config.mapper_hidden or 4 * embed
        options |= {"activation": "gelu", "dropout": config.dropout, "rngs": rngs}
        self.subject_mapper = Mapper(embed, hidden, width, **options)
        self.attribute_mapper = Mapper(embed, hidden, width, **options)
        phrases = ("a photo of", "with", "but", SEPARATOR)
        self.words = vocabulary(tokenizer(config.inputs.text), "*", phrases)
        self.config = config

    def invert(self, images: jax.Array, key: jax.Array | None = None) -> Inverted:
        """The pseudo-words of pictures `[B, S, S, 3]`; a `key` turns the mappers' dropout on."""
        tokens = self.clip.image.tokens(images)
        feature = self.clip.image.project(self.clip.image.ln_post(tokens[:, 0]))
        candidates = self.attributes(tokens)
        chosen = choose(candidates, feature, self.config.kept, self.config.threshold)
        subject = self.subject_mapper(feature, subkey(key, 0))[:, None]
        rest = self.attribute_mapper(chosen.features, subkey(key, 1))
        return Inverted(feature, jnp.concatenate([subject, rest], axis=1), chosen)

    def prompt(self, counts: jax.Array, text: jax.Array | None = None) -> Prompt:
        """`a photo of * with * * *`, and with ids `[B, L]` of a text `… but` that text; `counts` `[B]` of attributes."""
        words = self.words
        parts = [words("a photo of"), words.stars(1), words("with"), self._attributes(counts)]
        if text is not None:
            parts += [words("but"), content(text, words.end)]
        return joined(parts, words, self.config.text.length)

    def caption_prompts(self, counts: jax.Array, text: jax.Array) -> dict[str, Prompt]:
        """Prompts of captions with a separator: the subject, the attributes or neither of them as pseudo-words."""
        words = self.words
        subject, attributes = divided(content(text, words.end), words.id(SEPARATOR))
        make = lambda first, second: joined(
            [words("a photo of"), first, words("with"), second], words, self.config.text.length
        )
        return {
            "subject": make(words.stars(1), attributes),
            "attributes": make(subject, self._attributes(counts)),
            "words": make(subject, attributes),
        }

    def _attributes(self, counts):
        return self.words.stars(self.config.kept, counts, first=1)

    def query(self, query: dict[str, jax.Array], key: jax.Array | None = None) -> jax.Array:
        """`[B, embed]`; a `key` turns dropout on."""
        if "image" not in query:
            return self.clip.query(query)
        made = self.invert(query["image"], key)
        prompt = self.prompt(made.chosen.counts, query.get("text"))
        return unit(read(self.clip.text, prompt, made.tokens))

    def item(self, item: dict[str, jax.Array]) -> jax.Array:
        return self.clip.item(item)

    def loss(self, batch, key) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The paper's loss on pictures (`item["image"]`) and their captions (`query["text"]`, "subject | attributes").

        A caption without the separator is a subject without attributes. The paper trains on these alone; queries with
        a reference picture are pulled to their targets, by CLIP's contrastive loss.
        """
        if "image" in batch["query"]:
            return composed(self, batch, key)
        pictures, captions = needed(batch, "item", "image"), needed(batch, "query", "text")

        def encode(pair, key):
            made = self.invert(pair[0], key)
            return made, self.caption_features(made, pair[1])

        made, texts = in_chunks(encode, (pictures, captions), key)
        parts = {
            "contrastive": losses.nt_xent(
                unit(made.feature), unit(texts["whole"]), self.config.temperature
            ),
            "orthogonality": orthogonality(made.chosen.features),
            "regularisation": regularisation(texts),
            "attributes": made.chosen.counts.mean(),
        }
        total = parts["contrastive"] + parts["orthogonality"]
        return total + self.config.regularisation * parts["regularisation"], parts

    def caption_features(self, made: Inverted, text: jax.Array) -> dict[str, jax.Array]:
        """CLIP's features `[B, embed]` of the prompts that the loss compares; no gradient flows to that in words."""
        counts = made.chosen.counts
        prompts = {"whole": self.prompt(counts), **self.caption_prompts(counts, text)}
        features = {name: read(self.clip.text, each, made.tokens) for name, each in prompts.items()}
        return {**features, "words": jax.lax.stop_gradient(features["words"])}


def regularisation(texts: dict[str, jax.Array]) -> jax.Array:
    """The distances of the three prompts with pseudo-words to the one in words (tri-wise regularisation), added."""
    return sum(
        losses.cosine(texts[name], texts["words"]) for name in ("subject", "attributes", "whole")
    )


def check(config: Fti4cirConfig) -> None:
    """Refuse a config whose parts do not fit each other."""
    if not isinstance(config.vision, VisionConfig):
        raise ValueError(
            "fti4cir reads the tokens of a vision transformer; set vision to a VisionConfig"
        )
    if not 1 <= config.kept <= config.attributes:
        raise ValueError(
            f"kept is {config.kept} of {config.attributes} attributes; expected 1 to {config.attributes}"
        )
    check_whole(config, "fti4cir")
