"""`python -m cir_jax.train CONFIG --workdir DIR [--field value …]`: the one training loop, for every method."""

import contextlib
import json
import math
import operator
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import tyro

from cir_jax import files, processes
from cir_jax.commands import Limited
from cir_jax.compilation import keep_compiled
from cir_jax.config import Experiment, load_config, packaged_configs
from cir_jax.progress import progress
from cir_jax.stopping import unstopped
from cir_jax.typed import from_json, portable
from cir_jax.workspace import Workspace


class Log:
    """JSON lines in a file and one readable line per record on stdout, from process 0 only."""

    def __init__(self, path: Path, rows_per_step: int, first: int = 0):
        """Go on behind step `first`; what an interrupted run logged after it will be logged again."""
        self.path, self.rows_per_step = path, rows_per_step
        self.start, self.last = time.monotonic(), None
        if processes.first() and path.exists():
            with files.write_atomically(path) as part:
                part.write_text("".join(_records_until(path, first)))

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Write one record; a record with a loss also gets the rows per second since the one before."""
        if not processes.first():
            return
        now = time.monotonic()
        record = {"step": step, "seconds": round(now - self.start, 1)}
        record |= {name: float(f"{float(value):.6g}") for name, value in values.items()}
        if "loss" in values:
            if self.last:
                record["rows_per_second"] = round(
                    (step - self.last[0]) * self.rows_per_step / (now - self.last[1]), 1
                )
            self.last = (step, now)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print("  ".join(f"{name} {value:.5g}" for name, value in record.items()), flush=True)


def _records_until(path: Path, step: int) -> Iterator[str]:
    """The lines of a log up to a step; a line that was cut off is none."""
    for line in path.read_text().splitlines(keepends=True):
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= step:
                yield line


def make_step(graph, tx, seed: int) -> Callable:
    """The pure training step `(state, batch, number) -> (state, metrics)`."""
    import jax
    import optax
    from flax import nnx

    from cir_jax import optim

    def step(state, batch, number):
        key = jax.random.fold_in(jax.random.key(seed), number)

        def loss(params):
            return nnx.merge(graph, optim.join(params, state["frozen"])).loss(batch, key)

        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state["params"])
        updates, opt = tx.update(grads, state["opt"], state["params"])
        metrics |= {"loss": value, "grad_norm": optax.tree.norm(grads)}
        return {
            **state,
            "params": optax.apply_updates(state["params"], updates),
            "opt": opt,
        }, metrics

    return step


def make_init(config: Experiment, tx) -> Callable:
    """`key -> state`: random parameters, split into trained and frozen, and the optimizer's state."""
    from flax import nnx

    from cir_jax import methods, optim

    def init(key):
        params = nnx.to_pure_dict(nnx.state(methods.build(config.method, nnx.Rngs(key))))
        trained, frozen = optim.split_frozen(params, config.optim.frozen)
        return {"params": trained, "frozen": frozen, "opt": tx.init(trained)}

    return init


LEAST = {  # field -> the smallest value it may have
    "train.steps": 1,
    "train.batch_size": 1,
    "train.log_every": 1,
    "train.save_every": 1,
    "train.eval_every": 1,
    "train.limit": 0,
    "train.workers": 0,
    "optim.lr": 0,
    "optim.weight_decay": 0,
    "optim.warmup": 0,
    "optim.clip_norm": 0,
    "mesh.fsdp": 1,
    "mesh.tensor": 1,
}


def check_numbers(config: Experiment) -> None:
    """Refuse numbers that are too small or none; every wrong one is in the message."""
    values = {name: operator.attrgetter(name)(config) for name in LEAST}
    wrong = [
        f"{name} is {value}; it must be at least {LEAST[name]}"
        for name, value in values.items()
        if not LEAST[name] <= value < math.inf
    ]
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
    """Refuse a batch that the devices cannot share evenly."""
    import jax

    from cir_jax import sharding

    devices, size = sharding.batch_devices(mesh), config.train.batch_size
    if size % devices:
        low = size // devices * devices
        near = f"{low} or {low + devices}" if low else f"{devices}"
        raise ValueError(
            f"batch_size {size} does not divide by {devices} devices "
            f"(data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}); use {near}"
        )
    if jax.local_device_count() % config.mesh.tensor:
        raise ValueError(
            f"mesh tensor={config.mesh.tensor} spans processes of {jax.local_device_count()} devices each; "
            "rows of a batch would differ within it, so use a divisor of that"
        )


