"""The page in a headless Chromium, against the scripted engine.

HALYARD_SCREENSHOTS=FOLDER keeps pictures at three sizes, light and dark.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from keyed_server import keyed_server
from scripted_engine import BlockedLoader, ScriptedEngine
from served import Served

from halyard.api.restarts import RestartConfig
from halyard.api.sleep import ASLEEP
from halyard.runtime.request import Request

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")

SCRIPT = "Say <b>no</b> & run **now**:\n```python\nprint('<i>')\n```\n1. one\n2. `two`\nDone."
SIZES = {"phone": (390, 844), "tablet": (1024, 768), "desktop": (1600, 1000)}


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
    expected = ("status of", "ERR_CONNECTION_REFUSED")  # answers and servers that tests take away
    assert [text for text in problems if not any(word in text for word in expected)] == []


def visit(page: Any, served: Served, view: str = "chat") -> None:
    page.goto(f"http://127.0.0.1:{served.port}/#{view}")
    page.wait_for_selector("#state[data-state=ready]")


def until(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    """Playwright's own way to wait for a condition is forbidden by the page's policy."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ask(page: Any, served: Served, text: str) -> None:
    visit(page, served)
    page.wait_for_selector("#examples button")
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def check_fits(page: Any, name: str) -> None:
    """Nothing sticks out at any size, light or dark."""
    for size, (width, height) in SIZES.items():
        page.set_viewport_size({"width": width, "height": height})
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), size
            if folder := os.environ.get("HALYARD_SCREENSHOTS"):
                page.wait_for_timeout(50)
                page.screenshot(path=Path(folder) / f"{name}-{size}-{scheme}.png")


def test_it_chats_and_escapes_and_shows_what_runs(
    page: Any, serve_engine: Callable[..., Served]
) -> None:
    served = serve_engine(ScriptedEngine(SCRIPT, pause=0.01))
    ask(page, served, "hi")
    page.wait_for_selector(".note")
    answer = page.locator(".turn.assistant .text")
    assert answer.locator("pre").inner_text().strip() == "print('<i>')"
    assert answer.locator("figcaption").inner_text().startswith("python")
    assert "Say <b>no</b> & run now:" in answer.inner_text()
    assert answer.locator("strong").inner_text() == "now"
    assert answer.locator("ol > li").all_inner_texts() == ["one", "two"]
    assert answer.locator("b, i").count() == 0
    assert "tokens/s" in page.inner_text(".note")
    assert page.inner_text("#model") == "letters"
    assert page.text_content("#backend") == "scripted"
    assert "of 100" in page.inner_text("#blocks")
    assert page.get_attribute("#log", "aria-busy") == "false"
    check_fits(page, "chat")


def test_shift_enter_breaks_the_line(page: Any, served: Served) -> None:
    visit(page, served)
    page.fill("#prompt", "a")
    page.press("#prompt", "Shift+Enter")
    assert page.input_value("#prompt") == "a\n"
    assert page.locator(".turn").count() == 0


def test_stop_cancels_in_the_engine(page: Any, serve_engine: Callable[..., Served]) -> None:
    served = serve_engine(ScriptedEngine("x" * 200, pause=0.05))
    ask(page, served, "hi")
    page.wait_for_selector("#stop:visible")
    assert served.until(lambda: bool(served.engine.running))
    page.press("#prompt", "Escape")
    assert served.until(lambda: not served.engine.running)
    page.wait_for_selector("#send:visible")


def test_settings_are_sent(page: Any, served: Served) -> None:
    visit(page, served)
    sent: list[Any] = []
    page.on("request", lambda r: sent.append(r.post_data_json) if r.method == "POST" else None)
    page.click("#settings summary")
    page.fill("#system", "Be brief.")
    page.fill("#max-tokens", "7")
    page.fill("#seed", "3")
    page.fill("#temperature", "0.2")
    page.fill("#top-p", "0.5")
    page.fill("#prompt", "hi")
    page.press("#prompt", "Enter")
    page.wait_for_selector(".note")
    (body,) = sent
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    wanted = {"max_tokens": 7, "seed": 3, "temperature": 0.2, "top_p": 0.5}
    assert {name: body[name] for name in wanted} == wanted


def test_an_error_is_a_sentence(page: Any, served: Served) -> None:
    ask(page, served, "boom!")
    page.wait_for_selector("#notice:visible")
    assert page.inner_text("#notice") == "Logits are NaN."
    page.wait_for_selector("#send:visible")


