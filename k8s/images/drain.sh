#!/usr/bin/env bash
# A pod is about to end (preStop): tell Ray, so that Serve starts replicas elsewhere and sends nothing here any more, and
# wait until those that are here have ended what they hold. Argument: seconds to wait at most.
set -u
limit=${1:?seconds to wait at most}
ray drain-node --address "${RAY_ADDRESS:-auto}" --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "the pod ends" \
  --deadline-remaining-seconds "$limit" || echo "drain.sh: Ray did not take the notice; waiting all the same" >&2
while pgrep -f '[r]ay::ServeReplica' >/dev/null && ((SECONDS < limit)); do
  sleep 1
done
