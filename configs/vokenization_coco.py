"""Vokenization's model on COCO (Tan & Bansal 2020, arXiv 2010.06775): every token finds a picture.

Nothing was published to compare with. From the same files as `maria_coco`:

    python -m cir_jax.convert resnext101_32x8d-8ba56ff5.pth bert=bert-base-uncased/ models/vokenization_start --method maria --variant token --tokenizer vocab.txt
    python -m cir_jax.train vokenization_coco --workdir runs/vokenization_coco

The original took 20 to 30 minutes an epoch on two GPUs; what `maria_coco` says of the rest holds here too.
"""

from dataclasses import replace

from cir_jax.config import Experiment, load_config
from cir_jax.methods.maria import vokenization

maria = load_config("maria_coco", Experiment)

BATCH, EPOCHS, PROCESSES = 256, 20, 2
EPOCH = 592_000 // BATCH  # steps, about

config = replace(
    maria,
    method=replace(vokenization("models/vokenization_start/vocab.txt"), loss_parts=PROCESSES),
    train=replace(
        maria.train, steps=EPOCHS * EPOCH, batch_size=BATCH, save_every=EPOCH, eval_every=EPOCH
    ),
    init={"": "models/vokenization_start"},
)
