"""Checkpoints of a run: state and place in the data, written whole or not at all, by Orbax."""

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

_OWN_FILES = 2**18  # bytes; a checkpoint of a small model took 1.5e5 beside its arrays


class CheckpointError(OSError):
    """A checkpoint that could not be written or read; the others are untouched."""


class _DiskFull(OSError):
    """Not even begun."""


class NoCheckpoints:
    """The checkpoints of a run that keeps none."""

    def resume(self, experiment: Experiment) -> tuple[State, Any]:
        """State and batches to begin with."""
        return experiment.init(), experiment.batches()

    def save(self, state: State, place: Any) -> None:
        pass

    def last_good(self) -> str:
        return "No checkpoint was kept."

    def close(self) -> None:
        pass


class Checkpoints(NoCheckpoints):
    """The newest few checkpoints of a run, by step.

    A checkpoint is on disk before the next step begins, so that a full disk is met where it can
    still be answered, and donated buffers are never read late. Those that are `read_only` may
    belong to a run that goes on. Arrays of no entries, which Orbax refuses, are left out and made
    anew.
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
        """State and batches as the newest checkpoint has them, or at the start, which is then kept.

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
        """Writes the state and the place in the data (anything that JSON can hold).

        Raises:
            CheckpointError: the disk is full or cannot be written, or Orbax cannot keep a leaf.
            JaxRuntimeError: not the disk failed, but a device or another process.
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
        """The newest state, of these shapes and laid out like them, and the place in the data.

        It may have been written under another regime, on other devices or by other processes, or
        with the optimiser's keys typed and figures not measured marked by NaN, as earlier
        versions of curvax did.

        Raises:
            CheckpointError: there is none, or it is damaged or of another model or optimiser.
            JaxRuntimeError: as in `save`.
        """
        step = self._manager.latest_step()
        try:
            checksums.check(self.folder / str(step))  # Orbax's reading threads stop noisily
            with silent_log():
                state, place = self._read(step, shapes)
        except jax.errors.JaxRuntimeError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"The checkpoint of step {step} in {self.folder} cannot be read "
                f"({_reason(error)}). Nothing was changed. {self.last_good(but=step)} To go on "
                f"from there, move the folder {step} away and resume again."
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
        """A sentence that says which checkpoint there is, other than that of the step `but`."""
        steps = [step for step in self._manager.all_steps() if step != but]
        if not steps:
            return "There is no other checkpoint."
        return f"The newest good checkpoint is that of step {max(steps)} in {self.folder}."

    def close(self) -> None:
        self._manager.close()


def _check_room(folder: Path, state: State) -> None:
    """Refuses to begin what cannot be finished: Orbax's writing threads stop noisily.

    Raises:
        OSError: the disk has less room than the state and Orbax's own files take.
    """
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _OWN_FILES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise _DiskFull(f"the disk is full: it needs {needed} bytes and {free} are free")


def _refuse_shared_names(state: Tree) -> None:
    """Refuses leaves of which Orbax, which joins names by dots, would keep one in the place of all.

    Raises:
        ValueError: two leaves would have one name.
    """
    found = Counter(".".join(names(path)) for path, _ in jax.tree.leaves_with_path(state))
    shared = [name for name, times in found.items() if times > 1]
    if shared:
        raise ValueError(f"{found[shared[0]]} leaves of the state are named `{shared[0]}` by Orbax")


def _without_empty(state: Tree) -> Tree:
    """The state, or its shapes, with None for arrays of no entries."""
    return jax.tree.map(lambda x: None if _is_empty(x) else x, state)


def _is_empty(x: Any) -> bool:
    return 0 in x.shape and not is_key(x)


def _as_asked(shape: jax.ShapeDtypeStruct, x: Any) -> jax.Array:
    """What was restored for a leaf, in the form that is asked for."""
    if _is_empty(shape):
        empty = np.zeros(shape.shape, shape.dtype)
        return jax.make_array_from_callback(shape.shape, shape.sharding, empty.__getitem__)
    return jax.random.key_data(x) if is_key(x) and not is_key(shape) else x


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _cure(error: Exception) -> str:
    """What to do about a checkpoint that could not be written."""
    said = str(error)
    texts = ("No space left on device", "Disk quota exceeded", "RESOURCE_EXHAUSTED")
    full = isinstance(error, _DiskFull) or getattr(error, "errno", None) in _FULL
    if full or any(text in said for text in texts):
        return "Make room and resume the run."
    if isinstance(error, OSError):
        return "Let the run write to this folder, or copy it to one where it can, and resume."
    return "The disk is not the cause: change what this says of the state, and start again."


def _reason(error: Exception) -> str:
    """The first line of an error's message, without the paths that lead up to the cause."""
    line = str(error).strip().partition("\n")[0].rpartition('": ')[2]
    return textwrap.shorten(line, 160) or type(error).__name__
