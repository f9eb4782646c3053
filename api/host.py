"""Owns the engine's client for a server: loads it in the background, says how far it is, ends it."""

import asyncio
import contextlib
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from typing import Any

from halyard import __version__
from halyard.api.errors import BusyError, ModelNotFoundError, NotFoundError, NotReadyError
from halyard.api.gate import Gate
from halyard.api.provenance import Provenance
from halyard.api.restarts import RestartConfig, Restarts
from halyard.api.schemas.server import Readiness, Status
from halyard.api.state import State
from halyard.api.tenants import caller
from halyard.hal.errors import EngineDeadError
from halyard.runtime.client import Client
from halyard.runtime.metrics import Metrics
from halyard.runtime.metrics.requests import OnEnd

__all__ = ["EngineHost", "Loaded", "Loader"]

logger = logging.getLogger("halyard.api")

_PAST_SECONDS = 24 * 3600.0  # provenance of engines that were replaced is known that long
_MAX_PAST = 32
_QUIET_LOOKS = 20  # a replaced engine without requests that often has none coming (1 s)
_RATE_SECONDS = 5.0  # tokens per second are averaged over that long


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """An engine that answers, and what the page says about it."""

    client: Client
    device: str
    dtype: str
    provenance: Provenance | None = None  # None: nobody looked


Loader = Callable[[Callable[[str], None]], Loaded]
"""Loads an engine; tells the name of each phase as it begins. Runs in a thread of its own."""


