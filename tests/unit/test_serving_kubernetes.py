"""serving/deploy/kubernetes keeps to the schemas, and names flags, variables, routes and ports that there are."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonpatch
import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml

from namesake_serving import __main__ as serving
from namesake_serving import settings
from tests.unit.test_serving_gateway import OPEN

KUBERNETES = Path(__file__).parents[2] / "serving" / "deploy" / "kubernetes"
RELEASES = ("1.30", kubernetes_validate.latest_version())
SCHEMAS = yaml.safe_load((Path(__file__).parent / "custom_resources.yaml").read_text(encoding="utf-8"))

OTHERS = {
    *("MLFLOW_TRACKING_URI", "NAMESAKE_CACHE"),  # docs/guide/reference/settings.md
    *("VLLM_CACHE_ROOT", "VLLM_CPU_OMP_THREADS_BIND"),  # vllm/envs.py
    *("HOME", "OMP_NUM_THREADS", "RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"),
}
"""Variables of others; a test finds those of vLLM and of the settings page where they are said."""

Json = dict[str, Any]


def read(path: Path) -> list[Json]:
    """The documents of a file."""
    return [one for one in yaml.safe_load_all(path.read_text(encoding="utf-8")) if one]


def rendered(variant: str) -> list[Json]:
    """What ``kubectl apply -k`` would send, by the few rules of kustomize that the files use."""
    (given,) = read(KUBERNETES / variant / "kustomization.yaml")
    made: list[Json] = []
    for name in given["resources"]:
        path = KUBERNETES / variant / name
        made += rendered(path.resolve().name) if path.is_dir() else read(path)
    for labels in given.get("labels", []):
        for one in made:
            one["metadata"].setdefault("labels", {}).update(labels["pairs"])
            if one["kind"] == "Service":
                one["spec"].setdefault("selector", {}).update(labels["pairs"])
            else:
                one["spec"].setdefault("selector", {}).setdefault("matchLabels", {}).update(labels["pairs"])
                for inner in (one["spec"]["template"], *one["spec"]["volumeClaimTemplates"]):
                    inner.setdefault("metadata", {}).setdefault("labels", {}).update(labels["pairs"])
    for patch in given.get("patches", []):
        found = [one for one in made if (one["kind"], one["metadata"]["name"]) == tuple(patch["target"].values())]
        assert found, patch["target"]
        for one in found:
            jsonpatch.apply_patch(one, yaml.safe_load(patch["patch"]), in_place=True)
    for image in given.get("images", []):
        for container in (container for one in made for container in pod_of(one).get("containers", [])):
            if container["image"] == image["name"]:
                container["image"] = f"{image['newName']}:{image['newTag']}"
    return made


def pod_of(resource: Json) -> Json:
    """The pod of a resource that has one."""
    found = resource["spec"].get("template", {}).get("spec", {})
    assert isinstance(found, dict)
    return found


def kserve() -> Json:
    """The pod that KServe makes of the runtime and the service: the container's variables are joined."""
    (runtime,) = read(KUBERNETES / "kserve" / "servingruntime.yaml")
    (service,) = read(KUBERNETES / "kserve" / "inferenceservice.yaml")
    pod = {key: copy.deepcopy(runtime["spec"][key]) for key in ("containers", "volumes")}
    predictor = service["spec"]["predictor"]
    assert predictor["model"]["runtime"] == runtime["metadata"]["name"]
    formats = {one["name"] for one in runtime["spec"]["supportedModelFormats"]}
    assert predictor["model"]["modelFormat"]["name"] in formats
    pod["containers"][0]["env"] += predictor["model"]["env"]
    words = ("terminationGracePeriodSeconds", "automountServiceAccountToken", "enableServiceLinks")
    text = json.dumps(pod | {key: predictor[key] for key in words})
    made: Json = json.loads(text.replace("{{.Name}}", service["metadata"]["name"]))
    return made


