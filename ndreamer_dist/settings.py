"""Settings: one frozen, validated class per stage, read from and written to YAML.

Every default is that of METHOD (section numbers are in the class docstrings). Each field is marked `result` or `how`. A
`result` field affects the numbers: a change invalidates its stage and later ones. A `how` field (workers, threads,
device) does not: after a change the run continues. A preset is a set of overrides; explicit values override the preset.
"""

from __future__ import annotations

import json
import reprlib
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ndreamer_dist import keys
from ndreamer_dist.errors import SettingsError, quoted, suggest

RUN_ROWS = 32
"""Rows of a contiguous run in the sampling plan."""
NOISE_ROWS = 64
"""Cells of a block of a mini-batch; each block has one noise generator and belongs to one worker."""
LARGEST_NUMBER = 2**31 - 1
"""Largest integer that a setting may hold."""
Width = Annotated[int, Field(ge=1)]
"""Number of units of a network layer."""


def result(default: Any, description: str, **bounds: Any) -> Any:
    """Declare a setting that affects the results."""
    return Field(default, description=description, json_schema_extra={"role": "result"}, **bounds)


def how(default: Any, description: str, **bounds: Any) -> Any:
    """Declare a setting that affects only how the work is done."""
    return Field(default, description=description, json_schema_extra={"role": "how"}, **bounds)


