"""One of several processes: `process_run.py PORT COUNT NUMBER ARGUMENTS...`, arguments of `curvax`.

Devices are divided among the processes, and compilations are quick. A lost process is noticed
sooner than users would want. The process whose number is in `SPOILT` reads a damaged image, that in
`POISONED` an image with NaN, and that in `KILLED` dies in its third checkpoint.
"""

import itertools
import os
import signal
import sys

import quick_jax

PORT, COUNT, NUMBER, *ARGUMENTS = sys.argv[1:]
os.environ["JAX_PLATFORMS"], os.environ["JAX_ENABLE_X64"] = "cpu", "0"
os.environ["XLA_FLAGS"] = " ".join(
    [*quick_jax.FLAGS, f"--xla_force_host_platform_device_count={8 // int(COUNT)}"]
)

quick_jax.lower_quickly()

import mapped_run  # noqa: E402, F401  (its model is found by name)
import numpy as np  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402

from curvax.cli import main  # noqa: E402
from curvax.training.data import datasets  # noqa: E402
from curvax.training.runtime import distributed  # noqa: E402


def at_the_seventh(change) -> None:
    """Changes this process's part of the seventh training batch."""
    gather, calls = datasets.Split.gather, itertools.count()

    def changed(self, rows, draw=None):
        found = gather(self, rows, draw)
        return change(found) if draw is not None and next(calls) == 6 else found

    datasets.Split.gather = changed  # type: ignore[method-assign]


def spoil(batch):
    raise datasets.DataError("an image of this process is damaged")


def poison(batch):
    batch["input"][-1] = np.nan
    return batch


def die_in_the_third_checkpoint() -> None:
    save, calls = ocp.CheckpointManager.save, itertools.count()

    def changed(*arguments, **options):
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return save(*arguments, **options)

    ocp.CheckpointManager.save = changed


if __name__ == "__main__":
    distributed.HEARTBEAT = 10
    for name, change in {"SPOILT": spoil, "POISONED": poison}.items():
        if os.environ.get(name) == NUMBER:
            at_the_seventh(change)
    if os.environ.get("KILLED") == NUMBER:
        die_in_the_third_checkpoint()
    joining = ["--coordinator", f"127.0.0.1:{PORT}", "--processes", COUNT, "--process", NUMBER]
    sys.exit(main.main([*ARGUMENTS, *joining]))
