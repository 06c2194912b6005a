"""Changes of a config that lower its memory, and the ways to compile a model's blocks.

If the optimiser's text has groups, `sequential=True` processes them one after another; `remat`
recomputes the blocks of a model in the backward pass; `microbatch` accumulates the gradient over
fewer examples at a time; `fsdp` divides parameters and optimiser state among the devices.
"""

import math

from ml_collections import ConfigDict

from curvax import models
from curvax.training import parallelism, run_data
from curvax.training.compare.comparison import replace
from curvax.training.config import recipe

Changes = dict[str, ConfigDict]
"""Change, as on the command line ↦ config."""


def candidates(config: ConfigDict, devices: int) -> Changes:
    """The memory-saving changes that a config admits, in order of increasing cost in time.

    Args:
        config: whose step does not fit.
        devices: number of devices that the batch is divided over.
    """
    found = {}
    per_device = config.batch // devices
    largest_group = max(parallelism.group_sizes(config), default=per_device)
    text = recipe.with_argument(config.optimizer, "per_group", sequential=True)
    if largest_group < per_device and text != config.optimizer:
        found[f'--optimizer="{text}"'] = replace(config, optimizer=text)
    if True in _choices(config, "remat") and not config.model.options.get("remat"):
        found["--model.options.remat=True"] = _with_options(config, remat=True)
    if size := _microbatch(config, devices):
        found[f"--microbatch={size}"] = replace(config, microbatch=size)
    if not config.fsdp:
        found["--fsdp=True --parallelism=jit"] = replace(config, fsdp=True, parallelism="jit")
    return found


def block_layouts(config: ConfigDict) -> Changes:
    """The ways to compile a model's blocks: scanned or unrolled, recomputed (`remat`) or not."""
    found = {}
    for unrolled in _choices(config, "scan"):
        for remat in _choices(config, "remat"):
            options = {} if unrolled is None else {"scan": not unrolled}
            options |= {} if remat is None else {"remat": remat}
            names = [] if unrolled is None else ["unrolled" if unrolled else "scanned"]
            names += ["remat"] if remat else []
            found[", ".join(names) or "as it is"] = _with_options(config, **options)
    return found


def _choices(config: ConfigDict, option: str) -> list[bool | None]:
    """Both values of a boolean option of the config's model; [None] if the model lacks it."""
    model = models.build(
        config.model.name, run_data.data_spec(config).classes, **config.model.options
    )
    return [False, True] if hasattr(model, option) else [None]


def _with_options(config: ConfigDict, **options: bool) -> ConfigDict:
    changed = config.copy_and_resolve_references()
    with changed.model.options.unlocked():
        changed.model.options.update(options)
    return changed


def _microbatch(config: ConfigDict, devices: int) -> int:
    """The largest divisor, up to a half, of the examples that a device has in memory at once.

    0 if there is none, and under `jit` on several devices, where a slice of the batch would lie on
    a subset of the devices.
    """
    if config.parallelism == "jit" and devices > 1:
        return 0
    at_once = config.microbatch or config.batch // devices
    whole = math.gcd(at_once, *parallelism.group_sizes(config))
    return next((part for part in range(whole // 2, 0, -1) if whole % part == 0), 0)
