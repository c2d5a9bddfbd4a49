"""Make requests to object storage and web servers: timeouts, retries and error messages.

One number sets them all, the timeout (`NDREAMER_STORAGE_TIMEOUT`, in seconds). A request is retried if no byte arrives
for so long, if the server refuses it for the moment (500, 503 and the like), or if its connection breaks. After the fifth
try, some five and a half timeouts after the first, a `StoreError` names the file and the reason. Errors that waiting
cannot mend, such as a lost permission, are raised at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import Any, TypeVar

import aiohttp
import fsspec
from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.store import ByteRequest
from zarr.storage import FsspecStore

from ndreamer_dist.errors import SettingsError, StoreError

VARIABLE = "NDREAMER_STORAGE_TIMEOUT"
TIME_LIMIT = 60.0
"""Seconds without a byte after which a request fails; a large shard over a slow line sends some all the time."""
PAUSES = (1 / 128, 1 / 32, 1 / 8, 1 / 2)
"""Waits between one try and the next, in time limits: half a second, 2, 8 and 30."""
CONNECT_SECONDS = 20.0
"""Longest wait for a connection."""
SLOWEST = 2**18
"""Slowest upload in bytes a second: the whole of it has a timeout, since nothing tells that it stands still."""
HURRY_SECONDS = 10.0
"""Timeout of requests that the work does not depend on."""
AZURE = frozenset({"az", "abfs", "abfss"})
SERVED = AZURE | {"s3", "gs", "http", "https"}
"""Protocols of file systems that ask a server."""
ABSENT = (FileNotFoundError, NotADirectoryError)
"""What is raised where there is no such file, and no failure."""
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Answers of a server that may be others a moment later."""
BROKEN = frozenset(
    {
        "ConnectionError", "ClientConnectionError", "ClientPayloadError", "HTTPClientError", "IncompleteReadError",
        "ServiceRequestError", "ServiceResponseError",
    }
)  # fmt: skip
"""Errors of lines and not of files, by the names of their classes: the package of a cloud need not be installed."""
UNREACHED = frozenset(
    {"ClientConnectorError", "EndpointConnectionError", "ConnectTimeoutError", "ConnectionTimeoutError"}
)
"""Those among them of servers that may not exist."""
STRANGER_TRIES = 3
"""Tries to reach a server of which this process has heard nothing yet: its address may be wrong."""

T = TypeVar("T")
logger = logging.getLogger(__name__)
_in_a_hurry: ContextVar[bool] = ContextVar("in_a_hurry", default=False)
_heard_from: set[str] = set()  # servers that have answered, and buckets


def time_limit() -> float:
    """Return the seconds without a byte after which a request is given up.

    Raises
    ------
    SettingsError
        The environment says something that is no number of seconds.
    """
    text = os.environ.get(VARIABLE, "")
    try:
        limit = float(text) if text else TIME_LIMIT
    except ValueError:
        limit = -1.0
    if not 0 < limit < float("inf"):
        msg = f"{VARIABLE} is how many seconds a storage server may stay silent; expected a number above 0, found {text!r}"
        raise SettingsError(msg)
    return limit


def upload_limit(size: int) -> float:
    """Return the seconds that an upload may take in all."""
    return short_limit() or time_limit() + size / SLOWEST


@contextmanager
def hurry() -> Iterator[None]:
    """Make requests of this block once and with a short timeout: the work does not depend on them."""
    token = _in_a_hurry.set(True)
    try:
        yield
    finally:
        _in_a_hurry.reset(token)


def short_limit() -> float | None:
    """Return the seconds that any request may take inside `hurry`; none outside."""
    return min(HURRY_SECONDS, time_limit()) if _in_a_hurry.get() else None


