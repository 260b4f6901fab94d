"""The losses of every method on meshes of eight devices, as JSON; run by `test_large_batches.py` as a process of its own."""

import json
import sys

import jax
import numpy as np
from test_methods import INPUTS, drawn, training_batch

from cir_jax import sharding
from cir_jax.config import Experiment, Optim, Train
from cir_jax.methods import METHODS
from cir_jax.training import optim
from cir_jax.training.step import program

MESHES = {"8x1x1": (1, 1), "1x8x1": (8, 1), "4x2x1": (2, 1), "2x2x2": (2, 2)}
STEPS = 3


def losses(name, mesh) -> list[float]:
    """Of the first steps of a training, from parameters that do not depend on the mesh."""
    config = Experiment(METHODS[name][0].tiny(INPUTS), (), Train(STEPS, 8), Optim(lr=1e-3))
    params, made = drawn(config.method).params, program(config, mesh)
    opt = optim.optimizer(config.optim, STEPS).init(params)
    state = {"params": params, "frozen": {}, "opt": opt}
    state = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), state, made.state)
    batch, values = sharding.put_batch(training_batch(name), mesh), []
    for number in range(STEPS):
        state, metrics = made.step(state, batch, np.int32(number))
        values.append(float(metrics["loss"]))
    return values


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_disable_most_optimizations", True)
    found = {}
    for name in sys.argv[1:]:
        alone = sharding.make_mesh(devices=jax.devices()[:1])
        meshes = {shape: sharding.make_mesh(*sizes) for shape, sizes in MESHES.items()}
        found[name] = {s: losses(name, mesh) for s, mesh in {"alone": alone, **meshes}.items()}
    print(json.dumps(found))
