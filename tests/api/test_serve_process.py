"""Start and stop of `halyard serve`: every failure is one line, every stop is clean."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
from serve_process import ROOT, ServeProcess

SMALL = ("--kv-blocks", "256", "--host-kv-blocks", "0", "--max-num-sequences", "8")


def fails(*arguments: str) -> str:
    """Run to its end; one line on stderr and exit status 2."""
    done = subprocess.run(
        [sys.executable, "-m", "halyard.api.cli.main", "serve", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT / "pkg",
    )
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_a_taken_port_fails_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = fails("--port", str(port))
    assert line.startswith("halyard: can't listen on 127.0.0.1")
    assert "--port" in line


def test_a_host_that_is_none() -> None:
    assert "can't listen on" in fails("--host", "256.1.1.1")


def test_a_model_that_is_none() -> None:
    assert "no such model folder" in fails("./no/such/model", "--port", "0")


def test_sigterm_lets_a_running_request_finish() -> None:
    server = ServeProcess(*SMALL, "--grace-seconds", "60")
    try:
        server.wait_for("Ready:")
        answers: list[httpx.Response] = []
        body = {"prompt": "def ", "max_tokens": 900, "temperature": 0, "ignore_eos": True}
        asking = threading.Thread(
            target=lambda: answers.append(
                httpx.post(f"{server.url}/v1/completions", json=body, timeout=100)
            )
        )
        asking.start()
        while not httpx.get(f"{server.url}/status").json()["running"] and asking.is_alive():
            pass
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("Stopping: 1 requests")  # it runs: nothing is waited for in vain
        asking.join(90)
        assert answers[0].status_code == 200
        assert answers[0].json()["usage"]["completion_tokens"] == 900
    finally:
        status = server.stop()
    assert status == 0
    assert server.stderr == ""


def test_ctrl_c_ends_a_stream_with_an_error_event_after_the_grace_period() -> None:
    server = ServeProcess(*SMALL, "--grace-seconds", "0")
    try:
        server.wait_for("Ready:")
        body = {"prompt": "def ", "max_tokens": 1500, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            lines = (line for line in answer.iter_lines() if line)
            next(lines)
            server.process.send_signal(signal.SIGINT)
            *_, last = lines
        assert '"error"' in last
        assert "shutting down" in last
        assert server.process.wait(20) == 0
    finally:
        server.stop()
    assert "Traceback" not in server.stderr


def test_a_second_ctrl_c_stops_at_once() -> None:
    server = ServeProcess("--backend", "null", *SMALL, "--grace-seconds", "60")
    try:
        server.wait_for("Ready:")
        body = {"prompt": "def ", "max_tokens": 1500, "stream": True, "ignore_eos": True}
        [engine] = server.engines()
        os.kill(engine, signal.SIGSTOP)  # nothing ends by itself
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            server.process.send_signal(signal.SIGINT)
            server.wait_for("Stopping: 1 requests")
            server.process.send_signal(signal.SIGINT)
            *_, last = (line for line in answer.iter_lines() if line)
        assert "shutting down" in last
        assert server.process.wait(20) == 130
        assert not Path(f"/proc/{engine}").exists()
    finally:
        server.stop()
    (line,) = server.stderr.splitlines()
    assert "requests that ended with an error: 1" in line


def test_ctrl_c_while_loading() -> None:
    server = ServeProcess()
    try:
        server.wait_for("listens on")
        server.wait_for("compiling")
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(20) == 0
    finally:
        server.stop()
    assert "Traceback" not in server.stderr
