"""What is refused before the first step."""

import math
import operator

from cir_jax.config import Experiment
from cir_jax.workspace import Workspace

LEAST = {  # field -> the smallest value it may have
    "train.steps": 1,
    "train.batch_size": 1,
    "train.log_every": 1,
    "train.save_every": 1,
    "train.eval_every": 1,
    "train.limit": 0,
    "train.workers": 0,
    "train.keep": 1,
    "train.unreadable": 0,
    "k": 1,
    "train.chunks": 1,
    "train.accumulate": 1,
    "optim.lr": 0,
    "optim.weight_decay": 0,
    "optim.epsilon": 0,
    "optim.warmup": 0,
    "optim.min_lr": 0,
    "optim.period": 0,
    "optim.hold": 1,
    "optim.drop_factor": 0,
    "optim.clip_norm": 0,
    "optim.layer_decay": 0,
    "mesh.fsdp": 1,
    "mesh.tensor": 1,
}


def check_numbers(config: Experiment) -> None:
    """Refuse numbers that are too small or none; every wrong one is in the message."""
    values = {name: operator.attrgetter(name)(config) for name in LEAST}
    wrong = [
        f"{name} is {value}; it must be at least {LEAST[name]}"
        for name, value in values.items()
        if value is not None and not LEAST[name] <= value < math.inf
    ]
    crop = config.train.crop
    if crop and not 0 < crop[0] <= crop[1] <= 1:
        wrong.append(f"train.crop is {crop}; expected two shares of an area, above 0 and up to 1")
    if wrong:
        raise ValueError("\n  ".join(wrong))


def check_experiment(config: Experiment, work: Workspace | None = None) -> None:
    """Refuse, before the first step, what would only fail later; `work` keeps the benchmarks that are opened."""
    from cir_jax.data.text import tokenizer
    from cir_jax.methods import METHODS, method_name, reranks
    from cir_jax.model import find_model

    work = work or Workspace()
    check_numbers(config)
    if not config.data:
        raise ValueError("data is empty; an experiment needs at least one training set")
    method = config.method
    towers = (getattr(method, name, None) for name in ("encoder", "text", "bert"))
    words, tower = tokenizer(method.inputs.text), next(filter(None, towers))
    special = METHODS[method_name(method)][1].special_rows
    if words.size + special > tower.vocabulary:
        raise ValueError(
            f"the vocabulary {method.inputs.text.vocab} has {words.size} ids and the method {special} of its own, the "
            f"text tower {tower.vocabulary} rows; set its vocabulary to {words.size + special}"
        )
    for name in config.evals:
        known = work.benchmark(name).metrics
        if config.best not in known:
            raise ValueError(f"best is {config.best!r}; {name} has {', '.join(known)}")
    if config.evals and reranks(config.method) != bool(config.retriever):
        raise ValueError(
            f"retriever is {config.retriever!r}; a re-ranker needs one, whose candidates it is measured on in `evals`, "
            "and a retriever none"
        )
    if config.retriever:
        find_model(config.retriever)


def check_batch(config: Experiment, mesh) -> None:
    """Refuse a batch that the devices cannot share evenly, and blocks that accumulation would take apart."""
    import jax

    from cir_jax import sharding

    devices, train = sharding.batch_devices(mesh), config.train
    size, parts = train.batch_size, devices * train.accumulate * train.chunks
    if size % parts:
        low = size // parts * parts
        near = f"{low} or {low + parts}" if low else f"{parts}"
        cuts = {"accumulate": train.accumulate, "chunks": train.chunks}
        times = "".join(f" times {name} {count}" for name, count in cuts.items() if count > 1)
        raise ValueError(
            f"batch_size {size} does not divide by {devices} devices "
            f"(data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}){times}; use {near}"
        )
    if train.accumulate > 1 and any(data.block > 1 for data in config.data):
        raise ValueError(
            f"accumulate is {train.accumulate}, but rows of a block are to meet as negatives, and micro-batches take "
            "them apart; set data.block or accumulate to 1 (chunks keep the batch whole)"
        )
    if jax.local_device_count() % config.mesh.tensor:
        raise ValueError(
            f"mesh tensor={config.mesh.tensor} spans processes of {jax.local_device_count()} devices each; "
            "rows of a batch would differ within it, so use a divisor of that"
        )


def check_parts(datasets, config: Experiment) -> None:
    """Refuse training sets whose queries have other parts than the method takes; a part too many would be ignored.

    Items may know more than the method reads, but not less.
    """
    from cir_jax.methods import METHODS, method_name
    from cir_jax.methods import kinds as kinds_of

    name = method_name(config.method)
    kinds = METHODS[name][1].query_kinds
    for data, dataset in zip(config.data, datasets):
        query = dataset[0]["query"] if len(dataset) else {}
        parts = {part.removesuffix("s") for part in query}  # "texts" offers several texts
        if query and parts not in kinds:
            found, wanted = " and ".join(sorted(parts)), [" and ".join(sorted(k)) for k in kinds]
            raise ValueError(
                f"the queries of {data.root or data.name} consist of {found}; {name} takes {', or '.join(wanted)}"
            )
        needed, item = kinds_of(config.method, "item")[0], dataset[0]["item"] if query else {}
        if "image" not in parts and hasattr(METHODS[name][1], "training_item"):
            needed = METHODS[name][1].training_item(config.method)
        if query and needed - item.keys():
            raise ValueError(
                f"the items of {data.root or data.name} have {' and '.join(sorted(item))}; {name} needs "
                f"{' and '.join(sorted(needed))}"
            )
