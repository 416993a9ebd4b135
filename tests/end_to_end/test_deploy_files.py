"""The files of deploy/ match their schemas and the programs that they start."""

import json
import re
from importlib.metadata import distribution

import check_jsonschema
import jsonpatch
import kubernetes_validate
import pytest
import typer.main
import yaml
from click.testing import CliRunner

from mirror_runtime.bundle import EngineName, Precision
from mirror_runtime.cli.main import app
from mirror_runtime.engines import ON_GPU
from mirror_runtime.gateway.metrics import GatewayMetrics
from mirror_runtime.triton.repository.container import CONTAINER_IMAGE
from tests.support.paths import ROOT

DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
OLDEST, NEWEST = "1.30", "1.37"
"""Versions of Kubernetes that the manifests are checked against; 1.30 is the first with every feature they use."""


def documents(name: str):
    return list(yaml.safe_load_all((KUBERNETES / name).read_text()))


def resources() -> list[str]:
    (kustomization,) = documents("kustomization.yaml")
    return kustomization["resources"]


@pytest.fixture(scope="module")
def pod():
    (deployment,) = documents("deployment.yaml")
    return deployment["spec"]["template"]["spec"]


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("name", resources())
def test_manifests_match_the_schemas_of_kubernetes(name, version):
    for document in documents(name):
        kubernetes_validate.validate(document, version, strict=True)


@pytest.fixture(scope="module")
def on_gpu():
    """Return the manifests that the GPU overlay changes, after its patches."""
    (overlay,) = yaml.safe_load_all((DEPLOY / "kubernetes-gpu" / "kustomization.yaml").read_text())
    assert [(DEPLOY / "kubernetes-gpu" / name).resolve() for name in overlay["resources"]] == [KUBERNETES]
    base = {document["kind"]: document for name in resources() for document in documents(name)}
    patched = {}
    for patch in overlay["patches"]:
        target = base[patch["target"]["kind"]]
        assert target["metadata"]["name"] == patch["target"]["name"]
        patched[target["kind"]] = jsonpatch.apply_patch(target, yaml.safe_load(patch["patch"]))
    return patched


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_the_gpu_overlay_matches_the_schemas(on_gpu, version):
    for document in on_gpu.values():
        kubernetes_validate.validate(document, version, strict=True)


