"""Pic2Word on CLIP L/14 (Saito et al. 2023, arXiv 2302.03084).

FashionIQ's validation split, secondary sources: R@10 24.7, R@50 43.7. From CLIP's weights, and Conceptual Captions as
img2dataset's shards in data/cc3m, of which only the pictures are read:

    python -m cir_jax.convert ViT-L-14.pt models/clip_l14 --method clip
    python -m cir_jax.train pic2word_l14 --workdir runs/pic2word_l14

The original has 128 rows on each GPU, here taken as eight, in mixed precision; this is float32, and `--method.dtype bfloat16` is
faster. Each of its processes lets gradients through its own rows alone; here they flow through all. It validates nothing: the
last model is kept. Where fewer pictures could be fetched, `--train.steps` is 30 * (rows // 1024).
"""

from cir_jax.config import Data, Experiment, Optim, Train
from cir_jax.methods.inversion import FROZEN, Pic2WordConfig

BATCH, EPOCHS = 8 * 128, 30
EPOCH = 3_318_333 // BATCH  # steps

config = Experiment(
    method=Pic2WordConfig.paper("L/14"),
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
        lr=1e-4,
        weight_decay=0.1,
        betas=(0.9, 0.98),
        epsilon=1e-6,
        warmup=10_000,
        warmup_includes="peak",
        clip_norm=None,
        frozen=FROZEN,
    ),
    init={"clip": "models/clip_l14"},
)
