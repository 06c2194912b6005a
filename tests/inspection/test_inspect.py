"""`curvax inspect`: its numbers are those of `curvax.analysis`, its page is self-contained."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import curvax
from curvax import analysis
from curvax.cli import main
from curvax.inspection import checkpoint_loss, measures, runner
from curvax.inspection.budget import Budget, Price, Work
from curvax.inspection.measures import RHO, Measure
from curvax.training.checkpoints import Checkpoints
from curvax.training.compare import commands
from curvax.training.config import defaults
from curvax.training.evaluation import trained_runs

EXAMPLES = 32
PICTURES = {
    "eigenvalues", "density", "blocks", "factors", "sharpness", "surrogate_gap", "m_sharpness",
    "random_sharpness", "line", "plane", "surface", "active", "activations", "weights",
    "alignment", "angle", "kernel",
}  # fmt: skip


def tiny(**fields):
    config = defaults(lr=1e-2, rho=0.05)
    config.name = "tiny"
    config.model = {"name": "mlp", "options": {"widths": (6,), "activation": "gelu"}}
    config.data.update(num_train=64, label_noise=0.25)
    config.update(batch=16, epochs=1, hessian_examples=0, optimizer="sam_perturb(rho) | adam(lr)")
    config.update(baseline="adam(cosine(3e-2))", **fields)
    return config


def trained(root, config):
    commands.start(config, commands.RunSpec("compare", commands.methods(config), seeds=2), root)
    (folder,) = root.iterdir()
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a comparison of two methods."""
    return trained(tmp_path_factory.mktemp("run"), tiny())


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    """The folder that inspecting it wrote."""
    root = tmp_path_factory.mktemp("inspected")
    arguments = [str(run), "--budget=30", f"--examples={EXAMPLES}", f"--runs={root}"]
    assert main.main(["inspect", *arguments]) == 0
    (folder,) = root.iterdir()
    return folder


