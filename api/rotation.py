"""Another checkpoint takes over: loaded beside the old one, or in its place, and no request is dropped.

Beside: a second engine process loads while the first one serves; new requests then go to it, the old
one finishes what it has and ends. In place: new requests are held at the gate, running ones end, the
old engine makes room, the new one loads, the held ones go on.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Mapping
from pathlib import Path

from halyard.api.errors import BusyError
from halyard.api.host import EngineHost, Loaded
from halyard.api.loading import ServedModel
from halyard.api.schemas.admin import Reloaded, ReloadRequest
from halyard.hal.cpuinfo import memory_available
from halyard.hal.errors import CapacityError, HalyardError, ModelError, RequestError
from halyard.models.headers import check_checkpoint
from halyard.models.manifest import MANIFEST, verify
from halyard.models.source import ModelSource, resolve_source
from halyard.runtime.config import EngineConfig

__all__ = ["check_digests", "reload_model"]

logger = logging.getLogger("halyard.api")

_SPARE = 512 << 20  # bytes beside the weights that a second engine is thought to need
_CHUNK = 1 << 20


async def reload_model(host: EngineHost, asked: ReloadRequest) -> Reloaded:
    """Exchange the model. On any error the one before goes on.

    Raises:
        BusyError: another exchange is under way.
        ModelError: the checkpoint is not there, damaged, or not the one that the digests tell of.
        HalyardError: it can't be served here.
    """
    loader = host.loader
    if not isinstance(loader, ServedModel) or loader.in_process:
        raise RequestError("the engine of this server runs in its process: restart the server")
    before = host.loaded
    if before is None or not host.readiness().ready:
        raise BusyError(f"nothing to exchange now: {host.readiness().reason}")

    async def work() -> Reloaded:
        with host.exchanging():
            try:
                return await _exchange(host, loader, before, asked)
            except HalyardError as error:
                logger.warning("%s was not loaded: %s", asked.model or "the model", error)
                raise

    # Shielded: whoever asked may hang up, the exchange still comes to its end.
    return await asyncio.shield(asyncio.ensure_future(work()))


async def _exchange(
    host: EngineHost, loader: ServedModel, before: Loaded, asked: ReloadRequest
) -> Reloaded:
    started = time.monotonic()
    model = asked.model if asked.model is not None else loader.config.model
    revision = asked.revision if asked.model is not None else loader.config.revision
    target = loader.with_model(model, revision, asked.manifest_digest)
    try:
        source = await asyncio.to_thread(_checked, target.config, asked.digests)
        in_place = asked.mode == "in_place" or (
            asked.mode == "auto" and not await asyncio.to_thread(_fits_beside, before, source)
        )
        if in_place:  # now: the new engine looks for itself when the old one has gone
            await asyncio.to_thread(_verify, target.config, source)
    except ModelError:
        host.observe_load_failure()
        raise
    if host.loaded is not before or not host.readiness().ready:
        raise BusyError(f"the engine failed meanwhile: {host.readiness().reason}")
    if not in_place:
        try:
            loaded = await host.load(target)
        except CapacityError:
            if asked.mode == "beside":
                raise
            in_place = True
        else:
            host.adopt(loaded, target)
    if in_place:
        loaded = await _in_place(host, loader, target, host.loaded or before)
    logger.warning("%s took over from %s", loaded.client.fingerprint, before.client.fingerprint)
    return Reloaded(
        loaded.client.fingerprint,
        before.client.fingerprint,
        "in_place" if in_place else "beside",
        time.monotonic() - started,
    )


async def _in_place(
    host: EngineHost, loader: ServedModel, target: ServedModel, before: Loaded
) -> Loaded:
    host.gate.close()
    host.let_go(before)
    try:
        await host.gate.drained()
        while before.client.num_requests and before.client.alive:
            await asyncio.sleep(0.02)
        host.pause("restarting", "another model is being loaded")
        await before.client.close()
        try:
            loaded = await host.load(target)
        except Exception:
            try:
                host.adopt(await host.load(loader))  # as it was
            except Exception as error:  # noqa: BLE001  # told by /ready and the log, and tried again
                host.revive(f"loading failed: {error}")
            raise
        host.adopt(loaded, target)
        return loaded
    finally:
        host.gate.open()


def _checked(config: EngineConfig, digests: Mapping[str, str]) -> ModelSource:
    """The checkpoint, if it is there and whole, and its files are those that were asked for."""
    source = resolve_source(config.model, config.revision, config.mirror)
    check_digests(source, digests)
    if config.load_format != "dummy":
        check_checkpoint(source)
    return source


def _verify(config: EngineConfig, source: ModelSource) -> None:
    if config.require_verified or (source.path / MANIFEST).exists():
        verify(source.path, manifest_digest=config.manifest_digest)


def _fits_beside(before: Loaded, source: ModelSource) -> bool:
    """On a CPU by memory that is free. Elsewhere the old engine's KV blocks take what there is."""
    if before.client.port.facts.provenance["backend"]["device"] != "cpu":
        return False
    weights = sum(file.stat().st_size for file in source.path.glob("*.safetensors"))
    return 2 * weights + _SPARE < memory_available()


def check_digests(source: ModelSource, digests: Mapping[str, str]) -> None:
    """Compare whole files.

    Raises:
        ModelError: a file is missing or another; the text has both digests.
    """
    for name, wanted in digests.items():
        path = source.path / name
        if Path(name).name != name or not path.is_file():
            raise ModelError(f"{source.name} has no file {name!r}, but a digest for it was given")
        hasher = hashlib.sha256()
        with path.open("rb") as file:
            for chunk in iter(lambda: file.read(_CHUNK), b""):
                hasher.update(chunk)
        found = f"sha256:{hasher.hexdigest()}"
        if found != f"sha256:{wanted.removeprefix('sha256:').lower()}":
            raise ModelError(f"{name} of {source.name} is {found}, but {wanted} was asked for")
