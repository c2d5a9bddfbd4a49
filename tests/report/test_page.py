"""The report is one self-contained file, names what it cannot show, and runs no script from the data."""

from __future__ import annotations

import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

import ndreamer_dist as nd
from ndreamer_dist import cli, keys
from ndreamer_dist.errors import QueryError, StoreError
from ndreamer_dist.matching.labels import Inside, remedy
from ndreamer_dist.report.page import PageData, _named, _steady, _strongest, _trust, _warnings
from ndreamer_dist.report.tables import signed, timings_table
from ndreamer_dist.stats.results import Results
from tests.report.browser import CHROMIUM, Page, browsing
from tests.report.conftest import GENE, KINDS, TREATED


class Reader(HTMLParser):
    """Collects tags with their attributes, the text of the page, and the text of table cells by row."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.lasttag in ("td", "th"):
            self.rows[-1][-1] += data.strip("\n")


@pytest.fixture(scope="session")
def page(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the run with hostile names, written to its default place."""
    run = Path(shutil.copytree(finished, tmp_path_factory.mktemp("page") / "run"))
    nd.compare(run, by="cell_type")
    assert nd.report(run, cells=300) == str(run / keys.REPORT)
    return run / keys.REPORT


@pytest.fixture(scope="session")
def read(page: Path) -> Reader:
    return Reader(page.read_text())


def test_the_page_is_one_file_and_names_nothing_outside(read: Reader) -> None:
    assert [tag for tag, _ in read.tags].count("script") == 1
    for _, attributes in read.tags:
        for name in ("src", "href"):
            if attributes.get(name):
                assert attributes[name].startswith(("data:", "#"))
    assert "default-src 'none'" in next(a["content"] for t, a in read.tags if a.get("http-equiv"))


def test_names_from_data_are_text(read: Reader) -> None:
    for name in (*KINDS.values(), GENE, TREATED):
        assert name in read.text
    assert not [attributes for tag, attributes in read.tags if tag == "img" and attributes["src"] == "x"]
    assert not [attributes for _, attributes in read.tags if any(name.startswith("on") for name in attributes)]


def test_every_figure_is_there_with_words_for_those_who_cannot_see_it(read: Reader) -> None:
    pictures = [attributes for tag, attributes in read.tags if tag == "img"]
    assert len(pictures) >= 8
    assert all(len(picture["alt"] or "") > 10 for picture in pictures)
    assert "Not drawn" not in read.text


def test_tables_show_the_donors_test_first_and_say_what_the_sign_test_is(read: Reader, results: Results) -> None:
    heads = next(row for row in read.rows if row[0] == "gene" and "reading" not in row)
    assert heads.index("p (donors)") < heads.index("mean effect") < heads.index("sign p")
    assert "it describes and does not test" in read.text
    table = results.cate("cell_type")
    part = table[table["population"] == "plain"].set_index("gene")
    tops = [row for row in read.rows if row[0] in part.index and len(row) == len(heads)]
    assert len(tops) > 30
    first = min(p for p in part["p"] if p == p)
    assert any(row[heads.index("p (donors)")] == f"{first:.2g}" for row in tops)


def test_what_was_compared_of_matching_spaces_is_told(read: Reader) -> None:
    assert "Only one space, ndreamer, was measured" in read.text
    assert any(row[:3] == ["space", "purity", "overlap"] for row in read.rows)
    assert "Bar charts of the measures of every matching space" in [
        a.get("alt") for tag, a in read.tags if tag == "img"
    ]


def test_limits_and_timings_are_told(read: Reader) -> None:
    assert "lost real differences of cell state" in read.text
    assert "The donors here are nested, so this applies." in read.text
    assert "Never run a test over cells on denoised expression" in read.text
    assert {row[0] for row in read.rows} >= set(keys.STAGES)


