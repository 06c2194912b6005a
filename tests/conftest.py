"""Hostile settings for every test: float64, no silent broadcasts between ranks, eight devices."""

import importlib.metadata
import os
import re
import sys
from pathlib import Path

# XLA compiles in a third of the time. Evidence, selected by `-m evidence`, is measured as users
# compile, and so are the tests of other versions, which may not know these flags. A worker of
# pytest-xdist inherits them.
QUICK = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_use_fusion_emitters=false",
)
known = importlib.metadata.version("jaxlib").startswith("0.10.")
inherited = "PYTEST_XDIST_WORKER" in os.environ
measuring = re.search(r"-m[ =]?evidence", " ".join(sys.argv)) is not None
quick = QUICK if known and not inherited and not measuring else ()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [*quick, "--xla_force_host_platform_device_count=8", os.environ.get("XLA_FLAGS", "")]
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "curvax-tests"))

import jax  # noqa: E402
import pytest  # noqa: E402

if not hasattr(jax, "enable_x64"):  # JAX 0.7 has it among the experiments.
    from jax.experimental import enable_x64  # type: ignore[attr-defined]

    jax.enable_x64 = enable_x64

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

# Programs of other processes, which read their command line: not to be imported for doctests.
collect_ignore_glob = ["*process_run.py", "*shards_run.py"]


@pytest.fixture
def single_precision():
    """Float32 as users have it, where costs, clocks and trainings are measured."""
    with jax.enable_x64(False):
        yield