def statefulset(variant: str) -> Json:
    """The pod of a variant, with the claims it is given beside its volumes."""
    (found,) = (one for one in rendered(variant) if one["kind"] == "StatefulSet")
    pod = pod_of(found)
    for claim in found["spec"]["volumeClaimTemplates"]:
        name = claim["metadata"]["name"]
        pod["volumes"].append({"name": name, "persistentVolumeClaim": {"claimName": name}})
    return pod


def rayservice() -> Json:
    """The specification of KubeRay's resource."""
    found: Json = read(KUBERNETES / "kuberay" / "rayservice.yaml")[0]["spec"]
    return found


def groups(service: Json) -> list[Json]:
    """Ray's head and its workers."""
    cluster = service["rayClusterConfig"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def kuberay() -> Json:
    """The pod of a Ray worker, in which a gateway is."""
    found: Json = groups(rayservice())[1]["template"]["spec"]
    return found


def serving_in(pod: Json) -> Json:
    """The container that runs ``namesake serve``; Ray's node is beside it."""
    (found,) = (one for one in pod["containers"] if "args" in one)
    assert isinstance(found, dict)
    return found


PODS = {"cpu": lambda: statefulset("cpu"), "gpu": lambda: statefulset("gpu"), "kserve": kserve, "kuberay": kuberay}


@pytest.fixture(params=PODS)
def pod(request: pytest.FixtureRequest) -> Json:
    """A pod that runs ``namesake serve``."""
    made: Json = PODS[request.param]()
    return made


def valid(pod: Json, release: str) -> None:
    """The pod keeps to the schema of the release, and holds nothing that it does not know."""
    name = {"metadata": {"name": "x"}}
    kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", **name, "spec": pod}, release, strict=True)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("variant", ["cpu", "gpu"])
def test_each_variant_keeps_to_the_schema_of_kubernetes(variant: str, release: str) -> None:
    resources = rendered(variant)
    assert sorted(one["kind"] for one in resources) == ["Service", "StatefulSet"]
    for one in resources:
        kubernetes_validate.validate(one, release, strict=True)


def test_the_schema_finds_what_is_misspelt() -> None:
    pod = statefulset("cpu")
    serving_in(pod)["livenessprobe"] = serving_in(pod).pop("livenessProbe")
    with pytest.raises(kubernetes_validate.ValidationError, match="livenessprobe"):
        valid(pod, RELEASES[0])


def custom() -> Iterator[Json]:
    """KubeRay's and KServe's resources."""
    for folder in ("kuberay", "kserve"):
        for path in sorted((KUBERNETES / folder).glob("*.yaml")):
            yield from (one for one in read(path) if one["kind"] in SCHEMAS)


def pods_in(resource: Json) -> list[Json]:
    """The pods of a resource of theirs."""
    if resource["kind"] == "RayService":
        return [group["template"]["spec"] for group in groups(resource["spec"])]
    return [kserve()] if resource["kind"] == "ServingRuntime" else []


@pytest.mark.parametrize("resource", custom(), ids=lambda one: one["kind"])
def test_custom_resources_keep_to_what_their_operators_define(resource: Json) -> None:
    jsonschema.validate(resource, SCHEMAS[resource["kind"]])
    wrong = copy.deepcopy(resource)
    wrong["spec"]["mistaken"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, SCHEMAS[resource["kind"]])
    for pod in pods_in(resource):
        for release in RELEASES:
            valid(pod, release)


@pytest.mark.parametrize("release", RELEASES)
def test_only_who_is_of_the_ray_cluster_and_has_its_token_reaches_rays_ports(release: str) -> None:
    service, *others = read(KUBERNETES / "kuberay" / "rayservice.yaml")
    for one in (*others, {"apiVersion": "v1", "kind": "Service", **service["spec"]["serveService"]}):
        kubernetes_validate.validate(one, release, strict=True)
    auth = service["spec"]["rayClusterConfig"]["authOptions"]
    container = serving_in(kuberay())  # KubeRay gives it to Ray's own only
    assert {"name": "RAY_AUTH_MODE", "value": auth["mode"]} in container["env"]
    token = {"secretKeyRef": {"name": auth["secretName"], "key": "auth_token"}}
    assert {"name": "RAY_AUTH_TOKEN", "valueFrom": token} in container["env"]
    about = (KUBERNETES / "README.md").read_text(encoding="utf-8")
    assert f"kubectl create secret generic {auth['secretName']} --from-literal=auth_token=" in about
    (policy,) = (one["spec"] for one in others if one["kind"] == "NetworkPolicy")
    labels = [group["template"]["metadata"]["labels"] for group in groups(service["spec"])]
    nodes = {"matchLabels": labels[0]}
    assert labels[0] == labels[1]
    assert (policy["podSelector"], policy["policyTypes"]) == (nodes, ["Ingress"])
    ours = [{"port": one["containerPort"]} for one in container["ports"]]
    among, operator, everybody = policy["ingress"]
    assert (among, everybody) == ({"from": [{"podSelector": nodes}]}, {"ports": ours})
    assert operator["ports"] == [{"port": 8265}]


def test_what_the_rayservice_deploys_is_what_its_gateways_join(monkeypatch: pytest.MonkeyPatch) -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="requirements/ray.txt", exc_type=ImportError)
    spec, pod = rayservice(), kuberay()
    deployed = schema.ServeDeploySchema(**yaml.safe_load(spec["serveConfigV2"]))
    assert deployed.proxy_location == "Disabled"
    (app,) = deployed.applications
    module, _, name = app.import_path.partition(":")
    cluster = importlib.import_module(module)
    assert (callable(getattr(cluster, name)), app.name, app.route_prefix) == (True, "namesake-ccb", None)
    theirs = settings.read(**app.args, backend="ray")
    gateway = given_to(pod, monkeypatch)
    assert (gateway.ray_join, gateway.model) == (True, theirs.model)
    cluster._check_same(theirs, gateway)
    assert spec["rayClusterConfig"]["workerGroupSpecs"][0]["replicas"] == theirs.replicas
    # KubeRay's Service has those pods whose containers are all ready, the gateway among them, on the gateway's port.
    (port,) = spec["serveService"]["spec"]["ports"]
    assert (port["targetPort"], spec["excludeHeadPodFromServeSvc"]) == (gateway.port, True)
    assert spec["serveService"]["metadata"]["name"] in gateway.allowed_hosts
    # A second cluster would follow the alias by itself.
    assert spec["upgradeStrategy"] == {"type": "None"}


