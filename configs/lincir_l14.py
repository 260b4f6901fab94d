"""LinCIR on CLIP L/14 (Gu et al. 2024, arXiv 2312.01998), which trains on captions alone.

FashionIQ's validation split: R@10 26.28, R@50 46.49; CIRR's test split: R@1 25.04. From CLIP's weights, captions with their key
words (`cir_jax.data.lincir.write_keys` makes the table from three corpora of the Hugging Face hub), and CIRR to choose by:

    python -m cir_jax.convert ViT-L-14.pt models/clip_l14 --method clip
    python -m cir_jax.train lincir_l14 --workdir runs/lincir_l14

The paper trains the largest CLIP in 48 minutes on eight A100, in fp16; this is float32, and `--method.dtype bfloat16` is faster.
"""

from cir_jax.config import Data, Experiment, Optim, Train
from cir_jax.methods.inversion import FROZEN, LinCirConfig

config = Experiment(
    method=LinCirConfig.paper("L/14"),
    data=(Data("captions", root="data/lincir/captions.jsonl"),),
    train=Train(
        steps=20_000,
        batch_size=512,
        seed=12345,
        save_every=1000,
        eval_every=1000,
        augment=False,
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
