"""One engine with one model, driven by lines of JSON: peers.py starts it in the engine's environment.

Each line holds `requests`: [prompt token ids, answer length] pairs, all submitted at once, greedy,
end-of-sequence ignored. Answers are lines `ANSWER {"seconds": ..., "tokens": ...}`; Halyard's
tell its steps' work too.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

Requests = list[tuple[list[int], int]]


class Halyard:
    """`name` may choose a weight format after a colon: halyard:int8."""

    def __init__(self, name: str, model: str, dtype: str) -> None:
        from halyard import LLM, SamplingParams

        options: dict[str, Any] = {"quantization": name.split(":")[1]} if ":" in name else {}
        self.params = SamplingParams
        self.llm = LLM(model=model, dtype=dtype, max_model_len=2048, **options)
        self.plans: list[Any] = []  # of the last run's steps

    def run(self, requests: Requests) -> int:
        from halyard.runtime.work import watched_plans

        prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
        params = [
            self.params(temperature=0.0, ignore_eos=True, max_tokens=count) for _, count in requests
        ]
        self.plans.clear()
        with watched_plans(self.llm, self.plans.append):
            outputs = self.llm.generate(prompts, params)
        return sum(len(one.outputs[0].token_ids) for one in outputs)

    def work(self) -> list[tuple[float, float]]:
        """Bytes and arithmetic of each step of the last run."""
        from halyard.runtime.work import work_of

        found = [work_of(plan, self.llm) for plan in self.plans]
        return [(step.bytes, step.flops) for step in found]


class Vllm:
    def __init__(self, name: str, model: str, dtype: str) -> None:
        from vllm import LLM, SamplingParams

        self.params = SamplingParams
        self.llm = LLM(
            model=model, dtype=dtype, max_model_len=2048, skip_tokenizer_init=True,
            max_num_seqs=32,
        )  # fmt: skip

    def run(self, requests: Requests) -> int:
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
        params = [
            self.params(temperature=0.0, ignore_eos=True, max_tokens=count, detokenize=False)
            for _, count in requests
        ]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return sum(len(one.outputs[0].token_ids) for one in outputs)


class OpenVino:
    def __init__(self, name: str, model: str, dtype: str) -> None:
        import openvino_genai

        self.genai = openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = 2
        scheduler.enable_prefix_caching = True
        scheduler.max_num_seqs = 32
        self.pipe = openvino_genai.ContinuousBatchingPipeline(
            model, scheduler, "CPU",
            {"INFERENCE_PRECISION_HINT": {"bfloat16": "bf16", "float32": "f32"}[dtype]},
        )  # fmt: skip

    def run(self, requests: Requests) -> int:
        import numpy
        import openvino

        tensors, configs = [], []
        for prompt, count in requests:
            tensors.append(openvino.Tensor(numpy.array([prompt], dtype=numpy.int64)))
            config = self.genai.GenerationConfig()
            config.max_new_tokens = count
            config.ignore_eos = True
            config.do_sample = False
            configs.append(config)
        outputs = self.pipe.generate(tensors, configs)
        return sum(len(one.m_generation_ids[0]) for one in outputs)


ENGINES = {"halyard": Halyard, "vllm": Vllm, "openvino": OpenVino}


def resident_bytes() -> int:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmRSS"):
                return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    name, model, dtype = sys.argv[1:4]
    engine = ENGINES[name.split(":")[0]](name, model, dtype)
    engine.run([([1, 2, 3, 4], 2)])
    print("ANSWER {}", flush=True)
    for line in sys.stdin:
        requests = json.loads(line)["requests"]
        began = time.perf_counter()
        tokens = engine.run(requests)
        seconds = time.perf_counter() - began
        answer = {"seconds": seconds, "tokens": tokens, "rss": resident_bytes()}
        if isinstance(engine, Halyard):
            answer["work"] = engine.work()
        print("ANSWER " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
