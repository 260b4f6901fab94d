"""The built-in data set emoji_v1: 2,859 named emoji in two drawing styles, for three tasks.

Text to image (by name), composed (a reference picture and an edit) and document to image. Made by
`cir_jax.data.emoji_v1.build`; sources and licences are in `emoji_v1/NOTICE`. Nothing is downloaded,
and what is read stays in the process. `id` is the emoji's code points, the same in both styles.

Two kinds of split exist. Texts and documents are split by concept: test names things never seen in
training. Edits are split by pair of pictures, so their pictures may occur in other training edits;
`concept_disjoint` chooses edits by concept instead.
"""

import functools
import gzip
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from cir_jax.data.benchmark import Benchmark
from cir_jax.data.documents import BUILTIN, extract
from cir_jax.data.emoji_v1 import rules
from cir_jax.data.emoji_v1.rules import Item, Triplet
from cir_jax.data.images import ImageSpec

FOLDER = Path(__file__).resolve().parent / "emoji_v1"
VOCABULARY = FOLDER / "vocabulary.txt.gz"  # byte pairs of the training texts
MEANINGS = (
    FOLDER / "meanings.npy"
)  # [4000, 128] float16, where the word pieces of `VOCABULARY` start
WORDS = FOLDER / "words.txt.gz"  # WordPiece: the English words of MiniLM's vocabulary
WORD_MEANINGS = (
    FOLDER / "word_meanings.npz"
)  # [26592, 128] float16, where the entries of `WORDS` start
# How the demo's models read the pictures. They are drawn on white: a mean near white keeps the inputs small.
IMAGES = ImageSpec(
    size=64, background=(255, 255, 255), mean=(0.75, 0.75, 0.75), std=(0.35, 0.35, 0.35)
)
STYLES = ("noto", "twemoji")
SPLITS = ("train", "val", "test")
SIZE = 64  # side of a picture
COLUMNS = 62  # pictures in one row of a sheet
MASK = "something"  # stands for the words that a masked document must not say
WORDINGS = 12  # texts to draw from for one emoji
MOST_REPEATS = 8  # of an edit, where its kind is rare
SHA256 = {
    "noto_64.png": "be2e71fc56d1576f5983aafcbfed364f450a5c6ef7418e9dad60e9265f32328d",
    "twemoji_64.png": "a6af70d4f0eeb07e9ed8c90ded7530d81268fa6d955545b811ec9c87b4a58539",
    "items.json.gz": "9db7f55b1ed2d5d7fc3d1b9dedd0a64d07506a2ca2beaf601b55db3ac6653be5",
    "composed.json.gz": "b27406ec844b9ad8b2b137d1f0cdbf5c1dbb24854808714d4eac0bf404e22998",
    "documents.json.gz": "eead33b9f129d31017c925b90061b2e5b39861f00f2646a4119ed3ba956e6b53",
}

Style = Literal["noto", "twemoji"]
Split = Literal["train", "val", "test"]


# ---- the files ----


@functools.cache
def items() -> tuple[Item, ...]:
    """All emoji; the position of an item is its row in `tiles` and in a full gallery."""
    fields = [{**value, "keywords": tuple(value["keywords"])} for value in _json("items.json.gz")]
    return tuple(Item(**{**value, "tones": tuple(value["tones"])}) for value in fields)


@functools.cache
def tiles(style: Style) -> np.ndarray:
    """The pictures of one style, `[2859, 64, 64, 3]` uint8 on white; read-only."""
    from cir_jax.data.images import open_image

    _check("style", style, STYLES)
    sheet = np.asarray(open_image(_read(f"{style}_64.png")).convert("RGB"))
    grid = sheet.reshape(-1, SIZE, COLUMNS, SIZE, 3).swapaxes(1, 2)
    pictures = grid.reshape(-1, SIZE, SIZE, 3)[: len(items())]
    pictures.setflags(write=False)
    return pictures