def test_a_damaged_line_of_the_log_costs_a_time_and_not_the_report(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    log = run / keys.STAGES_LOG
    lines = log.read_bytes().splitlines()
    log.write_bytes(b"\n".join([b'{"stage": "cohort", "sec', *lines[1:], b"\xff\xfe", b"[]"]))
    table = timings_table(nd.open_results(run))
    assert table is not None
    assert [row[0].text for row in table.rows] == list(keys.STAGES[1:])


def test_the_page_says_what_was_given_when_and_how_to_cite(read: Reader) -> None:
    assert "Input: the AnnData." in read.text or "Input: AnnData" in read.text
    assert f"Last run: {time.strftime('%Y-')}" in read.text
    assert "bioRxiv 2025.03.05.641743" in read.text


def test_headline_effects_are_of_populations_with_donors_and_cells_on_both_sides(results: Results) -> None:
    table = results.cate("cell_type")
    first, second = table["population"].unique()[:2]
    alone = table["population"] == first
    table.loc[alone, ["treated_donors", "control_donors"]] = (1, 0)
    table.loc[alone, ["effect", "mean_ite"]] = 99.0
    parts = [(name, table[table["population"] == name]) for name in (first, second)]
    said = _strongest(parts, "effect", {})
    assert first not in said
    assert f"in {second} (" in said
    assert "no effect is named" in _strongest(parts[:1], "effect", {})


def test_a_warning_of_impure_matches_names_the_remedy(results: Results) -> None:
    table = results.cate("cell_type")
    table["impure"] = table["population"] == table["population"].iloc[0]
    data = PageData(results, "cell_type", False, None, table, results.diagnostics("cell_type"), 100)
    assert "`run --match-within cell_type --redo`" in " ".join(_warnings(data))
    inside = Inside("kind", 10, 1.0, 0, ("a",), (1.0,), ())
    assert "some groups have fewer than 10 cells of the population" in remedy(inside, "cell_type")
    table["impure"] = False
    assert "--match-within" not in " ".join(_warnings(data))


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ([0.5, 0.5], r"^50 ?% of the cells have no near control match; .* unlike them\.$"),
        ([0.5, None], r"^50 ?% of the cells .* unlike them\. For 30 further cells it is unknown\.$"),
        ([None, None], "near control match is unknown"),
    ],
)
def test_unknown_overlap_is_not_taken_for_overlap(results: Results, shares: list[float | None], said: str) -> None:
    table = pd.DataFrame({"population": ["A", "B"], "condition": "x", "cells": [10, 30], "p": float("nan")})
    table = table.assign(effect=0.0, pseudobulk_effect=0.0, sd_ite=0.0, sd_placebo=0.0, without_overlap=shares)
    data = PageData(results, None, False, None, table.astype({"without_overlap": float}), None, 100)
    assert re.search(said, list(_trust(data))[-1])


def test_many_conditions_are_counted_in_titles() -> None:
    assert _named(["a", "b"]) == "a, b"
    assert _named([str(number) for number in range(25)]) == "25 conditions"


def test_of_two_donors_differences_are_named_that_hang_on_no_single_one() -> None:
    ranges = {"total_loo_low": [-0.1, 0.2, -0.9, 0.3], "total_loo_high": [0.5, 0.8, -0.4, 0.4]}
    part = pd.DataFrame({"population": "B", "gene": list("abcd"), **ranges}).assign(
        treated_donors=2, control_donors=4, cells=100, effective_control_cells=50
    )
    told = _steady([("B", part)], {"c": "third"})
    assert "3 of 4 differences" in told
    assert "no test" in told
    assert "third in B (-0.90 to -0.40), d in B (+0.30 to +0.40), b in B (+0.20 to +0.80)." in told
    assert _steady([("B", part.assign(treated_donors=1))], {}) == ""  # the one donor of its side is in every range


def test_without_donors_there_are_effects_and_no_p_values(without_donors: Results, tmp_path: Path) -> None:
    nd.report(without_donors, tmp_path / "page.html", cells=100)
    read = Reader((tmp_path / "page.html").read_text())
    assert "effects but no p-values" in read.text
    assert "No column of obs looks like cell types" in read.text
    titles = [attributes["alt"] for tag, attributes in read.tags if tag == "img"]
    assert sum("Heat map" in str(title) for title in titles) == 1  # of both conditions, on one scale
    assert sum("Scatter plot of mean effects" in str(title) for title in titles) == 2
    assert not [row for row in read.rows if "p (donors)" in row]
    place, heads = next((place, row) for place, row in enumerate(read.rows) if row[0] == "gene")
    top = read.rows[place + 1]
    mean = without_donors.ite("ndreamer_condition == 'stim'", [top[0]]).X.mean(dtype=float)
    assert top[heads.index("mean effect")] == signed(mean)
    assert "logs/metrics.csv" in read.text  # why the losses are not drawn


