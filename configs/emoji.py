"""The demo: find an emoji by its name, among concepts that no training saw, and among all."""

from cir_jax.config import Evaluation, Run

config = Evaluation(
    runs=tuple(
        Run(f"emoji-text/{variant}/test", "emoji_text", index=index)
        for variant in ("noto", "twemoji", "noto-full", "twemoji-full")
        for index in ("exact", "scann")
    )
)
