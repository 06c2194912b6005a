"""Hostile settings for every test: float64, no silent broadcasts between ranks, eight devices."""

import os
import re
import sys
from pathlib import Path

import quick_jax

# Evidence, selected by `-m evidence`, is measured as users compile. A worker of pytest-xdist
# inherits what the first process found.
if "PYTEST_XDIST_WORKER" not in os.environ:
    measuring = re.search(r"-m[ =]?evidence", " ".join(sys.argv)) is not None
    quick = () if measuring else quick_jax.FLAGS
    os.environ["CURVAX_TESTS_MEASURE"] = "yes" if measuring else ""
    os.environ["XLA_FLAGS"] = " ".join(
        [*quick, "--xla_force_host_platform_device_count=8", os.environ.get("XLA_FLAGS", "")]
    )
os.environ["JAX_PLATFORMS"] = "cpu"
# Also for the processes that tests start.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "curvax-tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax
import pytest

if not os.environ["CURVAX_TESTS_MEASURE"]:
    quick_jax.lower_quickly()
    # One program at a time: with several, devices have waited for each other until XLA aborted.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
if not hasattr(jax, "enable_x64"):  # JAX 0.7 has it among the experiments.
    from jax.experimental import enable_x64  # type: ignore[attr-defined]

    jax.enable_x64 = enable_x64

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Programs of other processes, which read their command line: not to be imported for doctests.
collect_ignore_glob = ["*process_run.py", "*shards_run.py", "*kfac_jax_run.py"]


@pytest.fixture
def single_precision():
    """Float32 as users have it, where costs, clocks and trainings are measured."""
    with jax.enable_x64(False):
        yield
