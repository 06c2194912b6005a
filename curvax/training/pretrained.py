"""Pretrained weights for another run: from curvax's own checkpoints, or published `.npz` files.

Blocks may be scanned in one model and unrolled in the other. If the classes differ, the head keeps
its own initialisation: zeros in ViT and Mixer, as in the authors' fine-tuning, random in ResNets.
If the image size differs, position embeddings are interpolated.
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

from curvax.arithmetic.trees import Tree
from curvax.models import published
from curvax.models.published import Arrays
from curvax.training.runtime import checksums
from curvax.training.runtime.errors import ConfigError
from curvax.training.runtime.log_filters import silent_log

HEAD, REPRESENTATION = "params/head/", "params/pre_logits/"
POSITIONS = f"params/{published.POSITIONS}"
_LAYER = re.compile(r"^(\w+/block)_(\d+)/")
_STACKED = re.compile(r"^(\w+/block)/")
_SHOWN = 8  # names in an error


def read(path: str | Path, model: nn.Module, variables: Tree, *, new_head: bool = False) -> Tree:
    """Reads pretrained values for a model's variables, all or all except the head's.

    Args:
        path: a published `.npz`, a run's folder or its `checkpoints`.
        model: the new model.
        variables: the result of `model.init`, or its shapes and dtypes.
        new_head: leave the head out even if it fits, for as many but other classes. A
            representation layer (`pre_logits`) is left out together with the head it feeds.

    Returns:
        NumPy arrays under the names of `variables`.

    Raises:
        ConfigError: nothing can be read, or the weights belong to another model; the message
            names missing variables, superfluous ones, and those of another shape.
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
    """The variables with those in `trained` replaced."""
    whole = flatten_dict(variables, keep_empty_nodes=True) | flatten_dict(trained)
    tree: Tree = unflatten_dict(whole)
    return tree


def resized(positions: np.ndarray, count: int) -> np.ndarray:
    """Interpolates position embeddings [1, N, width] of a square grid to one of `count` positions.

    Bilinear with fixed corners, as in the authors' code of Dosovitskiy et al., arXiv:2010.11929,
    section 3.2.

    Raises:
        ConfigError: a number of positions is not a square.
    """
    old, new = math.isqrt(positions.shape[1]), math.isqrt(count)
    if positions.shape[1] == count:
        return positions
    if old**2 != positions.shape[1] or new**2 != count:
        raise ConfigError(
            "Position embeddings are interpolated between square grids, and not both of "
            f"{positions.shape[1]} and {count} positions are squares. Use square images."
        )
    from scipy.ndimage import zoom

    grid = positions.reshape(old, old, -1).astype(np.float32)
    return zoom(grid, (new / old, new / old, 1), order=1).reshape(1, count, -1)


def arrays(path: Path) -> Arrays:
    """All arrays of a file or of a run's newest checkpoint, as `collection/name`.

    Raises:
        ConfigError: nothing there can be read.
    """
    if not path.exists():
        raise ConfigError(
            f"`{path}` does not exist, and pretrained weights are read from it. Restore it, or "
            "give a published `.npz` or the folder of a run."
        )
    if path.is_dir():
        return _of_run(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError, BadZipFile) as error:
        raise ConfigError(
            f"`{path}` holds no weights ({error}). Give a published `.npz`, or the folder of a run."
        ) from error
    return {f"params/{name}": x for name, x in published.renamed(arrays).items()}


def _of_run(folder: Path) -> Arrays:
    """The arrays of a run's newest checkpoint."""
    state = _newest(folder) / "state"
    try:
        checksums.check(state.parent)
        with silent_log():
            found = _restored(state)
    except Exception as error:
        raise ConfigError(f"`{state}` cannot be read ({error}). Use another checkpoint.") from error
    return flatten_dict({"params": found["params"], **found["model_state"]}, sep="/")


def _restored(state: Path) -> Tree:
    """Parameters and model state as NumPy arrays, whatever their sharding was."""
    handler = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    described = handler.metadata(state).item_metadata
    parts = {name: described[name] for name in ("params", "model_state")}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), parts)
    options = ocp.args.PyTreeRestore(parts, restore_args=as_numpy, partial_restore=True)
    return handler.restore(state, args=options)


def _newest(folder: Path) -> Path:
    """The newest checkpoint in a folder of one run."""
    steps = [path.parent for path in sorted(folder.glob("**/state")) if path.parent.name.isdigit()]
    runs = {step.parent for step in steps}
    if len(runs) != 1:
        raise ConfigError(
            f"Weights are read from the checkpoints of one run, and in {folder} there are: "
            f"{_some(map(str, runs)) or 'none'}. Give the folder of one run, such as "
            "RUN/0-sgd/seed0."
        )
    return max(steps, key=lambda step: int(step.name))


def _as_deep(arrays: Arrays, wanted: Mapping[str, Any]) -> Arrays:
    """The arrays with layers stacked if the model scans its blocks, and unstacked otherwise."""
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
        differences = "; ".join(f"{what} {_some(names)}" for what, names in lists.items() if names)
        raise ConfigError(
            f"The weights of `{path}` do not fit the model, `{type(model).__name__}`: "
            f"{differences}. Set the model's options as theirs were: size, `depth`, `patch`, "
            "`pool='token'` for a class token; or `new_head` if only the head differs."
        )


def _some(names: Iterable[str]) -> str:
    shown = sorted(names)
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(f"`{name}`" for name in shown[:_SHOWN]) + more
