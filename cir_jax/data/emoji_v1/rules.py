"""How emoji are described, split and paired: pure functions over their English names.

The builder and the loader share this file, so the packaged lists can be rederived and checked.
Everything that looks random is a hash of names or ids, hence the same on every machine.
"""

import hashlib
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

CAPS = {"train": 1200, "val": 150, "test": 150}  # triplets of one rule in one split, at most

_HAIR = ("red hair", "curly hair", "white hair", "bald", "blond hair", "beard")
_RIGHT = "facing right"
_TONE = " skin tone"
_GENDER_WORDS = {"man": "m", "men": "m", "woman": "f", "women": "f", "person": "p", "people": "p"}
# Names whose gender is not one of the words above: (gender, concept).
_SPECIAL = {
    "mermaid": ("f", "mer*"),
    "merman": ("m", "mer*"),
    "merperson": ("p", "mer*"),
    "prince": ("m", "royal*"),
    "princess": ("f", "royal*"),
    "person with crown": ("p", "royal*"),
    "Santa Claus": ("m", "claus*"),
    "Mrs. Claus": ("f", "claus*"),
    "Mx Claus": ("p", "claus*"),
    "boy": ("m", "*child"),
    "girl": ("f", "*child"),
    "child": ("p", "*child"),
    "old man": ("m", "*old"),
    "old woman": ("f", "*old"),
    "older person": ("p", "*old"),
}
_ROLE_GROUPS = {
    "person-role",
    "person-sport",
    "person-activity",
    "person-gesture",
    "person-fantasy",
}
_AGES = {"*child": "a child", "*": "an adult", "*old": "an old person"}
_WEAK_WORDS = {"face", "button", "symbol", "of", "with"}


def _toned(name, *tones):
    return {f"{name}: {tone}{_TONE}" if tone else name for tone in tones}


# Sets of names of which any two differ by less than 0.5 of 255 in one of the two drawing styles,
# before the sheets are quantised. The builder measures this and checks the table.
_LOOKALIKES = (
    _toned("snowboarder", "", "light", "medium", "dark"),
    _toned("person in bed", "", "light", "medium"),
    _toned("person in bed", "light", "medium", "dark"),
    _toned("man supervillain", "", "light"),
    *(
        _toned("man frowning", tone) | _toned("man pouting", tone)
        for tone in ("", "light", "medium", "dark")
    ),
)


class Item(NamedTuple):
    """One emoji. `concept` is its name without tone, hair and direction, gender word starred."""

    id: str
    name: str
    keywords: tuple[str, ...]
    category: str
    subcategory: str
    concept: str
    gender: str | None  # "m", "f", "p" (neutral) or None
    tones: tuple[str, ...]
    hair: str | None
    right: bool
    split: str


class Triplet(NamedTuple):
    """An edit: the reference picture, changed as the text says, is the target picture."""

    rule: str
    reference: str
    target: str
    text: str


class Traits(NamedTuple):
    """What a name tells about one emoji, before its neighbours are looked at."""

    concept: str
    gender: str | None = None
    tones: tuple[str, ...] = ()
    hair: str | None = None
    right: bool = False


class Rule(NamedTuple):
    """One kind of edit: members with the same key make pairs where `text` finds words for them."""

    member: Callable[[Item], bool]
    key: Callable[[Item], Hashable]
    text: Callable[[Item, Item], str | None]


def head(name: str) -> str:
    """`name` up to its first colon."""
    return name.partition(": ")[0]


def traits(name: str, category: str) -> Traits:
    """Reads the attributes out of one English name."""
    if category == "Flags":
        return Traits(name)
    if category != "People & Body":
        return Traits(head(name))
    parts = _suffixes(name)
    gender, concept = _SPECIAL.get(head(name)) or _starred(head(name))
    tones = tuple(part.removesuffix(_TONE) for part in parts if part.endswith(_TONE))
    hair = next((part for part in parts if part in _HAIR), None)
    return Traits(concept, gender, tones, hair, _RIGHT in parts)


