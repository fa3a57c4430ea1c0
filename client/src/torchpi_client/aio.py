"""The client of a policy server for asyncio."""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from typing import Any, Callable, TypeVar

from torchpi_client.client import Interrupt, WebsocketPolicy, closed_error, no_answer_error

_T = TypeVar("_T")


class AsyncWebsocketPolicy:
    """`WebsocketPolicy` for asyncio, in a separate thread: packing and encoding images do not block the event loop.

    Use it as an asynchronous context manager, or call `connect` and `close`.

    Args:
        url: as in `WebsocketPolicy`.
        options: the other arguments of `WebsocketPolicy`.
    """

    def __init__(self, url: str, **options: Any) -> None:
        self.url = url
        self._options = options
        self._policy: WebsocketPolicy | None = None
        self._request_lock: asyncio.Lock | None = None
        self._active: set[Interrupt] = set()
        self._closed = False
        self._executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix=f"torchpi_client {url}")

    async def connect(self) -> AsyncWebsocketPolicy:
        """Connect and read the metadata; errors as in `WebsocketPolicy`."""
        self._check_open()
        self._request_lock = asyncio.Lock()  # here, because before Python 3.10 it is bound to the running loop
        policy = await self._in_thread(
            lambda interrupt: WebsocketPolicy(self.url, interrupt=interrupt, **self._options)
        )
        if self._closed:
            policy.close()
            self._check_open()
        self._policy = policy
        return self

    @property
    def metadata(self) -> dict[str, Any]:
        """The server's metadata of its policy."""
        return self._connected().metadata

    @property
    def reconnects(self) -> int:
        """Number of reconnections."""
        return self._connected().reconnects

    async def infer(self, observation: dict[str, Any], *, timeout: float | None = None) -> dict[str, Any]:
        """Infer actions, with arguments, answer and errors of `WebsocketPolicy.infer`.

        Requests of several tasks run one after another, and their deadlines include that wait.
        """
        policy = self._connected()
        self._check_open()
        assert self._request_lock is not None
        seconds = policy.answer_timeout if timeout is None else timeout
        deadline = None if seconds is None else time.monotonic() + seconds

        def infer(interrupt: Interrupt) -> dict[str, Any]:
            remaining = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            return policy.infer(observation, timeout=remaining, interrupt=interrupt)

        try:
            await asyncio.wait_for(self._request_lock.acquire(), seconds)
        except asyncio.TimeoutError:
            raise no_answer_error(self.url, seconds) from None
        try:
            return await self._in_thread(infer)
        except TimeoutError as error:
            raise no_answer_error(self.url, seconds) from error
        finally:
            self._request_lock.release()

    async def close(self) -> None:
        """Close the connection, if it is open. A request in progress fails."""
        self._closed = True
        for interrupt in self._active:
            interrupt.set()
        if self._policy is not None:
            # In another thread, because the client's thread may be waiting for an answer.
            await asyncio.get_running_loop().run_in_executor(None, self._policy.close)
        self._executor.shutdown(wait=False)

    async def _in_thread(self, call: Callable[[Interrupt], _T]) -> _T:
        """Run `call` in the client's thread. Cancelling this coroutine also ends the call."""
        interrupt = Interrupt()
        self._active.add(interrupt)
        try:
            return await asyncio.wrap_future(self._executor.submit(call, interrupt))
        except asyncio.CancelledError:
            interrupt.set()
            raise
        except ConnectionError:
            self._check_open()
            raise
        finally:
            self._active.discard(interrupt)

    async def __aenter__(self) -> AsyncWebsocketPolicy:
        return await self.connect()

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    def _connected(self) -> WebsocketPolicy:
        if self._policy is None:
            raise ConnectionError(f"Not connected to {self.url} yet; call connect() first.")
        return self._policy

    def _check_open(self) -> None:
        if self._closed:
            raise closed_error(self.url)