def crowd(engine: ScriptedEngine, number: int) -> None:
    """That many requests run, and stay."""
    template = next(iter(engine.running.values()))[0]
    for i in range(number):
        changed = {name: getattr(template, name) for name in Request.__dataclass_fields__}
        changed |= {"request_id": f"crowd-{i:03}", "tenant": f"tenant-{i % 7}"}
        engine.running[f"crowd-{i:03}"] = (Request(**changed), i % 50)


def test_live_with_none_one_and_three_hundred_requests(
    page: Any, serve_engine: Callable[..., Served]
) -> None:
    served = serve_engine(ScriptedEngine("x" * 200, pause=0.25))
    visit(page, served, "live")
    page.wait_for_selector("#no-requests:visible")
    page.wait_for_selector("#memory:visible")
    assert "0 of 100 in use · 3 cached" in page.inner_text("#device-count")
    check_fits(page, "live-0")
    body = {"prompt": "hi", "max_tokens": 200}
    asking = threading.Thread(target=lambda: served.http.post("/v1/completions", json=body))
    asking.start()
    page.wait_for_selector("#requests tbody tr")
    assert page.locator("#requests tbody tr").count() == 1
    row = page.locator("#requests tbody tr").first
    assert row.locator("th").inner_text().startswith("cmpl-")
    assert row.locator(".tag").inner_text() in ("decode", "prefill")
    assert "used by one" in (page.get_attribute("#device-map", "aria-label") or "")
    check_fits(page, "live-1")
    crowd(served.engine, 300)
    until(lambda: page.locator("#requests tbody tr").count() == 301)
    assert "301 running" in page.inner_text("#requests-note")
    names = page.locator("#requests tbody th").all_inner_texts()
    assert names[1:] == [f"crowd-{i:03}" for i in range(300)]
    page.select_option("#filter", "prefill")
    until(lambda: page.locator("#requests tbody tr").count() < 20)
    page.select_option("#filter", "")
    drawn = "(() => { const c = document.getElementById('device-map');" \
            " return c.getContext('2d').getImageData(4, 4, 1, 1).data[3] })()"  # fmt: skip
    assert page.evaluate(drawn) == 255
    check_fits(page, "live-300")
    for width, height in SIZES.values():  # how old it is can be read without scrolling sideways
        page.set_viewport_size({"width": width, "height": height})
        last = "#requests tbody td:last-child"
        assert (
            page.evaluate(f"document.querySelector('{last}').getBoundingClientRect().right")
            <= width
        )
    served.engine.script = ""  # all end
    page.wait_for_selector("#no-requests:visible")
    asking.join(10)


def test_polling_stops_while_nobody_looks(page: Any, served: Served) -> None:
    visit(page, served, "live")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    hide = "Object.defineProperty(document, 'hidden', {value: %s, configurable: true});" \
           "document.dispatchEvent(new Event('visibilitychange'))"  # fmt: skip
    page.evaluate(hide % "true")
    page.wait_for_timeout(100)
    asked.clear()
    page.wait_for_timeout(1500)
    assert asked == []
    page.evaluate(hide % "false")
    page.wait_for_timeout(300)
    assert any(url.endswith("/status/live") for url in asked)


def test_loading_failing_and_a_server_that_is_gone(
    page: Any, serve_engine: Callable[..., Served]
) -> None:
    loader = BlockedLoader(ScriptedEngine(), ValueError("no such luck"))
    served = serve_engine(ScriptedEngine(), loader=loader, wait=False)
    page.goto(f"http://127.0.0.1:{served.port}/")
    page.wait_for_selector("#banner:visible")
    until(lambda: "compiling" in page.inner_text("#banner"))
    assert page.inner_text("#banner") == "The engine is loading. compiling"
    assert page.is_disabled("#send")
    check_fits(page, "loading")
    loader.go_on.set()
    page.wait_for_selector("#state[data-state=failed]")
    assert "no such luck" in page.inner_text("#banner")
    page.goto(f"http://127.0.0.1:{served.port}/#live")  # nothing breaks without an engine
    page.wait_for_selector("#no-requests:visible")
    served.stop()
    page.wait_for_selector("#state[data-state=unreachable]")
    assert "can't be reached" in page.inner_text("#banner")


