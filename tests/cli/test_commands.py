"""The command line: the files that it writes, and its error messages."""

import gzip
import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tiny_run

from curvax.cli import main
from curvax.training.compare import step_cost
from curvax.training.runtime import distributed
from curvax.training.runtime.errors import ConfigError

TINY = str(Path(tiny_run.__file__))


def run(*arguments, runs):
    """The folder that a command left, or None."""
    assert main.main([*arguments, f"--runs={runs}"]) == 0
    (folder,) = runs.iterdir()
    return folder


def complaint(capsys, *arguments):
    """The error output of a command that must fail."""
    assert main.main(list(arguments)) == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert printed.err.startswith("curvax: ")
    return printed.err


def test_train_writes_a_run_folder_that_resume_finds_finished(tmp_path, capsys):
    folder = run("train", TINY, "--train_baselines=true", "--epochs=2", runs=tmp_path)
    files = {path.name for path in folder.iterdir()}
    assert files >= {"config.json", "run.json", "table.txt", "curves.png"}
    assert json.loads((folder / "config.json").read_text())["epochs"] == 2
    base, method = sorted(path for path in folder.iterdir() if path.is_dir())
    for each in (base, method):
        lines = [json.loads(x) for x in (each / "seed0" / "metrics.jsonl").read_text().splitlines()]
        assert [x["step"] for x in lines if "test/accuracy" in x] == [4, 8]
    assert any("train/surrogate_gap" in x for x in lines)
    first = capsys.readouterr().out
    assert f"curvax resume {folder}" in first
    results = json.loads((method / "seed0" / "results.json").read_text())
    assert f"{results['test_accuracy']:.1%}" in first
    assert "64 images of digits, 25% of them wrongly labelled" in " ".join(first.split())
    assert main.main(["resume", str(folder)]) == 0
    table = (folder / "table.txt").read_text()
    assert "sam_perturb | gsam_project | adamw" in table


def test_compare_reports_every_variant(tmp_path, capsys):
    folder = run("compare", TINY, "--seeds=2", "--fair", "--epochs=1", runs=tmp_path)
    page = json.loads((folder / "compare.json").read_text())
    assert list(page) == [
        "adamw, better of both",
        "adamw",
        "adamw, 2 × epochs",
        "sam_perturb | gsam_project | adamw",
    ]
    assert [[run["steps"] for run in arm["runs"]] for arm in page.values()][1:] == [
        [4, 4],
        [8, 8],
        [4, 4],
    ]
    for arm in page.values():
        scores = [run["test_accuracy"] for run in arm["runs"]]
        assert arm["accuracy"]["mean"] == pytest.approx(sum(scores) / 2)
    assert (folder / "compare.png").stat().st_size > 0
    assert "points over adamw, better of both" in " ".join(capsys.readouterr().out.split())


def test_grid_search_scores_held_out_examples_at_every_point(tmp_path, capsys):
    folder = run(
        "compare",
        TINY,
        "--sweep=rho=0,0.1",
        "--sweep=lr=1e-2",
        "--epochs=1",
        "--hessian_examples=0",
        runs=tmp_path,
    )
    ((name, points),) = json.loads((folder / "sweep.json").read_text()).items()
    assert name == "sam_perturb | gsam_project | adamw"
    assert [(point["rho"], point["lr"]) for point in points] == [("0", "1e-2"), ("0.1", "1e-2")]
    hits = [6 * point["mean"] for point in points]  # a tenth of 64 examples
    assert hits == pytest.approx([round(hit) for hit in hits])
    assert (folder / "sweep.png").stat().st_size > 0
    assert "--lr=1e-2" in capsys.readouterr().out


REGRESSION = """
from curvax.training.config import defaults

def get_config():
    config = defaults(lr=3e-2)
    config.task, config.data.name, config.model.name = "regression", "diabetes", "mlp"
    config.model.options.widths = (8,)
    config.update(baseline="adam(lr)", optimizer="gauss_newton(damping=1.0)")
    config.update(more_optimizers=["sgd(lr)"], train_baselines=True, devices=1)
    config.update(batch=354, epochs=2, log_every=1, hessian_examples=0)
    return config
"""


