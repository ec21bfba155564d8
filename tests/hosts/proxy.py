"""A proxy before an S3 server that can be away, and loses or delays some of the requests.

Owns the faults, drawn from a seed in the order of requests. It answers on an address of its own, in
a thread of this process. Knows nothing of what is asked.
"""

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Coroutine
from typing import Any

from aiohttp import ClientSession, ClientTimeout, TCPConnector, web
from yarl import URL

FAILURES = ("500", "503", "reset before", "reset after")
"""What becomes of a failing request; with the last, only its answer is lost."""
SLOW_S = 5.0
HOP_BY_HOP = ("connection", "keep-alive", "transfer-encoding", "expect")
REFUSAL = (
    '<?xml version="1.0" encoding="UTF-8"?>'
    "<Error><Code>{code}</Code><Message>drawn by lot</Message></Error>"
)
CODES = {"500": "InternalError", "503": "SlowDown"}


class Proxy:
    """Before the server at `target`, on `host`."""

    def __init__(self, target: str, host: str) -> None:
        self.target, self.host = target, host
        self.endpoint = ""
        self.seen: Counter[str] = Counter()
        """Requests, by what became of them."""
        self._rate = 0.0
        self._random = random.Random(0)
        self._is_away, self._num_refused = False, 0
        self._port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._wait(self._open())

    def close(self) -> None:
        self._wait(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def disturb(self, rate: float, seed: int = 0) -> None:
        """From now on this share of requests fails, and as many are slow; 0 ends it."""
        self._random, self._rate = random.Random(seed), rate
        self.seen.clear()

    def refuse(self, count: int) -> None:
        """Answer the next so many requests as a busy server does."""
        self._num_refused = count

    def go_away(self) -> None:
        """Refuse new connections, and end those there are at their next request."""
        self._is_away = True
        self._wait(self._site.stop())

    def come_back(self) -> None:
        self._is_away = False
        self._wait(self._listen())

    def _wait(self, task: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(task, self._loop).result(30)

    async def _open(self) -> None:
        # Bodies as they are: what is compressed stays so.
        connector = TCPConnector(limit=0)
        self._client = ClientSession(
            connector=connector, auto_decompress=False, timeout=ClientTimeout(total=None)
        )
        app = web.Application(client_max_size=0)  # of any size
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await self._listen()

    async def _listen(self) -> None:
        self._site = web.TCPSite(self._runner, self.host, self._port, reuse_address=True)
        await self._site.start()
        if not self._port:
            [self._port] = [address[1] for address in self._runner.addresses]
            self.endpoint = f"http://{self.host}:{self._port}"

    async def _close(self) -> None:
        await self._runner.cleanup()
        await self._client.close()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        fate = self._draw()
        self.seen[fate] += 1
        if fate in ("away", "reset before"):
            return _reset(request)
        if fate in CODES:
            text = REFUSAL.format(code=CODES[fate])
            return web.Response(status=int(fate), text=text, content_type="application/xml")
        if fate == "slow":
            await asyncio.sleep(SLOW_S)
        answer = await self._ask(request)
        return _reset(request) if fate == "reset after" else answer

    def _draw(self) -> str:
        if self._is_away:
            return "away"
        if self._num_refused:
            self._num_refused -= 1
            return "503"
        number = self._random.random()
        if number < self._rate:
            return self._random.choice(FAILURES)
        return "slow" if number < 2 * self._rate else "passed"

    async def _ask(self, request: web.Request) -> web.Response:
        body = await request.read()
        headers = [(k, v) for k, v in request.headers.items() if k.lower() not in HOP_BY_HOP]
        url = URL(f"{self.target}{request.raw_path}", encoded=True)
        asked = self._client.request(
            request.method, url, headers=headers, data=body, allow_redirects=False
        )
        async with asked as answer:
            told = [(k, v) for k, v in answer.headers.items() if k.lower() not in HOP_BY_HOP]
            return web.Response(status=answer.status, headers=told, body=await answer.read())


def _reset(request: web.Request) -> web.Response:
    """End the connection without an answer."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response()
