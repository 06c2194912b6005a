"""Trained weights ↦ the start of another run: our own checkpoints, or published `.npz` files.

The depth may be scanned in one and unrolled in the other. Where the classes differ the head starts
anew, as the model's own does: from zeros in ViT and Mixer, as in the authors' fine-tuning, drawn in
ResNets. Where the image has another size the positions are interpolated.
"""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import flax.linen as nn
import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from scipy.ndimage import zoom

from curvax.arithmetic.trees import Tree
from curvax.models import published
from curvax.models.published import Arrays
from curvax.training.runtime import checksums
from curvax.training.runtime.log_filters import silent_log

HEAD, REPRESENTATION = "params/head/", "params/pre_logits/"
POSITIONS = f"params/{published.POSITIONS}"
_LAYER = re.compile(r"^(\w+/block)_(\d+)/")
_STACKED = re.compile(r"^(\w+/block)/")
_SHOWN = 8  # names in an error


class PretrainedError(ValueError):
    """Weights that cannot be read, or are those of another model."""


def read(path: str | Path, model: nn.Module, variables: Tree, *, new_head: bool = False) -> Tree:
    """The values of a trained model for these variables, all or all but the head's.

    Args:
        path: a published `.npz`, a run's folder or its `checkpoints`.
        model: whose variables they are.
        variables: what `model.init` gives, or the shapes and dtypes of it.
        new_head: leave the head out although it fits, for other classes of the same number. A
            representation layer (`pre_logits`) goes with the head that it fed.

    Returns:
        NumPy arrays under the names of `variables`.

    Raises:
        PretrainedError: nothing there can be read, or it is another model's; the error names what
            is missing, what is left over, and what has another shape.
    """
    wanted = flatten_dict(variables, sep="/")
    found = _as_deep(arrays(Path(path).expanduser().absolute()), wanted)
    if new_head or not _same_head(found, wanted):
        found = {k: v for k, v in found.items() if not k.startswith((HEAD, REPRESENTATION))}
        wanted = {k: v for k, v in wanted.items() if not k.startswith(HEAD)}
    if POSITIONS in found and POSITIONS in wanted:
        found[POSITIONS] = resized(found[POSITIONS], wanted[POSITIONS].shape[1])
    _require_same(path, model, found, wanted)
    typed = {name: np.asarray(found[name]).astype(x.dtype) for name, x in wanted.items()}
    tree: Tree = unflatten_dict(typed, sep="/")
    return tree


def over(variables: Tree, trained: Tree) -> Tree:
    """The variables, those that `read` found with its values."""
    whole = flatten_dict(variables, keep_empty_nodes=True) | flatten_dict(trained)
    tree: Tree = unflatten_dict(whole)
    return tree


def resized(positions: np.ndarray, count: int) -> np.ndarray:
    """Embeddings of the places on a square grid, [1, N, width], on another of `count` places.

    Bilinear, the corners staying where they are, as in the authors' code of Dosovitskiy et al.,
    arXiv:2010.11929, section 3.2.

    Raises:
        PretrainedError: a number of places that fills no square.
    """
    old, new = math.isqrt(positions.shape[1]), math.isqrt(count)
    if positions.shape[1] == count:
        return positions
    if old**2 != positions.shape[1] or new**2 != count:
        raise PretrainedError(
            f"Positions are interpolated from square to square, and {positions.shape[1]} places "
            f"or {count} fill none. Take square images."
        )
    grid = positions.reshape(old, old, -1).astype(np.float32)
    return zoom(grid, (new / old, new / old, 1), order=1).reshape(1, count, -1)


def arrays(path: Path) -> Arrays:
    """All arrays of a file or of a run's newest checkpoint, their collection before their names.

    Raises:
        PretrainedError: nothing there can be read.
    """
    if not path.exists():
        raise PretrainedError(
            f"`{path}` does not exist, and trained weights are to be read from it. Put it back, or "
            "give a published `.npz` or the folder of a run."
        )
    if path.is_dir():
        return _of_run(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError, BadZipFile) as error:
        raise PretrainedError(
            f"`{path}` holds no weights ({error}). Give a published `.npz`, or the folder of a run."
        ) from error
    return {f"params/{name}": x for name, x in published.renamed(arrays).items()}


