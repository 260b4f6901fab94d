"""SEARLE-XL's mapping network on CLIP L/14 (Baldrati et al. 2023, arXiv 2303.15247).

FashionIQ's validation split, secondary sources: R@10 25.56, R@50 46.23. From CLIP's weights, ImageNet's test pictures in
data/imagenet, SEARLE's concepts and phrases beside them (`cir_jax.data.searle`), and CIRR to choose by. The pseudo-words of the
pictures are found by optimisation, 350 steps for each, between these commands:

    python -m cir_jax.convert ViT-L-14.pt models/clip_l14 --method clip
    python -m cir_jax.train searle_l14 --workdir runs/searle_l14

    phrases = cir_jax.data.searle.read_phrases("data/imagenet", concepts=15)
    clip, pictures = cir_jax.load("models/clip_l14"), cir_jax.data.records.open_gallery("data/imagenet/test")
    cir_jax.training.words.write_words(clip, pictures, "data/imagenet/searle/words", phrases.of)

The original trains in mixed precision; this is float32, and `--method.dtype bfloat16` is faster. It validates on CIRR after
every epoch and publishes the last one; here the best is kept.
"""

from cir_jax.config import Data, Experiment, Optim, Train
from cir_jax.methods.inversion import FROZEN, SearleConfig

BATCH, EPOCHS = 256, 100
EPOCH = 100_000 // BATCH  # steps

config = Experiment(
    method=SearleConfig.paper("L/14"),
    data=(Data("imagenet", variant="searle", split="test"),),
    train=Train(
        steps=EPOCHS * EPOCH,
        batch_size=BATCH,
        seed=42,
        save_every=5 * EPOCH,
        eval_every=EPOCH,
        augment=False,
        drop_last=True,
    ),
    optim=Optim(
        lr=1e-4,
        weight_decay=0.01,
        betas=(0.9, 0.999),
        schedule="constant",
        clip_norm=None,
        decay="all",
        frozen=FROZEN,
    ),
    init={"clip": "models/clip_l14"},
    evals=("cirr/rc2/val",),
    best="recall@1",
)
