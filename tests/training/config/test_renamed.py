"""Renamed config fields: run folders and files with the old names still work."""

import json
import warnings

import jax
import pytest
import tiny_run

from curvax.cli import main
from curvax.training.compare import commands, comparison, grid_search
from curvax.training.config import configs, defaults
from curvax.training.config.renamed import RENAMED
from curvax.training.evaluation import trained_runs
from curvax.training.runtime import run_dir

# Both files as they were written before the renaming.
CONFIG = """\
{
  "base": "adamw(cosine(lr))",
  "batch": 16,
  "beside": true,
  "checkpoint_every": 3,
  "data": {
    "area": [
      0.05,
      1.0
    ],
    "augment": [
      "shift_crop(1)"
    ],
    "labels": null,
    "length": 48,
    "mean": null,
    "name": "digits",
    "noise": 0.25,
    "path": null,
    "side": 8,
    "size": 64,
    "smoothing": 0.1,
    "std": null,
    "threads": null
  },
  "devices": 1,
  "epochs": 1,
  "eval_batch": 512,
  "fsdp": false,
  "hessian_examples": 0,
  "keep": 7,
  "log_every": 1,
  "loss": null,
  "lr": 0.01,
  "microbatch": null,
  "model": {
    "name": "mixer_tiny",
    "options": {
      "channel_width": 8,
      "depth": 1,
      "dropout": 0.1,
      "scan": false,
      "token_width": 4,
      "width": 8
    }
  },
  "name": "tiny_run",
  "new_head": false,
  "optimizer": "pmean_updates(axes) | sgd(lr)",
  "others": [
    "adam(lr)"
  ],
  "regime": "shard_map",
  "rho": 0.05,
  "seed": 0,
  "start": null,
  "task": "images",
  "test_every": 1
}
"""
PLAN = """\
{
  "command": "train",
  "optimizers": [
    "pmean_updates(axes) | sgd(lr)"
  ],
  "seeds": 1,
  "fair": false,
  "fields": {}
}
"""
OLD_FILE = """\
from curvax.training.config import defaults

def get_config():
    config = defaults(lr=1e-2, keep=3)
    config.data.update(size=64, noise=0.4)
    config.data.side = 16
    config.base = "sgd(lr)"
    config.optimizer = f"sam_perturb(0.05) | {config.base}"
    config.update(regime="pmap", beside=True)
    return config
"""
NEW_FILE = """\
from curvax.training.config import defaults

def get_config():
    config = defaults(lr=1e-2, keep_checkpoints=3)
    config.data.update(num_train=64, label_noise=0.4)
    config.data.image_size = 16
    config.baseline = "sgd(lr)"
    config.optimizer = f"sam_perturb(0.05) | {config.baseline}"
    config.update(parallelism="pmap", train_baselines=True)
    return config
"""


@pytest.fixture
def old_run(tmp_path):
    folder = tmp_path / "tiny_run-train-20260101-120000"
    folder.mkdir()
    (folder / "config.json").write_text(CONFIG)
    (folder / "plan.json").write_text(PLAN)
    return folder


def test_run_folder_with_old_field_names_is_read(old_run):
    config, spec = commands.read(old_run)
    old = json.loads(CONFIG)
    for name, new in RENAMED.items():
        stored = old["data"][name.removeprefix("data.")] if "." in name else old[name]
        found = config[new]
        assert (list(found) if isinstance(found, tuple) else found) == stored
    assert spec == commands.RunSpec("train", ["pmean_updates(axes) | sgd(lr)"])
    options = {f"model.options.{name}" for name in old["model"]["options"]}
    assert set(configs.flat(config)) == {*configs.flat(defaults(lr=0.0, rho=0.0)), *options}
    assert run_dir.is_run(old_run)


def test_run_folder_with_old_field_names_is_resumed(old_run):
    with jax.enable_x64(False):
        assert main.main(["resume", str(old_run)]) == 0
        (run,) = trained_runs.load([old_run])
    assert int(run.state.step) == 4
    assert json.loads((old_run / "config.json").read_text()) == json.loads(CONFIG)


def test_config_file_with_old_field_names_is_read_with_warnings(tmp_path):
    (tmp_path / "old.py").write_text(OLD_FILE)
    (tmp_path / "new.py").write_text(NEW_FILE)
    with pytest.warns(FutureWarning) as caught:
        old = configs.load(str(tmp_path / "old.py"))
    new = configs.load(str(tmp_path / "new.py"))
    new.name = old.name
    assert old.to_dict() == new.to_dict()
    said = {str(each.message) for each in caught}
    assert "The config field `data.noise` is now called `data.label_noise`. Use that name." in said
    assert "The config field `keep` is now called `keep_checkpoints`. Use that name." in said
    own = [each for each in caught if each.filename == str(tmp_path / "old.py")]
    assert len(own) == len(caught)


@pytest.mark.parametrize("name", RENAMED)
def test_old_field_name_on_the_command_line_warns_and_works(name):
    values = {"data.area": "(0.5,1.0)", "others": "['sgd(0.1)']", "beside": "true"}
    value = values.get(name, "3" if name not in ("regime", "base", "start") else "pmap")
    with pytest.warns(FutureWarning, match=f"`{name}` is now called `{RENAMED[name]}`"):
        old = commands.configure(tiny_run.__file__, [f"--{name}={value}"])
    assert old == commands.configure(tiny_run.__file__, [f"--{RENAMED[name]}={value}"])


def test_old_field_name_works_as_an_override():
    with pytest.warns(FutureWarning, match="`regime` is now called `parallelism`"):
        changed = commands.with_overrides(tiny_run.get_config(), ["--regime=pmap"])
    assert changed.parallelism == "pmap"


def test_old_field_name_in_a_grid_warns_and_stored_names_keep_their_folder():
    with pytest.warns(FutureWarning, match="`data.noise` is now called `data.label_noise`"):
        fields = grid_search.read_fields(["data.noise=0.1,0.2"])
    assert fields == {"data.label_noise": ["0.1", "0.2"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (point,) = comparison.grid({"m": tiny_run.get_config()}, {"data.noise": ["0.5"]}).items()
    assert point[0] == "m, data.noise=0.5"
    assert point[1].data.label_noise == 0.5
