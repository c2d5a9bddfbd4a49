"""The image holds what was tested, runs as nobody, and is built from a small context."""

from __future__ import annotations

import fnmatch
import functools
import itertools
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ndreamer_dist.compute.local_ray import IDLE_WORKER_SECONDS, USAGE
from tests.cluster.fatbins import architectures
from tests.cluster.manifests import CLUSTER, ROOT, pinned

LINES = re.sub(r"\\\n", " ", (CLUSTER / "Dockerfile").read_text())
IGNORE = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
TARGETS = ("cpu", "gpu")


def stages() -> dict[str, list[str]]:
    """Return the instructions of every stage of the Dockerfile, by its name."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in (line.strip() for line in LINES.splitlines()):
        if line.startswith("FROM "):
            name = line.split(" AS ")[1]
            found[name] = []
        if name and line and not line.startswith("#"):
            found[name].append(line)
    return found


def chain(target: str) -> list[str]:
    """Return the instructions of a target, those of the stages below it first."""
    own = stages()[target]
    below = own[0].split()[1]
    return [*(chain(below) if below in stages() else []), *own]


@functools.cache
def context() -> list[Path]:
    """Return the files that go to the builder: the last rule that fits a path or a folder above it decides."""
    rules = [(line.removeprefix("!"), line.startswith("!")) for line in IGNORE if line and not line.startswith("#")]
    first = {rule.split("/")[0] for rule, sent in rules if sent}  # nothing below another folder is sent: .venv is large
    tops = [top for top in ROOT.iterdir() if any(fnmatch.fnmatchcase(top.name, rule) for rule in first)]
    kept = []
    for path in itertools.chain(tops, *(top.rglob("*") for top in tops)):
        if not path.is_file():
            continue
        relative = path.relative_to(ROOT)
        names = [str(relative), *map(str, relative.parents)]
        fits = [sent for rule, sent in rules if any(fits_rule(name, rule) for name in names)]
        if fits and fits[-1]:
            kept.append(path)
    return kept


def fits_rule(name: str, rule: str) -> bool:
    """Return whether a path fits a rule of a .dockerignore; `*` does not cross folders, `**/` is any of them."""
    if rule.startswith("**/"):
        return fnmatch.fnmatchcase(name.rsplit("/", 1)[-1], rule[3:])
    return name.count("/") == rule.count("/") and fnmatch.fnmatchcase(name, rule)


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_runs_as_nobody_in_particular(target: str) -> None:
    users = [line.split()[1] for line in chain(target) if line.startswith("USER ")]
    assert users[-1] == "1000:1000"  # a number: runAsNonRoot can tell that it is not root


@pytest.mark.parametrize("target", TARGETS)
def test_every_installed_package_is_pinned(target: str) -> None:
    lines = [*stages()["wheel"], *chain(target)]
    installs = [words for line in lines for words in re.findall(r"pip install[^&]*", line)]
    assert len(installs) >= 2
    for words in installs:
        assert " -c constraints.txt " in f"{words} "
    assert installs[-1].split()[-1].endswith(f'[{target},s3,cluster]"')  # one build of FAISS, never both
    for name in ("torch", "ray", "hatchling", f"faiss-{target}"):
        assert pinned(name)
    # In isolation pip would take the newest build backend.
    assert all("--no-build-isolation" in line for line in lines if "pip wheel" in line)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_the_gpu_image_installs_fits_together_and_has_code_for_the_gpus_it_names(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip"]
    report = tmp_path / "report.json"
    asked = ["-c", str(ROOT / "constraints.txt"), "torch==2.13.0", f"{ROOT}[gpu,s3,cluster]"]
    dry = [*pip, "install", "--quiet", "--dry-run", "--ignore-installed", "--report", str(report), *asked]
    subprocess.run(dry, check=True)
    found = {
        each["metadata"]["name"]: each["metadata"]["version"] for each in json.loads(report.read_text())["install"]
    }
    assert found["faiss-gpu"] == pinned("faiss-gpu")
    assert "faiss-cpu" not in found
    wheel = ["download", "--quiet", "--no-deps", "--dest", str(tmp_path), f"faiss-gpu=={pinned('faiss-gpu')}"]
    subprocess.run([*pip, *wheel], check=True)
    zipfile.ZipFile(next(tmp_path.glob("faiss_gpu-*.whl"))).extract("faiss/libfaiss.so", tmp_path)
    built = architectures(tmp_path / "faiss/libfaiss.so")
    assert built >= {("SASS", capability) for capability in (70, 75, 80, 86, 89, 90)} | {("PTX", 90)}


def test_the_base_image_is_a_full_version_and_one_that_the_package_takes() -> None:
    (version,) = re.findall(r"^ARG PYTHON=(\S+)$", LINES, re.MULTILINE)
    assert re.fullmatch(r"3\.(11|12|13)\.\d+-slim-\w+", version)
    assert "latest" not in LINES


def test_the_context_is_small_and_holds_all_that_is_copied_and_no_more() -> None:
    sent = context()
    assert sum(path.stat().st_size for path in sent) < 2e6
    copied = [word for line in LINES.splitlines() for word in copied_words(line)]
    for word in copied:
        assert any(path == ROOT / word or (ROOT / word) in path.parents for path in sent), word
    for path in sent:
        assert any(path == ROOT / word or (ROOT / word) in path.parents for word in copied), path
        assert not path.name.startswith("benchmark_")


def copied_words(line: str) -> list[str]:
    """Return what a COPY takes from the context."""
    words = line.split()
    return words[1:-1] if words[:1] == ["COPY"] and not words[1].startswith("--from") else []


def test_the_programs_of_the_jobs_are_in_the_image() -> None:
    sent = {str(path.relative_to(ROOT)) for path in context()}
    assert {"jobs/run_cohort.py", "ndreamer_dist/cli.py", "constraints.txt"} <= sent


@pytest.mark.parametrize("target", TARGETS)
def test_ray_in_a_pod_is_as_a_local_one(target: str) -> None:
    (variables,) = [line for line in chain(target) if line.startswith("ENV PYTHONUNBUFFERED")]
    assert f"{USAGE}=0" in variables
    assert f"RAY_idle_worker_killing_time_threshold_ms={IDLE_WORKER_SECONDS * 1000}" in variables
