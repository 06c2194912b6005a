"""Checkpoints of a run, by Orbax: state and position in the data, written whole or not at all."""

import errno
import shutil
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from curvax.arithmetic.trees import Tree, names
from curvax.pipes import diagnostics
from curvax.pipes.state_keys import is_key
from curvax.training.experiment import Experiment
from curvax.training.runtime import checksums, distributed
from curvax.training.runtime.log_filters import silent_log
from curvax.training.step import State

_OWN_FILES = 2**18  # bytes for Orbax's own files; 1.5e5 were measured with a small model


class CheckpointError(OSError):
    """A checkpoint that could not be written or read; other checkpoints are unchanged."""


class _DiskFull(OSError):
    """Too little room to begin a checkpoint."""


class NoCheckpoints:
    """The interface of `Checkpoints`, for a run that keeps none."""

    def resume(self, experiment: Experiment) -> tuple[State, Any]:
        """The state and the batches to start from."""
        return experiment.init(), experiment.batches()

    def save(self, state: State, place: Any) -> None:
        pass

    def last_good(self) -> str:
        return "No checkpoint was kept."

    def close(self) -> None:
        pass


class Checkpoints(NoCheckpoints):
    """The newest `keep` checkpoints of a run, by step.

    Checkpoints are written synchronously, so that a full disk is reported at the step that met it,
    and donated buffers are not read after the next step has started. With `read_only` the run may
    still be training. Empty arrays, which Orbax refuses, are left out and created on restoring.
    """

    def __init__(self, folder: Path, keep: int = 2, *, read_only: bool = False):
        self.folder = folder.absolute()
        with silent_log():
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                enable_async_checkpointing=False,
                cleanup_tmp_directories=not read_only,
                create=not read_only,
                read_only=read_only,
            )
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def resume(self, experiment: Experiment) -> tuple[State, Any]:
        """State and batches of the newest checkpoint, or those of step 0, which are then saved.

        Raises:
            CheckpointError: as in `save` and `restore`.
        """
        batches = experiment.batches()
        if self._manager.latest_step() is None:
            state = experiment.init()
            self.save(state, batches.get_state())
        else:
            state, place = self.restore(experiment.shapes)
            batches.set_state(place)
        return state, batches

    def save(self, state: State, place: Any) -> None:
        """Writes the state and the position in the data, a JSON value.

        Raises:
            CheckpointError: the disk is full or not writable, or Orbax cannot store a leaf.
            JaxRuntimeError: a device or another process failed.
        """
        step = int(state.step)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(_without_empty(state)),
            place=ocp.args.JsonSave({"data": place}),
        )
        try:
            _refuse_shared_names(state)
            _check_room(self.folder, state)
            with silent_log():
                self._manager.save(step, args=items)
            if distributed.first():
                checksums.seal(self.folder / str(step))
        except jax.errors.JaxRuntimeError:
            raise
        except Exception as error:
            for unfinished in self.folder.glob(f"{step}.*-tmp*"):
                shutil.rmtree(unfinished, ignore_errors=True)
            raise CheckpointError(
                f"The checkpoint of step {step} could not be written to {self.folder} "
                f"({_reason(error)}). {self.last_good(but=step)} {_cure(error)}"
            ) from error

    def restore(self, shapes: State) -> tuple[State, Any]:
        """The newest state, and the position in the data.

        The checkpoint may have been written under another parallelism, on other devices or by
        another number of processes. Two older formats are read too: typed random keys in the
        optimiser's state, and NaN for diagnostics that were not measured.

        Args:
            shapes: shapes, dtypes and shardings of the state.

        Raises:
            CheckpointError: there is none, it is damaged, or it belongs to another model or
                optimiser.
            JaxRuntimeError: as in `save`.
        """
        step = self._manager.latest_step()
        try:
            checksums.check(self.folder / str(step))  # before Orbax, whose threads print tracebacks
            with silent_log():
                state, place = self._read(step, shapes)
        except jax.errors.JaxRuntimeError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"The checkpoint of step {step} in {self.folder} cannot be read "
                f"({_reason(error)}). Nothing was changed. {self.last_good(but=step)} To resume "
                f"from it, move the folder {step} away and try again."
            ) from error
        return jax.tree.map(_as_asked, shapes, state), place

    def _read(self, step: int | None, shapes: State) -> tuple[State, Any]:
        try:
            return self._read_as(step, shapes)
        except ValueError as error:
            if ".measured" not in str(error):
                raise
            state, place = self._read_as(step, diagnostics.unflagged(shapes))
            return diagnostics.flagged(state, shapes), place

    def _read_as(self, step: int | None, shapes: State) -> tuple[State, Any]:
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(_without_empty(shapes)), place=ocp.args.JsonRestore()
        )
        restored = self._manager.restore(step, args=items)
        return restored.state, restored.place["data"]

    def last_good(self, but: int | None = None) -> str:
        """A sentence that names the newest checkpoint, except that of step `but`."""
        steps = [step for step in self._manager.all_steps() if step != but]
        if not steps:
            return "There is no other checkpoint."
        return f"The newest good checkpoint is that of step {max(steps)} in {self.folder}."

    def close(self) -> None:
        self._manager.close()


def _check_room(folder: Path, state: State) -> None:
    """Checks the free space first, since Orbax's writing threads print tracebacks when they fail.

    Raises:
        OSError: the disk has less room than the state and Orbax's own files take.
    """
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _OWN_FILES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise _DiskFull(f"the disk is full: it needs {needed} bytes and {free} are free")


def _refuse_shared_names(state: Tree) -> None:
    """Refuses leaves whose names coincide for Orbax, which joins path components by dots.

    Orbax would store only one of them, silently.

    Raises:
        ValueError: two leaves have the same name.
    """
    found = Counter(".".join(names(path)) for path, _ in jax.tree.leaves_with_path(state))
    shared = [name for name, times in found.items() if times > 1]
    if shared:
        raise ValueError(f"{found[shared[0]]} leaves of the state are named `{shared[0]}` by Orbax")


def _without_empty(state: Tree) -> Tree:
    """The state, or its shapes, with None for empty arrays."""
    return jax.tree.map(lambda x: None if _is_empty(x) else x, state)


def _is_empty(x: Any) -> bool:
    return 0 in x.shape and not is_key(x)


def _as_asked(shape: jax.ShapeDtypeStruct, x: Any) -> jax.Array:
    """A restored leaf in the form of `shape`: an empty array, or a key as its raw data."""
    if _is_empty(shape):
        empty = np.zeros(shape.shape, shape.dtype)
        return jax.make_array_from_callback(shape.shape, shape.sharding, empty.__getitem__)
    return jax.random.key_data(x) if is_key(x) and not is_key(shape) else x


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _cure(error: Exception) -> str:
    """The cure for a checkpoint that could not be written."""
    message = str(error)
    texts = ("No space left on device", "Disk quota exceeded", "RESOURCE_EXHAUSTED")
    full = isinstance(error, _DiskFull) or getattr(error, "errno", None) in _FULL
    if full or any(text in message for text in texts):
        return "Make room and resume the run."
    if isinstance(error, OSError):
        return "Make the folder writable, or copy the run to one that is, and resume."
    return "The disk is not the cause: change the state as this message says, and start again."


def _reason(error: Exception) -> str:
    """The first line of an error's message, without leading paths."""
    line = str(error).strip().partition("\n")[0].rpartition('": ')[2]
    return textwrap.shorten(line, 160) or type(error).__name__
