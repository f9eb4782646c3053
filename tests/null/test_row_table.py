"""The rows' tables: what ran is let go of when nothing runs."""

from __future__ import annotations

from halyard import LLM, SamplingParams


def test_nothing_is_kept_of_what_ran_once_there_is_time() -> None:
    with LLM("embedded", backend="null", kv_blocks=64, max_num_sequences=8) as llm:
        engine = llm.engine
        params = SamplingParams(max_tokens=3, ignore_eos=True)
        for number in range(5):
            engine.add(engine.intake.request([5 + number] * 20, params))
        while engine.has_work():
            engine.step()
        table = engine.executor.batcher._table
        assert any(table._owners)
        engine.rehearse()
        assert not any(table._owners)
        assert not any(table._sources)
        assert not table._last_sequences
        assert sorted(table._free) == list(range(len(table._owners)))
        answer = llm.generate([[5] * 20], params, use_tqdm=False)[0].outputs[0]
        assert len(answer.token_ids) == 3
        engine.check_integrity()