@pytest.fixture
def regression(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(REGRESSION)
    return str(path)


def test_regression_is_trained_and_compared_by_its_own_metric(regression, tmp_path, capsys):
    folder = run("train", regression, runs=tmp_path / "train")
    said = " ".join(capsys.readouterr().out.split())
    assert "354 rows of diabetes" in said
    for name in ("adam", "gauss_newton", "sgd"):
        assert f"`{name}` predicts the test targets with a squared error of" in said
    assert "test squared error" in (folder / "table.txt").read_text()
    assert (folder / "curves.png").stat().st_size > 0
    assert main.main(["resume", str(folder)]) == 0
    capsys.readouterr()
    folder = run("compare", regression, runs=tmp_path / "compare")
    page = json.loads((folder / "compare.json").read_text())
    assert list(page) == ["adam", "gauss_newton", "sgd"]
    reached = {name: arm["squared_error"]["mean"] for name, arm in page.items()}
    gain = reached["gauss_newton"] - reached["adam"]
    assert page["gauss_newton"]["gain"]["mean"] == pytest.approx(gain)
    assert f"gauss_newton: {gain:+.3f} against adam." in capsys.readouterr().out


def test_grid_search_minimises_a_metric_where_less_is_better(regression, tmp_path, capsys):
    sweep = ["--sweep=lr=1e-2,1e-1", "--batch=100", "--optimizers", "adam(lr)"]
    folder = run("compare", regression, *sweep, runs=tmp_path / "sweep")
    (points,) = json.loads((folder / "sweep.json").read_text()).values()
    best = min(points, key=lambda point: point["mean"])
    said = capsys.readouterr().out
    assert f"lr={best['lr']}, held-out squared error {best['mean']:.3f}" in said


def test_bench_counts_sam_as_two_gradients(tmp_path):
    folder = run("bench", TINY, "--pairs=2", "--model.options.dropout=0.0", runs=tmp_path)
    base, sam = json.loads((folder / "bench.json").read_text()).values()
    assert base["ratio"]["flops"] == 1
    assert base["ratio"]["median"] == 1
    assert 1.5 < sam["ratio"]["flops"] < 2.1  # a step of this tiny model is part Adam
    assert len(sam["seconds"]) == 2


@pytest.mark.parametrize(
    ("field", "hint"),
    [
        ("--epoch=3", "`epochs`"),
        ("--data.nois=0.3", "`data.label_noise`"),
        ("--epochs=many", "`int`"),
        ("--data.augment=flip()", "`list`"),
        ("epochs=3", "`--field=value`"),
        ("--model.options.widht=3", "`width`"),
        ("--model.name=mixer_tinny", "`mixer_tiny`"),
        ("--loss=hinge", "softmax, sigmoid"),
        ("--batch=100", "no step"),
        ("--data.name=digit", "digits"),
        ("--data.augment=['flop()']", "`flip`"),
        ("--microbatch=5", "microbatch"),
        ("--data.label_noise=1.5", "rate"),
        ("--batch=0", "`batch` is a whole number from 1, and was 0"),
        ("--hessian_examples=-3", "`hessian_examples` is a whole number from 0, and was -3"),
        ("--checkpoint_every=2.5", "`int`"),
    ],
)
def test_wrong_field_is_refused_before_anything_is_written(field, hint, tmp_path, capsys):
    assert hint in complaint(capsys, "train", TINY, field, f"--runs={tmp_path}")
    assert not list(tmp_path.iterdir())


def test_unknown_method_is_marked_by_a_caret(tmp_path, capsys):
    said = complaint(capsys, "train", TINY, "--optimizer=sam_perturb(0.1) | adamm(lr)")
    assert "Did you mean `adam`" in said
    line, caret = said.splitlines()[-2:]
    assert line[caret.index("^") :] == "adamm(lr)"


def test_stage_without_its_input_is_refused_before_anything_is_written(tmp_path, capsys):
    optimizer = "--optimizer=ema_rms(0.9) | sgd(0.1)"
    assert "hutchinson_diag" in complaint(capsys, "train", TINY, optimizer, f"--runs={tmp_path}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["train", "digitts"], "Did you mean `digits`"),
        (["train", "missing.py"], "missing.py does not exist"),
        (["resume", "nowhere"], "nowhere holds no run"),
        (["compare", TINY, "--sweep=rho"], "--sweep rho=0.05,0.1,0.2"),
        (["compare", TINY, "--sweep=rho=1", "--sweep=lr=1", "--sweep=seed=1"], "one field"),
        (["compare", TINY, "--sweep=roh=1,2"], "`rho`"),
        (["configs", "digitts"], "Did you mean `digits`"),
    ],
)
def test_wrong_arguments_raise_with_a_hint(arguments, hint, capsys):
    assert hint in complaint(capsys, *arguments)


def test_damaged_data_gives_an_error_of_one_line(tmp_path, capsys):
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / f"{name}-ubyte.gz").write_bytes(b"not gzip")
    said = complaint(capsys, "train", TINY, "--data.name=mnist", f"--data.path={tmp_path}")
    assert "train-images-idx3-ubyte.gz" in said
    assert len(said.splitlines()) == 1


