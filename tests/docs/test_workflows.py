"""The page on workflows: its Snakefile runs where snakemake is, its Nextflow module uses options that there are."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import typer

from ndreamer_dist.cli import EXIT_CODES, app
from tests.docs.pages import ROOT, blocks, cohort
from tests.tiny import SETTINGS

PAGE = ROOT / "docs/how-to/workflows.md"
TEXTS = {re.findall(r"\S+", block.text)[1]: block.text for block in blocks(PAGE) if block.kind == "text"}


def commands(text: str) -> dict[str, set[str]]:
    """Return the commands of ours that a text calls, and the options that it gives to each."""
    lines = re.sub(r"\\+\n|\"\n\s*\"", " ", text).splitlines()
    found: dict[str, set[str]] = {}
    for line in lines:
        for name, rest in re.findall(r"ndreamer-dist (\w[\w-]*)(.*)", line):
            found.setdefault(name, set()).update(re.findall(r"--[a-z-]+", rest))
    return found


@pytest.mark.parametrize("name", ["Snakefile", "ndreamer.nf"])
def test_a_workflow_uses_commands_and_options_that_there_are(name: str) -> None:
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    used = commands(TEXTS[name])
    assert {"run", "cate"} <= set(used)
    for command, options in used.items():
        assert options <= {option for each in known[command].params for option in each.opts}, command


def test_the_nextflow_module_has_the_parts_of_an_nf_core_module() -> None:
    text = TEXTS["ndreamer.nf"]
    assert re.findall(r"^    (\w+):$", text, re.MULTILINE) == ["input", "output", "script", "stub"]
    assert text.count("{") == text.count("}")
    assert text.count('"""') == 4
    assert {"tag", "label", "container", "errorStrategy"} <= set(re.findall(r"^    (\w+) ", text, re.MULTILINE))
    assert "versions.yml" in text


def test_help_and_page_tell_the_same_exit_codes() -> None:
    page = set(re.findall(r"^\| (\d+)", PAGE.read_text(), re.MULTILINE))
    assert set(re.findall(r"\b\d+\b", EXIT_CODES)) <= page


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("snakemake") is None, reason="snakemake is not installed")
def test_the_snakefile_runs(tmp_path: Path) -> None:
    cohort(tmp_path)
    small = " ".join(f"--set {name}={value}".replace(", ", ",") for name, value in SETTINGS.items())
    text = TEXTS["Snakefile"].replace('donor_id"', f'donor_id --preset small {small}"', 1)
    (tmp_path / "Snakefile").write_text(text)
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["snakemake", "--cores", "1"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert set(pd.read_csv(tmp_path / "effects.csv")["population"]) == {"Microglia", "Astrocyte", "Neuron"}
    assert (tmp_path / "microglia.h5ad").exists()
