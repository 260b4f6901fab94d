"""`python -m cir_jax.bench`: speed and memory beside PyTorch, on the machine at hand."""
