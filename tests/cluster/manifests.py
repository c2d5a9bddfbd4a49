"""The manifests of cluster/ as kustomize builds them, and what the tests ask of them.

`built` follows the few features that the overlays use: resources, components, JSON patches, a config map of files, a
namespace and image names. A test compares it with kustomize's own answer where kustomize, or kubectl, is installed.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent.parent
CLUSTER = ROOT / "cluster"
OVERLAYS = ("pvc", "s3", "interactive-pvc", "interactive-s3")
ISOLATION = CLUSTER / "components" / "resource-isolation"
SUPPORTED = {
    "apiVersion", "kind", "namespace", "resources", "components", "patches", "configMapGenerator", "generatorOptions",
    "images",
}  # fmt: skip
Document = dict[str, Any]


def documents(path: Path) -> list[Document]:
    """Return the documents of a YAML file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def built(folder: Path, *, also: tuple[Path, ...] = ()) -> list[Document]:
    """Return the documents of a kustomization, with further components."""
    (told,) = documents(folder / "kustomization.yaml")
    assert not set(told) - SUPPORTED, set(told) - SUPPORTED
    found = _resources(folder, told) + [_config_map(folder, each) for each in told.get("configMapGenerator", [])]
    for component in [*(folder / name for name in told.get("components", [])), *also]:
        found = _with_component(component.resolve(), found)
    names = {image["name"]: image["newName"] for image in told.get("images", [])}
    for document in found:
        if "namespace" in told and document["kind"] != "Namespace":
            document["metadata"]["namespace"] = told["namespace"]
        for container in containers(document):
            name, _, tag = container["image"].partition(":")
            container["image"] = f"{names.get(name, name)}:{tag}"
    return found


def _resources(folder: Path, told: Document) -> list[Document]:
    found: list[Document] = []
    for name in told.get("resources", []):
        path = (folder / name).resolve()
        found += built(path) if path.is_dir() else documents(path)
    return found


def _with_component(folder: Path, given: list[Document]) -> list[Document]:
    (told,) = documents(folder / "kustomization.yaml")
    found = copy.deepcopy(given) + _resources(folder, told)
    for patch in told.get("patches", []):
        for document in found:
            if document["kind"] == patch["target"]["kind"]:
                for operation in yaml.safe_load(patch["patch"]):
                    _add(document, operation)
    return found


def _add(document: Document, operation: Document) -> None:
    """Follow an `add` of RFC 6902."""
    assert operation["op"] == "add"
    *way, last = operation["path"].removeprefix("/").split("/")
    place: Any = document
    for step in way:
        place = place[int(step)] if isinstance(place, list) else place[step]
    if last == "-":
        place.append(operation["value"])
    else:
        place[last] = operation["value"]


def _config_map(folder: Path, told: Document) -> Document:
    data = {name: (folder / name).read_text() for name in told["files"]}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": told["name"]}, "data": data}


def one(found: list[Document], kind: str) -> Document:
    """Return the one document of a kind."""
    (document,) = [document for document in found if document["kind"] == kind]
    return document


def cluster_spec(found: list[Document]) -> Document:
    """Return the RayClusterSpec of an overlay, the job's or the one that stays."""
    for document in found:
        if document["kind"] == "RayJob":
            return document["spec"]["rayClusterSpec"]
        if document["kind"] == "RayCluster":
            return document["spec"]
    raise AssertionError


def pod_templates(value: Any) -> Iterator[Document]:
    """Yield every pod template inside a document."""
    if isinstance(value, dict):
        if "containers" in value.get("spec", {}) and set(value) <= {"metadata", "spec"}:
            yield value
        for each in value.values():
            yield from pod_templates(each)
    elif isinstance(value, list):
        for each in value:
            yield from pod_templates(each)


def containers(document: Document) -> list[Document]:
    """Return the containers of every pod of a document."""
    return [container for pod in pod_templates(document) for container in pod["spec"]["containers"]]


def ray_pods(found: list[Document]) -> dict[str, Document]:
    """Return the pod template of the head and of each group of workers, by name."""
    spec = cluster_spec(found)
    return {"head": spec["headGroupSpec"]["template"]} | {
        group["groupName"]: group["template"] for group in spec["workerGroupSpecs"]
    }


def pinned(name: str) -> str:
    """Return the version of a package in constraints.txt."""
    found = re.search(rf"^{re.escape(name)}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found, f"{name} is not pinned"
    return found[1]


def gibibytes(quantity: str) -> int:
    """Return a quantity of memory as Kubernetes writes it, in bytes."""
    return int(quantity.removesuffix("Gi")) * 2**30
