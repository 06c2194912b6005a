"""README and documentation: snippets run, links lead somewhere, numbers stand in their tables."""

import importlib
import importlib.util
import re
import textwrap
import tomllib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from pages import DOCS, ROOT, label, sections

import curvax

README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY = PROJECT["urls"]["Repository"].removeprefix("https://github.com/")


WITH_CODE = [page for page in PAGES if sections(page)]


@pytest.mark.parametrize("page", WITH_CODE, ids=label)
def test_python_blocks_of_a_page_run(page, recwarn):
    for title, code in sections(page).items():
        names: dict[str, Any] = {}
        # A newcomer's settings, not those of the tests.
        with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
            exec(compile(code, f"{label(page)}: {title}", "exec"), names)
        assert not recwarn.list, title
        for name in ("params", "updates"):
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(names.get(name, ()))), title


def test_quickstart_has_a_snippet_for_each_framework():
    quickstart = sections(DOCS / "quickstart.md")
    assert {"Plain JAX", "Flax linen", "Flax nnx", "Equinox"} <= set(quickstart)
    assert "jax.shard_map" in sections(DOCS / "distributed.md")["One step, any mapping"]


def test_every_method_has_a_page_with_a_snippet():
    from curvax import methods

    code = "".join(
        code for page in (DOCS / "methods").glob("*.md") for code in sections(page).values()
    )
    assert [name for name in methods.__all__ if f"curvax.{name}(" not in code] == []


def test_readme_step_runs_on_an_equinox_model():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(3, 1, 4, 1, key=jax.random.key(0), activation=jnp.tanh)
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params, batch):
        predict = jax.vmap(eqx.combine(params, static))
        return jnp.mean((predict(batch[0])[:, 0] - batch[1]) ** 2)

    batch = jnp.arange(24.0).reshape(8, 3) / 24, jnp.ones(8)
    objective = curvax.Objective(loss, batch)
    _, grads = objective.value_and_grad(params)
    for tx in (curvax.sam(optax.identity(), 0.1), curvax.adahessian(0.1)):
        updates, _ = tx.update(grads, tx.init(params), params, value_fn=objective)
        moved = eqx.combine(eqx.apply_updates(params, updates), static)
        assert jnp.isfinite(jax.vmap(moved)(batch[0])).all()
    flat, unravel = ravel_pytree(params)
    g = jax.grad(lambda w: loss(unravel(w), batch))(flat)
    by_hand = jax.grad(lambda w: loss(unravel(w), batch))(flat + 0.1 * g / jnp.linalg.norm(g))
    updates, _ = curvax.sam_perturb(0.1).update(
        grads, curvax.sam_perturb(0.1).init(params), params, value_fn=objective
    )
    np.testing.assert_allclose(ravel_pytree(updates)[0], by_hand, rtol=1e-12)


def test_the_version_is_the_one_in_pyproject():
    version = PROJECT["version"]
    assert curvax.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_links_within_the_repository_lead_to_files(page):
    links = re.findall(r'(?:\]\(|src(?:set)?=")(?!\w+:|#)([^)#"\s]+)', page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize(
    "path", [*PAGES, *NOTEBOOKS, ROOT / "mkdocs.yml", ROOT / "CITATION.cff"], ids=label
)
def test_repository_address_is_the_one_in_pyproject(path):
    found = re.findall(r"github(?:\.com)?/([\w.-]+/curvax)\b", path.read_text())
    assert set(found) <= {REPOSITORY}


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=label)
def test_no_page_installs_curvax_from_pypi(path):
    text = path.read_text().replace('\\"', '"')
    assert not re.findall(r"""pip install (?:-\S+ )*["']?curvax\b(?!\S* @ git\+).*""", text)


def decimals(text: str) -> list[str]:
    return re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", text)


def stands_in(table: str, number: str) -> bool:
    """Whether a number of a table, rounded to as many digits, is this one."""
    digits = len(number.partition(".")[2])
    return number in {f"{float(x):.{digits}f}" for x in re.findall(r"\d+(?:\.\d+)?", table)}


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_numbers_next_to_a_link_to_a_table_stand_in_that_table(page):
    for row in page.read_text().splitlines():
        tables = re.findall(r"\]\((\S*tests/evidence/\w+\.md)\)", row)
        if not row.startswith("|") or not tables:
            continue
        text = " ".join((page.parent / table).read_text() for table in tables)
        assert [x for x in decimals(row) if not stands_in(text, x)] == [], row


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_shows_the_numbers_of_its_caption():
    caption = re.search(r'alt="([^"]*)"', README.read_text())
    assert caption is not None
    rows = load("make_picture").read()
    assert len(rows) == 5
    for row in rows:
        assert f"{row.accuracy:.1f} % and {row.eigenvalue:.3g}" in caption[1]


def test_the_drawn_floors_are_those_of_the_tests():
    drawn = load("make_floors")
    assert drawn.SVG.read_text() == drawn.draw(drawn.read()), "run `python docs/make_floors.py`"
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", (DOCS / "architecture.md").read_text(), re.M)
    listed = {(int(floor), name) for floor, name in rows}
    assert listed == {(n, name) for n, floor in enumerate(drawn.read()) for name in floor}


def reference() -> list[str]:
    """The names of the API pages, by their heading where they have one."""
    pages = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    blocks = re.findall(r"^::: (\S+)\n((?: +.*\n)*)", pages + "\n", re.M)
    headings = [re.search(r"heading: (\S+)", textwrap.dedent(options)) for _, options in blocks]
    return [heading[1] if heading else path for (path, _), heading in zip(blocks, headings)]


@pytest.mark.parametrize(
    "module", ["curvax", "curvax.analysis", "curvax.plotting", "curvax.flax_bridge"]
)
def test_every_public_name_is_in_the_api_reference_once(module):
    listed = [name for name in reference() if name.rpartition(".")[0] == module]
    public = importlib.import_module(module).__all__
    assert sorted(listed) == sorted(f"{module}.{name}" for name in public)
