"""The training loop of one run: steps, tests, log, checkpoints, and a stop at NaN."""

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from curvax.training.checkpoints import Checkpoints, NoCheckpoints
from curvax.training.experiment import Experiment
from curvax.training.runtime import distributed, run_dir
from curvax.training.runtime.preemption import Notice, Stopped
from curvax.training.runtime.run_dir import Outcome
from curvax.training.step import Measured, State, watched_names

Report = Callable[[int, Mapping[str, float]], None]
"""`report(step, metrics)`, called with the latest metrics, for a progress bar."""


class NotFinite(FloatingPointError):
    """A loss, gradient or update that is NaN or infinite; the message names step and leaf."""


def fit(
    experiment: Experiment, folder: Path | None = None, report: Report = lambda *_: None
) -> Outcome:
    """Trains to the end, starting from the newest checkpoint in the folder if there is one.

    A resumed run takes the same steps on the same batches with the same keys as an uninterrupted
    one, bit for bit. A finished run is read from its folder. With several processes, the first
    writes log and results for all.

    Args:
        experiment: the run.
        folder: of log, checkpoints and results; nothing is written without one.
        report: called after each logged or tested step.

    Raises:
        NotFinite: the loss, a gradient or an update is NaN or infinite.
        Stopped: the process was asked to terminate; its last step has been saved.
        CheckpointError: a checkpoint cannot be written or read.
    """
    if done := run_dir.outcome(folder):
        return done
    began = time.perf_counter()
    checkpoints = (
        Checkpoints(folder / "checkpoints", experiment.config.keep_checkpoints)
        if folder
        else NoCheckpoints()
    )
    with contextlib.closing(checkpoints), Notice() as notice:
        state, batches = checkpoints.resume(experiment)
        log = run_dir.Log(folder if distributed.first() else None, since=int(state.step))
        with contextlib.closing(log):
            trainer = _Trainer(experiment, log, checkpoints, report, notice)
            state = trainer.run(state, batches)
    metrics = {"steps": experiment.steps, "seconds": time.perf_counter() - began}
    metrics |= experiment.final_metrics(state)
    if distributed.first():
        run_dir.finish(folder, metrics)
    return Outcome(metrics, log.records)


@dataclass
class _Trainer:
    experiment: Experiment
    log: run_dir.Log
    checkpoints: NoCheckpoints
    report: Report
    notice: Notice
    pending: list[Measured] = field(default_factory=list)

    def run(self, state: State, batches: Any) -> State:
        experiment, config = self.experiment, self.experiment.config
        names = watched_names(state.params)
        test_every = config.test_every * experiment.steps_per_epoch
        save_every = config.checkpoint_every or experiment.steps_per_epoch
        for step in range(int(state.step) + 1, experiment.steps + 1):
            state, measured = experiment.step(state, experiment.parallelism.place(next(batches)))
            self.pending.append(measured)
            last = step == experiment.steps
            logs = step % config.log_every == 0
            stops = self.notice.given()
            tests, saves = last or step % test_every == 0, last or step % save_every == 0 or stops
            if logs or tests or saves:
                metrics = self.settle(step, names)
                if logs:
                    self.log.write(step, "train", metrics)
                if tests:
                    scores = experiment.test(state)
                    self.log.write(step, "test", scores)
                    metrics |= {f"test_{name}": value for name, value in scores.items()}
                self.report(step, metrics)
            if saves:
                self.log.flush()
                self.checkpoints.save(state, batches.get_state())
            if stops or (last and self.notice.given()):  # the signal may arrive during the test
                good = self.checkpoints.last_good()
                raise Stopped(f"the run was asked to terminate after step {step}. {good}")
        return state

    def settle(self, step: int, names: list[str]) -> dict[str, float]:
        """Fetches the measurements of all pending steps and returns the metrics of the last.

        Raises:
            NotFinite: a step met a NaN or an infinity.
        """
        measured = jax.device_get(self.pending)
        self.pending.clear()
        for number, one in enumerate(measured, start=step - len(measured) + 1):
            if not one.finite.all():
                self.stop(number, names[int(np.argmin(one.finite))], float(one.metrics["loss"]))
        return {name: float(value) for name, value in measured[-1].metrics.items()}

    def stop(self, step: int, what: str, loss: float) -> None:
        raise NotFinite(
            f"Training stopped at step {step}: {what} is NaN or infinite (loss {loss:.6g}). "
            f"{self.checkpoints.last_good()} A lower learning rate or perturbation, or "
            "`clip_by_global_norm(1.0)` before the optimiser, often cures it."
        )
