"""The command line: one command for each Python function, with the same names.

Answers go to standard output; progress and log lines go to standard error. Every refusal is one line with exit code 2.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ndreamer_dist import REMOVED_NAMES
from ndreamer_dist.compute.events import Lines
from ndreamer_dist.compute.machine import use_writable_caches
from ndreamer_dist.compute.signals import StopRequest, stop_signals
from ndreamer_dist.errors import NDreamerError, QueryError, SettingsError, StoreError, printable
from ndreamer_dist.settings import parse_assignments, read_yaml

EXIT_CODES = """\
Exit codes: 0, done; 1, unexpected error, with a stack trace; 2, refused: the last line on standard error names the input,
setting, file or resource at fault and says what to change (`check`: files are damaged); 130, stopped by Ctrl-C, or 143, by
SIGTERM: the same command continues. Results go to standard output, progress and errors to standard error."""
"""Text shown below `--help` and in docs/how-to/workflows.md."""

app = typer.Typer(
    name="ndreamer-dist",
    help="Remove batch effects from single-cell RNA-seq and estimate what a condition does to every cell.",
    epilog=EXIT_CODES.replace("\n", " "),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Preset = Literal["paper", "small"]
Normalise = Literal["auto", "counts", "none"]
Layout = Literal["crossed", "nested"]
Standard = Literal["all", "treated"]
Format = Literal["ndreamer"]
Layer = Literal["ite", "denoised", "batch_effect", "expression", "effect", "counterfactual"]

USAGE_ERROR: Any = typer.BadParameter.__base__
"""Base class of typer's errors for unknown options, missing arguments and values of a wrong type."""
LONGEST_LINE = 4000
"""Maximum number of characters of a printed error message."""
STOPPED = 130
"""Code that typer returns instead of raising KeyboardInterrupt."""

Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="STAGE.NAME=VALUE",
        help="Change one setting. Repeatable; `ndreamer-dist settings` lists all settings.",
    ),
]

Input = Annotated[str, typer.Argument(metavar="INPUT", help="h5ad file or zarr store, by path or URL.")]
ConditionKey = Annotated[
    list[str] | None,
    typer.Option(
        help="Column of obs that holds the condition. Repeatable: several columns make combinations, drugA:mut."
    ),
]
Control = Annotated[str | None, typer.Option(help="Name of the control condition; for combinations, as in none:wt.")]
BatchKey = Annotated[
    list[str] | None, typer.Option(help="Column of obs that holds the batch (donor, site). Repeatable.")
]
PresetName = Annotated[
    Preset,
    typer.Option(
        help="paper: the method's defaults. small: for laptops; separates cell types, not states within them."
    ),
]
Embedding = Annotated[
    str | None,
    typer.Option(
        help="Space to match in: ndreamer (default), pca, harmony, state, ndreamer+state, or obsm:KEY of the input."
    ),
]
Redo = Annotated[
    bool,
    typer.Option("--redo", help="Run finished stages again if their settings have changed, and the stages after them."),
]
MatchWithin = Annotated[
    str | None,
    typer.Option(
        "--match-within", metavar="COLUMN",
        help="Match cells only within the types in this column of obs, where a group has enough cells of the type. "
        "ndreamer_cluster_low: within the low-resolution clusters (default: none).",
    ),
]  # fmt: skip
ValuesOfX = Annotated[
    Normalise | None,
    typer.Option(help="What X holds. counts: raw counts; none: log-normalised values; auto: detect which (default)."),
]
LayerOfInput = Annotated[
    str | None,
    typer.Option("--layer", help="Layer to read instead of X; raw: the counts in .raw, with the genes of .raw."),
]
GeneNames = Annotated[
    str | None,
    typer.Option(help="Column of var with the gene names to use, e.g. feature_name for symbols (default: var_names)."),
]
Excluded = Annotated[list[str] | None, typer.Option(help="Condition to leave out, with its cells. Repeatable.")]
Config = Annotated[
    Path | None,
    typer.Option(help="YAML file of settings by stage; `ndreamer-dist settings` writes one.", dir_okay=False),
]
Workers = Annotated[int | None, typer.Option(help="Training workers (default: 1).")]
NeighbourCount = Annotated[
    int | None,
    typer.Option(
        "--neighbours", min=1, help="Number of nearest neighbours per group that an effect averages (default: 1)."
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        help="Ray cluster to run on: auto, HOST:PORT or ray://HOST:10001 (default: RAY_ADDRESS, else a local Ray)."
    ),
]
ResultsAddress = Annotated[str, typer.Argument(metavar="DIR", help="Run directory, or results.zarr, or its URL.")]
Compared = Annotated[
    str | None, typer.Option(help="Condition to compare with the control (default: every other condition).")
]
Genes = Annotated[
    str | None, typer.Option(help="Gene names, separated by commas; or @FILE with one name per line (default: all).")
]
InputAgain = Annotated[
    str | None, typer.Option(help="Input cohort of the run; needed for genes that were not modelled.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print a JSON object, for programs.")]
