"""Checkpoints of a run: state and place in the data, written whole or not at all, by Orbax."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from curvax.training.step import State


class CheckpointError(OSError):
    """A checkpoint that could not be written or read; the others are untouched."""


class Checkpoints:
    """The newest few checkpoints of a run, by step; without a folder it keeps nothing.

    A checkpoint is on disk before the next step begins, so that a full disk is met where it can
    still be answered, and donated buffers are never read late.
    """

    def __init__(self, folder: Path | None, keep: int = 2):
        self.folder = folder and folder.absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self._manager = self.folder and ocp.CheckpointManager(self.folder, options=options)

    def resume(self, state: State, batches: Any) -> tuple[State, Any]:
        """State and batches as the newest checkpoint has them, or as given, which is then kept.

        Raises:
            CheckpointError: as in `save` and `restore`.
        """
        if self._manager and self._manager.latest_step() is not None:
            state, place = self.restore(state)
            batches.set_state(place)
        else:
            self.save(state, batches.get_state())
        return state, batches

    def save(self, state: State, place: Any) -> None:
        """Writes the state and the place in the data (anything that JSON can hold).

        Raises:
            CheckpointError: the disk is full or cannot be written.
        """
        if not self._manager:
            return
        step = int(state.step)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), place=ocp.args.JsonSave({"data": place})
        )
        try:
            self._manager.save(step, args=items)
        except Exception as error:
            raise CheckpointError(
                f"The checkpoint of step {step} could not be written to {self.folder} "
                f"({_first_line(error)}). {self.last_good(but=step)} Make room and resume the run."
            ) from error

    def restore(self, template: State) -> tuple[State, Any]:
        """The newest state, with the shapes and types of `template`, and the place in the data.

        Raises:
            CheckpointError: there is none, or it is damaged or of another model or optimiser.
        """
        if not self._manager:
            raise CheckpointError("A run without a folder has no checkpoint to read.")
        step = self._manager.latest_step()
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(shapes), place=ocp.args.JsonRestore()
        )
        try:
            restored = self._manager.restore(step, args=items)
        except Exception as error:
            raise CheckpointError(
                f"The checkpoint of step {step} in {self.folder} cannot be read "
                f"({_first_line(error)}). Nothing was changed. {self.last_good(but=step)} To go on "
                f"from there, move the folder {step} away and resume again."
            ) from error
        return restored.state, restored.place["data"]

    def last_good(self, but: int | None = None) -> str:
        """A sentence that says which checkpoint there is, other than that of the step `but`."""
        steps = [step for step in self._manager.all_steps() if step != but] if self._manager else []
        if not steps:
            return "There is no other checkpoint." if but is not None else "No checkpoint was kept."
        return f"The newest good checkpoint is that of step {max(steps)} in {self.folder}."

    def close(self) -> None:
        if self._manager:
            self._manager.close()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
