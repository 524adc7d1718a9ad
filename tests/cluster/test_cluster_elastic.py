"""Sizes of an elastic group, and what Ray Train's controller decides with our policies.

These tests call internals of Ray: one that fails after a change of Ray's version says which of them
`svfap_dist.cluster.elastic` has to follow.
"""

from __future__ import annotations

import types
from typing import Any

import pytest
import ray
from ray.train import FailureConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from svfap_dist.cluster import elastic
from svfap_dist.cluster.elastic import (
    ElasticTrainer,
    LaneScalingPolicy,
    LostNodesFailurePolicy,
    ResizeError,
)
from svfap_dist.telemetry.goodput import NODES_JOINED


@pytest.mark.parametrize("lanes", [1, 2, 6, 8, 12, 64])
def test_the_group_is_the_largest_that_shares_the_lanes(lanes):
    sizes = tuple(size for size in range(1, lanes + 1) if lanes % size == 0)
    for available in range(2 * lanes + 1):
        size = elastic.largest_size(sizes, available)
        assert size <= available
        if available:
            assert lanes % size == 0
            assert not [n for n in range(size + 1, min(available, lanes) + 1) if lanes % n == 0]


@pytest.mark.parametrize(("available", "size"), [(1, 0), (2, 2), (3, 2), (5, 4), (8, 4)])
def test_the_group_is_never_smaller_or_larger_than_the_recipe_says(available, size):
    assert elastic.largest_size((2, 4), available) == size


