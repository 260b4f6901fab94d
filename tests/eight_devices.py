"""The losses of a method on meshes of eight devices, as JSON; run by `test_large_batches.py` as a process of its own.

python tests/eight_devices.py METHOD FIELDS_OF_TRAIN_AS_JSON [MESH ...]
"""

import json
import re
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


def losses(name, options, mesh) -> tuple[list[float], list[str]]:
    """Of the first steps of a training, from parameters that do not depend on the mesh, and what it gathers.

    The latter are shapes of arrays that are put together from parts and have that of a parameter, or of a layer of it.
    """
    train = Train(STEPS, 8, **options)
    config = Experiment(METHODS[name][0].tiny(INPUTS), (), train, Optim(lr=1e-3))
    params, made = drawn(config.method).params, program(config, mesh)
    opt = optim.optimizer(config.optim, STEPS).init(params)
    state = {"params": params, "frozen": {}, "opt": opt}
    state = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), state, made.state)
    batch = sharding.put_batch(training_batch(name), mesh)
    step = made.step.lower(state, batch, np.int32(0)).compile()
    values = []
    for number in range(STEPS):
        state, metrics = step(state, batch, np.int32(number))
        values.append(float(metrics["loss"]))
    whole = [list(part) for x in jax.tree.leaves(params) for part in (x.shape, x.shape[1:])]
    gathers = re.findall(r" = \(?(.*?)\)? all-gather(?:-start)?\(", step.as_text())
    shapes = [json.loads(f"[{shape}]") for shape in re.findall(r"\[([\d,]*)\]", " ".join(gathers))]
    return values, [str(shape) for shape in shapes if len(shape) > 1 and shape in whole]


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_default_matmul_precision", "highest")
    name, fields, *shapes = sys.argv[1:]
    options = json.loads(fields)
    meshes = {"alone": sharding.make_mesh(devices=jax.devices()[:1])}
    meshes |= {shape: sharding.make_mesh(*MESHES[shape]) for shape in shapes or MESHES}
    print(json.dumps({shape: losses(name, options, mesh) for shape, mesh in meshes.items()}))
