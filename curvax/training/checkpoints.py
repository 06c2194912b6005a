"""Checkpoints of a run: state and place in the data, written whole or not at all, by Orbax."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from curvax.training.step import State


class CheckpointError(OSError):
    """A checkpoint that could not be written or read; what was there before is untouched."""


class Checkpoints:
    """The newest few checkpoints of a run, by step.

    They are written before the next step begins, so that a full disk is met where it can still be
    answered and donated buffers are never read late.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    @property
    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: State, place: Any) -> None:
        """Writes the state and the data iterator's place (JSON).

        Raises:
            CheckpointError: the disk is full or not writable.
        """
        step = int(state.step)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), place=ocp.args.JsonSave({"data": place})
        )
        try:
            self._manager.save(step, args=items)
        except Exception as error:
            raise CheckpointError(
                f"The checkpoint of step {step} could not be written to {self.folder} "
                f"({_first_line(error)}). {self._last_good(step)} Make room and resume the run."
            ) from error

    def restore(self, template: State) -> tuple[State, Any]:
        """The newest state, shaped and typed as `template`, and the place in the data.

        Raises:
            CheckpointError: it is damaged, or of another model or optimiser.
        """
        step = self.latest
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(shapes), place=ocp.args.JsonRestore()
        )
        try:
            restored = self._manager.restore(step, args=items)
        except Exception as error:
            raise CheckpointError(
                f"The checkpoint {self.folder / str(step)} cannot be read ({_first_line(error)}). "
                f"Nothing was changed. {self._last_good(step)} To go on from there, move the "
                "unreadable folder away and resume again."
            ) from error
        return restored.state, restored.place["data"]

    def _last_good(self, but: int | None) -> str:
        steps = [step for step in self._manager.all_steps() if step != but]
        return f"The last other checkpoint is that of step {max(steps)}." if steps else ""

    def close(self) -> None:
        self._manager.close()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
