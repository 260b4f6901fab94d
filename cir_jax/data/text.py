"""Texts to ids: CLIP's byte-pair encoding, BERT's WordPiece and BEiT-3's SentencePiece behind one call.

The fast libraries do the work; this file adds what the originals do around them, and trains small vocabularies in
the same file formats. Every training is deterministic.
"""

import functools
import gzip
import html
import io
import json
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cir_jax.files import local_path, write_atomically

CLIP_VOCABULARY = Path(__file__).parent / "vocab" / "clip_bpe.txt.gz"
CLIP_SPECIALS = ("<|startoftext|>", "<|endoftext|>")
BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

# CLIP's own order of the 256 bytes: those that are printable first
_BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES += sorted(set(range(256)) - set(_BYTES))
_SYMBOLS = [chr(b) if n < 188 else chr(256 + n - 188) for n, b in enumerate(_BYTES)]
_BYTE_OF = dict(zip(_SYMBOLS, _BYTES))
_END_OF_WORD = "</w>"
_ALPHABET = _SYMBOLS + [symbol + _END_OF_WORD for symbol in _SYMBOLS]
_SPECIAL = re.compile("|".join(map(re.escape, CLIP_SPECIALS)), re.IGNORECASE)
_WORDS = (
    r"(?i)<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
)
_CLIP_MERGES = 49152 - 256 - 2
_CLIP_HEADER = '"bpe_simple_vocab_16e6.txt'


@dataclass(frozen=True)
class TextSpec:
    """How a text becomes ids.

    Attributes:
      kind: the algorithm, and with it the format of the vocabulary file.
      vocab: "clip" for the packaged vocabulary of CLIP, otherwise the path of a vocabulary file: for `clip_bpe` a
        header line and a merge per line (`.txt` or `.txt.gz`), for `wordpiece` a piece per line (BERT's `vocab.txt`),
        for `sentencepiece` a SentencePiece model.
      length: ids of a row, start and end included.
    """

    kind: Literal["clip_bpe", "wordpiece", "sentencepiece"] = "clip_bpe"
    vocab: str = "clip"
    length: int = 77


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary at work; made by `tokenizer`.

    Attributes:
      size: the number of ids.
      length: ids of a row.
      start, end, pad: the ids around a text and after it.
      content: texts -> the ids of each, without start, end and limit.
      words: ids without start and end -> text.
    """

    size: int
    length: int
    start: int
    end: int
    pad: int
    content: Callable[[Sequence[str]], list[list[int]]]
    words: Callable[[Sequence[int]], str]

    def __call__(self, texts: Sequence[str], strict: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """(ids [B, L] int32, mask [B, L] bool); the mask is True for start, text and end.

        Raises:
          ValueError: with `strict`, a text that does not fit; otherwise it is cut, with the end id in the last place.
        """
        return self.frame(self.content(_checked(texts)), strict)

    def frame(
        self, contents: Sequence[Sequence[int]], strict: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows as from `__call__`, of ids from `content` that may have been joined or changed."""
        room = self.length - 2
        long = [row for row, content in enumerate(contents) if len(content) > room]
        if strict and long:
            raise ValueError(
                f"text {long[0]} has {len(contents[long[0]]) + 2} ids with start and end, expected at most "
                f"{self.length} ({len(long)} of {len(contents)} texts are too long); shorten it or leave strict off"
            )
        ids = np.full((len(contents), self.length), self.pad, np.int32)
        mask = np.zeros(ids.shape, bool)
        for row, content in enumerate(contents):
            kept = [self.start, *content[:room], self.end]
            ids[row, : len(kept)] = kept
            mask[row, : len(kept)] = True
        return ids, mask

    def decode(self, ids: Sequence[int]) -> str:
        """The text of one row up to its first end id, as the vocabulary writes it (cleaned, perhaps lower case)."""
        ids = [int(i) for i in ids]
        bad = [i for i in ids if not 0 <= i < self.size]
        if bad:
            raise ValueError(f"id {bad[0]} is outside the vocabulary of {self.size}")
        if self.end in ids:
            ids = ids[: ids.index(self.end)]
        return self.words(ids[1:] if ids[:1] == [self.start] else ids).strip()


