"""Texts to ids: the published numbers of CLIP, BERT and BEiT-3, and vocabularies of our own."""

import gzip
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cir_jax.data import text as module
from cir_jax.data.text import (
    CLIP_VOCABULARY,
    TextSpec,
    clean,
    tokenizer,
    train_bpe,
    train_sentencepiece,
    train_wordpiece,
)

CLIP = [
    ("a photo of a cat", "320 1125 539 320 2368"),
    ("A Photo of a CAT.", "320 1125 539 320 2368 269"),
    ("", ""),
    ("it's the dog's 3rd birthday — 42% off!!!", "585 568 518 1929 568 274 1973 1166 2005 275 273 260 1007 995"),
    ("café naïve Zürich", "15304 1097 35689 563 89 6522 4021"),
    ("fish &amp;amp; chips &lt;b&gt;", "2759 261 8855 283 321 285"),
    ("日本語 🙂", "39121 44353 34002 508 14860"),
    ("  multiple   spaces\tand\nnewlines  ", "6470 9006 537 1218 3418"),
    ("schÃ¶n “quoted” text…", "844 7255 333 257 27706 257 4160 959"),
    ("a photo of a ['happy', 'smiling'] looking face.", "320 1125 539 320 58 262 900 5662 568 1469 519 6 316 1312 1710 269"),
    ("a photo of $", "320 1125 539 259"),
    ("a photo of * that is red", "320 1125 539 265 682 533 736"),
    ("<|startoftext|>a dog<|endoftext|>", "49406 320 1929 49407"),
    ("purebred golden retriever sitting in front of a white background", "755 12370 736 3878 28394 4919 530 2184 539 320 1579 5994"),
    ("Boeing 737-800, seat 12A", "11857 278 274 278 268 279 271 271 267 4922 272 273 320"),
    ("itap of the Mexican hairless dog (xoloitzcuintli).", "529 2728 539 518 8186 4658 1285 1929 263 87 14628 14544 729 1828 4250 1818"),
    ("don't DON'T they'll we'Re", "847 713 847 713 889 1342 649 982"),
    ("ﬁancé", "34039"),
    ("dog " * 100, "1929 " * 75),
    ("x" * 100, "32035 " * 24 + "22819"),
    ("a photo of * with * * * but is shiny and silver", "320 1125 539 265 593 265 265 265 767 533 12190 537 3467"),
    ("a photo of * with * * ", "320 1125 539 265 593 265 265"),
    ("a photo of * , is red and is blue", "320 1125 539 265 267 533 736 537 533 1746"),
    ("**", "4441"),
]  # fmt: skip

BEIT3 = [
    ("a photo of a cat", "10 1127 9 10 2528"),
    ("Tribute in Light", "33706 12 5415"),
    ("Boeing EC-135 Looking Glass", "7238 12937 22 34326 5534 9916"),
    ("New York City", "225 479 498"),
    ("Northern New Jersey", "2740 225 3016"),
    ("Space Cannon", "4676 17532"),
    ("Space Cannon Searchlights", "4676 17532 61673 11"),
    ("Captain John L. Anderson ca. 1928", "4801 514 1125 5 3661 8603 5 16901"),
    ("  Hello,   World!  ", "9584 6 587 338"),
    ("Café Zürich — naïve façade", "25403 57664 140 33445 35929"),
    ("ＦＵＬＬｗｉｄｔｈ ①②", "37641 44371 496"),
    ("日本語", "190 63005 63184 63530"),
    ("😀☃", "190 62892 3"),
    ("New line\nand\ttab", "225 419 8 12163"),
    ("1234567890", "496 43477 8248 52687"),
    ("['Introduction']", "476 27 1587 6008 25974 27 543"),
    ("http://example.com/a_b", "5464 2455 54941 5 432 182 178 1515 1189"),
    ("", ""),
    ("   ", ""),
    ("P a r i s", "798 10 5946 732 1774"),
    ("N e w   Y o r k   C i t y", "773 650 4422 2667 1952 5946 4792 612 732 2018 2020"),
]  # fmt: skip
LIGHTHOUSE = (
    "A small red lighthouse stands on the rocky shore while fishing boats wait for the tide to turn before dawn.",
    "94 379 960 26310 2706 20 4 12699 6794 155 4554 6943 1103 17 4 10557 7 671 126 9686 5",
)

