"""Every name that is written to a store, defined once.

No other module of the package spells the name of an array, a column, a file or a stage.
"""

from __future__ import annotations

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
STAGE_SPACE: Final = "space"  # coordinates that need no network, or not one alone
STAGE_MATCH: Final = "match"
STAGE_EFFECTS: Final = "effects"
STAGE_SUMS: Final = "space-sums"  # not a stage of the flow: sums that the space stage deletes once it has its axes
STAGES: Final = (
    STAGE_COHORT, STAGE_PACK, STAGE_CLUSTERS, STAGE_TRAIN, STAGE_EMBED, STAGE_PCA, STAGE_MATCH, STAGE_EFFECTS,
)  # fmt: skip
"""The stages of a run that matches in the trained space."""
FLOW: Final = (*STAGES[:6], STAGE_SPACE, *STAGES[6:])
"""Every stage there is; a run has those that its matching space needs."""
STREAMS: Final = {STAGE_PACK: 1, STAGE_CLUSTERS: 2, STAGE_EMBED: 4, STAGE_SPACE: 6}
"""Number of a stage in the seeds of its generators; a new stage takes one of its own, and none is ever changed."""

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
"""Array of embedding.zarr and of `obsm` that holds a space's coordinates."""
SPACES_DIR: Final = "spaces"  # spaces/<name>/: embedding, matches and results of the spaces added to a finished run

# --- the run directory -------------------------------------------------------------------------------------------
RUN_JSON: Final = "run.json"
PACKED: Final = "packed.zarr"
EMBEDDING: Final = "embedding.zarr"
MATCHES: Final = "matches.zarr"
RESULTS: Final = "results.zarr"
TRAIN_DIR: Final = "train"
TRAIN_SERIAL: Final = "train/serial"  # checkpoints of the serial runtime; the rest of train/ is Ray Train's
MODEL_DIR: Final = "model"
MODEL_WEIGHTS: Final = "model/weights.safetensors"
MODEL_JSON: Final = "model/model.json"
DROPPED: Final = "dropped.parquet"
LOGS: Final = "logs"
METRICS: Final = "logs/metrics.csv"
EPOCHS: Final = "logs/epochs.csv"
STAGES_LOG: Final = "logs/stages.jsonl"
PROGRESS: Final = "logs/progress.json"  # how far the stage under way is, written anew every few seconds
REPORT: Final = "report/report.html"
COMPARISON: Final = "report/comparison.json"  # of matching spaces, with what advice; the report takes it over
COMPARISON_TABLE: Final = "report/comparison.csv"
COMPARISON_PICTURE: Final = "report/comparison.png"
DONE: Final = "done"
LOCK: Final = "lock"
LOCK_ANNOUNCED: Final = "lock.d"  # on object storage: runs that are about to take the lock
ANNOTATIONS: Final = "annotations.parquet"  # beside a results.zarr, after its name: columns of obs made after the run
WIDE_JSON: Final = "all_genes.json"  # in a directory of all genes: the results that it was made from
COHORT_DIR: Final = "cohort"  # what the cohort stage found: design.json, genes.parquet, cells.parquet, obs.parquet
DESIGN_JSON: Final = "cohort/design.json"
GENES_TABLE: Final = "cohort/genes.parquet"
CELLS_TABLE: Final = "cohort/cells.parquet"
COHORT_SUMMARY: Final = "cohort/summary.json"  # what was decided: normalisation, dropped cells by reason, notes

# --- packed.zarr -------------------------------------------------------------------------------------------------
PACKED_X: Final = "X"  # X/00042/{data,indices,indptr}
DATA: Final = "data"
INDICES: Final = "indices"
INDPTR: Final = "indptr"
PACKED_LOW: Final = "cluster_low"
PACKED_HIGH: Final = "cluster_high"
PACKED_SKETCH: Final = "sketch"  # where cells are too many for one graph: the clustered sample of them
PACKED_INPUT_ROW: Final = "input_row"

# --- embedding.zarr ----------------------------------------------------------------------------------------------
MU: Final = "X_ndreamer"
PCA: Final = "X_ndreamer_pca"
MOMENT_SUM: Final = "moment_sum"  # (blocks, z) float64
MOMENT_OUTER: Final = "moment_outer"  # (blocks, z, z) float64
PCA_MEAN: Final = "pca_mean"
PCA_COMPONENTS: Final = "pca_components"  # (z, dimensions) float64
PCA_VARIANCE: Final = "pca_variance"

