"""The page in a headless Chromium, against the scripted engine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Served
from scripted_engine import ScriptedEngine

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")

SCRIPT = "Say <b>no</b> & run:\n```python\nprint('<i>')\n```\nDone."


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 390, "height": 800})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
    yield page
    page.close()
    assert [text for text in problems if "status of" not in text] == []


def ask(page: Any, served: Served, text: str) -> None:
    page.goto(f"http://127.0.0.1:{served.port}/")
    page.wait_for_selector("#examples button")
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def test_it_chats_and_escapes_and_shows_what_runs(
    page: Any, serve_engine: Callable[..., Served]
) -> None:
    served = serve_engine(ScriptedEngine(SCRIPT, pause=0.01))
    ask(page, served, "hi")
    page.wait_for_selector(".note")
    answer = page.locator(".turn.assistant .text")
    assert answer.locator("pre").inner_text().strip() == "print('<i>')"
    assert "Say <b>no</b> & run:" in answer.inner_text()
    assert answer.locator("b, i").count() == 0
    assert "tokens/s" in page.inner_text(".note")
    assert page.inner_text("#model") == "letters"
    assert page.inner_text("#backend") == "scripted"
    assert "of 100" in page.inner_text("#blocks")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # fits a phone
    if folder := os.environ.get("HALYARD_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / "page.png")


def test_shift_enter_breaks_the_line(page: Any, served: Served) -> None:
    page.goto(f"http://127.0.0.1:{served.port}/")
    page.wait_for_selector("#examples button")
    page.fill("#prompt", "a")
    page.press("#prompt", "Shift+Enter")
    assert page.input_value("#prompt") == "a\n"
    assert page.locator(".turn").count() == 0


def test_stop_cancels_in_the_engine(page: Any, serve_engine: Callable[..., Served]) -> None:
    served = serve_engine(ScriptedEngine("x" * 200, pause=0.05))
    ask(page, served, "hi")
    page.wait_for_selector("#stop:visible")
    assert served.until(lambda: bool(served.engine.running))
    page.click("#stop")
    assert served.until(lambda: not served.engine.running)
    page.wait_for_selector("#send:visible")


def test_an_error_is_a_sentence(page: Any, served: Served) -> None:
    ask(page, served, "boom!")
    page.wait_for_selector("#notice:visible")
    assert page.inner_text("#notice") == "Logits are NaN."
    page.wait_for_selector("#send:visible")
