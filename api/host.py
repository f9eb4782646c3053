"""Owns the engine's client for a server: loads it in the background, says how far it is, ends it."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from halyard import __version__
from halyard.api.errors import ModelNotFoundError, NotFoundError, NotReadyError
from halyard.api.schemas.server import Readiness, Status
from halyard.api.tenants import caller
from halyard.hal.errors import EngineDeadError
from halyard.runtime.client import Client
from halyard.runtime.metrics import Metrics
from halyard.runtime.metrics.requests import OnEnd

if TYPE_CHECKING:  # it knows the engine's parts, and they are heavy
    from halyard.api.provenance import Provenance

__all__ = ["EngineHost", "Loaded", "Loader"]

logger = logging.getLogger("halyard.api")

_RATE_SECONDS = 5.0  # tokens per second are averaged over that long


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine that answers, and what the page says about it."""

    client: Client
    device: str
    dtype: str
    provenance: "Provenance | None" = None  # None: nobody looked


Loader = Callable[[Callable[[str], None]], Loaded]
"""Loads an engine; tells the name of each phase as it begins. Runs in a thread of its own."""


class EngineHost:
    """The engine as the server sees it: loading, ready, draining or dead.

    Args:
        loader: makes the engine; may take minutes.
        served_names: what clients may call the model, the first is shown; empty: the model's own.
        on_failure: is called on the event loop with the error that ended loading.
    """

    def __init__(
        self,
        loader: Loader,
        served_names: Sequence[str] = (),
        on_failure: Callable[[BaseException], None] | None = None,
        on_ready: Callable[[Loaded], None] | None = None,
    ) -> None:
        self.created = int(time.time())
        self.draining = False
        self.loading = False
        self._loader = loader
        self._served_names = tuple(served_names)
        self._on_failure = on_failure
        self._on_ready = on_ready
        self.compat_vllm = False  # vLLM's metric names beside ours
        self._early = Metrics("", "")  # until an engine is there
        self._phase = "starting"
        self._failure: str | None = None
        self._loaded: Loaded | None = None
        self._on_end: OnEnd | None = None
        self._samples: deque[tuple[float, int]] = deque(maxlen=64)

    @classmethod
    def of(cls, loaded: Loaded, served_names: Sequence[str] = ()) -> "EngineHost":
        """A host of an engine that is loaded already."""
        host = cls(lambda _: loaded, served_names)
        host._loaded = loaded
        return host

    def watch_ends(self, on_end: OnEnd | None) -> None:
        """Whom to tell of each request that has ended."""
        self._on_end = on_end
        if self._loaded is not None:
            self._loaded.client.metrics.tell_ends(on_end)

    def start(self) -> None:
        """Begin to load. Called on the event loop that will serve."""
        loop = asyncio.get_running_loop()

        def run() -> None:
            try:
                loaded = self._loader(self._tell)
            except BaseException as error:  # noqa: BLE001  # reported by whoever waits, a thread can't raise
                outcome: Callable[[], None] = partial(self._fail, error)
            else:
                outcome = partial(self._succeed, loaded)
            if not loop.is_closed():
                loop.call_soon_threadsafe(outcome)

        self.loading = True
        # Daemon: Ctrl-C must not wait for a download or a compiler.
        threading.Thread(target=run, name="halyard-load", daemon=True).start()

    @property
    def client(self) -> Client:
        """The client, if requests can be answered now.

        Raises:
            NotReadyError: still loading, or shutting down.
            EngineDeadError: the engine has failed.
        """
        readiness = self.readiness()
        if self._loaded is None or self.draining:
            raise NotReadyError(f"the server is not ready: {readiness.reason}")
        if not readiness.ready:
            raise EngineDeadError(readiness.reason)
        return self._loaded.client

    @property
    def present_client(self) -> Client | None:
        """The engine's client, dead or alive; None while there is none."""
        return self._loaded.client if self._loaded is not None else None

    @property
    def served_names(self) -> tuple[str, ...]:
        if self._served_names:
            return self._served_names
        return (self._loaded.client.model_name,) if self._loaded is not None else ()

    def check_model(self, model: str | None) -> str:
        """The name to answer with.

        Raises:
            ModelNotFoundError: another model is meant.
            ForbiddenError: it is not for the caller.
        """
        names = self.served_names
        name = model or names[0]
        if name not in names:
            raise ModelNotFoundError(
                f"no model {name!r} is served here: known are {', '.join(names)}"
            )
        caller().check_model(name)
        return name

    @property
    def fingerprint(self) -> str:
        """What made the answers: see GET /v1/provenance/{fingerprint}."""
        if self._loaded is None or self._loaded.provenance is None:
            return f"halyard-{__version__}"
        return self._loaded.provenance.fingerprint

    def provenance(self, fingerprint: str) -> dict[str, Any]:
        """What made answers with that fingerprint.

        Raises:
            NotFoundError: another server, or an earlier start of this one, made them.
        """
        loaded = self._loaded
        if loaded is None or loaded.provenance is None or fingerprint != self.fingerprint:
            raise NotFoundError(
                f"nothing here has the fingerprint {fingerprint!r}; this server's is "
                f"{self.fingerprint!r}",
                "fingerprint",
            )
        return {"fingerprint": fingerprint, **loaded.provenance.facts}

    @property
    def num_requests(self) -> int:
        """Requests without a final answer yet."""
        return self._loaded.client.num_requests if self._loaded is not None else 0

    def readiness(self) -> Readiness:
        if self.draining:
            return Readiness(False, "shutting down")
        if self._failure is not None:
            return Readiness(False, self._failure)
        if self._loaded is None:
            return Readiness(False, f"loading: {self._phase}")
        client = self._loaded.client
        if not client.alive:
            return Readiness(False, client.error or "the engine stopped")
        return Readiness(True, "ready")

    @property
    def state(self) -> str:
        """In one word: see Status.state."""
        if self.draining:
            return "stopping"
        if self._failure is not None:
            return "failed"
        if self._loaded is None:
            return "loading"
        readiness = self.readiness()
        if readiness.ready:
            return "ready"
        if readiness.reason == (self._loaded.client.error or "the engine stopped"):
            return "failed"
        return "asleep" if "asleep" in readiness.reason else "restarting"  # or changed for another

    def status(self) -> Status:
        """A picture for the page."""
        readiness = self.readiness()
        if self._loaded is None:
            return Status(readiness.ready, readiness.reason, __version__, self.state)
        client = self._loaded.client
        stats = client.stats()
        scheduler = stats.scheduler
        return Status(
            ready=readiness.ready,
            reason=readiness.reason,
            version=__version__,
            state=self.state,
            model=self.served_names[0],
            backend=client.backend_name,
            device=self._loaded.device,
            dtype=self._loaded.dtype,
            max_model_len=client.max_model_len,
            has_chat_template=client.tokenizer is not None and client.tokenizer.has_chat_template,
            kv_blocks_total=scheduler.blocks_total,
            kv_blocks_used=scheduler.blocks_used,
            kv_blocks_cached=scheduler.blocks_cached,
            host_blocks_total=scheduler.host_blocks_total,
            host_blocks_used=scheduler.host_blocks_used,
            running=scheduler.num_running,
            waiting=scheduler.num_waiting + scheduler.num_swapped,
            tokens_per_second=self._rate(stats.generated_tokens),
            generated_tokens=stats.generated_tokens,
            uptime_seconds=stats.uptime_seconds,
        )

    def metrics(self) -> bytes:
        """Prometheus' text; only whether it is up until the engine is loaded."""
        ready = self.readiness().ready
        if self._loaded is None:
            return self._early.render(None, ready=ready, compat_vllm=self.compat_vllm)
        client = self._loaded.client
        return client.metrics.render(client.stats(), ready=ready, compat_vllm=self.compat_vllm)

    @property
    def cost_per_hour(self) -> float | None:
        """What the machine costs; None: hw_matrix.yaml doesn't say."""
        return self._loaded.client.port.facts.cost_per_hour if self._loaded is not None else None

    def observe_error(self, kind: str, tenant: str | None = None) -> None:
        """Count a refused or failed request; of the caller at hand, where no tenant is named."""
        metrics = self._early if self._loaded is None else self._loaded.client.metrics
        metrics.observe_error(kind, caller().tenant.name if tenant is None else tenant)

    async def close(self, grace_seconds: float, hurry: Callable[[], bool] = lambda: False) -> None:
        """Refuse new requests, give running ones that long, answer the rest with an error, stop.

        Args:
            hurry: polled; True ends the wait at once.
        """
        self.draining = True
        if self._loaded is None:
            return
        client = self._loaded.client
        deadline = time.monotonic() + grace_seconds
        while client.num_requests and client.alive and time.monotonic() < deadline and not hurry():
            await asyncio.sleep(0.02)
        await client.close(0.0)

    def _rate(self, generated: int) -> float:
        now = time.monotonic()
        self._samples.append((now, generated))
        while len(self._samples) > 2 and now - self._samples[0][0] > _RATE_SECONDS:
            self._samples.popleft()
        since, before = self._samples[0]
        return (generated - before) / (now - since) if now > since else 0.0

    def _tell(self, phase: str) -> None:
        self._phase = phase

    def _succeed(self, loaded: Loaded) -> None:
        self.loading = False
        self._loaded = loaded
        metrics, facts = loaded.client.metrics, loaded.client.port.facts
        metrics.describe(__version__, loaded.device, loaded.dtype, facts.start_seconds)
        metrics.tell_ends(self._on_end)
        loaded.client.start()
        if self._on_ready is not None:
            self._on_ready(loaded)

    def _fail(self, error: BaseException) -> None:
        self.loading = False
        self._early.observe_load_failure()
        self._failure = f"loading failed: {error}"
        if self._on_failure is not None:
            self._on_failure(error)  # it tells the user
        else:
            logger.error("loading failed", exc_info=error)
