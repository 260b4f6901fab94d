"""Stage I of Candidate-Reranking on FashionIQ (Liu et al. 2024, arXiv 2305.16304).

Published on the validation split, mean of three categories: R@10 46.15, R@50 69.15. From BLIP's `model_base.pth`, BERT's
`vocab.txt` and FashionIQ in data/fashioniq:

    python -m cir_jax.convert model_base.pth models/blip --method blip_cir --variant 384 --tokenizer vocab.txt
    python -m cir_jax.train blip_cir_fashioniq --workdir runs/blip_cir_fashioniq

The original computes the text side in fp16 autocast; this is float32, and `--method.dtype bfloat16` is faster. It states no
time for FashionIQ; CIRR took 4 minutes an epoch on an A100. Which of its two captions it shows, it leaves to chance.
"""

from cir_jax.config import Data, Experiment, Optim, Train
from cir_jax.data.images import ImageSpec
from cir_jax.data.inputs import Inputs
from cir_jax.data.text import TextSpec
from cir_jax.methods.blip_cir import BlipCirConfig

BATCH, EPOCHS = 512, 20
EPOCH = 18_000 // BATCH  # steps

config = Experiment(
    method=BlipCirConfig(
        inputs=Inputs(
            ImageSpec(384, "targetpad", convert_first=False),
            TextSpec("wordpiece", "models/blip/vocab.txt", length=48),  # the longest has 38
        ),
    ),
    data=(Data("fashioniq", grouped=False),),
    train=Train(
        steps=EPOCHS * EPOCH,
        batch_size=BATCH,
        log_every=5,
        save_every=EPOCH,
        eval_every=EPOCH,
        augment=False,
        drop_last=True,
    ),
    optim=Optim(
        lr=2e-5,
        weight_decay=0.05,
        betas=(0.9, 0.999),
        period=EPOCHS * EPOCH,
        hold=EPOCH,
        clip_norm=None,
        decay="all",
        # original: the projection of pictures may train, but gets no gradient
        frozen=("image/.*", "image_project/.*"),
    ),
    init={"": "models/blip"},
    evals=("fashioniq/dress/val", "fashioniq/shirt/val", "fashioniq/toptee/val"),
    best="mean(recall@10,recall@50)",
)
