"""Routes a prompt to the replica that has computed most of what it begins with, unless that one is much busier.

In: requests whose first argument is a `Prompt`, and Serve's view of how many requests each replica holds. Out: replicas
in order of preference. What a replica computed is remembered by the names of `Prompt.prefix`, up to a number of blocks;
what was used longest ago is forgotten first. Every caller's handle remembers for itself. So a conversation that nothing
is remembered of goes to the less busy of two replicas that follow from its first turn alone (power of two choices:
Mitzenmacher, 2001; rendezvous hashing: Thaler and Ravishankar, 1998): callers who do not know of each other choose
alike. Does not know what a replica still holds.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from ray.serve._private.request_router import PowerOfTwoChoicesRequestRouter
from ray.serve.request_router import (
    LocalityMixin,
    MultiplexMixin,
    PendingRequest,
    ReplicaID,
    ReplicaResult,
    RequestRouter,
    RunningReplica,
)
from xxhash import xxh3_64_intdigest

from serve_apps.prompt import Prefix, Prompt


class Remembered:
    """Blocks that one replica has computed, as far as there is room; those used longest ago go first."""

    def __init__(self, most: int):
        self._most = most
        self._names: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._names)

    def matched(self, names: Sequence[bytes]) -> int:
        """How many of `names`, from the first, were computed."""
        # A name stands for all before it, and is forgotten before they are.
        return next((n for n in range(len(names), 0, -1) if names[n - 1] in self._names), 0)

    def add(self, names: Sequence[bytes]) -> None:
        """Note that `names` are computed."""
        for name in reversed(names[: self._most]):  # so that what comes first stays longest
            self._names[name] = None
            self._names.move_to_end(name)
        while len(self._names) > self._most:
            self._names.popitem(last=False)


class PrefixRouter(LocalityMixin, MultiplexMixin, RequestRouter):  # type: ignore[misc]  # Ray's, without types
    """The request router of the LM's deployment; Serve makes one for each handle."""

    def initialize_state(self, imbalance: int = 8, remembered: int = 65_536) -> None:
        """Take Serve's `request_router_kwargs`.

        Args:
            imbalance: by how many requests the replica that holds a prefix, or a model, may be busier than the least
                busy one.
            remembered: blocks that are remembered of each replica, at about 100 bytes each.
        """
        self._imbalance = imbalance
        self._most = remembered
        self._computed: dict[ReplicaID, Remembered] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas to try, rank by rank; of a rank Serve takes the least busy, and the next where all are full."""
        prompt = _prompt_of(pending_request)
        if pending_request is None or prompt is None:
            ranks: list[list[RunningReplica]] = await PowerOfTwoChoicesRequestRouter.choose_replicas(
                self, candidate_replicas, pending_request
            )
            return ranks
        if pending_request.metadata.multiplexed_model_id:
            ids = self.apply_multiplex_routing(pending_request)
        else:
            ids = self.apply_locality_routing(pending_request)
        everyone = list(self._replicas.values())
        busy = await self._busy(everyone) if len(everyone) > 1 else {}
        most = min(busy.values(), default=0) + self._imbalance
        free = [replica for replica in everyone if busy.get(replica.replica_id, most) <= most]
        candidates = [replica for replica in free if replica.replica_id in ids] or free
        # Where all of these are full, another may not be.
        ranks = [self._holders(candidates, prompt.prefix), _two_of(candidates, prompt.prefix), everyone]
        return [rank for rank in ranks if rank]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        """Remember where a prompt went."""
        prompt = _prompt_of(pending_request)
        if prompt is not None and replica_id in self._replicas:
            self._computed.setdefault(replica_id, Remembered(self._most)).add(prompt.prefix.names)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take the replicas that there are now, and forget what others computed."""
        super().update_replicas(replicas)
        self._computed = {id: known for id, known in self._computed.items() if id in self._replicas}

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Forget a replica."""
        super().on_replica_actor_died(replica_id)
        self._computed.pop(replica_id, None)

    def _holders(self, candidates: Sequence[RunningReplica], prefix: Prefix) -> list[RunningReplica]:
        """Those that computed most of a conversation, beyond a system message: that many begin with the same."""
        matched = {}
        for replica in candidates:
            known = self._computed.get(replica.replica_id)
            matched[replica.replica_id] = known.matched(prefix.names) if known else 0
        longest = max(matched.values(), default=0)
        return [r for r in candidates if longest > prefix.n_system and matched[r.replica_id] == longest]

    async def _busy(self, candidates: Sequence[RunningReplica]) -> dict[ReplicaID, int]:
        """Requests that each replica holds; those that do not say are left out."""
        known = {r.replica_id: self._replica_queue_len_cache.get(r.replica_id) for r in candidates}
        if unknown := [r for r in candidates if known[r.replica_id] is None]:
            known |= {r.replica_id: length for r, length in await self._probe_queue_lens(unknown, 0)}
        return {id: length for id, length in known.items() if length is not None}


def _prompt_of(request: PendingRequest | None) -> Prompt | None:
    first: Any = request.args[0] if request is not None and request.args else None
    return first if isinstance(first, Prompt) else None


def _two_of(candidates: Sequence[RunningReplica], prefix: Prefix) -> list[RunningReplica]:
    """Two replicas that follow from a conversation's first block beyond the system message, the likelier first."""
    first = prefix.names[min(prefix.n_system, len(prefix.names) - 1)] if prefix.names else b""
    by_weight = sorted(candidates, key=lambda r: xxh3_64_intdigest(first + r.replica_id.unique_id.encode()))
    return by_weight[:2]