def test_rays_nodes_are_asked_on_ports_without_a_program_that_the_image_lacks() -> None:
    ports = []
    for group, name in zip(groups(rayservice()), ("ray-head", "ray-worker"), strict=True):
        (container,) = (one for one in group["template"]["spec"]["containers"] if one["name"] == name)
        # KubeRay puts its own where there are none, by `wget`.
        probes = [container[f"{what}Probe"]["tcpSocket"]["port"] for what in ("liveness", "readiness")]
        ports.append(set(probes))
    assert ports == [{6379}, {int(groups(rayservice())[1]["rayStartParams"]["node-manager-port"])}]


def test_no_engine_on_a_cpu_binds_its_threads_to_cores_that_are_not_its_own() -> None:
    (ray_worker,) = (one for one in kuberay()["containers"] if one["name"] == "ray-worker")
    for one in (*(serving_in(PODS[name]()) for name in ("cpu", "kserve")), ray_worker):
        assert {"name": "VLLM_CPU_OMP_THREADS_BIND", "value": "nobind"} in one["env"], one["name"]
    assert {"name": "RAY_worker_niceness", "value": "0"} in ray_worker["env"]


@pytest.mark.skipif(
    "NAMESAKE_CRDS" not in os.environ, reason="NAMESAKE_CRDS names no folder with KubeRay's and KServe's"
)
@pytest.mark.parametrize("resource", custom(), ids=lambda one: one["kind"])
def test_custom_resources_keep_to_the_published_definitions(resource: Json) -> None:
    version = resource["apiVersion"].partition("/")[2]
    schemas = [
        found["schema"]["openAPIV3Schema"]
        for one in published()
        if one["spec"]["names"]["kind"] == resource["kind"]
        for found in one["spec"]["versions"]
        if found["name"] == version
    ]
    assert schemas, f"no {resource['apiVersion']} {resource['kind']} in {os.environ['NAMESAKE_CRDS']}"
    wrong = {**resource, "spec": {**resource["spec"], "mistaken": 1}}
    for schema in schemas:
        jsonschema.validate(resource, strict(schema))
        with pytest.raises(jsonschema.ValidationError, match="mistaken"):
            jsonschema.validate(wrong, strict(schema))


