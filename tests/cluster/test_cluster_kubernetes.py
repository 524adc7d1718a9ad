"""The RayJob of a recipe: read back as YAML, its pods checked against Kubernetes' own schema."""

from __future__ import annotations

import re
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml

from svfap_dist import bundled
from svfap_dist.cluster import kubernetes
from svfap_dist.cluster.kubernetes import Kubernetes
from svfap_dist.cluster.schedulers import Job
from svfap_dist.config import recipe
from svfap_dist.errors import ConfigError

PLACES = ["data.url=s3://b/shards", "run.url=s3://b/run"]
KUBERNETES = "1.34"


def rendered(name: str, overrides: list[str], pods: Kubernetes) -> tuple[Job, Any, Any]:
    submission = pods.prepare(name, overrides)
    config_map, ray_job = yaml.safe_load_all(submission.text)
    return submission.content, config_map, ray_job


def templates(ray_job: Any) -> list[Any]:
    cluster = ray_job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"] for group in groups]


def test_the_recipe_and_the_sizes_arrive(tmp_path):
    pods = Kubernetes("registry/svfap:1", nodes=4, gpus_per_node=8, memory="100Gi")
    name = 'run.name="He said: \\"go\\" #1"'
    job, config_map, ray_job = rendered("svfap_base_voxceleb2", [*PLACES, name], pods)
    (tmp_path / "recipe.toml").write_text(config_map["data"]["recipe.toml"])
    config = recipe.load(str(tmp_path / "recipe.toml"))
    assert config.run.name == 'He said: "go" #1'
    assert config.cluster.num_workers == 32

    spec = ray_job["spec"]
    assert ray_job["metadata"]["name"] == config_map["metadata"]["name"] == job.name
    assert spec["rayClusterSpec"]["rayVersion"] == ray.__version__
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == 4
    (worker,) = group["template"]["spec"]["containers"]
    limits = {"cpu": "128", "memory": "100Gi", "nvidia.com/gpu": "8"}
    assert worker["resources"] == {"requests": limits, "limits": limits}
    (head,) = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert head["image"] == worker["image"] == "registry/svfap:1"
    path = re.search(r"\S+recipe\.toml", spec["entrypoint"])[0]
    assert path.startswith(head["volumeMounts"][0]["mountPath"])
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "600"


@pytest.mark.parametrize(("least", "nodes"), [(0, 4), (8, 1), (9, 2), (32, 4)])
def test_an_elastic_run_needs_the_pods_of_its_smallest_group(least, nodes):
    pods = Kubernetes("registry/svfap:1", nodes=4, gpus_per_node=8)
    overrides = [*PLACES, f"cluster.min_workers={least}"]
    _, _, ray_job = rendered("svfap_base_voxceleb2", overrides, pods)
    (group,) = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (nodes, 4, 4)


def test_a_pod_has_memory_for_the_ranks_of_the_smallest_group():
    """They hold more clips each."""

    def memory(least: int) -> int:
        config = recipe.load(
            "svfap_base_voxceleb2", [f"cluster.min_workers={least}", "cluster.num_workers=32"]
        )
        return kubernetes._pod_bytes(config, 8)

    assert memory(8) > memory(32) == memory(0)


def test_a_recipe_with_a_task_is_fine_tuned():
    _, _, ray_job = rendered("finetune_dfew", PLACES, Kubernetes("svfap", gpus_per_node=4))
    assert "svfap_dist finetune /etc/svfap/recipe.toml" in ray_job["spec"]["entrypoint"]


def worker_pod(ray_job: Any) -> Any:
    return templates(ray_job)[1]["spec"]


def gib(ray_job: Any) -> int:
    memory = worker_pod(ray_job)["containers"][0]["resources"]["limits"]["memory"]
    return int(memory.removesuffix("Gi"))


