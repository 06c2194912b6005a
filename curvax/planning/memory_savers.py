"""Other configs of the same training: what would make a step fit, and ways to compile its blocks.

Where the text of the optimiser has groups, `sequential=True` takes them one by one; `remat`
recomputes the blocks of a model in the backward pass; `microbatch` accumulates the gradient over
fewer examples at a time; `fsdp` divides parameters and optimiser state among the devices.
"""

import ast
import math

from ml_collections import ConfigDict

from curvax import models
from curvax.training import parallelism, run_data
from curvax.training.compare.comparison import variant

Changes = dict[str, ConfigDict]
"""Configs by what was changed, as one would write it on the command line."""


def remedies(config: ConfigDict, devices: int) -> Changes:
    """The changes that a config still admits, those that cost least first.

    Args:
        devices: that its batch is divided over.
    """
    found = {}
    here = config.batch // devices
    several = max(parallelism.group_sizes(config), default=here) < here  # on a device, in turn
    if several and (text := one_by_one(config.optimizer)):
        found[f'--optimizer="{text}"'] = variant(config, optimizer=text)
    if True in _choices(config, "remat") and not config.model.options.get("remat"):
        found["--model.options.remat=True"] = _with_options(config, remat=True)
    if size := _microbatch(config, devices):
        found[f"--microbatch={size}"] = variant(config, microbatch=size)
    if not config.fsdp:
        found["--fsdp=True --parallelism=jit"] = variant(config, fsdp=True, parallelism="jit")
    return found


def one_by_one(text: str) -> str:
    """The optimiser's text with its groups in turn; "" where none are at once."""
    tree = ast.parse(" ".join(text.split("\n")).strip(), mode="eval")
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    groups = [call for call in calls if _groups_at_once(call)]
    for call in groups:
        call.keywords.append(ast.keyword("sequential", ast.Constant(True)))
    return ast.unparse(tree) if groups else ""


def layouts(config: ConfigDict) -> Changes:
    """The ways to compile a model's blocks: in a scan or one after another, recomputed or kept."""
    found = {}
    for unrolled in _choices(config, "scan"):
        for remat in _choices(config, "remat"):
            options = {} if unrolled is None else {"scan": not unrolled}
            options |= {} if remat is None else {"remat": remat}
            words = [] if unrolled is None else ["unrolled" if unrolled else "scanned"]
            words += ["remat"] if remat else []
            found[", ".join(words) or "as it is"] = _with_options(config, **options)
    return found


def _groups_at_once(call: ast.Call) -> bool:
    named = isinstance(call.func, ast.Name) and call.func.id == "per_group"
    return named and all(keyword.arg != "sequential" for keyword in call.keywords)


def _choices(config: ConfigDict, option: str) -> list[bool | None]:
    """Both values of an option of the config's model, or nothing to choose."""
    model = models.build(
        config.model.name, run_data.foretell(config).classes, **config.model.options
    )
    return [False, True] if hasattr(model, option) else [None]


def _with_options(config: ConfigDict, **options: bool) -> ConfigDict:
    changed = config.copy_and_resolve_references()
    with changed.model.options.unlocked():
        changed.model.options.update(options)
    return changed


def _microbatch(config: ConfigDict, devices: int) -> int:
    """Half the examples that a device has in memory at once, or the next part that divides them; 0
    where that cannot be.

    Under `jit` a part of the batch would be a part of the devices.
    """
    if config.parallelism == "jit" and devices > 1:
        return 0
    here = config.microbatch or config.batch // devices
    whole = math.gcd(here, *parallelism.group_sizes(config))
    return next((part for part in range(whole // 2, 0, -1) if whole % part == 0), 0)