@cache
def published() -> list[Json]:
    """The definitions in the folder; megabytes, for which Python's own reader takes half a minute."""
    texts = (path.read_text(encoding="utf-8") for path in Path(os.environ["NAMESAKE_CRDS"]).rglob("*.yaml"))
    every = (one for text in texts for one in yaml.load_all(text, yaml.CSafeLoader))
    return [one for one in every if one and one.get("kind") == "CustomResourceDefinition"]


def strict(schema: Any) -> Any:
    """The schema with unknown fields forbidden, as the API server would drop them."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    closed = "properties" in schema and schema.get("type") == "object" and "additionalProperties" not in schema
    if closed and not schema.get("x-kubernetes-preserve-unknown-fields"):
        # metadata and the resource's own head are defined elsewhere
        made |= {"additionalProperties": False} if "apiVersion" not in schema["properties"] else {}
    return made


def expanded(pod: Json) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment of the container, as Kubernetes would give them."""
    container = serving_in(pod)
    environment = {one["name"]: str(one.get("value", "4")) for one in container["env"]}
    words = [re.sub(r"\$\((\w+)\)", lambda found: environment[found[1]], word) for word in container["args"]]
    return words, environment


def given_to(pod: Json, monkeypatch: pytest.MonkeyPatch) -> settings.Settings:
    """The settings of the pod's server."""
    words, environment = expanded(pod)
    assert words[:2] == ["namesake", "serve"]
    command = typer.main.get_command(serving.app)
    given = command.make_context("serve", words[2:]).params
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    values = {name: value for name, value in given.items() if value}
    values["model"], values["allowed_hosts"] = values.pop("version", None), tuple(values.pop("allow_host"))
    return settings.read(**values)


def test_the_server_takes_the_flags_and_the_variables(pod: Json, monkeypatch: pytest.MonkeyPatch) -> None:
    assert given_to(pod, monkeypatch).model == "models:/ccb@champion"


def test_each_variable_is_one_that_somebody_reads(pod: Json) -> None:
    ours = {f"NAMESAKE_SERVE_{name.upper()}" for name in settings.Settings.model_fields}
    container = serving_in(pod)
    used = set(re.findall(r"\$\((\w+)\)", " ".join(container["args"])))
    names = [one["name"] for one in container["env"]]
    assert len(set(names)) == len(names)
    assert set(names) <= ours | OTHERS | used
    assert used <= set(names)
    defined = (KUBERNETES.parents[2] / "docs/guide/reference/settings.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in defined for name in OTHERS if name.startswith(("MLFLOW_", "NAMESAKE_")))


def test_the_variables_of_vllm_are_its_own() -> None:
    found = importlib.util.find_spec("vllm")
    assert found is not None
    assert found.origin is not None
    source = Path(found.origin).with_name("envs.py").read_text(encoding="utf-8")
    theirs = {name for name in OTHERS if name.startswith("VLLM_")}
    assert theirs
    assert [name for name in theirs if f'"{name}": lambda' not in source] == []


def test_probes_ask_open_routes_on_the_port_that_is_served(pod: Json) -> None:
    words, _ = expanded(pod)
    container = serving_in(pod)
    (port,) = (int(word.partition("=")[2]) for word in words if word.startswith("--port="))
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}
    assert list(ports.values()) == [port]
    asked = {name: container[name]["httpGet"] for name in container if name.endswith("Probe")}
    assert {name: one["path"] for name, one in asked.items() if name != "startupProbe"} == {
        "livenessProbe": "/health",
        "readinessProbe": "/ready",
    }
    for one in asked.values():
        assert one["path"] in OPEN
        assert ports.get(one["port"], one["port"]) == port
    # The kubelet sends the pod's address as Host.
    assert "--allow-host=$(POD_IP)" in container["args"]
    assert {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}} in container["env"]


