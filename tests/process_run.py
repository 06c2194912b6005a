"""One of several processes: `process_run.py PORT COUNT NUMBER ARGUMENTS...`, arguments of `curvax`.

Devices are divided among the processes. A lost one is noticed sooner than users would want.
"""

import os
import sys

PORT, COUNT, NUMBER, *ARGUMENTS = sys.argv[1:]
os.environ["JAX_PLATFORMS"], os.environ["JAX_ENABLE_X64"] = "cpu", "0"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={8 // int(COUNT)}"

import regime_run  # noqa: E402, F401  (its model is found by name)

from curvax import cli  # noqa: E402
from curvax.training import processes  # noqa: E402

if __name__ == "__main__":
    processes.HEARTBEAT = 10
    joining = ["--coordinator", f"127.0.0.1:{PORT}", "--processes", COUNT, "--process", NUMBER]
    sys.exit(cli.main([*ARGUMENTS, *joining]))