def options(url: str, *, own_tries: bool = False) -> dict[str, Any]:
    """Return the options of the file system of an address: timeouts, and no retries of its own.

    Parameters
    ----------
    own_tries
        Keep the file system's own retries, for callers that use it directly, as Ray Train does.
    """
    limit = time_limit()
    connect, protocol = min(limit, CONNECT_SECONDS), url.partition("://")[0]
    silent = aiohttp.ClientTimeout(total=None, sock_connect=connect, sock_read=limit)
    if protocol in ("s3", "s3a"):
        config: dict[str, Any] = {"connect_timeout": connect, "read_timeout": limit}
        if not own_tries:
            config["retries"] = {"mode": "standard", "total_max_attempts": 1}
        # At more than one it would ask for the size of every object before it reads it whole.
        asked = {"max_concurrency": 1, "config_kwargs": config | _configured(protocol, "config_kwargs")}
        return asked if _has_credentials(protocol) else asked | {"anon": True}
    if protocol in ("http", "https"):
        return {"client_kwargs": {"timeout": silent} | _configured(protocol, "client_kwargs")}
    # `without_own_retries` changes a file system, so that whoever wants its own tries needs another than the one that fsspec keeps.
    apart = {"skip_instance_cache": True} if own_tries else {}
    if protocol in ("gs", "gcs"):
        return {"requests_timeout": silent} | apart
    if protocol in AZURE:
        return {"connection_timeout": connect, "read_timeout": limit} | apart
    return {}


def _has_credentials(protocol: str) -> bool:
    """Return whether S3 would be asked as somebody: without credentials a public bucket is still to be read."""
    configured = fsspec.config.conf.get(protocol, {}) | fsspec.config.conf.get("s3", {})
    if configured.keys() & {"key", "secret", "token", "anon", "profile", "client_kwargs"}:
        return True
    return _found_credentials(
        tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    )


@lru_cache(maxsize=4)
def _found_credentials(environment: tuple[tuple[str, str], ...]) -> bool:  # noqa: ARG001 - what they depend on
    try:
        import botocore.session
    except ImportError:  # the file system will say what is missing
        return True
    try:
        known = botocore.session.Session().get_credentials() is not None
    except Exception:  # noqa: BLE001 - a profile that is not there, say: the file system says it better
        return True
    if not known:
        logger.info("there are no credentials for S3: buckets are asked anonymously, as public ones allow")
    return known


def _configured(protocol: str, option: str) -> dict[str, Any]:
    """Return an option that the user has set for fsspec, by its files or the environment."""
    return dict(fsspec.config.conf.get(protocol, {}).get(option, {}))


def without_own_retries(fs: fsspec.AbstractFileSystem) -> fsspec.AbstractFileSystem:
    """Switch off the own retries of a file system made with `options`, so that ours do not multiply with them."""
    protocols = set(_protocols(fs))
    if "s3" in protocols:
        fs.retries = 1
    elif "gs" in protocols:
        fs._request = partial(type(fs)._request.__wrapped__, fs)  # without the decorator that tries again
    elif protocols & AZURE:
        # adlfs does not pass retries on, and passes timeouts on for reads and writes of data alone.
        client, once = fs.service_client, {"retry_total": 0} | options("az://")
        fs.service_client = type(client)(client.url, credential=client.credential, **once)
    return fs