def tokenizer(spec: TextSpec) -> Tokenizer:
    """The tokenizer of a spec; kept, so that asking again is free until the vocabulary file changes.

    Raises:
      FileNotFoundError: no vocabulary file there.
      ValueError: a file of another format, a length below 2.
    """
    if spec.kind not in _KINDS:
        raise ValueError(f"text kind is {spec.kind!r}; expected one of {', '.join(_KINDS)}")
    if spec.length < 2:
        raise ValueError(
            f"text length {spec.length} has no room for start and end; expected at least 2"
        )
    if spec.vocab == "clip" and spec.kind != "clip_bpe":
        raise ValueError(
            f"vocab 'clip' does not fit kind {spec.kind!r}; give the path of a vocabulary file"
        )
    path = CLIP_VOCABULARY if spec.vocab == "clip" else local_path(spec.vocab)
    if not path.is_file():
        raise FileNotFoundError(f"no vocabulary file {path.absolute()} for kind {spec.kind!r}")
    found = path.stat()
    return _load(spec, path, (found.st_mtime_ns, found.st_size, found.st_ino))


@functools.lru_cache(maxsize=16)
def _load(spec: TextSpec, path: Path, stamp: tuple) -> Tokenizer:
    """`stamp` is there for the cache: a changed file is another key."""
    return _KINDS[spec.kind](path, spec.length)


# ---- CLIP's byte-pair encoding ----


