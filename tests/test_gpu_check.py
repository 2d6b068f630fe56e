"""The check of an accelerator: it holds on a CPU, sees what is wrong, and goes on."""

import json
import os
import subprocess
import sys

import gpu_check
import jax
import numpy as np
import pytest
from gpu_check import Result


@pytest.fixture
def records(tmp_path, capsys, monkeypatch):
    """records(laws): (exit status, what it wrote, what it printed)."""

    def run(laws):
        monkeypatch.setattr(gpu_check, "LAWS", laws)
        status = gpu_check.main([f"--out={tmp_path}/checks.json"])
        content = json.loads((tmp_path / "checks.json").read_text())
        return status, content, capsys.readouterr().out

    return run


def test_closed_forms_hold_here_and_are_written_with_the_machine(records):
    status, content, said = records({"closed_forms": gpu_check.closed_forms})
    assert status == 0
    assert [law["status"] for law in content["laws"]] == ["ok"] * 3
    assert content["jax"] == jax.__version__
    assert content["device"] == jax.devices()[0].device_kind
    assert "LayerNorm = float64" in said
    assert said.splitlines()[-1].startswith("3 hold, 0 failed, 0 skipped, in ")


def test_it_goes_on_after_a_failure_and_ends_with_one(records):
    def too_far():
        yield Result("a = b", 2e-5, 1e-5)
        yield Result("no number = b", float("nan"), 1e-5)

    def broken():
        yield Result("c = d", 0.0, 0.0)
        raise RuntimeError("out of memory")

    def absent():
        yield Result("e = f: there is no e")

    status, content, said = records(
        {"too_far": too_far, "broken": broken, "absent": absent}
    )
    assert status == 1
    found = [(law["law"], law["status"]) for law in content["laws"]]
    assert found == [
        ("too_far", "FAILED"),
        ("too_far", "FAILED"),
        ("broken", "ok"),
        ("broken", "FAILED"),
        ("absent", "skipped"),
    ]
    assert "FAILED  too_far: a = b  error 2e-05, bound 1e-05" in said
    assert "RuntimeError('out of memory')" in said
    assert said.splitlines()[-1].startswith("1 hold, 3 failed, 1 skipped, in ")


def test_an_array_is_compared_with_its_norm_unless_it_is_almost_zero():
    expected = {"a": np.full(4, 10.0), "b": np.full(4, 1.0), "zero": np.zeros(4)}
    found = {name: array + 1e-3 for name, array in expected.items()}
    result = gpu_check.worst("x", found, expected, 1e-5)
    assert result.what == "x; worst: zero"
    assert result.error == pytest.approx(1e-2)
    found["zero"] = expected["zero"]
    assert gpu_check.worst("x", found, expected, 1e-5).error == pytest.approx(1e-3)
    with pytest.raises(ValueError, match=r"b'.* differ"):
        gpu_check.worst("x", {"a": found["a"]}, expected, 1e-5)


def test_an_unknown_law_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--only=bitwise,flaot64"])
    assert (
        "flaot64 is no law; there are bitwise, closed_forms" in capsys.readouterr().err
    )


@pytest.mark.slow
def test_all_laws_hold_on_four_devices_of_a_cpu(root, tmp_path):
    ran = subprocess.run(
        [sys.executable, "scripts/gpu_check.py", f"--out={tmp_path}/checks.json"],
        cwd=root,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"},
        capture_output=True,
        text=True,
        timeout=570,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    laws = json.loads((tmp_path / "checks.json").read_text())["laws"]
    assert {law["law"] for law in laws} == {*gpu_check.LAWS}
    assert [x["law"] for x in laws if x["status"] == "skipped"] == ["families"]
