"""Errors of topologies that are unknown, too large, or without their compiler."""

import importlib.util

import pytest

from curvax.cli import main
from curvax.planning import topologies
from curvax.training.runtime.errors import ConfigError

pytestmark = pytest.mark.usefixtures("single_precision")

NO_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs pip install 'curvax[tpu]'"
)


@pytest.mark.parametrize("name", ["v5e", "v9:4x4", "cpu:0", "cpu", "v5e:16by16"])
def test_unknown_topology_raises_with_the_known_ones(name):
    with pytest.raises(ConfigError, match=r"v3:4x8.*v5e:16x16.*cpu:8"):
        topologies.find(name)


def test_tpu_topology_without_libtpu_raises_with_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'curvax\[tpu\]'"):
        topologies.find("v5e:16x16")


def test_too_few_cpu_devices_raise_with_how_to_get_more():
    with pytest.raises(ConfigError, match="host_platform_device_count=1000"):
        topologies.find("cpu:1000")


def test_batch_that_does_not_divide_over_a_topology_raises(tmp_path, capsys):
    given = ["digits", "--batch=12", "--topology=cpu:8", f"--runs={tmp_path}"]
    assert main.main(["plan", *given]) == 2
    said = capsys.readouterr().err
    assert "12 examples do not divide over 8 devices" in said
    assert "Use a multiple as `batch`, or a smaller topology." in said
    assert "--devices" not in said


@pytest.mark.evidence
@NO_LIBTPU
def test_topology_that_libtpu_refuses_raises():
    with pytest.raises(ConfigError, match=r"libtpu refuses it: .*3x5"):
        topologies.find("v5e:3x5")
