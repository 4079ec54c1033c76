"""The nodes that ``[cluster]`` names."""

from __future__ import annotations

from stepladder.config import Cluster
from stepladder.nodes import ManyNodes
from stepladder.nodes.on_ray import OnRay
from stepladder.nodes.on_slurm import OnSlurm


def nodes_of(cluster: Cluster) -> ManyNodes:
    """The nodes of a cluster.

    Raises:
        ClusterError: they cannot be used.
    """
    return OnSlurm() if cluster.scheduler == "slurm" else OnRay(cluster.address)