def clean(text: str) -> str:
    """CLIP's cleaning: broken Unicode and HTML repaired, white space collapsed, lower case."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text.strip()).strip().lower()


def _clip_bpe(path: Path, length: int) -> Tokenizer:
    merges = _read_merges(path)
    pieces = [*_ALPHABET, *("".join(merge) for merge in merges), *CLIP_SPECIALS]
    specials = dict(zip(CLIP_SPECIALS, (len(pieces) - 2, len(pieces) - 1)))
    try:
        model = _bpe_model({piece: i for i, piece in enumerate(pieces[:-2])}, merges)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path.absolute()} is not a list of merges: {error}") from error

    def content(texts):
        parts = [_around_specials(clean(text)) for text in texts]
        plain = [part for text in parts for part in text if part not in specials]
        found = iter(model.encode_batch_fast(plain))
        ids = lambda part: [specials[part]] if part in specials else next(found).ids
        return [[i for part in text for i in ids(part)] for text in parts]

    def words(ids):
        return _unspell(pieces[i] for i in ids)

    return Tokenizer(len(pieces), length, *specials.values(), 0, content, words)


def _read_merges(path: Path) -> list[tuple[str, str]]:
    header, *lines = _read_lines(path)
    if header.startswith(_CLIP_HEADER):
        lines = lines[
            :_CLIP_MERGES
        ]  # CLIP's published file goes on with merges that CLIP does not use
    merges = [tuple(line.split()) for line in lines]
    wrong = [n for n, merge in enumerate(merges, 2) if len(merge) != 2]
    if wrong:
        raise ValueError(
            f"{path.absolute()}, line {wrong[0]}: expected a merge, two symbols with a space between them; "
            f"the first line is a header ({len(wrong)} wrong lines)"
        )
    return merges


def _bpe_model(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]):
    """A `tokenizers.Tokenizer` for cleaned text without special tokens."""
    from tokenizers import Regex, Tokenizer, models
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    model = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix=_END_OF_WORD))
    split = Split(Regex(_WORDS), "removed", invert=True)
    model.pre_tokenizer = Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    return model


def _around_specials(text: str) -> list[str]:
    """`text` in parts, a special token that CLIP's pattern finds being a part of its own.

    The pattern takes punctuation in whole runs, so a special token right behind punctuation is none.
    """
    parts, cut = [], 0
    for match in _SPECIAL.finditer(text):
        before = text[cut : match.start()]
        if not before or before[-1].isspace() or unicodedata.category(before[-1])[0] in "LN":
            parts += [before, match[0]]
            cut = match.end()
    return [*parts, text[cut:]]


def _unspell(pieces: Iterator[str]) -> str:
    """Pieces of byte symbols as text; special tokens among them stay as they are."""
    spelled = "".join(pieces).replace(_END_OF_WORD, " ")
    known = lambda c: bytes([_BYTE_OF[c]]) if c in _BYTE_OF else c.encode()
    return b"".join(map(known, spelled)).decode(errors="replace")


def train_bpe(texts: Sequence[str], size: int, path: str) -> int:
    """Train a vocabulary for kind `clip_bpe` and write it to `path` (`.txt` or `.txt.gz`).

    Only pairs that occur at least twice are merged, so few texts give fewer ids than asked for.

    Args:
      texts: raw, they are cleaned here.
      size: ids wanted: 512 symbols, merges and 2 specials.
      path: of the file.

    Returns:
      The number of ids, at most `size`.
    """
    from tokenizers.trainers import BpeTrainer

    _check_size(size, len(_ALPHABET) + 2)
    model = _bpe_model({}, [])
    # Given as special tokens the symbols have fixed ids; the library's own order differs from run to run.
    trainer = BpeTrainer(
        vocab_size=size - 2,
        min_frequency=2,
        special_tokens=_ALPHABET,
        end_of_word_suffix=_END_OF_WORD,
        show_progress=False,
    )
    model.train_from_iterator([clean(text) for text in _corpus(texts)], trainer)
    # Two merges can make the same piece, which the library counts once and this format twice.
    merges = json.loads(model.to_str())["model"]["merges"][: size - len(_ALPHABET) - 2]
    write_vocabulary(path, "\n".join(["#cir_jax byte-pair merges", *map(" ".join, merges)]) + "\n")
    return len(_ALPHABET) + len(merges) + 2


# ---- BERT's WordPiece ----


def _wordpiece(path: Path, length: int) -> Tokenizer:
    from tokenizers.decoders import WordPiece

    pieces = _read_lines(path)
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    missing = [special for special in BERT_SPECIALS[:4] if special not in vocabulary]
    if missing:
        raise ValueError(
            f"{path.absolute()} has no {', '.join(missing)}; expected a WordPiece vocabulary, a piece per line"
        )
    model, decoder = _wordpiece_model(vocabulary), WordPiece()

    def content(texts):
        found = model.encode_batch_fast([_valid(text) for text in texts])
        return [encoding.ids for encoding in found]

    def words(ids):
        return decoder.decode([pieces[i] for i in ids])

    specials = (vocabulary[special] for special in ("[CLS]", "[SEP]", "[PAD]"))
    return Tokenizer(len(pieces), length, *specials, content, words)


def _wordpiece_model(vocabulary: Mapping[str, int]):
    """BERT uncased; a literal `[SEP]` in a text is split like any word."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    model = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    model.normalizer = normalizers.BertNormalizer(lowercase=True)
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return model


def train_wordpiece(texts: Sequence[str], size: int, path: str) -> int:
    """Train a vocabulary for kind `wordpiece` and write it to `path` (`.txt` or `.txt.gz`).

    Args:
      texts: raw.
      size: ids wanted, at least the special pieces and every letter of the texts twice (alone and inside a word).
      path: of the file.

    Returns:
      The number of ids, at most `size`; few texts give fewer.
    """
    from tokenizers.trainers import WordPieceTrainer

    model = _wordpiece_model({"[UNK]": 0})
    texts = [model.normalizer.normalize_str(_valid(text)) for text in _corpus(texts)]
    words = {word for text in texts for word, _ in model.pre_tokenizer.pre_tokenize_str(text)}
    alphabet = sorted({word[0] for word in words})
    alphabet += sorted({f"##{letter}" for word in words for letter in word[1:]})
    _check_size(size, len(BERT_SPECIALS) + len(alphabet))
    # Given as special tokens the letters have fixed ids; the library's own order differs from run to run.
    trainer = WordPieceTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[*BERT_SPECIALS, *alphabet],
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    vocabulary = model.get_vocab()
    write_vocabulary(path, "\n".join(sorted(vocabulary, key=vocabulary.get)) + "\n")
    return len(vocabulary)


