"""One of several processes: `shards_run.py PORT COUNT NUMBER FILE` steps with every method.

The eight devices are divided among them, numbers are float64, and compilations are quick. The first
process writes the resulting parameters.
"""

import os
import sys

import quick_jax

PORT, COUNT, NUMBER, FILE = sys.argv[1:]
os.environ["JAX_PLATFORMS"], os.environ["JAX_ENABLE_X64"] = "cpu", "1"
os.environ["XLA_FLAGS"] = " ".join(
    [*quick_jax.FLAGS, f"--xla_force_host_platform_device_count={8 // int(COUNT)}"]
)

import jax  # noqa: E402

quick_jax.lower_quickly()
jax.distributed.initialize(f"127.0.0.1:{PORT}", int(COUNT), int(NUMBER))

import numpy as np  # noqa: E402
import shard_methods as methods  # noqa: E402  (it asks for the devices)


def main() -> None:
    found = {
        f"{name}, {mapping}": methods.stepped(name, mapping)
        for name in methods.METHODS
        for mapping in methods.MAPPINGS
    }
    if jax.process_index() == 0:
        np.savez(FILE, **found)


if __name__ == "__main__":
    main()