def test_there_is_time_to_finish_answers(pod: Json) -> None:
    words, _ = expanded(pod)
    (seconds,) = (int(word.partition("=")[2]) for word in words if word.startswith("--shutdown-timeout="))
    before = int(serving_in(pod)["lifecycle"]["preStop"]["exec"]["command"][1])
    assert before >= 5
    # Answers, then the engine's own end, then its killing (engine.py).
    assert pod["terminationGracePeriodSeconds"] >= before + 2 * seconds + 10


def test_whatever_is_mounted_is_there_and_caches_and_keys_lie_on_it(pod: Json) -> None:
    words, environment = expanded(pod)
    mounts = {one["mountPath"]: one["name"] for one in serving_in(pod)["volumeMounts"]}
    volumes = {one["name"]: one for one in pod["volumes"]}
    assert set(mounts.values()) == set(volumes)
    for name in ("NAMESAKE_CACHE", "VLLM_CACHE_ROOT"):
        assert mounts["/" + environment[name].split("/")[1]] == "cache"
    assert mounts[environment["HOME"]] == "tmp"
    (keys,) = (Path(word.partition("=")[2]) for word in words if word.startswith("--api-keys-file="))
    secret = volumes[mounts[str(keys.parent)]]["secret"]["secretName"]
    about = (KUBERNETES / "README.md").read_text(encoding="utf-8")
    assert f"kubectl create secret generic {secret} --from-file={keys.name}" in about


def test_nothing_runs_as_root_or_may_become_it(pod: Json) -> None:
    safe = pod.get("securityContext", {}) | serving_in(pod)["securityContext"]
    assert safe["runAsNonRoot"]
    assert safe["readOnlyRootFilesystem"]
    assert not safe["allowPrivilegeEscalation"]
    assert safe["capabilities"] == {"drop": ["ALL"]}
    assert not pod["automountServiceAccountToken"]
    assert not pod["enableServiceLinks"]


def test_only_the_gpu_variant_asks_for_a_gpu() -> None:
    limits = {name: serving_in(pod())["resources"]["limits"] for name, pod in PODS.items()}
    assert {name for name, one in limits.items() if "nvidia.com/gpu" in one} == {"gpu"}
    images = {name: serving_in(pod())["image"].rpartition(":")[2] for name, pod in PODS.items()}
    assert images == {"cpu": "cpu", "gpu": "gpu", "kserve": "cpu", "kuberay": "cpu-ray"}


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl here")
@pytest.mark.parametrize("variant", ["cpu", "gpu"])
def test_kubectl_renders_the_same(variant: str) -> None:
    done = subprocess.run(
        ["kubectl", "kustomize", str(KUBERNETES / variant)], capture_output=True, text=True, check=True
    )
    assert [one for one in yaml.safe_load_all(done.stdout) if one] == rendered(variant)


def test_every_container_of_ours_is_given_mlflows_password(pod: Json) -> None:
    for container in pod["containers"]:
        assert [one["secretRef"]["name"] for one in container.get("envFrom", [])] == ["namesake-mlflow"], container
