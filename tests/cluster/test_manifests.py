"""The manifests are what Kubernetes and KubeRay accept, run this version, and fit the jobs that they name."""

from __future__ import annotations

import copy
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ray.scripts.scripts import start as ray_start

from ndreamer_dist.compute.executor import check_layout
from ndreamer_dist.settings import Settings
from tests.cluster import sizing
from tests.cluster.manifests import (
    CLUSTER,
    ISOLATION,
    OVERLAYS,
    ROOT,
    Document,
    built,
    cluster_spec,
    containers,
    gibibytes,
    one,
    pinned,
    pod_templates,
    ray_pods,
)

JOBS = ("pvc", "s3")
IN_IMAGE = "/opt/ndreamer/"
KUBERNETES = ("1.31", "1.34", kubernetes_validate.latest_version())


@pytest.fixture(scope="module", params=[*OVERLAYS, "isolated-job", "isolated-cluster"])
def found(request: pytest.FixtureRequest) -> list[Document]:
    """What an overlay holds, as it is, and with Ray's resource isolation."""
    if request.param.startswith("isolated"):
        return built(
            CLUSTER / "overlays" / {"isolated-job": "pvc"}.get(request.param, "interactive-s3"), also=(ISOLATION,)
        )
    return built(CLUSTER / "overlays" / request.param)


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> tuple[str, list[Document]]:
    return request.param, built(CLUSTER / "overlays" / request.param)


def jobs_module() -> ModuleType:
    """Return jobs/run_cohort.py, the program that the manifests name."""
    spec = importlib.util.spec_from_file_location("run_cohort", ROOT / "jobs" / "run_cohort.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its classes look their types up
    spec.loader.exec_module(module)
    return module


# --- as kustomize, Kubernetes and KubeRay see them -------------------------------------------------------------------


@pytest.mark.skipif(
    not (shutil.which("kubectl") or shutil.which("kustomize")), reason="neither kustomize nor kubectl here"
)
def test_kustomize_builds_what_these_tests_look_at(overlay: tuple[str, list[Document]]) -> None:
    name, ours = overlay
    command = ["kustomize", "build"] if shutil.which("kustomize") else ["kubectl", "kustomize"]
    said = subprocess.run(
        [*command, str(CLUSTER / "overlays" / name)], capture_output=True, text=True, check=True
    ).stdout
    theirs = [document for document in yaml.safe_load_all(said) if document]

    def by_name(found: list[Document]) -> dict[tuple[str, str], Document]:
        return {(document["kind"], document["metadata"]["name"]): document for document in found}

    assert by_name(ours) == by_name(theirs)


@pytest.mark.parametrize("version", KUBERNETES)
def test_every_object_and_every_pod_fits_the_schema_of_kubernetes(found: list[Document], version: str) -> None:
    checked = 0
    for document in found:
        if document["apiVersion"] != "ray.io/v1":
            kubernetes_validate.validate(document, version, strict=True)
        for template in pod_templates(document):
            pod = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": "pod", **template["metadata"]},
                "spec": template["spec"],
            }
            kubernetes_validate.validate(pod, version, strict=True)
            checked += 1
    assert checked >= 4


def test_a_misspelled_field_of_a_pod_would_be_found() -> None:
    template = next(pod_templates(built(CLUSTER / "overlays" / "pvc")))
    spec = {**template["spec"], "toleration": []}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}, KUBERNETES[0], strict=True
        )


ANY: Any = object()
KUBERAY: dict[str, dict[str, Any]] = {
    "RayJob": {
        "activeDeadlineSeconds": int, "backoffLimit": int, "entrypoint": str, "entrypointNumCpus": float, "jobId": str,
        "preRunningDeadlineSeconds": int, "rayClusterSpec": "RayCluster", "runtimeEnvYAML": str,
        "shutdownAfterJobFinishes": bool, "submitterConfig": "SubmitterConfig", "submitterPodTemplate": ANY,
        "submissionMode": ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"), "suspend": bool,
        "ttlSecondsAfterFinished": int,
    },
    "SubmitterConfig": {"backoffLimit": int},
    "RayCluster": {
        "authOptions": "AuthOptions", "autoscalerOptions": "AutoscalerOptions", "enableInTreeAutoscaling": bool,
        "gcsFaultToleranceOptions": "GcsFaultToleranceOptions", "headGroupSpec": "HeadGroupSpec", "rayVersion": str,
        "suspend": bool, "workerGroupSpecs": ["WorkerGroupSpec"],
    },
    "AuthOptions": {"mode": ("disabled", "token"), "secretName": str, "enableK8sTokenAuth": bool},
    "AutoscalerOptions": {
        "idleTimeoutSeconds": int, "imagePullPolicy": ("Always", "IfNotPresent", "Never"), "resources": ANY,
        "securityContext": ANY, "upscalingMode": ("Default", "Aggressive", "Conservative"), "version": ("v1", "v2"),
        "env": ANY, "envFrom": ANY, "volumeMounts": ANY,
    },
    "GcsFaultToleranceOptions": {
        "externalStorageNamespace": str, "redisAddress": str, "redisPassword": "RedisCredential",
        "redisUsername": "RedisCredential",
    },
    "RedisCredential": {"value": str, "valueFrom": ANY},
    "HeadGroupSpec": {
        "enableIngress": bool, "headService": ANY, "labels": dict, "rayStartParams": dict, "resources": dict,
        "serviceType": str, "template": ANY,
    },
    "WorkerGroupSpec": {
        "groupName": str, "idleTimeoutSeconds": int, "labels": dict, "maxReplicas": int, "minReplicas": int,
        "numOfHosts": int, "rayStartParams": dict, "replicas": int, "resources": dict, "template": ANY,
    },
}  # fmt: skip
"""Fields of KubeRay's own kinds, with their types (ray.io/v1 of KubeRay 1.6); pods inside them are Kubernetes' to check."""