# Many pairs that are equally frequent: their order must not depend on chance.
TIES = [a + b + c + " " + c + a for a in "abcdefgh" for b in "xyz" for c in "klmnop"]
TEXTS = [
    "a grinning face with big eyes and an open smile",
    "Grinning face: smiling eyes, open mouth!",
    "the face of a cat with smiling eyes",
    "a sleepy cat's face; the cat is sleeping",
    "café crème, 日本 2024",
] * 4 + TIES
TRAINERS = {
    "clip_bpe": (train_bpe, 560),
    "wordpiece": (train_wordpiece, 120),
    "sentencepiece": (train_sentencepiece, 70),
}


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split()]


def train(kind, folder, size=None, name="vocabulary.txt"):
    """The tokenizer of a small vocabulary, and the number of ids that its training announced."""
    trainer, standard = TRAINERS[kind]
    announced = trainer(TEXTS, size or standard, str(folder / name))
    return tokenizer(TextSpec(kind, str(folder / name), 24)), announced


# ---- CLIP ----


@pytest.mark.parametrize(("text", "content"), CLIP, ids=lambda value: value[:20])
def test_clip_ids_are_the_published_ones(text, content):
    expected = [49406, *numbers(content), 49407]
    ids, mask = tokenizer(TextSpec())([text])
    assert ids.dtype == np.int32 and mask.dtype == bool and ids.shape == mask.shape == (1, 77)
    assert ids[0].tolist() == expected + [0] * (77 - len(expected))
    assert mask[0].tolist() == [True] * len(expected) + [False] * (77 - len(expected))


def test_a_batch_equals_its_texts_one_by_one():
    clip = tokenizer(TextSpec())
    texts = [text for text, _ in CLIP]
    ids, mask = clip(texts)
    for row, text in enumerate(texts):
        np.testing.assert_array_equal(ids[row], clip([text])[0][0])
        np.testing.assert_array_equal(mask[row], clip([text])[1][0])
    assert clip([])[0].shape == (0, 77)


def test_too_long_is_cut_or_refused():
    clip = tokenizer(TextSpec(length=5))
    assert clip(["a photo of a cat"])[0].tolist() == [[49406, 320, 1125, 539, 49407]]
    assert clip(["a photo of"], strict=True)[0].tolist() == [[49406, 320, 1125, 539, 49407]]
    with pytest.raises(ValueError, match=r"text 1 has 6 ids .* at most 5 \(1 of 2 texts"):
        clip(["a", "a photo of a"], strict=True)


def test_a_special_token_behind_punctuation_is_plain_text():
    """The pattern of the original takes a run of punctuation whole."""
    clip = tokenizer(TextSpec())
    assert clip.content(["dog<|endoftext|>dog"]) == [[1929, 49407, 1929]]
    assert clip.content(["dog <|ENDOFTEXT|><|startoftext|>"]) == [[1929, 49407, 49406]]
    assert 49407 not in clip.content(["dog!<|endoftext|>"])[0]


def test_contractions_ignore_case_as_unicode_knows_it():
    """Of the original: lower case leaves the long s alone, and its pattern takes it for an s."""
    assert tokenizer(TextSpec()).content(["it'ſ"]) == [[585, 6, 129, 379]]


