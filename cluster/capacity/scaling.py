"""How many replicas of a simulated deployment run: our policy, `serve_apps.autoscaling.decide`, Serve's delays, starts.

In: at every moment what the replicas hold, as all of them together. Out: how many there are. The delays are those of
`ray.serve.autoscaling_policy`, told again so that time may be simulated; a test holds both equal. Does not know what
the work is.
"""

from collections import deque
from dataclasses import dataclass, field

from serve_apps.autoscaling import Observed, Report, Targets, decide
from serve_apps.autoscaling_config import Autoscaling

_EPSILON_S = 1e-6  # as Serve's own


@dataclass(frozen=True)
class Held:
    """What is held at one moment, by all replicas of a deployment together."""

    work: float
    """At the replicas, in the modality's unit."""
    requests: float
    """At the replicas."""
    queued: float = 0.0
    """At the callers."""
    kv_use: float = 0.0
    """Mean share over replicas."""


@dataclass
class Delays:
    """Serve's delays: how long more, or fewer, replicas must be wanted before it is so."""

    up_s: float
    down_s: float
    _since: float | None = None
    _direction: int = 0

    def apply(self, desired: int, wanted: int, running: int, now: float) -> int:
        """The number that is wanted from now on.

        Args:
            desired: by the policy. wanted: decided on before. running: replicas that run.
        """
        if running == 0 and desired > 0:
            return desired
        direction = (desired > wanted) - (desired < wanted)
        if direction != self._direction or direction == 0:
            self._since, self._direction = None, direction
        if direction == 0:
            return wanted
        if self._since is None:
            self._since = now
        if now - self._since + _EPSILON_S < (self.up_s if direction > 0 else self.down_s):
            return wanted
        self._since, self._direction = None, 0
        return desired if direction > 0 or wanted == 1 else max(1, desired)


@dataclass
class Scaler:
    """Replicas of one deployment through simulated time.

    Args:
        scaling: its config; with None, `wanted` replicas run for ever.
        start_s: from the decision to the first request that a replica takes.
    """

    scaling: Autoscaling | None
    targets: Targets
    start_s: float
    wanted: int
    running: int = field(init=False)
    starting: deque[tuple[float, int]] = field(default_factory=deque)
    """(when they will run, how many)"""

    def __post_init__(self) -> None:
        self.running = self.wanted
        self._delays = Delays(self.scaling.upscale_delay_s, self.scaling.downscale_delay_s) if self.scaling else None
        self._seen: deque[tuple[float, float, float, float, float]] = deque()  # (time, seconds, work, requests, kv)
        self._sums = [0.0, 0.0, 0.0, 0.0]
        self._n_busy = 0
        self._remembered: float | None = None
        self._told: list[float] | None = None  # means of work, requests and memory, as last reported
        self._reported_at = float("-inf")
        self._hurried = False

    def hurry(self, on: bool) -> None:
        """Start at once and let go soon, as before a trace begins; or as it will be."""
        if self.scaling is not None:
            up, down = self.scaling.upscale_delay_s, self.scaling.downscale_delay_s
            self._delays = Delays(0.0, min(down, self.scaling.look_back_s)) if on else Delays(up, down)
        self._hurried = on

    def desired(self, now: float, step_s: float, held: Held, per_request: float) -> int:
        """What the policy asks for, before delays.

        Args:
            step_s: for how long it was as `held` says.
            per_request: work of recent requests.
        """
        if self.scaling is None:
            return self.wanted
        self._note(now, step_s, held)
        if now - self._reported_at >= self.scaling.metrics_interval_s or self._told is None:
            seconds, *sums = self._sums
            self._told, self._reported_at = [total / seconds for total in sums], now
        work, requests, kv_use = self._told
        n = max(1, self.running)
        reports = (Report(work / n, requests / n, 0.0, per_request, kv_use, self.running),)
        decision = decide(
            Observed(
                self.running,
                self.wanted,
                held.queued,
                held.queued + held.requests,
                reports if self.running else (),
                self.scaling.min_replicas,
                self.scaling.max_replicas,
                self._remembered,
            ),
            self.targets,
        )
        self._remembered = decision.per_request
        if self.running == 0 and held.queued > 0:
            return max(1, self.wanted)  # Serve starts the first at once, without asking the policy
        return decision.replicas

    def follow(self, now: float, desired: int) -> None:
        """Let delays pass, start and end replicas."""
        if self._delays is not None:
            wanted = self._delays.apply(desired, self.wanted, self.running, now)
            if wanted > self.wanted:
                self.starting.append((now + (0.0 if self._hurried else self.start_s), wanted - self.wanted))
            self._end(self.wanted - wanted)
            self.wanted = wanted
        while self.starting and self.starting[0][0] <= now:
            self.running += self.starting.popleft()[1]

    def _end(self, n: int) -> None:
        while n > 0 and self.starting:  # those that do not run yet go first
            at, starting = self.starting.pop()
            if starting > n:
                self.starting.append((at, starting - n))
            n -= min(n, starting)
        self.running -= max(0, n)

    def _note(self, now: float, step_s: float, held: Held) -> None:
        assert self.scaling is not None
        self._seen.append((now, step_s, held.work * step_s, held.requests * step_s, held.kv_use * step_s))
        self._sums = [total + new for total, new in zip(self._sums, self._seen[-1][1:], strict=True)]
        self._n_busy += any(self._seen[-1][2:])
        while len(self._seen) > 1 and self._seen[0][0] < now - self.scaling.look_back_s:
            gone = self._seen.popleft()
            self._sums = [total - old for total, old in zip(self._sums, gone[1:], strict=True)]
            self._n_busy -= any(gone[2:])
        if not self._n_busy:  # what rounding leaves of a difference would be work to the policy
            self._sums[1:] = [0.0] * 3
