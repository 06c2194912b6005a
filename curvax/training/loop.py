"""The loop of one run: steps, tests, a log, checkpoints, and a stop at NaN."""

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
"""Told the step and the newest figures, for a progress bar."""


class NotFinite(FloatingPointError):
    """A loss, gradient or update that is NaN or infinite: the step, and what went bad first."""


def fit(
    experiment: Experiment, folder: Path | None = None, report: Report = lambda *_: None
) -> Outcome:
    """Trains to the end: from the newest checkpoint in the folder, if there is one.

    A resumed run takes the same steps on the same batches with the same keys as one that was never
    interrupted, bit for bit. A run that is done is read from its folder.

    In a run of several processes the first one writes for all.

    Raises:
        NotFinite: the loss, a gradient or an update is NaN or infinite.
        Stopped: the process was asked to terminate; the step it had come to is kept.
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
    figures = {"steps": experiment.steps, "seconds": time.perf_counter() - began}
    figures |= experiment.appraise(state)
    if distributed.first():
        run_dir.finish(folder, figures)
    return Outcome(figures, log.records)


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
            state, measured = experiment.step(state, experiment.regime.place(next(batches)))
            self.pending.append(measured)
            last = step == experiment.steps
            logs = step % config.log_every == 0
            stops = self.notice.given()
            tests, saves = last or step % test_every == 0, last or step % save_every == 0 or stops
            if logs or tests or saves:
                figures = self.settle(step, names)
                if logs:
                    self.log.write(step, "train", figures)
                if tests:
                    scores = experiment.test(state)
                    self.log.write(step, "test", scores)
                    figures |= {f"test_{name}": value for name, value in scores.items()}
                self.report(step, figures)
            if saves:
                self.log.flush()
                self.checkpoints.save(state, batches.get_state())
            if stops or (last and self.notice.given()):  # it may have come in the test
                good = self.checkpoints.last_good()
                raise Stopped(f"the run was asked to terminate after step {step}. {good}")
        return state

    def settle(self, step: int, names: list[str]) -> dict[str, float]:
        """Waits for the pending steps and returns the figures of the last.

        Raises:
            NotFinite: one of them met a NaN or an infinity.
        """
        measured = jax.device_get(self.pending)
        self.pending.clear()
        for number, one in enumerate(measured, start=step - len(measured) + 1):
            if not one.finite.all():
                self.stop(number, names[int(np.argmin(one.finite))], float(one.figures["loss"]))
        return {name: float(value) for name, value in measured[-1].figures.items()}

    def stop(self, step: int, what: str, loss: float) -> None:
        raise NotFinite(
            f"Training stopped at step {step}: {what} is NaN or infinite (loss {loss:.6g}). "
            f"{self.checkpoints.last_good()} A lower learning rate or perturbation, or "
            "`clip_by_global_norm(1.0)` before the optimiser, often cures it."
        )
