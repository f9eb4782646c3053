"""The suite as pytest tests: one a case, each guarded by a worker process.

Collected by `pytest --pyargs halyard.hal.conformance --backend NAME`.
"""

from __future__ import annotations

from typing import Any

import pytest

from halyard.hal.conformance.runner import run_cases

__all__ = ["test_case"]


@pytest.fixture(scope="session")
def outcomes(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """Results of all selected cases, run at once in as few workers as survive."""
    chosen = [
        item.callspec.params["conformance_case"]
        for item in request.session.items
        if hasattr(item, "callspec") and "conformance_case" in item.callspec.params
    ]
    backend = chosen[0][0]
    results = run_cases(backend, [case for _, case in chosen])
    return {result["id"]: result for result in results}


def test_case(conformance_case: Any, outcomes: dict[str, dict[str, Any]]) -> None:
    _, case = conformance_case
    result = outcomes[case.id]
    if result["status"] == "not_claimed":
        pytest.skip(f"not claimed: {result['message']}")
    if result["status"] != "passed":
        pytest.fail(f"{result['status']}: {result['message']}\n{result['detail']}", pytrace=False)
