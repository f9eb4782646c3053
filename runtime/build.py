"""The composition root: a config becomes a running engine. The one place that knows every layer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast

from halyard.compiler.cache import ArtefactCache, load_or_build
from halyard.compiler.captured import CapturedProgram
from halyard.compiler.null_program import NullProgram
from halyard.compiler.program import HeadShape, Program, UnboundProgram
from halyard.hal.contract import (
    Device,
    DrawingKernels,
    GraphCompiler,
    GreedyKernels,
    MaskingKernels,
    PagedKernels,
)
from halyard.hal.errors import RequestError
from halyard.hal.kernels import experts as _experts  # noqa: F401 - cached programs call its operator
from halyard.hal.registry import load_part
from halyard.models.manifest import MANIFEST, VerifiedFiles, verify
from halyard.models.source import ModelSource, resolve_source
from halyard.models.tokenizer import Tokenizer, load_tokenizer
from halyard.models.weights import load_weights
from halyard.runtime.batcher import locked
from halyard.runtime.config import EngineConfig, SchedulerConfig
from halyard.runtime.engine import Engine
from halyard.runtime.executor import Executor
from halyard.runtime.facts import engine_facts
from halyard.runtime.guided import GrammarCompiler
from halyard.runtime.intake import Intake, Limits
from halyard.runtime.metrics import Metrics
from halyard.runtime.planner import ExecutionPlan, make_plan
from halyard.runtime.port import EngineFacts
from halyard.runtime.sampler import Sampler
from halyard.runtime.scheduler import Scheduler

__all__ = ["BuiltEngine", "build_engine"]

logger = logging.getLogger("halyard.build")


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine and what was decided about it."""

    engine: Engine
    tokenizer: Tokenizer | None  # None: the checkpoint has none (prompts are token ids), or later
    plan: ExecutionPlan
    facts: EngineFacts
    startup_seconds: float


class _Clock:
    """Times the phases of a start and tells someone which is under way."""

    def __init__(self, tell: Callable[[str], None] | None) -> None:
        self.started = time.perf_counter()
        self.phases: dict[str, float] = {}
        self._tell = tell
        self._name: str | None = None
        self._since = self.started

    def phase(self, name: str | None) -> None:
        now = time.perf_counter()
        if self._name is not None:
            self.phases[self._name] = now - self._since
        self._name, self._since = name, now
        if name is not None:
            logger.info("%s", name)
            if self._tell is not None:
                self._tell(name)


def build_engine(
    config: EngineConfig,
    tell: Callable[[str], None] | None = None,
    *,
    tokenizer_later: bool = False,
) -> BuiltEngine:
    """Plan, compile, load, allocate.

    Args:
        tell: is called with the name of each phase as it begins.
        tokenizer_later: the engine reads the tokenizer when a constraint needs it, not at once:
            text is somebody else's work.

    Raises:
        HalyardError: the model can't be served here; one line says why.
    """
    clock = _Clock(tell)
    verified = _verify(config, clock)
    clock.phase("planning")
    plan = make_plan(config)
    row, memory = plan.selection.row, plan.memory
    tokenizer = None
    if plan.source is not None and not (tokenizer_later and plan.spec.eos_token_ids):
        clock.phase("reading the tokenizer")
        tokenizer = load_tokenizer(plan.source)
    device: Device = load_part("devices", row.device)()
    try:
        kernels: PagedKernels = load_part("kernels", row.kernels)(device)
        graph: GraphCompiler = load_part("graphs", row.graph)()
        executor = _build_executor(config, plan, device, kernels, graph, clock)
        if verified is not None:
            verified.check_untouched()
    except BaseException:
        device.close()
        raise
    clock.phase(None)
    scheduler = Scheduler(
        SchedulerConfig(
            num_blocks=memory.num_blocks,
            max_model_len=memory.max_model_len,
            block_size=config.block_size,
            num_host_blocks=memory.num_host_blocks,
            max_num_sequences=plan.max_num_sequences,
            max_batched_tokens=plan.max_batched_tokens,
            prefix_cache=config.prefix_cache,
            preemption=config.preemption,
            cost=plan.cost,
        )
    )
    eos = set(plan.spec.eos_token_ids)
    if not eos and tokenizer is not None:
        eos.update(tokenizer.eos_token_ids)
    limits = Limits(
        vocab_size=plan.spec.vocab_size,
        max_model_len=memory.max_model_len,
        eos_token_ids=frozenset(eos),
        max_num_sequences=plan.max_num_sequences,
        hidden_size=plan.spec.hidden_size,
    )
    bytes_per_block = executor.pool.layout.bytes_per_block
    facts = engine_facts(plan, config, limits, bytes_per_block, clock.phases)
    grammars = None
    if plan.source is not None and facts.has_tokenizer:
        grammars = GrammarCompiler(
            _vocabulary(plan.source, tokenizer),
            limits.vocab_size,
            limits.eos_token_ids,
            locked if executor.overlaps else None,
        )
    engine = Engine(
        scheduler,
        executor,
        Intake(limits, config.seed, grammars),
        Metrics(plan.spec.name, row.name, bytes_per_block),
        config.overlap,
    )
    seconds = time.perf_counter() - clock.started
    return BuiltEngine(engine, tokenizer, plan, facts, seconds)


