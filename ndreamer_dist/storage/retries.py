"""Make requests to object storage and web servers: timeouts, retries and error messages.

All waits follow from one timeout (`NDREAMER_STORAGE_TIMEOUT`, in seconds). A request is retried if no byte arrives
within the timeout, if the server refuses it temporarily (500, 503 and similar), or if the connection breaks. After the
fifth try, about five and a half timeouts after the first, a `StoreError` names the file and the reason. Errors that
waiting cannot mend, such as a lost permission, are raised at once.
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
"""Default timeout: seconds without a byte after which a request fails. A large shard on a slow line does not hit it."""
PAUSES = (1 / 128, 1 / 32, 1 / 8, 1 / 2)
"""Waits between tries as parts of the timeout: by default 0.5, 2, 8 and 30 seconds."""
CONNECT_SECONDS = 20.0
"""Longest wait for a connection."""
SLOWEST = 2**18
"""Slowest accepted upload in bytes per second. Uploads have a timeout in all, since a stalled one cannot be noticed."""
HURRY_SECONDS = 10.0
"""Timeout of requests inside `hurry`."""
AZURE = frozenset({"az", "abfs", "abfss"})
SERVED = AZURE | {"s3", "gs", "http", "https"}
"""Protocols of file systems that send requests to a server."""
ABSENT = (FileNotFoundError, NotADirectoryError)
"""Exceptions that mean that a file does not exist; they are answers and not failures."""
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses of temporary failures."""
BROKEN = frozenset(
    {
        "ConnectionError", "ClientConnectionError", "ClientPayloadError", "HTTPClientError", "IncompleteReadError",
        "ServiceRequestError", "ServiceResponseError",
    }
)  # fmt: skip
"""Class names of connection errors; names, because the package that defines a class need not be installed."""
UNREACHED = frozenset(
    {"ClientConnectorError", "EndpointConnectionError", "ConnectTimeoutError", "ConnectionTimeoutError"}
)
"""Class names of errors that also occur if the server does not exist."""
STRANGER_TRIES = 3
"""Tries to reach a server that has never answered this process, since its address may be wrong."""

T = TypeVar("T")
logger = logging.getLogger(__name__)
_in_a_hurry: ContextVar[bool] = ContextVar("in_a_hurry", default=False)
_heard_from: set[str] = set()  # servers and buckets that have answered this process