InputOrRun = Annotated[
    str, typer.Argument(metavar="INPUT", help="h5ad file or zarr store to run, or the directory of a finished run.")
]
Spaces = Annotated[
    str | None,
    typer.Option(
        "--embedding",
        help="Spaces, separated by commas (default: pca,harmony,state; for a finished run, all its spaces).",
    ),
]
RunOfSpaces = Annotated[str | None, typer.Option(help="Run directory for all spaces; required if INPUT is a cohort.")]
PresetOfSpaces = Annotated[Preset | None, typer.Option(help="paper (default) or small, as for `run`.")]
CellTypes = Annotated[
    str | None, typer.Option(help="Column of obs that names cell types (default: clusters; the output says which).")
]
InputOfRun = Annotated[
    str | None,
    typer.Option(help="Input cohort of a finished run; needed to measure how much of the cell state a space keeps."),
]
TableFile = Annotated[
    Path | None,
    typer.Option(
        help="Write the table here too (.csv, .tsv or .parquet), the figure beside it; DIR/report/comparison.csv is always written."
    ),
]
StateEffects = Annotated[
    float,
    typer.Option(
        min=0, max=1, help="Share of the effect that cells in the lowest state lack (0: it depends on no state)."
    ),
]
DonorKey = Annotated[str | None, typer.Option(help="Column of obs that names the donor (default: the batch).")]
PopulationColumn = Annotated[
    str | None,
    typer.Option(help="Column of obs that names populations, e.g. cell_type (default: one population of all cells)."),
]
OneSpace = Annotated[str | None, typer.Option(help="Matching space, if the run has several (default: the first).")]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(metadata.version("ndreamer-dist"))
        raise typer.Exit


@app.callback()
def _whole(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Log more, for example how much was read. May also follow the command.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Print no progress bars and only warnings. May also follow the command.")
    ] = False,
) -> None:
    del version  # handled by its callback
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    logging.getLogger("ndreamer_dist").setLevel(level)


@app.command()
def run(
    cohort: Input,
    out: Annotated[str, typer.Option(help="Run directory, local or on object storage.")],
    condition_key: ConditionKey = None,
    control: Control = None,
    batch_key: BatchKey = None,
    embedding: Embedding = None,
    match_within: MatchWithin = None,
    preset: PresetName = "paper",
    normalise: ValuesOfX = None,
    layer: LayerOfInput = None,
    gene_names: GeneNames = None,
    exclude_condition: Excluded = None,
    config: Config = None,
    assignments: Set = None,
    workers: Workers = None,
    neighbours: NeighbourCount = None,
    address: Address = None,
    redo: Redo = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over: delete the run that --out holds.")] = False,
) -> None:
    """Run the whole job on a cohort. The same command continues an interrupted run and leaves a finished one alone."""
    from ndreamer_dist.pipeline import run as run_job

    options = {"train.workers": workers, "run.address": address, "match.neighbours": neighbours}
    options |= _cohort_settings(normalise, layer, gene_names, exclude_condition) | {"match.within": match_within}
    finished = run_job(
        cohort,
        out=out,
        condition_key=tuple(condition_key) if condition_key else None,
        control=control,
        batch_key=tuple(batch_key) if batch_key else None,
        embedding=embedding,
        preset=preset,
        config=_read_config(config),
        settings=_overrides(assignments, options),
        redo=redo,
        fresh=fresh,
    )
    if finished.annotation:
        print(f"added from obs of {cohort}: {printable(str(finished.annotation))}")
    where = shlex.quote(finished.url)
    print(f"done: {finished.url}\nlook at it with: ndreamer-dist info {where}, or ndreamer-dist report {where}")