class StageSettings(BaseModel):
    """Base of the per-stage classes: immutable, without unknown names, infinite or very large numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _not_too_large(cls, value: Any) -> Any:
        if any(
            isinstance(number, int) and number > LARGEST_NUMBER
            for number in (value if type(value) is tuple else (value,))
        ):
            msg = f"must be at most {LARGEST_NUMBER}"
            raise ValueError(msg)
        return value

    def bearing(self) -> dict[str, Any]:
        """Return the fields that affect the results, as plain JSON values."""
        dumped = self.model_dump(mode="json")
        return {
            name: dumped[name]
            for name, field in type(self).model_fields.items()
            if isinstance(field.json_schema_extra, dict) and field.json_schema_extra["role"] == "result"
        }

    def described(self) -> list[str]:
        """Return one line of YAML per field, with its description as a comment."""
        dumped, bearing = self.model_dump(mode="json"), self.bearing()
        return [
            _yaml_line(name, dumped[name], f"{'* ' if name in bearing else ''}{field.description}")
            for name, field in type(self).model_fields.items()
        ]


def _yaml_line(name: str, value: object, comment: str) -> str:
    """Return `name: value  # comment`; a value of several lines gets no comment."""
    text = yaml.safe_dump({name: value}, default_flow_style=True, width=LARGEST_NUMBER).strip()[1:-1]
    return text if "\n" in text else f"{text}  # {comment}"


class CohortSettings(StageSettings):
    """The input cohort, and which cells are kept (METHOD section 1.1)."""

    condition_key: str | tuple[str, ...] | None = result(
        None, "column of obs that holds the condition; several columns: their values joined by ':' are the condition"
    )
    control: str | None = result(None, "name of the control condition; for several columns, e.g. 'none:wt'")
    batch_key: tuple[str, ...] = result((), "columns of obs that hold the batch covariates; empty: one batch")
    layer: str | None = result(None, "layer to read instead of X; raw: the counts in .raw, with the genes of .raw")
    gene_names: str | None = result(None, "column of var with the gene names to use, e.g. feature_name for symbols")
    normalise: Literal["auto", "counts", "none"] = result(
        "auto", "counts: scale X to 10 000 counts per cell, then log1p; none: use X as it is; auto: detect which"
    )
    log_base: float | None = result(None, "base of the logarithm of log-normalised values; null: detect it", gt=1)
    exclude_conditions: tuple[str, ...] = result((), "conditions to leave out, with their cells")
    min_genes: int = result(0, "leave out cells that express fewer genes", ge=0)
    min_cells: int = result(0, "leave out genes that fewer cells express", ge=0)
    min_group_cells: int = result(
        100, "minimum number of cells of a (batch, condition) group; with small_groups: merge, of a condition", ge=1
    )
    small_groups: Literal["auto", "drop", "merge", "keep", "error"] = result(
        "auto",
        "what to do with smaller groups; merge: apply the minimum to conditions, and merge the small batches of each; auto: "
        "merge in a screen (20 or more conditions), else drop",
    )
    rare_conditions: Literal["error", "drop"] = result(
        "error", "what to do with conditions that lose all their cells by it"
    )
    chunk_rows: int = how(4096, "rows read at a time", ge=1)

    @field_validator("control", "layer", "gene_names", mode="before")
    @classmethod
    def _name(cls, value: object) -> object:
        return _as_name(value)

    @field_validator("condition_key", mode="before")
    @classmethod
    def _name_or_names(cls, value: object) -> object:
        if not isinstance(value, (list, tuple)):
            return _as_name(value)
        names = tuple(_as_name(name) for name in value)
        return names[0] if len(names) == 1 and isinstance(names[0], str) else names or None

    @property
    def factors(self) -> tuple[str, ...]:
        """Columns whose combinations are the conditions; empty if `condition_key` names one column."""
        return self.condition_key if isinstance(self.condition_key, tuple) else ()

    @property
    def condition_column(self) -> str | None:
        """Name of the condition column; for combinations of several columns their names, as in `drug:genotype`."""
        return ":".join(self.factors) if self.factors else self.condition_key  # type: ignore[return-value]

    @field_validator("batch_key", "exclude_conditions", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        if value is None:
            return ()
        if isinstance(value, (list, tuple)):
            return tuple(_as_name(name) for name in value)
        return (_as_name(value),)


def _as_name(value: object) -> object:
    """Return a name as text: a number is converted, a boolean is refused."""
    if isinstance(value, bool):
        msg = "expected a name, found a boolean: YAML reads true and false as such (some readers also yes, no, on and off); quote it"
        raise ValueError(msg)  # noqa: TRY004 - pydantic turns a ValueError, not a TypeError, into a ValidationError
    return str(value) if isinstance(value, (int, float)) else value


class HvgSettings(StageSettings):
    """Which genes are modelled (METHOD section 1.2)."""

    num_hvg: int = result(2000, "number of highly variable genes to model", ge=1)
    by: Literal["group", "batch", "none"] = result(
        "group", "compute variability inside every group, inside every batch, or (none) over all cells"
    )
    keep: tuple[str, ...] = result((), "genes to model whatever their variability; they count towards num_hvg")

    @field_validator("keep", mode="before")
    @classmethod
    def _each_once(cls, value: object) -> object:
        value = None if value == "none" else value
        names = value.split(",") if isinstance(value, str) else value or ()
        if not isinstance(names, (list, tuple)):
            return names
        return tuple(sorted({str(name).strip() for name in names} - {""}))

    @model_validator(mode="after")
    def _room_for_kept(self) -> Self:
        if len(self.keep) > self.num_hvg:
            msg = f"keep names {len(self.keep)} genes, more than num_hvg ({self.num_hvg})"
            raise ValueError(msg)
        return self


class PackSettings(StageSettings):
    """The layout of packed.zarr."""

    block_rows: int = result(4096, "rows of a block, the unit of work of most stages", ge=64)


class ClustersSettings(StageSettings):
    """The two Leiden clusterings (METHOD section 1.3)."""

    low_resolution: float = result(0.5, "resolution of the low clustering", gt=0)
    high_resolution: float = result(7.0, "resolution of the high clustering", gt=0)
    n_pcs: int = result(50, "number of principal components", ge=1)
    n_neighbors: int = result(15, "neighbours of a cell in the graph, the cell itself included", ge=2)
    flavor: Literal["leidenalg", "igraph"] = result(
        "leidenalg", "implementation of Leiden; igraph is several times faster"
    )
    iterations: int = result(-1, "Leiden iterations; -1: until no cell moves", ge=-1)
    within: Literal["auto", "group", "all", "sketch"] = result(
        "auto", "cluster each group by itself, all cells together, or a sample of all cells (sketch)"
    )
    group_mean_cells: int = result(
        2000, "auto: cluster each group by itself if groups hold this many cells on average", ge=1
    )
    max_cells: int = result(200_000, "auto: maximum number of cells of one graph; above it, cluster a sketch", ge=1)
    sketch_cells: int = result(100_000, "cells of the sketch, the same share of every group", ge=1)


class ModelSettings(StageSettings):
    """Widths of the network (METHOD section 2)."""

    encoder: tuple[Width, ...] = result(
        (1024, 512, 512), "widths of the encoder's layers; the last is the width of h", min_length=1
    )
    codebooks: int = result(32, "number of codebooks", ge=1)
    codes: int = result(1024, "codes per codebook", ge=2)
    code_dim: int = result(8, "dimensions of a code", ge=1)
    latent: int = result(256, "dimensions z of the effect modifier", ge=2)
    decoder: tuple[Width, ...] = result(
        (512, 1024),
        "widths of the decoder's layers; the first is also the width of the condition and batch embeddings",
        min_length=1,
    )
    temperature: float = result(0.01, "Gumbel-softmax temperature", gt=0)
    latent_noise: float = result(1.0, "standard deviation of the extra noise eta on the latent sample", ge=0)


class LossSettings(StageSettings):
    """Weights and shapes of the losses (METHOD section 3)."""

    reconstruction: float = result(1.0, "weight of the mean squared error", ge=0)
    cosine: float = result(20.0, "weight of 1 - cosine similarity", ge=0)
    kl: float = result(0.005, "weight of the KL and correlation term", ge=0)
    independence: float = result(
        1000.0,
        "weight of the mutual information with the condition and with each batch covariate, unless the next two are set",
        ge=0,
    )
    independence_condition: float | None = result(
        None, "weight of the mutual information with the condition; null: loss.independence", ge=0
    )
    independence_batch: float | None = result(
        None, "weight of the mutual information with each batch covariate; null: loss.independence", ge=0
    )
    independence_batch_within: float = result(
        0.0, "weight of the mutual information with each batch covariate among the cells of one condition", ge=0
    )
    dependence: float = result(
        50.0, "weight of the mutual information with the clusters, divided by the number of conditions", ge=0
    )
    triplet: float = result(5.0, "weight of the triplet term", ge=0)
    margin: float = result(5.0, "triplet margin", ge=0)
    triplet_pairs: int = result(15, "maximum number of positives, and of negatives, per anchor", ge=1)
    neighbourhood: float = result(1.0, "weight of the neighbourhood term", ge=0)
    neighbours: int = result(20, "neighbours k of the neighbourhood term", ge=1)
    sigma: float = result(1.0, "scale of the expression distances", gt=0)
    across: float = result(20.0, "extra weight of pairs that cross clusters", ge=0)
    cross_cluster: Literal["published", "clusters"] = result(
        "published", "rule for which pairs cross clusters (METHOD section 8)"
    )
    commitment: float = result(1.0, "weight of the commitment and codebook term", ge=0)
    ceiling: float = result(1e5, "upper limit of each weighted term and of their sum", gt=0)

    @property
    def condition_weight(self) -> float:
        """Weight of the mutual information with the condition."""
        return self.independence if self.independence_condition is None else self.independence_condition

    @property
    def batch_weight(self) -> float:
        """Weight of the mutual information with each batch covariate."""
        return self.independence if self.independence_batch is None else self.independence_batch


class TrainSettings(StageSettings):
    """Sampling and schedule (METHOD section 4)."""

    batch_size: int = result(1024, "cells drawn per group and epoch; a mini-batch holds twice as many", ge=NOISE_ROWS)
    epochs: int = result(10, "minimum number of epochs; a large cohort gets more, by `passes`", ge=1)
    passes: int = result(15, "minimum number of times that training sees an average cell", ge=1)
    learning_rate: float = result(1e-3, "learning rate of AdamW", gt=0)
    weight_decay: float = result(0.01, "weight decay of AdamW, on all parameters", ge=0)
    reset_every: int = result(30, "steps between resets of unused codes; 0: never", ge=0)
    reset_below: float = result(1.0, "reset codes whose use is below this multiple of 1/codes", ge=0)
    precision: Literal["float32", "bf16"] = result(
        "float32", "precision of the matrix products after the codebooks; bf16 is for GPUs"
    )
    workers: int = how(1, "training workers: they share the cells, or on GPUs the codebooks", ge=1)
    threads: int = how(2, "threads of one training worker", ge=1)
    device: Literal["auto", "cpu", "cuda"] = how("auto", "where to train; auto: on GPUs if they work")
    graphs: bool = how(True, "a single worker on a GPU runs its steps as CUDA graphs, recorded once")
    resident: bool = how(
        True, "keep the packed matrix on the GPU if it fits in half of the free GPU memory; else stream it"
    )
    checkpoint_steps: int | None = how(None, "steps between checkpoints, if sooner; null: by time alone", ge=1)
    checkpoint_minutes: float | None = how(5.0, "minutes between checkpoints; null: by steps alone", gt=0)
    max_failures: int = how(3, "maximum number of worker failures that training recovers from", ge=0)

    @model_validator(mode="after")
    def _some_checkpoints(self) -> Self:
        if self.checkpoint_steps is None and self.checkpoint_minutes is None:
            msg = "checkpoint_steps and checkpoint_minutes are both null; give one of them"
            raise ValueError(msg)
        return self

    @field_validator("batch_size")
    @classmethod
    def _whole_blocks(cls, value: int) -> int:
        if value % NOISE_ROWS:
            msg = f"must be a multiple of {NOISE_ROWS}"
            raise ValueError(msg)
        return value


CodeChoice = Literal["probable", "expected", "sampled"]
"""How a cell's codes are chosen at inference. The published implementation samples them (METHOD section 8)."""


