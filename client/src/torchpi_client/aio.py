"""A policy behind a websocket, for asyncio."""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from typing import Any

from torchpi_client.client import WebsocketPolicy


class AsyncWebsocketPolicy:
    """`WebsocketPolicy` in a thread of its own, so that the event loop is free for the robot: neither packing nor
    encoding images holds it up. Use it as an asynchronous context, or `connect` and `close` it.

    Args:
        url: as of `WebsocketPolicy`.
        options: the other arguments of `WebsocketPolicy`.
    """

    def __init__(self, url: str, **options: Any) -> None:
        self.url = url
        self._options = options
        self._policy: WebsocketPolicy | None = None
        self._closed = False
        self._executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix=f"torchpi_client {url}")

    async def connect(self) -> AsyncWebsocketPolicy:
        """Connect and read the metadata; errors as of `WebsocketPolicy`."""
        connecting = self._executor.submit(WebsocketPolicy, self.url, **self._options)
        try:
            self._policy = await asyncio.wrap_future(connecting)
        except asyncio.CancelledError:
            connecting.add_done_callback(_close_result)  # the thread cannot be stopped
            raise
        return self

    @property
    def metadata(self) -> dict[str, Any]:
        """What the server says about its policy."""
        return self._connected().metadata

    @property
    def reconnects(self) -> int:
        """Connections that were made after the first."""
        return self._connected().reconnects

    async def infer(self, observation: dict[str, Any], *, timeout: float | None = None) -> dict[str, Any]:
        """Ask for actions; arguments, answer and errors as of `WebsocketPolicy.infer`. Requests of several tasks wait
        for each other, which their deadlines include."""
        policy = self._connected()
        if self._closed:
            raise ConnectionError(f"the connection to {self.url} is closed; make a new client")
        seconds = policy.answer_timeout if timeout is None else timeout
        deadline = None if seconds is None else time.monotonic() + seconds

        def ask() -> dict[str, Any]:
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            return policy.infer(observation, timeout=left)

        return await asyncio.get_running_loop().run_in_executor(self._executor, ask)

    async def close(self) -> None:
        """Close the connection; a second time does nothing. A request that is under way fails."""
        self._closed = True
        if self._policy is not None:
            # In another thread: this one's may be waiting for an answer.
            await asyncio.get_running_loop().run_in_executor(None, self._policy.close)
        self._executor.shutdown(wait=False)

    async def __aenter__(self) -> AsyncWebsocketPolicy:
        return await self.connect()

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    def _connected(self) -> WebsocketPolicy:
        if self._policy is None:
            raise ConnectionError(f"not connected to {self.url} yet; call connect() first")
        return self._policy


def _close_result(connecting: concurrent.futures.Future[WebsocketPolicy]) -> None:
    if not connecting.cancelled() and connecting.exception() is None:
        connecting.result().close()
