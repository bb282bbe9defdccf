"""What does a person see who opens a notebook? JupyterLab and headless Chromium, started and stopped for one test.

    with open_lab(tmp_path) as lab, lab.open(NOTEBOOK) as page:
        page.run_all()
        page.press("nbh-run")

`python -m tests.browser_lab docs/images` writes the screenshots of the README.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import nbformat
import psutil

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks" / "01_pruning.ipynb"
FINE_TUNING = ROOT / "notebooks" / "02_fine_tuning.ipynb"
ANALYSIS = ROOT / "notebooks" / "05_analysis.ipynb"
SWEEP = ROOT / "notebooks" / "03_sparse_sweep.ipynb"
COMPARISON = ROOT / "notebooks" / "04_llm_vs_slm.ipynb"
MOMENTS = ("form", "running", "finished")  # before, during and after a notebook's default run
PICTURED = {  # what the names of a notebook's pictures begin with, and the moments that README shows
    "": (NOTEBOOK, MOMENTS),
    "fine_tuning-": (FINE_TUNING, MOMENTS),
    "sweep-": (SWEEP, ("finished",)),
    "comparison-": (COMPARISON, ("finished",)),
}
CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",  # root in a container
    "--disable-gpu",
    "--disable-dev-shm-usage",  # a container's /dev/shm is small
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # nothing beyond this machine has a name
    "--font-render-hinting=none",
]
SETTINGS = {
    "notebook-extension/tracker": {
        "windowingMode": "none",
        "scrollPastEnd": False,
    },  # every cell is drawn, and nothing below
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True},
    "docmanager-extension/plugin": {"autosave": False},  # a test says when it saves
}
START_SECONDS = 120  # most that a server, a page or a kernel may take to be there, on a busy machine
STEP_SECONDS = 20  # most that a click, or what follows at once from it, may take
T = TypeVar("T")


def missing_browser() -> str | None:
    """Why no browser test can run here, in one line; None where one can."""
    if not Path(CHROMIUM).is_file():
        return f"no browser at {CHROMIUM}: apt-get install chromium"
    absent = [name for name in ("playwright", "jupyterlab") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed: pip install '.[notebooks,browser]'" if absent else None


def need_browser() -> None:
    """Skip the calling test, with the reason, where there is no browser; fail where NBHELPERS_REQUIRE_BROWSER=1."""
    import pytest

    if reason := missing_browser():
        if os.environ.get("NBHELPERS_REQUIRE_BROWSER") == "1":
            pytest.fail(f"{reason} (NBHELPERS_REQUIRE_BROWSER=1 makes this a failure)", pytrace=False)
        pytest.skip(reason)


def until(what: str, probe: Callable[[], T], seconds: float, every: float = 0.1) -> T:
    """The first true value of `probe()`; TimeoutError says what was waited for."""
    give_up = time.monotonic() + seconds
    while not (value := probe()):
        if time.monotonic() > give_up:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(every)
    return value


# ------------------------------------------------------------------------------------------------ the notebook


def copy_notebook(source: Path, target: Path, *, before: str = "", cell: str = "") -> Path:
    """A copy of a notebook; `cell` is put in as a code cell before the first one whose source holds `before`."""
    notebook = nbformat.read(source, as_version=4)
    if cell:
        places = [n for n, old in enumerate(notebook.cells) if old.cell_type == "code" and before in old.source]
        if not places:
            raise ValueError(f"no code cell of {source.name} holds {before!r}")
        notebook.cells.insert(places[0], nbformat.v4.new_code_cell(cell))
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, target)
    return target


# ------------------------------------------------------------------------------------------------ JupyterLab


@dataclass
class Lab:
    """A running JupyterLab and the browser that looks at it. Notebooks lie in `root`, their runs in `runs`."""

    root: Path
    runs: Path
    url: str
    token: str
    server: psutil.Process
    browser: Any
    log: Path
    foreign: list[str] = field(default_factory=list)  # addresses beyond this machine that a page asked for

    def kernels(self) -> list[psutil.Process]:
        """The kernel processes of this server, oldest first."""
        found = [child for child in self.server.children(recursive=True) if "ipykernel_launcher" in _command(child)]
        return sorted(found, key=lambda process: process.create_time())

    def run_folders(self) -> list[Path]:
        """The run directories, oldest first."""
        manifests = self.runs.rglob("manifest.json") if self.runs.is_dir() else ()
        return [path.parent for path in sorted(manifests, key=lambda path: json.loads(path.read_text())["created"])]

    @contextlib.contextmanager
    def open(
        self, notebook: Path, *, width: int = 1280, height: int = 900, before: str = "", cell: str = ""
    ) -> Iterator[LabPage]:
        """A tab with a copy of `notebook`, its kernel connected. See `copy_notebook` for `before` and `cell`."""
        copy = copy_notebook(notebook, self.root / notebook.name, before=before, cell=cell)
        with self.tab(copy.name, width=width, height=height) as page:
            yield page

    @contextlib.contextmanager
    def tab(self, name: str, *, width: int = 1280, height: int = 900) -> Iterator[LabPage]:
        """A tab with a notebook that is already in `root`, its kernel connected."""
        context = self.browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True)
        page = LabPage(self, context.new_page(), width, height)
        try:
            page.goto(name)
            yield page
        except BaseException:
            print("what the page said last:", *page.said(), sep="\n")
            raise
        finally:
            context.close()


def _command(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


@contextlib.contextmanager
def open_lab(folder: Path) -> Iterator[Lab]:
    """JupyterLab on a free port of 127.0.0.1, with a token and folders of its own, and headless Chromium.

    Whatever happens inside: the browser is closed, the server stopped, and no kernel is left.
    """
    folder = Path(folder)
    root, home = folder / "lab", folder / "home"
    root.mkdir(parents=True)
    token, log = secrets.token_hex(16), folder / "server.log"
    environ = _environment(home, root / "runs", token)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0"]
    command += [f"--ServerApp.root_dir={root}", "--LabApp.expose_app_in_browser=True", "--LabApp.news_url="]
    command += [
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.extension_manager=readonly",
    ]
    with log.open("wb") as output, contextlib.ExitStack() as stack:
        started = subprocess.Popen(
            command, cwd=root, env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        server = psutil.Process(started.pid)
        stack.callback(_stop, started, server)
        url = _address(started, home, log)
        browser = stack.enter_context(_chromium(environ))
        yield Lab(root, root / "runs", url, token, server, browser, log)


def _environment(home: Path, runs: Path, token: str) -> dict[str, str]:
    """What the server, its kernels and the browser see: nothing of this user, nothing of the hub."""
    import matplotlib

    settings = home / "config" / "lab" / "user-settings" / "@jupyterlab"
    for name, values in SETTINGS.items():
        (settings / name).parent.mkdir(parents=True, exist_ok=True)
        (settings / f"{name}.jupyterlab-settings").write_text(json.dumps(values))
    skip = ("JUPYTER", "IPYTHON", "NBHELPERS_", "DISPLAY")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(skip)}
    return plain | {
        "HOME": str(home),
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTER_TOKEN": token,
        "IPYTHONDIR": str(home / "ipython"),
        "MPLCONFIGDIR": matplotlib.get_cachedir(),  # the list of fonts takes seconds to make
        "NBHELPERS_RUNS": str(runs),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _address(started: subprocess.Popen, home: Path, log: Path) -> str:
    """The address of the server, as it wrote it once it listens."""

    def probe() -> str | None:
        if started.poll() is not None:
            raise RuntimeError(f"JupyterLab ended with {started.returncode}:\n{log.read_text()[-2000:]}")
        with contextlib.suppress(FileNotFoundError, ValueError):
            return json.loads((home / "runtime" / f"jpserver-{started.pid}.json").read_text())["url"]
        return None

    return until("JupyterLab listens", probe, START_SECONDS)


def _stop(started: subprocess.Popen, server: psutil.Process) -> None:
    """End the server and every process below it, by their handles: politely, then for certain."""
    below = server.children(recursive=True) if started.poll() is None else []
    started.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        started.wait(timeout=15)
    for process in [*below, server]:
        with contextlib.suppress(psutil.NoSuchProcess):  # the handle knows when its process began
            process.kill()
    started.wait(timeout=15)
    psutil.wait_procs(below, timeout=15)


@contextlib.contextmanager
def _chromium(environ: dict[str, str]) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, env=environ)
        try:
            yield browser
        finally:
            browser.close()


# ------------------------------------------------------------------------------------------------ a notebook in a tab

CURRENT = "window.jupyterapp?.shell?.currentWidget"
CONNECTED = f"""() => {{
    const session = {CURRENT}?.sessionContext;
    const kernel = session?.session?.kernel;
    return Boolean(session?.isReady && kernel?.connectionStatus === 'connected' && kernel.status === 'idle');
}}"""
RUN = """(command) => {
    window.nbhRan = null;
    window.jupyterapp.commands.execute(command).then(
        done => { window.nbhRan = String(done ?? true); }, error => { window.nbhRan = String(error); });
}"""
SELECT = f"""(text) => {{
    const notebook = {CURRENT}.content;
    notebook.activeCellIndex = notebook.widgets.findIndex(
        cell => cell.model.type === 'code' && cell.model.sharedModel.getSource().includes(text));
    return notebook.activeCellIndex;
}}"""
ERRORS = f"""() => {{
    const found = [];
    for (const cell of {CURRENT}.content.widgets) {{
        for (const output of cell.model.sharedModel.cell_type === 'code' ? cell.model.sharedModel.outputs : []) {{
            if (output.output_type === 'error') found.push(`${{output.ename}}: ${{output.evalue}}`);
        }}
    }}
    return found;
}}"""
# Every picture that an <img> below a class shows from now on, by the hash of its bytes: the same bytes under a new
# address are no new picture.
WATCH = """(name) => {
    window.nbhPictures?.observer.disconnect();
    const seen = new Map(), slots = [];
    const take = async (img) => {
        if (!img.closest?.('.' + name) || !img.src) return;
        if (!slots.includes(img)) slots.push(img);
        const at = performance.now();
        try {
            const bytes = await (await fetch(img.src)).arrayBuffer();
            const hash = await crypto.subtle.digest('SHA-256', bytes);
            const hex = [...new Uint8Array(hash)].map(b => b.toString(16).padStart(2, '0')).join('');
            const key = slots.indexOf(img) + ':' + hex;
            if (!seen.has(key)) seen.set(key, {slot: slots.indexOf(img), src: img.src, hash: hex, at});
        } catch (error) { /* replaced before it was read: the next one counts */ }
    };
    const observer = new MutationObserver(changes => {
        for (const change of changes) {
            if (change.target.tagName === 'IMG') take(change.target);
            for (const node of change.addedNodes) {
                if (node.tagName === 'IMG') take(node);
                node.querySelectorAll?.('img').forEach(take);
            }
        }
    });
    observer.observe(document.body, {subtree: true, childList: true, attributes: true, attributeFilter: ['src']});
    window.nbhPictures = {observer, seen};
    document.querySelectorAll('.' + name + ' img').forEach(take);
}"""

# Every status of the panel as it is shown, so that one which passes between two looks is not missed, and one from
# before the last click is not taken for its answer.
STATUSES = """(() => {
    window.nbhStatuses = [];
    let shown = null;
    const look = () => {
        const status = document.querySelector('.nbh-status');
        if (!status || status.textContent === shown) return;
        shown = status.textContent;
        window.nbhStatuses.push(status.innerText.trim());
    };
    new MutationObserver(look).observe(document, {subtree: true, childList: true, characterData: true});
})()"""
# Clicks that something heard: a button that moves between mouse down and mouse up hears none, what is around both does.
CLICKS = """(() => {
    window.nbhClicks = 0;
    const count = event => { window.nbhClicks += Boolean(event.target.closest?.('button, label, a, input')); };
    document.addEventListener('click', count, {capture: true});
})()"""


class LabPage:
    """A notebook in a tab, driven as a person would: by the classes of the panel's parts and by keys."""

    def __init__(self, lab: Lab, page: Any, width: int, height: int) -> None:
        self.lab, self.page = lab, page
        self.width, self.height = width, height
        self.console: list[str] = []
        page.set_default_timeout(STEP_SECONDS * 1000)
        page.add_init_script(STATUSES)
        page.add_init_script(CLICKS)
        page.on("dialog", lambda dialog: dialog.accept())  # "leave without saving?" of a reload
        page.on("console", lambda said: self.console.append(f"{said.type}: {said.text}"))
        page.on("pageerror", lambda error: self.console.append(f"pageerror: {error}"))
        page.on("request", self._note_foreign)

    def _note_foreign(self, request: Any) -> None:
        address = urlsplit(request.url)
        if address.scheme not in ("data", "blob", "about") and address.hostname != "127.0.0.1":
            self.lab.foreign.append(request.url)

    # ---- the notebook

    def goto(self, name: str) -> None:
        """Open a notebook of the server's folder and wait for its kernel."""
        self.page.goto(f"{self.lab.url}doc/tree/{name}?token={self.lab.token}", wait_until="commit")
        self.wait_connected()

    def reload(self) -> None:
        """Press the browser's reload; the kernel goes on."""
        self.page.reload(wait_until="commit")
        self.page.wait_for_function(f"() => {CURRENT}?.sessionContext?.isReady", timeout=START_SECONDS * 1000)

    def wait_connected(self) -> None:
        """Wait for a connected, idle kernel."""
        self.page.wait_for_function(CONNECTED, timeout=START_SECONDS * 1000)

    def save(self) -> None:
        """Save the notebook, as Ctrl+S does."""
        self.page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")

    def start_all(self) -> None:
        """Run all cells and do not wait."""
        self._forget_statuses()
        self.page.evaluate(RUN, "notebook:run-all-cells")

    def run_all(self, seconds: float = 180) -> None:
        """Run all cells and wait for the last one; AssertionError where a cell failed."""
        self.start_all()
        self._wait_run(seconds)

    def run_above(self, text: str, seconds: float = 180) -> None:
        """Run the cells above the first code cell that holds `text`, and wait as `run_all` does."""
        if self.page.evaluate(SELECT, text) < 1:
            raise ValueError(f"no cell above one that holds {text!r}")
        self._forget_statuses()
        self.page.evaluate(RUN, "notebook:run-all-above")
        self._wait_run(seconds)

    def _wait_run(self, seconds: float) -> None:
        self.page.wait_for_function("() => window.nbhRan", timeout=seconds * 1000)
        if failed := self.cell_errors():
            raise AssertionError(f"cells failed: {failed}")

    def cell_errors(self) -> list[str]:
        """`Name: message` of every cell that shows an error."""
        return self.page.evaluate(ERRORS)

    def restart_kernel(self) -> None:
        """Restart the kernel without asking, and wait for it."""
        self.page.evaluate(f"() => {CURRENT}.sessionContext.session.kernel.restart()")
        self.wait_connected()

    def interrupt(self) -> None:
        """Press the notebook's own stop square."""
        self.page.evaluate("() => window.jupyterapp.commands.execute('notebook:interrupt-kernel')")

    def kill_kernel(self) -> None:
        """Kill the kernel's process as the system does when memory runs out; the server starts another one."""
        [kernel] = self.lab.kernels()
        kernel.kill()
        until("another kernel", lambda: [new for new in self.lab.kernels() if new != kernel], START_SECONDS)
        self.close_dialogs()
        self.wait_connected()

    def close_dialogs(self) -> list[str]:
        """Accept what JupyterLab asks or tells, and return its text."""
        from playwright.sync_api import TimeoutError as NotThere

        told = []
        with contextlib.suppress(NotThere):
            self.page.locator(".jp-Dialog").first.wait_for(timeout=3000)
        while self.page.locator(".jp-Dialog").count():
            told.append(self.page.locator(".jp-Dialog").first.inner_text())
            self.click(self.page.locator(".jp-Dialog .jp-mod-accept").first)
        return told

    # ---- the panel

    def part(self, name: str) -> Any:
        """The locator of a part of the panel, by its class."""
        return self.page.locator(f".{name}")

    def text(self, name: str) -> str:
        return self.part(name).first.inner_text()

    def status(self) -> str:
        return self.text("nbh-status")

    def click(self, locator: Any) -> None:
        """Click as a person does: again where the page moved under the mouse, which Playwright does not tell."""

        def heard() -> bool:
            before = self.page.evaluate("() => window.nbhClicks")
            locator.click()
            return self.page.evaluate("() => window.nbhClicks") > before

        until(f"a click on {locator} is heard", heard, STEP_SECONDS)

    def press(self, name: str) -> None:
        """Click the button of a part (the class may sit on the button or around it)."""
        self._forget_statuses()
        self.click(self.page.locator(f"button.{name}, .{name} button").first)

    def is_enabled(self, name: str) -> bool:
        return self.page.locator(f"button.{name}, .{name} button").first.is_enabled()

    def choose(self, name: str, option: str) -> None:
        """Choose in the dropdown of a form field."""
        self.page.locator(f".nbh-field-{name} select").select_option(option)

    def slide(self, name: str, value: float, at_most: int = 400) -> None:
        """Move a slider with arrow keys until it shows `value`; TimeoutError where it never does."""
        handle = self.page.locator(f".nbh-field-{name} .noUi-handle")
        handle.focus()
        for _ in range(at_most):
            now = self.slider(name)
            if abs(now - value) < 1e-9:
                return
            handle.press("ArrowRight" if now < value else "ArrowLeft")
        raise TimeoutError(f"slider {name} does not reach {value}: it shows {self.slider(name)}")

    def slider(self, name: str) -> float:
        """What a slider shows in its readout."""
        return float(self.page.locator(f".nbh-field-{name} .widget-readout").inner_text())

    def write(self, name: str, text: object) -> None:
        """Write into the number or text field of a form field, and press Enter."""
        box = self.page.locator(f".nbh-field-{name} input").first
        box.fill(str(text))
        box.press("Enter")

    def tick(self, name: str, on: bool) -> None:
        """Set a form field's checkbox."""
        box = self.page.locator(f".nbh-field-{name} input[type=checkbox]")
        if box.is_checked() != on:
            self.click(box)

    def double_click(self, name: str) -> None:
        """Two clicks before the kernel can have answered the first."""
        self._forget_statuses()
        self.page.locator(f"button.{name}, .{name} button").first.evaluate(
            "button => { button.click(); button.click(); }"
        )

    def download(self, target: Path, name: str = "nbh-download") -> Path:
        """Press the download button where there is no link yet, click the link, and return the file as it was named."""
        link = self.page.locator(f".{name} a[download]")
        if not link.count():
            self.press(name)
            link.wait_for(timeout=START_SECONDS * 1000)
        with self.page.expect_download(timeout=STEP_SECONDS * 3000) as offered:
            self.click(link)
        path = target / offered.value.suggested_filename
        offered.value.save_as(path)
        return path

    def wait_status(self, *beginnings: str, seconds: float = 180) -> str:
        """The first status, since the last click and the last one waited for, that begins with one of these.

        AssertionError tells what was shown instead.
        """
        from playwright.sync_api import TimeoutError as NotThere

        wanted = json.dumps([beginning.lower() for beginning in beginnings])
        script = f"""() => {{
            const at = window.nbhStatuses.findIndex(
                shown => {wanted}.some(start => shown.toLowerCase().startsWith(start)));
            return at < 0 ? null : window.nbhStatuses.splice(0, at + 1)[at];
        }}"""
        try:
            return self.page.wait_for_function(script, timeout=seconds * 1000).json_value()
        except NotThere as error:
            shown = "".join(self.part("nbh-error").all_inner_texts()).strip()
            raise AssertionError(
                f"status never began with {beginnings}: {self.page.evaluate('() => window.nbhStatuses')} {shown}\n"
                + "\n".join(self.console[-5:])
            ) from error

    def said(self) -> list[str]:
        """The last statuses and errors of the panel and lines of the console, for whoever reads of a failure."""
        with contextlib.suppress(Exception):  # the page may be gone: then there is nothing more to say
            shown = self.page.evaluate("() => [...window.nbhStatuses, document.querySelector('.nbh-error')?.innerText]")
            return [line for line in (*shown[-6:], *self.cell_errors(), *self.console[-5:]) if line]
        return self.console[-5:]

    def _forget_statuses(self) -> None:
        self.page.evaluate("() => { window.nbhStatuses = []; }")

    def watch_pictures(self, name: str = "nbh-live") -> None:
        """From now on, note every picture that the <img> elements below a class show."""
        self.page.evaluate(WATCH, name)

    def pictures(self) -> list[dict[str, Any]]:
        """What was noted: {"slot" (which <img>), "src", "hash" (of the bytes), "at" (milliseconds)}."""
        return self.page.evaluate("() => [...window.nbhPictures.seen.values()]")

    def different_pictures(self) -> int:
        """How many different pictures were shown since they are watched."""
        return len({picture["hash"] for picture in self.pictures()})

    def most_pictures_of_one_slot(self) -> int:
        """The number of different pictures that the liveliest <img> has shown."""
        slots = [picture["slot"] for picture in self.pictures()]
        return max(map(slots.count, slots), default=0)

    # ---- pictures of the page

    def set_width(self, width: int) -> None:
        self.width = width
        self.page.set_viewport_size({"width": width, "height": self.height})

    def hide_side_bars(self) -> None:
        """Leave only the notebook: no side bars, no status bar."""
        self.page.evaluate(
            """() => { const shell = window.jupyterapp.shell; shell.mode = 'single-document';
                       shell.collapseLeft(); shell.collapseRight(); }"""
        )
        self.page.add_style_tag(content=".jp-SideBar, #jp-bottom-panel, #jp-down-stack { display: none !important; }")

    def screenshot(self, path: Path, selector: str = ".jp-Notebook") -> Path:
        """A picture of an element in its whole length, however far it reaches below the window.

        The notebook scrolls inside a box of its own, so the window is made as tall as the notebook first.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self.hide_side_bars()
        tall = self.page.evaluate("() => document.querySelector('.jp-WindowedPanel-outer').scrollHeight")
        self.page.set_viewport_size({"width": self.width, "height": max(self.height, tall + 150)})
        self.page.wait_for_timeout(300)  # the layout follows the window
        self.page.evaluate("() => { document.querySelector('.jp-WindowedPanel-outer').scrollTop = 0; }")
        self.page.locator(selector).first.screenshot(path=path, animations="disabled")
        self.page.set_viewport_size({"width": self.width, "height": self.height})
        return path


# ------------------------------------------------------------------------------------------------ pictures for README


def take_screenshots(
    folder: Path,
    widths: tuple[int, ...] = (1280, 800),
    notebook: Path = NOTEBOOK,
    prefix: str = "",
    moments: tuple[str, ...] = MOMENTS,
) -> list[Path]:
    """{prefix}{form,running,finished}-<width>.png of a notebook's panel before, during and after its default run."""
    taken = []

    def shoot(moment: str) -> None:
        for width in widths if moment in moments else ():
            page.set_width(width)
            taken.append(page.screenshot(Path(folder) / f"{prefix}{moment}-{width}.png", ".nbh-panel"))

    with tempfile.TemporaryDirectory() as scratch, open_lab(Path(scratch)) as lab, lab.open(notebook) as page:
        page.run_above("panel.run_now")
        page.wait_status("ready")
        page.page.wait_for_timeout(3000)  # the estimate comes a moment later
        shoot("form")
        page.watch_pictures()
        page.press("nbh-run")
        if "running" in moments:
            until("half of a training", lambda: _is_half_way(page.status()), START_SECONDS)
        shoot("running")
        page.wait_status("finished", seconds=900)
        shoot("finished")
    return taken


