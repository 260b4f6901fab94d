"""Stage 2 of CFIR on AToMiC (Long et al. 2024, arXiv 2402.15276): BEiT-3 large trained on summaries, everything of it.

Its numbers are not in its repository. From BEiT-3's weights, AToMiC in data/atomic, and a summary of each section (BART's, in
the original) in data/atomic/atomic_train_summaries.json:

    python -m cir_jax.convert beit3_large_itc_patch16_224.pth models/beit3_large --method cfir --tokenizer beit3.spm
    python -m cir_jax.train cfir_stage2 --workdir runs/cfir_stage2
    python -m cir_jax.eval cfir --output results/cfir

The original took four A6000 with 48 GB, 128 rows on each, in fp16; this is float32, and `--method.dtype bfloat16` is faster.
Its command cannot run as released, and its validation compares rows of two kinds; here it is the mean reciprocal rank on the
validation split. Other choices of what trains: `cfir_adapters`, `cfir_adapters_all`, `cfir_text_only`, `cfir_pictures_kept`.
"""

from dataclasses import replace

from cir_jax.config import Data, Experiment, Optim, Train
from cir_jax.data.images import ImageSpec
from cir_jax.data.inputs import Inputs
from cir_jax.data.text import TextSpec
from cir_jax.encoders.beit3 import BEIT3_LARGE
from cir_jax.methods.cfir import CfirConfig

BATCH, EPOCHS, WARMUP = 4 * 128, 30, 3
EPOCH = 4_401_903 // BATCH  # steps

config = Experiment(
    method=CfirConfig(
        replace(BEIT3_LARGE, drop_path=0.2),
        inputs=Inputs(
            ImageSpec(224, "squash", mean=(0.5,) * 3, std=(0.5,) * 3),
            TextSpec("sentencepiece", "models/beit3_large/beit3.spm", length=64),
        ),
    ),
    data=(Data("atomic", variant="summaries", grouped=False),),
    train=Train(
        steps=EPOCHS * EPOCH,
        batch_size=BATCH,
        seed=42,
        log_every=20,
        save_every=EPOCH,
        eval_every=EPOCH,
        augment=False,
        crop=(0.5, 1.0),
        mirror=True,
        drop_last=True,
    ),
    optim=Optim(
        lr=2e-4,
        weight_decay=0.05,
        betas=(0.9, 0.999),
        warmup=WARMUP * EPOCH,
        warmup_includes="both",
        min_lr=1e-6,
        clip_norm=None,
        # original: the positions of pictures do not decay, those of texts do
        undecayed=("image/expert/positions",),
        layer_decay=0.65,
    ),
    init={"": "models/beit3_large"},
    evals=("atomic/small-rows/val",),
    best="mrr@10",
)
