"""The demo: three kinds of query, two stages each, by exact search and with ScaNN.

`python -m cir_jax.eval emoji` measures on Noto; `--variant noto twemoji` on both drawing styles and their mean.
"""

from cir_jax.config import Evaluation, Run
from cir_jax.data.documents import DocumentSpec

# How much of the first stage's score stays in the second stage's order; chosen on the validation split.
TEXT_FUSION = 0.8
COMPOSED_FUSION = 0.7
DOCUMENT_FUSION = 0.5
EXTRACTS = DocumentSpec(source="builtin", summary="textrank")

INDEXES = ("exact", "scann")

text = tuple(
    Run("emoji-text/noto/test", "emoji_text", index, "emoji_itm", fusion=TEXT_FUSION)
    for index in INDEXES
)
text_full = tuple(Run("emoji-text/noto-full/test", "emoji_text", index) for index in INDEXES)
# All edits of the test split; and of them those between concepts that the split by concept holds out too. Their pairs
# are unseen, but other edits in training show their pictures and say their names.
composed = tuple(
    Run(
        f"emoji-composed/{variant}/test", "emoji_cir", index, "emoji_rerank", fusion=COMPOSED_FUSION
    )
    for variant, index in (("noto", "exact"), ("noto", "scann"), ("noto-concepts", "exact"))
)
# The entities ask one model, the summary another: they err differently.
documents = tuple(
    Run(
        f"emoji-documents/{variant}/test",
        "emoji_documents",
        index,
        "emoji_text",
        fusion=DOCUMENT_FUSION,
        documents=EXTRACTS,
    )
    for variant in ("noto", "noto-masked")
    for index in INDEXES
)

config = Evaluation(runs=(*composed, *text, *text_full, *documents))
