"""`cfir_stage2` with the whole text side trained and the picture side kept, so that vectors of pictures stay valid.

The original has no such choice; its cached vectors are wrong after every step of training.

    python -m cir_jax.train cfir_pictures_kept --workdir runs/cfir_pictures_kept
"""

from dataclasses import replace

from cir_jax.config import Experiment, load_config
from cir_jax.methods.cfir import FROZEN

stage2 = load_config("cfir_stage2", Experiment)

config = replace(stage2, optim=replace(stage2.optim, undecayed=(), frozen=FROZEN["pictures"]))