@app.command("map")
def map_cells(
    cohort: Input,
    onto: Annotated[str, typer.Option(help="Directory of the finished run; it is not changed.")],
    out: Annotated[str, typer.Option(help="Directory for the mapped cells, local or on object storage.")],
    embedding: OneSpace = None,
    fill_missing_genes: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Largest share of the run's genes that the new cells may lack; missing genes count as zero.",
        ),
    ] = 0.0,
    extend: Annotated[
        bool,
        typer.Option(
            "--extend",
            help="Let cells that are later mapped onto --out be matched with these cells too; match new cells with new controls.",
        ),
    ] = False,
    layer: LayerOfInput = None,
    gene_names: GeneNames = None,
    assignments: Set = None,
    address: Address = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over: delete what --out holds.")] = False,
) -> None:
    """Map cells of new donors, batches or conditions onto a finished run, without training again."""
    from ndreamer_dist.commands.mapping import map as map_onto

    options = {"run.address": address} | _cohort_settings(None, layer, gene_names, None)
    mapped = map_onto(
        cohort, onto=onto, out=out, embedding=embedding, fill_missing_genes=fill_missing_genes, extend=extend,
        settings=_overrides(assignments, options), fresh=fresh,
    )  # fmt: skip
    print(f"done: {mapped.url}\n{printable(str(mapped.results.mapped))}")


@app.command()
def plan(
    cohort: Input,
    out: Annotated[
        str | None,
        typer.Option(
            help="Run directory that `run` will write; the plan compares the free disk there with what the run needs."
        ),
    ] = None,
    condition_key: ConditionKey = None,
    control: Control = None,
    batch_key: BatchKey = None,
    embedding: Embedding = None,
    match_within: MatchWithin = None,
    preset: PresetName = "paper",
    normalise: ValuesOfX = None,
    layer: LayerOfInput = None,
    gene_names: GeneNames = None,
    exclude_condition: Excluded = None,
    config: Config = None,
    assignments: Set = None,
    workers: Workers = None,
    neighbours: NeighbourCount = None,
    as_json: AsJson = False,
) -> None:
    """Show what `run` would do and need (groups, steps, memory, disk, time), without running it."""
    from ndreamer_dist.pipeline import plan as plan_job

    options = {"train.workers": workers, "match.neighbours": neighbours, "match.within": match_within}
    options |= _cohort_settings(normalise, layer, gene_names, exclude_condition)
    planned = plan_job(
        cohort,
        out=out,
        condition_key=tuple(condition_key) if condition_key else None,
        control=control,
        batch_key=tuple(batch_key) if batch_key else None,
        embedding=embedding,
        preset=preset,
        config=_read_config(config),
        settings=_overrides(assignments, options),
    )
    print(planned.to_json() if as_json else planned)


@app.command()
def compare(
    source: InputOrRun,
    embedding: Spaces = None,
    out: RunOfSpaces = None,
    condition_key: ConditionKey = None,
    control: Control = None,
    batch_key: BatchKey = None,
    by: CellTypes = None,
    donor_key: DonorKey = None,
    cohort: InputOfRun = None,
    table: TableFile = None,
    as_json: AsJson = False,
    preset: PresetOfSpaces = None,
    normalise: ValuesOfX = None,
    layer: LayerOfInput = None,
    gene_names: GeneNames = None,
    exclude_condition: Excluded = None,
    config: Config = None,
    assignments: Set = None,
    workers: Workers = None,
    neighbours: NeighbourCount = None,
    match_within: MatchWithin = None,
    address: Address = None,
) -> None:
    """Compare matching spaces on one cohort in a table, and recommend one."""
    from ndreamer_dist.commands.compare import compare as compare_spaces

    options = {"train.workers": workers, "run.address": address, "match.neighbours": neighbours}
    options |= _cohort_settings(normalise, layer, gene_names, exclude_condition) | {"match.within": match_within}
    run_arguments = {
        "out": out, "condition_key": tuple(condition_key) if condition_key else None, "control": control, "preset": preset, "config": _read_config(config),
        "batch_key": tuple(batch_key) if batch_key else None, "settings": _overrides(assignments, options) or None,
    }  # fmt: skip
    comparison = compare_spaces(
        source, embedding=embedding, by=by, donor_key=donor_key, cohort=cohort, save=table,
        **{name: value for name, value in run_arguments.items() if value is not None},
    )  # fmt: skip
    print(comparison.to_json() if as_json else comparison)


