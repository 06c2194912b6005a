"""The notebooks: executed as they stand, free of errors, and opened by the README's badges."""

import ast
import importlib.metadata
import importlib.util
import json
import pathlib
import re
import shlex
import tomllib
from typing import Any

import pytest
from repository import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
COLAB = REPOSITORY.replace("https://github.com", "https://colab.research.google.com/github")
OUTER_PATH = re.compile(r"(?<![\w.:/])/(?:home|mnt|root|tmp|usr|work)/\w")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> pathlib.Path:
    return request.param


@pytest.fixture
def notebook(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.fixture
def code(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """The code cells."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def text(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def outputs(code: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [output for cell in code for output in cell["outputs"]]


def test_badges_open_the_existing_notebooks():
    badges = re.findall(
        r"\[!\[Open in Colab\]\([^)]*\)\]\(([^)]*)\)", (ROOT / "README.md").read_text()
    )
    assert sorted(badges) == [f"{COLAB}/blob/main/notebooks/{path.name}" for path in NOTEBOOKS]


def test_notebook_is_valid(path):
    nbformat = pytest.importorskip("nbformat", reason="pip install 'curvax[notebooks]'")
    nbformat.validate(nbformat.read(path, as_version=4))


def test_notebook_was_executed_in_order_without_error(code):
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert "error" not in {output["output_type"] for output in outputs(code)}
    assert any("image/png" in output.get("data", {}) for output in outputs(code))


def test_notebook_begins_by_installing_curvax_if_missing(code):
    first = text(code[0])
    assert 'find_spec("curvax") is None' in first
    assert re.search(rf"pip install .*curvax\[\w+\] @ git\+{re.escape(REPOSITORY)}\b", first)


@pytest.mark.parametrize("missing", [{"curvax"}, {"curvax", "jaxlib"}, {"curvax", "jax", "jaxlib"}])
def test_installing_from_a_notebook_keeps_the_found_jax(
    code, missing, tmp_path, monkeypatch, capsys
):
    """The first cell, run where curvax is missing, as its line for pip would be."""
    found, seen = importlib.util.find_spec, []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else found(name)
    )
    first = re.sub(r"%pip (.*)", lambda match: f"pip({match[1]!r})", text(code[0]))
    exec(first, {"pip": lambda line: seen.append(shlex.split(line))})
    kept = [
        f"{name}=={importlib.metadata.version(name)}"
        for name in ("jax", "jaxlib")
        if name not in missing
    ]
    (arguments,) = seen
    file = tmp_path / arguments[arguments.index("-c") + 1]
    assert file.read_text().split() == kept
    assert capsys.readouterr().out.split() == ["kept", "as", "found:", *kept]


def test_notebook_installs_nothing_where_curvax_is_found(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first = re.sub(r"%pip .*", "raise AssertionError", text(code[0]))
    exec(first, {})
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_notebook_code_parses(code):
    for cell in code:
        ast.parse(re.sub(r"^(\s*)[%!].*", r"\1pass", text(cell), flags=re.M))


def test_notebook_shortens_its_runs_by_curvax_fast(code):
    assert any("CURVAX_FAST" in text(cell) for cell in code)


def test_notebook_has_no_paths_of_the_machine_it_ran_on(path, notebook):
    assert not any(cell["metadata"].get("execution") for cell in notebook["cells"])
    words = re.sub(r'"image/png": "[^"]*"', "", path.read_text())
    assert not OUTER_PATH.findall(words)
    assert path.stat().st_size < 600_000
