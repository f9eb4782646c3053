"""Offline generation with the same engine as the server: the `LLM` class, in the shape vLLM's users know."""

from __future__ import annotations

import gc
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from halyard.hal.errors import HalyardError, RequestError
from halyard.runtime.answer import Answers
from halyard.runtime.build import build_engine
from halyard.runtime.config import EngineConfig
from halyard.runtime.embedding import check_dimensions, finish_embedding
from halyard.runtime.held_events import HeldEvents
from halyard.runtime.kv_manager import tokens_in_common
from halyard.runtime.outputs import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Logprob,
    RequestDelta,
    RequestOutput,
)
from halyard.runtime.plan import TokenLogprob
from halyard.runtime.request import Pooling, Request, SamplingParams

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["LLM", "Prompt"]

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or {"prompt": text} / {"prompt_token_ids": ids}."""

Messages = Sequence[Mapping[str, Any]]


class LLM:
    """A model, loaded and ready to generate.

    Args:
        model: a folder, a Hugging Face id, "embedded" for the model that ships, or a config object
            (with load_format="dummy").
        backend: a row of hw_matrix.yaml; None chooses the best that can run here.
        dtype: "auto", "float32", "float16" or "bfloat16".
        max_model_len: most tokens of prompt and answer together; None: the model's, fitted to memory.
        block_size: tokens a KV block.
        memory_utilization: share of the device's memory to plan with.
        kv_blocks: KV blocks on the device; None: what fits.
        host_kv_blocks: KV blocks in the host's swap tier; None: the device's default.
        load_format: "auto", or "dummy" for random weights.
        seed: of random weights and of requests that bring no seed.
        options: any other field of EngineConfig.

    Raises:
        HalyardError: the model can't be served here; one line says why.
    """

    def __init__(
        self,
        model: str | Path | PretrainedConfig,
        backend: str | None = None,
        dtype: str = "auto",
        max_model_len: int | None = None,
        block_size: int = 16,
        memory_utilization: float = 0.9,
        kv_blocks: int | None = None,
        host_kv_blocks: int | None = None,
        load_format: str = "auto",
        seed: int = 0,
        **options: Any,
    ) -> None:
        config = EngineConfig.create(
            model=model,
            backend=backend,
            dtype=dtype,
            max_model_len=max_model_len,
            block_size=block_size,
            memory_utilization=memory_utilization,
            kv_blocks=kv_blocks,
            host_kv_blocks=host_kv_blocks,
            load_format=load_format,
            seed=seed,
            **options,
        )
        built = build_engine(config)
        self.engine = built.engine
        self.tokenizer = built.tokenizer
        self.plan = built.plan
        self.facts = built.facts
        self.startup_seconds = built.startup_seconds

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generate for all prompts at once; results come in the order of the prompts.

        Raises:
            RequestError: a prompt or parameter is invalid. Prompts are looked at while the device works:
                those before it may have begun, and are given up.
            HalyardError: the engine failed.
        """
        singles = _as_list(prompts)
        params = _params_for(len(singles), sampling_params)
        texts = [_text_of(prompt) for prompt in singles]
        asked: dict[str, tuple[Request, str | None]] = {}
        outputs: dict[str, RequestOutput] = {}

        def requests() -> Iterator[Request]:
            for prompt, own, text in zip(singles, params, texts, strict=True):
                request = self.engine.intake.request(self._token_ids(prompt), own)
                asked[request.request_id] = request, text
                yield request

        def extend(delta: RequestDelta) -> None:
            if delta.request_id not in outputs:
                outputs[delta.request_id] = _blank_output(*asked[delta.request_id])
            self._extend(outputs[delta.request_id], delta)

        with _collector_at_rest():
            self._run(requests(), len(singles), extend, "Generating" if use_tqdm else None)
        return [outputs[request_id] for request_id in asked]

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Generate answers to conversations, each a list of {"role", "content"} messages."""
        if self.tokenizer is None:
            raise RequestError("this checkpoint has no tokenizer: chat needs one", "messages")
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = [messages] if one else messages
        prompts = [
            {
                "prompt_token_ids": self.tokenizer.apply_chat_template(
                    conversation, add_generation_prompt=add_generation_prompt, **template_options
                )
            }
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling: Pooling = "last",
        dimensions: int | None = None,
        normalize: bool = True,
        use_tqdm: bool = True,
    ) -> list[EmbeddingRequestOutput]:
        """The model's final hidden states as one vector a prompt, in the order of the prompts.

        Args:
            pooling: "last" takes the last token's, "mean" the mean over all tokens.
            dimensions: keep that many leading entries; None: all.
            normalize: scale to length one, after cutting.

        Raises:
            RequestError: a prompt or parameter is invalid; nothing has run then.
            HalyardError: the engine failed.
        """
        intake = self.engine.intake
        check_dimensions(dimensions, intake.limits.hidden_size)
        outputs: dict[str, EmbeddingRequestOutput] = {}

        def take(delta: RequestDelta) -> None:
            _raise_errors(delta)
            if delta.embedding is not None:
                vector = finish_embedding(delta.embedding, dimensions, normalize)
                outputs[delta.request_id] = EmbeddingRequestOutput(
                    delta.request_id, EmbeddingOutput(vector.tolist()), [], delta.num_cached_tokens
                )

        with _collector_at_rest():
            requests = [
                intake.pooled_request(self._token_ids(prompt), pooling)
                for prompt in _as_list(prompts)
            ]
            self._run(requests, len(requests), take, "Embedding" if use_tqdm else None)
        return [
            replace(outputs[r.request_id], prompt_token_ids=list(r.prompt_token_ids))
            for r in requests
        ]

    def close(self) -> None:
        """Free the device's memory. Idempotent."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _token_ids(self, prompt: Prompt) -> Sequence[int]:
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" in prompt:
                return list(prompt["prompt_token_ids"])
            if not isinstance(prompt.get("prompt"), str):
                raise RequestError(
                    'a prompt given as a dict needs "prompt_token_ids" or "prompt"', "prompt"
                )
            return self._token_ids(prompt["prompt"])
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError(
                    "this checkpoint has no tokenizer: give prompts as token ids", "prompt"
                )
            return self.tokenizer.encode(prompt)
        return prompt

    def _run(
        self,
        requests: Iterable[Request],
        count: int,
        take: Callable[[RequestDelta], None],
        label: str | None,
    ) -> None:
        """Run so many requests to their ends; `label` is the progress bar's, None: no bar."""
        answers: dict[str, Answers] = {}
        watched: set[str] = set()  # whose text may end them
        held: defaultdict[str, HeldEvents] = defaultdict(HeldEvents)
        bar = tqdm(
            total=count,
            desc=label,
            unit="prompt",
            dynamic_ncols=True,
            disable=not (label and sys.stderr.isatty()),
        )
        waiting, filling = iter(requests), _Filling(self)
        try:
            # The device starts on what fills its first step, and the others come in while it works.
            self._admit(waiting, answers, watched, filling.first())

            def others() -> None:
                self._admit(waiting, answers, watched, filling.next())

            while self.engine.has_work():
                # A step has hundreds of events, and the device waits for who takes them in: text
                # is made when an answer ends, but for those that a text may end.
                due: dict[str, None] = {}
                for event in self.engine.step(others):
                    request_id = event.request_id
                    held[request_id].add(event)
                    if event.finish_reason is not None or request_id in watched:
                        due[request_id] = None
                for request_id in due:
                    delta = answers[request_id].feed(held[request_id].take(request_id))
                    for index in answers[request_id].take_abandoned():
                        self.engine.abort(request_id, index)
                    if delta is not None:
                        take(delta)
                        bar.update(int(delta.finished))
                others()
        except BaseException:
            for request_id in answers:  # Ctrl-C included: leave an engine that can be used again
                self.engine.abort(request_id)
            raise
        finally:
            bar.close()

    def _admit(
        self,
        waiting: Iterator[Request],
        answers: dict[str, Answers],
        watched: set[str],
        enough: Callable[[Request], bool],
    ) -> None:
        """Hand requests to the engine: until one is enough, or as many wait as may run at once. Making
        one takes a while, with text most of all, and the device has work for that long and no longer.
        """
        most = self.engine.scheduler.config.max_num_sequences
        while self.engine.num_waiting < most:
            request = next(waiting, None)
            if request is None:
                return
            answers[request.request_id] = Answers.of(request, self.tokenizer)
            if request.params.stop_strings:
                watched.add(request.request_id)
            self.engine.add(request)
            if enough(request):
                return

    def _extend(self, output: RequestOutput, delta: RequestDelta) -> None:
        _raise_errors(delta)
        for new in delta.completions:
            answer = output.outputs[new.index]
            answer.text += new.text
            answer.token_ids.extend(new.token_ids)
            if answer.logprobs is not None:
                answer.logprobs.extend(map(self._logprobs, new.logprobs or ()))
                answer.cumulative_logprob = (answer.cumulative_logprob or 0.0) + sum(
                    token.logprob for token in new.logprobs or ()
                )
            if new.finish_reason is not None:
                answer.finish_reason, answer.stop_reason = new.finish_reason, new.stop_reason
        if delta.prompt_logprobs is not None:
            output.prompt_logprobs = [
                None if token is None else self._logprobs(token) for token in delta.prompt_logprobs
            ]
        output.num_cached_tokens = max(output.num_cached_tokens, delta.num_cached_tokens)
        output.finished = delta.finished

    def _logprobs(self, token: TokenLogprob) -> dict[int, Logprob]:
        """The chosen token and the most likely ones, by token id."""
        text = self.tokenizer.token_text if self.tokenizer is not None else lambda _: None
        found = {
            token_id: Logprob(logprob, rank, text(token_id))
            for rank, (token_id, logprob) in enumerate(token.top, start=1)
        }
        found.setdefault(token.token_id, Logprob(token.logprob, token.rank, text(token.token_id)))
        return found