def test_a_pod_of_the_gpu_overlay_has_one_gpu_and_is_not_scaled_by_its_cpu(on_gpu, pod):
    changed = on_gpu["Deployment"]["spec"]
    (triton,) = changed["template"]["spec"]["initContainers"]
    assert triton["resources"]["limits"] == triton["resources"]["requests"]
    assert triton["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert [toleration["key"] for toleration in changed["template"]["spec"]["tolerations"]] == ["nvidia.com/gpu"]
    assert changed["strategy"]["rollingUpdate"]["maxSurge"] == 0, "a pod more would need a GPU more"
    assert triton["securityContext"] == pod["initContainers"][0]["securityContext"]
    (metric,) = on_gpu["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == "mirror_queue_seconds"


def test_the_gpu_overlay_of_compose_matches_its_schema_and_takes_extras_that_exist():
    arguments = ["--builtin-schema", "vendor.compose-spec", str(DEPLOY / "compose.gpu.yaml")]
    assert CliRunner().invoke(check_jsonschema.main, arguments).exit_code == 0
    overlay = yaml.safe_load((DEPLOY / "compose.gpu.yaml").read_text())["services"]
    assert set(overlay) == {"triton"}
    (device,) = overlay["triton"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    (extra,) = re.findall(r"^\$\{MIRROR_EXTRAS:-(\w+)\}$", overlay["triton"]["build"]["args"]["EXTRAS"])
    assert extra in (distribution("mirror-runtime").metadata.get_all("Provides-Extra") or ())


@pytest.mark.parametrize("name", ["compose.gpu.yaml", "kubernetes-gpu/kustomization.yaml"])
def test_a_repository_for_a_gpu_names_its_engine(name):
    (options,) = re.findall(r"to_triton\.py BUNDLE --output models *(.*)", (DEPLOY / name).read_text())
    assert options in (DEPLOY.parent / "docs/how-to/scale-out.md").read_text()
    _, engine, _, precision = options.split()
    assert EngineName(engine) in ON_GPU
    assert Precision(precision) is Precision.FP16


def test_our_containers_run_without_root_and_cannot_write_to_their_images(pod):
    assert (pod["securityContext"]["runAsNonRoot"], pod["securityContext"]["runAsUser"]) == (True, 1000)
    for container in (*pod["initContainers"], *pod["containers"]):
        context = container["securityContext"]
        assert context == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for name in ("triton", "gateway"):
        assert services[name]["read_only"]
        assert "no-new-privileges:true" in services[name]["security_opt"]
    assert re.findall(r"^USER (.*)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE) == ["triton-server", "1000"]


def test_a_misspelt_field_violates_the_schemas_and_every_manifest_is_applied_or_a_helm_values_file():
    others = {"kustomization.yaml", "prometheus-adapter.yaml"}
    assert {path.name for path in KUBERNETES.glob("*.yaml")} == {*resources(), *others}
    (deployment,) = documents("deployment.yaml")
    deployment["spec"]["template"]["spec"]["terminationGracePeriod"] = 75
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriod"):
        kubernetes_validate.validate(deployment, NEWEST, strict=True)


def test_compose_matches_its_schema_publishes_only_on_loopback_and_pins_its_images():
    arguments = ["--builtin-schema", "vendor.compose-spec", str(DEPLOY / "compose.yaml")]
    checked = CliRunner().invoke(check_jsonschema.main, arguments)
    assert checked.exit_code == 0, checked.output
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    services = compose["services"]
    assert set(services) == {"triton", "gateway", "prometheus", "grafana"}
    for name, service in services.items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        if "image" in service:
            assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", service["image"])
        for mount in service.get("volumes", ()):
            source = mount.split(":")[0]
            assert not source.startswith(".") or (DEPLOY / source).exists()
        if build := service.get("build"):
            assert (DEPLOY / build["context"] / build["dockerfile"]).samefile(DEPLOY / "Dockerfile")
    prometheus = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    targets = [target for job in prometheus["scrape_configs"] for target in job["static_configs"][0]["targets"]]
    assert {target.split(":")[0] for target in targets} <= set(services)


def test_images_are_pinned_and_built_from_files_that_exist():
    text = (DEPLOY / "Dockerfile").read_text()
    images = re.findall(r"^FROM (\S+) AS (\w+)$", text, re.MULTILINE)
    assert [name for _, name in images] == ["triton", "gateway"]
    assert images[0][0] == CONTAINER_IMAGE
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", images[1][0])
    assert text.count("pip install -c constraints.txt") == 2
    assert {"CVE-2025-23319", "CVE-2025-33201", "CVE-2026-24206"} <= set(re.findall(r"CVE-\d{4}-\d+", text))
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text()
    lines = re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE)
    for copied in {name for line in lines for name in line.split()}:
        assert (DEPLOY.parent / copied).exists()
        assert f"!{copied}\n" in ignored, f"{copied} never reaches the builder"


def test_every_option_of_the_gateway_exists(pod):
    gateway = typer.main.get_group(app).commands["gateway"]
    known = {option for parameter in gateway.params for option in parameter.opts}
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["gateway"]["command"]
    text = (DEPLOY / "Dockerfile").read_text()
    image = [*json.loads(re.findall(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)[0])[2:]]
    used = [argument.split("=")[0] for argument in (*pod["containers"][0]["args"], *compose, *image)]
    assert {option for option in used if option.startswith("--")} <= known
    assert "--host" in image


def triton_flags(arguments) -> dict[str, str]:
    assert arguments[0] == "tritonserver"
    return dict(argument.removeprefix("--").split("=") for argument in arguments[1:] if "=" in argument)


def test_the_pod_starts_triton_with_the_flags_of_the_image_on_a_private_port(pod):
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", "")
    image = json.loads(re.findall(r"^CMD (\[\"tritonserver.*\])$", text, re.MULTILINE)[0])
    (triton,) = pod["initContainers"]
    own = triton_flags(triton["args"])
    assert own.pop("grpc-address") == "127.0.0.1"
    baked = triton_flags(image)
    assert baked.pop("grpc-address") == "0.0.0.0"
    assert own == baked
    for flag in ("--disable-auto-complete-config", "--model-control-mode=none", "--allow-http=false"):
        assert flag in image
        assert flag in triton["args"]


def test_a_pod_drains_in_time_is_probed_by_inference_and_has_shared_memory(pod):
    (triton,), (gateway,) = pod["initContainers"], pod["containers"]
    assert triton["restartPolicy"] == "Always", "not a sidecar: the gateway would wait for it to end"
    for probe in (gateway["startupProbe"], gateway["readinessProbe"], triton["livenessProbe"]):
        assert probe["httpGet"]["path"] == "/health"
        assert probe["timeoutSeconds"] > 10, "the gateway's own probe takes up to 10 s"
    sleep = gateway["lifecycle"]["preStop"]["sleep"]["seconds"]
    options = dict(argument.removeprefix("--").split("=") for argument in gateway["args"])
    exit_timeout = int(triton_flags(triton["args"])["exit-timeout-secs"])
    longest = sleep + float(options["drain"]) + float(options["timeout"]) + 1 + exit_timeout
    assert pod["terminationGracePeriodSeconds"] > longest
    (shm,) = (mount["name"] for mount in triton["volumeMounts"] if mount["mountPath"] == "/dev/shm")
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[shm]["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}
    for container in (triton, gateway):
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)
    ingress = documents("network.yaml")[0]["spec"]["ingress"]
    labels = [source["namespaceSelector"]["matchLabels"] for rule in ingress for source in rule.get("from", ())]
    assert {label["kubernetes.io/metadata.name"] for label in labels} == {"monitoring"}


def test_selectors_and_the_autoscaler_refer_to_existing_objects():
    (deployment,) = documents("deployment.yaml")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert documents("service.yaml")[0]["spec"]["selector"] == labels
    assert documents("disruption.yaml")[0]["spec"]["selector"]["matchLabels"] == labels
    assert documents("network.yaml")[0]["spec"]["podSelector"]["matchLabels"] == labels
    scaler = documents("autoscaler.yaml")[0]["spec"]
    assert scaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"], "kubectl apply would reset the number that the autoscaler chose"
    (rule,) = documents("prometheus-adapter.yaml")[0]["rules"]["custom"]
    assert scaler["metrics"][0]["pods"]["metric"]["name"] == rule["name"]["as"]


def metrics_named(text: str) -> set[str]:
    return set(re.findall(r"\b(?:mirror|nv|process)_[a-z_]+", text)) - {"mirror_queue_seconds"}


def test_dashboard_and_autoscaler_query_metrics_that_exist():
    board = json.loads((DEPLOY / "grafana/dashboards/mirror.json").read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queried = metrics_named("\n".join((*expressions, (KUBERNETES / "prometheus-adapter.yaml").read_text())))
    families = list(GatewayMetrics().registry.collect())
    gateway = {sample.name for family in families for sample in family.samples}
    # A family with labels has no samples before its first event.
    gateway |= {f"{family.name}{end}" for family in families for end in ("_total", "_bucket")}
    source = (DEPLOY.parent / "runtime/mirror_runtime/triton/model/metrics.py").read_text()
    model = set(re.findall(r'"(mirror_[a-z_]+)"', source))
    missing = queried - gateway - model - {"nv_inference_count", "nv_inference_exec_count"}
    assert not missing
    assert len(board["panels"]) == len({panel["id"] for panel in board["panels"]}) == 9
    provisioned = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())
    (source_of_data,) = provisioned["datasources"]
    for panel in board["panels"]:
        assert {part["datasource"]["uid"] for part in (panel, *panel["targets"])} == {source_of_data["uid"]}
