"""FTI4CIR on CLIP L/14 (Lin et al. 2024, SIGIR; ZiChao111/FTI4CIR).

FashionIQ's validation split, secondary sources: R@10 29.39, R@50 50.88. From CLIP's weights, and ImageNet's test pictures with
BLIP's captions in data/imagenet (`cir_jax.data.imagenet`):

    python -m cir_jax.convert ViT-L-14.pt models/clip_l14 --method clip
    python -m cir_jax.train fti4cir_l14 --workdir runs/fti4cir_l14

The original used an A100 with 40 GB, in fp16 autocast; this is float32, and `--method.dtype bfloat16` is faster, where an
attribute at the threshold may come or go. It validates nothing; which epoch was published is not known. The last one is kept.
"""

from cir_jax.config import Data, Experiment, Optim, Train
from cir_jax.methods.fti4cir import Fti4cirConfig
from cir_jax.methods.inversion import FROZEN

BATCH, EPOCHS = 256, 60
EPOCH = 100_000 // BATCH  # steps, at most: captions that could not be split are left out

config = Experiment(
    method=Fti4cirConfig.paper("L/14"),
    data=(Data("imagenet", split="test"),),
    train=Train(
        steps=EPOCHS * EPOCH,
        batch_size=BATCH,
        seed=42,
        save_every=EPOCH,
        eval_every=EPOCH,
        augment=False,
        drop_last=True,
    ),
    optim=Optim(
        lr=4e-5,
        weight_decay=0.01,
        betas=(0.9, 0.999),
        schedule="constant",
        drops=(10 * EPOCH,),
        clip_norm=None,
        decay="all",
        frozen=FROZEN,
    ),
    init={"clip": "models/clip_l14"},
)
