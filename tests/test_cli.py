"""The command line does the job, and every refusal is one line and exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import yaml

import ndreamer_dist as nd
from ndreamer_dist import cli, keys
from tests.tiny import SETTINGS, run_words


@pytest.fixture(scope="module")
def cohort(tiny: Path) -> Path:
    return tiny


def spoken(arguments: Sequence[str], capsys: pytest.CaptureFixture) -> tuple[int, str, str]:
    """Run the command line in this process; return its exit code and what it said on both streams."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


@pytest.fixture(scope="module")
def finished(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.raises(SystemExit) as ended:
        cli.main(run_words(cohort, out, SETTINGS))
    assert not ended.value.code
    return out


def test_a_finished_run_is_described(finished: Path, capsys: pytest.CaptureFixture) -> None:
    code, out, _ = spoken(["info", str(finished)], capsys)
    assert code == 0
    assert "900 cells x 150 genes" in out
    assert "own condition minus control" in out
    assert "donor_01|treated" in out
    assert_costs_are_told(out, keys.STAGES)


def test_a_run_is_described_for_programs(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code, out, _ = spoken(["info", str(finished), "--json"], capsys)
    told = json.loads(out)
    assert (code, told["state"], told["cells"], told["genes"], told["control"]) == (0, "finished", 900, 150, "control")
    assert sum(group["cells"] for group in told["groups"]) == 900
    assert {group["name"]: group["match_distance"] for group in told["groups"]}["donor_01|treated"] > 0
    assert [each["stage"] for each in told["costs"]] == list(keys.STAGES)
    (tmp_path / keys.RUN_JSON).write_text((finished / keys.RUN_JSON).read_text())
    (tmp_path / keys.DONE / "pack").mkdir(parents=True)
    (tmp_path / keys.DONE / "pack" / "00000.json").write_text("{}")
    code, out, _ = spoken(["info", str(tmp_path), "--json"], capsys)
    told = json.loads(out)
    assert (code, told["state"], told["shards_done"]["pack"], told["shards_done"]["train"]) == (0, "stopped", 1, 0)
    (tmp_path / keys.PROGRESS).parent.mkdir()
    (tmp_path / keys.PROGRESS).write_text("{")
    code, out, _ = spoken(["info", str(tmp_path), "--json"], capsys)
    told = json.loads(out)
    assert (code, told["shards_done"]["pack"], told["progress"]) == (0, 1, {})
    assert "progress.json is damaged" in told["damage"]


def assert_costs_are_told(out: str, stages: Sequence[str]) -> None:
    """Fail where the table of finished stages is not there, or not of these stages."""
    head, *rows = (line.split() for line in out[out.index("\nfinished ") + 1 :].splitlines()[: len(stages) + 1])
    assert head == ["finished", "s", "peak", "GB", "promised", "GB", "read", "GB", "written", "GB"]
    assert [row[0] for row in rows] == list(stages)
    assert all(float(peak) > 0 and float(promised) > 0 for _, _, peak, promised, *_ in rows)


def test_an_unfinished_run_says_how_far_it_is(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / keys.RUN_JSON).write_text((finished / keys.RUN_JSON).read_text())
    (tmp_path / keys.DONE / "pack").mkdir(parents=True)
    (tmp_path / keys.DONE / "pack" / "00000.json").write_text("{}")
    (tmp_path / keys.STAGES_LOG).parent.mkdir()
    (tmp_path / keys.STAGES_LOG).write_text("\n".join((finished / keys.STAGES_LOG).read_text().splitlines()[:2]))
    code, out, _ = spoken(["info", str(tmp_path)], capsys)
    assert code == 0
    assert "not finished; the same `run` command goes on" in out
    assert_costs_are_told(out, keys.STAGES[:2])


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr", ".csv", ".parquet"])
def test_a_part_of_the_results_is_written_to_a_file(
    finished: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture
) -> None:
    whole = anndata.read_zarr(finished / keys.RESULTS)
    genes = list(whole.var_names[[7, 3]])
    out = tmp_path / f"part{suffix}"
    code, said, _ = spoken(
        ["get", str(finished), "--layer", "ite", "--cells", 'cell_type == "type_1"', "--genes", ",".join(genes),
         "--out", str(out)], capsys,
    )  # fmt: skip
    assert code == 0
    assert "x 2 genes of ite" in said
    wanted = whole[(whole.obs["cell_type"] == "type_1") & (whole.obs["condition"] == "treated"), genes]
    table = {
        ".h5ad": lambda: anndata.read_h5ad(out).to_df(),
        ".zarr": lambda: anndata.read_zarr(out).to_df(),
        ".csv": lambda: pd.read_csv(out, index_col=0),
        ".parquet": lambda: pd.read_parquet(out),
    }[suffix]()
    assert list(table.columns) == genes
    expected = pd.DataFrame(wanted.layers["ite"], index=wanted.obs_names, columns=genes).loc[list(table.index)]
    assert np.allclose(table, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["get", "{run}", "--genes", "EFECT00001", "--out", "x.csv"], "Did you mean", id="gene"),
        pytest.param(["get", "{run}", "--cells", "cell_tpe == 1", "--out", "x.csv"], "the columns are", id="query"),
        pytest.param(["get", "{run}", "--out", "x.docx"], ".docx", id="suffix"),
        pytest.param(["get", "{run}", "--layer", "effect", "--out", "x.csv"], "--condition NAME", id="no_condition"),
        pytest.param(["get", "{run}", "--layer", "effect", "--condition", "treated", "--cells", "condition == 'control'",
                      "--out", "x.csv"], "match {run} --edges 'treated'", id="no_edges"),
        pytest.param(["all-genes", "{run}", "{run}/results.zarr", "--out", "{tmp}/all"], "'ndreamer_", id="no_cohort"),
        pytest.param(["info", "{tmp}/nothing"], "does not exist", id="no_run"),
        pytest.param(["run", "{tmp}/no.h5ad", "--out", "{tmp}/o", "--condition-key", "c", "--control", "a"],
                     "no.h5ad does not exist", id="no_input"),
        pytest.param(["run", "{cohort}", "--out", "{tmp}/o", "--condition-key", "conditon", "--control", "control"],
                     "Did you mean 'condition'", id="key"),
        pytest.param(["run", "{cohort}", "--out", "{tmp}/o"], "--condition-key", id="no_key"),
        pytest.param(["run", "{cohort}", "--out", "{tmp}/o", "--set", "train.epoch=3"], "'train.epochs'", id="setting"),
        pytest.param(["run", "{cohort}", "--out", "{tmp}/o", "--set", "nonsense"], "--set takes", id="set"),
        pytest.param(["run", "{cohort}", "--out", "{tmp}/o", "--config", "{tmp}/no.yaml"], "cannot be read", id="config"),
        pytest.param(["simulate", "{cohort}"], "exists already", id="simulate_over"),
    ],
)  # fmt: skip
def test_a_refusal_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, cohort: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    filled = [word.format(run=finished, tmp=tmp_path, cohort=cohort) for word in arguments]
    code, out, err = spoken(filled, capsys)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message.format(run=finished) in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_settings_may_come_from_a_file(cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text("cohort: {condition_key: condition, control: control, batch_key: donor}\ntrain: {epochs: 3}\n")
    sets = [w for n, v in SETTINGS.items() if n != "train.epochs" for w in ("--set", f"{n}={v}".replace("'", ""))]
    code, _, err = spoken(
        ["run", str(cohort), "--out", str(tmp_path / "run"), "--preset", "small", "--config", str(config), *sets],
        capsys,
    )  # fmt: skip
    assert code == 0, err
    assert len(pd.read_csv(tmp_path / "run" / keys.METRICS)) == 9


def test_more_edges_are_matched(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    assert spoken(["match", str(run), "--edges", "treated"], capsys)[:2] == (
        0, f"added 9 pairs of groups to {run}/matches.zarr\n",
    )  # fmt: skip
    code, _, told = spoken(["match", str(run), "--edges", "treatd"], capsys)
    assert code == 2
    assert "Did you mean 'treated'" in told


def test_effects_of_all_genes_are_written_and_read(
    cohort: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    every, one = tmp_path / "all", tmp_path / "one.csv"
    serial = ["--set", "run.serial=true", "--set", "run.progress=false"]
    code, said, err = spoken(["all-genes", str(finished), str(cohort), "--out", str(every), *serial], capsys)
    assert code == 0, err
    assert said == f"wrote {every}: 900 cells x 200 genes; layers: ite\n"
    stored = anndata.read_zarr(every / keys.RESULTS)
    gene = stored.var_names[~stored.var["ndreamer_modelled"]][0]
    names = ["--condition", "treated", "--genes", gene, "--cells", "condition == 'treated'"]
    code, _, err = spoken(
        ["get", str(finished), "--layer", "effect", "--cohort", str(cohort), *names, "--out", str(one)], capsys
    )
    assert code == 0, err
    effect = pd.read_csv(one, index_col=0)[gene]
    assert len(effect) == (stored.obs["condition"] == "treated").sum() > 100
    np.testing.assert_allclose(stored[effect.index, gene].layers["ite"].ravel(), effect, rtol=1e-6)


def test_a_cohort_is_simulated_as_asked(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "cohort.zarr"
    code, said, _ = spoken(
        ["simulate", str(out), "--cells", "300", "--genes", "120", "--batches", "4", "--design", "nested"], capsys
    )
    assert code == 0
    assert str(out) in said
    obs = anndata.read_zarr(out).obs
    assert len(obs) == 300
    assert (obs.groupby("donor", observed=True)["condition"].nunique() == 1).all()


def test_all_settings_are_printed_as_a_file_of_settings(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code, out, _ = spoken(["settings", "--preset", "small"], capsys)
    assert code == 0
    (tmp_path / "all.yaml").write_text(out)
    assert nd.Settings.build(config=cli._read_config(tmp_path / "all.yaml")) == nd.Settings.build(preset="small")


def test_the_version_is_shown(capsys: pytest.CaptureFixture) -> None:
    assert spoken(["--version"], capsys) == (0, f"{nd.__version__}\n", "")


def test_a_notebooks_own_drawing_does_not_reach_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("MPLBACKEND", "module://of_another_environment")
    assert spoken(["--version"], capsys)[0] == 0
    assert os.environ["MPLBACKEND"] == "agg"


def test_help_names_every_command(capsys: pytest.CaptureFixture) -> None:
    code, out, _ = spoken(["--help"], capsys)
    assert code == 0
    assert all(name in out for name in ("run", "match", "all-genes", "demo", "simulate", "info", "get"))
    assert all(f" {code}, " in f" {' '.join(out.split())}" for code in (0, 1, 2, 130, 143))  # the exit codes


def test_importing_the_package_loads_nothing_heavy_and_changes_nothing() -> None:
    script = (
        "import sys, zarr; before = zarr.config.get('codec_pipeline.path')\n"
        "import ndreamer_dist\n"
        "assert not {'torch', 'ray', 'scanpy'} & set(sys.modules)\n"
        "ndreamer_dist.run, ndreamer_dist.open_results, ndreamer_dist.simulate\n"
        "import torch\n"
        "assert zarr.config.get('codec_pipeline.path') == before\n"
        "assert torch.get_num_threads() == int(sys.argv[1])\n"
    )
    import torch

    subprocess.run([sys.executable, "-c", script, str(torch.get_num_threads())], check=True, timeout=120)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_population_effects_are_written_as_a_table(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture, suffix: str
) -> None:
    out = tmp_path / f"cate{suffix}"
    words = ["cate", str(finished), "--by", "cell_type", "--out", str(out), "--min-cells", "3", "--genes"]
    genes = list(nd.open_results(finished).var_names[:2])
    code, said, _ = spoken([*words, ",".join(genes)], capsys)
    assert code == 0
    table = pd.read_csv(out) if suffix == ".csv" else pd.read_parquet(out)
    assert set(table["gene"]) == set(genes)
    assert f"{len(table)} rows" in said
    whole = ["cate", str(finished), "--out", str(out), "--genes", genes[0]]
    assert "1 populations" in spoken(whole, capsys)[1]
    code, _, said = spoken([*words[:-3], "--genes", "XXX"], capsys)
    assert (code, said.count("\n")) == (2, 1)


def test_where_nothing_can_be_tested_the_answer_says_so(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["cate", str(finished), "--by", "cell_type", "--out", str(tmp_path / "x.csv"), "--min-cells", "10000"]
    code, said, _ = spoken(words, capsys)
    assert code == 0
    assert "no test was possible: no population has 3 donors per condition" in said
    assert "p_adjusted" not in said


def test_a_table_goes_to_no_other_format(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code, _, said = spoken(["cate", str(finished), "--by", "cell_type", "--out", str(tmp_path / "x.h5ad")], capsys)
    assert code == 2
    assert "expected one of '.csv', '.parquet'" in said


# --- what a first week showed ------------------------------------------------------------------------------------------


def test_names_come_from_files_and_tables_go_to_tsv(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    results = nd.open_results(finished)
    genes, cells = list(results.var_names[3:5]), list(results.obs.index[10:0:-3])
    (tmp_path / "genes.txt").write_text("\n".join(genes) + "\n\n")
    (tmp_path / "cells.tsv").write_text("".join(f"{cell}\tany\n" for cell in cells))
    out = tmp_path / "part.tsv"
    words = ["get", str(finished), "--layer", "denoised", "--out", str(out)]
    files = ["--genes", f"@{tmp_path / 'genes.txt'}", "--cells", f"@{tmp_path / 'cells.tsv'}"]
    code, _, _ = spoken([*words, *files], capsys)
    assert code == 0
    table = pd.read_csv(out, sep="\t", index_col=0)
    assert list(table.index) == cells
    assert list(table.columns) == genes
    code, _, said = spoken([*words, "--genes", f"@{tmp_path / 'none.txt'}"], capsys)
    assert (code, said.count("\n")) == (2, 1)
    assert "none.txt" in said


def test_a_query_that_selects_nothing_is_met_with_what_was_meant(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["get", str(finished), "--out", str(tmp_path / "x.csv"), "--cells"]
    level = str(nd.open_results(finished).obs["cell_type"].iloc[0])
    code, _, said = spoken([*words, f"cell_type == '{level}x'"], capsys)
    assert code == 2
    assert f"Did you mean {level!r}" in said
    code, _, said = spoken([*words, f"celltype == '{level}'"], capsys)
    assert code == 2
    assert "Did you mean 'cell_type'" in said


def test_quiet_leaves_answers_and_verbose_tells_what_was_read(
    cohort: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    code, said, told = spoken([*run_words(cohort, finished, SETTINGS), "--quiet"], capsys)
    assert (code, told, caplog.messages) == (0, "", [])
    assert said.startswith("done: ")
    words = ["get", str(finished), "--genes", nd.open_results(finished).var_names[0], "--out", str(tmp_path / "x.csv")]
    for first, expected in (([], False), (["--verbose"], True)):
        caplog.clear()
        assert spoken([*first, *words], capsys)[0] == 0
        assert any(message.startswith("layer: read ") for message in caplog.messages) == expected


def test_quiet_hides_the_bars_of_commands_that_are_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for words, bars in (([], True), (["--quiet"], False)):
        sizes = ["--cells", "100", "--genes", "50"]
        _, _, told = spoken(["simulate", str(tmp_path / f"cohort{bars}.zarr"), *sizes, *words], capsys)
        _, _, also = spoken(
            ["convert", str(tmp_path / f"cohort{bars}.zarr"), str(tmp_path / f"{bars}.zarr"), *words], capsys
        )
        assert (("simulate:" in told), ("X:" in also)) == (bars, bars), told + also


def test_plan_says_where_it_works_and_what_the_stages_took(
    cohort: Path, finished: Path, capsys: pytest.CaptureFixture
) -> None:
    words = run_words(cohort, finished, {k: v for k, v in SETTINGS.items() if not k.startswith("run.")})
    code, said, _ = spoken(["plan", *words[1:]], capsys)
    assert code == 0
    assert "works in   " in said
    assert "cells" in said.split("works in")[1].splitlines()[0] or "processor" in said
    assert "without ~: what the stages took in this run directory" in said


def test_info_shows_the_settings_as_yaml(finished: Path, capsys: pytest.CaptureFixture) -> None:
    code, said, _ = spoken(["info", str(finished)], capsys)
    assert code == 0
    text = said.partition("settings that affect the results:\n")[2].partition("\n\n")[0]
    told = yaml.safe_load(textwrap.dedent(text))
    assert told["hvg"]["num_hvg"] == SETTINGS["hvg.num_hvg"]
    assert repr(nd.open_results(finished)).startswith("Results of ")
