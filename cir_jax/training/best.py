"""The best model of a run by the metrics of its benchmarks."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cir_jax import files, processes, sharding
from cir_jax.checkpoint import save_model
from cir_jax.config import Experiment
from cir_jax.evaluation.runs import measure
from cir_jax.model import Model
from cir_jax.training import optim
from cir_jax.typed import portable
from cir_jax.workspace import Workspace


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
        params = sharding.gather(optim.join(state["params"], state["frozen"]))
        model = Model(self.config.method, self.graph, params)
        retriever, k = self.config.retriever, self.config.k
        results = {n: measure(model, n, retriever, k, self.work) for n in self.config.evals}
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
