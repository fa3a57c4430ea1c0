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
    """Address to listen at; 0.0.0.0: on every network of this machine."""
    port: int = 8000
    """0: a free one."""
    protocol: Literal["openpi", "vla-eval"] = "openpi"
    """openpi's, for robots; vla-eval: the vla-evaluation-harness', for its benchmarks."""
    rename: tuple[str, ...] = ()
    """With --protocol vla-eval: the benchmark's keys and the policy's, for example images.agentview=observation/image;
    by default LIBERO's, for policies of its robot."""
    token: str | None = None
    """Token that clients must send as Authorization: Bearer TOKEN, or Api-Key TOKEN; by default TORCHPI_TOKEN of the
    environment, or else none is needed."""
    num_steps: int | None = None
    """Euler steps of a request that does not state them; by default the policy's, which are 10 unless it says
    otherwise."""
    num_samples: int | None = None
    """Chunks that are sampled for each request; the answer has all of them and their spread. They share the work on the
    images and the prompt."""
    pick: PickName | None = None
    """The choice among them: consensus, the one nearest to the others (by default), velocity_residual, the straightest
    path from noise to actions, or first, as without --num-samples."""
    seed: int = 0
    """Seed of the noise of requests that bring none."""
    max_batch: int = 8
    """Requests in one forward pass of the model. Their answers are those of single requests."""
    max_queue: int = 64
    """Requests that may wait for the model."""
    deadline: float = 30.0
    """Seconds that a request may wait for the model; then it is dropped, with an error to its client."""
    max_connections: int = 64
    """Clients at once."""
    max_message_mb: float = 32.0
    """Size of a request in MiB."""
    max_memory_mb: float = 1024.0
    """MiB that the messages of all clients may hold together, until they are answered, and the last one of each on the
    dashboard; beyond it the client that holds most is disconnected."""
    max_rate: float = 200.0
    """Requests per second of one client, on average over a second."""
    grace: float = 10.0
    """Seconds at the end in which requests that were received are still answered."""

    def __post_init__(self) -> None:
        counts = ("max_batch", "max_queue", "max_connections")
        for name in (*counts, "deadline", "max_message_mb", "max_memory_mb", "max_rate"):
            if not getattr(self, name) > 0:
                raise ServingError(f"{name} is {getattr(self, name)}; expected a positive number.")
        if not 4 * self.max_message_mb <= self.max_memory_mb < math.inf:
            raise ServingError(
                f"max_memory_mb is {self.max_memory_mb:g}; expected at least {4 * self.max_message_mb:g}, and below "
                "infinity: four times max_message_mb, for a message, its arrays, the one behind it and the dashboard's."
            )
        if self.num_steps is not None and not (is_whole(self.num_steps) and 1 <= self.num_steps <= MAX_NUM_STEPS):
            raise ServingError(f"num_steps is {self.num_steps}; expected 1 to {MAX_NUM_STEPS}, a whole number.")
        checked_pick(self.pick, self.num_samples, self.num_steps)
        if not 0 <= self.port < 2**16:
            raise ServingError(f"port is {self.port}; expected 0 to 65535.")
        if self.rename and self.protocol != "vla-eval":
            raise ServingError("rename is for --protocol vla-eval; openpi's clients send the policy's own keys.")
        if self.token is not None and self.protocol == "vla-eval":
            raise ServingError("vla-eval's client sends no token; expected none (--token, TORCHPI_TOKEN).")
        if not self.grace >= 0:
            raise ServingError(f"grace is {self.grace}; expected 0 or more.")
        checked_seed(self.seed)
        if self.token is not None and not (self.token.isascii() and self.token.isprintable() and self.token.split()):
            raise ServingError("The token must be of printable ASCII characters, and not empty.")

    def noise_shape(self, chunk_shape: tuple[int, int]) -> tuple[int, ...]:
        """Of a request: [H, action_dim], or [N, H, action_dim] with `num_samples`."""
        return chunk_shape if self.num_samples is None else (self.num_samples, *chunk_shape)

    @property
    def max_message_bytes(self) -> int:
        return int(self.max_message_mb * 2**20)

    @property
    def local(self) -> bool:
        """True if only this machine can reach the server."""
        return self.host in LOCAL_HOSTS

    def admits(self, authorization: str | None) -> bool:
        if self.token is None:
            return True
        scheme, _, credentials = (authorization or "").partition(" ")
        # compare_digest takes the same time wherever the two differ, so that the answer's time tells nothing.
        same = hmac.compare_digest(credentials.strip().encode(errors="surrogateescape"), self.token.strip().encode())
        return same and scheme.lower() in ("bearer", "api-key")


class RateLimit:
    """A token bucket: `rate` per second, and `burst` at once after a silence, by default those of a second."""

    def __init__(self, rate: float, now: float, burst: float | None = None) -> None:
        self._rate, self._size = rate, max(burst or rate, 1.0)
        self._left, self._at = self._size, now

    def allows(self, now: float) -> bool:
        """Count one more at this time, in seconds; False: it exceeds the rate."""
        self._left = min(self._size, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True
