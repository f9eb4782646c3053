"""Sleep frees the device's memory, wake takes it again.

Level 1 frees the KV blocks and moves the weights to the host (on a CPU they are there). Level 2 ends
the engine's process; waking is another start.
"""

import asyncio
import logging
import time

from halyard.api.errors import BusyError
from halyard.api.host import EngineHost
from halyard.api.schemas.admin import Asleep, Awake, SleepRequest
from halyard.hal.errors import HalyardError, RequestError
from halyard.runtime.process_port import ProcessPort

__all__ = ["put_to_sleep", "wake_up"]

logger = logging.getLogger("halyard.api")

ASLEEP = "asleep: POST /admin/wake wakes it"


async def put_to_sleep(host: EngineHost, asked: SleepRequest) -> Asleep:
    """Free memory. Requests that still run after the grace period end with an error.

    Raises:
        BusyError: it doesn't serve now.
        RequestError: the engine runs in the server's process.
    """
    if host.asleep is not None:
        raise BusyError("it sleeps already: wake it first")
    loaded = host.loaded
    if loaded is None or not host.readiness().ready:
        raise BusyError(f"nothing to put to sleep: {host.readiness().reason}")
    port = loaded.client.port
    if not isinstance(port, ProcessPort):
        raise RequestError("the engine of this server runs in its process: it can't sleep")
    with host.exchanging():
        host.pause("asleep", ASLEEP)
        host.asleep = asked.level
        deadline = time.monotonic() + asked.grace_seconds
        while loaded.client.num_requests and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        loaded.client.give_up("the server goes to sleep")
        try:
            if host.asleep == 1:  # else it has died meanwhile
                await port.call("sleep")
        except HalyardError:
            host.asleep = 2  # the engine is dead; waking starts another
        if host.asleep != 1:
            await loaded.client.close()
        host.wakes_on_request = asked.wake_on_request
        if host.wakes_on_request:
            _listen(host)
    return Asleep(host.asleep)


async def wake_up(host: EngineHost) -> Awake:
    """Serve again.

    Raises:
        BusyError: it doesn't sleep, or somebody wakes it already.
        HalyardError: there is no memory, or the engine could not be started.
    """
    started = time.monotonic()
    loaded = host.loaded
    if host.asleep is None or loaded is None:
        raise BusyError("it does not sleep")
    with host.exchanging():
        try:
            port = loaded.client.port
            if host.asleep == 1 and isinstance(port, ProcessPort):
                await port.call("wake")
                host.resume()
            else:
                host.adopt(await host.load())
            host.asleep = None
        finally:
            host.gate.on_knock = lambda: None
            host.gate.open()
            if host.asleep is not None and host.wakes_on_request:
                _listen(host)  # those that waited are told why; the next one tries again
    return Awake(time.monotonic() - started)


def _listen(host: EngineHost) -> None:
    host.gate.close()
    host.gate.on_knock = lambda: _knocked(host)


def _knocked(host: EngineHost) -> None:
    async def wake() -> None:
        try:
            await wake_up(host)
        except HalyardError as error:
            logger.error("a request could not wake the engine: %s", error)

    host.gate.on_knock = lambda: None
    host.spawn(wake())