def test_the_memory_of_a_pod_grows_with_its_ranks_and_their_workers():
    """64 GiB for any number of ranks were too few for 8: the pod is killed, as if a rank died."""

    def of(ranks: int, *overrides: str) -> int:
        pods = Kubernetes("svfap", gpus_per_node=ranks)
        return gib(rendered("svfap_base_voxceleb2", [*PLACES, *overrides], pods)[2])

    assert of(8) > 64 > of(1)
    assert of(8) - of(4) >= 4 * 5  # more than a rank's own processes
    assert of(8, "data.decode_workers=30") > of(8)
    larger = ["train.global_batch_size=2048", "train.micro_batch_size=256"]
    assert of(8, *larger) > of(8)  # at least two batches are buffered
    assert of(8, f"data.read_ahead_bytes={16 << 30}") >= 8 * 16 + 40
    assert of(8, "data.colors=workers") > of(8) + 30  # they import torch


def test_the_object_store_of_ray_does_not_take_a_third_of_the_pod():
    _, _, ray_job = rendered("svfap_base_voxceleb2", PLACES, Kubernetes("svfap"))
    (group,) = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert int(group["rayStartParams"]["object-store-memory"]) == 1 << 30


def test_pods_with_rdma_may_lock_memory_and_use_the_nodes_network():
    plain = worker_pod(rendered("svfap_base_voxceleb2", PLACES, Kubernetes("svfap"))[2])
    assert plain["hostNetwork"] is False
    assert plain["containers"][0]["securityContext"] == {}
    pods = Kubernetes("svfap", rdma="rdma/hca_shared_devices_a", host_network=True)
    found = worker_pod(rendered("svfap_base_voxceleb2", PLACES, pods)[2])
    assert (found["hostNetwork"], found["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
    (container,) = found["containers"]
    assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
    assert container["resources"]["limits"]["rdma/hca_shared_devices_a"] == "1"


def fields(required: list[str], **properties: Any) -> dict[str, Any]:
    """An object that has no other fields."""
    return {
        "type": "object",
        "required": required,
        "properties": properties,
        "additionalProperties": False,
    }


TEXT, WHOLE, YES_OR_NO = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
POD = {"type": "object", "required": ["spec"]}  # which Kubernetes' own schema checks
# The fields of ray.io/v1's RayJob (KubeRay's ray-operator/apis/ray/v1) that the RayJob may use,
# with their types and the operator's rules. The API server drops unknown fields without an error.
RAY_JOB = fields(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=fields(["name"], name={"type": "string", "maxLength": 47}, labels=TEXTS),
    spec=fields(
        ["entrypoint", "rayClusterSpec"],
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
        entrypoint=TEXT,
        runtimeEnvYAML=TEXT,
        suspend=YES_OR_NO,
        shutdownAfterJobFinishes={"const": True},  # Kueue refuses other jobs, and so does a TTL
        ttlSecondsAfterFinished=WHOLE,
        activeDeadlineSeconds=WHOLE,
        backoffLimit=WHOLE,
        submitterConfig=fields([], backoffLimit=WHOLE),
        rayClusterSpec=fields(
            ["headGroupSpec", "workerGroupSpecs"],
            rayVersion=TEXT,
            enableInTreeAutoscaling=YES_OR_NO,
            authOptions=fields(["mode"], mode={"enum": ["disabled", "token"]}),
            headGroupSpec=fields(
                ["rayStartParams", "template"], rayStartParams=TEXTS, template=POD
            ),
            workerGroupSpecs={
                "type": "array",
                "minItems": 1,
                "maxItems": 7,  # Kueue's limit, beside the head
                "items": fields(
                    ["groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"],
                    groupName=TEXT,
                    replicas=WHOLE,
                    minReplicas=WHOLE,
                    maxReplicas=WHOLE,
                    numOfHosts=WHOLE,
                    rayStartParams=TEXTS,
                    template=POD,
                ),
            },
        ),
    ),
)


@pytest.mark.parametrize("name", ["tiny_cpu", "svfap_base_voxceleb2", "finetune_dfew"])
@pytest.mark.parametrize("options", [{}, {"queue": "research", "rdma": "rdma/hca"}])
def test_every_field_of_the_rayjob_is_one_of_kuberay(name, options):
    _, _, ray_job = rendered(name, PLACES, Kubernetes("svfap", nodes=2, gpus_per_node=2, **options))
    jsonschema.validate(ray_job, RAY_JOB)
    for change in ({"backOffLimit": 3}, {"suspend": "true"}, {"backoffLimit": "3"}):
        wrong = {**ray_job, "spec": {**ray_job["spec"], **change}}
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, RAY_JOB)
    (group,) = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_a_job_in_a_queue_waits_for_kueue():
    _, _, queued = rendered("tiny_cpu", PLACES, Kubernetes("svfap", queue="research"))
    assert queued["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    assert queued["spec"]["suspend"] is True
    _, _, at_once = rendered("tiny_cpu", PLACES, Kubernetes("svfap"))
    assert at_once["metadata"]["labels"] == {"app.kubernetes.io/name": "svfap"}
    assert at_once["spec"]["suspend"] is False
    with pytest.raises(ConfigError, match=r"--queue.*Team A.*LocalQueue"):
        Kubernetes("svfap", queue="Team A").prepare("tiny_cpu", PLACES)


@pytest.mark.parametrize("name", ["tiny_cpu", "svfap_base_voxceleb2"])
@pytest.mark.parametrize("network", [{}, {"rdma": "rdma/hca", "host_network": True}])
def test_every_pod_and_the_config_map_are_what_kubernetes_knows(name, network):
    pods = Kubernetes("svfap", nodes=2, gpus_per_node=2, **network)
    _, config_map, ray_job = rendered(name, PLACES, pods)
    kubernetes_validate.validate(config_map, KUBERNETES, strict=True)
    found = templates(ray_job)
    assert len(found) == 2
    for template in found:
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_the_overlay_patches_what_is_rendered():
    text = (bundled.folder("launch/kubernetes") / "overlay/kustomization.yaml").read_text()
    overlay = yaml.safe_load(text)
    (patch,) = overlay["patches"]
    _, _, ray_job = rendered("svfap_base_voxceleb2", PLACES, Kubernetes("svfap"))
    target = patch["target"]
    assert f"{target['group']}/{target['version']}" == ray_job["apiVersion"]
    assert target["kind"] == ray_job["kind"]
    for operation in yaml.safe_load(patch["patch"]):
        *above, name = operation["path"].lstrip("/").split("/")
        place = ray_job
        for step in above:
            place = place[int(step) if isinstance(place, list) else step]
        assert operation["op"] == "add"
        assert name not in place
        place[name] = operation["value"]
    jsonschema.validate(ray_job, RAY_JOB)
    for template in templates(ray_job):
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_a_run_on_cpus_requests_no_gpu():
    _, _, ray_job = rendered("tiny_cpu", PLACES, Kubernetes("svfap"))
    assert "nvidia" not in yaml.dump(ray_job)


def test_names_are_kubernetes_names_and_new_each_time():
    names = {
        Kubernetes()
        .prepare("tiny_cpu", [*PLACES, "run.name=Base_Run (2)!" + "x" * 80])
        .content.name
        for _ in range(3)
    }
    assert len(names) == 3
    for name in names:
        assert re.fullmatch(r"base-run-2-x+-[0-9a-f]{6}", name)
        assert len(name) <= 47


def test_ranks_that_cannot_share_the_lanes_are_refused():
    with pytest.raises(ConfigError, match="3 ranks"):
        Kubernetes(nodes=3).prepare("tiny_cpu", PLACES)


@pytest.mark.parametrize(
    ("status", "ended", "words"),
    [
        ("{}", False, "Initializing"),
        (
            '{"status": {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}}',
            False,
            "RUNNING",
        ),
        (
            '{"status": {"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}}',
            True,
            "STOPPED",
        ),
        ('{"status": {"jobDeploymentStatus": "Failed", "message": "gone"}}', True, "gone"),
    ],
)
def test_what_a_rayjob_says_of_itself(status, ended, words):
    found = kubernetes._read(Job("kubernetes", "a"), status)
    assert found.ended == ended
    assert words in found.lines()[0]
