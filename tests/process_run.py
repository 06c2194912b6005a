"""One of several processes: `process_run.py PORT COUNT NUMBER ARGUMENTS...`, arguments of `curvax`.

Devices are divided among the processes. A lost one is noticed sooner than users would want. The
process whose number is in `SPOILT` comes to an image that it cannot use.
"""

import itertools
import os
import sys

PORT, COUNT, NUMBER, *ARGUMENTS = sys.argv[1:]
os.environ["JAX_PLATFORMS"], os.environ["JAX_ENABLE_X64"] = "cpu", "0"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={8 // int(COUNT)}"

import regime_run  # noqa: E402, F401  (its model is found by name)

from curvax import cli  # noqa: E402
from curvax.training import data, processes  # noqa: E402


def spoil() -> None:
    gather, calls = data.Split.gather, itertools.count()

    def spoilt(self, rows, draw=None):
        if next(calls) == 6:
            raise data.DataError("an image of this process is damaged")
        return gather(self, rows, draw)

    data.Split.gather = spoilt  # type: ignore[method-assign]


if __name__ == "__main__":
    processes.HEARTBEAT = 10
    if os.environ.get("SPOILT") == NUMBER:
        spoil()
    joining = ["--coordinator", f"127.0.0.1:{PORT}", "--processes", COUNT, "--process", NUMBER]
    sys.exit(cli.main([*ARGUMENTS, *joining]))
