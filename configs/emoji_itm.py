"""The packaged model `emoji_itm`: the second stage for names, BLIP's image-text matching in a small size.

Trained on the same pictures and wordings as `emoji_text`, whose candidates it orders. The words start from, and stay,
what a small sentence encoder makes of them (`cir_jax.data.emoji_v1.meanings`). 16 minutes on 2 cores that another
training shared:

    python -m cir_jax.train emoji_itm --workdir runs/emoji_itm
"""

from cir_jax.config import Data, Experiment, Optim, Train
from cir_jax.data.emoji import IMAGES, WORD_MEANINGS, WORDS
from cir_jax.data.inputs import Inputs
from cir_jax.data.text import TextSpec
from cir_jax.encoders.bert import BertConfig
from cir_jax.encoders.vit import VitConfig
from cir_jax.methods.blip_itm import BlipItmConfig

config = Experiment(
    method=BlipItmConfig(
        image=VitConfig(size=64, patch=16, width=128, layers=4, heads=4, drop_path=0.1),
        text=BertConfig(
            vocabulary=26593,  # the words and [ENC]
            length=24,
            width=128,
            layers=2,
            heads=4,
            hidden=512,
            types=0,
            image_width=128,
            dropout=0.1,
        ),
        embed=128,
        remat=False,
        inputs=Inputs(
            image=IMAGES,
            text=TextSpec(kind="wordpiece", vocab=str(WORDS), length=24),
        ),
    ),
    data=(Data("emoji-text", variant="both"),),
    train=Train(
        steps=900,
        batch_size=160,
        log_every=20,
        save_every=200,
        eval_every=150,
        export_dtype="bfloat16",
    ),
    optim=Optim(lr=7e-4, weight_decay=0.3, warmup=50, frozen=("text/embeddings/embedding",)),
    init={"text/embeddings/embedding": str(WORD_MEANINGS)},
    evals=("emoji-text/noto/val", "emoji-text/twemoji/val"),
    retriever="emoji_text",
    best="mrr",
)