def test_clip_decode():
    clip = tokenizer(TextSpec())
    assert clip.size == 49408
    for text in ("a photo of a cat", "café naïve zürich", "日本語 🙂", ""):
        assert clip.decode(clip([text])[0][0]) == text
    assert clip.decode([320, 2368]) == "a cat"
    assert (
        clip.decode(clip(["<|startoftext|>a dog<|endoftext|> b"])[0][0]) == "<|startoftext|>a dog"
    )
    with pytest.raises(ValueError, match="id 49408 is outside the vocabulary of 49408"):
        clip.decode([49408])


def test_clean():
    assert clean("<b> &amp;lt;") == "<b> <"
    assert clean("  It&amp;#39;s \u00a0 ÜBER\r\n“cool” ") == 'it\'s über "cool"'


def test_lone_surrogates_do_not_stop_any_tokenizer(tmp_path):
    for kind in TRAINERS:
        (tmp_path / kind).mkdir()
        made, _ = train(kind, tmp_path / kind)
        assert len(made.content(["cat \ud800 face"])[0]) >= 2


def test_packaged_vocabulary_is_the_published_one():
    data = gzip.decompress(CLIP_VOCABULARY.read_bytes())
    digest = "685491abbdad36159d094ecdc23bebc0dd53f8d1df35c4d74ef6036db2ba7572"
    assert hashlib.sha256(data).hexdigest() == digest  # of lines 1 to 48,895 of the published file
    assert data.count(b"\n") == 48895
    assert "Copyright (c) 2021 OpenAI" in (CLIP_VOCABULARY.parent / "NOTICE").read_text()


def test_merges_that_clip_does_not_use_are_left_out(tmp_path):
    path = tmp_path / "bpe_simple_vocab_16e6.txt"
    path.write_bytes(gzip.decompress(CLIP_VOCABULARY.read_bytes()) + b"a b\nc d\n")
    made = tokenizer(TextSpec(vocab=str(path)))
    assert made.size == 49408 and made.content(["a photo of a cat"]) == [
        [320, 1125, 539, 320, 2368]
    ]


# ---- BERT ----


def test_wordpiece_ids(tmp_path):
    """A vocabulary with BERT's pieces at BERT's places; the ids were checked with the published vocabulary."""
    pieces = [f"[unused{n}]" for n in range(30522)]
    placed = {
        "[PAD]": 0,
        "[UNK]": 100,
        "[CLS]": 101,
        "[SEP]": 102,
        "[MASK]": 103,
        "a": 1037,
        "man": 2158,
    }
    placed |= {
        "riding": 5559,
        "wave": 4400,
        "on": 2006,
        "top": 2327,
        "of": 1997,
        "surf": 14175,
        "##board": 6277,
    }
    for piece, place in (placed | {".": 1012, "zurich": 10204}).items():
        pieces[place] = piece
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    bert = tokenizer(TextSpec("wordpiece", str(tmp_path / "vocab.txt"), 20))
    ids, mask = bert(["A man riding a wave on top of a surfboard."])
    expected = numbers(
        "101 1037 2158 5559 1037 4400 2006 2327 1997 1037 14175 6277 1012 102 0 0 0 0 0 0"
    )
    assert ids[0].tolist() == expected and mask[0].sum() == 14
    assert bert.size == 30522
    assert bert.content(["Zürich\n zzz", ""]) == [[10204, 100], []]
    assert bert.decode(ids[0]) == "a man riding a wave on top of a surfboard."
    assert 102 not in bert.content(["a [SEP] man"])[0]
    assert bert(["a " * 50])[0][0, -2:].tolist() == [1037, 102]


# ---- BEiT-3 ----


@pytest.fixture
def beit3(shared):
    path = shared / "data/beit3/beit3.spm"
    digest = "6f5e2fefcf793761a76a6bfb8ad35489f9c203b25557673284b6d032f41043f4"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    return lambda length=64: tokenizer(TextSpec("sentencepiece", str(path), length))


