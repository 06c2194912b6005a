"""Filters of the logs of libraries."""

import os

import pytest

from curvax.training.runtime.log_filters import silence_libtpu


@pytest.mark.parametrize(
    ("there", "hosts"), [([], "localhost"), (["accel0"], None), (["vfio/0"], None)]
)
def test_silence_libtpu_sets_hosts_only_without_a_tpu(there, hosts, tmp_path, monkeypatch):
    environment: dict[str, str] = {}
    monkeypatch.setattr("os.environ", environment)
    for name in there:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    silence_libtpu(tmp_path)
    assert environment.get("TPU_WORKER_HOSTNAMES") == hosts
    assert len(environment) == (0 if there else 2)


def test_silence_libtpu_keeps_the_users_settings(tmp_path, monkeypatch):
    monkeypatch.setattr("os.environ", {"TPU_WORKER_HOSTNAMES": "mine"})
    silence_libtpu(tmp_path)
    assert os.environ["TPU_WORKER_HOSTNAMES"] == "mine"
