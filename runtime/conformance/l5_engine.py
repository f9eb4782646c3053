"""L5: the whole engine over a backend: what must not change an answer, and what must not leak.

In low precision a step of another shape may round another way, and two tokens that are nearly tied
may change places. So answers are compared with a margin: where they part, the reference's best two
logits have to be closer than what the dtype can tell apart. In fp32 that margin is next to nothing.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from halyard.hal.conformance.backend import BackendUnderTest
from halyard.hal.conformance.case import Case, CaseContext
from halyard.hal.types import DType
from halyard.models.spec import ModelSpec
from halyard.models.tiny import save_tiny_model, tiny_config
from halyard.runtime.llm import LLM
from halyard.runtime.outputs import RequestOutput
from halyard.runtime.request import SamplingParams

__all__ = ["MARGINS", "cases"]

# Natural-log probabilities between the two best tokens below which either may win. The tiny models'
# logits reach 64 and more, where neighbours are 0.0625 apart in float16 and 0.5 in bfloat16: two
# such steps, and one.
MARGINS: dict[DType, float] = {"float32": 1e-3, "float16": 0.125, "bfloat16": 0.5}

GREEDY = SamplingParams(temperature=0, max_tokens=24, logprobs=2)
EMBEDDED_PROMPTS = (
    "def fibonacci(n):\n",
    "class Stack:\n    def __init__(self):\n",
    "import os\n\nfor name in os.listdir(",
    '"""Return the ',
)


def cases(backend: BackendUnderTest) -> list[Case]:
    """Cases for each dtype, most on a tiny Llama, one on the embedded model's real weights."""
    if not backend.computes:
        return []
    need_of = ModelSpec.from_hf(tiny_config("llama")).requirements
    found = []
    for dtype in ("float32", "bfloat16", "float16"):
        waived = () if dtype in backend.claimed_dtypes() else (f"dtype {dtype}",)
        for name, run in (
            ("greedy_equals_reference", _greedy),
            ("embedded_equals_reference", _embedded),
            ("preempted_by_swap", _preempted_by_swap),
            ("preempted_by_recompute", _preempted_by_recompute),
            ("prefix_cache_on_equals_off", _prefix_cache),
            ("copies_equal_the_single_one", _copies),
            ("batch_invariance", _batch_invariance),
            ("a_seed_draws_the_same", _seeded),
            ("aborts_leak_nothing", _aborts),
            ("handed_over_and_back", _handed_over),
        ):
            found.append(Case("L5", name, run, dtype, need_of(dtype, 16), seconds=600.0,
                              waived=waived))  # fmt: skip
    return found


@contextmanager
def _tiny(family: str = "llama") -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_model(family, Path(folder))
        yield Path(folder)


@contextmanager
def _engine(
    context: CaseContext, model: Any, backend: str | None = None, **options: Any
) -> Iterator[LLM]:
    """An engine that must have given every block back when it is left."""
    options = {"kv_blocks": 64, "max_num_sequences": 16, "dtype": context.dtype} | options
    under_test = context.backend
    llm = LLM(model, backend=backend or under_test.name, matrix=under_test.matrix, **options)
    try:
        yield llm
        llm.engine.check_integrity()
        stats = llm.engine.stats().scheduler
        context.require(stats.blocks_used == 0, f"{stats.blocks_used} blocks were leaked")
        context.require(stats.host_blocks_used == 0, "host blocks were leaked")
    finally:
        llm.close()


def _prompt(length: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(128) for _ in range(length)]


CROWD = [_prompt(20 + 3 * i, i) for i in range(6)]


def _ask(llm: LLM, prompts: Any, params: SamplingParams = GREEDY) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False)


def _same(
    context: CaseContext, expected: list[RequestOutput], found: list[RequestOutput], what: str
) -> None:
    """Equal up to a near tie of `expected`, which carries logprobs."""
    ties = 0
    margin = MARGINS[context.dtype]
    for number, (one, other) in enumerate(zip(expected, found, strict=True)):
        wanted, got = one.outputs[0].token_ids, other.outputs[0].token_ids
        if wanted == got:
            continue
        at = next((i for i, (a, b) in enumerate(zip(wanted, got, strict=False)) if a != b), None)
        context.require(at is not None, f"{what}: answer {number} has another length")
        best = sorted(
            (entry.logprob for entry in (one.outputs[0].logprobs or [])[at or 0].values()),
            reverse=True,
        )
        gap = best[0] - best[1]
        context.require(
            gap <= margin,
            f"{what}: answer {number} parts at token {at}, where the best two are {gap:.3g} apart "
            f"(a tie is {margin:.3g})",
        )
        ties += 1
    context.notes["near_ties"] = context.notes.get("near_ties", 0) + ties
    context.notes["answers"] = context.notes.get("answers", 0) + len(expected)


def _greedy(context: CaseContext) -> None:
    with _tiny() as folder:
        with _engine(context, folder, "reference") as reference:
            expected = _ask(reference, CROWD)
        with _engine(context, folder, max_batched_tokens=16) as llm:
            _same(context, expected, _ask(llm, CROWD), "against the reference backend")


def _embedded(context: CaseContext) -> None:
    prompts = list(EMBEDDED_PROMPTS)
    with _engine(context, "embedded", "reference", kv_blocks=96) as reference:
        expected = _ask(reference, prompts)
    with _engine(context, "embedded", kv_blocks=96) as llm:
        _same(context, expected, _ask(llm, prompts), "against the reference backend")