def take_analysis_screenshots(folder: Path, widths: tuple[int, ...] = (1280, 800)) -> list[Path]:
    """analysis-<width>.png of the analysis notebook's panel as it shows the example runs."""
    taken = []
    with tempfile.TemporaryDirectory() as scratch, open_lab(Path(scratch)) as lab, lab.open(ANALYSIS) as page:
        page.run_above("notebook.draw(")
        page.wait_status("ready")
        page.page.wait_for_timeout(500)
        for width in widths:
            page.set_width(width)
            taken.append(page.screenshot(Path(folder) / f"analysis-{width}.png", ".nbh-panel"))
    return taken


def _is_half_way(status: str) -> bool:
    """Whether a status such as "running: training fine tuned, 20 of 40" says so."""
    found = re.search(r"training\D*(\d+) of (\d+)", status)
    return bool(found) and 2 * int(found[1]) >= int(found[2])


if __name__ == "__main__":
    if problem := missing_browser():
        sys.exit(problem)
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images")
    for prefix in sys.argv[2:] or [*PICTURED, "analysis-"]:
        if prefix == "analysis-":
            print(*take_analysis_screenshots(target), sep="\n")
        else:
            notebook, moments = PICTURED[prefix]
            print(*take_screenshots(target, notebook=notebook, prefix=prefix, moments=moments), sep="\n")