def _protocols(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _pauses(fs: fsspec.AbstractFileSystem) -> tuple[float, ...]:
    """Return the waits between tries, in seconds; none in a hurry, nor where there is no server."""
    if _in_a_hurry.get() or not SERVED & set(_protocols(fs)):
        return ()
    limit = time_limit()
    return tuple(limit * pause for pause in PAUSES)


class Tries:
    """The attempts of one request so far."""

    def __init__(self, fs: fsspec.AbstractFileSystem, what: str) -> None:
        self._server = "/".join(what.split("/", 3)[:3])  # the address begins what is said
        self._what, self._pauses, self._failed = what, _pauses(fs), 0

    def answered(self) -> None:
        """Note that the server is there."""
        _heard_from.add(self._server)

    def after(self, error: Exception) -> float:
        """Return how many seconds to wait before the next try.

        Raises
        ------
        StoreError
            There is to be none: it would not help, or there have been enough.
        """
        self._failed += 1
        most = len(self._pauses) + 1
        if self._server not in _heard_from and _names(error) & UNREACHED:
            most = min(most, STRANGER_TRIES)
        if not may_pass(error) or self._failed >= most:
            times = f"; tried {self._failed} times" if self._failed > 1 else ""
            msg = f"{self._what} ({reason(error)}{times})"
            raise StoreError(msg) from error
        pause = self._pauses[self._failed - 1] * (0.5 + random.random() / 2)  # noqa: S311 - that not all come at once
        level = logging.DEBUG if self._failed == 1 else logging.WARNING
        logger.log(level, "%s (%s); trying again in %.1f s", self._what, reason(error), pause)
        return pause


def with_retries(
    fs: fsspec.AbstractFileSystem, what: str, ask: Callable[[], T], absent: tuple[type[Exception], ...] = ABSENT
) -> T:
    """Make a request, and retry it while that may help.

    Parameters
    ----------
    what
        Begins the error's text: the file, and what cannot be done with it.
    absent
        Errors that are answers, and are raised as they are.

    Raises
    ------
    StoreError
        There is no answer, or one that waiting does not mend.
    """
    tries = Tries(fs, what)
    while True:
        try:
            answer = ask()
        except StoreError:
            raise
        except Exception as error:
            if isinstance(error, absent) and _told(error) is error:
                tries.answered()
                raise
            pause = tries.after(_told(error))
        else:
            tries.answered()
            return answer
        time.sleep(pause)


async def with_retries_async(fs: fsspec.AbstractFileSystem, what: str, ask: Callable[[], Awaitable[T]]) -> T:
    """Do what `with_retries` does, inside an event loop; no error is an answer."""
    tries = Tries(fs, what)
    while True:
        try:
            answer = await asyncio.wait_for(ask(), short_limit())
        except StoreError:
            raise
        except Exception as error:  # noqa: BLE001 - each cloud has its own
            pause = tries.after(_told(error))
        else:
            tries.answered()
            return answer
        await asyncio.sleep(pause)


def _told(error: Exception) -> Exception:
    """Return the failure that some file systems take for an absent file."""
    cause = error.__cause__
    hidden = (
        isinstance(error, ABSENT) and isinstance(cause, Exception) and (may_pass(cause) or status(cause) in (401, 403))
    )
    return cause if hidden and isinstance(cause, Exception) else error


def may_pass(error: BaseException) -> bool:
    """Return whether the same request may be answered a moment later."""
    return isinstance(error, TimeoutError) or bool(_names(error) & BROKEN) or status(error) in PASSING


def _names(error: BaseException) -> set[str]:
    return {one.__name__ for one in type(error).__mro__}


def status(error: BaseException) -> int | None:
    """Return the HTTP status behind an error, if there is one."""
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            told = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            told = next((getattr(one, name) for name in ("status", "status_code", "code") if hasattr(one, name)), None)
        if str(told).isdigit():
            return int(str(told))
    return None


def reason(error: BaseException) -> str:
    """Return what an error says, on one line."""
    if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
        return f"no answer for {short_limit() or time_limit():g} s"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class RemoteStore(FsspecStore):
    """A zarr store on a server, with retries; its errors name the file."""

    def _what(self, key: str, cannot: str) -> str:
        return f"{self.fs.unstrip_protocol(f'{self.path}/{key}'.rstrip('/'))} cannot be {cannot}"

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """See zarr's `Store.get`."""
        get = super().get
        return await with_retries_async(self.fs, self._what(key, "read"), lambda: get(key, prototype, byte_range))

    async def set(self, key: str, value: Buffer, byte_range: tuple[int, int] | None = None) -> None:
        """See zarr's `Store.set`."""
        put = super().set

        async def ask() -> None:
            await asyncio.wait_for(put(key, value, byte_range), upload_limit(len(value)))

        await with_retries_async(self.fs, self._what(key, "written"), ask)

    async def delete(self, key: str) -> None:
        """See zarr's `Store.delete`."""
        delete = super().delete
        await with_retries_async(self.fs, self._what(key, "deleted"), lambda: delete(key))

    async def exists(self, key: str) -> bool:
        """See zarr's `Store.exists`."""
        exists = super().exists
        return await with_retries_async(self.fs, self._what(key, "looked for"), lambda: exists(key))

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """See zarr's `Store.list_prefix`."""
        for name in await self._listed(super().list_prefix, prefix):
            yield name

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """See zarr's `Store.list_dir`."""
        for name in await self._listed(super().list_dir, prefix):
            yield name

    async def _listed(self, names: Callable[[str], AsyncIterator[str]], prefix: str) -> list[str]:
        async def ask() -> list[str]:
            return [name async for name in names(prefix)]

        return await with_retries_async(self.fs, self._what(prefix, "listed"), ask)