class Actor:
    """An actor's handle, of which only the calls are kept; `answer` is what it answers."""

    def __init__(self, answer: Any = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._answer = answer

    def __getattr__(self, name: str) -> Any:
        def remote(*arguments: Any, **named: Any) -> Any:
            self.calls.append((name, *arguments, *named.items()))
            return self._answer() if self._answer else None

        return types.SimpleNamespace(remote=remote)


class Cluster:
    """Nodes with four CPUs each, as Ray Train's policy sees them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...]) -> None:
        self.nodes: list[str] = []
        self.draining: set[str] = set()
        self.coordinator = Actor(lambda: {node: {"CPU": 4.0} for node in self.nodes})
        self.board = Actor()
        monkeypatch.setattr(ray, "get", lambda value, timeout=0.0: value)
        monkeypatch.setattr(elastic, "_draining_nodes", lambda: frozenset(self.draining))
        monkeypatch.setattr(elastic, "_SECONDS_BETWEEN_POLLS", 0.0)
        config = ScalingConfig(
            num_workers=(sizes[0], sizes[-1]),
            resources_per_worker={"CPU": 4},
            elastic_resize_monitor_interval_s=0.0,
        )
        self.policy = LaneScalingPolicy(config, sizes, self.board)
        client = types.SimpleNamespace(
            _autoscaling_coordinator=self.coordinator,
            maybe_send_resource_request=lambda config, num_workers: None,
        )
        vars(self.policy).update(_requester_id="train", _coordinator_client=client)

    def starts(self, *nodes: str) -> int:
        """Ranks that a group would start with; 0: it waits."""
        self.nodes = list(nodes)
        decision = self.policy.make_decision_for_non_running_worker_group()
        return decision.num_workers if isinstance(decision, ResizeDecision) else 0

    def asks_to_grow(self, ranks: int, *nodes: str) -> bool:
        self.nodes = list(nodes)
        self.board.calls.clear()
        state = types.SimpleNamespace(num_workers=ranks, start_time=0.0)
        decision = self.policy.make_decision_for_running_worker_group(state, None)
        assert isinstance(decision, NoopDecision)  # never one that kills ranks
        assert self.board.calls in ([], [("request_resize", NODES_JOINED)])
        return bool(self.board.calls)


def test_a_group_starts_with_what_the_lanes_allow_on_the_nodes_that_stay(monkeypatch):
    cluster = Cluster(monkeypatch, sizes=(2, 4))
    assert cluster.starts("a") == 0
    assert cluster.starts("a", "b") == 2
    assert cluster.starts("a", "b", "c") == 2  # Ray would take 3
    assert cluster.starts("a", "b", "c", "d", "e") == 4
    cluster.draining = {"b"}
    assert cluster.starts("a", "b", "c") == 2
    assert cluster.starts("a", "b") == 0


def test_nodes_are_counted_anew_for_each_decision(monkeypatch):
    """Ray's coordinator counts them every 20 s only, unless it is asked to."""
    cluster = Cluster(monkeypatch, sizes=(1, 2))
    cluster.starts("a")
    counted = [call for call in cluster.coordinator.calls if ("recompute", True) in call]
    assert counted == [("get_reserved_resources", "train", ("recompute", True))]
    assert cluster.coordinator.calls[0] == counted[0]


def test_ranks_are_asked_only_where_the_group_can_grow(monkeypatch):
    cluster = Cluster(monkeypatch, sizes=(1, 2, 4))
    assert cluster.asks_to_grow(1, "a", "b")
    assert not cluster.asks_to_grow(2, "a", "b", "c")  # 3 ranks cannot share the lanes
    assert cluster.asks_to_grow(2, "a", "b", "c", "d")
    assert not cluster.asks_to_grow(2, "a")  # a failure means that nodes are lost
    cluster.draining = {"d"}
    assert not cluster.asks_to_grow(2, "a", "b", "c", "d")


@pytest.fixture
def dead(monkeypatch) -> set[str]:
    nodes: set[str] = {"long ago"}
    monkeypatch.setattr(elastic, "_dead_nodes", lambda: frozenset(nodes))
    monkeypatch.setattr(elastic, "_SECONDS_TO_NOTICE", 0.0)
    return nodes


def failure(*errors: Exception) -> WorkerGroupError:
    return WorkerGroupError("failed", dict(enumerate(errors)))


def test_resizes_and_lost_nodes_do_not_count_as_failures(dead):
    policy = LostNodesFailurePolicy(FailureConfig(max_failures=1))
    reset = RuntimeError("Connection reset by peer")
    for _ in range(3):
        assert policy.make_decision(failure(ResizeError("nodes joined"))) == FailureDecision.RETRY
    for node in ("a", "b"):
        dead.add(node)
        assert policy.make_decision(failure(reset, reset)) == FailureDecision.RETRY
    assert policy.make_decision(failure(reset)) == FailureDecision.RETRY  # the one that may be
    assert policy.make_decision(failure(reset)) == FailureDecision.RAISE


def test_a_group_that_cannot_start_yet_is_tried_again(dead):
    policy = LostNodesFailurePolicy(FailureConfig(max_failures=0))
    for _ in range(3):
        error = ControllerError(WorkerGroupStartupTimeoutError(2))
        assert policy.make_decision(error) == FailureDecision.RETRY
    assert policy.make_decision(ControllerError(ValueError("bug"))) == FailureDecision.RAISE


def test_the_last_failure_waits_for_word_of_its_node(dead, monkeypatch):
    """Ranks see a broken connection before Ray sees that the peer's node is dead."""
    monkeypatch.setattr(elastic, "_SECONDS_TO_NOTICE", 60.0)
    policy = LostNodesFailurePolicy(FailureConfig(max_failures=0))
    looks = iter([dead, dead, dead, {*dead, "a"}])
    monkeypatch.setattr(elastic, "_dead_nodes", lambda: frozenset(next(looks)))
    monkeypatch.setattr(elastic, "_SECONDS_BETWEEN_POLLS", 0.0)
    assert policy.make_decision(failure(RuntimeError("reset"))) == FailureDecision.RETRY


def test_rays_trainer_runs_with_our_policies(dead, monkeypatch):
    """`fit` makes Ray's own in the driver, and hands them to the method that starts the rest."""
    started: list[dict[str, Any]] = []

    def start(self: TorchTrainer, **parts: Any) -> Any:
        started.append(parts)
        return types.SimpleNamespace(error=None)

    monkeypatch.setattr(TorchTrainer, "_initialize_and_run_controller", start)
    trainer = ElasticTrainer(
        (1, 2, 4),
        "board",
        print,
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=(1, 4)),
    )
    try:
        trainer.fit()
    finally:
        ray.shutdown()  # `fit` has started it
    (parts,) = started
    assert isinstance(parts["scaling_policy"], LaneScalingPolicy)
    assert isinstance(parts["failure_policy"], LostNodesFailurePolicy)
    assert {"train_fn_ref", "train_run_context", "callbacks"} <= parts.keys()
    assert parts["scaling_policy"].scaling_config is trainer.scaling_config
