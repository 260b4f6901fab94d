"""The packaged model `emoji_documents`: whole documents find emoji, CFIR on a small BEiT-3.

Trained on names, and on entities and summaries of the documents of training concepts, as they are and with their
subject masked. The words start from, and stay, what a small sentence encoder makes of them
(`cir_jax.data.emoji_v1.meanings`). 15 minutes on 2 cores that another training shared:

    python -m cir_jax.train emoji_documents --workdir runs/emoji_documents
"""

from cir_jax.config import Data, Experiment, Optim, Train
from cir_jax.data.emoji import IMAGES, WORD_MEANINGS, WORDS
from cir_jax.data.inputs import Inputs
from cir_jax.data.text import TextSpec
from cir_jax.encoders.beit3 import Beit3Config
from cir_jax.methods.cfir import CfirConfig

config = Experiment(
    method=CfirConfig(
        encoder=Beit3Config(
            size=64,
            patch=16,
            vocabulary=26592,
            length=48,
            width=128,
            layers=3,
            heads=4,
            hidden=512,
            drop_path=0.1,
            mask_token=False,
            initial="scratch",
        ),
        largest_scale=30.0,
        remat=False,
        inputs=Inputs(
            image=IMAGES,
            text=TextSpec(kind="wordpiece", vocab=str(WORDS), length=48),
        ),
    ),
    data=(
        Data("emoji-text", variant="both", weight=2),
        Data("emoji-documents", variant="both-unshared"),
        Data("emoji-documents", variant="both-masked-unshared"),
    ),
    train=Train(
        steps=900,
        batch_size=160,
        log_every=20,
        save_every=200,
        eval_every=150,
        export_dtype="bfloat16",
    ),
    optim=Optim(lr=7e-4, weight_decay=0.3, warmup=50, frozen=("text/embedding",)),
    init={"text/embedding": str(WORD_MEANINGS)},
    evals=("emoji-documents/noto/val", "emoji-documents/noto-masked/val"),
    best="mrr",
)
