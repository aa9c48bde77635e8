"""Makes the pictures in docs/images anew: `make screenshots`.

It serves a copy of what the last `make demo` left in Prefect (and runs the demonstration first where there is none),
registers the blocks, deploys the deployments, and looks at the pages with a headless Chromium. The copy, so that no
deployment and no block is left in the server that `make ui` shows.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # started as a file: Python looks for modules beside it

from flows.server import QUIET, prefect_server  # noqa: E402

IMAGES = ROOT / "docs" / "images"
HOME = ROOT / ".holdfast"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER_OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-port=0"),
)
WORK_POOL = "holdfast"
WIDTH = 1400
PATIENCE_SECONDS = 60.0


def main() -> None:
    browser = find_browser()
    run = last_demo_run() or make_demo_run()
    IMAGES.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(HOME / "runs" / run / "timeline.png", IMAGES / "timeline.png")
    with served_copy() as url, open_page(browser, url) as page:
        found = prepare(run)
        for name, take in PICTURES.items():
            take(page, found)
            page.save(IMAGES / name)


# -- what is to be seen -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Identifiers of the pages."""

    flow_run: str
    artifacts: dict[str, str]
    """By their key without the run's name."""
    deployment: str


def flow_run(page: Page, found: Found) -> None:
    page.open(f"runs/flow-run/{found.flow_run}", height=1300)
    page.click_text("Task Runs")
    page.type_into("Search by run name", "attempt ")
    page.choose("EXPECTED_START_TIME_ASC")
    page.wait_for_text("attempt 1:")
    page.wait_for("!document.body.innerText.includes('settle_machines')")  # the search has taken effect


def cost_summary(page: Page, found: Found) -> None:
    page.open(f"artifacts/artifact/{found.artifacts['cost-summary']}", height=800)
    page.wait_for_text("Goodput")


def timeline(page: Page, found: Found) -> None:
    # As high as the picture: below it the page shows the address of the image, which is the image itself as text.
    page.open(f"artifacts/artifact/{found.artifacts['timeline']}", height=1000)
    page.wait_for("[...document.images].some(image => image.complete && image.naturalWidth > 500)")
    page.crop_below("[...document.images].find(image => image.naturalWidth > 500)")


def job_form(page: Page, found: Found) -> None:
    page.open(f"deployments/deployment/{found.deployment}/run", height=1655)
    page.wait_for_text("Attempts at most")


def account_form(page: Page, found: Found) -> None:
    page.open("blocks/catalog/local-account/create", height=720)
    page.wait_for_text("Clock speed")


PICTURES = {
    "flow-run.png": flow_run,
    "cost-summary.png": cost_summary,
    "timeline-artifact.png": timeline,
    "job-form.png": job_form,
    "account-form.png": account_form,
}