# ---- BEiT-3's SentencePiece ----


def _sentencepiece(path: Path, length: int) -> Tokenizer:
    """Ids as XLM-RoBERTa: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, piece j at j + 1, `<mask>` last.

    Unlike there, a literal `</s>` in a text is split like any word.
    """
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_proto=_read(path))
    except RuntimeError as error:
        raise ValueError(f"{path.absolute()} is not a SentencePiece model") from error
    specials = (model.unk_id(), model.bos_id(), model.eos_id())
    if specials != (0, 1, 2):
        raise ValueError(
            f"{path.absolute()} has <unk>, <s>, </s> at {specials}, expected (0, 1, 2); "
            "train it with cir_jax.data.text.train_sentencepiece"
        )

    def content(texts):
        found = model.encode([_valid(text) for text in texts])
        return [[j + 1 if j else 3 for j in pieces] for pieces in found]

    def words(ids):
        return model.decode([i - 1 if i > 3 else 0 for i in ids if i > 2 and i <= len(model)])

    return Tokenizer(len(model) + 2, length, 0, 2, 1, content, words)


def train_sentencepiece(texts: Sequence[str], size: int, path: str) -> int:
    """Train a unigram model for kind `sentencepiece`, set up as BEiT-3's, and write it to `path`.

    Args:
      texts: raw.
      size: ids wanted, `<pad>` and `<mask>` included.
      path: of the file.

    Returns:
      The number of ids, at most `size`; few texts give fewer.
    """
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    _check_size(size, 8)
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter([_valid(text) for text in _corpus(texts)]),
            model_writer=model,
            vocab_size=size - 2,
            hard_vocab_limit=False,
            character_coverage=1.0,
            max_sentence_length=1 << 20,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"no vocabulary of {size} ids can be trained on these texts: {error}"
        ) from error
    write_vocabulary(path, model.getvalue())
    return len(SentencePieceProcessor(model_proto=model.getvalue())) + 2


_KINDS: Mapping[str, Callable[[Path, int], Tokenizer]] = {
    "clip_bpe": _clip_bpe,
    "wordpiece": _wordpiece,
    "sentencepiece": _sentencepiece,
}


# ---- shared ----


def _checked(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str):
        raise ValueError("got one string, expected a list of texts; put it in a list")
    wrong = [(row, text) for row, text in enumerate(texts) if not isinstance(text, str)]
    if wrong:
        raise ValueError(f"text {wrong[0][0]} is {wrong[0][1]!r}, expected a string")
    return list(texts)


def _corpus(texts: Sequence[str]) -> list[str]:
    if not len(texts):
        raise ValueError("there are no texts to train a vocabulary on")
    return _checked(texts)


def _valid(text: str) -> str:
    """Text without lone surrogates, which a command line with broken bytes contains and the libraries refuse."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _check_size(size: int, least: int) -> None:
    if size < least:
        raise ValueError(f"vocabulary size {size} is too small, these texts need at least {least}")


def _read(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data


def _read_lines(path: Path) -> list[str]:
    try:
        lines = _read(path).decode().replace("\r\n", "\n").split("\n")
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path.absolute()} is not a vocabulary in UTF-8 text: {error}") from error
    return lines[:-1] if lines[-1] == "" else lines


def write_vocabulary(path: str, content: str | bytes) -> None:
    """Write a vocabulary file, packed if `path` ends in `.gz`; the same content gives the same bytes."""
    data = content.encode() if isinstance(content, str) else content
    if str(path).endswith(".gz"):
        packed = io.BytesIO()
        with gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as file:
            file.write(data)
        data = packed.getvalue()
    with write_atomically(path) as temporary:
        temporary.write_bytes(data)