def test_labels_of_the_wrong_shape_are_refused_before_anything_is_written(tmp_path, capsys):
    folder = tmp_path / "idx"
    folder.mkdir()
    for part in ("train", "t10k"):
        for name, shape in (("images-idx3", (10, 28, 28)), ("labels-idx1", (9,))):
            head = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">i4").tobytes()
            content = head + bytes(int(np.prod(shape)))
            (folder / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
    fields = ["--data.name=mnist", f"--data.path={folder}", f"--runs={tmp_path / 'runs'}"]
    said = complaint(capsys, "train", TINY, *fields)
    assert "[10]" in said
    assert "[9]" in said
    assert not (tmp_path / "runs").exists()


def test_a_method_given_twice_is_refused(capsys):
    assert "twice" in complaint(capsys, "compare", TINY, "--optimizers", "sgd(0.1)", "sgd(0.1)")


def test_a_config_with_a_misspelt_field_is_refused_when_loaded(tmp_path, capsys):
    config = tmp_path / "own.py"
    config.write_text(
        "from curvax.training.config import defaults\n"
        "def get_config():\n    config = defaults()\n    config.epoch = 3\n    return config\n"
    )
    said = complaint(capsys, "train", str(config))
    assert str(config) in said
    assert "epoch" in said


@pytest.fixture
def raising(monkeypatch):
    """Runs a command that raises an error, and returns its exit code."""

    def run(error, *options):
        monkeypatch.setattr(distributed, "together", mock.Mock(side_effect=error))
        return main.main(["train", *options])

    return run


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("`epochs` is 0."), 2, "`epochs` is 0."),
        (TypeError("`rho` is text."), 2, "`rho` is text."),
        (OSError("The disk is full."), 2, "The disk is full."),
        (FloatingPointError("The loss is NaN."), 2, "The loss is NaN."),
        (ModuleNotFoundError("No module `grain`"), 2, "pip install 'curvax[train]'"),
        (KeyboardInterrupt(), 130, "stopped."),
        (InterruptedError("terminated."), 143, "terminated."),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_expected_error_is_its_message_and_an_exit_code(error, code, said, raising, capsys):
    assert raising(error) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("curvax: ")
    assert line.endswith(said)


@pytest.mark.parametrize("error", [RuntimeError, KeyError, AttributeError, AssertionError])
def test_a_fault_of_the_program_keeps_its_traceback(error, raising):
    with pytest.raises(error):
        raising(error)


def test_traceback_leaves_interruptions_as_they_are(raising):
    assert raising(InterruptedError("terminated."), "--traceback") == 143
    with pytest.raises(ConfigError):
        raising(ConfigError("`epochs` is 0."), "--traceback")


def test_traceback_shows_where_an_error_arose():
    with pytest.raises(ValueError, match="digitts"):
        main.main(["train", "digitts", "--traceback"])


@pytest.mark.parametrize("command", ["train", "compare", "bench"])
def test_help_shows_fields_and_methods(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main.main([command, "--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "--data.label_noise=0.2" in said
    assert "sam_perturb(0.1) | adamw" in said


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        main.main(["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    for command in main.COMMANDS:
        assert f"{command.name:10}{command.summary}\n" in said


def test_grid_values_are_split_outside_brackets():
    from curvax.training.compare import grid_search

    texts = ["optimizer=sgd(step_decay(0.1, [0.5, 0.75])),adamw(1e-3, b1=0.9)", "rho=0.1"]
    assert grid_search.read_fields(texts) == {
        "optimizer": ["sgd(step_decay(0.1, [0.5, 0.75]))", "adamw(1e-3, b1=0.9)"],
        "rho": ["0.1"],
    }


# Equal time


def clock(seconds, monkeypatch):
    """Steps of the methods take these seconds."""
    costs = lambda experiments, rounds: {
        name: step_cost.Cost(0.0, 0.0, np.full(rounds, each))
        for name, each in zip(experiments, seconds)
    }
    monkeypatch.setattr(step_cost, "measure", costs)


def test_at_equal_time_methods_train_for_the_epochs_that_fit(tmp_path, monkeypatch, capsys):
    """Four steps an epoch: three epochs of the first, one of the second."""
    clock([0.01, 0.025], monkeypatch)
    folder = run("compare", TINY, "--budget=0.13", runs=tmp_path)
    assert json.loads((folder / "run.json").read_text())["method_epochs"] == [3, 1]
    assert "3 of `adamw`, 1 of `sam_perturb" in capsys.readouterr().out
    page = json.loads((folder / "compare.json").read_text())
    assert [[run["steps"] for run in arm["runs"]] for arm in page.values()] == [[12], [4]]
    clock([1.0, 1.0], monkeypatch)  # is not asked again
    assert main.main(["resume", str(folder)]) == 0
    assert json.loads((folder / "compare.json").read_text()) == page


def test_a_budget_below_an_epoch_is_refused_before_anything_is_written(
    tmp_path, monkeypatch, capsys
):
    clock([0.01, 10.0], monkeypatch)
    said = complaint(capsys, "compare", TINY, "--budget=1", f"--runs={tmp_path}")
    assert "one of `sam_perturb" in said
    assert "takes 40 s" in said
    assert not list(tmp_path.iterdir())
