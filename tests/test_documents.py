"""Documents as queries: the built-in extractor, files of extracts, spaCy, forms of a query."""

import itertools
import json
import sys
import types

import pytest

from cir_jax.data import documents
from cir_jax.data.documents import (
    DocumentSpec,
    Extract,
    builtin_entities,
    capitalised,
    central,
    document_query,
    document_text,
    extract,
    key_phrases,
    load_spacy,
    read_extracts,
    sentences,
    spacy_models,
    summarize,
)

HARBOUR = (
    "The Old Lighthouse stands on a rocky shore near Porto Alegre. "
    "Mr. John L. Anderson built the lighthouse in 1928. "
    "It has a red lantern room, white walls and a spiral staircase. "
    "Fishing boats wait in the harbour. "
    "The lantern room holds a lamp that fishing boats see from the harbour!"
)
BUILTIN = DocumentSpec(source="builtin")


@pytest.fixture(autouse=True)
def fresh_caches():
    documents._source.cache_clear()
    load_spacy.cache_clear()


# ---- sentences and spans ----


def test_sentences_end_at_points_but_not_at_those_of_abbreviations():
    assert [len(s.split()) for s in sentences(HARBOUR)] == [11, 9, 12, 6, 13]
    assert sentences('He said "no." She left! ca. 1928 (cf. U.S. law).  ') == [
        'He said "no."',
        "She left!",
        "ca. 1928 (cf. U.S. law).",
    ]
    assert sentences("no point at the end") == ["no point at the end"]
    assert sentences("  ") == []


def test_capitalised_spans():
    assert capitalised(HARBOUR) == ["Old Lighthouse", "Porto Alegre", "Mr. John L. Anderson"]
    text = (
        "In Élodie's town the Municipal Art Society of New York met on September 11. "
        "Žižek saw the EC-135."
    )
    assert capitalised(text) == [
        "Élodie",
        "Municipal Art Society of New York",
        "September 11",
        "EC-135",
    ]


def test_one_word_that_opens_a_sentence_needs_a_second_witness():
    assert capitalised("Boats wait. We saw them.") == []
    assert capitalised("Paris is large. We saw Paris.") == ["Paris"]


def test_key_phrases_are_ranked_and_hold_words():
    phrases = key_phrases(HARBOUR + " In 1961, 1962 and 1963 nothing happened.")
    assert phrases[0] == "red lantern room"
    assert {"spiral staircase", "white walls", "rocky shore", "harbour"} <= set(phrases)
    assert not any(phrase.isdigit() for phrase in phrases)
    assert len(phrases) == len(set(phrases))


def test_stop_words_of_the_library_that_can_be_seen_stay():
    assert key_phrases("a mug, the keys, some fire and a shell in the room") == [
        "mug",
        "keys",
        "fire",
        "shell",
        "room",
    ]


def test_spans_and_phrases_take_turns_and_phrases_within_spans_are_left_out():
    found = builtin_entities(HARBOUR)
    assert found[:4] == ["Old Lighthouse", "red lantern room", "Porto Alegre", found[3]]
    assert "porto alegre" not in found and "anderson built" in found
    assert len({phrase.casefold() for phrase in found}) == len(found)


# ---- summaries ----


def test_lead_summary_takes_whole_sentences_within_its_words():
    assert summarize(HARBOUR, words=20) == " ".join(sentences(HARBOUR)[:2])
    assert summarize(HARBOUR, words=5) == "The Old Lighthouse stands on"
    assert summarize("") == ""


def test_textrank_prefers_sentences_that_share_words():
    alone = "Bread is baked in an oven. "
    assert central(sentences(alone + HARBOUR))[-1] == 0
    chosen = summarize(alone + HARBOUR, "textrank", words=26)
    assert "Bread" not in chosen
    assert all(sentence in HARBOUR for sentence in sentences(chosen))


@pytest.mark.parametrize(
    "text", ["one sentence", "a b. the of. it is.", "same words. same words. "]
)
def test_textrank_survives_texts_without_structure(text):
    parts = sentences(text)
    assert central(parts) == list(range(len(parts)))


# ---- forms of a query ----


def test_forms_of_a_query():
    raw = {"title": "Lighthouse", "document": HARBOUR, "id": "7", "image": None}
    entities = document_query(raw, "entities", BUILTIN)
    assert entities.keys() == {"texts"}
    assert entities["texts"][:3] == ["Lighthouse", "red lantern room", "Old Lighthouse"]
    assert 3 < len(entities["texts"]) <= 16
    assert document_query(raw, "joined", BUILTIN) == {"text": " ".join(entities["texts"])}
    assert document_query(raw, "fields", BUILTIN) == {"text": f"Lighthouse {HARBOUR}"}
    summary = document_query(raw, "summary", BUILTIN)["text"]
    assert summary.startswith("Lighthouse The Old Lighthouse") and len(summary.split()) <= 48


