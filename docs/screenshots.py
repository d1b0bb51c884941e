"""Photograph the Prefect UI for the README: the run form of `answer-question`, and the page that a run leaves.

Run by `make screenshots`. Needs Chromium (Debian: ``apt-get install chromium``); $CHROMIUM names another one.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from alpaca_core import Sampling
from prefect_alpaca.flows import answer_question

ROOT = Path(__file__).parents[1]
IMAGES = Path(__file__).parent / "images"
QUESTIONS = [
    "Monika opens 2 cans, and each can holds 5 pierogi. How many pierogi does she have?",
    "What is the first name of the physicist Einstein?",
]
# Nothing is reported to anybody, and a browser that may only see this machine is not slowed down by trying.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def main() -> None:
    """Start a server, deploy, run one flow in this process, and take the pictures."""
    with tempfile.TemporaryDirectory() as home, server(Path(home)) as url:
        prefect("work-pool", "create", "gpu", "--type", "process")
        prefect("deploy", "--all")
        with get_client(sync_client=True) as client:
            deployment = client.read_deployment_by_name("answer-question/answer-question").id
            answer_question(QUESTIONS, sampling=Sampling(max_new_tokens=128))
            artifact = next(each.id for each in client.read_artifacts() if each.key == "answer-question")
        with sync_playwright() as playwright:
            chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
            browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
            page = browser.new_page(viewport={"width": 1280, "height": 1100}, device_scale_factor=1.5)
            photograph(page, f"{url}/deployments/deployment/{deployment}/run", "run-form.png")
            photograph(page, f"{url}/artifacts/artifact/{artifact}", "artifact.png")
            browser.close()


def photograph(page: Page, url: str, name: str) -> None:
    """Save a picture of a page that has come to rest."""
    page.goto(url, wait_until="networkidle")
    page.wait_for_timeout(1500)
    page.screenshot(path=IMAGES / name)
    print(IMAGES / name)


def prefect(*arguments: str) -> None:
    """Run Prefect's command line against the server."""
    subprocess.run([sys.executable, "-m", "prefect", "--no-prompt", *arguments], cwd=ROOT, check=True)


@contextmanager
def server(home: Path) -> Iterator[str]:
    """Run a Prefect server for as long as the block lasts, and make it the one that everything here talks to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    os.environ |= {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"{url}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        with temporary_settings({PREFECT_API_URL: f"{url}/api", PREFECT_HOME: home}):
            wait_for_api()
            yield url
    finally:
        process.terminate()
        process.wait()


def wait_for_api() -> None:
    """Wait until the server answers.

    Raises:
        TimeoutError: After two minutes.
    """
    with get_client(sync_client=True) as client:
        for _ in range(240):
            if answers(client):
                return
            time.sleep(0.5)
    raise TimeoutError("the Prefect server did not start within two minutes")


def answers(client: SyncPrefectClient) -> bool:
    """Whether the server is there."""
    return client.api_healthcheck() is None


if __name__ == "__main__":
    main()
