"""The names of all stages, files, arrays and columns that a run writes; other modules take them from here."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import quote

FORMAT_VERSION: Final = 1
"""Version of the stores' layout; part of every stage key."""

# --- stages, in the order of the flow; also the names under done/ ------------------------------------------------
STAGE_COHORT: Final = "cohort"
STAGE_PACK: Final = "pack"
STAGE_CLUSTERS: Final = "clusters"
STAGE_TRAIN: Final = "train"
STAGE_EMBED: Final = "embed"
STAGE_PCA: Final = "pca"
STAGE_SPACE: Final = "space"  # coordinates of all spaces but `ndreamer`
STAGE_MATCH: Final = "match"
STAGE_EFFECTS: Final = "effects"
STAGE_SUMS: Final = "space-sums"  # part of the space stage: sums, deleted once the axes are computed
STAGES: Final = (
    STAGE_COHORT, STAGE_PACK, STAGE_CLUSTERS, STAGE_TRAIN, STAGE_EMBED, STAGE_PCA, STAGE_MATCH, STAGE_EFFECTS,
)  # fmt: skip
"""The stages of a run that matches in the trained space."""
FLOW: Final = (*STAGES[:6], STAGE_SPACE, *STAGES[6:])
"""All stages; a run has those that its matching space needs."""
STREAMS: Final = {STAGE_PACK: 1, STAGE_CLUSTERS: 2, STAGE_EMBED: 4, STAGE_SPACE: 6}
"""Number of a stage in the seeds of its random generators. Numbers are unique and never change."""

# --- the matching space (METHOD section 9) ------------------------------------------------------------------------
NDREAMER: Final = "ndreamer"
SPACE_PCA: Final = "pca"
HARMONY: Final = "harmony"
STATE: Final = "state"
NDREAMER_STATE: Final = "ndreamer+state"
OBSM_PREFIX: Final = "obsm:"
SPACES: Final = {
    NDREAMER: "X_ndreamer_pca", SPACE_PCA: "X_pca", HARMONY: "X_harmony", STATE: "X_state",
    NDREAMER_STATE: "X_ndreamer_state", OBSM_PREFIX: "X_given",
}  # fmt: skip
"""Array of embedding.zarr and `obsm` with the coordinates of each space."""
SPACES_DIR: Final = "spaces"  # spaces/<name>/: embedding, matches and results of a space added to a finished run

# --- the run directory -------------------------------------------------------------------------------------------
RUN_JSON: Final = "run.json"
PACKED: Final = "packed.zarr"
EMBEDDING: Final = "embedding.zarr"
MATCHES: Final = "matches.zarr"
RESULTS: Final = "results.zarr"
TRAIN_DIR: Final = "train"
TRAIN_SERIAL: Final = "train/serial"  # checkpoints of the serial runtime; Ray Train owns the rest of train/
MODEL_DIR: Final = "model"
MODEL_WEIGHTS: Final = "model/weights.safetensors"
MODEL_JSON: Final = "model/model.json"
DROPPED: Final = "dropped.parquet"
LOGS: Final = "logs"
METRICS: Final = "logs/metrics.csv"
EPOCHS: Final = "logs/epochs.csv"
STAGES_LOG: Final = "logs/stages.jsonl"
PROGRESS: Final = "logs/progress.json"  # progress of the current stage, rewritten every few seconds
REPORT: Final = "report/report.html"
COMPARISON: Final = "report/comparison.json"  # comparison of matching spaces with its advice; the report includes it
COMPARISON_TABLE: Final = "report/comparison.csv"
COMPARISON_PICTURE: Final = "report/comparison.png"
DONE: Final = "done"
LOCK: Final = "lock"
LOCK_ANNOUNCED: Final = "lock.d"  # on object storage: announcements of runs that are about to take the lock
ANNOTATIONS: Final = (
    "annotations.parquet"  # results.annotations.parquet beside results.zarr: columns of obs added later
)
WIDE_JSON: Final = "all_genes.json"  # in the output of `all-genes`: the results that it was made from
COHORT_DIR: Final = "cohort"  # output of the cohort stage: design.json, genes.parquet, cells.parquet, obs.parquet
DESIGN_JSON: Final = "cohort/design.json"
GENES_TABLE: Final = "cohort/genes.parquet"
CELLS_TABLE: Final = "cohort/cells.parquet"
COHORT_SUMMARY: Final = "cohort/summary.json"  # decisions: normalisation, dropped cells by reason, notes

