"""A chapter opens as a notebook by a double click: a real JupyterLab server, a real browser, a real kernel."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import jupytext
import pytest

import sigma_book

CHAPTERS = Path(sigma_book.__file__).parent.parent / "chapters"
BROWSER, DRIVER = (shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver"))
CHAPTER = "06_gqa.py"
PATIENCE = 240  # seconds; a chapter takes some fifteen, on a busy machine many more

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs Chromium and chromedriver on the PATH"),
]
PLUGIN = "@jupyterlab/docmanager-extension:plugin"
QUIET = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}}


@pytest.fixture
def start_lab(tmp_path):
    """Start JupyterLab on a copy of the chapters, with a home of its own; gives the address that opens it."""
    started = []

    def start(settings: dict) -> str:
        shutil.copytree(CHAPTERS, tmp_path / "chapters", ignore=shutil.ignore_patterns("__pycache__", ".*"))
        for plugin, values in settings.items():
            path = tmp_path / "settings" / plugin.replace(":", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".jupyterlab-settings").write_text(json.dumps(values))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        token = secrets.token_hex(16)
        homes = {f"JUPYTER_{name}_DIR": str(tmp_path / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
        homes |= {f"JUPYTERLAB_{name}_DIR": str(tmp_path / name.lower()) for name in ("SETTINGS", "WORKSPACES")}
        homes |= {"SIGMA_BOOK_FIGURES": str(tmp_path / "figures"), "IPYTHONDIR": str(tmp_path / "ipython")}
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1"]
        command += [f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"]
        command += [f"--ServerApp.root_dir={tmp_path / 'chapters'}"]
        log = tmp_path / "server.log"
        with log.open("w") as file:
            server = subprocess.Popen(command, env=os.environ | homes, stdout=file, stderr=file, cwd=tmp_path)
        started.append(server)
        wait_for_server(f"http://127.0.0.1:{port}/api/status?token={token}", server, log)
        return f"http://127.0.0.1:{port}/lab?token={token}"

    yield start
    for server in started:
        server.terminate()  # it ends its kernels itself
        server.wait(30)


def wait_for_server(address: str, server: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.3)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1300,1000"):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={tmp_path / 'browser'}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def wait(browser, selector: str, text: str = ""):
    """The first element that the selector finds, that can be seen, and that holds the text."""

    def found(driver):
        seen = [element for element in driver.find_elements("css selector", selector) if element.is_displayed()]
        return next((element for element in seen if text in element.text), None)

    return wait_until(browser, found, f"nothing like {selector!r} with {text!r} came up")


def wait_until(browser, condition: Callable, message: str):
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    waiting = WebDriverWait(browser, PATIENCE, ignored_exceptions=[StaleElementReferenceException])
    return waiting.until(condition, message)


def texts(browser, selector: str) -> list[str]:
    """What all elements that the selector finds say, seen or not."""
    script = "return [...document.querySelectorAll(arguments[0])].map(element => element.textContent)"
    return browser.execute_script(script, selector)


def double_click_chapter(browser, address: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    browser.get(address)
    item = wait(browser, f'.jp-DirListing-item[title*="{CHAPTER}"]')
    ActionChains(browser).double_click(item).perform()


def test_a_double_click_opens_a_chapter_as_a_notebook_that_runs(start_lab, browser, tmp_path):
    double_click_chapter(browser, start_lab(QUIET))
    wait(browser, ".jp-NotebookPanel .jp-CodeCell")
    assert wait(browser, ".jp-RenderedMarkdown h1", "Grouped queries")  # prose is set, not shown as comments
    assert wait(browser, ".jp-Toolbar-kernelName", "Python 3")
    assert not texts(browser, ".jp-FileEditor")
    browser.save_screenshot(str(tmp_path / "opened.png"))

    cells = [cell for cell in jupytext.read(CHAPTERS / CHAPTER).cells if cell.cell_type == "code"]
    wait(browser, ".jp-Notebook-ExecutionIndicator[data-status='idle']")
    wait(browser, ".lm-MenuBar-item", "Run").click()
    wait(browser, "[data-command='runmenu:run-all']").click()

    def all_ran(driver) -> bool:
        prompts = texts(driver, ".jp-CodeCell .jp-InputPrompt")
        return len(prompts) == len(cells) and all(prompt.strip("[]:").isdigit() for prompt in prompts)

    wait_until(browser, all_ran, "not every cell ran")
    errors = texts(browser, ".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']")
    assert not errors, errors[0]
    assert any("q_proj: (256, 192)" in text for text in texts(browser, ".jp-OutputArea-output"))
    figure = wait(browser, ".jp-OutputArea-output img")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", figure)
    browser.save_screenshot(str(tmp_path / "ran.png"))
    assert browser.execute_script("return arguments[0].naturalWidth", figure) > 300
    assert (tmp_path / "figures" / "06_groups.png").exists()
    before = (tmp_path / "chapters" / CHAPTER).stat().st_mtime_ns
    wait(browser, ".jp-NotebookPanel [data-jp-item-name='save']").click()
    wait_until(browser, lambda _: (tmp_path / "chapters" / CHAPTER).stat().st_mtime_ns > before, "was not saved")
    assert (tmp_path / "chapters" / CHAPTER).read_text() == (CHAPTERS / CHAPTER).read_text()


def test_who_prefers_the_editor_keeps_it(start_lab, browser, tmp_path):
    """What comes with the package is a default: a user's own setting wins."""
    own = {PLUGIN: {"defaultViewers": {"python": "Editor"}}}
    double_click_chapter(browser, start_lab(QUIET | own))
    wait(browser, ".jp-FileEditor .cm-content", "# | export")
    assert not texts(browser, ".jp-NotebookPanel")
    assert json.loads(next((tmp_path / "settings").rglob("plugin.jupyterlab-settings")).read_text()) == own[PLUGIN]