def test_limits_of_a_spec():
    raw = {"document": HARBOUR}
    few = extract(raw, DocumentSpec("builtin", entities=3, words=4))
    assert few.entities == ("Old Lighthouse", "red lantern room", "Porto Alegre")
    assert few.summary == "The Old Lighthouse stands"


def test_phrases_do_not_reach_over_fields():
    raw = {
        "title": "Stone Bridge",
        "section": "Old Town",
        "document": "Rivers and Stone Bridge arches.",
    }
    assert "Stone Bridge Old Town" not in extract(raw, BUILTIN).entities
    assert document_text(raw) == "Stone Bridge Old Town Rivers and Stone Bridge arches."


def test_without_entities_the_summary_stands_in():
    raw = {"document": "It is what it is."}
    assert extract(raw, BUILTIN) == Extract(("It is what it is.",), "It is what it is.")


@pytest.mark.parametrize(
    "spaced, expected", [(False, "New York City"), (True, "N e w   Y o r k   C i t y")]
)
def test_letters_spaced_repeats_the_original(tmp_path, spaced, expected):
    path = tmp_path / "extracts.jsonl"
    path.write_text('{"id": "a", "entities": ["New York City"]}')
    spec = DocumentSpec(str(path), letters_spaced=spaced)
    assert document_query({"id": "a", "document": "x"}, "entities", spec) == {"texts": [expected]}