@dataclass
class Best:
    """Evaluates states during a run and keeps the best one as a model in `WORKDIR/best-STEP`."""

    config: Experiment
    graph: object
    workdir: Path
    score: float = field(default=float("-inf"))
    work: Workspace = field(default_factory=Workspace)

    def __post_init__(self):
        for folder in self.kept():
            about = files.read_manifest(folder, "checkpoint")["about"]
            faults = files.field_faults(about, {"score": "a finite number"}, "about")
            files.refuse_manifest(folder, "checkpoint", faults)
            self.score = about["score"]

    def kept(self) -> list[Path]:
        """Whole models of this run, oldest first; one whose removal was interrupted is none."""
        return sorted(p.parent for p in self.workdir.glob(f"best-*/{files.MANIFEST}"))

    def _remove(self, folder: Path) -> None:
        # The manifest goes first: without it the rest is no model any more, whenever the removal stops.
        (folder / files.MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)

    def consider(self, state, step: int) -> dict[str, float]:
        """Metrics of a state on every benchmark of `evals`; the state is kept if their mean is the best so far."""
        import numpy as np

        from cir_jax import optim, sharding
        from cir_jax.checkpoint import save_model
        from cir_jax.model import Model
        from cir_jax.runs import measure

        params = sharding.gather(optim.join(state["params"], state["frozen"]))
        model = Model(self.config.method, self.graph, params)
        retriever = self.config.retriever
        results = {n: measure(model, n, retriever, work=self.work) for n in self.config.evals}
        score = (
            float(np.mean([r[self.config.best] for r in results.values()]))
            if results
            else float(step)
        )
        metrics = {
            f"{name}/{metric}": value for name, r in results.items() for metric, value in r.items()
        }
        if score > self.score and processes.first():
            about = {
                "step": step,
                "score": score,
                "metrics": metrics,
                "experiment": portable(self.config),
            }
            folder, worse = self.workdir / f"best-{step:07d}", self.kept()
            if folder.exists():  # saved before an interruption, whose checkpoint was not
                self._remove(folder)
            save_model(
                folder,
                self.config.method,
                params,
                dtype=self.config.train.export_dtype,
                about=about,
            )
            for old in worse:
                if old != folder:
                    self._remove(old)
            self.score = score
        return metrics

    def publish(self) -> Path:
        """Give the best model its final name."""
        folder = self.workdir / "model"
        if processes.first():
            if not self.kept():
                raise ValueError(
                    f"the run in {self.workdir.absolute()} is finished and its model was moved away; choose another "
                    "--workdir to train again"
                )
            self.kept()[-1].rename(folder)
        return folder


