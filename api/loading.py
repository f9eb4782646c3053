"""Makes the engine of a server: in a process of its own, or in this one. Takes seconds to minutes."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from halyard.api.host import Loaded
from halyard.api.provenance import provenance_of
from halyard.models.provenance import file_digests
from halyard.models.source import ModelSource, resolve_source
from halyard.models.tokenizer import Tokenizer, load_tokenizer
from halyard.runtime.client import Client
from halyard.runtime.config import EngineConfig
from halyard.runtime.metrics import Metrics
from halyard.runtime.port import EngineFacts, EnginePort

if TYPE_CHECKING:
    from halyard.runtime.process_port import Launch

__all__ = ["load_engine", "start_engine"]


def start_engine(
    config: EngineConfig,
    tell: Callable[[str], None],
    *,
    hang_seconds: float | None = None,
    metrics: Metrics | None = None,
    starting: "Launch | None" = None,
) -> Loaded:
    """Start an engine in a process of its own; meanwhile read its tokenizer and digests here.

    Args:
        tell: is called with the name of each phase as it begins.
        hang_seconds: a step that takes longer is taken for a hang.
        metrics: of the engine whose place this one takes.
        starting: its process, where that was started already.

    Raises:
        HalyardError: the model can't be served here; one line says why.
    """
    from halyard.runtime.process_port import launch

    starting = starting or launch(config)
    try:
        source = resolve_source(config.model, config.revision, config.mirror)
        with ThreadPoolExecutor(2, thread_name_prefix="halyard-read") as pool:
            tokenizer = pool.submit(load_tokenizer, source)
            digests = pool.submit(file_digests, source)
            port = starting.wait(tell, hang_seconds=hang_seconds, metrics=metrics)
            return _loaded(port, tokenizer.result(), port.facts, digests.result())
    except BaseException:
        starting.end()
        raise


def load_engine(config: EngineConfig, tell: Callable[[str], None]) -> Loaded:
    """Build an engine in this process, with its steps in a thread.

    Raises:
        HalyardError: the model can't be served here; one line says why.
    """
    from halyard.runtime.build import build_engine
    from halyard.runtime.thread_port import ThreadPort

    built = build_engine(config, tell)
    source: ModelSource | None = built.plan.source
    tell("reading digests")
    files = file_digests(source) if source is not None else {}
    return _loaded(ThreadPort(built.engine, built.facts), built.tokenizer, built.facts, files)


def _loaded(
    port: EnginePort, tokenizer: Tokenizer | None, facts: EngineFacts, files: dict[str, str]
) -> Loaded:
    provenance = provenance_of(facts, files)
    return Loaded(Client(port, tokenizer), facts.device_name, facts.dtype, provenance)