class _Filling:
    """How many prompts the host takes in at a time: what the device can do next, and no more.

    Of a prompt that begins as the one before it a step computes the rest alone; to take it in takes as
    long as others do.
    """

    def __init__(self, llm: LLM) -> None:
        config = llm.engine.scheduler.config
        self._step = llm.plan.max_batched_tokens
        self._block = config.block_size if config.prefix_cache else 0
        self._before = b""
        self._tokens = self._new = self._most = 0.0  # that are wanted still

    def first(self) -> Callable[[Request], bool]:
        """Until prompts fill a step. Those that share go on until half of one is new: with a few of
        them it would be over before it is launched and the next one planned.
        """
        self._tokens, self._new, self._most = self._step, self._step / 2, self._step * 8
        return self._filled_by

    def next(self) -> Callable[[Request], bool]:
        """Until what is new fills a step."""
        self._tokens, self._new, self._most = 0, self._step, self._step * 40
        return self._filled_by

    def _filled_by(self, request: Request) -> bool:
        tokens = new = len(request.prompt_token_ids)
        if self._block:
            common = tokens_in_common(self._before, request.packed)
            new = max(1, tokens - common // self._block * self._block)
            self._before = request.packed
        self._tokens -= tokens
        self._new -= new
        self._most -= tokens
        return self._most <= 0 or (self._tokens <= 0 and self._new <= 0)


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """What is there isn't looked through for garbage again and again: the device waits for that."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _raise_errors(delta: RequestDelta) -> None:
    for new in delta.completions:
        if new.error is not None:
            raise HalyardError(f"{delta.request_id}: {new.error}")


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many? A list of integers is one prompt of token ids."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if prompts and all(isinstance(item, int) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _params_for(
    count: int, params: SamplingParams | Sequence[SamplingParams] | None
) -> Sequence[SamplingParams]:
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise RequestError(
            f"{count} prompts but {len(params)} sampling params: give one, or one a prompt",
            "sampling_params",
        )
    return params


def _text_of(prompt: Prompt) -> str | None:
    if isinstance(prompt, Mapping):
        prompt = prompt.get("prompt", "")
    return prompt if isinstance(prompt, str) and prompt else None


def _blank_output(request: Request, text: str | None) -> RequestOutput:
    wants_logprobs = request.params.logprobs is not None
    return RequestOutput(
        request_id=request.request_id,
        prompt=text,
        prompt_token_ids=list(request.prompt_token_ids),
        outputs=[
            CompletionOutput(index, logprobs=[] if wants_logprobs else None)
            for index in range(request.params.n)
        ],
    )