# --- embedding.zarr of a space without a network ------------------------------------------------------------------
GENE_MEAN: Final = "axes_mean"  # (genes,) float64
GENE_AXES: Final = "axes_components"  # (genes, dimensions) float64
GENE_VARIANCE: Final = "axes_variance"  # (dimensions,) float64
SPACE_SUMS: Final = "sums"  # sums/<number>/...: what the axes are made from; deleted once they are there
STATE_MEAN: Final = "state_mean"  # (populations, genes) float64
STATE_AXES: Final = "state_axes"  # (populations, genes, dimensions) float64
STATE_RANK: Final = "state_rank"  # (populations,) int32: how many axes a population has
STATE_BEYOND_CHANCE: Final = "state_beyond_chance"  # (populations,) int32: how many of them chance would not give
STATE_DIMENSIONS: Final = "state_dimensions"  # (populations,) int32: how many of the dimensions a population uses
STATE_RELIABILITY: Final = "state_reliability"  # (populations, dimensions, dimensions) float64: Lambda
STATE_GROUP_MEAN: Final = "state_group_mean"  # (populations, groups, dimensions) float64
STATE_POSITION: Final = "state_position"  # (populations, groups, dimensions) float64: where groups stand
STATE_CORNER: Final = "state_corner"  # (populations, bits) float64: what keeps populations apart
STATE_WEIGHT: Final = "state_weight"  # (1,) float64: of the state coordinates beside the trained ones
HARMONY_CELLS: Final = "harmony_cells"  # (clusters,) float64: Harmony's clusters as they are kept for other cells
HARMONY_SUMS: Final = "harmony_sums"  # (clusters, dimensions) float64
STATE_DOUBT: Final = "state_doubt"  # (populations, 2, genes) float64: what groups differ by beyond the axes; variance
STATE_LEAST_DOUBT: Final = "state_least_doubt"  # (populations,) float64; NaN where groups stand at their means
HARMONY_INPUT: Final = "harmony_input"  # (cells, dimensions) float32: the principal components that are corrected

# --- matches.zarr ------------------------------------------------------------------------------------------------
MATCH_SUMMARY: Final = "match/summary.json"  # how many queries had to widen
MATCH_ROW: Final = "row"  # <query group>/row: (cells of the group, groups, k); the chunk of an edge has one writer
MATCH_DISTANCE: Final = "distance"
MATCH_LABEL: Final = "label"  # (cells,) int32: codes of the labels that cells are matched inside, -1 for none
MATCH_WITHIN: Final = "match.within"  # the setting; in run.json, what was taken from the input for it

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
OBS_MATCH_LABEL: Final = "ndreamer_match_label"  # where cells are matched inside labels: theirs
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
UNS_ONTO: Final = "onto"  # where cells are mapped onto a finished run: which, and how far they are from it
UNS_WITHIN: Final = "match_within"  # where cells are matched inside labels: which, and the share of matches inside
UNS_SCALED: Final = "scaled"  # where counts had been divided by something: cells' own counts are not known
VAR_MODELLED: Final = "ndreamer_modelled"  # in results of all genes: whether the run modelled the gene
VAR_GENE_ID: Final = "ndreamer_gene_id"  # what a gene was called before it was named by another column

# --- the layout that the published package writes, of h5ad files --------------------------------------------------
PUBLISHED_ADATA: Final = "adata.h5ad"
PUBLISHED_PREPROCESSED: Final = "preprocessed.h5ad"
PUBLISHED_MAPPINGS: Final = "mappings.json"
PUBLISHED_CONDITIONS: Final = "condition2num_mapping.pth"  # the published names, JSON in place of a pickle
PUBLISHED_BATCHES: Final = "batch2num_mapping.pth"
PUBLISHED_POINTER: Final = "ndreamer.pth"  # says where the weights are
PUBLISHED_MODEL: Final = "model.json"
PUBLISHED_WEIGHTS: Final = "weights.safetensors"
PUBLISHED_ITE: Final = "b-{batch}--c-{condition}__ITE.h5ad"  # of one group, by the codes that the mappings hold
PUBLISHED_EXPRESSION: Final = "c-{condition}--b-{batch}__expression.h5ad"
PUBLISHED_BATCH: Final = "c-{condition}--b-{batch}__batch.h5ad"
PUBLISHED_MU: Final = "X_effect_modifier_space"
PUBLISHED_PCA: Final = "X_effect_modifier_space_PCA"
PUBLISHED_ORDER: Final = "original_order"


MADE: Final = (
    PACKED, EMBEDDING, MATCHES, RESULTS, MODEL_DIR, COHORT_DIR, DROPPED,
    MATCH_SUMMARY.partition("/")[0], DONE,
)  # fmt: skip
"""What a run makes in its directory, besides logs and checkpoints, and makes again where a file of it is gone."""


def block_name(index: int) -> str:
    """Return the name of a row block, a group or a shard: its number in five digits, so that names sort."""
    return f"{index:05d}"


def embedding_key(method: str) -> str:
    """Return the array that holds the coordinates of a matching space, by the space's name."""
    return SPACES[OBSM_PREFIX if method.startswith(OBSM_PREFIX) else method]


def is_trained(method: str) -> bool:
    """Return whether a matching space needs the trained network."""
    return method in (NDREAMER, NDREAMER_STATE)


def is_clustered(method: str, populations: str | None) -> bool:
    """Return whether a matching space needs the clusters: to train, or as the populations of the state space."""
    return is_trained(method) or (method == STATE and populations == OBS_LOW)


def space_folder(method: str) -> str:
    """Return the folder of a matching space that was added to a run: `spaces/harmony`, `spaces/obsm-X_scVI`."""
    return f"{SPACES_DIR}/{quote(method.replace(':', '-', 1), safe='+')}"
