"""Documents of the emoji data set: for concrete things, the WordNet entry that fits best."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cir_jax.data.emoji_v1.rules import Item

# Lexicographer files of WordNet whose senses are acceptable in a category, the better ones first.
_TIERS = {
    "Animals & Nature": ({5, 20}, {17, 19}),
    "Food & Drink": ({13}, {20}),
    "Travel & Places": ({6, 15, 17}, {28, 19, 14}),
    "Activities": ({6, 4}, {11, 10, 18}),
    "Objects": ({6}, {27, 13, 8, 21, 10}),
    "People & Body": ({18, 8}, {4, 6, 26}),
}
_PEOPLE = ("body-parts", "person-role", "person-fantasy")
# Names for which the best sense by score is a wrong one; found by reading the result.
_WRONG_SENSE = {
    "bank",
    "black cat",
    "blue book",
    "chestnut",
    "church",
    "dragon",
    "fire",
    "hook",
    "hot springs",
    "houses",
    "ice",
    "label",
    "mate",
    "notebook",
    "phoenix",
    "radio",
    "ribbon",
    "ring",
    "rosette",
    "television",
    "woman running",
    "wood",
}
_ADJECTIVES = (
    "red|green|blue|yellow|white|black|orange|purple|brown|pink|light_blue|grey|large|small|closed|"
    "open|oncoming|racing|grinning|smiling|crying"
)


class Sense(NamedTuple):
    """One noun synset."""

    words: tuple[str, ...]
    lexicographer: int
    gloss: str
    pointers: tuple[tuple[str, str, str], ...]  # (kind, offset, part of speech)

    @property
    def definition(self) -> str:
        """The gloss without its examples."""
        return self.gloss.split('; "')[0]

    def linked(self, kinds: Sequence[str]) -> list[str]:
        """Offsets of the nouns that pointers of these kinds lead to."""
        return [offset for kind, offset, part in self.pointers if kind in kinds and part == "n"]


class WordNet(NamedTuple):
    """The nouns of WordNet."""

    index: Mapping[str, Sequence[str]]  # word -> offsets, most frequent sense first
    senses: Mapping[str, Sense]

    def hypernyms(self, offset: str, count: int = 3) -> list[Sense]:
        """What the sense is a kind of, and so on upwards."""
        found = []
        while len(found) < count and (above := self.senses[offset].linked(("@", "@i"))):
            offset = above[0]
            found.append(self.senses[offset])
        return found


def read_wordnet(folder: Path) -> WordNet:
    """Reads `index.noun` and `data.noun`."""
    index = {}
    for line in _lines(folder / "index.noun"):
        fields = line.split()
        index[fields[0]] = fields[-int(fields[2]) :]
    senses = dict(_sense(line) for line in _lines(folder / "data.noun"))
    return WordNet(index, senses)


def documents(items: Iterable[Item], wordnet: WordNet) -> dict[str, dict[str, str]]:
    """`{id: {"synset", "lemma", "title", "text"}}` of the items that have a fitting sense."""
    found = {}
    for item in items:
        offset = _best_sense(item, wordnet) if _wanted(item) else None
        if offset:
            found[item.id] = _document(offset, wordnet)
    return found


def forms(name: str) -> Iterable[str]:
    """Spellings under which WordNet may list an emoji name, the closest first."""
    plain = name.lower().replace("’", "'").split(": ")[0]
    base = re.sub(r"^(man|woman|person|men|women|people) ", "", plain).replace(" ", "_")
    yield from (base, base.replace("-", "_"))
    for pattern in (r"_face$", r"^face_(with|in)_", r"_(button|symbol)$", r"s$"):
        yield re.sub(pattern, "", base)
    described = re.match(rf"^({_ADJECTIVES})_(.+)$", base)
    if described:
        yield described[2]


def _lines(path):
    text = path.read_text(encoding="latin1")
    return (line for line in text.splitlines() if not line.startswith("  "))  # licence lines


def _sense(line):
    """(offset, Sense) of one line of data.noun."""
    front, _, gloss = line.partition("| ")
    fields = front.split()
    count = int(fields[3], 16)
    words = tuple(word.replace("_", " ") for word in fields[4 : 4 + 2 * count : 2])
    links = fields[5 + 2 * count :]
    number = int(fields[4 + 2 * count])
    pointers = tuple(tuple(links[4 * k : 4 * k + 3]) for k in range(number))
    return fields[0], Sense(words, int(fields[1]), gloss.strip(), pointers)


def _wanted(item):
    # One version of each person: the neutral one and the man would only repeat the woman's text.
    if item.category not in _TIERS or item.name in _WRONG_SENSE or item.gender in ("m", "p"):
        return False
    return item.category != "People & Body" or item.subcategory in _PEOPLE


def _best_sense(item, wordnet):
    for form in forms(item.name):
        scored = []
        for rank, offset in enumerate(wordnet.index.get(form, ())):
            score = _score(item, form, rank, offset, wordnet)
            if score is not None:
                scored.append((score, -rank, offset))
        if scored:
            return max(scored)[2]
    return None


def _score(item, form, rank, offset, wordnet):
    """How well a sense fits; None where its lexicographer file is not acceptable."""
    sense = wordnet.senses[offset]
    tiers = _TIERS[item.category]
    tier = next((k for k, files in enumerate(tiers) if sense.lexicographer in files), None)
    if tier is None:
        return None
    first = sense.words[0]
    shared = len(_keywords(item, form) & _vocabulary(offset, wordnet))
    score = shared - 0.4 * rank - tier
    score += 0.6 * (first.lower().replace(" ", "_") == form)
    return score - 3.0 * (first[0].isupper() and not item.name[0].isupper())


def _keywords(item, form):
    words = {word for keyword in item.keywords for word in _letters(keyword)}
    return words - {form, "face", "a", "of", "the", "woman", "man", "person"} - set(form.split("_"))


def _vocabulary(offset, wordnet):
    """Words, also without a final s, of a sense, its definition and its hypernyms."""
    sense = wordnet.senses[offset]
    words = _letters(" ".join(sense.words) + " " + sense.definition)
    for above in wordnet.hypernyms(offset):
        words |= _letters(" ".join(above.words))
    return words | {word.rstrip("s") for word in words}


def _letters(text):
    return set(re.findall(r"[a-z]+", text.lower()))


def _document(offset, wordnet):
    sense = wordnet.senses[offset]
    above = wordnet.hypernyms(offset)
    also = f" (also {', '.join(sense.words[1:4])})" if len(sense.words) > 1 else ""
    body = [f"{sense.words[0]}{also}: {sense.gloss}."]
    body += [f"{each.words[0]}: {each.definition}." for each in above]
    parts = [wordnet.senses[part] for part in sense.linked(("%p",))[:3]]
    body += [f"Has part {part.words[0]}: {part.definition}." for part in parts]
    return {
        "synset": f"{offset}-n",
        "lemma": sense.words[0],
        "title": above[0].words[0] if above else "",
        "text": " ".join(body),
    }
