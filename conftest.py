"""What the tests in `tests` and the examples in the docstrings of `curvax` share."""

import gc
from pathlib import Path

import pytest

# JAX is imported in the fixtures: `tests/conftest.py` sets its environment first.

MANY_MAPS = 20_000
READERS_SETTINGS = {"jax_enable_x64": False, "jax_numpy_rank_promotion": "allow"}


def pytest_collection_modifyitems(items):
    """The last files first: trainings and their processes, which take longest, end no run alone."""
    items.sort(key=lambda item: item.path, reverse=True)


@pytest.fixture(autouse=True, scope="module")
def _few_programs():
    """Compiled programs go before they are too many: each is some ten maps of memory, of which
    Linux grants a process 65 530, and XLA crashes without."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MANY_MAPS:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def _as_a_reader_runs_it(request):
    """Docstring examples run with JAX's own defaults, tests with those of `tests/conftest.py`."""
    if not isinstance(request.node, pytest.DoctestItem):
        yield
        return
    import jax

    before = {name: getattr(jax.config, name) for name in READERS_SETTINGS}
    for name, value in READERS_SETTINGS.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