def time_limit() -> float:
    """Return the timeout: seconds without a byte after which a request fails.

    Raises
    ------
    SettingsError
        The environment variable is not a positive number.
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
    """Return the timeout in seconds of a whole upload of `size` bytes."""
    return short_limit() or time_limit() + size / SLOWEST


@contextmanager
def hurry() -> Iterator[None]:
    """Make the requests of this block only once and with a short timeout; for requests that may fail without harm."""
    token = _in_a_hurry.set(True)
    try:
        yield
    finally:
        _in_a_hurry.reset(token)


def short_limit() -> float | None:
    """Return the timeout in seconds of a whole request inside `hurry`; `None` outside."""
    return min(HURRY_SECONDS, time_limit()) if _in_a_hurry.get() else None


def options(url: str, *, own_tries: bool = False) -> dict[str, Any]:
    """Return fsspec's options for an address: timeouts, and no retries by the file system itself.

    Parameters
    ----------
    own_tries
        Keep the file system's own retries, for callers that use it directly, such as Ray Train.
    """
    limit = time_limit()
    connect, protocol = min(limit, CONNECT_SECONDS), url.partition("://")[0]
    silent = aiohttp.ClientTimeout(total=None, sock_connect=connect, sock_read=limit)
    if protocol in ("s3", "s3a"):
        config: dict[str, Any] = {"connect_timeout": connect, "read_timeout": limit}
        if not own_tries:
            config["retries"] = {"mode": "standard", "total_max_attempts": 1}
        # With a higher concurrency s3fs asks for the size of every object before it reads the whole object.
        s3_options = {"max_concurrency": 1, "config_kwargs": config | _configured(protocol, "config_kwargs")}
        return s3_options if _has_credentials(protocol) else s3_options | {"anon": True}
    if protocol in ("http", "https"):
        return {"client_kwargs": {"timeout": silent} | _configured(protocol, "client_kwargs")}
    # `without_own_retries` changes the instance that fsspec caches, so own retries need an instance of their own.
    apart = {"skip_instance_cache": True} if own_tries else {}
    if protocol in ("gs", "gcs"):
        return {"requests_timeout": silent} | apart
    if protocol in AZURE:
        return {"connection_timeout": connect, "read_timeout": limit} | apart
    return {}


def _has_credentials(protocol: str) -> bool:
    """Return whether there are credentials for S3; without them, buckets are read anonymously, as public ones allow."""
    configured = fsspec.config.conf.get(protocol, {}) | fsspec.config.conf.get("s3", {})
    if configured.keys() & {"key", "secret", "token", "anon", "profile", "client_kwargs"}:
        return True
    return _found_credentials(
        tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    )


@lru_cache(maxsize=4)
def _found_credentials(environment: tuple[tuple[str, str], ...]) -> bool:  # noqa: ARG001 - key of the cache
    try:
        import botocore.session
    except ImportError:  # the file system raises the error that names the missing package
        return True
    try:
        available = botocore.session.Session().get_credentials() is not None
    except Exception:  # noqa: BLE001 - such as a missing profile, which the file system explains better
        return True
    if not available:
        logger.info("no credentials for S3 found: buckets are read anonymously")
    return available


def _configured(protocol: str, option: str) -> dict[str, Any]:
    """Return an option that the user has set for fsspec in its configuration files or the environment."""
    return dict(fsspec.config.conf.get(protocol, {}).get(option, {}))


def without_own_retries(fs: fsspec.AbstractFileSystem) -> fsspec.AbstractFileSystem:
    """Disable the retries inside a file system made with `options`, which would multiply with those of this module."""
    protocols = set(_protocols(fs))
    if "s3" in protocols:
        fs.retries = 1
    elif "gs" in protocols:
        fs._request = partial(type(fs)._request.__wrapped__, fs)  # without its decorator that retries
    elif protocols & AZURE:
        # adlfs does not pass on the number of retries, and passes timeouts on only for reading and writing data.
        client, once = fs.service_client, {"retry_total": 0} | options("az://")
        fs.service_client = type(client)(client.url, credential=client.credential, **once)
    return fs


def _protocols(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _pauses(fs: fsspec.AbstractFileSystem) -> tuple[float, ...]:
    """Return the waits between tries in seconds; empty, hence no retry, inside `hurry` and for local files."""
    if _in_a_hurry.get() or not SERVED & set(_protocols(fs)):
        return ()
    limit = time_limit()
    return tuple(limit * pause for pause in PAUSES)


class Tries:
    """The failed tries of one request; decides whether and when to try again."""

    def __init__(self, fs: fsspec.AbstractFileSystem, what: str) -> None:
        self._server = "/".join(what.split("/", 3)[:3])  # the message begins with the address
        self._what, self._pauses, self._failed = what, _pauses(fs), 0

    def answered(self) -> None:
        """Record that the server exists."""
        _heard_from.add(self._server)

    def after(self, error: Exception) -> float:
        """Return the seconds to wait before the next try.

        Raises
        ------
        StoreError
            No further try is made: it would not help, or this was the last one.
        """
        self._failed += 1
        most = len(self._pauses) + 1
        if self._server not in _heard_from and _names(error) & UNREACHED:
            most = min(most, STRANGER_TRIES)
        if not may_pass(error) or self._failed >= most:
            times = f"; tried {self._failed} times" if self._failed > 1 else ""
            msg = f"{self._what} ({reason(error)}{times})"
            raise StoreError(msg) from error
        pause = self._pauses[self._failed - 1] * (0.5 + random.random() / 2)  # noqa: S311 - spreads retries in time
        level = logging.DEBUG if self._failed == 1 else logging.WARNING
        logger.log(level, "%s (%s); trying again in %.1f s", self._what, reason(error), pause)
        return pause


def with_retries(
    fs: fsspec.AbstractFileSystem, what: str, ask: Callable[[], T], absent: tuple[type[Exception], ...] = ABSENT
) -> T:
    """Make a request, and repeat it after temporary failures.

    Parameters
    ----------
    what
        Beginning of the error message: the file, and what cannot be done with it.
    ask
        Makes the request.
    absent
        Exceptions that are answers; they are raised unchanged.

    Raises
    ------
    StoreError
        All tries failed, or the failure is permanent.
    """
    tries = Tries(fs, what)
    while True:
        try:
            answer = ask()
        except StoreError:
            raise
        except Exception as error:
            if isinstance(error, absent) and _failure_behind(error) is error:
                tries.answered()
                raise
            pause = tries.after(_failure_behind(error))
        else:
            tries.answered()
            return answer
        time.sleep(pause)


async def with_retries_async(fs: fsspec.AbstractFileSystem, what: str, ask: Callable[[], Awaitable[T]]) -> T:
    """Do what `with_retries` does inside an event loop; every exception is a failure."""
    tries = Tries(fs, what)
    while True:
        try:
            answer = await asyncio.wait_for(ask(), short_limit())
        except StoreError:
            raise
        except Exception as error:  # noqa: BLE001 - every cloud has its own exceptions
            pause = tries.after(_failure_behind(error))
        else:
            tries.answered()
            return answer
        await asyncio.sleep(pause)


def _failure_behind(error: Exception) -> Exception:
    """Return the failure behind an error: some file systems report a failed request as a missing file."""
    cause = error.__cause__
    hidden = (
        isinstance(error, ABSENT) and isinstance(cause, Exception) and (may_pass(cause) or status(cause) in (401, 403))
    )
    return cause if hidden and isinstance(cause, Exception) else error


def may_pass(error: BaseException) -> bool:
    """Return whether an error is temporary, so that the same request may succeed later."""
    return isinstance(error, TimeoutError) or bool(_names(error) & BROKEN) or status(error) in PASSING


def _names(error: BaseException) -> set[str]:
    return {one.__name__ for one in type(error).__mro__}


def status(error: BaseException) -> int | None:
    """Return the HTTP status of an error or of its cause; `None` if there is none."""
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            code = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            code = next((getattr(one, name) for name in ("status", "status_code", "code") if hasattr(one, name)), None)
        if str(code).isdigit():
            return int(str(code))
    return None


def reason(error: BaseException) -> str:
    """Return the message of an error on one line, with its class; a timeout is put in words."""
    if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
        return f"no answer for {short_limit() or time_limit():g} s"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class RemoteStore(FsspecStore):
    """A zarr store on a server: requests are retried, and errors name the file."""

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
