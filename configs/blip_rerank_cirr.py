"""Stage II of Candidate-Reranking on CIRR (Liu et al. 2024, arXiv 2305.16304), behind `blip_cir_cirr`.

Of the 50 best of stage I; published for the test server, not confirmed here: R@5 81.75, R_subset@1 80.04. After stage I's
commands:

    python -m cir_jax.train blip_rerank_cirr --workdir runs/blip_rerank_cirr

The original took a bit over two days for 80 epochs on an A100 with 80 GB; the rate is 0 in epoch 80 and rises again in the 20
that follow. In validation it orders the five pictures of a subset whether they are among the 50 or not, which here only
`python -m cir_jax.eval` does; precision and noise as in `blip_rerank_fashioniq`.
"""

from dataclasses import replace

from cir_jax.config import Experiment, load_config

stage1 = load_config("blip_cir_cirr", Experiment)
fashioniq = load_config("blip_rerank_fashioniq", Experiment)

EPOCHS, PERIOD = 100, 80
EPOCH = 28_225 // fashioniq.train.batch_size  # steps

config = replace(
    fashioniq,
    method=replace(fashioniq.method, inputs=stage1.method.inputs),
    data=stage1.data,
    train=replace(fashioniq.train, steps=EPOCHS * EPOCH, save_every=EPOCH, eval_every=EPOCH),
    optim=replace(fashioniq.optim, period=PERIOD * EPOCH, hold=EPOCH),
    init={"": "models/blip", "fusion": "runs/blip_cir_cirr/model#text"},
    evals=stage1.evals,
    best=stage1.best,
    retriever="runs/blip_cir_cirr/model",
    k=50,
)
