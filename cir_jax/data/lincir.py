"""Captions alone, with their key words, on which LinCIR (Gu et al. 2024; navervision/lincir) trains.

A table of one's own with the columns `text` and `keys`; `write_keys` makes it from captions and a tagger. LinCIR's corpora
are on the Hugging Face hub: dangne/gcc_caption_only, FredZhang7/stable-diffusion-prompts-2.47M and
Geonmo/midjourney-prompts-only, each with a column `text`.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from cir_jax import files
from cir_jax.data.benchmark import Made
from cir_jax.data.imagenet import Tagger
from cir_jax.data.tables import read_table, refuse, string, strings

SEPARATOR = "|"  # between the key words in a cell of a CSV
STAR = "$"


def captions(root: str) -> Made:
    """Raw training pairs of a caption and the same with stars for its key words, drawn anew by every step.

    Raises:
      FileNotFoundError: no such table.
      ValueError: a malformed table, rows without text; the first five faults with their lines.
    """
    rows, faults = [], []
    for place, values in read_table(root):
        try:
            rows.append(_read(values))
        except ValueError as error:
            faults.append(f"{place}: {error}")
    refuse(f"{root} cannot be trained on", faults)
    return Made(len(rows), lambda row: _row(*rows[row]))


def _read(values: Mapping) -> tuple[str, tuple[str, ...]]:
    text, keys = string(values.get("text")), values.get("keys")
    if text is None:
        raise ValueError("`text` is empty")
    try:
        return text, tuple(strings(keys, SEPARATOR))
    except ValueError as error:
        raise ValueError(f"`keys` {error}") from None


def _row(caption: str, keys: tuple[str, ...]) -> dict:
    def draw(rng):
        plain, masked = masked_caption(caption, keys, rng)
        return {"query": {"text": masked}, "item": {"text": plain}}

    return {**draw(np.random.default_rng(0)), "draw": draw}


def write_keys(path: str | os.PathLike, texts: Iterable[str], tag: Tagger) -> int:
    """Write the table (`.jsonl`) of captions and their key words; gives their number. Empty captions are left out."""
    count = 0
    with files.write_atomically(Path(path)) as part, part.open("w", encoding="utf-8") as file:
        for text in filter(str.strip, texts):
            tagged = tag(cleaned_caption(text))
            keys = key_words([word for word, _ in tagged], [kind for _, kind in tagged])
            file.write(json.dumps({"text": text, "keys": keys}, ensure_ascii=False) + "\n")
            count += 1
    return count


KEY_TAGS = ("NOUN", "PROPN", "ADJ", "DET")


def key_words(words, tags) -> list[str]:
    """The longest runs of words with a tag (universal part of speech) of `KEY_TAGS`, joined by spaces."""
    found, run = [], []
    for word, tag in [*zip(words, tags, strict=True), ("", "")]:
        if tag in KEY_TAGS:
            run.append(word)
        elif run:
            found.append(" ".join(run))
            run = []
    return found


def masked_caption(caption: str, keys, rng, star: str = STAR) -> tuple[str, str]:
    """(caption as trained on, the same with a star in place of every key word).

    Original: navervision/lincir `loader.py`, replaces a key word inside other words too, and at the first one that is
    not in the caption a random word instead of it and of all that follow.

    Args:
      caption: raw.
      keys: from `key_words` on the cleaned caption.
      rng: numpy generator.
      star: the placeholder.
    """
    caption = " ".join(cleaned_caption(caption, star).split())
    masked, mark = caption, f" {star} "
    for key in keys or [None]:
        if key is None or key not in masked:
            words = masked.split()
            if words:
                words[rng.integers(len(words))] = star
            masked = " ".join(words)
            break
        masked = masked.replace(key, mark)
    masked = " ".join(masked.split())
    return caption, masked if star in masked else f"a photo of {star}"


def cleaned_caption(caption: str, star: str = STAR) -> str:
    """Lower case, without stars, and with a word for the corpus's stand-in for names."""
    return caption.lower().replace(star, "").replace("<person>", "person")
