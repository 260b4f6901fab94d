"""Stage I of Candidate-Reranking on CIRR (Liu et al. 2024, arXiv 2305.16304).

On the validation split R@1 46.83, R@5 78.95, R@10 88.04, R@50 97.08. From BLIP's `model_base.pth`, BERT's `vocab.txt` and
CIRR in data/cirr:

    python -m cir_jax.convert model_base.pth models/blip --method blip_cir --variant 384 --tokenizer vocab.txt
    python -m cir_jax.train blip_cir_cirr --workdir runs/blip_cir_cirr

The original took about 4 minutes an epoch on an A100, in fp16 autocast; this is float32, and `--method.dtype bfloat16` is
faster. Its learning rate is 0 in epochs 10 and 30 and rises to its first value between them.
"""

from dataclasses import replace

from cir_jax.config import Data, Experiment, load_config

fashioniq = load_config("blip_cir_fashioniq", Experiment)
inputs = fashioniq.method.inputs

EPOCHS, PERIOD = 40, 10
EPOCH = 28_225 // fashioniq.train.batch_size  # steps

config = replace(
    fashioniq,
    # of the validation and test texts the longest has 63 tokens
    method=replace(fashioniq.method, inputs=replace(inputs, text=replace(inputs.text, length=96))),
    data=(Data("cirr", grouped=False),),
    train=replace(fashioniq.train, steps=EPOCHS * EPOCH, save_every=EPOCH, eval_every=EPOCH),
    optim=replace(fashioniq.optim, period=PERIOD * EPOCH, hold=EPOCH),
    evals=("cirr/rc2/val",),
    best="mean(recall@5,subset_recall@1)",
)