def _preempted(context: CaseContext, **pressure: Any) -> int:
    params = SamplingParams(temperature=0, max_tokens=40, logprobs=2)
    with _tiny() as folder:
        with _engine(context, folder) as calm:
            expected = _ask(calm, CROWD, params)
        with _engine(context, folder, kv_blocks=12, max_model_len=128, **pressure) as tight:
            found = _ask(tight, CROWD, params)
            stats = tight.engine.stats().scheduler
    _same(context, expected, found, "preempted")
    return stats.preemptions_swap if "host_kv_blocks" in pressure else stats.preemptions_recompute


def _preempted_by_swap(context: CaseContext) -> None:
    done = _preempted(context, preemption="swap", host_kv_blocks=40)
    context.require(done > 0, "nothing was swapped: the case proves nothing")


def _preempted_by_recompute(context: CaseContext) -> None:
    done = _preempted(context, preemption="recompute")
    context.require(done > 0, "nothing was preempted: the case proves nothing")


def _prefix_cache(context: CaseContext) -> None:
    shared = _prompt(40, 1)
    asked = [shared + _prompt(5, i) for i in range(5)]
    with _tiny() as folder:
        with _engine(context, folder, prefix_cache=False) as off:
            expected = _ask(off, asked)
        with _engine(context, folder) as on:
            found = _ask(on, asked)
    hits = [output.num_cached_tokens for output in found]
    context.require(hits == [0, 32, 32, 32, 32], f"cached tokens were {hits}")
    _same(context, expected, found, "with the prefix cache")


def _copies(context: CaseContext) -> None:
    with _tiny() as folder, _engine(context, folder) as llm:
        single = _ask(llm, [CROWD[0]])
        _same(context, single * 8, _ask(llm, [CROWD[0]] * 8), "eight copies")


def _batch_invariance(context: CaseContext) -> None:
    """Measured, and judged by the margin: does company in the batch change an answer?"""
    with _tiny() as folder, _engine(context, folder, prefix_cache=False) as llm:
        together = _ask(llm, CROWD)
        alone = [_ask(llm, [prompt])[0] for prompt in CROWD]
    same = [
        a.outputs[0].token_ids == b.outputs[0].token_ids
        for a, b in zip(together, alone, strict=True)
    ]
    context.notes["equal_share"] = sum(same) / len(same)
    _same(context, alone, together, "in company")


def _seeded(context: CaseContext) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=11, max_tokens=16, n=2)
    with _tiny() as folder, _engine(context, folder, prefix_cache=False) as llm:
        once, again = _ask(llm, CROWD[:3], params), _ask(llm, CROWD[:3], params)
    for one, other in zip(once, again, strict=True):
        for a, b in zip(one.outputs, other.outputs, strict=True):
            context.require(a.token_ids == b.token_ids, "the same seed drew other tokens")


def _aborts(context: CaseContext) -> None:
    params = SamplingParams(temperature=0, max_tokens=30, n=2)
    with _tiny() as folder, _engine(context, folder, kv_blocks=24, host_kv_blocks=16,
                                    max_model_len=128) as llm:  # fmt: skip
        requests = [llm.engine.intake.request(prompt, params) for prompt in CROWD]
        for request in requests:
            llm.engine.add(request)
        for number, request in enumerate(requests):
            for _ in range(number + 1):
                llm.engine.step()
                llm.engine.check_integrity()
            llm.engine.abort(request.request_id)
            llm.engine.check_integrity()
        while llm.engine.has_work():  # a step may be in flight: its blocks are free when it is back
            llm.engine.step()


def _run_tokens(llm: LLM, steps: int | None, into: list[int]) -> None:
    """Step an engine with one greedy request; all its tokens, or those of so many steps."""
    while llm.engine.has_work() and steps != 0:
        for event in llm.engine.step():
            into.extend(event.token_ids)
        steps = steps - 1 if steps is not None else None


def _handed_over(context: CaseContext) -> None:
    """From the reference backend to this one and back, running, between other block sizes."""
    with _tiny() as folder:
        with _engine(context, folder, "reference") as reference:
            expected = _ask(reference, [CROWD[3]])
        found: list[int] = []
        with (
            _engine(context, folder, "reference", block_size=8, kv_blocks=64) as theirs,
            _engine(context, folder) as ours,
        ):
            request = theirs.engine.intake.request(CROWD[3], GREEDY)
            theirs.engine.add(request)
            _run_tokens(theirs, 9, found)
            moved = ours.engine.attach(theirs.engine.detach(request.request_id))
            context.require(moved, "there was room, but the KV was not taken over")
            _run_tokens(theirs, None, found)  # what a step in flight had brought
            _run_tokens(ours, 8, found)
            ours.engine.check_integrity()
            moving = ours.engine.detach(request.request_id)
            _run_tokens(ours, None, found)
            moved = theirs.engine.attach(moving)
            context.require(moved, "there was room, but the KV was not taken back")
            _run_tokens(theirs, None, found)
    answer = expected[0].outputs[0]
    if answer.token_ids != found:
        output = RequestOutput("moved", None, [], [type(answer)(0, token_ids=found)])
        _same(context, expected, [output], "handed over")