def describe(records: Sequence[tuple[str, str, Sequence[str], str, str]]) -> list[Item]:
    """Items of all (id, name, keywords, category, subcategory), split by concept.

    Concepts are compared with one another, so the whole list belongs in one call.
    """
    read = [traits(name, category) for _, name, _, category, _ in records]
    gendered = {each.concept for each in read if each.gender in ("m", "f")}
    read = [
        _paired(each, gendered) if record[3] == "People & Body" else each
        for record, each in zip(records, read, strict=True)
    ]
    splits = concept_splits((row[3], each.concept) for row, each in zip(records, read, strict=True))
    return [
        Item(row[0], row[1], tuple(row[2]), *row[3:], *each, splits[row[3], each.concept])
        for row, each in zip(records, read, strict=True)
    ]


def concept_splits(concepts: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """The split of each (category, concept): per category 15 % test, then 10 % val, by hash."""
    by_category = defaultdict(set)
    for category, concept in concepts:
        by_category[category].add(concept)
    splits = {}
    for category, names in by_category.items():
        order = sorted(names, key=lambda name: _digest(f"cir_jax/emoji/v1/{category}/{name}"))
        test, val = round(0.15 * len(order)), round(0.10 * len(order))
        for place, name in enumerate(order):
            split = "test" if place < test else "val" if place < test + val else "train"
            splits[category, name] = split
    return splits


def pair_split(rule: str, first: str, second: str) -> str:
    """The split of an unordered pair of ids under a rule: 10 % test, 10 % val."""
    low, high = sorted((first, second))
    place = _hash(f"cir_jax/emoji/v1/pair/{rule}/{low}|{high}") % 100
    return "test" if place < 10 else "val" if place < 20 else "train"


def groups(rule: str, items: Iterable[Item]) -> dict[Hashable, list[Item]]:
    """Items under each key of a rule: a reference's group is what its edits choose from."""
    found = defaultdict(list)
    for item in items:
        if RULES[rule].member(item):
            found[RULES[rule].key(item)].append(item)
    return dict(found)


def pairs(items: Sequence[Item]) -> Iterable[tuple[str, Item, Item, str]]:
    """Every (rule, reference, target, text), lookalikes included."""
    for rule in RULES:
        for group in groups(rule, items).values():
            for reference, target in itertools.permutations(group, 2):
                text = RULES[rule].text(reference, target)
                if text:
                    yield rule, reference, target, text


def triplets(items: Sequence[Item]) -> list[Triplet]:
    """Every edit between two of `items` whose pictures visibly differ."""
    return [
        Triplet(rule, reference.id, target.id, text)
        for rule, reference, target, text in pairs(items)
        if not lookalike(reference, target)
    ]


def lookalike(first: Item, second: Item) -> bool:
    """Whether two paired pictures are too similar to tell apart."""
    return any({first.name, second.name} <= names for names in _LOOKALIKES)


def capped(found: Iterable[Triplet]) -> dict[str, list[Triplet]]:
    """Triplets split by pair, at most `CAPS` of each rule; the smallest hashes stay."""
    by_rule = defaultdict(list)
    for triplet in found:
        by_rule[triplet.rule, pair_split(*triplet[:3])].append(triplet)
    splits = {split: [] for split in CAPS}
    for (_, split), group in sorted(by_rule.items()):
        group.sort(key=lambda triplet: _hash(f"x{triplet.reference}{triplet.target}"))
        splits[split] += group[: CAPS[split]]
    return splits


def word_change(before: str, after: str) -> tuple[str, str] | None:
    """(word out, word in) where two names differ in one place by one word, else None.

    One of the two may be empty. Names that share only words like "face" or "of" do not count.
    """
    old, new = _words(before), _words(after)
    left = _shared(old, new)
    right = _shared(old[left:][::-1], new[left:][::-1])
    out, into = old[left : len(old) - right], new[left : len(new) - right]
    if left + right < 1 or len(out) > 1 or len(into) > 1 or not (out or into):
        return None
    if all(word in _WEAK_WORDS for word in old if word in new):
        return None
    return "".join(out), "".join(into)


def _digest(text):
    return hashlib.sha1(text.encode()).hexdigest()


def _hash(text):
    return int(_digest(text)[:8], 16)


def _suffixes(name):
    suffix = name.partition(": ")[2]
    return [part.strip() for part in suffix.split(",")] if suffix else []


def _starred(name):
    """(gender, concept) of a name: its first gender word becomes a star."""
    words = name.split()
    place = next((k for k, word in enumerate(words) if word in _GENDER_WORDS), None)
    if place is None:
        return None, name
    gender = _GENDER_WORDS[words[place]]
    return gender, " ".join([*words[:place], "*", *words[place + 1 :]])


def _paired(each, gendered):
    """A name without a gender word is the neutral one, where man and woman versions exist."""
    if each.gender is None:
        for concept in (f"* {each.concept}", f"{each.concept} *"):
            if concept in gendered:
                return each._replace(gender="p", concept=concept)
    return each


def _words(name):
    return re.sub(r"[^\w\s’'-]", " ", name.lower()).split()


def _shared(first, second):
    """How many leading elements two lists have in common."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return sum(1 for _ in same)


def _pick(templates, reference, target):
    return templates[_hash(f"t/{reference.id}/{target.id}") % len(templates)]


def _is_person(item):
    return item.category == "People & Body"


def _is_thing(item):
    return item.category not in ("People & Body", "Flags", "Component")


def _is_role(item):
    if not _is_person(item) or item.hair or item.right or not item.gender:
        return False
    led = item.subcategory in _ROLE_GROUPS and item.concept.startswith("*")
    return led or item.concept.endswith("*")


def _others(item):
    """Parts of a person's name that are neither tone, hair nor direction: family members."""
    parts = _suffixes(item.name)
    return tuple(p for p in parts if not p.endswith(_TONE) and p not in _HAIR and p != _RIGHT)


def _but(field):
    """A key of everything that describes a person, except one field."""
    fields = [f for f in ("concept", "gender", "tones", "hair", "right") if f != field]
    return lambda item: (*(getattr(item, f) for f in fields), _others(item))


def _tone_text(reference, target):
    tone = f"{target.tones[0]} skin" if target.tones else "plain yellow skin"
    templates = ("change the skin tone to {}", "the same but with {}", "make it {}")
    return _pick(templates, reference, target).format(tone)


def _gender_text(reference, target):
    word = {"m": "man", "f": "woman", "p": "gender-neutral person"}[target.gender]
    templates = ("make it a {}", "the same, but a {}", "a {} instead")
    return _pick(templates, reference, target).format(word)


def _hair_text(reference, target):
    if not target.hair:
        return "without the beard" if reference.hair == "beard" else "with ordinary hair"
    hair = {"bald": "no hair", "beard": "a beard"}.get(target.hair, target.hair)
    templates = ("with {}", "give this person {}", "the same person with {}")
    return _pick(templates, reference, target).format(hair)


def _direction_text(reference, target):
    templates = ("facing {}", "turn to face {}", "the other way round, facing {}")
    return _pick(templates, reference, target).format("right" if target.right else "left")


def _role_text(reference, target):
    templates = ("now {}", "change it to {}", "{} instead")
    return _pick(templates, reference, target).format(head(target.name))


def _age_text(reference, target):
    return _pick(("as {}", "make it {}"), reference, target).format(_AGES[target.concept])


def _swap_text(reference, target):
    out, into = word_change(reference.name, target.name) or ("", "")
    if out and into:
        templates = ("replace {0} with {1}", "{1} instead of {0}", "the same, but {1}")
        return _pick(templates, reference, target).format(out, into)
    return None


def _add_drop_text(reference, target):
    out, into = word_change(reference.name, target.name) or ("", "")
    if into and not out:
        return _pick(("add {}", "now {}"), reference, target).format(into)
    if out and not into:
        return _pick(("no {}", "without {}"), reference, target).format(out)
    return None


RULES = {
    "skin_tone": Rule(lambda i: _is_person(i) and len(i.tones) < 2, _but("tones"), _tone_text),
    "gender": Rule(lambda i: _is_person(i) and bool(i.gender), _but("gender"), _gender_text),
    "hair": Rule(_is_person, _but("hair"), _hair_text),
    "direction": Rule(_is_person, _but("right"), _direction_text),
    "role": Rule(_is_role, lambda i: (i.subcategory, _but("concept")(i)), _role_text),
    "age": Rule(lambda i: i.concept in _AGES and not i.hair, _but("concept"), _age_text),
    "swap_word": Rule(_is_thing, lambda i: i.subcategory, _swap_text),
    "add_drop": Rule(
        lambda i: _is_thing(i) and i.subcategory != "keycap",
        lambda i: i.subcategory,
        _add_drop_text,
    ),
}