def test_beit3_ids_are_the_published_ones(beit3):
    texts = [text for text, _ in BEIT3] + [LIGHTHOUSE[0]]
    expected = [numbers(content) for _, content in BEIT3] + [numbers(LIGHTHOUSE[1])]
    assert dict(zip(texts, beit3().content(texts))) == dict(zip(texts, expected))
    assert beit3().size == 64002


def test_beit3_rows(beit3):
    ids, mask = beit3(16)(["Tribute in Light", LIGHTHOUSE[0], ""])
    assert ids[0].tolist() == [0, 33706, 12, 5415, 2] + [1] * 11
    assert ids[1].tolist() == [0, *numbers(LIGHTHOUSE[1])[:14], 2]
    assert ids[2].tolist() == [0, 2] + [1] * 14
    assert mask.sum(axis=1).tolist() == [5, 16, 2]
    assert beit3().decode(ids[0]) == "Tribute in Light"


def test_beit3_fields_are_joined_without_separator(beit3):
    fields = [
        "Boeing EC-135",
        "Looking Glass",
        "Operations began in 1961 with crews on alert around the clock.",
    ]
    expected = numbers(
        "0 7238 12937 22 34326 5534 9916 11589 500 12 13268 24 6186 20 4934 162 4 3904 5 2"
    )
    for length in (64, 16):
        made = beit3(length)
        joined = [i for content in made.content(fields) for i in content]
        cut = expected if length == 64 else [*expected[:15], 2]
        ids, mask = made.frame([joined])
        assert ids[0].tolist() == cut + [1] * (length - len(cut))
        assert mask[0].sum() == len(cut)


def test_beit3_never_takes_a_special_token_from_a_text(beit3):
    found = beit3().content(["a <s> b </s> c <pad> <mask>"])[0]
    assert not {0, 1, 2, 64001} & set(found)


# ---- vocabularies of our own ----


@pytest.mark.parametrize("kind", TRAINERS)
def test_own_vocabularies_go_through_the_same_class(kind, tmp_path):
    made, announced = train(kind, tmp_path)
    assert made.size == announced <= TRAINERS[kind][1]
    ids, mask = made(["smiling cat face", "", "☃ nothing known ☃", "cat " * 50])
    assert ids.shape == (4, 24) and ids.min() >= 0 and ids.max() < made.size
    assert (ids[:, 0] == made.start).all()
    assert [ids[row, n - 1] for row, n in enumerate(mask.sum(axis=1))] == [made.end] * 4
    assert (ids[~mask] == made.pad).all()
    assert mask.sum(axis=1)[3] == 24 and mask.sum(axis=1)[1] == 2
    assert made.decode(ids[0]) == "smiling cat face" and made.decode(ids[1]) == ""
    unknown = {"wordpiece": 1, "sentencepiece": 3}
    assert kind not in unknown or unknown[kind] in ids[2]


def test_size_of_the_merges_decides_the_ids(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("#header\nc a\nca t</w>\n", encoding="utf-8")
    made = tokenizer(TextSpec(vocab=str(path), length=8))
    assert (made.size, made.start, made.end) == (516, 514, 515)
    letter = {c: ord(c) - 33 for c in "abcdefghijklmnopqrstuvwxyz"}
    assert made.content(["cat", "cats", "ca"]) == [[513], [512, letter["t"], 256 + letter["s"]], [letter["c"], 256 + letter["a"]]]  # fmt: skip
    assert made.decode(made(["cats and cat"])[0][0]) == "cats and"


def test_own_bpe_learns_words_and_counts_its_ids(tmp_path):
    made, announced = train("clip_bpe", tmp_path, name="own.txt.gz")
    lines = gzip.decompress((tmp_path / "own.txt.gz").read_bytes()).decode().splitlines()
    assert announced == 560 and len(lines) == 1 + 560 - 514
    assert (made.start, made.end, made.pad) == (558, 559, 0)
    assert len(made.content(["Smiling faces"])[0]) < 12
    assert train_bpe(["one", "two"], 4000, str(tmp_path / "few.txt")) == 514


def test_a_vocabulary_written_again_is_read_again(tmp_path):
    first, _ = train("clip_bpe", tmp_path, size=560)
    same = tokenizer(TextSpec("clip_bpe", str(tmp_path / "vocabulary.txt"), 24))
    second, _ = train("clip_bpe", tmp_path, size=540)
    assert first is same and (first.size, second.size) == (560, 540)


@pytest.mark.parametrize("threads", ["1", "4"])
def test_training_is_deterministic(threads, tmp_path):
    """In other processes, as the library's hash tables are seeded anew in each."""
    code = (
        "import pathlib, sys; sys.path.insert(0, sys.argv[1]); import test_text as t\n"
        "for kind in t.TRAINERS: t.train(kind, pathlib.Path(sys.argv[2]), name=kind)"
    )
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    for kind in TRAINERS:
        train(kind, here, name=kind)
    environment = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
    subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), str(there)],
        check=True,
        env=environment,
    )
    for kind in TRAINERS:
        assert (here / kind).read_bytes() == (there / kind).read_bytes(), kind


