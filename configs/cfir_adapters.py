"""`cfir_stage2` with adapters and enhancers in both towers, which alone are trained.

The sizes are those that longkukuhi/MultiWay-Adapter, by the same authors, writes in its commands:

    python -m cir_jax.train cfir_adapters --workdir runs/cfir_adapters
"""

from dataclasses import replace

from cir_jax.config import Experiment, load_config
from cir_jax.encoders.beit3 import AdapterConfig
from cir_jax.methods.cfir import FROZEN

stage2 = load_config("cfir_stage2", Experiment)
# original: adapters are to begin as nothing, and are drawn again as noise
ADAPTER = AdapterConfig(("image", "text"), width=64, scale=0.6, initial="noise")

config = replace(
    stage2,
    method=replace(
        stage2.method, encoder=replace(stage2.method.encoder, adapter=ADAPTER, enhancer=128)
    ),
    optim=replace(stage2.optim, undecayed=(), frozen=FROZEN["adapters"]),
)