@app.command()
def settings(
    preset: Annotated[Preset, typer.Option(help="Print the values of this preset.")] = "paper",
) -> None:
    """Print every setting with its value and meaning, as YAML for --config."""
    from ndreamer_dist.settings import Settings

    print(Settings.build(preset=preset).to_yaml(), end="")


@app.command()
def match(
    run_directory: Annotated[str, typer.Argument(metavar="DIR", help="Run directory.")],
    edges: Annotated[
        str,
        typer.Option(
            help="all: match every pair of groups. NAME of a condition: match every group to the groups of that condition."
        ),
    ] = "all",
    embedding: OneSpace = None,
    assignments: Set = None,
    address: Address = None,
) -> None:
    """Match more pairs of groups of a finished run, for other contrasts. The results do not change."""
    from ndreamer_dist.pipeline import add_matches

    how = _overrides(assignments, {"run.address": address})
    added = add_matches(run_directory, edges=edges, embedding=embedding, settings=how)
    space = f" of the space {embedding}" if embedding else ""
    print(f"added {added} pairs of groups{space} to {run_directory}/matches.zarr")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the simulated cohort and the run.")] = Path("ndreamer_demo"),
    cells: Annotated[int, typer.Option(min=2000, help="Cells to simulate.")] = 20_000,
    genes: Annotated[int, typer.Option(min=200, help="Genes to simulate.")] = 2_000,
    state_effects: StateEffects = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the cohort and of the run.")] = 0,
    assignments: Set = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over: delete the cohort and the run.")] = False,
) -> None:
    """Simulate a small cohort, run the whole job on it, and show how well the run recovers the true effects."""
    from ndreamer_dist.commands.demo import run_demo

    sizes = {"cells": cells, "genes": genes, "state_effects": state_effects}
    print(run_demo(out, sizes=sizes, seed=seed, settings=_overrides(assignments, {}), fresh=fresh))