def _vocabulary(source: ModelSource, loaded: Tokenizer | None) -> Callable[[], Tokenizer]:
    def vocabulary() -> Tokenizer:
        tokenizer = loaded if loaded is not None else load_tokenizer(source)
        if tokenizer is None:
            raise RequestError("the checkpoint's tokenizer is gone: structured output needs it")
        return tokenizer

    return vocabulary


def _verify(config: EngineConfig, clock: _Clock) -> VerifiedFiles | None:
    """Check a model's files against their manifest before anything of them is read.

    Raises:
        ModelError: they don't fit, or have none where one is required.
    """
    if not (isinstance(config.model, str) or hasattr(config.model, "__fspath__")):
        return None
    if config.load_format == "dummy" and not config.require_verified:
        return None
    source = resolve_source(config.model, config.revision, config.mirror)
    if not config.require_verified and not (source.path / MANIFEST).exists():
        return None
    clock.phase("verifying files")
    return verify(source.path, manifest_digest=config.manifest_digest)


def _build_program(
    config: EngineConfig,
    plan: ExecutionPlan,
    device: Device,
    kernels: PagedKernels,
    graph: GraphCompiler,
    clock: _Clock,
) -> Program | CapturedProgram | NullProgram:
    """Compile, load weights, bind."""
    spec = plan.spec
    if graph.name == "null":
        return NullProgram(spec.vocab_size, spec.hidden_size)
    clock.phase("compiling")
    unbound = _compile(config, plan, device, graph)
    clock.phase("loading weights")
    weights = load_weights(
        plan.source,
        spec,
        unbound.weights,
        plan.dtype,
        load_format=config.load_format,
        seed=config.seed,
        progress=config.progress,
        device=device.torch_device,
    )
    clock.phase("preparing weights")
    program = unbound.bind(weights, kernels)
    if device.torch_device.type == "cpu":
        return program
    # There launches cost more than small steps do.
    blocks = -(-plan.memory.max_model_len // config.block_size)
    return CapturedProgram(
        program,
        device,
        plan.max_num_sequences,
        blocks,
        config.block_size,
        plan.max_batched_tokens,
    )


def _build_executor(
    config: EngineConfig,
    plan: ExecutionPlan,
    device: Device,
    kernels: PagedKernels,
    graph: GraphCompiler,
    clock: _Clock,
) -> Executor:
    spec, memory = plan.spec, plan.memory
    layout = kernels.layout(spec.kv_spec(plan.dtype, config.block_size))
    num_host = memory.num_host_blocks
    host_pool = None
    if device.torch_device.type == "cpu" or not num_host:
        program = _build_program(config, plan, device, kernels, graph, clock)
        clock.phase("allocating KV blocks")
        pool = device.allocate_kv(layout, memory.num_blocks, host=False)
        if num_host:
            host_pool = device.allocate_kv(layout, num_host, host=True)
    else:  # locking tens of GiB of memory takes seconds: the rest is made ready meanwhile
        with ThreadPoolExecutor(1, "halyard-host-pool") as beside:
            coming = beside.submit(device.allocate_kv, layout, num_host, host=True)
            program = _build_program(config, plan, device, kernels, graph, clock)
            clock.phase("allocating KV blocks")
            pool = device.allocate_kv(layout, memory.num_blocks, host=False)
            host_pool = coming.result()
    draws = config.device_sampling and isinstance(kernels, DrawingKernels)
    drawing = cast(DrawingKernels, kernels) if draws else None
    masking = cast(MaskingKernels, kernels) if isinstance(kernels, MaskingKernels) else None
    greedy = cast(GreedyKernels, kernels) if isinstance(kernels, GreedyKernels) else None
    return Executor(
        device,
        kernels,
        program,
        pool,
        host_pool,
        Sampler(spec.vocab_size, drawing, masking, greedy),
        -(-memory.max_model_len // config.block_size),
        config.shared_attention,
    )


def _compile(
    config: EngineConfig,
    plan: ExecutionPlan,
    device: Device,
    graph: GraphCompiler,
) -> UnboundProgram:
    spec = plan.spec

    def build() -> UnboundProgram:
        # Imported here: both are heavy, and a cached program needs neither.
        from halyard.compiler.build import build_program
        from halyard.models.adapter import build_meta_module

        model = build_meta_module(spec, plan.dtype, plan.memory.max_model_len)
        return build_program(
            model,
            model.buffers_by_name,
            graph,
            device.info,
            name=spec.architecture,
            windows=spec.windows,
            heads=HeadShape(spec.num_heads, spec.num_kv_heads, spec.head_dim),
            vocab_size=spec.vocab_size,
            dtype=plan.dtype,
            torch_device=device.torch_device,
            quantization=config.quantization,
            dump_dir=config.dump_dir,
            progress=config.progress,
        )

    # Dumping graphs means going through the passes, so a cached program is of no use then.
    cache = ArtefactCache(config.cache_dir) if config.dump_dir is None else None
    facts = {"model": spec.digest(), "dtype": plan.dtype, "quantization": config.quantization}
    if spec.is_long(plan.memory.max_model_len):
        facts["rope"] = "long"
    return load_or_build(cache, facts, build, graph, device.info)
