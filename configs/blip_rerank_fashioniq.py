"""Stage II of Candidate-Reranking on FashionIQ (Liu et al. 2024, arXiv 2305.16304), behind `blip_cir_fashioniq`.

Published on the validation split, of the 100 best of stage I: R@10 51.17, R@50 73.13. After stage I's commands:

    python -m cir_jax.train blip_rerank_fashioniq --workdir runs/blip_rerank_fashioniq

The original took about a day for its 50 epochs on an A100 with 80 GB, in fp16 autocast; this is float32, and
`--method.dtype bfloat16` is faster. The parts that do not train are read with their noise, as there: dropout in stage I's text
encoder, drop-path in the picture encoder.
"""

from dataclasses import replace

from cir_jax.config import Experiment, load_config
from cir_jax.encoders.vit import VIT_B16_384
from cir_jax.methods.blip_rerank import BlipRerankConfig

stage1 = load_config("blip_cir_fashioniq", Experiment)

BATCH, EPOCHS = 16, 50
EPOCH = 18_000 // BATCH  # steps

config = replace(
    stage1,
    method=BlipRerankConfig(
        image=replace(VIT_B16_384, drop_path=0.1),
        fusion_dropout=True,
        inputs=stage1.method.inputs,
    ),
    train=replace(
        stage1.train,
        steps=EPOCHS * EPOCH,
        batch_size=BATCH,
        log_every=25,
        save_every=EPOCH,
        eval_every=EPOCH,
    ),
    optim=replace(
        stage1.optim, period=EPOCHS * EPOCH, hold=EPOCH, frozen=("image/.*", "fusion/.*")
    ),
    # Both branches begin as BLIP's text encoder, which stage I has trained further for itself.
    init={"": "models/blip", "fusion": "runs/blip_cir_fashioniq/model#text"},
    retriever="runs/blip_cir_fashioniq/model",
    k=100,
)