@app.command()
def simulate(
    out: Annotated[str, typer.Argument(metavar="OUT.zarr", help="zarr store to write.")],
    cells: Annotated[int, typer.Option(min=1, help="Number of cells.")] = 20_000,
    genes: Annotated[int, typer.Option(min=1, help="Number of genes.")] = 2_000,
    batches: Annotated[int, typer.Option(min=1, help="Number of donors.")] = 4,
    conditions: Annotated[int, typer.Option(min=2, help="Number of conditions, the control included.")] = 2,
    design: Annotated[
        Layout, typer.Option(help="crossed: every donor in every condition; nested: each in one.")
    ] = "crossed",
    state_effects: StateEffects = 0.0,
    state_shift: Annotated[
        float,
        typer.Option(
            min=-2, max=2, help="Shift of the cell state in conditions other than the control, in standard deviations."
        ),
    ] = 0.0,
    pathways: Annotated[
        int,
        typer.Option(
            min=0, help="Simulate a screen: the conditions are knock-outs of this many pathways (0: no screen)."
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
) -> None:
    """Simulate a cohort whose true effects are known."""
    from ndreamer_dist.commands.demo import simulate_with_bar

    simulate_with_bar(
        out, cells=cells, genes=genes, batches=batches, conditions=conditions, design=design, state_effects=state_effects,
        state_shift=state_shift, pathways=pathways, seed=seed,
    )  # fmt: skip
    print(f"wrote {out}: columns condition (control: control), donor, cell_type")


@app.command()
def convert(
    cohort: Input,
    out: Annotated[Path, typer.Argument(metavar="OUT.zarr", help="Zarr store to write.")],
) -> None:
    """Convert a cohort stored by columns (CSC) into a zarr store by rows, which `run` can read. Works out of core."""
    from ndreamer_dist.commands.convert import convert as convert_cohort

    cells, genes = convert_cohort(cohort, out)
    print(f"wrote {out}: {cells} cells x {genes} genes, by rows")


@app.command()
def info(
    run_directory: ResultsAddress,
    as_json: AsJson = False,
) -> None:
    """Show what a finished run holds, or the progress of a running one."""
    from ndreamer_dist.commands.info import describe

    print(describe(run_directory, as_json=as_json))


@app.command()
def check(
    run_directory: Annotated[str, typer.Argument(metavar="DIR", help="Run directory, or its URL.")],
    mend: Annotated[
        bool, typer.Option("--mend", help="Delete the damaged files, so that `run` makes them again.")
    ] = False,
    assignments: Set = None,
    address: Address = None,
) -> None:
    """Read all files of a run and list the damaged and missing ones. The exit code is 2 if there are any."""
    from ndreamer_dist.commands.verify import check as check_run

    result = check_run(run_directory, mend=mend, settings=_overrides(assignments, {"run.address": address}))
    for line in result.damage:
        print(printable(line))
    if result.damage:
        what = "the damaged files are deleted" if mend else "--mend deletes the damaged files"
        msg = (
            f"{len(result.damage)} of {result.files} files of {result.url} are damaged or missing; {what}, and the run's own "
            "command makes them again"
        )
        raise StoreError(msg)
    print(f"{result.url}: {result.files} files, {result.bytes / 1e6:.1f} MB, all as they were written")


@app.command()
def get(
    run_directory: ResultsAddress,
    out: Annotated[Path, typer.Option(help="File to write: .h5ad, .zarr, .csv, .tsv or .parquet.")],
    layer: Annotated[Layer, typer.Option(help="Layer to read.")] = "ite",
    cells: Annotated[
        str | None,
        typer.Option(
            help="""Query on obs, e.g. 'cell_type == "B cells"'; or @FILE with one cell name per line (default: all)."""
        ),
    ] = None,
    genes: Genes = None,
    embedding: Annotated[
        bool, typer.Option(help="Add the coordinates of the matching space to .h5ad and .zarr files, for plots.")
    ] = True,
    condition: Annotated[
        str | None, typer.Option(help="Condition of the layers effect and counterfactual, which require it.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Condition to compare an effect with (default: the control).")
    ] = None,
    cohort: InputAgain = None,
) -> None:
    """Write a part of the results to a file, reading only the chunks that hold it."""
    from ndreamer_dist.results.export import export_part

    (n_cells, n_genes), reads = export_part(
        run_directory, out, layer, cells=_selected(cells), genes=_names(genes), embedding=embedding, cohort=cohort, condition=condition,
        baseline=baseline,
    )  # fmt: skip
    print(f"wrote {out}: {n_cells} cells x {n_genes} genes of {layer}; read {reads}")


@app.command()
def annotate(
    run_directory: ResultsAddress,
    table: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="Labels of cells: .csv or .tsv with the cell names in the first column, .parquet, .h5ad or .zarr.",
        ),
    ],
    columns: Annotated[
        str | None,
        typer.Option(help="Columns to add, separated by commas (default: all columns that are new or differ)."),
    ] = None,
) -> None:
    """Add columns to the obs of a finished run, such as cell-type labels; every other command can then use them."""
    from ndreamer_dist.results.annotations import table_of_file
    from ndreamer_dist.stats.results import open_results

    annotation = open_results(run_directory).annotate(table_of_file(table, _names(columns)))
    print(f"annotated {run_directory}: {printable(str(annotation))}")


@app.command()
def cate(
    run_directory: ResultsAddress,
    out: Annotated[Path, typer.Option(help="File to write: .csv, .tsv or .parquet.")],
    by: PopulationColumn = None,
    condition: Compared = None,
    baseline: Annotated[str | None, typer.Option(help="Condition to compare with (default: the control).")] = None,
    genes: Genes = None,
    cohort: InputAgain = None,
    donor_key: DonorKey = None,
    min_cells: Annotated[int, typer.Option(min=1, help="Leave out donors with fewer cells in a population.")] = 10,
    population: Annotated[
        Standard,
        typer.Option(
            help="Cells at which donors are compared: all: the cells of all donors; treated: those of the treated donors."
        ),
    ] = "all",
    covariates: Annotated[
        str | None,
        typer.Option(help="Donor covariates for a linear model: columns of obs, separated by commas."),
    ] = None,
) -> None:
    """Write the effect of the condition on each population and gene, with donors as replicates."""
    from ndreamer_dist.commands.cate import write_cate
    from ndreamer_dist.results.export import TABLES, checked
    from ndreamer_dist.stats.results import open_results

    checked(out, TABLES)
    counts = write_cate(
        open_results(run_directory), out, condition=condition, baseline=baseline, by=by, genes=_names(genes),
        cohort=cohort, donor_key=donor_key, min_cells=min_cells, population=population,
        covariates=_names(covariates) or (),
    )  # fmt: skip
    for line in counts.lines(out):
        print(line)