@pytest.fixture(scope="module")
def told(folder):
    """Its numbers, and an error for what is no JSON."""

    def refuse(constant):
        raise ValueError(constant)

    return json.loads((folder / "inspect.json").read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def sam(run):
    """The loss and the parameters of the second method, put together by hand."""
    (subject,) = trained_runs.load([run / "1-sam_perturb-adam" / "seed0"])
    experiment = subject.experiment
    few = experiment.data.train.rows(slice(EXAMPLES))
    whole = jax.tree.map(jnp.asarray, few.gather(np.arange(EXAMPLES)))
    batch = experiment.task.in_test(whole)
    predict = lambda params, batch: experiment.model.apply({"params": params}, batch["input"])
    objective = curvax.Objective(curvax.categorical("label"), batch, model=predict)
    return objective, subject.state.params


# The measures.


def test_every_measure_is_taken_or_left_out_with_a_reason(told):
    titles = {measure.title: measure.name for measure in measures.MEASURES}
    excused = {titles[each["measure"]]: each["kind"] for each in told["left_out"]}
    assert excused == {"attention": "inapplicable"}
    assert told["measures"].keys() | excused.keys() == set(titles.values())
    assert all(list(runs) == list(told["runs"]) for runs in told["measures"].values())


@pytest.mark.parametrize(
    ("measure", "path", "direct"),
    [
        ("surrogate_gap", [str(RHO), "gap"], lambda o, p: analysis.surrogate_gap(o, p, RHO).gap),
        ("sharpness", ["0.5", "value"], lambda o, p: analysis.sharpness(o, p, 0.5, steps=3).value),
        ("m_sharpness", ["4", "value"], lambda o, p: analysis.m_sharpness(o, p, RHO, 4).value),
        ("trace", ["mean"], lambda o, p: analysis.curvature_trace(o, p).mean),
        ("weights", ["head"], lambda o, p: analysis.block_norms(p)["head"]),
        ("gradient_angle", ["0.1", "angle"], lambda o, p: analysis.gradient_angle(o, p, 0.1).angle),
        ("inside", ["active", "gelu"], lambda o, p: analysis.active_fraction(o, p)["gelu"]),
        (
            "kernel",
            ["condition", "largest"],
            lambda o, p: analysis.ntk_condition_number(o, p).largest,
        ),
    ],
)  # fmt: skip
def test_inspected_numbers_are_those_of_the_analysis(measure, path, direct, told, sam):
    found = told["measures"][measure]["sam_perturb | adam"]
    for name in path:
        found = found[name]
    np.testing.assert_allclose(found, direct(*sam), rtol=1e-5, atol=1e-7)  # float32 parameters


def test_inspected_eigenvalues_are_those_of_the_dense_hessian(told, sam):
    objective, params = sam
    flat, unravel = ravel_pytree(params)
    hessian = np.asarray(jax.hessian(lambda x: objective(unravel(x)))(flat))
    largest = np.linalg.eigvalsh(hessian)[:-6:-1]
    found = told["measures"]["eigenpairs"]["sam_perturb | adam"]
    np.testing.assert_allclose(
        found["values"], largest, atol=checkpoint_loss.TOLERANCE * largest[0]
    )
    for name, block in told["measures"]["blocks"]["sam_perturb | adam"].items():
        fill = {key: jnp.ones_like if key == name else jnp.zeros_like for key in params}
        own = {key: jax.tree.map(fill[key], params[key]) for key in params}
        inside = np.flatnonzero(ravel_pytree(own)[0])
        (top,) = np.linalg.eigvalsh(hessian[np.ix_(inside, inside)])[-1:]
        np.testing.assert_allclose(block["value"], top, rtol=1e-2)  # the search's own tolerance


# The budget.


class Clock:
    """A clock that measures advance."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def stub(name, gradients, clock, takes=None, error=None):
    def take(point):
        clock.now += gradients if takes is None else takes
        if error:
            raise error
        return name

    return Measure(name, name, take, lambda point: Work(0, gradients))


def surveyed(monkeypatch, clock, seconds, *stubs):
    monkeypatch.setattr(runner, "price", lambda point: Price(0.0, 1.0))
    runs: dict[str, Any] = {"a": None, "b": None}
    return runner.measure_all(runs, Budget(seconds, clock), measures=stubs)


def test_measure_beyond_the_budget_is_left_out_and_smaller_ones_run(monkeypatch):
    clock = Clock()
    stubs = [stub("first", 3, clock), stub("large", 8, clock), stub("small", 1, clock)]
    found = surveyed(monkeypatch, clock, 10, *stubs)
    assert found.results == {name: {"a": name, "b": name} for name in ("first", "small")}
    (omission,) = found.omissions
    assert omission[:3] == ("large", ("a", "b"), "budget")
    assert "16 s" in omission.reason
    assert "4 s of the budget of 10 s" in omission.reason
    assert found.seconds == 8


def test_price_includes_eigenpairs_until_they_are_computed():
    work = {measure.name: measure.work for measure in measures.MEASURES}
    bare: Any = SimpleNamespace()
    searched: Any = SimpleNamespace(pairs="found")
    search = work["eigenpairs"](bare).gradients
    for name in ("eigenpairs", "alignment", "landscape"):
        assert work[name](bare).gradients - work[name](searched).gradients == search > 0


def test_time_estimates_follow_the_measured_time(monkeypatch):
    clock = Clock()
    stubs = [stub("slow", 1, clock, takes=3), stub("next", 3, clock)]
    found = surveyed(monkeypatch, clock, 20, *stubs)
    assert list(found.results) == ["slow"]
    assert "18 s, and 14 s" in found.omissions[0].reason


def test_failed_measure_is_reported_and_the_others_run(monkeypatch):
    clock = Clock()
    stubs = [
        stub("broken", 1, clock, error=RuntimeError("out of memory\nlong story")),
        stub("refused", 1, clock, error=ValueError("no activation")),
        stub("whole", 1, clock),
    ]
    found = surveyed(monkeypatch, clock, 100, *stubs)
    assert list(found.results) == ["whole"]
    told = {(each.measure, *each.runs): (each.kind, each.reason) for each in found.omissions}
    assert told["broken", "a"] == ("failed", "RuntimeError: out of memory")
    assert told["refused", "b"] == ("inapplicable", "no activation")


# The runs of a folder.


def test_folder_means_the_first_seed_of_each_variant(run):
    names = lambda *folders: [subject.name for subject in trained_runs.load(folders)]
    assert names(run) == ["adam", "sam_perturb | adam"]
    arm = run / "0-adam"
    assert names(arm, run) == names(run)
    assert names(arm / "seed1", arm) == ["adam, seed 1", "adam, seed 0"]
    assert [int(s.state.step) for s in trained_runs.load([arm])] == [4]


def test_reading_checkpoints_logs_nothing(run, caplog):
    Checkpoints(run / "0-adam" / "seed0" / "checkpoints", read_only=True)
    assert not caplog.messages


def complaint(capsys, *folders):
    assert main.main(["inspect", *map(str, folders)]) == 2
    return capsys.readouterr().err


def test_folder_without_a_run_is_refused(tmp_path, capsys):
    assert f"{tmp_path} holds no run" in complaint(capsys, tmp_path)
    assert "holds no run" in complaint(capsys, tmp_path / "nowhere")


def test_run_without_a_checkpoint_is_refused(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "0-adam" / "seed0" / "checkpoints")
    assert "0-adam/seed0 has no checkpoint" in complaint(capsys, copy)
    assert f"curvax resume {copy}" in complaint(capsys, copy)


def test_runs_of_different_tasks_are_refused(run, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    page = json.loads((other / "config.json").read_text())
    page |= {"task": "regression", "data": page["data"] | {"name": "diabetes"}}
    (other / "config.json").write_text(json.dumps(page))
    said = complaint(capsys, run, other)
    assert "`images` on `digits`" in said
    assert "`regression` on `diabetes`" in said


@pytest.mark.parametrize(
    ("option", "hint"), [("--budget=0", "positive"), ("--budget=inf", "positive")]
)
def test_budget_that_is_not_positive_is_refused(run, option, hint, capsys):
    with pytest.raises(SystemExit):
        main.main(["inspect", str(run), option])
    assert hint in capsys.readouterr().err


def test_config_fields_are_refused_by_inspect(run, capsys):
    assert main.main(["inspect", str(run), "--epochs=3"]) == 2
    assert "--epochs=3" in capsys.readouterr().err


# The page.


class Reader(HTMLParser):
    """Every tag that is opened, with its attributes; refuses one that is closed out of turn."""

    VOID = frozenset({"meta", "link", "img"})

    def __init__(self, text):
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_page_is_self_contained_and_shows_every_figure(folder, told):
    text = (folder / "report.html").read_text()
    reader = Reader(text)
    images = [attributes for tag, attributes in reader.tags if tag == "img"]
    figures = {a["id"].removeprefix("figure-") for tag, a in reader.tags if tag == "figure"}
    assert figures == PICTURES == {path.stem for path in folder.glob("*.png")}
    assert len(images) == len(PICTURES)
    assert all(image["src"].startswith("data:image/png;base64,") for image in images)
    assert all(len(image["alt"]) > 30 for image in images)
    assert not re.search(r"https?:|<script|@import|url\(", text)
    links = [a["href"] for tag, a in reader.tags if tag == "a"]
    anchors = {a["id"] for _, a in reader.tags if "id" in a}
    assert {link.removeprefix("#") for link in links} <= anchors
    assert len(links) >= 8


def test_page_has_findings_and_caveats(folder, told):
    said = "".join(Reader((folder / "report.html").read_text()).texts)
    for sentence in (*told["findings"], *told["caveats"]):
        assert sentence.replace("`", "") in said
    assert any("learning rates differ (0.03 in `adam`" in caveat for caveat in told["caveats"])
    largest = {run: r["values"][0] for run, r in told["measures"]["eigenpairs"].items()}
    assert f"{largest['adam']:.3g} in `adam`" in told["findings"][0]


BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
WIDTHS = """<script>addEventListener("load", () => {
  document.body.dataset.widths = [...document.images].map(image => image.naturalWidth).join();
});</script></body>"""


@pytest.mark.skipif(not BROWSER, reason="needs a browser: apt-get install chromium")
@pytest.mark.parametrize("dark", [False, True])
def test_browser_shows_the_page_without_errors(folder, dark, tmp_path):
    page = tmp_path / "page.html"
    page.write_text((folder / "report.html").read_text().replace("</body>", WIDTHS))
    assert BROWSER is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    options += [f"--user-data-dir={tmp_path}", "--virtual-time-budget=5000", "--dump-dom"]
    options += ["--force-dark-mode"] if dark else []
    command = [BROWSER, *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    widths = re.search(r'data-widths="([\d,]+)"', done.stdout)
    assert widths is not None
    assert len(widths[1].split(",")) == len(PICTURES)
    assert all(int(width) > 0 for width in widths[1].split(","))
