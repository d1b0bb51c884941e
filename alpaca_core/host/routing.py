"""Which replica of a Ray cluster gets a request; Ray imports this in its proxies, and nothing else of the project does.

Ray's own choice sends a request to a replica on the proxy's node as long as that takes any, and replicas on other nodes
are idle meanwhile: ours queue thousands of rows each, so they would be idle for ever.
"""

import random

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica


class FewestRequests(FIFOMixin, RequestRouter):
    """Offers the two replicas that have the fewest requests, as far as this proxy knows; Ray asks both, and takes one.

    Replicas with equally many come in random order, so that several proxies do not all choose the same.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Rank replicas for one request."""
        known = self.replica_queue_len_cache
        counted = [(known.get(each.replica_id) or 0, random.random(), each) for each in candidate_replicas]
        return [[each for _, _, each in sorted(counted, key=lambda one: one[:2])[:2]]]
