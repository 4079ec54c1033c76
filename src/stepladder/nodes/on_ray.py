"""The nodes of a Ray cluster.

Ray only starts, watches and stops commands: each is held by an actor on its node, which is never restarted. A command
that is lost is started again by whoever wanted it, so it takes the room that a new node brings. Answers and files do
not go through Ray.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import stepladder
from stepladder.errors import ClusterError
from stepladder.nodes import NODE_ADDRESS, Ended, Slot
from stepladder.supervise import child_environment, open_log, supervised

FOLLOW_SECONDS = 1.0
"""That a node waits for new output before it says that there is none."""
REACH_SECONDS = 10.0
"""That the address of a cluster has to accept a connection."""
MAX_READ_BYTES = 2**20
"""Of output in one reply."""
ROOM_SECONDS = 600.0
"""That nodes for a training are waited for."""
STOP_SECONDS = 15.0
"""That a node has to end a command before its actor is killed, which ends it too."""


class Keeper:
    """The actor that holds one command on its node. Nothing happens in its constructor: Ray does not say why one
    failed."""

    def __init__(self) -> None:
        self._held = contextlib.ExitStack()

    def start(self, version: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the command."""
        import ray

        if version != stepladder.__version__:
            raise RuntimeError(f"this node has Stepladder {stepladder.__version__}, and the driver {version}")
        handle, name = tempfile.mkstemp(prefix="stepladder-", suffix=".log")
        log = Path(name)
        self._output = os.fdopen(handle, "rb")  # open until this process ends, since ``follow`` may be reading it
        own = child_environment() | {NODE_ADDRESS: ray.util.get_node_ip_address()}
        self._child = self._held.enter_context(supervised(command, log, own | dict(environment)))
        log.unlink()  # the command and this process hold it open

    def follow(self, offset: int) -> tuple[bytes, int | None]:
        """Output from an offset on, and the exit code once the command has ended and all its output was returned. Waits
        up to :data:`FOLLOW_SECONDS` for either."""
        until = time.monotonic() + FOLLOW_SECONDS
        while True:
            code = self._child.poll()  # before reading, so that nothing is written in between
            self._output.seek(offset)
            output = self._output.read(MAX_READ_BYTES)
            if output or code is not None or time.monotonic() > until:
                return output, None if output else code
            time.sleep(0.05)

    def stop(self) -> None:
        """End the command and all processes it started."""
        self._held.close()


class OnRay:
    """Runs commands on the nodes of a Ray cluster.

    Args:
        address: of the cluster, as ``ray.init`` takes it. This process must run on one of its nodes.

    Raises:
        ClusterError: Ray is not installed, there is no cluster, or another version of Ray or Python runs it.
    """

    is_elastic = True

    def __init__(self, address: str) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise ClusterError(
                "[cluster] scheduler = 'ray', but Ray is not installed: pip install 'stepladder[cluster]'"
            ) from None
        self._ray: Any = ray
        if not ray.is_initialized():
            _check_reachable(address)
            handler = signal.getsignal(signal.SIGTERM)
            try:
                ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            except (ConnectionError, RuntimeError, ValueError, OSError) as error:
                raise _no_cluster(address, error) from None
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)  # ray.init puts its own there
        self._keeper = ray.remote(max_restarts=0, max_task_retries=0, max_concurrency=2)(Keeper)

    def slots(self, cards: int) -> list[Slot]:
        resources = self._resources()
        if any(resource.get("GPU") for resource in resources):
            return [Slot(cards)] * sum(int(resource.get("GPU", 0)) // cards for resource in resources)
        return [Slot()] * sum(resource.get("CPU", 0) >= 1 for resource in resources)

    def workers(self) -> list[Slot]:
        return [Slot(cores=1)] * sum(int(resource.get("CPU", 0)) for resource in self._resources())

    def _resources(self) -> list[Mapping[str, float]]:
        """What each node has."""
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    @contextlib.contextmanager
    def apart(self, count: int, cards: int) -> Iterator[list[Slot]]:
        from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

        bundle = {"CPU": 1} | ({"GPU": cards} if cards else {})
        group = placement_group([bundle] * count, strategy="STRICT_SPREAD")
        try:
            if not self._ray.wait([group.ready()], timeout=ROOM_SECONDS)[0]:
                wanted = f"{count} nodes with {cards} free cards each" if cards else f"{count} nodes with a free core"
                raise ClusterError(f"[cluster] train_nodes = {count}: there were not {wanted} for {ROOM_SECONDS:g} s")
            addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in self._ray.nodes()}
            node_of = placement_group_table(group)["bundles_to_node_id"]
            yield [Slot(cards, node=(group, index), address=addresses[node_of[index]]) for index in range(count)]
        finally:
            remove_placement_group(group)

    @contextlib.contextmanager
    def running(
        self, slot: Slot, command: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> Iterator[RunningOnRay]:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        where = "SPREAD" if slot.node is None else PlacementGroupSchedulingStrategy(*slot.node)
        cores = 0 if slot.cards and slot.node is None else 1  # it is cards that servers are short of
        keeper = self._keeper.options(num_cpus=cores, num_gpus=slot.cards, scheduling_strategy=where).remote()
        own = {**environment} if slot.cards else {**environment, "CUDA_VISIBLE_DEVICES": ""}
        running = RunningOnRay(self._ray, keeper, [*command], own, log)
        try:
            yield running
        finally:
            running.stop()


def _check_reachable(address: str) -> None:
    """Ray waits for minutes for an address where nobody listens."""
    host, _, port = address.rpartition(":")
    if port.isdecimal():
        try:
            socket.create_connection((host, int(port)), REACH_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise _no_cluster(address, error) from None


def _no_cluster(address: str, error: Exception) -> ClusterError:
    return ClusterError(
        f"[cluster] address = {address!r}: no Ray cluster answers ({str(error).strip().splitlines()[0]}); run this on "
        "one of its nodes, or start one with 'ray start --head'"
    )


class RunningOnRay:
    """A command on a node of a Ray cluster."""

    def __init__(
        self, ray: Any, keeper: Any, command: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> None:
        self._ray, self._keeper, self._log, self._offset = ray, keeper, log, 0
        self._reply = keeper.start.remote(stepladder.__version__, command, environment)
        self._ended: Ended | None = None
        self._is_placed = False

    def poll(self) -> Ended | None:
        if self._ended is None and self._ray.wait([self._reply], timeout=0)[0]:
            self._take()
        return self._ended

    def _take(self) -> None:
        """Take the actor's reply, and ask it again."""
        try:
            output, code = self._ray.get(self._reply) or (b"", None)
        except self._ray.exceptions.RayTaskError as error:
            self._ended = Ended(1, str(error.cause))
        except self._ray.exceptions.RayError as error:
            self._ended = Ended(None, str(error).strip().splitlines()[0])
        else:
            self._is_placed = True
            with open_log(self._log) as file:
                file.write(output)
            self._offset += len(output)
            self._ended = None if code is None else Ended(code)
            self._reply = self._keeper.follow.remote(self._offset)

    def stop(self) -> None:
        """End the command; where its node cannot be reached, its actor's end does."""
        with contextlib.suppress(self._ray.exceptions.RayError):
            if self._is_placed:
                self._ray.get(self._keeper.stop.remote(), timeout=STOP_SECONDS)
        self._ray.kill(self._keeper, no_restart=True)
