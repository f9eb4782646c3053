"""Makes the engine of a server: in a process of its own, or in this one. Takes seconds to minutes."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from halyard.api.host import Loaded
from halyard.api.provenance import provenance_of
from halyard.hal.errors import EngineDeadError
from halyard.models.provenance import file_digests
from halyard.models.source import ModelSource, resolve_source
from halyard.models.tokenizer import Tokenizer, load_tokenizer
from halyard.runtime.client import Client
from halyard.runtime.config import EngineConfig
from halyard.runtime.metrics import Metrics
from halyard.runtime.port import EngineFacts, EnginePort

if TYPE_CHECKING:
    from halyard.runtime.process_port import Launch

__all__ = ["ServedModel", "load_engine", "start_engine"]


class ServedModel:
    """The engine that a server loads, loads again when it died, and loads anew for other weights.

    An EngineHost's loader. Metrics go on from one engine to the next.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        in_process: bool = False,
        hang_seconds: float | None = None,
        load_seconds: float | None = None,
        starting: "Launch | None" = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.config = config
        self.in_process = in_process
        self.hang_seconds = hang_seconds
        self.load_seconds = load_seconds
        self._starting = starting
        self._metrics = metrics

    def __call__(self, tell: Callable[[str], None]) -> Loaded:
        """Load it. Runs in a thread of its own."""
        if self.in_process:
            return load_engine(self.config, tell)
        starting, self._starting = self._starting, None
        loaded = start_engine(
            self.config,
            tell,
            hang_seconds=self.hang_seconds,
            load_seconds=self.load_seconds,
            metrics=self._metrics,
            starting=starting,
        )
        self._metrics = loaded.client.metrics
        return loaded

    def with_model(
        self, model: str, revision: str | None, manifest_digest: str | None
    ) -> "ServedModel":
        """The same, of another checkpoint.

        Args:
            manifest_digest: that its manifest must have; None: what this one's had to have.
        """
        config = replace(
            self.config,
            model=model,
            revision=revision,
            manifest_digest=manifest_digest or self.config.manifest_digest,
            require_verified=self.config.require_verified or manifest_digest is not None,
        )
        return ServedModel(
            config,
            hang_seconds=self.hang_seconds,
            load_seconds=self.load_seconds,
            metrics=self._metrics,
        )


def start_engine(
    config: EngineConfig,
    tell: Callable[[str], None],
    *,
    hang_seconds: float | None = None,
    load_seconds: float | None = None,
    metrics: Metrics | None = None,
    starting: "Launch | None" = None,
) -> Loaded:
    """Start an engine in a process of its own; meanwhile read its tokenizer and digests here.

    Args:
        tell: is called with the name of each phase as it begins.
        hang_seconds: a step that takes longer is taken for a hang.
        load_seconds: a phase of loading that takes longer is; its process is killed then.
        metrics: of the engine whose place this one takes.
        starting: its process, where that was started already.

    Raises:
        HalyardError: the model can't be served here; one line says why.
    """
    from halyard.runtime.process_port import launch

    starting = starting or launch(config)
    alarm = _Alarm(load_seconds, starting.end)

    def next_phase(name: str) -> None:
        alarm.set(name)
        tell(name)

    try:
        alarm.set("starting")
        source = resolve_source(config.model, config.revision, config.mirror)
        with ThreadPoolExecutor(2, thread_name_prefix="halyard-read") as pool:
            tokenizer = pool.submit(load_tokenizer, source)
            digests = pool.submit(file_digests, source)
            port = starting.wait(next_phase, hang_seconds=hang_seconds, metrics=metrics)
            alarm.cancel()
            return _loaded(port, tokenizer.result(), port.facts, digests.result())
    except EngineDeadError:
        if alarm.rang is None:
            raise
        raise EngineDeadError(
            f"loading took longer than {load_seconds:g} s in the phase {alarm.rang!r} and was ended: "
            "raise --load-seconds if it needs longer"
        ) from None
    except BaseException:
        starting.end()
        raise
    finally:
        alarm.cancel()


class _Alarm:
    """Calls something when a phase takes too long. Set by one thread, rings in another."""

    def __init__(self, seconds: float | None, ring: Callable[[], None]) -> None:
        self.rang: str | None = None  # in which phase
        self._seconds = seconds
        self._ring = ring
        self._timer: threading.Timer | None = None

    def set(self, phase: str) -> None:
        """A phase begins; the one before has ended in time."""
        self.cancel()
        if self._seconds is not None and self.rang is None:
            self._timer = threading.Timer(self._seconds, self._wake, (phase,))
            self._timer.daemon = True
            self._timer.start()

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _wake(self, phase: str) -> None:
        self.rang = phase
        self._ring()


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
    client = Client(port, tokenizer, provenance.fingerprint)
    return Loaded(client, facts.device_name, facts.dtype, provenance)