@functools.cache
def documents() -> Mapping[str, Mapping[str, str]]:
    """Encyclopaedic texts by emoji id: `text`, `title` (hypernym), `lemma`, `synset`."""
    return _json("documents.json.gz")


@functools.cache
def triplets() -> Mapping[str, tuple[Triplet, ...]]:
    """The edits of each split, by pair, at most 1,200 (train) or 150 per rule."""
    stored = _json("composed.json.gz")
    return {split: tuple(Triplet(**value) for value in stored[split]) for split in SPLITS}


@functools.cache
def all_triplets() -> tuple[Triplet, ...]:
    """Every edit the rules find, before splits and limits (21,472)."""
    return tuple(rules.triplets(items()))


@functools.cache
def rows() -> Mapping[str, int]:
    """Row of each emoji id."""
    return {item.id: row for row, item in enumerate(items())}


@functools.cache
def twins(style: Style) -> tuple[tuple[int, ...], ...]:
    """Per row, the rows whose pictures are equal byte for byte, itself among them.

    Flags of dependencies and some families are drawn alike; any of them answers the query.
    """
    alike = defaultdict(list)
    for row, picture in enumerate(tiles(style)):
        alike[picture.tobytes()].append(row)
    found = {row: tuple(group) for group in alike.values() for row in group}
    return tuple(found[row] for row in range(len(found)))


@functools.cache
def groups(styles: tuple[Style, ...] = STYLES) -> tuple[int, ...]:
    """Per row, a number shared by the emoji that look the same in one of the styles."""
    labels = np.arange(len(items()))
    for style in styles:
        for alike in {group for group in twins(style) if len(group) > 1}:
            joined = np.isin(labels, labels[list(alike)])
            labels[joined] = labels[joined].min()
    return tuple(labels.tolist())


# ---- raw data sets ----


def emoji_pairs(style: Style | Literal["both"] = "both", split: Split = "train") -> list[dict]:
    """Pictures with names: `image`, `text` (name), `keywords`, `id`, `category`, `style`, `group`.

    With both styles a name occurs twice; `group` is equal where pictures show the same thing.
    """
    label = groups(_styles(style))
    return [
        {
            "image": tiles(each)[row],
            "text": item.name,
            "keywords": item.keywords,
            "id": item.id,
            "category": item.category,
            "style": each,
            "group": label[row],
        }
        for each in _styles(style)
        for row, item in enumerate(items())
        if item.split == _check("split", split, SPLITS)
    ]


def emoji_triplets(
    style: Style | Literal["both"] = "both",
    split: Split = "train",
    concept_disjoint: bool = False,
    pair_disjoint: bool = False,
) -> list[dict]:
    """Edits: `image` (reference), `text`, `target` (picture), `rule`, `id`, `target_id`, `style`
    and `group` (of the target).

    Args:
      style: reference and target are drawn in the same style.
      split: by pair (5,378, 678 and 710 edits per style).
      concept_disjoint: instead, all edits between two emoji whose concepts belong to `split`
        (14,254, 472 and 1,122): training then sees nothing of a val or test concept.
      pair_disjoint: of these, only the pairs which the split by pair gives to `split` too (11,400,
        44 and 108): a model trained so may be measured on both.
    """
    chosen = _edits(split, concept_disjoint, pair_disjoint)
    label = groups(_styles(style))
    return [
        {
            "image": tiles(each)[rows()[edit.reference]],
            "text": edit.text,
            "target": tiles(each)[rows()[edit.target]],
            "rule": edit.rule,
            "id": edit.reference,
            "target_id": edit.target,
            "style": each,
            "group": label[rows()[edit.target]],
        }
        for each in _styles(style)
        for edit in chosen
    ]