def prepare(run: str) -> Found:
    """Blocks and deployments into the served copy; the identifiers of everything that is to be seen."""
    for arguments in (
        ["block", "register", "-m", "blocks"],
        ["work-pool", "create", "--type", "process", WORK_POOL, "--overwrite"],
        ["--no-prompt", "deploy", "--all"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "prefect", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"prefect {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("train/local")
        # The queue is red until a worker has asked it for runs: ask as a worker would, and take none.
        client.send_worker_heartbeat(WORK_POOL, "screenshots", heartbeat_interval_seconds=600)
        client.get_scheduled_flow_runs_for_work_pool(WORK_POOL, scheduled_before=datetime(2000, 1, 1, tzinfo=UTC))
        artifacts = {artifact.key or "": artifact for artifact in client.read_artifacts()}
    wanted = {name: artifacts.get(f"{name}-{run}") for name in ("cost-summary", "timeline")}
    if missing := [name for name, artifact in wanted.items() if artifact is None]:
        raise SystemExit(f"Prefect has no {' and no '.join(missing)} of run {run}; run make demo, then this again")
    return Found(
        flow_run=str(wanted["cost-summary"].flow_run_id),
        artifacts={name: str(artifact.id) for name, artifact in wanted.items()},
        deployment=str(deployment.id),
    )


def last_demo_run() -> str:
    """The newest run of the demonstration's job that finished; empty where there is none."""
    if not (HOME / "prefect" / "prefect.db").exists():
        return ""
    summaries = sorted(HOME.glob("runs/gpt-*/summary.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    return next((path.parent.name for path in summaries if json.loads(path.read_text())["state"] == "finished"), "")


def make_demo_run() -> str:
    print("no finished demonstration in .holdfast: running it first", flush=True)
    subprocess.run([sys.executable, "-m", "flows", "demo"], cwd=ROOT, check=True)
    return last_demo_run()


@contextmanager
def served_copy() -> Iterator[str]:
    """The URL of a server over a copy of .holdfast/prefect."""
    os.environ.pop("PREFECT_API_URL", None)
    os.environ.update(QUIET)
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="holdfast-screenshots-", ignore_cleanup_errors=True) as folder:
        shutil.copytree(HOME / "prefect", Path(folder) / ".holdfast" / "prefect")
        os.chdir(folder)
        try:
            with prefect_server() as url:
                yield url
        finally:
            os.chdir(before)


# -- the browser ------------------------------------------------------------------------------------------------------


def find_browser() -> str:
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    raise SystemExit(
        f"none of {', '.join(BROWSERS)} is on the path; install one, on Debian or Ubuntu with: apt-get install chromium"
    )


@contextmanager
def open_page(browser: str, url: str) -> Iterator[Page]:
    """An empty page in a browser with a profile of its own, which ends with the context."""
    from websockets.sync.client import connect  # comes with Prefect

    with tempfile.TemporaryDirectory(prefix="holdfast-browser-", ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [browser, *BROWSER_OPTIONS, f"--window-size={WIDTH},1000", f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            port = _debugging_port(process, Path(profile) / "DevToolsActivePort")
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=10) as answer:
                target = next(one for one in json.load(answer) if one["type"] == "page")
            with connect(target["webSocketDebuggerUrl"], max_size=None) as socket:
                yield Page(socket, url)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _debugging_port(process: subprocess.Popen[bytes], told: Path) -> int:
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < give_up_at and process.poll() is None:
        if told.exists() and (lines := told.read_text().splitlines()):
            return int(lines[0])
        time.sleep(0.05)
    raise SystemExit(f"the browser did not start; its exit status is {process.poll()}")


class Page:
    """One page, spoken to in the DevTools protocol."""

    def __init__(self, socket: Any, url: str) -> None:
        self._socket, self._url, self._number = socket, url, 0

    def open(self, path: str, height: int) -> None:
        self._resize(height)
        self._call("Page.navigate", url=f"{self._url}/{path}")
        self.wait_for("document.readyState === 'complete'")

    def evaluate(self, script: str) -> Any:
        result = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if problem := result.get("exceptionDetails"):
            raise SystemExit(f"the page refused {script!r}: {problem}")
        return result["result"].get("value")

    def wait_for(self, condition: str) -> None:
        give_up_at = time.monotonic() + PATIENCE_SECONDS
        while not self.evaluate(condition):
            if time.monotonic() > give_up_at:
                shown = self.evaluate("document.body.innerText.slice(0, 2000)")
                raise SystemExit(f"not so after {PATIENCE_SECONDS:.0f} s: {condition}; the page shows:\n{shown}")
            time.sleep(0.1)

    def wait_for_text(self, text: str) -> None:
        self.wait_for(f"document.body.innerText.includes({json.dumps(text)})")

    def click_text(self, text: str) -> None:
        """Click the innermost element that shows exactly this text."""
        element = f"[...document.querySelectorAll('*')].filter(e => e.innerText?.trim() === {json.dumps(text)}).at(-1)"
        self.wait_for(f"!!{element}")
        self.evaluate(f"{element}.click()")

    def type_into(self, placeholder: str, text: str) -> None:
        element = f"document.querySelector('input[placeholder={json.dumps(placeholder)}]')"
        self.wait_for(f"!!{element}")
        self.evaluate(f"{element}.focus()")
        self._call("Input.insertText", text=text)
        self.evaluate(f"{element}.blur()")

    def choose(self, value: str) -> None:
        """Choose an option in whichever list has it."""
        option = f"document.querySelector('option[value={json.dumps(value)}]')"
        self.wait_for(f"!!{option}")
        self.evaluate(
            f"(s => {{ s.value = {json.dumps(value)}; s.dispatchEvent(new Event('change', {{bubbles: true}})) }})"
            f"({option}.closest('select'))"
        )

    def crop_below(self, element: str) -> None:
        self._resize(int(self.evaluate(f"{element}.getBoundingClientRect().bottom")) + 16)

    def save(self, path: Path) -> None:
        """Once the page has stood still: nothing is loaded any more, no transition runs."""
        previous = b""
        give_up_at = time.monotonic() + PATIENCE_SECONDS
        while True:
            picture = base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"])
            if picture == previous or time.monotonic() > give_up_at:
                break
            previous = picture
            time.sleep(1.0)
        path.write_bytes(picture)
        print(f"{path.relative_to(ROOT)}  {len(picture) / 1000:.0f} kB", flush=True)

    def _resize(self, height: int) -> None:
        self._call("Emulation.setDeviceMetricsOverride", width=WIDTH, height=height, deviceScaleFactor=1, mobile=False)

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._socket.recv(timeout=PATIENCE_SECONDS))
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise SystemExit(f"{method}: {answer['error']['message']}")
                return answer["result"]


if __name__ == "__main__":
    main()
