"""REACT's locked-text tuning of CLIP B/32 (Liu et al. 2023, arXiv 2301.07094): only the picture tower learns.

On pairs that `python -m cir_jax.collect` found, as shards in data/react; published for ImageNet's classes, which are no benchmark
here:

    python -m cir_jax.convert ViT-B-32.pt models/clip_b32 --method clip
    python -m cir_jax.train clip_locked_text --workdir runs/clip_locked_text

REACT's own rate, batch and length were not at hand; everything but the frozen tower is `clip_cc3m`'s.
"""

from dataclasses import replace

from cir_jax.config import Data, Experiment, load_config

full = load_config("clip_cc3m", Experiment)

config = replace(
    full,
    data=(Data("captioned", root="data/react/*.tar", grouped=False),),
    optim=replace(full.optim, frozen=("text/.*",)),
)
