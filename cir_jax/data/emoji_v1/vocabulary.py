"""`python -m cir_jax.data.emoji_v1.vocabulary`: the byte-pair vocabulary of the demo, from training texts alone."""

from cir_jax.data import emoji
from cir_jax.data.text import train_bpe

SIZE = 4000


def texts() -> list[str]:
    """Every wording of the training concepts, and the training edits between them."""
    train = [row for row, item in enumerate(emoji.items()) if item.split == "train"]
    edits = emoji.emoji_triplets("noto", "train", concept_disjoint=True, pair_disjoint=True)
    return [text for row in train for text in emoji.wordings(row)] + [
        edit["text"] for edit in edits
    ]


if __name__ == "__main__":
    print(f"{train_bpe(texts(), SIZE, str(emoji.VOCABULARY))} pieces in {emoji.VOCABULARY}")
