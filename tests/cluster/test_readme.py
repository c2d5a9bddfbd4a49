"""What cluster/README.md tells people to type is taken by the programs that it names; its table is computed."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
import typer
from click.testing import CliRunner
from ray.dashboard.modules.job import cli as ray_cli

from ndreamer_dist.cli import app
from tests.cluster import sizing
from tests.cluster.manifests import CLUSTER, OVERLAYS, ROOT, built, containers, pinned, ray_pods
from tests.docs import scaling

TEXT = (CLUSTER / "README.md").read_text()
START = re.split(r"^## ", TEXT, flags=re.MULTILINE)[1]


def commands(text: str) -> list[str]:
    """Return the commands of the shell blocks of a text, each on one line."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    joined = re.sub(r"\\\n\s*", "", "".join(blocks))
    return [line for line in joined.splitlines() if line and not line.startswith("#")]


def starting_with(words: str) -> list[list[str]]:
    return [shlex.split(line, comments=True) for line in commands(TEXT) if line.startswith(words)]


def test_from_nothing_to_results_takes_ten_commands() -> None:
    assert START.startswith("From nothing to results")
    assert len(commands(START)) == 10


@pytest.mark.parametrize("words", starting_with("ray job submit"), ids=" ".join)
def test_rays_job_command_line_takes_what_is_written(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(ray_cli.submit, "callback", lambda **given: asked.update(given))
    answer = CliRunner().invoke(ray_cli.submit, words[3:], catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    program = asked["entrypoint"][1]
    folder = ROOT / asked["working_dir"] if asked["working_dir"] else ROOT
    assert (folder / program.removeprefix("/opt/ndreamer/")).is_file()


@pytest.mark.parametrize("words", starting_with("ndreamer-dist"), ids=" ".join)
def test_our_command_line_takes_what_is_written(words: list[str]) -> None:
    group = typer.main.get_command(app)
    assert words[1] in group.commands  # type: ignore[attr-defined]
    group.commands[words[1]].make_context(words[1], words[2:])  # type: ignore[attr-defined]


def test_every_folder_and_file_that_is_named_is_there() -> None:
    for words in starting_with("kubectl"):
        for flag in ("-k", "-f"):
            if flag in words:
                assert (ROOT / words[words.index(flag) + 1]).exists(), words
    for words in starting_with("docker build"):
        assert (ROOT / words[words.index("-f") + 1]).is_file()
    for name in re.findall(r"`((?:overlays|components|base)/[\w/.-]+)`", TEXT):
        assert (CLUSTER / name).exists(), name
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (CLUSTER / target).exists(), target


def test_the_images_that_are_built_are_those_that_the_manifests_run() -> None:
    built_tags = {words[words.index("-t") + 1] for words in starting_with("docker build")}
    (pushed,) = starting_with("docker push --all-tags")
    assert {tag.rpartition(":")[0] for tag in built_tags} == {pushed[-1]}
    for overlay in OVERLAYS:
        for pod in ray_pods(built(CLUSTER / "overlays" / overlay)).values():
            for container in containers({"pod": pod}):
                assert container["image"] in built_tags


def test_the_secrets_that_are_made_are_those_that_the_manifests_name() -> None:
    made = {}
    for words in starting_with("kubectl"):
        if (
            words[words.index("create") + 1 : words.index("create") + 3] == ["secret", "generic"]
            if "create" in words
            else False
        ):
            keys = [word.removeprefix("--from-literal=").split("=")[0] for word in words if "--from-literal=" in word]
            made[words[words.index("generic") + 1]] = keys
    assert made["ndreamer-ray-token"] == ["auth_token"]
    assert made["ndreamer-redis"] == ["password"]
    assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= set(made["ndreamer-s3"])


def test_the_versions_that_are_named_are_those_that_are_pinned() -> None:
    assert f"Ray {pinned('ray')}" in TEXT
    assert "latest" not in TEXT


def test_the_sizing_table_is_what_is_promised() -> None:
    """`python -m tests.cluster.sizing` prints the table."""
    assert sizing.table() in TEXT


def test_the_costs_are_computed_from_what_was_measured() -> None:
    assert sizing.costs() in TEXT
    measured = (ROOT / "docs" / "benchmarks-log.md").read_text()
    (step,) = re.findall(r"^\| ours \| ([\d.]+) \|", measured, re.MULTILINE)
    assert float(step) == sizing.STEP_SECONDS
    assert f"the steps of the table above times {step} s" in TEXT
    (small,) = re.findall(r"Small preset: ([\d.]+) s a step", measured)
    seconds = scaling.MEASURED_SECONDS
    assert f"took {seconds['train']} s where the steps alone take {float(small) * scaling.MEASURED_STEPS:.0f}" in TEXT
    assert f"million cells' {seconds['match']} s" in TEXT
    (whole,) = re.findall(r"^\| 1,000,000 \| \*\*all\*\* \| (\d+) \|", measured, re.MULTILINE)
    assert f"took {int(whole) / 3600:.2f} node-hours in all, {whole} s" in " ".join(TEXT.split())
    assert f"clusters {sizing.clusters_dearer():.0f} times" in TEXT
    groups_of_15_000 = measured.partition("Per 15 000 cells")[2].partition("\n## ")[0]
    for preset, way in (("paper", "leidenalg until nothing moves"), ("small", "leidenalg, 2 iterations")):
        (row,) = re.findall(rf"^\| {way} \(`{preset}`\) \|(.*)$", groups_of_15_000, re.MULTILINE)
        assert tuple(map(float, row.split("|")[:4])) == sizing.CLUSTERS_SECONDS[preset]
