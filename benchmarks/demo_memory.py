"""Peak memory of the demo: JupyterLab's server, and a kernel that runs the quickstart and a round.

Run it from the repository's root, on Linux::

    python benchmarks/demo_memory.py

The kernel runs every cell of ``notebooks/quickstart.ipynb``, then labels three hits yes and three
no, refines, and runs the cells below the widget again. The figures are each process's peak resident
set (``VmHWM``): pages of shared libraries and of memory maps count, so the sum is an upper bound.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import nbformat
from nbclient import NotebookClient

QUICKSTART = Path(__file__).parents[1] / "notebooks" / "quickstart.ipynb"
ROUND = """
session.label(positive=session.hits.rows[:3], negative=session.hits.rows[-3:])
session.refine()
"""
PEAK = """
import json, os, re
status = open(f"/proc/{os.getpid()}/status").read()
print(json.dumps({
    "peak_kib": int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]), "n_found": len(session.result)
}))
"""
SERVER_START_S = 120


def kernel_peak() -> tuple[float, int]:
    """Return the kernel's peak in MB and how many images its round found."""
    notebook = nbformat.read(QUICKSTART, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    again = [nbformat.v4.new_code_cell(cell.source) for cell in code[2:]]
    extra = [nbformat.v4.new_code_cell(ROUND), *again, nbformat.v4.new_code_cell(PEAK)]
    notebook.cells += extra
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": folder}}
        )
        client.execute()
    (output,) = notebook.cells[-1].outputs
    said = json.loads(output.text)
    return said["peak_kib"] * 1024 / 1e6, said["n_found"]


def server_peak() -> float:
    """Return the peak in MB of a JupyterLab server that has served its page."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"),
                *(f"--ServerApp.port={port}", "--IdentityProvider.token="),
                f"--ServerApp.root_dir={folder}",
            ],
            env=os.environ | {"JUPYTER_RUNTIME_DIR": folder},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            _wait_for(f"http://127.0.0.1:{port}/lab", server)
            status = Path(f"/proc/{server.pid}/status").read_text()
        finally:
            server.terminate()
            server.wait()
    match = re.search(r"VmHWM:\s+(\d+)", status)
    assert match is not None, "the kernel of this machine reports no VmHWM"
    return int(match[1]) * 1024 / 1e6


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + SERVER_START_S
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=10):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not answer at {url} within {SERVER_START_S} s")


def main() -> None:
    """Print both peaks and their sum."""
    kernel, n_found = kernel_peak()
    server = server_peak()
    print(f"kernel, quickstart and one round ({n_found} found): {kernel:.0f} MB")
    print(f"JupyterLab server: {server:.0f} MB")
    print(f"both: {kernel + server:.0f} MB of Binder's 2,000 MB")


if __name__ == "__main__":
    main()