def test_packed_files_carry_no_time(tmp_path, monkeypatch):
    train("clip_bpe", tmp_path, name="a.txt.gz")
    monkeypatch.setattr("time.time", lambda: 0.0)
    train("clip_bpe", tmp_path, name="b.txt.gz")
    assert (tmp_path / "a.txt.gz").read_bytes() == (tmp_path / "b.txt.gz").read_bytes()


# ---- what is refused ----


@pytest.mark.parametrize("kind", TRAINERS)
def test_training_needs_texts_and_room(kind, tmp_path):
    trainer, _ = TRAINERS[kind]
    with pytest.raises(ValueError, match="no texts"):
        trainer([], 4000, str(tmp_path / "v.txt"))
    with pytest.raises(ValueError, match=r"size 7 is too small, .* at least"):
        trainer(TEXTS, 7, str(tmp_path / "v.txt"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"#header\na b\nabc\n", "line 3: expected a merge"),
        (b"#header\nab c\n", "not a list of merges"),
        (b"\xff\xfe\x00", "not a vocabulary in UTF-8"),
        (b"\x1f\x8b\x08broken", "not a vocabulary in UTF-8"),
    ],
)
def test_broken_merges(content, message, tmp_path):
    path = tmp_path / "v.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"v\.txt.*{message}"):
        tokenizer(TextSpec(vocab=str(path)))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("wordpiece", r"no \[PAD\], \[UNK\], \[CLS\], \[SEP\]"),
        ("sentencepiece", "not a SentencePiece model"),
    ],
)
def test_a_vocabulary_of_another_kind(kind, message):
    with pytest.raises(ValueError, match=rf"clip_bpe\.txt\.gz.*{message}"):
        tokenizer(TextSpec(kind, str(CLIP_VOCABULARY)))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TextSpec(kind="bpe"), "'bpe'; expected one of clip_bpe, wordpiece, sentencepiece"),
        (TextSpec(length=1), "no room for start and end"),
        (TextSpec(kind="wordpiece"), "'clip' does not fit kind 'wordpiece'"),
        (TextSpec(vocab="gs://bucket/v.txt"), "expected a local path"),
    ],
)
def test_a_wrong_spec_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        tokenizer(spec)


def test_a_missing_vocabulary_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no vocabulary file .*none\.txt"):
        tokenizer(TextSpec(vocab=str(tmp_path / "none.txt")))


@pytest.mark.parametrize(
    ("texts", "message"), [("a cat", "put it in a list"), (["a", None], "text 1 is None")]
)
def test_only_lists_of_texts(texts, message):
    with pytest.raises(ValueError, match=message):
        tokenizer(TextSpec())(texts)


def test_the_module_imports_no_library_before_it_is_used():
    check = f"import sys, {module.__name__}; assert not {{'tokenizers', 'ftfy', 'sentencepiece'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
