"""What a published project is found, installed and cited by: one version, true requirements, forms that their readers take."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
RECIPE = yaml.safe_load((ROOT / ".github/conda/recipe.yaml").read_text())
SCVERSE = yaml.safe_load((ROOT / ".github/scverse/meta.yaml").read_text())
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
CONDA_NAMES = {"igraph": "python-igraph", "matplotlib": "matplotlib-base", "torch": "pytorch"}
"""What conda-forge calls a package otherwise."""
RECIPE_KEYS = {
    "schema_version", "context", "package", "source", "build", "requirements", "tests", "about", "extra",
}  # fmt: skip
SCVERSE_REQUIRED = {
    "name", "description", "project_home", "documentation_home", "install", "license", "tags", "version", "contact",
    "category",
}  # fmt: skip
SCVERSE_KEYS = SCVERSE_REQUIRED | {
    "tutorials_home", "publications", "logo", "test_command", "language", "primary_category", "inventory",
}  # fmt: skip
KNOWN_ON_SUBMISSION = {"project_home", "documentation_home", "contact"}
DOI = r"10\.\d{4,9}/[-._;()/:A-Za-z0-9]+"


def in_conda(text: str) -> set[str]:
    """Return what the recipe must ask for in place of a requirement."""
    asked = Requirement(text)
    names = [f"ray-{extra}" for extra in asked.extras if asked.name == "ray"] or [
        CONDA_NAMES.get(asked.name, asked.name)
    ]
    return {f"{name} {asked.specifier}" for name in names}


def test_every_file_names_the_same_version() -> None:
    dockerfile = (ROOT / "cluster/Dockerfile").read_text()
    assert {
        PROJECT["version"], RECIPE["context"]["version"], SCVERSE["version"], CITATION["version"],
        *re.findall(r"ndreamer-dist:([\d.]+)-ray", dockerfile),
    } == {PROJECT["version"]}  # fmt: skip
    assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_licence_is_the_same_everywhere() -> None:
    assert {PROJECT["license"], RECIPE["about"]["license"], SCVERSE["license"], CITATION["license"]} == {
        "GPL-3.0-or-later"
    }


def test_the_conda_recipe_has_the_form_of_one_and_the_requirements_of_the_package() -> None:
    assert set(RECIPE) <= RECIPE_KEYS
    assert RECIPE["schema_version"] == 1
    assert RECIPE["build"]["noarch"] == "python"
    assert RECIPE["build"]["python"]["entry_points"] == [
        f"{name} = {place}" for name, place in PROJECT["scripts"].items()
    ]
    wanted = {"python >=3.11,<3.14"}.union(*map(in_conda, [*PROJECT["dependencies"], *EXTRAS["cpu"]]))
    assert set(RECIPE["requirements"]["run"]) == wanted
    assert {"python": {"imports": ["ndreamer_dist", "ndreamer_dist.pipeline"], "pip_check": True}} in RECIPE["tests"]


def test_the_entry_for_scverse_has_the_words_of_its_schema() -> None:
    assert set(SCVERSE) <= SCVERSE_KEYS
    assert SCVERSE_REQUIRED - set(SCVERSE) <= KNOWN_ON_SUBMISSION
    assert SCVERSE["category"] in {"core-framework", "core-datastructure", "core-infrastructure", "ecosystem"}
    assert all(re.fullmatch(DOI, each) for each in SCVERSE["publications"])
    assert len(set(SCVERSE["tags"])) == len(SCVERSE["tags"]) >= 1
    assert SCVERSE["install"] == {"pypi": PROJECT["name"]}


def test_the_citation_has_the_parts_of_one_and_names_the_preprint() -> None:
    assert CITATION["cff-version"] == "1.2.0"
    assert {"message", "title", "type", "authors", "license", "version"} <= set(CITATION)
    (preprint,) = CITATION["references"]
    assert {"type", "title", "authors", "doi"} <= set(preprint)
    assert [preprint["doi"]] == SCVERSE["publications"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_holds_no_secret_and_may_no_more_than_it_needs(path: Path) -> None:
    text = path.read_text()
    workflow: dict[Any, Any] = yaml.safe_load(text)
    assert "secrets." not in text
    assert workflow["permissions"] == {"contents": "read"}
    assert set(workflow[True])  # `on`, which YAML reads as true
    for job in workflow["jobs"].values():
        assert {"runs-on", "timeout-minutes", "steps"} <= set(job)
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])
        assert all("@" in step["uses"] for step in job["steps"] if "uses" in step)


def test_a_release_is_published_by_trust_alone() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert jobs["publish"]["environment"]
    assert "permissions" not in jobs["build"]  # what builds may not publish


def test_the_tests_run_on_every_python_that_the_package_takes() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    versions = jobs["test"]["strategy"]["matrix"]["python"]
    classified = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    (script,) = re.findall(r"for version in (.*); do", (ROOT / ".ci/pythons").read_text())
    assert versions == classified == script.split() == ["3.11", "3.12", "3.13"]
    (newest_first,) = re.findall(r"for version in (.*); do", (ROOT / ".ci/newest").read_text())
    assert newest_first.split() == versions[::-1]
    assert PROJECT["requires-python"] == ">=3.11,<3.14"


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_has_the_form_of_one(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= set(form)
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert all(field["type"] == "textarea" and field["attributes"]["label"] for field in fields)
    assert len({field["id"] for field in fields}) == len(fields)
    assert any(field.get("validations", {}).get("required") for field in fields)


@pytest.mark.parametrize("name", ["llms.txt", "CONTRIBUTING.md", "CODE_OF_CONDUCT.md"])
def test_links_of_the_pages_at_the_top_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text()
    for target in re.findall(r"\]\((?!https?://)([^)#]+)[^)]*\)", text):
        assert (ROOT / target).exists(), target


def test_llms_txt_has_its_form_and_names_every_how_to_page() -> None:
    lines = (ROOT / "llms.txt").read_text().splitlines()
    assert lines[0] == "# ndreamer_dist"
    assert lines[2].startswith("> ")
    for page in sorted((ROOT / "docs/how-to").glob("*.md")):
        assert f"(docs/how-to/{page.name})" in "\n".join(lines), page


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_wheel_of_the_sdist_installs_clean_and_runs(tmp_path: Path) -> None:
    dist = tmp_path / "dist"
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(dist)], cwd=ROOT, check=True)
    (sdist,), (built,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    with tarfile.open(sdist) as files:
        files.extractall(tmp_path, filter="data")
    (source,) = tmp_path.glob("ndreamer_dist-*")
    assert {"pyproject.toml", "README.md", "LICENSE", "CITATION.cff", "tests", "docs"} <= {
        p.name for p in source.iterdir()
    }
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(dist / "own")], cwd=source, check=True
    )
    (wheel,) = (dist / "own").glob("*.whl")
    assert zipfile.ZipFile(wheel).namelist() == zipfile.ZipFile(built).namelist()  # the sdist holds all that is needed
    venv.create(tmp_path / "fresh", with_pip=True)
    python, program = (str(tmp_path / "fresh/bin" / name) for name in ("python", "ndreamer-dist"))
    pinned = ["-c", str(ROOT / "constraints.txt"), "torch==2.13.0"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *pinned, f"{wheel}[cpu]"], check=True)
    subprocess.run([python, "-m", "pip", "check"], check=True)
    said = subprocess.run([program, "--version"], check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert said == f"{PROJECT['version']}\n"
    small = ["--set", "train.epochs=5", "--set", "run.serial=true"]
    subprocess.run([program, "demo", "--cells", "2000", "--genes", "300", *small], check=True, cwd=tmp_path)
    assert (tmp_path / "ndreamer_demo/run/results.zarr/zarr.json").exists()