# --- packed.zarr -------------------------------------------------------------------------------------------------
PACKED_X: Final = "X"  # X/00042/{data,indices,indptr}
DATA: Final = "data"
INDICES: Final = "indices"
INDPTR: Final = "indptr"
PACKED_LOW: Final = "cluster_low"
PACKED_HIGH: Final = "cluster_high"
PACKED_SKETCH: Final = "sketch"  # the clustered sample of the cells, if they are too many for one graph
PACKED_INPUT_ROW: Final = "input_row"

# --- embedding.zarr ----------------------------------------------------------------------------------------------
MU: Final = "X_ndreamer"
PCA: Final = "X_ndreamer_pca"
MOMENT_SUM: Final = "moment_sum"  # (blocks, z) float64
MOMENT_OUTER: Final = "moment_outer"  # (blocks, z, z) float64
PCA_MEAN: Final = "pca_mean"
PCA_COMPONENTS: Final = "pca_components"  # (z, dimensions) float64
PCA_VARIANCE: Final = "pca_variance"

# --- embedding.zarr of the other spaces ---------------------------------------------------------------------------
GENE_MEAN: Final = "axes_mean"  # (genes,) float64
GENE_AXES: Final = "axes_components"  # (genes, dimensions) float64
GENE_VARIANCE: Final = "axes_variance"  # (dimensions,) float64
SPACE_SUMS: Final = "sums"  # sums/<number>/...: sums for the axes, deleted once the axes are computed
STATE_MEAN: Final = "state_mean"  # (populations, genes) float64
STATE_AXES: Final = "state_axes"  # (populations, genes, dimensions) float64
STATE_RANK: Final = "state_rank"  # (populations,) int32: number of axes of a population
STATE_BEYOND_CHANCE: Final = "state_beyond_chance"  # (populations,) int32: number of axes with variance above chance
STATE_DIMENSIONS: Final = "state_dimensions"  # (populations,) int32: number of dimensions that a population uses
STATE_RELIABILITY: Final = "state_reliability"  # (populations, dimensions, dimensions) float64: Lambda
STATE_GROUP_MEAN: Final = "state_group_mean"  # (populations, groups, dimensions) float64
STATE_POSITION: Final = "state_position"  # (populations, groups, dimensions) float64: positions of the groups
STATE_CORNER: Final = "state_corner"  # (populations, bits) float64: coordinates that separate the populations
STATE_WEIGHT: Final = "state_weight"  # (1,) float64: factor on the state coordinates beside the trained ones
HARMONY_CELLS: Final = "harmony_cells"  # (clusters,) float64: cells of Harmony's clusters, for mapping new cells
HARMONY_SUMS: Final = "harmony_sums"  # (clusters, dimensions) float64
STATE_DOUBT: Final = "state_doubt"  # (populations, 2, genes) float64: group differences beyond the axes; variance
STATE_LEAST_DOUBT: Final = "state_least_doubt"  # (populations,) float64; NaN if groups stand at their means
HARMONY_INPUT: Final = "harmony_input"  # (cells, dimensions) float32: principal components before correction

# --- matches.zarr ------------------------------------------------------------------------------------------------
MATCH_SUMMARY: Final = "match/summary.json"  # facts of the searches, such as the share of matches inside labels
MATCH_ROW: Final = "row"  # <query group>/row: (cells of the group, groups, k); each chunk of an edge has one writer
MATCH_DISTANCE: Final = "distance"
MATCH_LABEL: Final = "label"  # (cells,) int32: code of the label that limits a cell's matches, -1: no label
MATCH_WITHIN: Final = "match.within"  # the setting, and the entry of run.json for the labels read from the input

