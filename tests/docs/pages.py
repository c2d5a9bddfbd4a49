"""The pages of README and docs as what can be run: their code blocks, in order, and the cohort that they speak of.

A block is `python`, `bash` or `yaml` (a file, whose name its first line says) and is run, or `text` and is not. One after
`<!-- not run: why -->` is not run either: it needs what a test has not.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pytest
import scanpy as sc
from scipy import sparse

from ndreamer_dist import cli
from ndreamer_dist.datasets import simulate
from ndreamer_dist.results.export import save

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"(?:<!-- not run: (?P<reason>[^>]*?) -->\n+)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A code block of a page.

    Attributes
    ----------
    line
        Of the page, where the block's text begins.
    reason
        Why it is not run; none: it is.
    """

    page: Path
    line: int
    kind: str
    text: str
    reason: str | None

    @property
    def where(self) -> str:
        """The page and the line, as a test names them."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> list[str]:
        """Return the commands of a shell block, each on one line, without comments."""
        joined = re.sub(r"\\\n\s*", "", self.text)
        return [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]

    def run(self, scope: dict[str, Any]) -> None:
        """Run it in the current folder; names of Python blocks are kept in `scope`."""
        if self.kind == "python":
            # Lines are numbered as in the page, so that a trace says where.
            exec(compile("\n" * (self.line - 1) + self.text, str(self.page), "exec"), scope)
        elif self.kind == "bash":
            for command in self.commands():
                run_command(command)
        elif self.kind == "yaml":
            name = re.match(r"# (\S+)", self.text)
            assert name, f"{self.where}: the first line of a yaml block says the file's name"
            Path(name.group(1)).write_text(self.text)


def blocks(page: Path) -> Iterator[Block]:
    """Give the code blocks of a page."""
    text = page.read_text()
    for found in FENCE.finditer(text):
        line = text.count("\n", 0, found.start("text")) + 1
        yield Block(page, line, found["kind"], found["text"], found["reason"])


def run_command(command: str) -> None:
    """Run one command line: our own in this process, any other by the shell."""
    words = shlex.split(command, comments=True)
    if words[0] != "ndreamer-dist":
        subprocess.run(["bash", "-euc", command], check=True, timeout=60)
        return
    end = words.index(">") if ">" in words else len(words)
    with ExitStack() as stack:
        for target in words[end + 1 :]:
            stack.enter_context(redirect_stdout(stack.enter_context(Path(target).open("w"))))
        with pytest.raises(SystemExit) as ended:
            cli.main(words[1:end])
    assert not ended.value.code, f"{command}: exit code {ended.value.code}"


def cohort(folder: Path) -> None:
    """Write the cohort that the pages speak of: 4 + 4 donors, nested in the disease; three cell types; genes by name."""
    simulate(folder / "s.zarr", cells=720, genes=200, batches=8, cell_types=3, design="nested", seed=3)
    adata = anndata.read_zarr(folder / "s.zarr")
    obs = adata.obs
    obs["disease"] = obs["condition"].cat.rename_categories({"control": "normal", "treated": "dementia"})
    obs["donor_id"] = obs["donor"].cat.rename_categories(lambda name: name.replace("donor_", "D"))
    obs["age"] = 60 + 3 * obs["donor_id"].cat.codes
    obs["site"] = np.where(obs["donor_id"].cat.codes % 4 < 2, "north", "south")
    obs["cell_type"] = obs["cell_type"].cat.rename_categories(["Microglia", "Astrocyte", "Neuron"])
    adata.obs = obs.drop(columns=["condition", "donor"])
    counts = adata.X.toarray()
    ordered = np.argsort(-np.log1p(1e4 * counts / counts.sum(1, keepdims=True)).var(0))
    names = adata.var_names.to_numpy(dtype=object)
    names[ordered[:2]], names[ordered[-2:]] = ["APOE", "TREM2"], ["IFI6", "IFIT1"]
    adata.var_names = list(names)
    adata.obs_names = ["AAACCTG-1", "AAACGGG-1", *adata.obs_names[2:]]
    for suffix in ("h5ad", "zarr"):
        save(adata, folder / f"cohort.{suffix}")
    save(as_cellxgene_has_it(adata), folder / "census.h5ad")
    for donor in ("D1", "D2"):
        (folder / donor).mkdir()
        write_10x(adata[adata.obs["donor_id"] == adata.obs["donor_id"].cat.categories[1]], folder / donor)


def as_cellxgene_has_it(adata: anndata.AnnData) -> anndata.AnnData:
    """Return a cohort with counts in `.raw`, normalised values in X, and genes by Ensembl id."""
    made = adata.copy()
    made.var["feature_name"] = made.var_names.to_numpy(dtype=object)
    made.var_names = [f"ENSG{number:011d}" for number in range(made.n_vars)]
    made.raw = made.copy()
    sc.pp.normalize_total(made, target_sum=1e4)
    sc.pp.log1p(made)
    return made


def write_10x(adata: anndata.AnnData, folder: Path) -> None:
    """Write counts as Cell Ranger does: genes x cells, by cells."""
    counts = sparse.csr_matrix(adata.X).astype("int32")
    names = adata.var_names.to_numpy(dtype="S")
    with h5py.File(folder / "filtered_feature_bc_matrix.h5", "w") as file:
        for part in ("data", "indices", "indptr"):
            file[f"matrix/{part}"] = getattr(counts, part)
        file["matrix/shape"], file["matrix/barcodes"] = (
            np.array(counts.shape[::-1]),
            adata.obs_names.to_numpy(dtype="S"),
        )
        kinds = {
            "id": names,
            "name": names,
            "feature_type": [b"Gene Expression"] * len(names),
            "genome": [b"g"] * len(names),
        }
        for part, values in kinds.items():
            file[f"matrix/features/{part}"] = values
