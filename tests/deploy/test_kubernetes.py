"""deploy/kubernetes: valid for two versions of Kubernetes, restricted, and naming only what exists."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from service.operations.settings import Settings
from tests.conftest import ROOT

FOLDER = ROOT / "deploy/kubernetes"
OUTSIDE = {"ServiceMonitor", "InferenceService"}  # their schemas are those of other projects
VERSIONS = ("1.33", "1.37")
BESIDE = {"MODELS_STORE", "MODEPATH_CACHE", "MODEPATH_CACHE_GIB"}  # read by the store, not by the service's settings


def manifests() -> Iterator[tuple[str, dict[str, Any]]]:
    for file in sorted(FOLDER.glob("*.yaml")):
        for one in yaml.safe_load_all(file.read_text()):
            if "kind" in one and one["kind"] != "Kustomization":
                yield file.name, one


ALL = dict(manifests())
[DEPLOYMENT] = [one for one in ALL.values() if one["kind"] == "Deployment"]
POD = DEPLOYMENT["spec"]["template"]
[CONTAINER] = POD["spec"]["containers"]
PREDICTOR = ALL["inference-service.yaml"]["spec"]["predictor"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("file", [file for file, one in ALL.items() if one["kind"] not in OUTSIDE])
def test_a_manifest_is_valid_and_has_no_unknown_field(file, version):
    kubernetes = pytest.importorskip("kubernetes_validate", reason="it is part of the dev extra")
    kubernetes.validate(ALL[file], version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_pod_of_kserve_is_a_valid_pod(version):
    kubernetes = pytest.importorskip("kubernetes_validate", reason="it is part of the dev extra")
    spec = {name: value for name, value in PREDICTOR.items() if name not in ("minReplicas", "maxReplicas")}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": spec}
    kubernetes.validate(pod, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_component_for_a_bucket_applies_and_leaves_no_trace_of_the_volume(version):
    jsonpatch = pytest.importorskip("jsonpatch", reason="it comes with moto's server")
    kubernetes = pytest.importorskip("kubernetes_validate", reason="it is part of the dev extra")
    component = yaml.safe_load((FOLDER / "bucket/kustomization.yaml").read_text())
    found = {}
    for one in component["patches"]:
        [target] = [other for other in ALL.values() if other["kind"] == one["target"]["kind"]]
        patched = jsonpatch.apply_patch(target, yaml.safe_load(one["patch"]))
        kubernetes.validate(patched, version, strict=True)
        found[target["kind"]] = patched
    pod = found["Deployment"]["spec"]["template"]["spec"]
    names = {volume["name"] for volume in pod["volumes"]}
    assert "store" not in names
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == names
    given = {one["name"]: one.get("value") for one in pod["containers"][0]["env"]}
    assert given["MODELS_STORE"].startswith("s3://")
    assert given.keys() - {one["name"] for one in CONTAINER["env"]} <= BESIDE
    [scratch] = [volume for volume in pod["volumes"] if volume["name"] == "scratch"]
    assert int(given["MODEPATH_CACHE_GIB"]) < int(scratch["emptyDir"]["sizeLimit"].removesuffix("Gi"))


def test_the_image_has_what_the_manifest_asks_for():
    bento = pytest.importorskip("deploy.bento")
    extras = bento._extras(SimpleNamespace(input=SimpleNamespace(tokenizer=False)))
    assert {"grpc", "postgres", "remote"} <= set(extras)


def test_kustomize_finds_its_files_and_the_image():
    kustomization = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    assert all((FOLDER / name).is_file() for name in kustomization["resources"])
    assert [image["name"] for image in kustomization["images"]] == [CONTAINER["image"]]
    [namespace] = [one for one in ALL.values() if one["kind"] == "Namespace"]
    assert namespace["metadata"]["name"] == kustomization["namespace"]
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize(("pod", "container"), [(POD["spec"], CONTAINER), (PREDICTOR, PREDICTOR["containers"][0])])
def test_a_pod_is_restricted(pod, container):
    # The rules of the pod security standard "restricted".
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    own = container["securityContext"]
    assert own["allowPrivilegeEscalation"] is False
    assert own["capabilities"]["drop"] == ["ALL"]
    assert own["readOnlyRootFilesystem"] is True
    assert pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert all({"emptyDir", "secret", "persistentVolumeClaim"} & volume.keys() for volume in pod["volumes"])


@pytest.mark.parametrize("container", [CONTAINER, PREDICTOR["containers"][0]])
def test_settings_exist_and_have_valid_values(container, monkeypatch, tmp_path):
    known = {f"MODEPATH_{name.upper()}" for name in Settings.model_fields} | {"MODEPATH_HOST", "MODEPATH_PORT"}
    given = {one["name"]: one.get("value") for one in container["env"]}
    assert given.keys() <= known | BESIDE
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    for name, value in given.items():
        if value is None or name in BESIDE:
            continue
        if value.startswith("/"):
            assert any(value.startswith(mount + "/") for mount in mounts), name
            (tmp_path / name).write_text("x" * 32)
            value = str(tmp_path / name)
        monkeypatch.setenv(name, value)
    assert Settings().workers == 1


def test_ports_are_those_that_the_service_listens_on():
    environment = {one["name"]: one.get("value") for one in CONTAINER["env"]}
    ports = {port["name"]: str(port["containerPort"]) for port in CONTAINER["ports"]}
    assert ports == {
        "http": environment["MODEPATH_PORT"], "grpc": environment["MODEPATH_GRPC_PORT"], "metrics": environment["MODEPATH_METRICS_PORT"],
    }  # fmt: skip
    service = ALL["service.yaml"]
    named = {port["name"] for port in service["spec"]["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} == named == ports.keys()
    [endpoint] = ALL["service-monitor.yaml"]["spec"]["endpoints"]
    assert endpoint["port"] in named
    policy = ALL["network.yaml"]["spec"]
    assert {port["port"] for rule in policy["ingress"] for port in rule["ports"]} == ports.keys()
    probes = [CONTAINER[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")]
    assert {(probe["path"], probe["port"]) for probe in probes} == {("/livez", "http"), ("/readyz", "http")}
    [kserve] = PREDICTOR["containers"][0]["ports"]
    own = {one["name"]: one.get("value") for one in PREDICTOR["containers"][0]["env"]}
    assert str(kserve["containerPort"]) == own["MODEPATH_PORT"]


def test_everything_selects_the_same_pods():
    labels = POD["metadata"]["labels"]
    assert DEPLOYMENT["spec"]["selector"]["matchLabels"] == labels
    assert ALL["service.yaml"]["spec"]["selector"] == labels
    assert ALL["disruptions.yaml"]["spec"]["selector"]["matchLabels"] == labels
    assert ALL["network.yaml"]["spec"]["podSelector"]["matchLabels"] == labels
    assert ALL["service-monitor.yaml"]["spec"]["selector"]["matchLabels"] == ALL["service.yaml"]["metadata"]["labels"]
    assert all(one["labelSelector"]["matchLabels"] == labels for one in POD["spec"]["topologySpreadConstraints"])
    assert ALL["autoscaler.yaml"]["spec"]["scaleTargetRef"]["name"] == DEPLOYMENT["metadata"]["name"]
    assert "replicas" not in DEPLOYMENT["spec"], "each rollout would reset what the autoscaler chose"


def test_the_autoscaler_follows_a_metric_that_the_adapter_makes_of_one_of_the_service():
    cpu, metric = ALL["autoscaler.yaml"]["spec"]["metrics"]
    assert cpu["resource"]["name"] == "cpu"
    assert "cpu" in CONTAINER["resources"]["requests"], "utilisation is a share of what is requested"
    adapter = yaml.safe_load((FOLDER / "prometheus-adapter.yaml").read_text())
    [rule] = adapter["rules"]["custom"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert "queue_seconds" in (ROOT / "service/operations/metrics.py").read_text()
    assert rule["seriesQuery"].startswith("modepath_queue_seconds_sum{")


def test_a_pod_ends_before_it_is_killed():
    environment = {one["name"]: one.get("value") for one in CONTAINER["env"]}
    pause = int(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    assert POD["spec"]["terminationGracePeriodSeconds"] > pause + float(environment["MODEPATH_GRACE_SECONDS"])
    image = (ROOT / "deploy/Containerfile").read_text()
    assert f"USER {POD['spec']['securityContext']['runAsUser']}" in image
