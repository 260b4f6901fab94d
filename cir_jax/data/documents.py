"""Documents as queries: phrases that each ask once (stage 1), a summary that asks once (stage 2).

CFIR (arXiv 2402.15276) published neither its entity extractor nor its data; what stands here is
ours. The built-in extractor is for English and needs no download: capitalised spans, key phrases by
RAKE (Rose et al. 2010), and a summary of the first or of the most central sentences (TextRank,
Mihalcea & Tarau 2004). A spaCy model or a file of one's own can take its place.
"""

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

# The parts of a raw query that make its text; their order, and the space between them, are CFIR's.
FIELDS = ("title", "section", "document")
FORMS = ("entities", "joined", "summary", "fields")

Form = Literal["entities", "joined", "summary", "fields"]


class Extract(NamedTuple):
    """What is asked about a document."""

    entities: tuple[str, ...]
    summary: str


@dataclass(frozen=True)
class DocumentSpec:
    """How a document becomes queries.

    Attributes:
      source: "builtin"; "spacy" (an installed English model) or "spacy:MODEL"; a file of extracts,
        `….jsonl`; "auto" is "spacy" where a model is installed and otherwise "builtin", so numbers
        that others are to repeat need one of those.
      entities: most entities of a document.
      summary: "lead" takes the first sentences, "textrank" the most central ones.
      words: most words of a summary.
      letters_spaced: put spaces between the letters of every entity. original: GLA-IR/CFIR
        `beit3_tools`, whose tokenizer joins a string as if it were a list; needed only to repeat
        its runs.
    """

    source: str = "auto"
    entities: int = 16
    summary: Literal["lead", "textrank"] = "lead"
    words: int = 48
    letters_spaced: bool = False

    def __post_init__(self):
        if self.summary not in ("lead", "textrank"):
            raise ValueError(f"summary is {self.summary!r}; expected 'lead' or 'textrank'")
        for name in ("entities", "words"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")


# For numbers that others are to repeat: the same whatever language models are installed.
BUILTIN = DocumentSpec(source="builtin")


def document_query(raw: Mapping, form: Form, spec: DocumentSpec | None = None) -> dict:
    """The text, or texts, with which a document asks.

    Args:
      raw: a query with `document` and perhaps `title`, `section` and (for a file of extracts) `id`.
      form: "entities" gives `{"texts": [...]}`, a text for each entity; "joined" the same as one
        text, `{"text": ...}`; "summary" the summary; "fields" everything the document says.
      spec: None for the default.

    Raises:
      ValueError: a document without text, an unknown form or source, or an id that the file lacks.
    """
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; expected one of {', '.join(FORMS)}")
    if form == "fields":
        return {"text": document_text(raw)}
    spec = spec or DocumentSpec()
    found = extract(raw, spec)
    if form == "summary":
        return {"text": found.summary}
    texts = [" ".join(text) if spec.letters_spaced else text for text in found.entities]
    return {"texts": texts} if form == "entities" else {"text": " ".join(texts)}


def extract(raw: Mapping, spec: DocumentSpec) -> Extract:
    """Entities and summary of a raw query.

    Neither is empty: the summary stands in for entities, the first words for a summary.
    """
    text = document_text(raw)
    entities, summary = _source(spec)(raw)
    summary = " ".join(summary.split()) or " ".join(text.split()[: spec.words])
    return Extract(tuple(distinct(entities)[: spec.entities]) or (summary,), summary)


def document_text(raw: Mapping) -> str:
    """The fields of a raw query, joined by single spaces."""
    text = " ".join(" ".join(str(raw.get(name) or "") for name in FIELDS).split())
    if not text:
        raise ValueError(
            f"a document needs text in {', '.join(FIELDS)}; this query has {sorted(raw)}"
        )
    return text


def distinct(phrases: Iterable[str]) -> list[str]:
    """Phrases in their order, without empty ones and without repetitions, capitals or not."""
    found = {}
    for phrase in phrases:
        phrase = " ".join(phrase.split())
        found.setdefault(phrase.casefold(), phrase)
    found.pop("", None)
    return list(found.values())


@functools.lru_cache(maxsize=8)
def _source(spec: DocumentSpec) -> Callable[[Mapping], Extract]:
    """The function from a raw query to its extract that a spec names."""
    if spec.source.endswith(".jsonl"):
        return functools.partial(_from_table, read_extracts(spec.source), spec.source)
    kind, _, model = spec.source.partition(":")
    if kind == "auto":
        kind = "spacy" if spacy_models() else "builtin"
    if kind not in ("spacy", "builtin") or (model and kind != "spacy"):
        raise ValueError(
            f"source of extracts is {spec.source!r}; expected 'auto', 'builtin', 'spacy', "
            "'spacy:MODEL' or a file that ends in .jsonl"
        )
    find = (
        functools.partial(spacy_entities, load_spacy(model))
        if kind == "spacy"
        else builtin_entities
    )
    return functools.partial(_found, find, spec)


def _found(find, spec, raw):
    # Points between the fields, so that no phrase reaches from one into the next.
    fields = [str(raw[name]) for name in FIELDS if raw.get(name)]
    entities = (str(raw.get("title") or ""), *find(". ".join(fields)))
    return Extract(entities, summarize(document_text(raw), spec.summary, spec.words))


# ---- extracts from a file ----


def read_extracts(path: str | Path) -> dict[str, Extract]:
    """Extracts by document id, from JSON lines `{"id": …, "entities": […], "summary": …}`.

    One of `entities` and `summary` may be missing; empty lines are skipped.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a line that is not such an object, or an id that occurs twice.
    """
    found = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            name, value = _parsed(line)
            if name in found:
                raise ValueError(f"id {name!r} occurs twice")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        found[name] = value
    return found


def _parsed(line):
    value = json.loads(line)
    if not isinstance(value, dict) or "id" not in value or not value.keys() & set(Extract._fields):
        raise ValueError('expected an object with "id" and with "entities", "summary" or both')
    entities, summary = value.get("entities", []), value.get("summary", "")
    texts = [summary, *entities] if isinstance(entities, list) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError('"entities" must be a list of strings and "summary" a string')
    return str(value["id"]), Extract(tuple(entities), summary)


def _from_table(table, path, raw):
    name = str(raw.get("id", ""))
    if name not in table:
        raise ValueError(
            f"{path} has no line for document id {name!r} (it has {len(table)} lines); "
            "add one, or choose another source"
        )
    return table[name]


# ---- the built-in extractor ----

_word_set = lambda text: frozenset(text.split())

# Stop words of the keyword library that name things one can see.
_PICTURED = _word_set(
    "bill computer face faces fire group groups home keys man member members men mill mine mug "
    "page pages ring room rooms shell"
)
# What a sentence may begin with in capitals without naming anything.
_OPENERS = _word_set(
    "a about after all also although an and another any are as at be because before between both "
    "but by can do during each even every few for from had has have he her here his how however i "
    "if in into is it its many more most much my no not of often on once one only or other our "
    "over she since so some such than that the their then there these they this those through to "
    "two under until up was we were what when where which while who why with you your"
)
_TITLES = "Dr|Gen|Jr|Lt|Mr|Mrs|Ms|Prof|Rev|Sr|St"
_ABBREVIATIONS = _word_set(f"ca cf e.g etc fig i.e vs {_TITLES.replace('|', ' ').casefold()}")
_UPPER = "".join(filter(str.isupper, map(chr, range(0x530))))  # Latin, Greek, Cyrillic
_NAME = rf"(?:(?:{_TITLES})\.|(?:[{_UPPER}]\.)+|[{_UPPER}][\w'’&-]*(?:\.\w+)*)"
_SPAN = re.compile(rf"\b{_NAME}(?:\s+(?:(?:of|de|la|van|von|&)\s+)?(?:{_NAME}|\d+\b))*")
_EDGES = " .,;:!?\"'’“”()[]{}<>|*/-–—"


def builtin_entities(text: str) -> list[str]:
    """Capitalised spans in their order and key phrases, the best first, by turns."""
    spans = capitalised(text)
    within = " | ".join(["", *(span.casefold() for span in spans), ""])
    phrases = [phrase for phrase in key_phrases(text) if f" {phrase} " not in within]
    turns = itertools.chain.from_iterable(itertools.zip_longest(spans, phrases, fillvalue=""))
    return distinct(turns)


def capitalised(text: str) -> list[str]:
    """Spans of capitalised words in their order, as "Municipal Art Society of New York".

    One word at the start of a sentence counts only if it also stands somewhere else with a capital.
    """
    found = []
    for sentence in sentences(text):
        for match in _SPAN.finditer(sentence):
            words = match.group().split()
            named = list(itertools.dropwhile(lambda word: word.casefold() in _OPENERS, words))
            span = re.sub(r"['’]s$", "", " ".join(named).strip(_EDGES))
            opens = len(words) == 1 and not sentence[: match.start()].strip(_EDGES)
            if len(span) > 1:
                found.append((span, opens))
    certain = {word for span, opens in found if not opens for word in span.split()}
    return distinct(span for span, opens in found if not opens or span in certain)


def key_phrases(text: str) -> list[str]:
    """Lower-case phrases between stop words, the best by RAKE's score first; no bare numbers."""
    from RAKEkeywords import Rake

    phrases = Rake.generate_candidate_keywords(Rake.split_sentences(text), _between()[1])
    scores = Rake.generate_candidate_keyword_scores(phrases, Rake.calculate_word_scores(phrases))
    best_first = sorted(scores, key=lambda phrase: -scores[phrase])
    stripped = distinct(phrase.strip(_EDGES) for phrase in best_first)
    return [phrase for phrase in stripped if re.search(r"[^\W\d_]{2}", phrase)]


@functools.cache
def _between():
    """The stop words, and the pattern that finds them."""
    from RAKEkeywords import Rake
    from RAKEkeywords.stopwrds import stopwords

    words = stopwords("en") - _PICTURED
    return words, Rake.build_stop_word_regex(sorted(map(re.escape, words)))


def sentences(text: str) -> list[str]:
    """The sentences of a text; points of abbreviations and initials end none."""
    found, start = [], 0
    for end in re.finditer(r"[.!?…]+[\"'”’)\]]*\s+", text):
        last = (text[start : end.start()].split() or [""])[-1].lstrip(_EDGES)
        short = last.casefold() in _ABBREVIATIONS or re.fullmatch(rf"(?:\w\.)*[{_UPPER}]", last)
        if not (short and end.group().strip() == "."):
            found.append(text[start : end.end()].strip())
            start = end.end()
    return [sentence for sentence in (*found, text[start:].strip()) if sentence]


def summarize(text: str, how: Literal["lead", "textrank"] = "lead", words: int = 48) -> str:
    """The first or the most central sentences of a text, in their order.

    They have at most `words` words together; a single sentence that is longer is cut.
    """
    parts = sentences(text)
    if not parts:
        return ""
    lengths = [len(part.split()) for part in parts]
    best_first = range(len(parts)) if how == "lead" else central(parts)
    totals = np.cumsum([lengths[row] for row in best_first])
    chosen = sorted(best_first[: max(1, int((totals <= words).sum()))])
    return " ".join(" ".join(parts[row] for row in chosen).split()[:words])


def central(parts: Sequence[str], damping: float = 0.85, rounds: int = 50) -> list[int]:
    """Rows of sentences by TextRank, the most central first; ties by lower row."""
    words = [set(re.findall(r"\w+", part.casefold())) - _between()[0] for part in parts]
    vocabulary = sorted(set().union(*words))
    holds = np.array([[word in own for word in vocabulary] for own in words], float)
    sizes = np.log1p(holds.sum(axis=1))
    alike = holds @ holds.T / np.maximum(sizes[:, None] + sizes, 1e-9)
    np.fill_diagonal(alike, 0)
    flow = alike / np.maximum(alike.sum(axis=1, keepdims=True), 1e-9)
    rank = np.ones(len(parts))
    for _ in range(rounds):
        rank = 1 - damping + damping * rank @ flow
    return np.argsort(-rank.round(9), kind="stable").tolist()


# ---- spaCy ----


def spacy_models() -> list[str]:
    """Installed English models of spaCy, the one to take first; empty without spaCy."""
    try:
        from spacy.util import get_installed_models
    except ImportError:
        return []
    sizes = ("lg", "md", "sm")  # others, such as "trf", need more than spaCy
    order = lambda name: (*(not name.endswith(size) for size in sizes), name)
    return sorted((name for name in get_installed_models() if name.startswith("en_")), key=order)


@functools.cache
def load_spacy(model: str = "") -> Callable:
    """A spaCy model by name, or the first of `spacy_models`."""
    models = spacy_models()
    if not model and not models:
        raise ValueError(
            "no English model of spaCy is installed; run `pip install spacy` and "
            "`python -m spacy download en_core_web_sm`, or take the source 'builtin'"
        )
    try:
        import spacy

        return spacy.load(model or models[0])
    except (ImportError, OSError) as error:
        raise ValueError(
            f"spaCy cannot load {model!r} ({error}); "
            f"installed are {', '.join(models) or 'no models'}"
        ) from None


def spacy_entities(model: Callable, text: str) -> list[str]:
    """Named entities and noun phrases in their order, noun phrases without leading stop words."""
    document = model(text)
    spans = [(span.start, span.text) for span in document.ents]
    chunks = document.noun_chunks if document.has_annotation("DEP") else ()
    for chunk in chunks:
        if (chunk.start, chunk.text) not in spans:
            words = itertools.dropwhile(lambda token: token.is_stop, chunk)
            spans.append((chunk.start, "".join(token.text_with_ws for token in words)))
    return distinct(span for _, span in sorted(spans, key=lambda span: span[0]))
