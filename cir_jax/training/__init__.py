"""The parts of `cir_jax.train`: optimiser, step, log, checks, the best model, the folder of a run."""
