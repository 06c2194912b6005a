"""The requirements of curvax are satisfied by Colab's runtime and by the installed packages."""

import json
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from repository import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    pin.name: Version(str(pin.specifier).removeprefix("=="))
    for pin in map(
        Requirement,
        re.findall(r"^[\w-]+==.+$", (ROOT / "tests" / "colab.txt").read_text(), re.M),
    )
}
LOWEST = ("jax", "optax", "flax", "orbax-checkpoint")
"""What curvax is written against: a version that no test ran with is no floor."""


def requirements() -> dict[str, list[Requirement]]:
    """What each extra asks for, and "" for curvax itself."""
    asked = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    return {extra: [Requirement(x) for x in several] for extra, several in asked.items()}


def floors() -> list[tuple[str, Version]]:
    return [
        (asked.name, Version(spec.version))
        for several in requirements().values()
        for asked in several
        for spec in asked.specifier
    ]


def needed(extra: str) -> list[Requirement]:
    """What an installation with an extra asks of other projects."""
    asked = requirements()
    found = list(asked[""])
    for one in asked[extra]:
        own = one.name == PROJECT["name"]
        found += [x for part in sorted(one.extras) for x in needed(part)] if own else [one]
    return found


def test_every_pin_of_colab_is_read():
    assert len(PINS) == 15
    assert {name: str(PINS[name]) for name in LOWEST} == {
        "jax": "0.7.2",
        "optax": "0.2.8",
        "flax": "0.11.2",
        "orbax-checkpoint": "0.12.4",
    }


def test_every_requirement_is_a_lower_bound_alone():
    asked = [x for several in requirements().values() for x in several if x.name != "curvax"]
    assert [str(x) for x in asked if [s.operator for s in x.specifier] != [">="]] == []


@pytest.mark.parametrize(("name", "floor"), floors(), ids=str)
def test_lower_bounds_are_at_most_the_versions_of_colab(name, floor):
    if name in PINS:
        assert floor <= PINS[name]
    if name in LOWEST:
        assert floor == PINS[name]


def test_supported_python_versions_are_classified():
    minors = range(11, 15)
    named = {x for x in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", x)}
    assert named == {f"Programming Language :: Python :: 3.{minor}" for minor in minors}
    assert PROJECT["requires-python"] == ">=3.11"


@pytest.mark.parametrize("extra", ["", "train"])
def test_pip_replaces_no_installed_package(extra):
    """Without an index pip finds no other version: the installed ones satisfy it, or it fails."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    if subprocess.run([*pip, "--version"], capture_output=True).returncode:
        pytest.skip("this environment has no pip")
    options = ["install", "--quiet", "--dry-run", "--no-index", "--report", "-"]
    done = subprocess.run(
        [*pip, *options, *map(str, needed(extra))], capture_output=True, text=True
    )
    if extra and "No matching distribution" in done.stderr:
        pytest.importorskip("grain", reason="pip install 'curvax[train]'")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["install"] == []
