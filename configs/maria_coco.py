"""Maria's retrieval model on COCO (Liang et al. 2021, arXiv 2105.13073): sentences find pictures.

Nothing was published to compare with. From BERT's and torchvision's weights, and COCO with LXMERT's captions in
data/coco-lxmert:

    python -m cir_jax.convert resnext101_32x8d-8ba56ff5.pth bert=bert-base-uncased/ models/maria_start --method maria --tokenizer vocab.txt
    python -m cir_jax.train maria_coco --workdir runs/maria_coco

The original took 20 to 30 minutes an epoch on four GPUs. As there each quarter of a batch looks for negatives alone, every
epoch has the same batches, and two captions of one picture may be each other's negative. It keeps the epoch of the lowest
validation loss, here the best reciprocal rank is kept; and one of its processes leaves BERT's dropout on by accident.
"""

from dataclasses import replace

from cir_jax.config import Data, Experiment, Optim, Train
from cir_jax.methods.maria import FROZEN, maria

BATCH, EPOCHS, PROCESSES = 512, 25, 4
EPOCH = (
    592_000 // BATCH
)  # steps; about, for how many captions the pictures have is not written down
MODEL = maria("models/maria_start/vocab.txt")

config = Experiment(
    method=replace(MODEL, loss_parts=PROCESSES),
    data=(Data("coco-lxmert", split="train+nominival", grouped=False),),
    train=Train(
        steps=EPOCHS * EPOCH,
        batch_size=BATCH,
        seed=9595,
        log_every=100,
        save_every=EPOCH,
        eval_every=EPOCH,
        augment=False,
        crop=(0.08, 1.0),
        mirror=True,
        drop_last=True,
        reshuffle=False,
    ),
    # without decay this is Adam
    optim=Optim(
        lr=1e-3,
        weight_decay=0.0,
        betas=(0.9, 0.999),
        schedule="constant",
        clip_norm=5.0,
        frozen=FROZEN,
    ),
    init={"": "models/maria_start"},
    evals=("coco-lxmert/mscoco/minival",),
    best="mrr",
)