def misfits(value: Any, kind: Any, where: str) -> list[str]:
    """Return the places where a value does not fit KubeRay's fields."""
    if kind is ANY:
        return []
    if isinstance(kind, list):
        return [each for i, part in enumerate(value) for each in misfits(part, kind[0], f"{where}/{i}")]
    if isinstance(kind, tuple):
        return [] if value in kind else [f"{where}: {value!r} is none of {kind}"]
    if isinstance(kind, type):
        return [] if isinstance(value, kind) else [f"{where}: {value!r} is no {kind.__name__}"]
    unknown = [f"{where}: there is no field {name!r}" for name in value if name not in KUBERAY[kind]]
    known = [(name, part) for name, part in value.items() if name in KUBERAY[kind]]
    return unknown + [each for name, part in known for each in misfits(part, KUBERAY[kind][name], f"{where}/{name}")]


def test_rays_own_kinds_hold_fields_that_kuberay_knows(found: list[Document]) -> None:
    own = [document for document in found if document["apiVersion"] == "ray.io/v1"]
    assert len(own) == 1
    for document in own:
        assert misfits(document["spec"], document["kind"], document["kind"]) == []
        broken = copy.deepcopy(document["spec"])
        (broken.get("rayClusterSpec") or broken)["authOption"] = {}
        assert misfits(broken, document["kind"], document["kind"]) != []


