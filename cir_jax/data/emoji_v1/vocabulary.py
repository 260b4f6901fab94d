"""`python -m cir_jax.data.emoji_v1.vocabulary`: the byte-pair vocabulary of the demo, from training texts alone."""

from cir_jax.data import emoji
from cir_jax.data.text import train_bpe

SIZE = 4000


def texts() -> list[str]:
    """Every text that training may read: the wordings of its concepts, and the edits between them."""
    wordings = [text for pair in emoji.text_pairs("noto") for text in pair["query"]["texts"]]
    return wordings + [pair["query"]["text"] for pair in emoji.composed_pairs("noto-strict")]


if __name__ == "__main__":
    print(f"{train_bpe(texts(), SIZE, str(emoji.VOCABULARY))} pieces in {emoji.VOCABULARY}")
