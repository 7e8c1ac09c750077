"""Whether Ray is in this process, and what its exceptions mean to the service.

The same code answers requests in Serve's replicas and in one process without Ray. In: an exception. Out: what it means.
Where Ray was never loaded nobody raises its exceptions, and it is not loaded to look. Does not start Ray.
"""

import sys


def has_ray() -> bool:
    """Whether something loaded Ray into this process, as is so in each that Ray started."""
    return "ray" in sys.modules


def is_connected() -> bool:
    """Whether this process belongs to a Ray cluster; in one that does not, asking Ray for anything starts a cluster."""
    return has_ray() and bool(sys.modules["ray"].is_initialized())


def unwrapped(error: BaseException) -> BaseException:
    """What a deployment raised, as it raised it."""
    if has_ray():
        from ray.exceptions import RayTaskError

        while isinstance(error, RayTaskError):
            error = error.cause
    return error


def replica_died(error: BaseException) -> bool:
    """Whether it was the end of a replica that ended the call, or of its host, before what it gave was fetched."""
    if not has_ray():
        return False
    from ray.exceptions import ObjectLostError, RayActorError

    return isinstance(error, RayActorError | ObjectLostError)


def has_no_room(error: BaseException) -> bool:
    """Whether a deployment has as many requests waiting as may wait."""
    if not has_ray():
        return False
    from ray.serve.exceptions import BackPressureError

    return isinstance(error, BackPressureError)


def is_away(error: BaseException) -> bool:
    """Whether there is nobody now who could answer."""
    if not has_ray():
        return False
    from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError

    return isinstance(error, DeploymentUnavailableError | ReplicaUnavailableError) or replica_died(error)