def emoji_documents(
    style: Style | Literal["both"] = "both",
    split: Split = "train",
    masked: bool = False,
    unshared: bool = False,
) -> list[dict]:
    """Pictures with an encyclopaedic text: `image`, `document`, `title`, `category`, `id`, `style`
    and `group`.

    Args:
      split: by concept (422, 57 and 75 documents).
      masked: name, lemma and synonyms in the text become `MASK`.
      unshared: leave out documents whose text a document of another split repeats, as those of
        "cat" and "cat face" do (406, 51 and 68 remain).
    """
    chosen = _documented(split, unshared)
    label = groups(_styles(style))
    return [
        {
            "image": tiles(each)[row],
            "document": document_text(items()[row], masked),
            "title": documents()[items()[row].id]["title"],
            "category": items()[row].category,
            "id": items()[row].id,
            "style": each,
            "group": label[row],
        }
        for each in _styles(style)
        for row in chosen
    ]


def document_text(item: Item, masked: bool = False, own: bool = False) -> str:
    """The document of an emoji that has one, as it is or with its names masked; `own`: without sentences that define
    the subject of another split's document."""
    document = documents()[item.id]
    if own:
        document = {**document, "text": ". ".join(_own_sentences(item))}
    if not masked:
        return document["text"]
    first, names = _names(document)
    return mask(first, {*names, document["lemma"], rules.head(item.name)})


def mask(text: str, names: set[str]) -> str:
    """`text` with every occurrence of the names, plural or in capitals too, replaced by `MASK`."""
    longest_first = sorted(filter(None, names), key=lambda name: (-len(name), name))
    forms = [r"[\s-]?".join(map(re.escape, re.split(r"[\s-]+", name))) for name in longest_first]
    endings = [rf"{form[:-1]}(?:y|ies)" if form.endswith("y") else form for form in forms]
    return re.sub(rf"\b(?:{'|'.join(endings)})(?:e?s)?\b", MASK, text, flags=re.IGNORECASE)


def gallery(style: Style, only: Sequence[int] | None = None) -> list[dict]:
    """Items `image`, `text` (name), `id` of the given rows, or of all."""
    chosen = range(len(items())) if only is None else only
    pictures = tiles(style)
    return [
        {"image": pictures[row], "text": items()[row].name, "id": items()[row].id} for row in chosen
    ]


# ---- training pairs, as cir_jax.data.pipeline reads them ----
#
# Emoji that look like one of another split ("flag: Norway" and "flag: Svalbard") are in no training set by concept.


def text_pairs(variant: str = "both", split: Split = "train") -> list[dict]:
    """Wordings (see `wordings`) and the picture."""
    style, _ = _variant(variant, (), both=True)
    return [
        {
            "query": {"texts": wordings(rows()[raw["id"]])},
            "item": {"image": raw["image"]},
            "group": raw["group"],
        }
        for raw in emoji_pairs(style, split)
        if _alone(rows()[raw["id"]])
    ]


