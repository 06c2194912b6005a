"""The public package: documented names, and imports that go strictly down the floors."""

import ast
import doctest
import enum
import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import curvax as cx
from curvax import analysis

ROOT = Path(cx.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

# From the ground up. Packages and modules on one floor do not import each other.
FLOORS = [
    {"arithmetic", "compat", "hyperparameters", "schedules"},
    {"devices", "likelihoods", "parameter_roles"},
    {"checks", "linear_operator", "models"},
    {"contrastive", "linalg", "objective"},
    {"adversarial_examples", "curvature", "flax_bridge", "pipes"},
    {"perturbation"},
    {"analysis", "stages"},
    {"methods", "plotting"},
    {"curvax"},
    {"training"},
    {"inspection", "planning"},
    {"cli"},
]
FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor}
FLOOR_OF["signal"] = FLOOR_OF["curvax"]  # a deprecated home, which the map leaves out


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return {"__init__": "curvax", "__main__": "cli"}.get(parts[0], parts[0])


def imports(path: Path) -> Iterator[str]:
    """The full names of what a module imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_seen(path: Path) -> set[str]:
    """The packages of curvax that a module imports; a public name belongs to `curvax`."""
    own = [name.split(".") for name in imports(path) if name.split(".")[0] == "curvax"]
    return {parts[1] if len(parts) > 1 and parts[1] in FLOOR_OF else "curvax" for parts in own}


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=label)
def test_imports_go_strictly_down_the_floors(path):
    room = room_of(path)
    assert room in FLOOR_OF, f"give the new room `{room}` its floor"
    above = {seen for seen in rooms_seen(path) - {room} if FLOOR_OF[seen] >= FLOOR_OF[room]}
    assert not above


def test_linalg_never_imports_a_loss():
    for path in (ROOT / "linalg").glob("*.py"):
        assert rooms_seen(path) <= {"linalg", "arithmetic", "devices", "linear_operator", "checks"}


def test_stages_do_not_import_each_other():
    for path in set((ROOT / "stages").glob("*.py")) - {ROOT / "stages" / "__init__.py"}:
        assert "stages" not in rooms_seen(path)


@pytest.mark.parametrize("path", MODULES, ids=label)
def test_every_module_has_a_docstring(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring
    assert len(docstring.splitlines()[0]) > 20


@pytest.mark.parametrize("name", cx.__all__)
def test_every_public_name_is_documented(name):
    thing = getattr(cx, name)
    own = thing.__doc__
    assert own
    assert len(own.splitlines()[0]) > 20
    assert not own.startswith(f"{name}(")


def options_of(thing: Any) -> list[str]:
    """The arguments of a function, or the fields of a class; an enumeration has none."""
    if isinstance(thing, enum.EnumType):
        return []
    if fields := getattr(thing, "_fields", ()):
        return list(fields)
    stars: dict[Any, str] = {
        inspect.Parameter.VAR_POSITIONAL: "*",
        inspect.Parameter.VAR_KEYWORD: "**",
    }
    found = inspect.signature(thing).parameters.values()
    return [stars.get(option.kind, "") + option.name for option in found]


@pytest.mark.parametrize("name", cx.__all__)
def test_every_argument_of_a_public_name_is_documented(name):
    thing = getattr(cx, name)
    rows = re.findall(r"^ +(\*{0,2}\w+(?:, \*{0,2}\w+)*): ", thing.__doc__, re.MULTILINE)
    missing = set(options_of(thing)) - {name for row in rows for name in row.split(", ")}
    assert not missing, f"`{name}` has no `Args:` (a class: `Attributes:`) for {sorted(missing)}"


@pytest.mark.parametrize("name", cx.__all__)
def test_every_public_name_has_an_example(name):
    text = getattr(cx, name).__doc__.partition("Examples:")[2]
    assert doctest.DocTestParser().get_examples(text), f"`{name}` has no `Examples:` with `>>> `"


def test_the_list_of_public_names_is_complete_and_sorted():
    assert list(cx.__all__) == sorted(cx.__all__)
    ours = lambda thing: getattr(thing, "__module__", "").startswith("curvax.")
    named = {name for name, thing in vars(cx).items() if ours(thing)}
    assert named == set(cx.__all__)


def test_flax_bridge_is_imported_on_demand():
    from curvax import flax_bridge

    assert cx.layout is flax_bridge.layout
    with pytest.raises(AttributeError, match="no attribute 'adahesian'"):
        _ = cx.adahesian


@pytest.mark.parametrize("name", ["Signal", "Stage", "pipe", "stage"])
def test_the_module_signal_is_a_deprecated_home(name):
    from curvax import signal

    with pytest.warns(
        DeprecationWarning, match=rf"`curvax\.signal\.{name}` is now `curvax\.{name}`"
    ):
        assert getattr(signal, name) is getattr(cx, name)
    assert not hasattr(signal, "Chain")


def test_linalg_reason_is_a_deprecated_name():
    with pytest.warns(DeprecationWarning, match=r"Reason` is now `curvax.*\.StopReason`"):
        assert cx.linalg.Reason is cx.StopReason


def test_layout_works_without_flax(monkeypatch):
    from curvax.parameter_roles.layouts import layout_of_tree

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cx.layout is layout_of_tree


@pytest.mark.parametrize(("old", "new"), cx.RENAMED.items())
def test_renamed_public_names_warn_and_work(old, new):
    with pytest.warns(DeprecationWarning, match=rf"`curvax\.{old}` is now `curvax\.{new}`"):
        assert getattr(cx, old) is getattr(cx, new)
    assert old not in cx.__all__


def test_analysis_names_are_available_in_curvax():
    assert cx._LAZY["curvax.analysis"] == tuple(analysis.__all__)
    assert all(getattr(cx, name) is getattr(analysis, name) for name in analysis.__all__)
    assert {*analysis.__all__, "analysis", "plotting", "layout"} <= {*dir(cx)}


@pytest.mark.parametrize("module", [cx, analysis], ids=lambda module: module.__name__)
def test_sweep_is_the_deprecated_name_of_dataset_loss(module):
    with pytest.warns(DeprecationWarning, match=rf"`{module.__name__}\.Sweep` is now.*DatasetLoss"):
        assert module.Sweep is analysis.DatasetLoss


def test_a_misspelt_name_imports_nothing():
    program = """
import sys, curvax
before = set(sys.modules)
assert not hasattr(curvax, "adahesian")
print(*(set(sys.modules) - before))
"""
    assert printed(program) == ""


def test_core_imports_jax_and_optax_alone():
    program = """
import sys, jax, optax
before = set(sys.modules)
import curvax
print(*{name.split(".")[0] for name in set(sys.modules) - before})
"""
    seen = set(printed(program).split())
    assert seen - set(sys.stdlib_module_names) <= {"curvax", "jax", "optax"}


def printed(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
