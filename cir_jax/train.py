"""`python -m cir_jax.train CONFIG --workdir DIR [--field value …]`: the one training loop, for every method."""

import contextlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from cir_jax import files, processes, stopping
from cir_jax.compilation import keep_compiled
from cir_jax.config import Experiment, load_config, packaged_configs
from cir_jax.progress import progress
from cir_jax.stopping import unstopped
from cir_jax.training.checks import check_batch, check_experiment, check_parts
from cir_jax.training.dry_run import DryRun, dry_run
from cir_jax.training.profile import steps_of
from cir_jax.training.workdir import (
    change_workdir,
    check_workdir,
    prepare_workdir,
    refuse_changes,
    remove_leftovers,
)
from cir_jax.typed import portable
from cir_jax.workspace import Workspace


def train(
    config: Experiment,
    workdir: Path,
    *,
    accept_changes: bool = False,
    tensorboard: bool = False,
    profile: str = "",
) -> Path:
    """Run an experiment to its end and return the folder of its best model.

    The state is restored from the newest checkpoint of `workdir` if there is one; from then on the run repeats what
    an undisturbed one would have computed, bit for bit on the same mesh. A SIGINT or SIGTERM saves the step that is
    under way and unwinds.

    Args:
      accept_changes: go on with a run that was begun with another experiment.
      tensorboard: write event files to `workdir/tensorboard` too.
      profile: steps to trace, as `10:20`, both included, into `workdir/profile`.

    Raises:
      BlockingIOError: another run is at it.
      ValueError: what the folder holds, the experiment or the data is wrong.
      FloatingPointError: a loss is not finite.
    """
    with files.reported(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    with files.lock(workdir) if processes.first() else contextlib.nullcontext():
        if processes.first():
            remove_leftovers(workdir)
        prepare_workdir(config, workdir, accept_changes)
        return _train(config, workdir, accept_changes, tensorboard, profile)


def _train(config: Experiment, workdir: Path, accept_changes, tensorboard, profile) -> Path:
    import jax
    import numpy as np

    from cir_jax import checkpoint, sharding
    from cir_jax.training import optim
    from cir_jax.training.best import Best
    from cir_jax.training.log import Log, event_file
    from cir_jax.training.profile import Profile
    from cir_jax.training.step import program
    from cir_jax.training.warm_start import warm_start
    from cir_jax.training.watch import Watch, operations

    work = Workspace()
    check_experiment(config, work)
    steps, seed = config.train.steps, config.train.seed
    mesh = sharding.make_mesh(config.mesh.fsdp, config.mesh.tensor)
    check_batch(config, mesh)
    graph, init, step, abstract = program(config, mesh)
    learning_rate = jax.jit(optim.schedule(config.optim, steps))
    datasets = training_sets(config)
    with contextlib.ExitStack() as opened:
        enter = opened.enter_context
        states = enter(checkpoint.training_states(workdir, portable(config), config.train.keep))
        done = first = states.latest()
        shown = tensorboard and processes.first()
        events = enter(event_file(workdir / "tensorboard", first)) if shown else None
        log = Log(workdir / "log.jsonl", first, events)
        if first:
            state = restored(config, states, abstract, accept_changes)
        else:
            state = init(jax.random.key(seed))
            state = warm_start(state, config)
            states.save_frozen(state["frozen"])
        change_workdir(config, workdir)  # what differs is accepted, and the state fits
        best = Best(config, graph, workdir, work=work)
        watch = Watch(config, workdir, datasets, first, operations(config, abstract))
        trace = enter(contextlib.closing(Profile(workdir / "profile", profile)))
        batches = enter(contextlib.closing(training_batches(config, first, datasets)))
        advance = enter(progress("training", steps, first))
        enter(named_if_full(config))
        enter(stopping.together())
        if due(config.train.eval_every, first, steps) and first and not log.evaluated:
            log(first, best.consider(state, first))
        try:
            for number in range(first, steps):
                batch, rows = watch.next(batches)
                with unstopped():
                    trace.before(number + 1)
                    batch = sharding.put_batch(batch, mesh)
                    state, metrics = step(state, batch, np.int32(number))
                    done = number + 1
                    watch.add(done, metrics, rows)
                    trace.after(done, state)
                    if due(config.train.log_every, done, steps):
                        log(done, {**watch.values(done), "learning_rate": learning_rate(number)})
                    if due(config.train.save_every, done, steps):
                        watch.look()
                        states.save(done, state)
                if due(config.train.eval_every, done, steps):
                    watch.look()
                    if processes.joined() and states.latest() < done:
                        with unstopped():  # several processes cannot stop while they evaluate
                            states.save(done, state)
                    log(done, best.consider(state, done))
                    watch.restart(done)
                advance(1)
                stopping.stop_together(done)
        except BaseException as error:
            # A library may have made something else of being stopped.
            if isinstance(error, KeyboardInterrupt) or stopping.asked():
                with unstopped():
                    watch.look()
                    if states.latest() < done:
                        states.save(done, state)
            raise
    return best.publish()


def restored(config: Experiment, states, abstract, accept_changes: bool):
    """The newest state, placed as `abstract` says; ValueError if it is of another experiment, unless that is accepted."""
    step = states.latest()
    if processes.first():
        print(f"continuing from step {step}", file=sys.stderr)
    stored, place = states.saved_config(step), f"{states.folder}/{step}"
    refuse_changes(stored, config, place, accept_changes)
    return states.restore(step, abstract)


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


def training_sets(config: Experiment) -> list:
    """The training sets of an experiment."""
    from cir_jax.data import training_set
    from cir_jax.data.benchmark import first_rows

    datasets = [first_rows(training_set(data), config.train.limit) for data in config.data]
    check_parts(datasets, config)
    return datasets


def training_batches(config: Experiment, start: int, datasets: list | None = None):
    """The batches of an experiment from step `start` on, for this process."""
    import jax

    from cir_jax.data.augment import Changes
    from cir_jax.data.pipeline import train_batches

    return train_batches(
        datasets or training_sets(config),
        [data.weight for data in config.data],
        config.method.inputs,
        blocks=[data.block for data in config.data],
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        start=start,
        process=jax.process_index(),
        processes=jax.process_count(),
        changes=Changes(config.train.augment, config.train.crop, config.train.mirror),
        drop_last=config.train.drop_last,
        reshuffle=config.train.reshuffle,
        workers=config.train.workers,
        strict=not config.train.unreadable,
    )


@dataclass(frozen=True, kw_only=True)
class Options(DryRun):
    """What the command line says beside the experiment."""

    workdir: Path | None
    """folder of the run: config.json, log.jsonl, checkpoints/, model/; a dry run needs none"""
    accept_changes: bool = False
    """go on with the run in WORKDIR although it was begun with another experiment; what differs is printed"""
    tensorboard: bool = False
    """write event files to WORKDIR/tensorboard too (needs the extra [tensorboard])"""
    profile: str = ""
    """steps to trace, as 10:20, both included, into WORKDIR/profile"""

    def __post_init__(self):
        super().__post_init__()
        steps_of(self.profile)
        if self.workdir is None and not self.dry_run:
            raise ValueError("--workdir is missing; training needs a folder for what it writes")


@dataclass(frozen=True)
class Arguments(Options):
    """Train a model.

    CONFIG is a .py file that defines `config = Experiment(…)`, or the name of a packaged one. Every field of the
    experiment can be changed behind it (`--optim.lr 1e-4`); `CONFIG --help` lists them with their values. An
    interrupted run continues from its last checkpoint when the same command is given again; SIGTERM and Ctrl-C save
    one before they end it. The best model of the run ends up in WORKDIR/model. With a --limit only the first rows of each training set and the first queries of
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
    dry = bool({"--dry-run", "--dry_run"} & {*argv})  # then no folder is needed
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
    changed = check_workdir(config, workdir, arguments.accept_changes)
    if (workdir / "model").exists() and not changed:
        if processes.first():
            print(f"{workdir / 'model'} is finished; choose another --workdir to train again")
        return
    folder = train(
        config,
        workdir,
        accept_changes=arguments.accept_changes,
        tensorboard=arguments.tensorboard,
        profile=arguments.profile,
    )
    if processes.first():
        print(f"the best model is {folder}")


if __name__ == "__main__":
    from cir_jax.commands import start

    start("train")
