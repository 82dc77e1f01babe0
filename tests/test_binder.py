"""What repo2docker needs, as far as a machine without Docker can check it."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from pathlib import Path

import pytest
import yaml

import clipbranches_widget as cb

ROOT = Path(__file__).parents[1]
BINDER = ROOT / "binder"
# Distribution on the package index -> package of conda-forge, where the names differ.
CONDA_NAMES = {"torch": "pytorch-cpu", "xgboost": "py-xgboost-cpu", "matplotlib": "matplotlib-base"}
SERVER_START_S = 180

pytestmark = pytest.mark.timeout(900)  # the first to need the demo catalog builds it


def normal(requirement):
    """Return the name of a requirement as package indexes compare names."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def environment():
    """The two lists of `environment.yml`: of conda and of pip, name -> line."""
    parsed = yaml.safe_load((BINDER / "environment.yml").read_text(encoding="utf-8"))
    conda = [line for line in parsed["dependencies"] if isinstance(line, str)]
    (pip,) = [part["pip"] for part in parsed["dependencies"] if isinstance(part, dict)]
    assert parsed["channels"] == ["conda-forge", "nodefaults"]
    return {normal(line): line for line in conda}, {normal(line): line for line in pip}


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_python_is_pinned_to_one_the_package_supports(environment, project):
    conda, _ = environment

    # repo2docker reads exactly this form; without it the image has Python 3.10.
    assert re.fullmatch(r"python=3\.1[12]", conda["python"])
    assert project["requires-python"] == ">=3.11"


def test_every_dependency_is_installed_and_once(environment, project):
    conda, pip = environment
    needed = [*project["dependencies"], *project["optional-dependencies"]["demo"], "matplotlib"]

    for requirement in needed:
        name = normal(requirement)
        places = [CONDA_NAMES.get(name, name) in conda, name in pip]
        assert places.count(True) == 1, requirement
    assert not conda.keys() & pip.keys()


def test_version_limits_are_those_of_the_project(environment, project):
    conda, pip = environment

    def limits(line):
        return sorted(re.findall(r"[<>=!]+[0-9.]+", line))

    for requirement in [*project["dependencies"], *project["optional-dependencies"]["demo"]]:
        name = normal(requirement)
        line = conda.get(CONDA_NAMES.get(name, name)) or pip[name]
        assert limits(line) == limits(requirement), line


def test_torch_is_the_cpu_build_and_pip_brings_none(environment):
    conda, pip = environment

    assert "pytorch-cpu" in conda
    assert "torchvision" in conda
    assert not {"torch", "torchvision", "pytorch"} & pip.keys()


def test_nothing_at_the_root_competes_with_the_folder():
    # With a folder binder/ repo2docker reads nothing outside it: no file may pretend to count.
    names = ("environment.yml", "requirements.txt", "apt.txt", "postBuild", "start", "Dockerfile")
    assert [name for name in names if (ROOT / name).exists()] == []
    assert not (BINDER / "Dockerfile").exists()


@pytest.mark.parametrize("name", ["postBuild", "start"])
def test_scripts_are_executable_bash_that_stops_at_an_error(name):
    script = BINDER / name
    text = script.read_text(encoding="utf-8")

    assert os.access(script, os.X_OK)
    assert text.startswith("#!/bin/bash\n")
    assert re.search(r"^set -e", text, re.MULTILINE)
    assert "\r" not in text
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_start_runs_the_command_it_is_given_with_its_arguments():
    assert (BINDER / "start").read_text().rstrip().endswith('exec "$@"')
    words = 'import os, sys; print(os.environ["MALLOC_ARENA_MAX"], sys.argv[1:])'
    done = subprocess.run(
        [str(BINDER / "start"), sys.executable, "-c", words, "two words", "*"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "2 ['two words', '*']\n"


def test_start_passes_the_exit_status_on():
    done = subprocess.run([str(BINDER / "start"), "false"], check=False)
    assert done.returncode == 1


def test_post_build_installs_the_package_without_a_second_torch():
    commands = [
        line
        for line in (BINDER / "postBuild").read_text().splitlines()
        if line and not line.startswith(("#", "set"))
    ]
    install, prepare = commands
    assert {"pip", "install", "--no-deps", "--editable", "."} <= set(install.split())
    assert prepare == "python binder/prepare.py"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Run what postBuild runs; return the configuration folder and what was printed."""
    folder = tmp_path_factory.mktemp("etc") / "jupyter"
    done = subprocess.run(
        [sys.executable, "binder/prepare.py", "--config-folder", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=850,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_prepare_builds_the_demo_catalog_and_tries_a_round(prepared):
    _, said = prepared

    assert f"<Catalog {cb.demo(progress=False).path.name}: " in said
    assert re.search(r"<Result refine for 'animals with wings': \d+ of 4,\d+ images", said)


def test_preparing_twice_keeps_other_settings(prepared, tmp_path):
    script = (
        "import sys; sys.path.insert(0, 'binder'); from pathlib import Path; import prepare; "
        "prepare.set_start_page(Path(sys.argv[1])); prepare.set_start_page(Path(sys.argv[1]))"
    )
    file = tmp_path / "jupyter_lab_config.json"
    file.write_text('{"ServerApp": {"quit_button": false}}')
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, check=True)

    assert json.loads(file.read_text()) == {
        "ServerApp": {"quit_button": False},
        "LabApp": {"default_url": "/lab/tree/notebooks/quickstart.ipynb"},
    }


def test_the_server_starts_at_the_quickstart(prepared, tmp_path):
    config, _ = prepared
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "root").mkdir()
    shutil.copytree(ROOT / "notebooks", tmp_path / "root" / "notebooks")
    log = tmp_path / "log.txt"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [
                *(str(BINDER / "start"), sys.executable, "-m", "jupyterlab", "--no-browser"),
                *("--allow-root", f"--ServerApp.port={port}", "--IdentityProvider.token="),
            ],
            cwd=tmp_path / "root",
            env=os.environ
            | {"JUPYTER_CONFIG_DIR": str(config), "JUPYTER_RUNTIME_DIR": str(tmp_path / "run")},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    base = f"http://127.0.0.1:{port}"
    try:
        assert first_page(base, server, log) == f"{base}/lab/tree/notebooks/quickstart.ipynb"
        with urllib.request.urlopen(f"{base}/api/contents/notebooks/quickstart.ipynb") as answer:
            assert json.load(answer)["type"] == "notebook"
    finally:
        server.terminate()
        server.wait(timeout=60)


def first_page(base, server, log):
    """Return where the server leads whoever opens its address."""
    end = time.monotonic() + SERVER_START_S
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{base}/", timeout=60) as answer:
                return answer.url.partition("?")[0]
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"no server within {SERVER_START_S} s:\n{log.read_text()[-3000:]}")


def test_the_stated_memory_is_a_figure_inside_two_gigabytes():
    text = (BINDER / "README.md").read_text(encoding="utf-8")
    (both,) = re.findall(r"^\| both \| ([\d,]+) MB \|$", text, re.MULTILINE)

    assert 300 < int(both.replace(",", "")) < 2000