@functools.cache
def wordings(row: int) -> tuple[str, ...]:
    """What training may call an emoji, one of these at a time: mostly its name, else keywords or a sentence.

    Half are the name; a third are keywords, with or without the name; the rest, where there is a document, are
    sentences of it. Keywords that name something of another split ("cat") and sentences that define the subject of
    another split's document are left out.
    """
    item = items()[row]
    rng = np.random.default_rng(row)
    texts = []
    own = [word for word in item.keywords if word.lower() not in _names_elsewhere(item.split)]
    for number in range(WORDINGS // 3 if own else 0):
        keywords = rng.permutation(own)[: rng.integers(1, len(own) + 1)]
        texts.append(", ".join([item.name, *keywords] if number % 2 else keywords))
    sentences = _own_sentences(item)
    texts += [sentences[i % len(sentences)] for i in range(WORDINGS // 6) if sentences]
    return (*[item.name] * (WORDINGS - len(texts)), *texts)


def composed_pairs(variant: str = "both", split: Split = "train") -> list[dict]:
    """Reference and edit, and the target picture; where edits are chosen by concept, also its wordings.

    Variants: a style or "both"; with "-disjoint", edits by concept; with "-strict", by concept and pair; with "-even",
    rare kinds of edit as often as "skin tone", so that role changes do not crowd them out; with "-near" or "-peers", in
    an order in which consecutive edits have different targets that are alike: variants of one concept, or other concepts
    with the same gender, skin tone and hair.
    """
    known = ("disjoint", "strict", "even", "near", "peers")
    style, flags = _variant(variant, known, both=True)
    by_concept = "disjoint" in flags or "strict" in flags
    found = emoji_triplets(style, split, by_concept, "strict" in flags)
    if by_concept:
        found = [e for e in found if all(_alone(rows()[e[name]]) for name in ("id", "target_id"))]
    # By pair, targets may belong to a concept whose name training must not say.
    named = lambda raw: {"texts": wordings(rows()[raw["target_id"]])} if by_concept else {}
    found = _even(found) if "even" in flags else found
    for flag in flags:
        found = _in_rounds(found, ORDERS[flag]) if flag in ORDERS else found
    return [
        {
            "query": {"image": raw["image"], "text": raw["text"]},
            "item": {"image": raw["target"], **named(raw)},
            "group": raw["group"],
        }
        for raw in found
    ]


def _even(edits):
    """The edits with each rule repeated, or thinned by a hash, to about the same number."""
    by_rule = defaultdict(list)
    for edit in edits:
        by_rule[edit["rule"]].append(edit)
    wanted = sum(map(len, by_rule.values())) // (2 * len(by_rule))
    chosen = []
    for found in by_rule.values():
        order = np.random.default_rng(0).permutation(len(found))
        times = min(MOST_REPEATS, max(1, wanted // len(found)))
        chosen += [found[i] for i in order[: 2 * wanted]] * times
    return chosen


def _in_rounds(edits, order):
    """The edits in rounds over their targets; in each round a target occurs once, in the given order of rows."""
    by_target = defaultdict(list)
    for edit in edits:
        by_target[edit["style"], rows()[edit["target_id"]]].append(edit)
    rounds = []
    for (style, row), found in by_target.items():
        drawn = np.random.default_rng(0).permutation(len(found))
        rounds += [((place, style, order(row)), found[i]) for place, i in enumerate(drawn)]
    return [edit for _, edit in sorted(rounds, key=lambda each: each[0])]


def _by_attributes(row):
    """A key that puts emoji with the same attributes together, and those without any in their order."""
    item = items()[row]
    return (item.category, item.gender or "", item.tones, item.hair or "", item.right, row)


ORDERS = {
    "near": lambda row: row,
    "peers": _by_attributes,
}  # of rows, by variant of `composed_pairs`


def document_pairs(variant: str = "both", split: Split = "train") -> list[dict]:
    """What a document asks, its entities and its summary, and the picture.

    Sentences that define the subject of another split's document are left out. Variants: a style or "both"; "-masked",
    "-unshared".
    """
    style, flags = _variant(variant, ("masked", "unshared"), both=True)
    return [
        {
            "query": {"texts": _asks(rows()[raw["id"]], "masked" in flags)},
            "item": {"image": raw["image"]},
            "group": raw["group"],
        }
        for raw in emoji_documents(style, split, "masked" in flags, "unshared" in flags)
        if _own_sentences(items()[rows()[raw["id"]]])
    ]


@functools.cache
def _asks(row, masked):
    """The texts with which an emoji's document may ask; its summary as often as all entities together.

    Entities that name something of another split ("cat" in a text about tigers) are left out.
    """
    item = items()[row]
    found = extract({"document": document_text(item, masked, own=True)}, BUILTIN)
    entities = [e for e in found.entities if e.lower() not in _names_elsewhere(item.split)]
    return (*entities, *[found.summary] * max(1, len(entities)))


# ---- benchmarks ----


def text_benchmark(
    variant: str = "noto", split: Split = "test", gallery: Literal["split", "full"] = "split"
) -> Benchmark:
    """`emoji-text`: find the picture of a name, among those of the split or (`noto-full`) all."""
    style, flags = _variant(variant, ("full",), full=gallery == "full")
    chosen = _of_split(split)
    seen = range(len(items())) if "full" in flags else chosen
    return Benchmark(
        name="emoji-text",
        variant="-".join((style, *flags)),
        split=split,
        queries=[{"text": items()[row].name, "id": items()[row].id} for row in chosen],
        positives=_places([twins(style)[row] for row in chosen], seen),
        **_gallery_of(style, seen),
    )


def composed_benchmark(
    variant: str = "noto", split: Split = "test", concept_disjoint: bool = False
) -> Benchmark:
    """`emoji-composed`: find the target of a reference and an edit among all other pictures.

    The subset of a query is what the rule could have made of its reference: the emoji that share
    the rule's key. Variant `noto-disjoint`: edits by concept; `noto-concepts`: of the edits by pair, those between two
    emoji whose concepts belong to the split as well (43 of 710).
    """
    style, flags = _variant(variant, ("disjoint", "concepts"), disjoint=concept_disjoint)
    edits = _edits(split, "disjoint" in flags)
    if "concepts" in flags:
        edits = _within(edits, split)
    references = [rows()[edit.reference] for edit in edits]
    answers = [
        [row for row in twins(style)[rows()[edit.target]] if row != reference]
        for edit, reference in zip(edits, references, strict=True)
    ]
    return Benchmark(
        name="emoji-composed",
        variant="-".join((style, *flags)),
        split=split,
        queries=[
            {"image": tiles(style)[row], "text": edit.text, "id": f"{edit.reference}>{edit.target}"}
            for row, edit in zip(references, edits, strict=True)
        ],
        positives=[dict.fromkeys(found, 1.0) for found in answers],
        exclude=references,
        subset=[_alternatives(edit.rule, edit.reference) for edit in edits],
        rules=[edit.rule for edit in edits],
        metrics=("recall@1", "recall@5", "recall@10", "mrr", "subset_recall@1"),
        **_gallery_of(style, range(len(items()))),
    )


def document_benchmark(
    variant: str = "noto",
    split: Split = "test",
    masked: bool = False,
    gallery: Literal["split", "full"] = "split",
) -> Benchmark:
    """`emoji-documents`: find the picture that a text describes, among those of the split.

    Pictures with the same text count as well as identical pictures. Variants: `noto-masked`,
    `noto-full`, `noto-full-masked`.
    """
    style, flags = _variant(variant, ("full", "masked"), full=gallery == "full", masked=masked)
    chosen = _documented(split)
    seen = range(len(items())) if "full" in flags else _of_split(split)
    texts = [document_text(items()[row], "masked" in flags) for row in chosen]
    answers = [
        [twin for row in _same_document()[items()[place].id] for twin in twins(style)[row]]
        for place in chosen
    ]
    return Benchmark(
        name="emoji-documents",
        variant="-".join((style, *flags)),
        split=split,
        queries=[
            {"document": text, "text": text, "id": items()[row].id}
            for row, text in zip(chosen, texts, strict=True)
        ],
        positives=_places(answers, seen),
        **_gallery_of(style, seen),
    )


# ---- parts ----


def _read(name):
    """Bytes of one of the five files, checked."""
    path = FOLDER / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; it belongs to cir_jax, so install it again")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256[name]:
        raise ValueError(
            f"{path} has been changed or cut: its sha256 is {found}, expected {SHA256[name]}; "
            f"install cir_jax again, or restore the file with git"
        )
    return data


def _json(name):
    return json.loads(gzip.decompress(_read(name)))


def _check(what, value, known):
    if value not in known:
        raise ValueError(f"{what} is {value!r}; expected one of {', '.join(known)}")
    return value


def _styles(style):
    return STYLES if style == "both" else (_check("style", style, (*STYLES, "both")),)


def _variant(variant, known, both=False, **wanted):
    """(style, flags) of a variant such as `noto-full`; `wanted` names flags that are on besides."""
    style, *flags = variant.split("-")
    styles = (*STYLES, "both") if both else STYLES
    if style not in styles or not set(flags) <= set(known):
        extra = f", then any of {', '.join(f'-{flag}' for flag in known)}" if known else ""
        raise ValueError(f"variant is {variant!r}; expected {' or '.join(styles)}{extra}")
    return style, [flag for flag in known if flag in flags or wanted.get(flag)]


@functools.cache
def _of_split(split):
    _check("split", split, SPLITS)
    return tuple(row for row, item in enumerate(items()) if item.split == split)


def _documented(split, unshared=False):
    """Rows of a split that have a document."""
    found = [row for row in _of_split(split) if items()[row].id in documents()]
    if not unshared:
        return found
    shared = lambda row: any(
        items()[other].split != split for other in _same_document()[items()[row].id]
    )
    return [row for row in found if not shared(row)]


@functools.cache
def _names_elsewhere(split):
    """What the emoji of the other splits are called, in full or without their attributes, in lower case."""
    others = [item for item in items() if item.split != split]
    calls = lambda item: (item.name, rules.head(item.name), item.concept.replace("*", "").strip())
    return {call.lower() for item in others for call in calls(item)}


def _alone(row):
    """True if an emoji looks like none of another split, in any style."""
    return groups()[row] not in _shared_looks()


@functools.cache
def _shared_looks():
    """Labels of `groups` that emoji of more than one split have."""
    splits = defaultdict(set)
    for item, label in zip(items(), groups(), strict=True):
        splits[label].add(item.split)
    return {label for label, found in splits.items() if len(found) > 1}


def _own_sentences(item):
    """Sentences of an emoji's document that define nothing of which another split has a document."""
    if item.id not in documents():
        return []
    sentences = documents()[item.id]["text"].split(". ")
    return [s for s in sentences if _subject(s) not in _subjects_elsewhere(item.split)]


def _subject(sentence):
    """What a sentence defines: "bear" of "bear (also …): …", "Has part bear: …"."""
    return sentence.partition(":")[0].partition(" (also ")[0].removeprefix("Has part ").lower()


@functools.cache
def _subjects_elsewhere(split):
    """What the documents of the other splits are about."""
    return {
        _subject(documents()[item.id]["text"])
        for item in items()
        if item.split != split and item.id in documents()
    }


@functools.cache
def _same_document():
    """Rows that have the same document, by emoji id."""
    by_text = defaultdict(list)
    for key, document in documents().items():
        by_text[document["text"]].append(rows()[key])
    return {key: by_text[document["text"]] for key, document in documents().items()}


def _edits(split, concept_disjoint=False, pair_disjoint=False):
    _check("split", split, SPLITS)
    if not concept_disjoint:
        return triplets()[split]
    return [
        edit
        for edit in _within(all_triplets(), split)
        if not pair_disjoint or rules.pair_split(*edit[:3]) == split
    ]


def _within(edits, split):
    """The edits between two emoji whose concepts belong to a split."""
    inside = {items()[row].id for row in _of_split(split)}
    return [edit for edit in edits if {edit.reference, edit.target} <= inside]


@functools.cache
def _keyed(rule):
    return rules.groups(rule, items())


def _alternatives(rule, reference):
    """Rows that share the rule's key with a reference, without the reference."""
    key = rules.RULES[rule].key(items()[rows()[reference]])
    return [rows()[item.id] for item in _keyed(rule)[key] if item.id != reference]


def _places(answers, seen):
    """Positives in a gallery that shows the rows `seen`, from answers as rows of all emoji."""
    place = {row: k for k, row in enumerate(seen)}
    return [{place[row]: 1.0 for row in found if row in place} for found in answers]


def _gallery_of(style, seen):
    return {"gallery": gallery(style, seen), "ids": [items()[row].id for row in seen]}


def _names(document):
    """(text, names): the opening "lemma (also a, b): " cut to the lemma, and the names in it."""
    opening = re.match(r"(.+?) \(also (.+?)\): ", document["text"])
    if not opening or opening[1] != document["lemma"]:
        return document["text"], []
    return document["lemma"] + document["text"][opening.end() - 2 :], opening[2].split(", ")