def _of_run(folder: Path) -> Arrays:
    """The newest checkpoint of a run of ours."""
    state = _newest(folder) / "state"
    try:
        checksums.check(state.parent)
        with silent_log():
            found = _restored(state)
    except Exception as error:
        raise PretrainedError(f"`{state}` cannot be read ({error}). Take another one.") from error
    return flatten_dict({"params": found["params"], **found["model_state"]}, sep="/")


def _restored(state: Path) -> Tree:
    """Parameters and model state as NumPy arrays, wherever they lay."""
    handler = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    described = handler.metadata(state).item_metadata
    parts = {name: described[name] for name in ("params", "model_state")}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), parts)
    options = ocp.args.PyTreeRestore(parts, restore_args=as_numpy, partial_restore=True)
    return handler.restore(state, args=options)


def _newest(folder: Path) -> Path:
    """The one checkpoint that a folder stands for."""
    steps = [path.parent for path in sorted(folder.glob("**/state")) if path.parent.name.isdigit()]
    runs = {step.parent for step in steps}
    if len(runs) != 1:
        raise PretrainedError(
            f"A run has one folder of checkpoints, and in {folder} there are: "
            f"{_some(map(str, runs)) or 'none'}. Give the folder of one run, such as "
            "RUN/0-sgd/seed0."
        )
    return max(steps, key=lambda step: int(step.name))


def _as_deep(arrays: Arrays, wanted: Mapping[str, Any]) -> Arrays:
    """The layers stacked, or not, as the model has them."""
    unrolled: Arrays = {}
    for name, x in arrays.items():
        if _STACKED.match(name):
            layers = {_STACKED.sub(rf"\1_{n}/", name): layer for n, layer in enumerate(x)}
            unrolled.update(layers)
        else:
            unrolled[name] = x
    return _stacked(unrolled) if any(map(_STACKED.match, wanted)) else unrolled


def _stacked(arrays: Arrays) -> Arrays:
    rest = {name: x for name, x in arrays.items() if not _LAYER.match(name)}
    layers: dict[str, dict[int, np.ndarray]] = {}
    for name, x in arrays.items():
        if layer := _LAYER.match(name):
            layers.setdefault(_LAYER.sub(r"\1/", name), {})[int(layer[2])] = x
    return rest | {name: np.stack([of[n] for n in sorted(of)]) for name, of in layers.items()}


def _same_head(found: Arrays, wanted: Mapping[str, Any]) -> bool:
    of_head = lambda arrays: {k: x.shape for k, x in arrays.items() if k.startswith(HEAD)}
    return of_head(found) == of_head(wanted)


def _require_same(
    path: str | Path, model: nn.Module, found: Arrays, wanted: Mapping[str, Any]
) -> None:
    lists = {
        "it lacks": wanted.keys() - found.keys(),
        "it has besides": found.keys() - wanted.keys(),
        "other shapes have": {
            f"{name} {found[name].shape} for {wanted[name].shape}"
            for name in found.keys() & wanted.keys()
            if found[name].shape != wanted[name].shape
        },
    }
    if any(lists.values()):
        said = "; ".join(f"{what} {_some(names)}" for what, names in lists.items() if names)
        raise PretrainedError(
            f"Weights are those of the model that takes them, `{type(model).__name__}`, and those "
            f"of `{path}` are not: {said}. Set the model's options as theirs were: size, `depth`, "
            "`patch`, `pool='token'` for a class token; `new_head` where the head alone differs."
        )


def _some(names: Iterable[str]) -> str:
    shown = sorted(names)
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(f"`{name}`" for name in shown[:_SHOWN]) + more
