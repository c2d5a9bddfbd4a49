"""Every code block of README and docs runs as it stands, or says why a test cannot and is at least understood."""

from __future__ import annotations

import ast
import functools
import re
import shlex
import shutil
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import scanpy as sc
import typer
import yaml

from ndreamer_dist import datasets, settings
from ndreamer_dist.cli import app
from ndreamer_dist.commands import demo
from ndreamer_dist.commands import ndreamer as compat
from ndreamer_dist.datasets import simulate
from tests.docs import scaling
from tests.docs.pages import PAGES, ROOT, Block, blocks, cohort, run_command
from tests.tiny import SETTINGS

NOT_RUN = [block for page in PAGES for block in blocks(page) if block.reason]
TO_RUN = [page for page in PAGES if any(not block.reason for block in blocks(page))]
NAMES = [str(page.relative_to(ROOT)) for page in TO_RUN]
IN_THE_GATE = (
    "README.md",
    "docs/how-to/own-cohort.md",
)
RUN = """ndreamer-dist run cohort.h5ad --out my_run --condition-key disease --control normal --batch-key donor_id"""


def nested(dotted: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return settings by stage."""
    values: dict[str, dict[str, Any]] = {}
    for name, value in dotted.items():
        stage, _, field = name.partition(".")
        values.setdefault(stage, {})[field] = value
    return values


def make_tiny(patch: pytest.MonkeyPatch) -> None:
    """Make presets, what the published class takes and simulated cohorts small, UMAPs short: a page runs in seconds."""
    tiny = nested({**SETTINGS, "train.epochs": 3, "train.reset_every": 2, "clusters.iterations": 2})
    for preset in ("paper", "small"):
        patch.setitem(settings.PRESETS, preset, tiny)
    patch.setattr(compat, "BARE", {})

    def smaller(path: Any, *, cells: int, genes: int, **others: Any) -> Any:
        return simulate(path, cells=min(cells, 1500), genes=min(genes, 400), **others)

    patch.setattr(sc.tl, "umap", functools.partial(sc.tl.umap, maxiter=20))
    patch.setattr(datasets, "simulate", smaller)
    patch.setattr(demo, "simulate", smaller)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the cohort of the pages and its finished run, as README makes it."""
    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        make_tiny(patch)
        patch.chdir(folder)
        cohort(folder)
        run_command(RUN)
    return folder


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name, marks=() if name in IN_THE_GATE else pytest.mark.slow)
        for page, name in zip(TO_RUN, NAMES, strict=True)
    ],
)
def test_a_page_runs(page: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(place, tmp_path / "here"))
    make_tiny(monkeypatch)
    monkeypatch.chdir(folder)
    scope: dict[str, Any] = {}
    with mpl.rc_context({"backend": "agg"}), warnings.catch_warnings():
        warnings.simplefilter("default")  # of numba and umap, and of cells that are few
        for block in blocks(page):
            if not block.reason:
                try:
                    block.run(scope)
                except BaseException as error:
                    error.add_note(f"in {block.where}")
                    raise


def test_every_block_says_what_it_is() -> None:
    kinds = Counter(block.kind for page in PAGES for block in blocks(page))
    assert set(kinds) <= {"python", "bash", "yaml", "text", "r"}
    assert kinds["python"] >= 5
    fences = sum(len(re.findall(r"^```", page.read_text(), re.MULTILINE)) for page in PAGES)
    assert fences == 2 * sum(kinds.values())  # none is missed
    for page in PAGES:
        told = len(re.findall("<!-- not run", page.read_text()))
        assert told == sum(block.reason is not None for block in blocks(page)), page


@pytest.mark.parametrize("block", NOT_RUN, ids=lambda block: f"{block.where}, {block.reason}")
def test_what_is_not_run_is_understood(block: Block) -> None:
    if block.kind == "python":
        ast.parse(block.text)
    if block.kind == "yaml":
        yaml.safe_load(block.text)
    if block.kind == "bash":
        commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
        for line in block.commands():
            words = shlex.split(line, comments=True)
            if words[0] == "ndreamer-dist":
                commands[words[1]].make_context(words[1], words[2:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text()):
        name, _, heading = target.partition("#")
        file = page if not name else page.parent / name
        assert file.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, target


def test_the_tables_of_the_scaling_page_are_what_the_package_computes() -> None:
    page = (ROOT / "docs/scaling.md").read_text()
    assert scaling.needs() in page
    assert scaling.hours() in page


def test_the_walk_through_the_code_names_what_is_there() -> None:
    design = (ROOT / "docs" / "explanation" / "design.md").read_text()
    walk = design.partition("## One cell and one gene")[2].partition("\n## ")[0]
    named = re.findall(r"`([\w/]+\.py)(?:: ([\w.]+))?`", walk)
    assert len(named) > 30
    for file, name in named:
        source = (ROOT / "ndreamer_dist" / file).read_text()
        for part in filter(None, name.split(".")):
            assert re.search(rf"^\s*(def|class) {part}\b|^{part} = ", source, re.MULTILINE), f"{file}: {name}"


def test_the_measured_seconds_of_the_scaling_page_are_those_of_the_benchmarks() -> None:
    measured = re.findall(r"^\| 1,000,000 \| (\w+) \| (\d+) \|", (ROOT / "docs/benchmarks-log.md").read_text(), re.M)
    assert {stage: int(seconds) for stage, seconds in measured} == scaling.MEASURED_SECONDS
