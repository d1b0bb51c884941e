"""Photograph the Prefect UI for the README: a run form, the page that a run leaves, and the form that asks a person.

Run by `make screenshots`. Needs Chromium (Debian: ``apt-get install chromium``); $CHROMIUM names another one.
"""

import contextvars
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings

from alpaca_core import Policy, Sampling
from prefect_alpaca.flows import answer_question, classify_texts
from prefect_alpaca.tasks.named import save_named

ROOT = Path(__file__).parents[1]
IMAGES = Path(__file__).parent / "images"
QUESTIONS = [
    "Monika opens 2 cans, and each can holds 5 pierogi. How many pierogi does she have?",
    "What is the first name of the physicist Einstein?",
]
# Accepts nothing, so a person is asked about every text.
POLICY = Policy(accept=None, precision=0.9, confidence=0.95, rows=40, accepted=0, bound=0.0)
WIDTH, HEIGHT = 1200, 720
LENGTH = "Math.max(...[...document.querySelectorAll('*')].map(element => element.scrollHeight))"
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
    """Start a server, deploy, run two flows in this process, and take the pictures."""
    with tempfile.TemporaryDirectory() as home, server(Path(home)) as url:
        prefect("work-pool", "create", "gpu", "--type", "process")
        prefect("deploy", "--all")
        with get_client(sync_client=True) as client, sync_playwright() as playwright:
            deployment = client.read_deployment_by_name("answer-question/answer-question").id
            answer_question(QUESTIONS, sampling=Sampling(max_new_tokens=128))
            artifact = next(each.id for each in client.read_artifacts() if each.key == "answer-question")
            chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
            browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
            page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
            visit(page, f"{url}/deployments/deployment/{deployment}/run")
            photograph_all(page, "run-form.png")
            visit(page, f"{url}/artifacts/artifact/{artifact}")
            photograph_all(page, "artifact.png")
            with waiting_for_a_person(client) as run:
                visit(page, f"{url}/runs/flow-run/{run.id}")
                page.get_by_role("button", name="Resume").first.click()
                page.wait_for_timeout(1500)
                photograph(page, "ask-a-person.png")
            browser.close()


def visit(page: Page, url: str) -> None:
    """Open a page, and wait until it has come to rest."""
    page.goto(url, wait_until="networkidle")
    page.wait_for_timeout(1500)


def photograph_all(page: Page, name: str) -> None:
    """Save a picture of all that a page holds: it scrolls inside the window, so the window grows as long as it is."""
    page.set_viewport_size({"width": WIDTH, "height": page.evaluate(LENGTH)})
    page.wait_for_timeout(1000)
    photograph(page, name)
    page.set_viewport_size({"width": WIDTH, "height": HEIGHT})


def photograph(page: Page, name: str) -> None:
    """Save a picture of what the window shows."""
    page.screenshot(path=IMAGES / name, full_page=True)
    print(IMAGES / name)


@contextmanager
def waiting_for_a_person(client: SyncPrefectClient) -> Iterator[FlowRun]:
    """Run a flow that waits for a person's labels as long as the block lasts, and then give it the model's own."""
    save_named("bank", POLICY)
    context = contextvars.copy_context()  # of the server
    flow = threading.Thread(target=lambda: context.run(lambda: classify_texts(policy="bank", ask_a_person=True)))
    flow.start()
    run = paused(client)
    yield run
    client.resume_flow_run(run.id, run_input={})
    flow.join()


def paused(client: SyncPrefectClient) -> FlowRun:
    """Return the run that waits for a person.

    Raises:
        TimeoutError: After two minutes.
    """
    for _ in range(240):
        for run in client.read_flow_runs():
            if run.state and run.state.is_paused():
                return run
        time.sleep(0.5)
    raise TimeoutError("no run was paused within two minutes")


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
    # Nobody reads the runs' logs there, and the last of them would arrive when the server has gone.
    settings = {PREFECT_API_URL: f"{url}/api", PREFECT_HOME: home, PREFECT_LOGGING_TO_API_ENABLED: False}
    try:
        with temporary_settings(settings):
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
