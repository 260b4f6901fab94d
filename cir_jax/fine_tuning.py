"""Training a finished model further, on data of one's own."""

from collections.abc import Mapping
from dataclasses import replace

from cir_jax import checkpoint, files
from cir_jax.config import Experiment, Mesh, Optim, Train
from cir_jax.methods import METHODS
from cir_jax.model import find_model
from cir_jax.typed import from_json


def fine_tune(model: str, **changes) -> Experiment:
    """The experiment that trains a finished model further, on data of one's own.

    Method, preprocessing and vocabulary are the model's own, and training begins with its parameters. What is not given
    follows its recipe, where it has one, more carefully:
      lr: a tenth of the recipe's, without one 1e-5: what the model knows is to be bent, not replaced. The warm-up is a
        tenth of the steps, at most 100, because the optimizer knows nothing yet; then half a cosine down to zero.
      frozen, weight_decay, decay, undecayed, layer_decay, betas, epsilon, clip_norm: the recipe's. Frozen word vectors
        stay so, or words that the new data lacks would be left behind by those it has.
      augment, crop, mirror: the recipe's, without one none: `augment` is made for drawings on white, not for photographs.
      log_every, save_every, eval_every: twenty lines, ten measurements. best: "mrr", the steadiest on few queries.
      export_dtype: that of the model.

    Args:
      model: the name of a packaged model, or the folder of one that was trained or converted.
      changes: fields of `Experiment`, `Train`, `Optim` and `Mesh` by their own names. `data`, `steps` and `batch_size`
        are needed; a re-ranker with `evals` also needs its `retriever`.

    Raises:
      FileNotFoundError: no such model.
      ValueError: unknown fields, or needed ones that are missing.
    """
    method, manifest = _finished(model)
    parts = {"train": Train, "optim": Optim, "mesh": Mesh}
    part_of = {name: part for part, kind in parts.items() for name in kind.__dataclass_fields__}
    unknown = sorted(changes.keys() - part_of.keys() - Experiment.__dataclass_fields__.keys())
    missing = [] if "train" in changes else [n for n in ("steps", "batch_size") if n not in changes]
    missing += [] if "data" in changes else ["data"]
    if unknown or missing:
        known = ", ".join(sorted({*part_of, *Experiment.__dataclass_fields__}))
        raise ValueError(
            f"fine_tune: unknown {', '.join(unknown) or 'none'}, missing {', '.join(missing) or 'none'}; there are {known}"
        )
    recipe = manifest["about"].get("experiment", {})
    taught = recipe.get("train", {})
    steps = changes["train"].steps if "train" in changes else changes["steps"]
    whole = {
        "train": Train(
            steps=steps,
            batch_size=changes.get("batch_size", 1),
            log_every=max(1, steps // 20),
            save_every=max(1, steps // 10),
            eval_every=max(1, steps // 10),
            augment=taught.get("augment", False),
            crop=tuple(taught["crop"]) if taught.get("crop") else None,
            mirror=taught.get("mirror", False),
            export_dtype=manifest["dtype"],
        ),
        "optim": _gentler(recipe.get("optim", {}), steps),
        "mesh": Mesh(),
        "method": method,
        "init": {"": model},
        "best": "mrr",
    } | {name: value for name, value in changes.items() if name not in part_of}
    for name, value in changes.items():
        if name in part_of:
            whole[part_of[name]] = replace(whole[part_of[name]], **{name: value})
    return Experiment(**whole)


def _finished(model: str):
    """(config with the checkpoint's own copy of the vocabulary, manifest) of a model, without its parameters."""
    folder = find_model(model)
    manifest = files.read_manifest(folder, "checkpoint")
    if manifest["method"] not in METHODS:
        raise ValueError(
            f"{folder} holds a model of method {manifest['method']!r}; this version knows {', '.join(METHODS)}"
        )
    method = from_json(METHODS[manifest["method"]][0], manifest["config"])
    return checkpoint.with_vocabulary(method, folder), manifest


def _gentler(recipe: Mapping, steps: int) -> Optim:
    """The optimizer to train a model further that a recipe, perhaps an unknown one, has made."""
    kept = [
        "weight_decay",
        "decay",
        "undecayed",
        "layer_decay",
        "betas",
        "epsilon",
        "clip_norm",
        "frozen",
    ]
    same = from_json(Optim, {name: recipe[name] for name in kept if name in recipe})
    lr = float(f"{recipe['lr'] / 10:.3g}") if "lr" in recipe else 1e-5
    return replace(same, lr=lr, warmup=min(100, steps // 10))