def test_template_of_fields_gives_the_ids_of_the_original(shared):
    """cfir.md 3.5, with BEiT-3's own vocabulary."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(shared / "data/beit3/beit3.spm"))
    raw = {
        "title": "Boeing EC-135",
        "section": "Looking Glass",
        "document": "Operations began in 1961 with crews on alert around the clock.",
    }
    ids = [3 if j == 0 else j + 1 for j in pieces.encode(document_query(raw, "fields")["text"])]
    expected = "7238 12937 22 34326 5534 9916 11589 500 12 13268 24 6186 20 4934 162 4 3904 5"
    assert ids == [int(number) for number in expected.split()]


def test_masked_words_of_the_built_in_documents_stay_masked():
    from cir_jax.data.emoji import MASK, emoji_documents

    for raw in emoji_documents("noto", "val", masked=True):
        found = extract({"document": raw["document"]}, BUILTIN)
        assert all(MASK not in entity.split() for entity in found.entities)
        said = raw["document"].casefold()
        assert all(word in said for entity in found.entities for word in entity.casefold().split())


# ---- files of extracts ----


def test_extracts_from_a_file(tmp_path):
    path = tmp_path / "extracts.jsonl"
    lines = [
        {
            "id": 7,
            "entities": ["Lighthouse", "lighthouse", " red   lamp "],
            "summary": "A lighthouse.",
        },
        {"id": "b", "summary": "Boats."},
        {"id": "c", "entities": ["Boat"]},
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)))
    spec = DocumentSpec(str(path), words=3)
    raw = lambda name: {"id": name, "document": "What the document says.", "title": "Not Used"}
    assert extract(raw("7"), spec) == Extract(("Lighthouse", "red lamp"), "A lighthouse.")
    assert extract(raw("b"), spec) == Extract(("Boats.",), "Boats.")
    assert extract(raw("c"), spec) == Extract(("Boat",), "Not Used What")
    with pytest.raises(ValueError, match=r"no line for document id 'd' \(it has 3 lines\)"):
        extract(raw("d"), spec)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2: "),
        ('{"entities": []}', 'line 2: expected an object with "id"'),
        ('{"id": "b"}', 'line 2: expected an object with "id"'),
        ('{"id": "b", "entities": "x"}', "must be a list of strings"),
        ('{"id": "b", "summary": 3}', "must be a list of strings"),
        ('{"id": "a", "summary": "again"}', "id 'a' occurs twice"),
    ],
)
def test_faults_of_a_file_name_the_line(tmp_path, line, message):
    path = tmp_path / "extracts.jsonl"
    path.write_text(f'{{"id": "a", "summary": "first"}}\n{line}\n')
    with pytest.raises(ValueError, match=message) as error:
        read_extracts(path)
    assert f"{path}, line 2" in str(error.value)


def test_faults_of_a_query_and_of_a_spec_are_named():
    with pytest.raises(
        ValueError, match=r"needs text in title, section, document; .*\['document', 'id'\]"
    ):
        document_query({"document": "  ", "id": "a"}, "summary", BUILTIN)
    with pytest.raises(ValueError, match="form is 'title'; expected one of entities, joined"):
        document_query({"document": HARBOUR}, "title")
    with pytest.raises(ValueError, match="source of extracts is 'yake'"):
        extract({"document": HARBOUR}, DocumentSpec("yake"))
    with pytest.raises(ValueError, match="source of extracts is 'builtin:x'"):
        extract({"document": HARBOUR}, DocumentSpec("builtin:x"))
    with pytest.raises(ValueError, match="summary is 'bart'"):
        DocumentSpec(summary="bart")
    with pytest.raises(ValueError, match="entities is 0"):
        DocumentSpec(entities=0)
    with pytest.raises(FileNotFoundError):
        extract({"document": HARBOUR}, DocumentSpec("missing.jsonl"))


# ---- spaCy, by a stand-in that behaves as version 3.8 does ----


class Token(types.SimpleNamespace):
    @property
    def text_with_ws(self):
        return self.text + " "


class Span(list):
    def __init__(self, start, words):
        super().__init__(
            Token(text=word, is_stop=word in ("the", "The", "a")) for word in words.split()
        )
        self.start, self.text = start, words


class Parsed:
    """What the stand-in model returns for any text."""

    ents = (Span(6, "New York"), Span(0, "The Who"))
    noun_chunks = (
        Span(0, "The Who"),
        Span(3, "the old bridge"),
        Span(6, "New York"),
        Span(9, "the"),
    )

    def __init__(self, parsed):
        self.parsed = parsed

    def has_annotation(self, name):
        return self.parsed and name == "DEP"


@pytest.fixture
def fake_spacy(monkeypatch):
    """A spaCy with some models; `loaded` lists what was asked for."""
    spacy, util, loaded = types.ModuleType("spacy"), types.ModuleType("spacy.util"), []
    models = ["de_core_news_sm", "en_core_web_sm", "en_core_web_trf", "en_core_web_md"]
    util.get_installed_models = lambda: models

    def load(name):
        loaded.append(name)
        if name not in models:
            raise OSError(f"[E050] Can't find model '{name}'.")
        return lambda text: Parsed(parsed=name != "en_core_web_trf")

    spacy.util, spacy.load = util, load
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    monkeypatch.setitem(sys.modules, "spacy.util", util)
    return types.SimpleNamespace(loaded=loaded, models=models)


def test_an_installed_model_is_picked_up(fake_spacy):
    assert spacy_models() == ["en_core_web_md", "en_core_web_sm", "en_core_web_trf"]
    found = extract({"document": HARBOUR, "title": "Lighthouse"}, DocumentSpec("auto"))
    assert fake_spacy.loaded == ["en_core_web_md"]
    assert found.entities == ("Lighthouse", "The Who", "old bridge", "New York")
    assert found.summary == extract({"document": HARBOUR, "title": "Lighthouse"}, BUILTIN).summary


def test_a_model_by_name_is_loaded_once(fake_spacy):
    specs = (DocumentSpec("spacy:en_core_web_trf", entities=n) for n in (8, 9))
    for spec, _ in itertools.product(specs, range(2)):
        assert extract({"document": HARBOUR}, spec).entities == ("The Who", "New York")
    assert fake_spacy.loaded == ["en_core_web_trf"]


def test_a_missing_model_is_named_with_those_there_are(fake_spacy):
    with pytest.raises(
        ValueError, match=r"cannot load 'en_x'.*installed are en_core_web_md, en_core_web_sm"
    ):
        extract({"document": HARBOUR}, DocumentSpec("spacy:en_x"))
    fake_spacy.models[:] = ["de_core_news_sm"]
    with pytest.raises(ValueError, match="no English model of spaCy is installed"):
        extract({"document": HARBOUR}, DocumentSpec("spacy"))
    documents._source.cache_clear()
    assert extract({"document": HARBOUR}, DocumentSpec("auto")) == extract(
        {"document": HARBOUR}, BUILTIN
    )


def test_without_spacy_the_built_in_extractor_answers(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    monkeypatch.setitem(sys.modules, "spacy.util", None)
    assert spacy_models() == []
    raw = {"document": HARBOUR}
    assert extract(raw, DocumentSpec("auto")) == extract(raw, BUILTIN)
    with pytest.raises(ValueError, match="pip install spacy"):
        extract(raw, DocumentSpec("spacy"))
    with pytest.raises(ValueError, match="cannot load 'en_x'"):
        extract(raw, DocumentSpec("spacy:en_x"))


def test_nothing_heavy_is_imported_before_a_document_is_read():
    import subprocess

    heavy = "{'jax', 'spacy', 'RAKEkeywords'}"
    code = f"import sys, cir_jax.data.documents; print({heavy} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "set()\n"
