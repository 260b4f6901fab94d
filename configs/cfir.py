"""Both stages of CFIR on AToMiC: what entities found is ordered by the model of `cfir_stage2`, whom the summary asks.

After the commands of `cfir_stage1` and `cfir_stage2`; the extracts hold the summaries too:

    python -m cir_jax.eval cfir --output results/cfir
"""

from dataclasses import replace

from cir_jax.config import Evaluation, load_config

(stage1,) = load_config("cfir_stage1", Evaluation).runs

config = Evaluation(runs=(replace(stage1, reranker="runs/cfir_stage2/model", restricted=True),))