def train(config: Experiment, workdir: Path) -> Path:
    """Run an experiment to its end and return the folder of its best model.

    The state is restored from the newest checkpoint of `workdir` if there is one; from then on the run repeats what
    an undisturbed one would have computed, bit for bit on the same mesh. BlockingIOError if another run is at it.
    """
    with files.reported(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    with files.lock(workdir) if processes.first() else contextlib.nullcontext():
        # What a run left that was killed while it wrote.
        for leftover in workdir.glob(f"{files.TEMPORARY}*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        prepare_workdir(config, workdir)  # once more, now that nobody else writes
        return _train(config, workdir)


def _train(config: Experiment, workdir: Path) -> Path:
    import jax
    import numpy as np

    from cir_jax import checkpoint, optim, sharding
    from cir_jax.warm_start import warm_start

    work = Workspace()
    check_experiment(config, work)
    steps, seed = config.train.steps, config.train.seed
    mesh = sharding.make_mesh(config.mesh.fsdp, config.mesh.tensor)
    check_batch(config, mesh)
    graph, _ = checkpoint.abstract_params(config.method)
    tx = optim.optimizer(config.optim, steps)
    init = make_init(config, tx)
    abstract = jax.eval_shape(init, jax.random.key(seed))
    places = sharding.shardings(abstract, mesh)
    step = jax.jit(
        make_step(graph, tx, seed),
        donate_argnums=0,
        out_shardings=(places, sharding.replicated(mesh)),
    )
    best = Best(config, graph, workdir, work=work)
    with checkpoint.training_states(workdir) as states:
        first = states.latest()
        log = Log(workdir / "log.jsonl", config.train.batch_size, first)
        if first:
            if processes.first():
                print(f"continuing from step {first}", file=sys.stderr)
            state = states.restore(first, sharding.placed(abstract, places))
        else:
            state = jax.jit(init, out_shardings=places)(jax.random.key(seed))
            state = warm_start(state, config)
        with (
            contextlib.closing(training_batches(config, first)) as batches,
            progress("training", steps, first) as advance,
            named_if_full(config),
        ):
            for number in range(first, steps):
                state, metrics = step(
                    state, sharding.put_batch(next(batches), mesh), np.int32(number)
                )
                done = number + 1
                if due(config.train.log_every, done, steps):
                    log(done, check_finite(jax.device_get(metrics), done))
                if due(config.train.eval_every, done, steps):
                    log(done, best.consider(state, done))
                if due(config.train.save_every, done, steps):
                    with unstopped():
                        states.save(done, state)
                advance(1)
    return best.publish()


@contextlib.contextmanager
def named_if_full(config: Experiment):
    """MemoryError that says what to change, where the devices cannot hold a step."""
    import jax

    from cir_jax import memory

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not memory.full(error):
            raise
        raise MemoryError(
            f"a step with batch_size {config.train.batch_size} does not fit {memory.devices()}; lower "
            "train.batch_size, set method.remat to true, or share the parameters among more devices (mesh.fsdp)"
        ) from None


def due(every: int, done: int, steps: int) -> bool:
    """True after every so many steps, and after the last."""
    return done == steps or done % every == 0


def training_batches(config: Experiment, start: int):
    """The batches of an experiment from step `start` on, for this process."""
    import jax

    from cir_jax.data import training_set
    from cir_jax.data.benchmark import first_rows
    from cir_jax.data.pipeline import train_batches

    datasets = [first_rows(training_set(data), config.train.limit) for data in config.data]
    check_parts(datasets, config)
    return train_batches(
        datasets,
        [data.weight for data in config.data],
        config.method.inputs,
        blocks=[data.block for data in config.data],
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        start=start,
        process=jax.process_index(),
        processes=jax.process_count(),
        augmented=config.train.augment,
        workers=config.train.workers,
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
        if query and needed - item.keys():
            raise ValueError(
                f"the items of {data.root or data.name} have {' and '.join(sorted(item))}; {name} needs "
                f"{' and '.join(sorted(needed))}"
            )


def check_finite(metrics: Mapping, step: int) -> Mapping:
    """The metrics, or an error if the loss is NaN or infinite."""
    if not abs(float(metrics["loss"])) < float("inf"):
        raise FloatingPointError(
            f"the loss is {metrics['loss']} at step {step}; lower optim.lr or raise optim.warmup"
        )
    return metrics


def prepare_workdir(config: Experiment, workdir: Path) -> None:
    """Make the folder of a run, or check that it belongs to the same experiment and data."""
    if workdir.exists() and not workdir.is_dir():
        raise FileExistsError(f"{workdir.absolute()} is a file; choose another --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    path, value = workdir / "config.json", portable(config)
    check_tables(config, workdir / "tables.json")
    if not path.exists():
        files.write_json(path, value)
        return
    before = _completed(files.read_json(path), config)
    if before != value:
        changed = ", ".join(differences(before, value))
        raise ValueError(
            f"{workdir} holds a run of another experiment (different: {changed}); "
            "choose another --workdir, or give the values it began with"
        )


def check_tables(config: Experiment, path: Path) -> None:
    """Remember the checksums of own tables and of packed data sets beside a run.

    ValueError if it was begun when they held something else.
    """
    roots = [data.root for data in config.data]
    # The manifest of a packed one has the checksums of the rest.
    places = [(root, place) for root in roots for place in (root, f"{root}/{files.MANIFEST}")]
    sums = {root: files.sha256(place) for root, place in places if root and os.path.isfile(place)}
    before = files.read_json(path) if path.exists() else {}
    changed = [root for root in sums if before.get(root, sums[root]) != sums[root]]
    if changed:
        raise ValueError(
            f"{path.parent} was begun with other contents of {', '.join(changed)}; choose another --workdir"
        )
    if before != sums:
        files.write_json(path, sums)


def _completed(stored, config: Experiment):
    """A stored experiment with the defaults of fields that are younger than it; as it is if it is of another kind."""
    try:
        return portable(from_json(Experiment[type(config.method)], stored))
    except ValueError:
        return stored


def differences(a, b, path: str = "") -> list[str]:
    """Dotted names of the fields in which two JSON values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            d
            for k in sorted(a.keys() | b.keys())
            for d in differences(a.get(k), b.get(k), f"{path}.{k}".strip("."))
        ]
    return [] if a == b else [path]


@dataclass(frozen=True)
class Arguments(Limited):
    """Train a model.

    CONFIG is a .py file that defines `config = Experiment(…)`, or the name of a packaged one. Every field of the
    experiment can be changed behind it (`--optim.lr 1e-4`); `CONFIG --help` lists them with their values. An
    interrupted run continues from its last checkpoint when the same command is given again. The best model of the
    run ends up in WORKDIR/model. With a --limit only the first rows of each training set and the first queries of
    each benchmark take part.
    """

    config: tyro.conf.Positional[str]
    workdir: Path
    """folder of the run: config.json, log.jsonl, checkpoints/, model/"""


def parse(argv: list[str] | None) -> tuple[Experiment, Arguments]:
    """The experiment with its overrides, and the arguments that are none of its fields."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0].startswith("-"):
        tyro.cli(Arguments, args=argv, prog="python -m cir_jax.train")
        raise SystemExit(
            f"CONFIG comes first: a .py file or one of {', '.join(packaged_configs())}"
        )
    config = load_config(argv[0], Experiment)

    @dataclass(frozen=True, kw_only=True)
    class Given(Experiment[type(config.method)], Limited):
        workdir: Path
        """folder of the run: config.json, log.jsonl, checkpoints/, model/"""

    fields = {field: getattr(config, field) for field in Experiment.__dataclass_fields__}
    default = Given(**fields, workdir=tyro.MISSING)
    prog = f"python -m cir_jax.train {argv[0]}"
    about = f"{Arguments.__doc__}\n{Experiment.__doc__}"
    # Where a field may be one of several classes, the config has chosen: no sub-command on the command line.
    given = tyro.cli(
        Given,
        args=argv[1:],
        prog=prog,
        default=default,
        description=about,
        config=(tyro.conf.AvoidSubcommands,),
    )
    config = Experiment(**{field: getattr(given, field) for field in fields})
    arguments = Arguments(argv[0], given.workdir, cache=given.cache, limit=given.limit)
    return with_limit(config, given.limit) if given.limit else config, arguments


def with_limit(config: Experiment, n: int) -> Experiment:
    """The experiment on the first `n` rows of each training set and the first `n` queries of each benchmark."""
    from cir_jax.data import limited_name

    evals = tuple(limited_name(name, n) for name in config.evals)
    return replace(config, train=replace(config.train, limit=n), evals=evals)


def main(argv: list[str] | None = None) -> None:
    """Train as the command line says, alone or as one of several processes."""
    config, arguments = parse(argv)
    workdir = arguments.workdir
    processes.join()
    keep_compiled(arguments.cache)
    prepare_workdir(config, workdir)
    if (workdir / "model").exists():
        if processes.first():
            print(f"{workdir / 'model'} is finished; choose another --workdir to train again")
        return
    folder = train(config, workdir)
    if processes.first():
        print(f"the best model is {folder}")


if __name__ == "__main__":
    from cir_jax.commands import start

    start("train")