# --- results.zarr ------------------------------------------------------------------------------------------------
OBS_PREFIX: Final = "ndreamer_"
OBS_CONDITION: Final = "ndreamer_condition"
OBS_BATCH: Final = "ndreamer_batch"
OBS_GROUP: Final = "ndreamer_group"
OBS_LOW: Final = "ndreamer_cluster_low"
OBS_HIGH: Final = "ndreamer_cluster_high"
OBS_INPUT_ROW: Final = "ndreamer_input_row"
OBS_MATCH_DISTANCE: Final = "ndreamer_match_distance"
OBS_OVERLAP: Final = "ndreamer_overlap"
OBS_TIMES_MATCHED: Final = "ndreamer_times_matched"
OBS_MATCH_LABEL: Final = "ndreamer_match_label"  # label that limits a cell's matches
OBS_TOTAL: Final = "ndreamer_total_counts"
OBSM_MU: Final = "X_ndreamer"
OBSM_PCA: Final = "X_ndreamer_pca"
OBSM_MATCH: Final = "ndreamer_match"
OBSM_MATCH_DISTANCE: Final = "ndreamer_match_distance"
OBSM: Final = (OBSM_MU, *SPACES.values(), OBSM_MATCH, OBSM_MATCH_DISTANCE)
LAYER_DENOISED: Final = "denoised"
LAYER_BATCH_EFFECT: Final = "batch_effect"
LAYER_ITE: Final = "ite"
LAYERS: Final = (LAYER_DENOISED, LAYER_BATCH_EFFECT, LAYER_ITE)
UNS: Final = "ndreamer"
UNS_EMBEDDING: Final = "embedding"  # the matching space
UNS_EMBEDDING_KEY: Final = "embedding_key"  # the array of obsm with its coordinates
UNS_ONTO: Final = "onto"  # of mapped cells: the finished run, and how far they are from its cells
UNS_WITHIN: Final = "match_within"  # of matches inside labels: the labels, and the share of matches inside them
UNS_SCALED: Final = "scaled"  # set if the input counts were scaled, so that a cell's own counts are unknown
VAR_MODELLED: Final = "ndreamer_modelled"  # in results of all genes: whether the run modelled the gene
VAR_GENE_ID: Final = "ndreamer_gene_id"  # var_name of a gene that is named by another column

# --- the published package's layout of h5ad files -----------------------------------------------------------------
PUBLISHED_ADATA: Final = "adata.h5ad"
PUBLISHED_PREPROCESSED: Final = "preprocessed.h5ad"
PUBLISHED_MAPPINGS: Final = "mappings.json"
PUBLISHED_CONDITIONS: Final = "condition2num_mapping.pth"  # the published file name, but JSON instead of a pickle
PUBLISHED_BATCHES: Final = "batch2num_mapping.pth"
PUBLISHED_POINTER: Final = "ndreamer.pth"  # names the file of the weights
PUBLISHED_MODEL: Final = "model.json"
PUBLISHED_WEIGHTS: Final = "weights.safetensors"
PUBLISHED_ITE: Final = "b-{batch}--c-{condition}__ITE.h5ad"  # of one group, with the codes of the mappings
PUBLISHED_EXPRESSION: Final = "c-{condition}--b-{batch}__expression.h5ad"
PUBLISHED_BATCH: Final = "c-{condition}--b-{batch}__batch.h5ad"
PUBLISHED_MU: Final = "X_effect_modifier_space"
PUBLISHED_PCA: Final = "X_effect_modifier_space_PCA"
PUBLISHED_ORDER: Final = "original_order"


MADE: Final = (
    PACKED, EMBEDDING, MATCHES, RESULTS, MODEL_DIR, COHORT_DIR, DROPPED,
    MATCH_SUMMARY.partition("/")[0], DONE,
)  # fmt: skip
"""What a run writes to its directory besides logs and checkpoints, and rebuilds if a file of it is missing."""


def block_name(index: int) -> str:
    """Return the name of a row block, a group or a shard: its number with at least five digits, so that names sort."""
    return f"{index:05d}"


def embedding_key(method: str) -> str:
    """Return the name of the array that holds the coordinates of a matching space."""
    return SPACES[OBSM_PREFIX if method.startswith(OBSM_PREFIX) else method]


def is_trained(method: str) -> bool:
    """Return whether a matching space needs the trained network."""
    return method in (NDREAMER, NDREAMER_STATE)


def is_clustered(method: str, populations: str | None) -> bool:
    """Return whether a matching space needs the clusters, for training or as populations of the state space."""
    return is_trained(method) or (method == STATE and populations == OBS_LOW)


def run_folder(folder: str) -> str:
    """Return the folder of the run that a matching space's folder was added to; any other folder stays as it is."""
    return re.sub(f"/{SPACES_DIR}/[^/]+$", "", folder)


def space_folder(method: str) -> str:
    """Return the folder of a matching space that was added to a run, such as `spaces/harmony`, `spaces/obsm-X_scVI`."""
    return f"{SPACES_DIR}/{quote(method.replace(':', '-', 1), safe='+')}"
