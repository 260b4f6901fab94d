"""The packaged model `emoji_cir`: stage I for a picture and a change to it, BLIP's parts in a small size.

Trained on the training edits (5,378 in each style) and on the names of training concepts. Pictures are not varied: the
gallery is given, and every detail of it counts. 44 minutes on 2 cores that another training
shared:

    python -m cir_jax.train emoji_cir --workdir runs/emoji_cir
"""

from cir_jax.config import Data, Experiment, Optim, Train
from cir_jax.data.emoji import IMAGES, MEANINGS, VOCABULARY
from cir_jax.data.inputs import Inputs
from cir_jax.data.text import TextSpec
from cir_jax.encoders.bert import BertConfig
from cir_jax.encoders.vit import VitConfig
from cir_jax.methods.blip_cir import BlipCirConfig

config = Experiment(
    method=BlipCirConfig(
        image=VitConfig(size=64, patch=16, width=192, layers=4, heads=6, drop_path=0.1),
        text=BertConfig(
            vocabulary=4001,  # the pieces and [ENC]
            length=24,
            width=128,
            layers=2,
            heads=4,
            hidden=512,
            types=0,
            image_width=192,
            dropout=0.1,
        ),
        embed=128,
        remat=False,
        inputs=Inputs(
            image=IMAGES,
            text=TextSpec(vocab=str(VOCABULARY), length=24),
        ),
    ),
    # Eight neighbours of the gallery at a time: "astronaut" in every skin tone, of which only one is right.
    data=(
        Data("emoji-composed", variant="both-near", block=8, weight=2),
        Data("emoji-text", variant="both", block=8),
    ),
    train=Train(
        steps=1600,
        batch_size=256,
        log_every=20,
        save_every=400,
        eval_every=200,
        export_dtype="bfloat16",
        augment=False,
    ),
    optim=Optim(lr=1e-3, warmup=100, frozen=("text/embeddings/embedding",)),
    init={"text/embeddings/embedding": str(MEANINGS)},
    evals=("emoji-composed/noto/val",),
    best="mrr",
)
