"""CLIP B/32 trained further on captioned pictures, with the optimiser of open_clip's trainer.

From OpenAI's weights, and Conceptual Captions as img2dataset's shards in data/cc3m; any other shards, as those that REACT
collects, take their place:

    python -m cir_jax.convert ViT-B-32.pt models/clip_b32 --method clip
    python -m cir_jax.train clip_cc3m --workdir runs/clip_cc3m

Nothing was published for this. Decay, moments, warm-up, schedule and the random crop are open_clip's; its rate of 5e-4 is for
training from nothing, so this is a fiftieth of it. Its mixed precision is bfloat16: `--method.dtype bfloat16`. Batches are
compared as a whole, as with its `--local-loss --gather-with-grad`.
"""

from cir_jax.config import Data, Experiment, Optim, Train
from cir_jax.encoders.clip import OPENAI_VITS
from cir_jax.methods.clip import ClipConfig

BATCH, EPOCHS = 4096, 10
EPOCH = 3_318_333 // BATCH  # steps

config = Experiment(
    method=ClipConfig(**OPENAI_VITS["B/32"]),
    data=(Data("captioned", root="data/cc3m/*.tar", grouped=False),),
    train=Train(
        steps=EPOCHS * EPOCH,
        batch_size=BATCH,
        save_every=EPOCH,
        eval_every=EPOCH,
        augment=False,
        crop=(0.9, 1.0),
        drop_last=True,
    ),
    optim=Optim(
        lr=1e-5,
        weight_decay=0.2,
        betas=(0.9, 0.98),
        epsilon=1e-6,
        warmup=EPOCH,
        warmup_includes="peak",
        clip_norm=None,
    ),
    init={"": "models/clip_b32"},
    evals=("coco/karpathy-five/val",),
    best="recall@1",
)
