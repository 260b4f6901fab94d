"""`cfir_stage2` with adapters and enhancers in both towers, and everything trained (`--ffn_adapt --fulltune`):

python -m cir_jax.train cfir_adapters_all --workdir runs/cfir_adapters_all
"""

from dataclasses import replace

from cir_jax.config import Experiment, load_config

adapters = load_config("cfir_adapters", Experiment)

config = replace(adapters, optim=load_config("cfir_stage2", Experiment).optim)
