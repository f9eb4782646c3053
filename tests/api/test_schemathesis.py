"""schemathesis reads our own OpenAPI and asks what it likes: never a 5xx, statuses and bodies as described.

HALYARD_SCHEMA_EXAMPLES=500 makes it a long run.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest
from served import Served

schemathesis = pytest.importorskip("schemathesis", reason="pip install schemathesis")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis.errors import Unsatisfiable  # noqa: E402
from hypothesis.stateful import run_state_machine_as_test  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.core.failures import FailureGroup  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

POSITIVE = schemathesis.GenerationMode.POSITIVE
NEGATIVE = schemathesis.GenerationMode.NEGATIVE
EXAMPLES = int(os.environ.get("HALYARD_SCHEMA_EXAMPLES", "8"))
CHECKS = [
    not_a_server_error,
    response_schema_conformance,
    content_type_conformance,
    status_code_conformance,
]


def test_no_request_breaks_the_server(served: Served) -> None:
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{served.port}/schema/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 25
    failures: list[str] = []
    asked = [(one, mode) for one in operations for mode in (POSITIVE, NEGATIVE)]
    for operation, mode in asked:

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        def ask(case: Any) -> None:
            case.validate_response(case.call(), checks=CHECKS)

        try:
            ask()
        except FailureGroup as error:  # all operations are looked at before it fails
            failures += [f"{operation.label}: {one}" for one in error.exceptions]
        except Unsatisfiable:
            if mode is POSITIVE:  # not every description can be gone against
                failures.append(f"{operation.label}: its description can't be satisfied")
    assert not failures, "\n\n".join(failures)
    assert served.http.get("/ready").status_code == 200


def test_what_one_answer_names_the_next_request_finds(served: Served) -> None:
    """Chains of requests along the document's links: responses, files and batches by their ids."""
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{served.port}/schema/openapi.json")
    reached: Counter[tuple[str, int]] = Counter()

    class Chains(schema.as_state_machine()):  # type: ignore[misc]
        def validate_response(self, response: Any, case: Any, **_: Any) -> None:
            reached[case.operation.label, response.status_code] += 1
            case.validate_response(response, checks=CHECKS)

    run_state_machine_as_test(
        Chains,
        settings=settings(
            max_examples=EXAMPLES, stateful_step_count=8, deadline=None, derandomize=True,
            database=None, suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
    assert any("{" in label and status == 200 for label, status in reached), reached
    assert served.http.get("/ready").status_code == 200
