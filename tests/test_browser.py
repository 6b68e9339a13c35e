"""The timestep slider in a real browser: JupyterLab runs a notebook, and the slider is moved by keyboard."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import nbformat
import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 240_000  # ms; 20 s is usual, but two busy cores can take many times as long

CELL = """
import torch
from ldm_edu.diffusion import Step
from ldm_edu.widgets import TimestepSlider

clean, noise = torch.zeros(1, 3, 64, 64), torch.randn(1, 3, 64, 64)
steps = [Step(t, clean + noise * (t + 1) / 100, clean + t / 100) for t in (99, 66, 33, -1)]
TimestepSlider(steps, alt="a grey square")
"""

# The page says idle before the notebook's own kernel is connected; the session context is what counts.
READY = """() => {
    const notebook = window.jupyterapp?.shell.currentWidget;
    const session = notebook?.context?.sessionContext;
    return session?.isReady && session.session?.kernel?.status === "idle";
}"""


@contextmanager
def jupyterlab(folder):
    """A JupyterLab of its own on this machine's loopback address; gives its URL with its token."""
    token = secrets.token_hex(16)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        name: str(folder / name.lower())
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    }
    arguments = [
        *("--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}"),
        *(
            "--ServerApp.port_retries=0",
            f"--IdentityProvider.token={token}",
            f"--ServerApp.root_dir={folder}",
        ),
        *("--LabApp.expose_app_in_browser=True", f"--LabApp.workspaces_dir={folder / 'workspaces'}"),
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    with open(folder / "server.log", "w", encoding="utf-8") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *arguments], env=environment, stdout=log, stderr=log
        )
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_for(f"{address}/api?token={token}", server, folder / "server.log")
        yield f"{address}/lab/tree/test.ipynb?token={token}"
    finally:
        server.terminate()  # on which it ends its kernels too
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def _wait_for(url, server, log, seconds=PATIENCE / 1000):
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.3)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text(encoding='utf-8')}")


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian: apt-get install chromium)")
def test_the_timestep_slider_follows_the_keyboard(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL.strip())])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, tmp_path / "test.ipynb")
    with jupyterlab(tmp_path) as url, playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(url)
        page.wait_for_function(READY, timeout=PATIENCE)
        page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        slider = page.locator(".ldm-timestep [role=slider]")
        slider.wait_for(timeout=PATIENCE)

        widget = page.locator(".ldm-timestep")
        seen = {}
        for key, label in [
            ("Home", "t = 99"),
            ("ArrowRight", "t = 66"),
            ("End", "clean"),
            ("ArrowLeft", "t = 33"),
        ]:
            slider.press(key)
            noisy = widget.locator(f"img[alt='zₜ at {label}: a grey square']")
            noisy.wait_for(timeout=PATIENCE)
            # The label comes in a message of its own, after the pictures'.
            widget.filter(has_text=f"Denoising: {label}").wait_for(timeout=PATIENCE)
            assert f"Denoising: {label}" in widget.inner_text()
            seen[label] = noisy.get_attribute("src")
            # not only sent, but decoded and on the page
            assert noisy.evaluate("image => image.decode().then(() => image.naturalWidth)") == 64
            assert noisy.bounding_box()["width"] == 256
        assert len(set(seen.values())) == 4
        browser.close()
