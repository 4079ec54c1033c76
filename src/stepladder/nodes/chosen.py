"""The nodes that ``[cluster]`` names."""

from __future__ import annotations

from stepladder.config import Cluster
from stepladder.nodes import ManyNodes, Nodes
from stepladder.nodes.here import Here
from stepladder.nodes.on_ray import OnRay
from stepladder.nodes.on_slurm import OnSlurm


def nodes_of(cluster: Cluster) -> ManyNodes:
    """The nodes of a cluster.

    Raises:
        ClusterError: they cannot be used.
    """
    return OnSlurm() if cluster.scheduler == "slurm" else OnRay(cluster.address)


def workers_of(cluster: Cluster | None) -> Nodes:
    """The nodes of a cluster, or this machine, for work that needs no card.

    Raises:
        ClusterError: the cluster's nodes cannot be used.
    """
    return Here() if cluster is None else nodes_of(cluster)