def test_what_kuberays_operator_refuses_is_not_there(found: list[Document]) -> None:
    own = next(document for document in found if document["apiVersion"] == "ray.io/v1")
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", own["metadata"]["name"])
    assert len(own["metadata"]["name"]) <= 47
    spec = cluster_spec(found)
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups:
        assert group["template"]["spec"].get("restartPolicy", "Never") == "Never"  # autoscaler v2
        assert not (
            "resources" in group and set(group["rayStartParams"]) & {"num-cpus", "num-gpus", "memory", "resources"}
        )
        assert not set(group["rayStartParams"]) & {"labels", "redis-password", "redis-username"}
    names = {variable["name"] for variable in spec["headGroupSpec"]["template"]["spec"]["containers"][0].get("env", [])}
    assert not names & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME", "RAY_enable_autoscaler_v2"}
    for group in spec["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_every_word_for_ray_start_is_one_that_it_takes(found: list[Document]) -> None:
    spec = cluster_spec(found)
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        words = ["--head"] if group is spec["headGroupSpec"] else ["--address", "head:6379"]
        for name, value in group["rayStartParams"].items():
            assert isinstance(value, str)
            words += [f"--{name}"] if value == "true" else [f"--{name}={value}"]  # as KubeRay writes them
        ray_start.make_context("start", words)


# --- what was asked of them ------------------------------------------------------------------------------------------


def test_every_image_is_of_this_version_and_of_the_ray_that_was_tested(found: list[Document]) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert cluster_spec(found)["rayVersion"] == pinned("ray")
    for pod, template in ray_pods(found).items():
        (container,) = template["spec"]["containers"]
        target = "gpu" if pod == "trainers" else "cpu"
        assert container["image"].endswith(f"/ndreamer-dist:{version}-ray{pinned('ray')}-{target}")
    for container in [container for document in found for container in containers(document)]:
        name, _, tag = container["image"].rpartition(":")
        assert name
        assert re.match(r"\d+\.\d+\.\d+", tag), container["image"]


def test_the_head_has_no_processor_and_a_job_asks_for_none(found: list[Document]) -> None:
    spec = cluster_spec(found)
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for document in found:
        if document["kind"] == "RayJob":
            assert not set(document["spec"]) & {"entrypointNumCpus", "entrypointNumGpus", "entrypointResources"}


def test_readers_and_trainers_are_apart_and_gpus_are_asked_for_limited_and_tolerated(found: list[Document]) -> None:
    spec = cluster_spec(found)
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    pods = ray_pods(found)
    assert list(pods) == ["head", "readers", "trainers"]
    for pod, template in pods.items():
        resources = template["spec"]["containers"][0]["resources"]
        assert (
            resources["requests"] == resources["limits"]
        )  # guaranteed: nobody else's pod takes what this one was promised
        assert ("nvidia.com/gpu" in resources["limits"]) == (pod == "trainers")
        tolerated = [each["key"] for each in template["spec"].get("tolerations", [])]
        assert tolerated == (["nvidia.com/gpu"] if pod == "trainers" else [])


def test_a_job_ends_its_cluster_and_is_tried_again_from_storage_that_outlives_it() -> None:
    for name in JOBS:
        found = built(CLUSTER / "overlays" / name)
        spec = one(found, "RayJob")["spec"]
        assert spec["shutdownAfterJobFinishes"] is True
        assert spec["ttlSecondsAfterFinished"] > 0
        assert spec["backoffLimit"] > 0
        assert spec["activeDeadlineSeconds"] > spec["preRunningDeadlineSeconds"]
        job = jobs_module().read_job(str(CLUSTER / "overlays" / name / "cohort.yaml"))
        assert not hasattr(job, "fresh")  # which would start over at every retry
        outside = {mount["mountPath"] for mount in lasting_mounts(found)}
        assert job.out.startswith("s3://") or any(job.out.startswith(f"{path}/") for path in outside)


def lasting_mounts(found: list[Document]) -> list[Document]:
    """Return the mounts, common to all Ray pods, of volumes that outlive them."""
    mounts = []
    for template in ray_pods(found).values():
        lasting = {each["name"] for each in template["spec"]["volumes"] if "persistentVolumeClaim" in each}
        mounts.append([m for m in template["spec"]["containers"][0]["volumeMounts"] if m["name"] in lasting])
    return [mount for mount in mounts[0] if all(mount in others for others in mounts)]


def test_the_entry_point_is_a_program_of_the_image_and_its_job_file_is_where_it_looks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program_of_jobs, asked = jobs_module(), list[Any]()
    monkeypatch.setattr(program_of_jobs, "run_program", lambda work: work())
    monkeypatch.setattr(program_of_jobs, "read_job", asked.append)  # which the image has, and this machine has not
    monkeypatch.setattr(program_of_jobs, "run_job", lambda job, stage: asked.append(stage))
    for name in JOBS:
        found = built(CLUSTER / "overlays" / name)
        python, program, *words = shlex.split(one(found, "RayJob")["spec"]["entrypoint"])
        assert python == "python"
        asked.clear()
        program_of_jobs.main(arguments=words)
        (path, stage) = asked
        assert stage is None  # the whole job
        assert (ROOT / program.removeprefix(IN_IMAGE)).is_file()
        head = ray_pods(found)["head"]["spec"]
        volumes = {each["name"]: each["configMap"]["name"] for each in head["volumes"] if "configMap" in each}
        mounted = {
            m["mountPath"]: volumes[m["name"]] for m in head["containers"][0]["volumeMounts"] if m["name"] in volumes
        }
        folder, _, file = path.rpartition("/")
        config = one(found, "ConfigMap")
        assert mounted[folder] == config["metadata"]["name"]
        assert file in config["data"]


def test_numbers_of_a_job_file_are_names_as_everywhere() -> None:
    values = {"input": "/a", "out": "/b", "condition_key": "disease", "control": 0, "batch_key": [1]}
    job = jobs_module().checked_job(values, "job.yaml")
    assert (job.control, job.batch_key) == ("0", ("1",))


def test_the_job_file_is_one_that_the_job_takes_and_that_the_cluster_can_hold(
    overlay: tuple[str, list[Document]], tmp_path: Path
) -> None:
    name, found = overlay
    (tmp_path / "cohort.yaml").write_text(one(found, "ConfigMap")["data"]["cohort.yaml"])
    job = jobs_module().read_job(str(tmp_path / "cohort.yaml"))
    settings = Settings.build(preset=job.preset, overrides=job.overrides())
    mounts = [mount["mountPath"] for mount in lasting_mounts(found)]
    for place in (job.input, job.out):
        assert place.startswith("s3://") if name.endswith("s3") else place.startswith(f"{mounts[0]}/")
    readers, trainers = cluster_spec(found)["workerGroupSpecs"]
    assert settings.run.cpus == readers["maxReplicas"] * int(limits(readers)["cpu"])
    on_a_node = int(limits(trainers)["nvidia.com/gpu"])
    assert settings.run.gpus == trainers["maxReplicas"] * on_a_node
    assert settings.train.workers == 1
    assert (
        int(trainers["rayStartParams"]["num-cpus"]) >= on_a_node
    )  # outside of training each GPU's process asks for one
    check_layout(settings.train, settings.run.cpus, lambda: settings.run.gpus)


def limits(group: Document) -> Document:
    return group["template"]["spec"]["containers"][0]["resources"]["limits"]


def test_the_pods_hold_what_is_promised_for_a_million_cells(found: list[Document]) -> None:
    readers, trainers = cluster_spec(found)["workerGroupSpecs"]
    million = sizing.EXAMPLES[0]
    assert million.reader_cpus == int(limits(readers)["cpu"])
    assert gibibytes(limits(readers)["memory"]) >= sizing.reader_bytes(million)
    assert gibibytes(limits(trainers)["memory"]) >= sizing.trainer_bytes(million)
    assert gibibytes(limits(cluster_spec(found)["headGroupSpec"])["memory"]) >= 2 * sizing.head_bytes(million)


def test_no_secret_is_written_down_and_every_ray_pod_is_behind_the_token(found: list[Document]) -> None:
    assert not [document for document in found if document["kind"] == "Secret"]
    assert cluster_spec(found)["authOptions"] == {"mode": "token", "secretName": "ndreamer-ray-token"}
    for container in [container for document in found for container in containers(document)]:
        for variable in container.get("env", []):
            assert "valueFrom" in variable or not re.search("TOKEN|PASSWORD|SECRET|KEY", variable["name"])


def test_s3_keys_come_from_a_secret_into_every_pod_that_reads() -> None:
    for name in ("s3", "interactive-s3"):
        for template in ray_pods(built(CLUSTER / "overlays" / name)).values():
            assert template["spec"]["containers"][0]["envFrom"] == [{"secretRef": {"name": "ndreamer-s3"}}]


def test_no_pod_runs_as_root_or_can_become_it(found: list[Document]) -> None:
    for template in [template for document in found for template in pod_templates(document)]:
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        assert template["spec"]["securityContext"]["runAsUser"] > 0
        for container in template["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_only_the_projects_pods_and_the_operator_reach_the_pods(found: list[Document]) -> None:
    policy = one(found, "NetworkPolicy")["spec"]
    selected = policy["podSelector"]["matchLabels"]
    for template in [template for document in found for template in pod_templates(document)]:
        assert selected.items() <= template["metadata"]["labels"].items()
    assert policy["policyTypes"] == ["Ingress"]
    ports = [port["port"] for rule in policy["ingress"] for port in rule.get("ports", [])]
    dashboards = [
        port for port in ray_pods(found)["head"]["spec"]["containers"][0]["ports"] if port["name"] == "dashboard"
    ]
    assert ports == [dashboards[0]["containerPort"]]


def test_the_cluster_that_stays_has_the_jobs_pods_and_keeps_what_its_head_knows() -> None:
    for storage in ("pvc", "s3"):
        job = cluster_spec(built(CLUSTER / "overlays" / storage))
        found = built(CLUSTER / "overlays" / f"interactive-{storage}")
        stays = dict(cluster_spec(found))
        redis = stays.pop("gcsFaultToleranceOptions")
        assert stays == job
        service, server = one(found, "Service"), one(found, "StatefulSet")
        port = service["spec"]["ports"][0]["port"]
        assert redis["redisAddress"] == f"redis://{service['metadata']['name']}:{port}"
        labels = server["spec"]["template"]["metadata"]["labels"]
        assert service["spec"]["selector"].items() <= labels.items()
        (container,) = containers(server)
        assert container["env"][0]["valueFrom"] == redis["redisPassword"]["valueFrom"]


def test_redis_is_told_what_it_takes_and_where_it_may_write() -> None:
    for storage in ("pvc", "s3"):
        (container,) = containers(one(built(CLUSTER / "overlays" / f"interactive-{storage}"), "StatefulSet"))
        words = container["args"]
        told = dict(zip(words[::2], words[1::2], strict=True))
        assert told.keys() == {"--requirepass", "--appendonly", "--dir"}  # of redis.conf, each of one value
        (variable,) = re.findall(r"^\$\((\w+)\)$", told["--requirepass"])
        assert variable in {each["name"] for each in container["env"]}
        assert told["--appendonly"] in {"yes", "no"}
        # Its own file system is read-only: whatever it keeps is on the claim.
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert told["--dir"] in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_resource_isolation_is_one_line_away() -> None:
    for name in OVERLAYS:
        assert "resource-isolation" in (CLUSTER / "overlays" / name / "kustomization.yaml").read_text()
    for base in ("pvc", "interactive-pvc"):
        spec = cluster_spec(built(CLUSTER / "overlays" / base, also=(ISOLATION,)))
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            assert group["rayStartParams"]["enable-resource-isolation"] == "true"
