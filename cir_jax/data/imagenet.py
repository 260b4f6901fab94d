"""ImageNet's test pictures with captions in two parts, on which FTI4CIR (Lin et al. 2024; ZiChao111/FTI4CIR) trains.

test/ILSVRC2012_test_00000001.JPEG, … and blip_pairs.json, a list of {"img_id", "subject", "attribute"}; `write_pairs` makes
it from captions and a tagger.
"""

import os
import re
from collections.abc import Callable, Mapping
from typing import Literal

from cir_jax import files
from cir_jax.data import published, searle
from cir_jax.data.benchmark import Made
from cir_jax.data.published import Pair
from cir_jax.data.tables import refuse

WORDS = 4  # a shorter caption has no attribute

# text -> its tokens with their parts of speech (of Universal Dependencies, as spaCy's `pos_`)
Tagger = Callable[[str], list[tuple[str, str]]]


def pairs(root: str, variant: str = "", split: str = "test") -> Made:
    """Raw training pairs: "subject | attribute" and the picture; of the variant `searle`, `cir_jax.data.searle`'s."""
    part = published.part("imagenet", root, variant, split, ("blip", "searle"), ("test",))
    if part.kind == "searle":
        return searle.pairs(part)
    file = part.root / "blip_pairs.json"
    shape = {"img_id": str, "subject": str, "attribute": str}
    records = published.read_json(file, [shape])
    odd = [r["img_id"] for r in records if not re.fullmatch(r"\d{8}", r["img_id"], re.ASCII)]
    faults = [f"{name!r} is no id of ImageNet, expected eight digits" for name in odd]
    refuse(f"{file} has another form than the published file", faults, file)
    records = [record for record in records if record["img_id"] not in odd]
    places = {r["img_id"]: [f"test/ILSVRC2012_test_{r['img_id']}.JPEG"] for r in records}
    text = lambda record: f"{record['subject']} | {record['attribute']}".strip()
    return published.pairs(part, file, [Pair((text(r),), r["img_id"]) for r in records], places)


def write_pairs(
    path: str | os.PathLike,
    captions: Mapping[str, str],
    tag: Tagger,
    mode: Literal["released", "fixed"] = "released",
) -> int:
    """Write `blip_pairs.json` from captions by picture, those that cannot be split left out; gives their number."""
    found = {name: split_caption(caption, tag, mode) for name, caption in captions.items()}
    records = [
        {"img_id": name, "subject": parts[0], "attribute": parts[1]}
        for name, parts in found.items()
        if parts is not None
    ]
    files.write_json(path, records)
    return len(records)


def spacy_tagger(model: str = "en_core_web_sm") -> Tagger:
    """The tagger of a model of spaCy's; ValueError if it cannot be loaded."""
    from cir_jax.data.documents import load_spacy

    loaded = load_spacy(model)
    return lambda text: [(token.text, token.pos_) for token in loaded(text)]


def split_caption(
    caption: str, tag: Tagger, mode: Literal["released", "fixed"] = "released"
) -> tuple[str, str] | None:
    """(subject, attribute) of a caption, cut behind its first noun; None if it is to be left out.

    Repetitions of the last word are dropped first; a caption of fewer than four words is left out.

    Args:
      mode: "released" cuts a caption without a noun behind its second character, and keeps empty attributes. original:
        FTI4CIR `blip_caption.py`; its guard against them compares characters with words and never holds. "fixed" cuts
        behind the second word, and leaves out captions with fewer than two words after the noun.
    """
    if mode not in ("released", "fixed"):
        raise ValueError(f"mode is {mode!r}; expected released or fixed")
    words = caption.split()
    while len(words) > 1 and words[-1] == words[-2]:
        words.pop()
    if len(words) < WORDS:
        return None
    text = " ".join(words)
    tokens = tag(text)
    noun = next((place for place, (_, kind) in enumerate(tokens) if kind == "NOUN"), None)
    if noun is None and mode == "released":
        return text[:2], text[2:]
    if noun is None:
        return " ".join(words[:2]), " ".join(words[2:])
    if mode == "fixed" and len(tokens) < noun + 3:
        return None
    subject, attribute = (
        " ".join(t for t, _ in some) for some in (tokens[: noun + 1], tokens[noun + 1 :])
    )
    return (subject, attribute) if subject != attribute else None