@app.command()
def null(
    run_directory: ResultsAddress,
    out: Annotated[Path, typer.Option(help="File to write: .csv, .tsv or .parquet.")],
    by: PopulationColumn = None,
    condition: Compared = None,
    donor_key: DonorKey = None,
    labellings: Annotated[int, typer.Option(min=1, help="Number of permutations of the donor labels.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the permutations.")] = 0,
) -> None:
    """Check the calibration of the tests on permuted donor labels, where there is no effect to find."""
    from ndreamer_dist.results.export import TABLES, checked, save_table
    from ndreamer_dist.stats.null import rates
    from ndreamer_dist.stats.results import open_results

    checked(out, TABLES)
    table = open_results(run_directory).null(
        by, condition=condition, donor_key=donor_key, labellings=labellings, seed=seed
    )
    save_table(table, out)
    print(f"wrote {out}; share of p-values at or below:\n{rates(table).round(4).to_string()}")


@app.command("all-genes")
def all_genes(
    run_directory: ResultsAddress,
    cohort: Annotated[str, typer.Argument(metavar="INPUT", help="Input cohort of the run.")],
    out: Annotated[str, typer.Option(help="Directory to write, local or on object storage.")],
    layers: Annotated[
        str, typer.Option(help="Layers to store, separated by commas: ite, denoised, batch_effect.")
    ] = "ite",
    assignments: Set = None,
) -> None:
    """Write the effects on all genes of the cohort, modelled or not, computed from the run's matches."""
    from ndreamer_dist.commands.all_genes import all_genes as write_all

    results = write_all(
        run_directory, cohort, out=out, layers=_names(layers) or [], settings=_overrides(assignments, {})
    )
    print(
        f"wrote {out}: {len(results.obs)} cells x {len(results.var_names)} genes; layers: {', '.join(results.layers)}"
    )


@app.command()
def report(
    run_directory: ResultsAddress,
    out: Annotated[str | None, typer.Option(help="HTML file to write (default: DIR/report/report.html).")] = None,
    by: Annotated[
        str | None,
        typer.Option(
            help="Column of obs that names populations (default: the column that looks most like cell types)."
        ),
    ] = None,
    condition: Compared = None,
    donor_key: DonorKey = None,
) -> None:
    """Write an HTML report: what the run found, in figures and tables, and how far to trust it."""
    from ndreamer_dist.report.page import report as write_report

    print(f"wrote {write_report(run_directory, out, by=by, condition=condition, donor_key=donor_key)}")


@app.command()
def export(
    run_directory: ResultsAddress,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    layout: Annotated[
        Format, typer.Option("--format", help="ndreamer: the layout of the published package.")
    ] = "ndreamer",
    parts: Annotated[
        str, typer.Option(help="Parts to write, separated by commas: model, space, decomposition, effects.")
    ] = "model,space,decomposition,effects",
) -> None:
    """Write all results in the file layout of the published package."""
    from ndreamer_dist.commands.ndreamer_layout import export as write_layout

    chosen: Any = _names(parts) or []  # `export` validates the names
    written = write_layout(run_directory, out=out, format=layout, parts=chosen)
    print(f"wrote {len(written)} files to {out}")


def _names(text: str | None) -> list[str] | None:
    """Return the names in a comma-separated list, or in the file of an @FILE, one name per line."""
    if text and text.startswith("@"):
        return _listed(text)
    return [name.strip() for name in text.split(",") if name.strip()] if text else None


def _cohort_settings(
    normalise: str | None, layer: str | None, gene_names: str | None, exclude: list[str] | None
) -> dict[str, Any]:
    """Return the settings for the options that describe the input."""
    return {
        "cohort.normalise": normalise, "cohort.layer": layer, "cohort.gene_names": gene_names,
        "cohort.exclude_conditions": tuple(exclude) if exclude else None,
    }  # fmt: skip


