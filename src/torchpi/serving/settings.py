"""Settings and limits of a server."""

import dataclasses
import hmac
import math
from typing import Literal

from torchpi.errors import ServingError, is_whole
from torchpi.randomness import checked_seed
from torchpi.samples import PickName, checked_pick

LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost")

MAX_NUM_STEPS = 100
"""Euler steps that a request may ask for; flow matching gains nothing beyond, and each delays every client."""


@dataclasses.dataclass(frozen=True)
class ServeSettings:
    """Settings and limits of a server; the options of `torchpi serve`."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 listens on every network of this machine."""
    port: int = 8000
    """Port to listen on; 0 picks a free one."""
    protocol: Literal["openpi", "vla-eval"] = "openpi"
    """openpi: openpi's protocol, for robots. vla-eval: the vla-evaluation-harness' protocol, for its benchmarks."""
    rename: tuple[str, ...] = ()
    """With --protocol vla-eval: pairs BENCHMARK_KEY=POLICY_KEY, for example images.agentview=observation/image.
    By default LIBERO's, for policies of LIBERO's robot."""
    token: str | None = None
    """Token that clients must send as "Authorization: Bearer TOKEN" or "Authorization: Api-Key TOKEN".
    By default the environment variable TORCHPI_TOKEN, if it is set; without a token, any client may connect."""
    num_steps: int | None = None
    """Euler steps for requests that do not set their number. By default the policy's number, usually 10."""
    num_samples: int | None = None
    """Chunks to sample per request. The answer has all of them and their spread; the prefix is computed once."""
    pick: PickName | None = None
    """Choice of the sample returned as "actions": consensus (default), the one nearest to the others;
    first, as without --num-samples; velocity_residual, the one with the straightest path from noise to actions."""
    seed: int = 0
    """Seed of the noise for requests that bring none."""
    max_batch: int = 8
    """Largest number of requests in one forward pass. Batching does not change the answers."""
    max_queue: int = 64
    """Largest number of requests that wait for the model."""
    deadline: float = 30.0
    """Seconds that a request may wait for the model. After that it is dropped, and its client receives an error."""
    max_connections: int = 64
    """Largest number of connected clients."""
    max_message_mb: float = 32.0
    """Largest size of a request in MiB."""
    max_memory_mb: float = 1024.0
    """Memory limit in MiB for the messages of all clients: unanswered requests, and each client's last one.
    The dashboard shows the last ones. Beyond the limit, the client that holds most is disconnected."""
    max_rate: float = 200.0
    """Largest number of requests per second from one client, averaged over a second."""
    grace: float = 10.0
    """Seconds after a stop signal in which requests received before it are still answered."""

    def __post_init__(self) -> None:
        counts = ("max_batch", "max_queue", "max_connections")
        for name in (*counts, "deadline", "max_message_mb", "max_memory_mb", "max_rate"):
            if not getattr(self, name) > 0:
                raise ServingError(f"{name} is {getattr(self, name)}; expected a positive number.")
        if not 4 * self.max_message_mb <= self.max_memory_mb < math.inf:
            raise ServingError(
                f"max_memory_mb is {self.max_memory_mb:g}; expected a finite number of at least "
                f"{4 * self.max_message_mb:g}: four times max_message_mb, for a message, its arrays, the next message "
                "and the dashboard's."
            )
        if self.num_steps is not None and not (is_whole(self.num_steps) and 1 <= self.num_steps <= MAX_NUM_STEPS):
            raise ServingError(f"num_steps is {self.num_steps}; expected 1 to {MAX_NUM_STEPS}, a whole number.")
        checked_pick(self.pick, self.num_samples, self.num_steps)
        if not 0 <= self.port < 2**16:
            raise ServingError(f"port is {self.port}; expected 0 to 65535.")
        if self.rename and self.protocol != "vla-eval":
            raise ServingError("rename needs --protocol vla-eval; openpi's clients send the policy's own keys.")
        if self.token is not None and self.protocol == "vla-eval":
            raise ServingError("vla-eval's client cannot send a token; leave --token out and TORCHPI_TOKEN unset.")
        if not self.grace >= 0:
            raise ServingError(f"grace is {self.grace}; expected 0 or more.")
        checked_seed(self.seed)
        if self.token is not None and not (self.token.isascii() and self.token.isprintable() and self.token.split()):
            raise ServingError("The token must consist of printable ASCII characters and not be empty.")

    def noise_shape(self, chunk_shape: tuple[int, int]) -> tuple[int, ...]:
        """Shape of a request's noise: [H, action_dim], or [R, H, action_dim] with `num_samples`."""
        return chunk_shape if self.num_samples is None else (self.num_samples, *chunk_shape)

    @property
    def max_message_bytes(self) -> int:
        return int(self.max_message_mb * 2**20)

    @property
    def local(self) -> bool:
        """True if only this machine can reach the server."""
        return self.host in LOCAL_HOSTS

    def admits(self, authorization: str | None) -> bool:
        """True if the value of an Authorization header holds the server's token, or none is needed."""
        if self.token is None:
            return True
        scheme, _, credentials = (authorization or "").partition(" ")
        # compare_digest takes constant time, so that the response time reveals nothing about the token.
        same = hmac.compare_digest(credentials.strip().encode(errors="surrogateescape"), self.token.strip().encode())
        return same and scheme.lower() in ("bearer", "api-key")


class RateLimit:
    """Token bucket: `rate` events per second, and up to `burst` at once (by default one second's worth)."""

    def __init__(self, rate: float, now: float, burst: float | None = None) -> None:
        self._rate, self._capacity = rate, max(burst or rate, 1.0)
        self._tokens, self._updated_at = self._capacity, now

    def allows(self, now: float) -> bool:
        """Count an event at `now` (seconds); False if it exceeds the rate."""
        self._tokens = min(self._capacity, self._tokens + (now - self._updated_at) * self._rate)
        self._updated_at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
