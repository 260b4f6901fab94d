"""From raw examples to the arrays a model reads: one place for training, embedding, search and evaluation.

A raw query or item is a mapping with some of `image`, `text`, `id`; a prepared one has some of
`image` [S, S, 3] float32, `text` [L] int32, `text_mask` [L] bool; items of some training sets also have `token` [D]
float32, a pseudo-word, which stays as it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cir_jax.data.images import ImageSpec, prepare
from cir_jax.data.text import TextSpec, tokenizer

# A text batch is cut to the shortest of these lengths that holds it: exact, and few shapes to compile.
LENGTHS = (8, 16, 32, 48, 64, 77, 128, 256, 512)


@dataclass(frozen=True)
class Inputs:
    """What a method reads; travels with its config, so that a checkpoint cannot meet the wrong transform."""

    image: ImageSpec = field(default_factory=ImageSpec)
    text: TextSpec = field(default_factory=TextSpec)


def prepare_images(examples: Sequence[Mapping], inputs: Inputs) -> np.ndarray:
    """`[B, S, S, 3]` float32."""
    return np.stack([prepare(example["image"], inputs.image) for example in examples])


def prepare_texts(examples: Sequence[Mapping], inputs: Inputs) -> dict[str, np.ndarray]:
    """`text` `[B, L]` int32 and `text_mask` `[B, L]` bool, padded to the full length."""
    ids, mask = tokenizer(inputs.text)([example["text"] for example in examples])
    return {"text": ids, "text_mask": mask}


def shorten(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Cut the text of a batch to the shortest standard length that holds its longest row."""
    if "text" not in batch:
        return batch
    longest, full = int(batch["text_mask"].sum(axis=1).max(initial=1)), batch["text"].shape[1]
    length = min(next((n for n in LENGTHS if n >= longest), full), full)
    return {k: v[:, :length] if k in ("text", "text_mask") else v for k, v in batch.items()}


def prepare_batch(examples: Sequence[Mapping], inputs: Inputs) -> dict[str, np.ndarray]:
    """Arrays for examples that all have the same parts (image, text or both)."""
    batch = {}
    if "image" in examples[0]:
        batch["image"] = prepare_images(examples, inputs)
    if "text" in examples[0]:
        batch |= prepare_texts(examples, inputs)
    if "token" in examples[0]:
        batch["token"] = np.stack([np.asarray(e["token"], np.float32) for e in examples])
    return batch
