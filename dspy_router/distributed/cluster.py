"""The Ray cluster that this process is connected to, and whether it is still there."""

import socket
from typing import Any

from dspy_router.errors import RouteError

PROBE_SECONDS = 5.0  # how often the cluster is asked for a sign of life
ANSWER_SECONDS = 20.0  # how long it may take for one; for two of them, less than Ray's minute
# Ray passes smaller arguments along with the call, at most 10 MB a call, and puts larger ones into its object store.
PIECE_BYTES = 65_536


def ray_module() -> Any:
    """Ray, connected to a cluster.

    Raises:
        RouteError: If the extra is not installed, or there is no cluster.
    """
    try:
        import ray
    except ImportError as error:
        raise RouteError("Ray is not installed: pip install 'dspy-router[ray]'.") from error
    if not ray.is_initialized():
        raise RouteError(
            "This process is connected to no Ray cluster. Call ray.init() for one on this machine, or "
            "ray.init(address=...) to join one."
        )
    return ray


class Cluster:
    """The cluster as its processes on this machine and its head stand for it.

    Ray ends a process whose head does not answer for a minute, or that touches the object store of a node that is
    gone. So signs of life are asked for here, before it comes to that.
    """

    def __init__(self) -> None:
        self.ray = ray_module()
        context = self.ray.get_runtime_context()
        own = next(node for node in self.ray.nodes() if node["NodeID"] == context.get_node_id())
        head, port = context.gcs_address.rsplit(":", 1)
        self._addresses = [(head.strip("[]"), int(port)), (own["NodeManagerAddress"], own["NodeManagerPort"])]

    def answers(self) -> bool:
        """Whether the cluster is still there."""
        return bool(self.ray.is_initialized()) and all(_listens(address) for address in self._addresses)

    def leave(self) -> None:
        """Disconnect, so that Ray does not end this process."""
        if self.ray.is_initialized():
            self.ray.shutdown()


def in_pieces(parcel: bytes) -> list[bytes]:
    """A parcel cut so that it travels with the call and not through Ray's object store.

    What is in the store can be written to disk, and a parcel may hold an API key; and see `Cluster`.
    """
    return [parcel[start : start + PIECE_BYTES] for start in range(0, len(parcel), PIECE_BYTES)]


def _listens(address: tuple[str, int]) -> bool:
    try:
        with socket.create_connection(address, timeout=ANSWER_SECONDS):
            return True
    except OSError:
        return False