def test_the_command_line_writes_it_and_refuses_in_one_line(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(finished), "--out", str(tmp_path / "page.html"), "--by", "cell_typ"])
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert "Did you mean 'cell_type'?" in said.err
    assert not (tmp_path / "page.html").exists()


def test_results_apart_from_their_run_need_a_place(finished: Path, tmp_path: Path) -> None:
    apart = shutil.copytree(finished / keys.RESULTS, tmp_path / "moved.zarr")
    with pytest.raises(StoreError, match="--out"):
        nd.report(apart)


def test_an_unknown_condition_is_refused(results: Results, tmp_path: Path) -> None:
    with pytest.raises(QueryError, match="unheard"):
        nd.report(results, tmp_path / "page.html", condition="unheard")


@pytest.fixture(scope="module")
def shown(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    if CHROMIUM is None:
        pytest.skip("no chromium here (Debian's package `chromium`): the page was not looked at")
    with browsing(tmp_path_factory.mktemp("browser")) as opened:
        opened.open(page)
        yield opened


COLUMN = "Array.from(document.querySelectorAll('#genes-1 tbody tr'), row => row.cells[%d].dataset.order)"


def test_a_browser_shows_it_without_a_complaint_and_asks_the_network_for_nothing(shown: Page) -> None:
    shown.evaluate("Promise.all(Array.from(document.images, image => image.decode()))")
    assert [event["entry"]["text"] for event in shown.told("Log.entryAdded")] == []
    assert shown.told("Runtime.exceptionThrown") == []
    assert [event for event in shown.told("Runtime.consoleAPICalled") if event["type"] in ("error", "warning")] == []
    asked = {event["request"]["url"].partition(":")[0] for event in shown.told("Network.requestWillBeSent")}
    assert asked <= {"file", "data"}


def test_no_script_of_the_data_ran(shown: Page) -> None:
    assert shown.told("Page.javascriptDialogOpening") == []
    assert shown.evaluate("document.scripts.length") == 1


def test_tables_sort_by_mouse_and_by_key(shown: Page) -> None:
    before = shown.evaluate(COLUMN % 0)
    shown.evaluate("document.querySelector('#genes-1 thead th button').click()")
    assert shown.evaluate(COLUMN % 0) == shown.evaluate(
        f"({COLUMN % 0}).toSorted((a, b) => a.localeCompare(b, undefined, {{numeric: true}}))"
    )
    assert shown.evaluate(COLUMN % 0) != before
    assert shown.evaluate("document.querySelector('#genes-1 thead th').ariaSort") == "ascending"
    shown.evaluate("document.querySelectorAll('#genes-1 thead th button')[1].focus()")
    shown.press("Enter")
    first = [float(value) for value in shown.evaluate(COLUMN % 1)]
    shown.press("Enter")
    second = [float(value) for value in shown.evaluate(COLUMN % 1)]
    assert first == sorted(first)
    assert second == sorted(second, reverse=True)
    assert shown.evaluate("document.querySelectorAll('#genes-1 [aria-sort]').length") == 1


def test_figures_have_content(shown: Page) -> None:
    spreads = shown.evaluate(
        """Array.from(document.images, image => {
            const canvas = document.createElement('canvas');
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            const context = canvas.getContext('2d');
            context.drawImage(image, 0, 0);
            const seen = context.getImageData(0, 0, canvas.width, canvas.height).data;
            return new Set(new Uint32Array(seen.buffer)).size;
        })"""
    )
    assert len(spreads) >= 8
    assert min(spreads) > 50


def test_it_can_be_read_in_the_dark(shown: Page, tmp_path: Path) -> None:
    def brightness(what: str) -> float:
        colour = shown.evaluate(f"getComputedStyle(document.body).{what}")
        return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3

    shown.screenshot(tmp_path / "dark.png", dark=True)
    assert brightness("backgroundColor") < 60 < 200 < brightness("color")
    shown.screenshot(tmp_path / "light.png")
    assert brightness("color") < 60 < 200 < brightness("backgroundColor")


def test_nested_donors_lead_with_effects_in_two_parts(read: Reader) -> None:
    heads = next(row for row in read.rows if row[0] == "gene" and "reading" in row)
    assert heads.index("total") < heads.index("within states") < heads.index("by change of state")
