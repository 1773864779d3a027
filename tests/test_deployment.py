"""Container files, compose file and manifests against their own tools' schemas.

No engine runs here: nothing is built, started or applied.
"""

import fnmatch
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.profiles import uniform_profile
from tests.prometheus import DEPLOY, RULES

CHECKOUT = DEPLOY.parent
DOCKERFILES = sorted(DEPLOY.glob("*/Dockerfile"))
KUBERNETES = DEPLOY / "kubernetes"
RENDERED = ("base", "tensor-parallel", "canary", "multi-node")
Document = dict[str, Any]


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tool(name: str) -> Path:
    """A program of this environment, or of the machine."""
    own = Path(sys.executable).with_name(name)
    found = own if own.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}")
    return Path(found)


def by_folder(path: Path) -> str:
    return path.parent.name


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=by_folder)
def test_dockerfile_passes_its_linter(dockerfile: Path) -> None:
    assert run(tool("hadolint"), dockerfile) == ""


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=by_folder)
def test_dockerfile_copies_what_is_there_and_not_ignored(dockerfile: Path) -> None:
    ignore = dockerfile.with_name("Dockerfile.dockerignore").read_text("utf-8").split()
    assert ignore[0] == "*"
    let_through = [line[1:] for line in ignore if line.startswith("!")]
    instructions = [line.split() for line in dockerfile.read_text("utf-8").splitlines() if line]
    copied = [source for word, *rest in instructions if word == "COPY" for source in rest[:-1]]
    assert {"vllm_afbs", "kernels", "tuning", "pyproject.toml"} <= set(copied)
    for source in copied:
        assert (CHECKOUT / source).exists(), source
        assert any(fnmatch.fnmatch(source, pattern) for pattern in let_through), source
    users = [rest[0] for word, *rest in instructions if word == "USER"]
    assert users[-1] == "2000:0"


@pytest.fixture(scope="module")
def compose() -> Document:
    loaded: Document = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
    return loaded


def test_compose_file_fits_its_schema() -> None:
    file = DEPLOY / "compose.yaml"
    run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", file)


def test_compose_publishes_to_this_machine_alone_and_knows_who_is_well(compose: Document) -> None:
    for name, service in compose["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert service["healthcheck"]["test"], name
        assert service["cap_drop"] == ["ALL"], name


def test_compose_mounts_what_the_programs_read(compose: Document) -> None:
    for service in compose["services"].values():
        for volume in service["volumes"]:
            if isinstance(volume, str) and volume.startswith("./"):
                source, _, mode = volume.split(":")
                assert (DEPLOY / source).exists()
                assert mode == "ro"
        if "build" in service:
            assert service["user"] == "2000:0"
            assert (CHECKOUT / service["build"]["dockerfile"]).is_file()
            profiles = service["volumes"][0]
            assert profiles["read_only"]
            assert profiles["target"] in service["environment"]["VLLM_AFBS_PROFILE"]
    grafana = " ".join(compose["services"]["grafana"]["volumes"])
    provider = yaml.safe_load(
        (DEPLOY / "grafana/provisioning/dashboards/vllm-afbs.yml").read_text("utf-8")
    )
    assert f":{provider['providers'][0]['options']['path']}:ro" in grafana


def documents(text: str) -> list[Document]:
    return [document for document in yaml.safe_load_all(text) if document]


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with the profiles that an operator puts there."""
    folder = tmp_path_factory.mktemp("manifests") / "kubernetes"
    shutil.copytree(KUBERNETES, folder)
    for place in ("base", "canary"):
        (folder / place / "profile.json").write_text(uniform_profile().to_json(), encoding="utf-8")
    return folder


def check(document: Document) -> None:
    """Against the newest Kubernetes that the validator knows; unknown fields are errors."""
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize(
    "file",
    [
        file
        for folder in ("base", "multi-node")
        for file in sorted((KUBERNETES / folder).glob("*.yaml"))
        if file.name != "kustomization.yaml"
    ],
    ids=lambda file: f"{file.parent.name}/{file.name}",
)
def test_manifest_fits_its_schema(file: Path) -> None:
    found = documents(file.read_text("utf-8"))
    assert found
    for document in found:
        check(document)


@pytest.mark.parametrize("folder", RENDERED)
def test_rendered_manifests_fit_together(folder: str, manifests: Path) -> None:
    rendered = documents(run(tool("kubectl"), "kustomize", manifests / folder))
    for document in rendered:
        check(document)
    names = {(document["kind"], document["metadata"]["name"]) for document in rendered}
    (workload,) = [d for d in rendered if d["kind"] in ("Deployment", "StatefulSet")]
    template = workload["spec"]["template"]
    assert (
        workload["spec"]["selector"]["matchLabels"].items()
        <= template["metadata"]["labels"].items()
    )

    (container,) = template["spec"]["containers"]
    assert template["spec"]["securityContext"]["runAsNonRoot"]
    assert container["image"].split(":")[1]
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()
    requests, limits = container["resources"]["requests"], container["resources"]["limits"]
    gpus = int(limits["nvidia.com/gpu"])
    assert int(requests["nvidia.com/gpu"]) == gpus
    arguments = " ".join(container["args"])
    assert "--attention-backend=afbs" in arguments
    assert gpus == 1 or f"--tensor-parallel-size={gpus}" in arguments

    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    (path,) = [e["value"] for e in container["env"] if e["name"] == "VLLM_AFBS_PROFILE"]
    assert path == f"{mounts['profile']['mountPath']}/profile.json"
    assert mounts["profile"]["readOnly"]
    for volume in template["spec"]["volumes"]:
        if "configMap" in volume:
            assert ("ConfigMap", volume["configMap"]["name"]) in names
        if "persistentVolumeClaim" in volume:
            claim = volume["persistentVolumeClaim"]["claimName"]
            assert ("PersistentVolumeClaim", claim) in names


def test_a_canary_shares_the_service_and_nothing_else(manifests: Path) -> None:
    stable, canary = (
        documents(run(tool("kubectl"), "kustomize", manifests / folder))
        for folder in ("base", "canary")
    )
    shared = {(d["kind"], d["metadata"]["name"]) for d in stable} & {
        (d["kind"], d["metadata"]["name"]) for d in canary
    }
    assert not shared
    (service,) = [d for d in stable if d["kind"] == "Service"]
    pods = []
    for rendered in (stable, canary):
        (deployment,) = [d for d in rendered if d["kind"] == "Deployment"]
        pods.append(deployment["spec"]["template"]["metadata"]["labels"])
        assert service["spec"]["selector"].items() <= pods[-1].items()
    assert pods[0] != pods[1]


def test_the_operators_rules_are_the_same_rules() -> None:
    """What docs/operations.md's command applies; no schema of the operator's is at hand."""
    head = (KUBERNETES / "monitoring/prometheusrule-head.yaml").read_text("utf-8")
    rules = RULES.read_text("utf-8")
    indented = run("sed", "s/^/  /", RULES)
    document = yaml.safe_load(head + indented)
    assert document["kind"] == "PrometheusRule"
    assert document["spec"] == yaml.safe_load(rules)
