"""The packaged model `emoji_rerank`: stage II for a picture and a change to it, started from `emoji_cir`.

Below the last layer the branches are merged by their mean, in it by a linear map. Unlike the paper's, its picture and
fusion encoders train too: those of a small model still have something to learn. About 25 minutes on 2 cores:

    python -m cir_jax.train emoji_rerank --workdir runs/emoji_rerank
"""

import dataclasses
import runpy
from pathlib import Path

from cir_jax.config import Data, Experiment, Optim, Train
from cir_jax.methods.blip_rerank import BlipRerankConfig

stage1 = runpy.run_path(str(Path(__file__).parent / "emoji_cir.py"))["config"].method
text = dataclasses.replace(
    stage1.inputs.text, length=16
)  # edits are short, and every token counts 24 x 24 times

config = Experiment(
    method=BlipRerankConfig(
        image=stage1.image,
        text=stage1.text,
        merge_from=1,
        remat=False,
        inputs=dataclasses.replace(stage1.inputs, text=text),
    ),
    # Blocks of what a second stage is asked to tell apart: variants of one concept, concepts with the same attributes.
    data=(
        Data("emoji-composed", variant="both-near", block=12),
        Data("emoji-composed", variant="both-peers", block=12),
    ),
    train=Train(
        steps=1600,
        batch_size=24,
        log_every=20,
        save_every=400,
        eval_every=200,
        export_dtype="float16",
        augment=False,
    ),
    optim=Optim(
        lr=5e-4, warmup=100, frozen=("text/embeddings/embedding", "fusion/embeddings/embedding")
    ),
    init={"": "emoji_cir"},
    evals=("emoji-composed/noto/val",),
    retriever="emoji_cir",
    best="mrr",
)
