#!/usr/bin/env bash
# A pod is about to end (preStop): tell Ray, so that Serve starts replicas elsewhere and sends nothing here any more, and
# wait until those that are here, and the proxy, have ended what they hold. Argument: seconds to wait at most.
set -u
limit=${1:?seconds to wait at most}
# Named, for without a name Ray takes the node that a new driver would join, which may be another: even the head.
# -ww, for where COLUMNS is set ps writes no more than that.
node=$(ps -ww -eo args= | grep -oE -- '--node[-_]id=[0-9a-f]{56}' | head -n 1 | cut -d= -f2)
if [[ -z $node ]]; then
  echo "drain.sh: no Ray node runs in this pod: there is nothing to drain" >&2
  exit 0
fi
ray drain-node --address "${RAY_ADDRESS:-auto}" --node-id "$node" --reason DRAIN_NODE_REASON_PREEMPTION \
  --reason-message "the pod ends" --deadline-remaining-seconds "$limit" ||
  echo "drain.sh: Ray did not take the notice; waiting all the same" >&2
while pgrep -f '[r]ay::(ServeReplica|ProxyActor|HAProxyManager)' >/dev/null && ((SECONDS < limit)); do
  sleep 1
done
