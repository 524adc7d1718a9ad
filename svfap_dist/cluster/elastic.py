"""Groups that shrink when a node is lost and grow when one joins (`cluster.min_workers`).

Ray Train does most of it: `ScalingConfig(num_workers=(least, most))`. Two of its policies, which
live in its controller, do not fit a run whose lanes are shared among the ranks:

- Ray takes any number of workers in that range, but the world size must divide `data.num_lanes`.
  `LaneScalingPolicy` takes the largest possible one instead. It counts nodes as they are at that
  moment (Ray: up to 20 s ago), without those that will be preempted.
- Ray kills the workers to make the group larger, and the steps since the last checkpoint are lost.
  `LaneScalingPolicy` only requests it on the board: the ranks save a checkpoint and end, rank 0
  with `ResizeError`, which Ray sees as a failure and starts the group again, larger. For the same
  reason the ranks do not wait until a preempted node is gone, if enough of them stay.
- Ray counts all failures alike. `LostNodesFailurePolicy` counts neither `ResizeError` nor a failure
  since whose predecessor a node has died, against `cluster.max_failures`.

`TorchTrainer.fit` makes both policies in the driver and sends them to the controller's process, so
`ElasticTrainer` replaces them on the way. These are internals of Ray, whose version is pinned; the
tests of this module fail where another version has others.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
)
from ray.train.v2.api.exceptions import WorkerGroupError

from svfap_dist.telemetry.goodput import NODES_JOINED

_SECONDS_TO_NOTICE = 15.0  # that a node is dead, after its ranks' peers have failed
_SECONDS_BETWEEN_POLLS = 0.5


class ResizeError(Exception):
    """The ranks have saved a checkpoint and ended, so that the group can have another size."""


class LaneScalingPolicy(ElasticScalingPolicy):
    """Ray Train's policy for group sizes that divide the lanes; growth waits for a checkpoint.

    Args:
        scaling_config: Of the trainer.
        sizes: Possible numbers of ranks, ascending.
        board: Handle of the board.
    """

    def __init__(self, scaling_config: Any, sizes: tuple[int, ...], board: Any) -> None:
        super().__init__(scaling_config)
        self._sizes, self._board = sizes, board

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        leaving = _draining_nodes()
        staying = {node: r for node, r in reserved_resources.items() if node not in leaving}
        return largest_size(self._sizes, super()._count_possible_workers(staying))

    def _get_reserved_resources(self) -> Any:
        """Return what the coordinator has reserved, after it has counted the nodes again.

        Requests of one actor to another are served in their order.
        """
        coordinator: Any = self._autoscaling_coordinator
        coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
        self._latest_reserved_resources_query_time = float("-inf")  # an answer may be a second old
        return super()._get_reserved_resources()

    def make_decision_for_non_running_worker_group(self) -> Any:
        """See `ElasticScalingPolicy.make_decision_for_non_running_worker_group`."""
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, NoopDecision):
            time.sleep(_SECONDS_BETWEEN_POLLS)  # the controller calls again immediately
        return decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> Any:
        """Ask the ranks to make room for a larger group; a smaller one follows a failure.

        Args:
            worker_group_state: Of the group that runs.
            worker_group_status: Of its workers.
        """
        decision = super().make_decision_for_running_worker_group(
            worker_group_state, worker_group_status
        )
        now = worker_group_state.num_workers
        if isinstance(decision, ResizeDecision) and decision.num_workers > now:
            self._board.request_resize.remote(NODES_JOINED)
        return NoopDecision()


def largest_size(sizes: tuple[int, ...], available: int) -> int:
    """Return the largest possible group of at most `available` ranks, 0 if there is none.

    Args:
        sizes: Possible numbers of ranks.
        available: Ranks for which there is room.
    """
    return max((size for size in sizes if size <= available), default=0)


def _draining_nodes() -> frozenset[str]:
    """Return the ids of nodes that will be preempted and take no more actors."""
    from ray._private.state import state

    return frozenset(state.get_draining_nodes())


class LostNodesFailurePolicy(DefaultFailurePolicy):
    """Ray Train's policy, for which the loss of nodes and resizes are no failures."""

    def __init__(self, failure_config: Any) -> None:
        super().__init__(failure_config)
        self._known_dead = _dead_nodes()

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        """See `FailurePolicy.make_decision`."""
        if not isinstance(training_failed_error, WorkerGroupError):
            return super().make_decision(training_failed_error)
        failures = training_failed_error.worker_failures.values()
        if any(isinstance(failure, ResizeError) for failure in failures) or self._lost_node():
            return FailureDecision.RETRY
        decision = super().make_decision(training_failed_error)
        # Ranks may know of a peer's end before Ray knows of its node's.
        if decision is FailureDecision.RAISE and self._lost_node(_SECONDS_TO_NOTICE):
            return FailureDecision.RETRY
        return decision

    def _lost_node(self, wait_seconds: float = 0.0) -> bool:
        """Return whether a node has died since the last call that returned True."""
        deadline = time.monotonic() + wait_seconds
        while not (lost := _dead_nodes() - self._known_dead) and time.monotonic() < deadline:
            time.sleep(_SECONDS_BETWEEN_POLLS)
        self._known_dead |= lost
        return bool(lost)


def _dead_nodes() -> frozenset[str]:
    """Return the ids of all nodes that the cluster has lost."""
    return frozenset(node["NodeID"] for node in ray.nodes() if not node["Alive"])


class ElasticTrainer(TorchTrainer):
    """Ray Train's trainer with the policies of this module.

    Args:
        sizes: Possible numbers of ranks, ascending.
        board: Handle of the board.
        train: What each rank runs.
        **parts: Further arguments of `TorchTrainer`.
    """

    def __init__(self, sizes: tuple[int, ...], board: Any, train: Any, **parts: Any) -> None:
        super().__init__(train, **parts)
        self._sizes, self._board = sizes, board

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        assert {"scaling_policy", "failure_policy"} <= parts.keys()
        scaling = LaneScalingPolicy(self.scaling_config, self._sizes, self._board)
        failing = LostNodesFailurePolicy(self.run_config.failure_config)
        parts |= {"scaling_policy": scaling, "failure_policy": failing}
        return super()._initialize_and_run_controller(**parts)
