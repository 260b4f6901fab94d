"""Stage 1 of CFIR on AToMiC (Long et al. 2024, arXiv 2402.15276): the entities of a section find pictures.

The original trains nothing for it. Its numbers are not in its repository. From BEiT-3's weights, AToMiC in data/atomic, and
entities of its sections in data/atomic/atomic_test_entities.json:

    python -m cir_jax.convert beit3_large_itc_patch16_224.pth models/beit3_large --method cfir --tokenizer beit3.spm
    python -m cir_jax.eval cfir_stage1 --output results/cfir_stage1

The second command needs the entities once more, as a file for queries:

    cir_jax.data.atomic.write_extracts("data/atomic", "test", "data/atomic/extracts.jsonl", rows=True)

Pictures are those of all qrels. Each entity asks alone, and a picture counts with its best one. The original cuts entities to 14
pieces, which few have, and puts spaces between their letters, by an error that `letters_spaced=True` repeats.
"""

from cir_jax.config import Evaluation, Run
from cir_jax.data.documents import DocumentSpec

config = Evaluation(
    runs=(
        Run(
            "atomic/base-rows/test",
            "models/beit3_large",
            k=1000,
            documents=DocumentSpec("data/atomic/extracts.jsonl", entities=1000),
        ),
    )
)