class EmbedSettings(StageSettings):
    """The matching space: the trained embedding and its PCA (METHOD section 5), or another (section 9)."""

    method: str = result(
        keys.NDREAMER, "space to match cells in: ndreamer, pca, harmony, state, ndreamer+state, or obsm:KEY"
    )
    codes: CodeChoice = result(
        "probable", "codes that represent a cell: the most probable ones, their expectation, or sampled as in training"
    )
    tile_rows: int = result(1024, "cells encoded at once", ge=1)
    device: Literal["auto", "cpu", "cuda"] = how("auto", "where to encode cells; auto: on GPUs if they work")
    dimensions: int = result(50, "number of principal components, of the embedding or of the genes", ge=1)
    harmony_keys: tuple[str, ...] = result((), "harmony: columns of obs to correct for; empty: the groups")
    signal_share: float = result(
        0.1,
        "harmony: use components of which at least this share of the variance is signal, not counting noise; 0: all",
        ge=0,
        lt=1,
    )
    state_weight: float | None = result(
        None,
        "ndreamer+state: factor on the state coordinates; null: both parts get the same variance inside groups",
        gt=0,
    )

    @field_validator("method")
    @classmethod
    def _known(cls, value: str) -> str:
        named = value.startswith(keys.OBSM_PREFIX) and value != keys.OBSM_PREFIX
        if not named and (value not in keys.SPACES or value == keys.OBSM_PREFIX):
            names = [*keys.SPACES][:-1]
            msg = f"there is no such space; there are {', '.join(names)} and obsm:KEY.{suggest(value, names)}"
            raise ValueError(msg)
        return value

    @field_validator("harmony_keys", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return tuple(value.split(",")) if isinstance(value, str) else value or ()


class StateSettings(StageSettings):
    """The state space: the variation among the cells of one donor (METHOD section 10)."""

    by: str | None = result(
        None,
        "column of obs: each of its populations gets its own state space; ndreamer_cluster_low: the low clusters; null: one",
    )
    k: int | None = result(
        None, "number of dimensions of a population; null: as many as a permutation test confirms", ge=1
    )
    shrink: Literal["fitted", "own", "none"] = result(
        "fitted",
        "shrink noisy coordinates towards the position of the cell's group: from a fit over genes (fitted), or the group's "
        "mean (own); none: plain projections",
    )

    @field_validator("shrink", mode="before")
    @classmethod
    def _yes_or_no(cls, value: object) -> object:
        return {True: "fitted", False: "none"}.get(value, value) if isinstance(value, bool) else value


class MatchSettings(StageSettings):
    """Counterfactual matching (METHOD section 6)."""

    neighbours: int = result(1, "nearest neighbours k per target group, for effects and tests", ge=1)
    hubs: Literal["csls", "none"] = result(
        "none", "csls: correct distances for hubs (METHOD section 9); none: as published"
    )
    groups: int | None = result(
        None,
        "match each group to a sample of this many groups of a condition, besides itself; null: to all of them",
        ge=1,
    )
    within: str | None = result(
        None,
        "column of obs with labels (cell types): match cells of the same label; ndreamer_cluster_low: of the same low cluster; "
        "null: all cells of the target group",
    )
    within_cells: int = result(
        10,
        "minimum cells of a label in a target group; with fewer, cells of the label are matched to the whole group",
        ge=1,
    )
    bandwidth: float = result(1.0, "kernel bandwidth of the weights if k > 1", gt=0)
    edges: Literal["needed", "all"] = result(
        "needed", "match each group to the groups of its own and the control condition, or to every group"
    )
    query_rows: int = result(65_536, "query cells of one unit of work", ge=1)
    device: Literal["auto", "cpu", "cuda"] = how("auto", "where to match; auto: on GPUs if they work")

    @field_validator("groups", mode="before")
    @classmethod
    def _all(cls, value: object) -> object:
        return None if value in ("all", "none", "null", "") else value

    @field_validator("within", mode="before")
    @classmethod
    def _name(cls, value: object) -> object:
        return None if value in ("none", "null", "") else _as_name(value)


DENOISING_CELLS, MOST_DENOISING = 120, 15
"""Approximate number of cells that `denoised` averages over a condition's groups, and the maximum in one group."""


class DenoiseSettings(StageSettings):
    """The matches that the denoised expression averages (METHOD section 9)."""

    neighbours: int | None = result(
        None,
        "nearest neighbours k per group of the cell's own condition, for denoised; null: 120 cells over all groups of the "
        "condition, at most 15 per group",
        ge=1,
    )

    def counted(self, groups: int) -> int:
        """Return k for a condition of `groups` groups: beyond 120 cells the error of `denoised` hardly falls."""
        return self.neighbours or min(MOST_DENOISING, -(-DENOISING_CELLS // max(groups, 1)))


class EffectsSettings(StageSettings):
    """The stored values per cell and gene (METHOD section 6)."""

    store: tuple[Literal["denoised", "batch_effect", "ite"], ...] = result(
        ("denoised", "batch_effect", "ite"), "layers written to results.zarr"
    )
    chunk_genes: int = result(32, "genes of a chunk of a layer", ge=1)
    keep_bits: int | None = result(None, "mantissa bits kept of each value; null: all", ge=1, le=23)
    near_quantile: float = result(
        0.99,
        "a control match is near if its distance is at most this quantile of the distances inside groups",
        gt=0,
        le=1,
    )

    @field_validator("store", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        if value == "none":
            return ()
        return tuple(value.split(",")) if isinstance(value, str) else value

    @field_validator("store")
    @classmethod
    def _once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(value))


class RunSettings(StageSettings):
    """How the job is run; nothing here affects the results."""

    address: str | None = how(None, "address of a Ray cluster; null: RAY_ADDRESS, else start a local Ray")
    cpus: int | None = how(
        None, "processors of a local Ray, or the number that a cluster may grow to; null: all there are", ge=1
    )
    gpus: int | None = how(None, "number of GPUs that a cluster may grow to; null: those there are", ge=1)
    object_store_gb: float | None = how(None, "size of a local Ray's object store; null: chosen from the memory", gt=0)
    task_threads: int = how(1, "threads of one task outside training", ge=1)
    progress: bool | None = how(None, "show progress bars; null: on a terminal and in notebooks")
    log_format: Literal["text", "json"] = how("text", "format of log lines: text, or JSON objects")
    serial: bool | None = how(
        None, "run everything in this process, without Ray; null (auto): chosen by the number of cells and processors"
    )
    memory_gb: float | None = how(
        None, "memory that the job may use; null: the limit of the container or machine", gt=0
    )

    @field_validator("serial", mode="before")
    @classmethod
    def _auto_serial(cls, value: object) -> object:
        return None if value == "auto" else value

    @property
    def bars(self) -> bool | None:
        """Whether to show bars; `None`: on a terminal only. Never by default with a JSON log, which bars would break."""
        if self.progress is not None:
            return self.progress
        if self.log_format == "json":
            return False
        return True if "ipykernel" in sys.modules else None


class Settings(BaseModel):
    """All settings of a run, usually made by `Settings.build(preset="small", overrides={"match.neighbours": 5})`."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    seed: int = Field(0, description="seed of all random numbers", ge=0, le=LARGEST_NUMBER)
    cohort: CohortSettings = CohortSettings()
    hvg: HvgSettings = HvgSettings()
    pack: PackSettings = PackSettings()
    clusters: ClustersSettings = ClustersSettings()
    model: ModelSettings = ModelSettings()
    loss: LossSettings = LossSettings()
    train: TrainSettings = TrainSettings()
    embed: EmbedSettings = EmbedSettings()
    state: StateSettings = StateSettings()
    match: MatchSettings = MatchSettings()
    denoise: DenoiseSettings = DenoiseSettings()
    effects: EffectsSettings = EffectsSettings()
    run: RunSettings = RunSettings()

    @model_validator(mode="after")
    def _tiles_fit_blocks(self) -> Self:
        if self.embed.tile_rows > self.pack.block_rows:
            msg = f"embed.tile_rows ({self.embed.tile_rows}) exceeds pack.block_rows ({self.pack.block_rows})"
            raise ValueError(msg)
        return self

    @classmethod
    def build(
        cls,
        *,
        preset: str = "paper",
        config: Mapping[str, Any] | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> Settings:
        """Return the settings of a preset, changed by a configuration and then by dotted overrides.

        Parameters
        ----------
        preset
            `paper` or `small`.
        config
            Nested values, as in a YAML file: `{"train": {"epochs": 50}}`.
        overrides
            Values by dotted name, as for `--set`: `{"train.epochs": 50}`.

        Raises
        ------
        SettingsError
            A name is unknown or a value is out of range; the message says which and what is accepted.
        """
        if preset not in PRESETS:
            msg = f"preset {preset!r} is unknown; there are {', '.join(PRESETS)}.{suggest(preset, PRESETS)}"
            raise SettingsError(msg)
        values: dict[str, Any] = {stage: dict(fields) for stage, fields in PRESETS[preset].items()}
        for stage, fields in (config or {}).items():
            _check_name(cls, stage)
            fields = {} if fields is None else fields  # a heading in YAML with nothing below it
            if isinstance(fields, Mapping):
                for field in fields:
                    _refuse_removed(f"{stage}.{field}")
            values[stage] = {**values.get(stage, {}), **fields} if isinstance(fields, Mapping) else fields
        for name, value in (overrides or {}).items():
            stage, _, field = name.partition(".")
            _check_name(cls, stage, field)
            if field:
                if isinstance(inner := values.setdefault(stage, {}), dict):  # validation refuses anything else
                    inner[field] = value
            else:
                values[stage] = value
        return _validated(cls, values)

    def to_yaml(self) -> str:
        """Return the settings as YAML that `build(config=...)` reads back, with a comment on each."""
        lines = ["# Settings marked * affect the results; the others only say how the work is done."]
        for stage, field in type(self).model_fields.items():
            part = getattr(self, stage)
            if isinstance(part, StageSettings):
                lines += ["", f"{stage}:  # {(type(part).__doc__ or '').splitlines()[0].rstrip('.')}"]
                lines += [textwrap.indent(line, "  ") for line in part.described()]
            else:
                lines.append(_yaml_line(stage, part, f"* {field.description}"))
        return "\n".join(lines) + "\n"


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {"train": {"epochs": 100}},
    # It models 2000 genes, like `paper`: 1000 would leave out ISG15, the gene that interferon raises most in Kang's cohort.
    "small": {
        "clusters": {"iterations": 2},
        "model": {
            "encoder": (256, 128, 128), "codebooks": 8, "codes": 256, "latent": 64, "decoder": (128, 256),
        },
        "train": {"epochs": 100, "passes": 3, "batch_size": 512},
    },
}  # fmt: skip


REMOVED = {
    "match.search": "search is always exact",
    "match.probes": "search is always exact",
    "train.compile": "it was no faster; train without it",
    "effects.dtype": "use effects.keep_bits=10, which saves most of the space in float32",
}
"""Settings of earlier versions, and what replaces them."""


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """Turn the assignments of `--set`, `["train.epochs=50"]`, into overrides; values are read as YAML."""
    overrides: dict[str, Any] = {}
    for text in assignments:
        name, separator, value = text.partition("=")
        if not separator or not name:
            msg = f"--set takes stage.name=value, found {text!r}"
            raise SettingsError(msg)
        overrides[name.strip()] = read_yaml(value, f"--set {quoted(text)}")
    return overrides


class _Words(yaml.SafeLoader):
    """YAML loader that keeps names as text: `no`, `on`, `001`, `0.10`, `12:30` and dates.

    Only `true`, `false` and numbers in their canonical spelling are converted. Other spellings still work for settings that
    are numbers or booleans, since pydantic converts the text.
    """


def _as_written(construct: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return a constructor that converts a scalar only if the value prints as it is written, and else keeps the text."""

    def convert(loader: Any, node: Any) -> Any:
        value = construct(loader, node)
        return value if str(value).lower() == str(node.value).lower() else node.value

    return convert


for _kind in ("bool", "int", "float"):
    _tag = f"tag:yaml.org,2002:{_kind}"
    _Words.add_constructor(_tag, _as_written(yaml.SafeLoader.yaml_constructors[_tag]))
_Words.add_constructor("tag:yaml.org,2002:timestamp", lambda _, node: node.value)


def read_yaml(text: str | bytes, where: str) -> Any:
    """Return the plain values of a YAML text. Tags of Python objects are refused, so no code can run.

    Raises
    ------
    SettingsError
        The text is not plain YAML; the message begins with `where`.
    """
    try:
        return _Words(text).get_single_data()
    except Exception as error:
        # PyYAML does not wrap errors of int(), dates and recursion.
        msg = f"{where} cannot be read as plain YAML ({' '.join(str(error).split())[:200] or type(error).__name__})"
        raise SettingsError(msg) from error


def canonical_json(value: object) -> str:
    """Return JSON with sorted keys and no spaces, so that equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _check_name(cls: type[BaseModel], stage: str, field: str = "") -> None:
    if stage not in cls.model_fields:
        msg = f"there is no setting {quoted(stage)}.{suggest(stage, cls.model_fields)}"
        raise SettingsError(msg)
    inner = cls.model_fields[stage].annotation
    fields = inner.model_fields if isinstance(inner, type) and issubclass(inner, BaseModel) else {}
    _refuse_removed(f"{stage}.{field}")
    if field and field not in fields:
        names = [f"{stage}.{name}" for name in fields]
        msg = f"there is no setting {quoted(f'{stage}.{field}')}.{suggest(f'{stage}.{field}', names)}"
        raise SettingsError(msg)


def _refuse_removed(name: str) -> None:
    if name in REMOVED:
        msg = f"setting '{name}' was removed: {REMOVED[name]}"
        raise SettingsError(msg)


def _validated(cls: type[Settings], values: Mapping[str, Any]) -> Settings:
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "settings"
        # A few nested YAML aliases can expand to a value that is too long to print.
        found = "" if not first["loc"] else f" (found {reprlib.repr(first['input'])})"
        msg = f"setting '{name}': {first['msg'].removeprefix('Value error, ')}{found}"
        raise SettingsError(msg) from None


TRAINING = ("model", "loss", "train")
"""Parts of the settings that bear on trained spaces alone."""


def bearing_settings(told: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the settings that bear on results, by part.

    Settings of training and of clusters are left out where the matching space is made without them.

    Parameters
    ----------
    told
        `uns["ndreamer"]` of the results.
    """
    settings: dict[str, dict[str, Any]] = json.loads(told["settings"])
    space = settings.get("embed", {}).get("method", keys.NDREAMER)
    unused = set() if keys.is_trained(space) else set(TRAINING)
    within = settings.get("match", {}).get("within")
    if not keys.is_clustered(space, settings.get("state", {}).get("by")) and within != keys.OBS_LOW:
        unused.add("clusters")
    return {part: values for part, values in settings.items() if part not in unused}
