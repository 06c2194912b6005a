"""Settings with which JAX lowers and compiles tests faster; the programs compute the same."""

import functools
import gc
import importlib.metadata

FLAGS = (
    (
        "--xla_backend_optimization_level=0",
        "--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_collective_call_terminate_timeout_seconds=300",
    )
    if importlib.metadata.version("jaxlib").startswith("0.10.")
    else ()
)
"""Of XLA, which then compiles for the CPU in a third of the time, and waits longer for devices
that share a busy core. Other versions know other flags."""

AS_USERS = {"xla_cpu_opt_preset": "CPU_OPT_PRESET_DEFAULT"} if FLAGS else {}
"""Compiler options under which a program does the operations of users' programs, to count them."""


def lower_quickly() -> None:
    """Keeps one MLIR context, leaves source lines out of programs, and collects garbage seldom.

    JAX makes a context for every program: a sixth of the time of the tests.
    """
    import jax
    from jax._src.interpreters import mlir

    gc.set_threshold(100_000, 20, 100)
    jax.config.update("jax_include_full_tracebacks_in_locations", False)
    jax.config.update("jax_traceback_in_locations_limit", 0)
    mlir.make_ir_context = functools.cache(mlir.make_ir_context)