def test_an_engine_that_is_replaced_and_one_that_sleeps(
    page: Any, serve_engine: Callable[..., Served]
) -> None:
    loader = BlockedLoader(ScriptedEngine())
    loader.go_on.set()
    served = serve_engine(loader.engine, loader=loader, restarts=RestartConfig())
    visit(page, served)
    loader.go_on.clear()
    served.post("/v1/completions", prompt="x?")  # breaks the engine
    page.wait_for_selector("#state[data-state=restarting]")
    assert page.inner_text("#banner").startswith("The engine is being replaced. the engine stopped")
    assert page.is_disabled("#send")
    check_fits(page, "restarting")
    loader.go_on.set()
    page.wait_for_selector("#state[data-state=ready]")
    assert page.locator("#banner:visible").count() == 0
    assert page.is_enabled("#send")
    served.host.pause("asleep", ASLEEP)
    page.wait_for_selector("#state[data-state=asleep]")
    assert page.inner_text("#banner") == "The engine sleeps. POST /admin/wake wakes it"
    check_fits(page, "asleep")
    served.host.resume()
    page.wait_for_selector("#state[data-state=ready]")


def test_plan_and_conformance(page: Any, served: Served) -> None:
    visit(page, served, "conformance")
    page.wait_for_selector("table.matrix tbody tr")
    rows = page.locator("table.matrix tbody th b").all_inner_texts()
    assert {"cpu", "cpu-eager", "cuda", "rocm"} <= set(rows)
    assert page.locator("table.matrix .cell.good").count() > 20
    check_fits(page, "conformance")
    page.click("nav a[data-view=plan]")
    page.wait_for_selector("#plan-body .empty")  # the scripted engine has none


def test_the_keyboard_reaches_every_view(page: Any, served: Served) -> None:
    page.goto(f"http://127.0.0.1:{served.port}/#plan")
    page.wait_for_selector("#state[data-state=ready]")
    page.focus("nav a[data-view=chat]")
    for view in ("live", "plan", "conformance"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.dataset.view") == view
    for view in ("chat", "live", "plan", "conformance"):
        page.focus(f"nav a[data-view={view}]")
        page.keyboard.press("Enter")
        page.wait_for_selector(f"#{view}:visible")
        current = page.locator("nav a[aria-current]")
        assert current.get_attribute("data-view") == view
    unnamed = page.evaluate("""[...document.querySelectorAll('input, select, textarea, button, canvas')]
        .filter((e) => !(e.labels && e.labels.length) && !e.textContent.trim()
                       && !e.getAttribute('aria-label')).map((e) => e.id)""")
    assert unnamed == []


def test_a_key_is_asked_for_kept_and_sent(page: Any, served: Served) -> None:
    keys: list[str | None] = []

    def guarded(route: Any) -> None:
        given = route.request.headers.get("authorization")
        keys.append(given)
        if given == "Bearer right":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": {"message": "no", "type": "x"}})

    page.route("**/status**", guarded)
    page.goto(f"http://127.0.0.1:{served.port}/")
    page.wait_for_selector("#key-dialog[open]")
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    page.wait_for_selector("#key-problem:visible")
    page.fill("#key", "right")
    page.keyboard.press("Enter")
    page.wait_for_selector("#state[data-state=ready]")
    assert page.locator("#key-dialog[open]").count() == 0
    assert keys[0] is None
    assert {"Bearer wrong", "Bearer right"} <= set(keys)
    page.reload()
    page.wait_for_selector("#state[data-state=ready]")  # asked once a tab


def test_a_browser_that_was_told_a_key_may_do_everything(
    browser: Any, serve_engine: Callable[..., Served], tmp_path: Path
) -> None:
    keyed = keyed_server(serve_engine, tmp_path)
    name_and_key = {"username": "anybody", "password": keyed.keys["acme"]}
    context = browser.new_context(http_credentials=name_and_key)
    page = context.new_page()
    ask(page, keyed.served, "hi")
    page.wait_for_selector(".note")
    page.click("nav a[data-view=live]")
    page.wait_for_selector("#memory:visible")
    assert page.locator("#key-dialog[open]").count() == 0
    context.close()


def test_the_policy_is_strict_and_files_come_from_a_list(served: Served) -> None:
    answer = served.http.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    for name in ("app.js", "chat.js", "live.js", "plan.js", "style.css", "dashboard.css"):
        assert served.http.get(f"/page/{name}").status_code == 200
    for name in ("index.html", "..%2fapp.py", "nope.js", "%2e%2e/app.py"):
        assert served.http.get(f"/page/{name}").status_code == 404
    assert 'style="' not in answer.text
    assert "http://" not in answer.text.replace("http://www.w3.org/2000/svg", "")
