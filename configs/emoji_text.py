"""The packaged model `emoji_text`: names find emoji, trained on the built-in training concepts.

Only the word pieces start from something: what a small sentence encoder makes of the training texts they occur in
(`cir_jax.data.emoji_v1.meanings`). About 16 minutes on 2 cores:

    python -m cir_jax.train emoji_text --workdir runs/emoji_text
"""

from cir_jax.config import Data, Experiment, Optim, Train
from cir_jax.data.emoji import IMAGES, MEANINGS, VOCABULARY
from cir_jax.data.inputs import Inputs
from cir_jax.data.text import TextSpec
from cir_jax.encoders.clip import TextConfig, VisionConfig
from cir_jax.methods.clip import ClipConfig

config = Experiment(
    method=ClipConfig(
        vision=VisionConfig(size=64, patch=8, width=128, layers=4, heads=4),
        text=TextConfig(vocabulary=4000, length=24, width=128, layers=2, heads=4),
        embed=128,
        activation="gelu",
        remat=False,
        largest_scale=30.0,
        patches_kept=0.5,
        inputs=Inputs(
            image=IMAGES,
            text=TextSpec(vocab=str(VOCABULARY), length=24),
        ),
    ),
    data=(Data("emoji-text", variant="both"), Data("emoji-composed", variant="both-strict-even")),
    train=Train(
        steps=1000,
        batch_size=224,
        log_every=20,
        save_every=200,
        eval_every=100,
        export_dtype="float16",
    ),
    optim=Optim(lr=7e-4, weight_decay=0.3, warmup=50, frozen=("text/embedding",)),
    init={"text/embedding": str(MEANINGS)},
    evals=("emoji-text/noto/val", "emoji-text/twemoji/val"),
    best="mrr",  # steadier than recall@10 on 251 queries
)
