"""What the page is given: blocks two bits each, others' requests without names, history."""

from __future__ import annotations

import base64
import random
import time

from halyard.api import status_views
from halyard.api.history import History
from halyard.runtime.config import SchedulerConfig
from halyard.runtime.engine import EngineStats
from halyard.runtime.metrics import Metrics
from halyard.runtime.outputs import CompletionDelta, RequestDelta
from halyard.runtime.picture import MAX_ROWS, take_picture
from halyard.runtime.plan import StepOutput
from halyard.runtime.request import Request, SamplingParams
from halyard.runtime.scheduler import Scheduler


def unpacked(text: str, count: int) -> list[int]:
    packed = base64.b64decode(text)
    return [packed[i // 4] >> (i % 4 * 2) & 3 for i in range(count)]


def test_blocks_survive_packing_at_every_length() -> None:
    draw = random.Random(1)
    for count in (0, 1, 3, 4, 5, 1000, 1023):
        states = bytes(draw.choices(range(4), k=count))
        made = status_views.pack_blocks(states)
        assert made.count == count
        assert unpacked(made.states, count) == list(states)
        counts = (made.free, made.cached, made.used, made.shared)
        assert counts == tuple(states.count(state) for state in range(4))


def test_a_hundred_thousand_blocks_are_small_and_cheap() -> None:
    states = bytes(random.Random(2).choices(range(4), k=100_000))
    started = time.perf_counter()
    made = status_views.pack_blocks(states)
    assert time.perf_counter() - started < 0.5  # some 0.5 ms
    assert len(made.states) < 34_000


def request(name: str, tenant: str, tokens: int = 40) -> Request:
    prompt = tuple(range(1, tokens + 1))
    params = SamplingParams(max_tokens=8)
    return Request(name, prompt, params, 8, arrival_time=time.monotonic(), tenant=tenant)


def test_a_picture_tells_what_the_scheduler_holds() -> None:
    scheduler = Scheduler(SchedulerConfig(num_blocks=8, max_model_len=64, max_num_sequences=2))
    for name, tenant in (("a", "one"), ("b", "two"), ("c", "one")):
        scheduler.add(request(name, tenant))
    plan = scheduler.schedule()
    assert plan is not None
    picture = take_picture(scheduler)
    stats = scheduler.stats()
    assert (picture.num_running, picture.num_waiting) == (stats.num_running, stats.num_waiting)
    held = sum(state in (2, 3) for state in picture.device_blocks)
    assert held == stats.blocks_used
    assert [row.request_id for row in picture.rows if row.state == "prefill"]
    assert [row.request_id for row in picture.rows if row.state == "waiting"]
    output = StepOutput(
        tuple((7,) * row.num_samples for row in plan.rows),
        (None,) * len(plan.rows),
        (None,) * len(plan.rows),
    )
    scheduler.commit(plan, output)
    assert {row.state for row in take_picture(scheduler).rows} >= {"decode"}
    scheduler.check_integrity()


def test_others_requests_have_no_names() -> None:
    scheduler = Scheduler(SchedulerConfig(num_blocks=8, max_model_len=64))
    scheduler.add(request("mine", "one"))
    scheduler.add(request("theirs", "two"))
    picture = take_picture(scheduler)
    seen = status_views.live(picture, "one").sequences
    assert {(one.id, one.tenant) for one in seen} == {("mine", "one"), ("another tenant's", "")}
    everything = status_views.live(picture, None).sequences
    assert {one.id for one in everything} == {"mine", "theirs"}


def test_a_crowd_is_counted_whole_and_told_in_part() -> None:
    scheduler = Scheduler(SchedulerConfig(num_blocks=8, max_model_len=64))
    for number in range(MAX_ROWS + 20):
        scheduler.add(request(str(number), "one", 4))
    picture = take_picture(scheduler)
    assert picture.num_waiting == MAX_ROWS + 20
    assert len(picture.rows) == MAX_ROWS


def test_history_has_rates_and_percentiles_and_survives_a_restart() -> None:
    metrics, history = Metrics("m", "b"), History()
    scheduler = Scheduler(SchedulerConfig(num_blocks=8, max_model_len=64)).stats()

    def take(tokens: int) -> None:
        history.take(EngineStats(scheduler, 1, 10, tokens, 1.0, 2.0), metrics)

    take(0)
    own = request("r", "one")
    for _ in range(2):
        metrics.observe_deltas([(own, RequestDelta("r", (CompletionDelta(0, "", (7,)),), 2))])
    time.sleep(0.01)
    take(100)
    take(5)  # another engine: its counters begin again
    first, second, third = history.samples
    assert first.first_token_p50 is None
    assert second.tokens_per_second > 100
    assert second.first_token_p50 is not None
    assert second.between_tokens_p95 is not None
    assert third.tokens_per_second == 0


def test_the_matrix_lists_every_backend_and_its_report() -> None:
    matrix = status_views.conformance("cpu")
    by_name = {row.backend: row for row in matrix.rows}
    assert matrix.running == "cpu"
    assert by_name["reference"].status == "verified"
    assert by_name["reference"].dtypes["float32"]["L3"].passed > 10
    assert by_name["null"].dtypes == {}
    assert set(matrix.levels) >= {"L0", "L6", "mutants"}
