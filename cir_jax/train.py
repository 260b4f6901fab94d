"""`python -m cir_jax.train CONFIG --workdir DIR [--field value …]`: the one training loop, for every method."""

import contextlib
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from cir_jax import files, processes
from cir_jax.compilation import keep_compiled
from cir_jax.config import Experiment, load_config, packaged_configs
from cir_jax.progress import progress
from cir_jax.stopping import unstopped
from cir_jax.training.checks import check_batch, check_experiment, check_parts
from cir_jax.training.dry_run import DryRun, dry_run
from cir_jax.training.log import Log, check_finite
from cir_jax.training.workdir import prepare_workdir
from cir_jax.workspace import Workspace


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

    from cir_jax import checkpoint, sharding
    from cir_jax.training.best import Best
    from cir_jax.training.step import program
    from cir_jax.training.warm_start import warm_start

    work = Workspace()
    check_experiment(config, work)
    steps, seed = config.train.steps, config.train.seed
    mesh = sharding.make_mesh(config.mesh.fsdp, config.mesh.tensor)
    check_batch(config, mesh)
    graph, init, step, abstract = program(config, mesh)
    best = Best(config, graph, workdir, work=work)
    with checkpoint.training_states(workdir) as states:
        first = states.latest()
        log = Log(workdir / "log.jsonl", config.train.batch_size, first)
        if first:
            if processes.first():
                print(f"continuing from step {first}", file=sys.stderr)
            state = states.restore(first, abstract)
        else:
            state = init(jax.random.key(seed))
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


@dataclass(frozen=True, kw_only=True)
class Options(DryRun):
    """What the command line says beside the experiment."""

    workdir: Path | None
    """folder of the run: config.json, log.jsonl, checkpoints/, model/; a dry run needs none"""

    def __post_init__(self):
        super().__post_init__()
        if self.workdir is None and not self.dry_run:
            raise ValueError("--workdir is missing; training needs a folder for what it writes")


@dataclass(frozen=True)
class Arguments(Options):
    """Train a model.

    CONFIG is a .py file that defines `config = Experiment(…)`, or the name of a packaged one. Every field of the
    experiment can be changed behind it (`--optim.lr 1e-4`); `CONFIG --help` lists them with their values. An
    interrupted run continues from its last checkpoint when the same command is given again. The best model of the
    run ends up in WORKDIR/model. With a --limit only the first rows of each training set and the first queries of
    each benchmark take part.
    """

    config: tyro.conf.Positional[str]


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
    class Given(Experiment[type(config.method)], Options):
        pass

    fields = {field: getattr(config, field) for field in Experiment.__dataclass_fields__}
    dry = "--dry-run" in argv  # then no folder is needed
    default = Given(**fields, dry_run=dry, workdir=None if dry else tyro.MISSING)
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
    options = {field: getattr(given, field) for field in Options.__dataclass_fields__}
    arguments = Arguments(argv[0], **options)
    return with_limit(config, given.limit) if given.limit else config, arguments


def with_limit(config: Experiment, n: int) -> Experiment:
    """The experiment on the first `n` rows of each training set and the first `n` queries of each benchmark."""
    from cir_jax.data import limited_name

    evals = tuple(limited_name(name, n) for name in config.evals)
    return replace(config, train=replace(config.train, limit=n), evals=evals)


def main(argv: list[str] | None = None) -> None:
    """Train as the command line says, alone or as one of several processes."""
    config, arguments = parse(argv)
    if arguments.dry_run:
        return dry_run(config, arguments)
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
