"""A reverse proxy that makes an API server as bad as one can be without being wrong for ever.

It speaks plain HTTP to the operator and the administrator's TLS to the API server. What it does to a call is
drawn from a seeded generator; the draws follow the order in which calls arrive, so a seed repeats a mix of
faults and not their exact moments.

    write   refused (409, 429, 500), carried out with its answer lost, slow
    read    refused (429, 500), slow; a listing also answered with what was true up to `STALE_SECONDS` ago
    watch   refused (429, 500), expired (410), cut within a line, late, or silent until it is cut
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
import time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp
from aiohttp import web

STALE_SECONDS = 20.0  # longer than from one listing of the operator to the next
KEPT_ANSWERS = 8  # of each read, for stale answers
SLOW_SECONDS = 0.4
VERY_SLOW_SECONDS = 3.0
WATCH_SECONDS = 6.0  # mean life of a watch
LATE_SECONDS = 1.5
_HOP_BY_HOP = frozenset({"connection", "content-length", "host", "keep-alive", "transfer-encoding"})
_CUT_LINE = b'{"type":"MODIFIED","object":{"apiVersion":"tidegate.dev/v1al'


@dataclass(frozen=True, slots=True)
class Faults:
    """How likely each fault is, of one call or watch."""

    write: Mapping[str, float]
    read: Mapping[str, float]
    watch: Mapping[str, float]
    slow: float
    very_slow: float


NONE = Faults({}, {}, {}, 0.0, 0.0)
MANY = Faults(
    write={"409": 0.08, "429": 0.05, "500": 0.05, "lost": 0.05},
    read={"429": 0.06, "500": 0.06, "stale": 0.30},
    watch={"429": 0.08, "500": 0.08, "410": 0.10, "late": 0.25, "silent": 0.10},
    slow=0.25,
    very_slow=0.02,
)

_REASONS = {409: "Conflict", 410: "Expired", 429: "TooManyRequests", 500: "InternalError"}


@dataclass(frozen=True, slots=True)
class _Answer:
    at: float
    status: int
    body: bytes

    def response(self) -> web.Response:
        return web.Response(status=self.status, body=self.body, content_type="application/json")


class FaultProxy:
    """Use `fault_proxy`. `injected` counts what was done, by kind of call and fault."""

    def __init__(self, upstream: str, session: aiohttp.ClientSession) -> None:
        self._upstream = upstream
        self._session = session
        self._answers: dict[str, deque[_Answer]] = defaultdict(lambda: deque(maxlen=KEPT_ANSWERS))
        self._faults = NONE
        self._random = random.Random()
        self.injected: Counter[str] = Counter()
        self.calls = 0
        self.url = ""

    def break_down(self, faults: Faults, seed: int) -> None:
        self._faults = faults
        self._random = random.Random(seed)
        self.injected.clear()
        self.calls = 0

    def mend(self) -> None:
        """No further faults; watches that are late or silent are so until they end."""
        self._faults = NONE

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.calls += 1
        if request.query.get("watch", "") in ("1", "true"):
            return await self._watch(request)
        is_read = request.method == "GET"
        await self._wait()
        fault = self._drawn("read" if is_read else "write")
        if fault.isdecimal():
            return _refusal(int(fault))
        asked = request.path_qs + request.headers.get("Accept", "")
        if fault == "stale" and _is_listing(request) and (old := self._old_answer(asked)) is not None:
            self.injected["read stale"] += 1
            return old.response()
        found = await self._forward(request)
        if fault == "lost":
            _cut(request)
        if is_read and found.status == 200:
            self._answers[asked].append(found)
        return found.response()

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        fault = self._drawn("watch")
        if fault in ("429", "500"):
            return _refusal(int(fault))
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        if fault == "410":
            await response.prepare(request)
            await response.write(b'{"type":"ERROR","object":' + _status(410) + b"}\n")
            return response
        is_mended = self._faults is NONE
        life = None if is_mended else self._random.expovariate(1 / WATCH_SECONDS)
        late = self._random.uniform(0, LATE_SECONDS) if fault == "late" else 0.0
        timeout = aiohttp.ClientTimeout(total=None)
        async with self._session.get(
            self._upstream + request.path_qs, headers=_headers(request), timeout=timeout
        ) as upstream:
            response.set_status(upstream.status)
            await response.prepare(request)
            try:
                async with asyncio.timeout(life):
                    async for chunk in upstream.content.iter_any():
                        if fault == "silent":
                            continue
                        await asyncio.sleep(late)
                        await response.write(chunk)
            except TimeoutError:
                self.injected["watch cut"] += 1
                await response.write(_CUT_LINE)
                _cut(request)
        return response

    async def _forward(self, request: web.Request) -> _Answer:
        body = await request.read()
        async with self._session.request(
            request.method, self._upstream + request.path_qs, headers=_headers(request), data=body or None
        ) as answer:
            return _Answer(time.monotonic(), answer.status, await answer.read())

    def _old_answer(self, asked: str) -> _Answer | None:
        oldest_at = time.monotonic() - STALE_SECONDS
        recent = [answer for answer in self._answers[asked] if answer.at >= oldest_at]
        return self._random.choice(recent) if recent else None

    async def _wait(self) -> None:
        drawn = self._random.random()
        if drawn < self._faults.very_slow:
            self.injected["very slow"] += 1
            await asyncio.sleep(VERY_SLOW_SECONDS)
        elif drawn < self._faults.very_slow + self._faults.slow:
            self.injected["slow"] += 1
            await asyncio.sleep(self._random.uniform(0, SLOW_SECONDS))

    def _drawn(self, call: str) -> str:
        """The fault that befalls a call of this kind; empty: none."""
        odds: Mapping[str, float] = getattr(self._faults, call)
        drawn = self._random.random()
        for fault, likelihood in odds.items():
            if drawn < likelihood:
                if fault != "stale":  # counted where there is an old answer to give
                    self.injected[f"{call} {fault}"] += 1
                return fault
            drawn -= likelihood
        return ""


@asynccontextmanager
async def fault_proxy(upstream: str, tls: ssl.SSLContext) -> AsyncIterator[FaultProxy]:
    """`upstream` is the API server's URL, `tls` knows its authority and the caller's certificate."""
    connector = aiohttp.TCPConnector(ssl=tls, limit=0)
    async with aiohttp.ClientSession(connector=connector, auto_decompress=True) as session:
        proxy = FaultProxy(upstream, session)
        app = web.Application(client_max_size=1 << 26)
        app.router.add_route("*", "/{path:.*}", proxy.answer)
        # A watch whose reader went away must not stay open here.
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            proxy.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            yield proxy
        finally:
            await runner.cleanup()


def _is_listing(request: web.Request) -> bool:
    """Only what comes from an API server's cache can be old; a Lease that is asked for by name is not."""
    return "/leases/" not in request.path


def _headers(request: web.Request) -> dict[str, str]:
    return {name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP}


def _refusal(status: int) -> web.Response:
    headers = {"Retry-After": "1"} if status == 429 else {}
    return web.Response(status=status, body=_status(status), content_type="application/json", headers=headers)


def _status(code: int) -> bytes:
    return (
        f'{{"kind":"Status","apiVersion":"v1","metadata":{{}},"status":"Failure","code":{code},'
        f'"reason":"{_REASONS[code]}","message":"injected by the fault proxy"}}'
    ).encode()


def _cut(request: web.Request) -> None:
    """End the connection as a lost one ends: without the end of the answer."""
    if request.transport is not None:
        with contextlib.suppress(OSError):
            request.transport.abort()
