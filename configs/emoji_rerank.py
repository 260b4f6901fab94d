"""The packaged model `emoji_rerank`: stage II for a picture and a change to it, started from `emoji_cir`.

Below the last layer the branches are merged by their mean, in it by a linear map. As in the paper, the picture and fusion
encoders stay those of stage I. About 20 minutes on 2 cores:

    python -m cir_jax.train emoji_rerank --workdir runs/emoji_rerank
"""

import dataclasses
import runpy
from pathlib import Path

from cir_jax.config import Data, Experiment, Optim, Train
from cir_jax.methods.blip_rerank import BlipRerankConfig

stage1 = runpy.run_path(str(Path(__file__).parent / "emoji_cir.py"))["config"].method
# Edits are short, and every token counts 16 x 16 times.
text = dataclasses.replace(stage1.inputs.text, length=16)

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
        Data("emoji-composed", variant="both-near", block=16),
        Data("emoji-composed", variant="both-peers", block=16),
    ),
    train=Train(
        steps=5000,
        batch_size=16,
        log_every=100,
        save_every=1000,
        eval_every=1000,
        export_dtype="bfloat16",
        augment=False,
    ),
    optim=Optim(lr=5e-4, warmup=100, frozen=("image/.*", "fusion/.*", "text/embeddings/embedding")),
    init={"": "emoji_cir"},
    evals=("emoji-composed/noto/val",),
    retriever="emoji_cir",
    best="mrr",
)