def _listed(text: str) -> list[str]:
    """Return the names in the file of an @FILE: the first column of a table, or one name per line."""
    try:
        lines = Path(text[1:]).expanduser().read_text().splitlines()
    except (OSError, ValueError) as error:
        msg = f"{text}: the file cannot be read ({error})"
        raise QueryError(msg) from None
    names = [re.split("[\t,]", line)[0].strip() for line in lines]
    return [name for name in names if name]


def _selected(text: str | None) -> str | list[str] | None:
    """Return the cell names in the file of an @FILE; leave a query on obs as it is."""
    return _listed(text) if text and text.startswith("@") else text


def _overrides(assignments: list[str] | None, options: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of `--set` and of the options that set one; options win, unset ones (`None`) do not count."""
    quiet = not logging.getLogger("ndreamer_dist").isEnabledFor(logging.INFO)
    bars = {"run.progress": False} if quiet else {}
    return bars | parse_assignments(assignments or []) | {k: v for k, v in options.items() if v is not None}


def _read_config(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        text = path.read_text()
    except (OSError, ValueError) as error:
        msg = f"--config {path}: cannot be read ({error})"
        raise SettingsError(msg) from None
    values = read_yaml(text, f"--config {path}:")
    if not isinstance(values, dict):
        msg = f"--config {path}: expected settings by stage, found {type(values).__name__}"
        raise SettingsError(msg)
    return values


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and end the process with one of the `EXIT_CODES`."""
    # No command opens a window, and the back end that a notebook sets may not be installed.
    os.environ["MPLBACKEND"] = "agg"
    run_program(lambda: run_command(arguments))


def run_command(arguments: list[str] | None) -> None:
    """Run the command that the arguments name; by default those of the process.

    Raises
    ------
    SettingsError
        There is no such command, or it does not take these arguments.
    """
    words = _global_first(sys.argv[1:] if arguments is None else arguments)
    command = next((word for word in words if not word.startswith("-")), "")
    if command in REMOVED_NAMES:
        msg = f"command '{command}' was removed: {REMOVED_NAMES[command]}"
        raise SettingsError(msg)
    try:
        code = app(args=words, prog_name=app.info.name, standalone_mode=False)
    except USAGE_ERROR as error:
        text = error.format_message().replace("Value error, ", "")
        if not text:  # without arguments typer has shown the help
            sys.exit(2)
        path = error.ctx.command_path if error.ctx else app.info.name
        msg = f"{text.rstrip('.')} (see: {path} --help)"
        raise SettingsError(msg) from None
    if code == STOPPED:
        raise KeyboardInterrupt
    sys.exit(code)


def _global_first(words: list[str]) -> list[str]:
    """Return the arguments with the global options `--verbose` and `--quiet` moved before the command."""
    first = [word for word in words if word in ("--verbose", "--quiet")]
    return [*first, *(word for word in words if word not in first)]


def run_program(work: Callable[[], object]) -> None:
    """Run work as a program that logs to standard error and ends with one of the `EXIT_CODES`."""
    # Waiting threads must sleep: spinning ones would take the processors from the job. torch reads this on import.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    lines, handler = Lines(), logging.StreamHandler(sys.stderr)
    handler.setFormatter(lines)
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("ndreamer_dist").setLevel(logging.INFO)
    with stop_signals() as stop:
        _run_or_exit(work, lines, stop)


def _run_or_exit(work: Callable[[], object], lines: Lines, stop: StopRequest) -> None:
    """Run work; on an expected error or a stop, print one line and exit."""
    try:
        use_writable_caches()
        work()
    except (NDreamerError, OSError) as error:
        # OSError: a full disk, a missing permission, an unreachable server. Ray wraps the error of a task, as `cause`.
        text = printable(str(getattr(error, "cause", error)))[:LONGEST_LINE]
        if lines.as_json:
            logging.getLogger("ndreamer_dist").error(text)  # noqa: TRY400 - expected errors need no stack trace
        else:
            print(f"error: {text}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command continues from here", file=sys.stderr)
        sys.exit(stop.exit_code)


if __name__ == "__main__":
    main()
