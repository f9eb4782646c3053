"""What a grammar costs a decode step: 16 sequences, with and without a JSON schema.

PYTHONPATH=pkg python benchmarks/guided_masks.py [BACKEND]
"""

from __future__ import annotations

import statistics
import sys
import time

from halyard.runtime.llm import LLM
from halyard.runtime.request import Constraint, SamplingParams

SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "n": {"type": "integer"}},
        "required": ["name", "n"],
        "additionalProperties": False,
    },
    "minItems": 30,
}
SEQUENCES, STEPS = 16, 96


def step_seconds(llm: LLM, params: SamplingParams) -> float:
    """Median duration of a decode step."""
    for number in range(SEQUENCES):
        llm.engine.add(llm.engine.intake.request([5 + number, 6, 7], params))
    times = []
    while llm.engine.has_work():
        started = time.perf_counter()
        llm.engine.step()
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def main() -> None:
    backend = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    common = {"max_tokens": STEPS, "temperature": 1.0, "seed": 1, "ignore_eos": True}
    free = SamplingParams(**common)
    held = SamplingParams(**common, guided=Constraint.json_schema(SCHEMA))
    with LLM("embedded", backend=backend, kv_blocks=512, host_kv_blocks=0) as llm:
        step_seconds(llm, held)
        rounds = [(step_seconds(llm, free), step_seconds(llm, held)) for _ in range(5)]
    plain = statistics.median(one for one, _ in rounds)
    guided = statistics.median(other for _, other in rounds)
    print(f"{SEQUENCES} sequences on {backend}: {plain * 1e3:.2f} ms a step, "
          f"{guided * 1e3:.2f} ms with masks ({guided / plain - 1:+.1%})")  # fmt: skip


if __name__ == "__main__":
    main()