class EngineHost:
    """The engine as the server sees it: loading, ready, draining or dead.

    Args:
        loader: makes the engine; may take minutes.
        served_names: what clients may call the model, the first is shown; empty: the model's own.
        on_failure: is called on the event loop with the error that ended loading.
        on_ready: is called on the event loop when the first engine answers.
        restarts: how an engine that died is replaced; None: it is not.
    """

    def __init__(
        self,
        loader: Loader,
        served_names: Sequence[str] = (),
        on_failure: Callable[[BaseException], None] | None = None,
        on_ready: Callable[[Loaded], None] | None = None,
        restarts: RestartConfig | None = None,
    ) -> None:
        self.created = int(time.time())
        self.draining = False
        self.loading = False
        self.admin = False  # whether routes below /admin do anything
        self.gate = Gate()
        self.asleep: int | None = None  # how deep
        self.wakes_on_request = False  # while asleep: whether a request wakes it
        self._exchanging = False
        self._loader = loader
        self._served_names = tuple(served_names)
        self._on_failure = on_failure
        self._on_ready = on_ready
        self.compat_vllm = False  # vLLM's metric names beside ours
        self._early = Metrics("", "")  # until an engine is there
        self._phase = "starting"
        self._on_phase: Callable[[str], None] = lambda phase: None
        self._failure: str | None = None
        self._loaded: Loaded | None = None
        self._on_end: OnEnd | None = None
        # Why the engine, though loaded once, answers nothing now.
        self._pause: tuple[State, str] | None = None
        self._since = time.monotonic()  # when the engine began to serve
        self._restarts = Restarts(restarts or RestartConfig(max_in_a_row=0))
        self._past: OrderedDict[str, tuple[float, Provenance]] = OrderedDict()  # by fingerprint
        self._retiring: set[Loaded] = set()
        self._leaving: Loaded | None = None  # its end is expected
        self._tasks: set[asyncio.Task[None]] = set()
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
        self.spawn(self._first_load())

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something in the background, as long as the server runs, in nobody's name."""
        task = asyncio.get_running_loop().create_task(work, context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def load(self, loader: Loader | None = None) -> Loaded:
        """Make another engine, in a thread. Whoever asks decides what becomes of it.

        Raises:
            HalyardError: it could not be loaded.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Loaded] = loop.create_future()
        make = loader or self._loader

        def give(loaded: Loaded | None, error: BaseException | None) -> None:
            self.loading = False
            if done.cancelled():
                if loaded is not None:
                    self.spawn(loaded.client.close())
            elif error is not None:
                self.observe_load_failure()
                done.set_exception(error)
            elif loaded is not None:
                done.set_result(loaded)

        def run() -> None:
            loaded, failure = None, None
            try:
                loaded = make(self._tell)
            except BaseException as error:  # noqa: BLE001  # reported by whoever waits, a thread can't raise
                failure = error
            if not loop.is_closed():
                loop.call_soon_threadsafe(give, loaded, failure)

        self.loading = True
        # Daemon: Ctrl-C must not wait for a download or a compiler.
        threading.Thread(target=run, name="halyard-load", daemon=True).start()
        return await done

    async def _first_load(self) -> None:
        try:
            loaded = await self.load()
        except Exception as error:  # noqa: BLE001  # told to the user by whoever started the server
            self._fail(error)
        else:
            self._succeed(loaded)

    @property
    def client(self) -> Client:
        """The client, if requests can be answered now.

        Raises:
            NotReadyError: loading, restarting, asleep or shutting down: it may be ready later.
            EngineDeadError: the engine has failed for good.
        """
        readiness = self.readiness()
        if not self.given_up and (self._loaded is None or self.draining or self._pause is not None):
            raise NotReadyError(f"the server is not ready: {readiness.reason}")
        if not readiness.ready or self._loaded is None:
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
        found = self._loaded.provenance if self._loaded is not None else None
        if found is None or fingerprint != found.fingerprint:
            ended, found = self._past.get(fingerprint, (0.0, None))
            if found is None or time.monotonic() - ended > _PAST_SECONDS:
                raise NotFoundError(
                    f"nothing here has the fingerprint {fingerprint!r}; this server's is "
                    f"{self.fingerprint!r}",
                    "fingerprint",
                )
        return {"fingerprint": fingerprint, **found.facts}

    @property
    def num_requests(self) -> int:
        """Requests without a final answer yet."""
        current = (self._loaded,) if self._loaded is not None else ()
        return sum(loaded.client.num_requests for loaded in (*current, *self._retiring))

    def readiness(self) -> Readiness:
        if self.draining:
            return Readiness(False, "shutting down", "stopping")
        if self._failure is not None:
            return Readiness(False, self._failure, "failed")
        if self._loaded is None:
            return Readiness(False, f"loading: {self._phase}", "loading")
        if self._pause is not None:
            state, reason = self._pause
            return Readiness(False, reason, state)
        client = self._loaded.client
        if not client.alive:
            return Readiness(False, client.error or "the engine stopped", "failed")
        return Readiness(True, "ready", "ready")

    @property
    def given_up(self) -> bool:
        """The engine could not be loaded, or failed too often: it stays down."""
        return self._failure is not None and not self.draining

    def status(self) -> Status:
        """A picture for the page."""
        readiness = self.readiness()
        if self._loaded is None:
            return Status(readiness.ready, readiness.reason, __version__, readiness.state)
        client = self._loaded.client
        stats = client.stats()
        scheduler = stats.scheduler
        return Status(
            ready=readiness.ready,
            reason=readiness.reason,
            version=__version__,
            state=readiness.state,
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

    def observe_load_failure(self) -> None:
        """Count a model or weights that could not be loaded."""
        metrics = self._early if self._loaded is None else self._loaded.client.metrics
        metrics.observe_load_failure()

    async def close(self, grace_seconds: float, hurry: Callable[[], bool] = lambda: False) -> None:
        """Refuse new requests, give running ones that long, answer the rest with an error, stop.

        Args:
            hurry: polled; True ends the wait at once.
        """
        self.draining = True
        self.gate.open()
        deadline = time.monotonic() + grace_seconds
        while self.num_requests and time.monotonic() < deadline and not hurry():
            await asyncio.sleep(0.02)
        for task in list(self._tasks):
            task.cancel()
        current = (self._loaded,) if self._loaded is not None else ()
        for loaded in (*current, *self._retiring):
            await loaded.client.close(0.0)

    # -- one engine after another ---------------------------------------------------------------

    @property
    def loaded(self) -> Loaded | None:
        """The engine that answers, or last did."""
        return self._loaded

    @property
    def loader(self) -> Loader:
        return self._loader

    @contextlib.contextmanager
    def exchanging(self) -> Iterator[None]:
        """One at a time may replace the engine, put it to sleep or wake it.

        Raises:
            BusyError: somebody does.
        """
        if self._exchanging:
            raise BusyError("the engine is being exchanged, put to sleep or woken already")
        self._exchanging = True
        try:
            yield
        finally:
            self._exchanging = False

    def pause(self, state: State, reason: str) -> None:
        """Refuse requests for now, and say why."""
        self._pause = (state, reason)

    def resume(self) -> None:
        """Take requests again."""
        self._pause = None

    def adopt(self, loaded: Loaded, loader: Loader | None = None) -> None:
        """From now on this engine answers. The one before finishes what it has, and ends.

        Args:
            loader: what makes another like it, should it die.
        """
        before, self._loaded = self._loaded, loaded
        self._loader = loader or self._loader
        self._leaving = self._failure = None
        if before is not None:
            before.client.metrics.begin_to_leave(before.client.stats)
            if before.client.alive:
                self._retiring.add(before)
                self.spawn(self._retire(before))
            else:
                before.client.metrics.left(before.client.stats)
        if not self._served_names:
            self._served_names = (loaded.client.model_name,)  # it keeps its name
        if before is not None and before.provenance is not None:
            self._past[before.provenance.fingerprint] = (time.monotonic(), before.provenance)
            self._past.move_to_end(before.provenance.fingerprint)
            if len(self._past) > _MAX_PAST:
                self._past.popitem(last=False)
        self._since = time.monotonic()
        self._pause = None
        metrics, facts = loaded.client.metrics, loaded.client.port.facts
        metrics.describe(__version__, loaded.device, loaded.dtype, facts.start_seconds)
        metrics.tell_ends(self._on_end)
        # In no request's name either: what is logged of it later is not the reload's.
        Context().run(loaded.client.start, partial(self._died, loaded))

    async def _retire(self, loaded: Loaded) -> None:
        """Let an engine that was replaced finish what it has, then end it."""
        try:
            await self.gate.drained()
            quiet = 0
            while quiet < _QUIET_LOOKS and loaded.client.alive:
                quiet = 0 if loaded.client.num_requests else quiet + 1
                await asyncio.sleep(0.05)
        finally:
            self._retiring.discard(loaded)
            await loaded.client.close()
            loaded.client.metrics.left(loaded.client.stats)

    def let_go(self, loaded: Loaded) -> None:
        """Whoever says so ends that engine and puts another in its place, also if it dies before."""
        self._leaving = loaded

    def _died(self, loaded: Loaded, reason: str) -> None:
        """Its requests have been answered with an error by now."""
        if loaded is not self._loaded or loaded is self._leaving or self.draining:
            return
        if self.asleep is not None:
            self.asleep = 2  # nothing is left of it; waking starts another
            return
        self.revive(reason)

    def revive(self, reason: str) -> None:
        """Start an engine in the place of one that is gone, as if it had died."""
        delay = self._restarts.delay(time.monotonic() - self._since)
        if self._restarts.config.max_in_a_row == 0:
            self.resume()
            return  # the client's error says all
        self.pause("restarting", f"restarting: {reason}")
        self.spawn(self._restart(self._loaded, reason, delay))

    async def _restart(self, dead: Loaded | None, reason: str, delay: float | None) -> None:
        if dead is not None:
            await dead.client.close()

        def wanted() -> bool:  # no other has taken its place meanwhile, and nobody let it sleep
            return self._loaded is dead and self.asleep is None and not self.draining

        while delay is not None and wanted():
            await asyncio.sleep(delay)
            try:
                loaded = await self.load()
            except Exception as error:  # noqa: BLE001  # told below, and tried again
                reason = f"loading failed: {error}"
                logger.error("the engine could not be started again: %s", error)
                if wanted():
                    self.pause("restarting", f"restarting: {reason}")
                delay = self._restarts.delay(0.0)
            else:
                if not wanted():
                    await loaded.client.close()
                    return
                self.adopt(loaded)
                loaded.client.metrics.observe_restart()
                logger.warning("the engine was started again: %s", reason)
                return
        if wanted():
            self._failure = (
                f"the engine failed {self._restarts.in_a_row} times in a row and stays down; "
                f"last: {reason}"
            )
            logger.error("%s", self._failure)

    def _rate(self, generated: int) -> float:
        now = time.monotonic()
        self._samples.append((now, generated))
        while len(self._samples) > 2 and now - self._samples[0][0] > _RATE_SECONDS:
            self._samples.popleft()
        since, before = self._samples[0]
        return (generated - before) / (now - since) if now > since else 0.0

    def watch_phases(self, on_phase: Callable[[str], None]) -> None:
        """Whom to tell of each phase of a load; called from the thread that loads."""
        self._on_phase = on_phase

    def _tell(self, phase: str) -> None:
        self._phase = phase
        self._on_phase(phase)

    def _succeed(self, loaded: Loaded) -> None:
        self.adopt(loaded)
        if self._on_ready is not None:
            self._on_ready(loaded)

    def _fail(self, error: BaseException) -> None:
        self._failure = f"loading failed: {error}"
        if self._on_failure is not None:
            self._on_failure(error)  # it tells the user
        else:
            logger.error("loading failed", exc_info=error)
