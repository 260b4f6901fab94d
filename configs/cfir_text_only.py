"""`cfir_stage2` with only what the original's `--tune_text_only` trains: the table of words and the text's feed-forward halves.

python -m cir_jax.train cfir_text_only --workdir runs/cfir_text_only
"""

from dataclasses import replace

from cir_jax.config import Experiment, load_config
from cir_jax.methods.cfir import FROZEN

stage2 = load_config("cfir_stage2", Experiment)

config = replace(stage2, optim=replace(stage2.optim, undecayed=(), frozen=FROZEN["text_by_name"]))
