"""Write and load the trained model: the weights, and all that is needed to use them on other cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from scipy import sparse

from ndreamer_dist import keys
from ndreamer_dist.cohort.packed import Packed
from ndreamer_dist.model.network import NDreamerNetwork
from ndreamer_dist.model.transfer import dense
from ndreamer_dist.settings import CodeChoice, ModelSettings, Settings
from ndreamer_dist.storage.checksums import WEIGHTS_DIGEST, digest, read_model, seal
from ndreamer_dist.storage.files import Storage


@dataclass(frozen=True)
class TrainedModel:
    """A trained network with the names of its inputs.

    Attributes
    ----------
    network
        In evaluation mode.
    genes
        Names of the genes, in the order of the input's columns.
    conditions, batch_levels
        Names of the conditions, and of the levels of each batch covariate, in the order of their codes.
    """

    network: NDreamerNetwork
    genes: tuple[str, ...]
    conditions: tuple[str, ...]
    batch_levels: tuple[tuple[str, ...], ...]

    @classmethod
    def load(cls, storage: Storage, device: str = "cpu") -> TrainedModel:
        """Load `model/` of a run directory, which needs no other file of the run."""
        stored, weights = read_model(storage)
        network = NDreamerNetwork(
            genes=len(stored["genes"]),
            conditions=len(stored["conditions"]),
            batch_levels=tuple(len(levels) for levels in stored["batch_levels"]),
            settings=ModelSettings.model_validate(stored["settings"]),
        )
        network.load_state_dict(load_tensors(weights))
        names = tuple(stored["genes"]), tuple(stored["conditions"]), tuple(tuple(b) for b in stored["batch_levels"])
        return cls(network.to(device).eval(), *names)

    def embed(
        self, x: sparse.csr_matrix, tile_rows: int = 1024, *, codes: CodeChoice = "probable", key: Sequence[int] = (0,)
    ) -> np.ndarray:
        """Return the effect-modifier embedding mu of log-normalised cells (METHOD section 5).

        Parameters
        ----------
        x
            (cells, genes), columns as in `genes`.
        tile_rows
            Cells encoded at once; the last tile is padded. Equal `tile_rows` give equal bits for any number of cells.
        codes, key
            How codes are chosen (`EmbedSettings.codes`), and the key of the random draws of `sampled` codes.

        Returns
        -------
        (cells, z) float32.
        """
        device = next(self.network.parameters()).device
        out = np.empty((x.shape[0], self.network.settings.latent), dtype=np.float32)
        for number, start in enumerate(range(0, x.shape[0], tile_rows)):
            state = int(np.random.SeedSequence((*key, number)).generate_state(1, np.uint64)[0] >> 1)
            rows = x[start : start + tile_rows]
            tile = sparse.csr_matrix(
                (rows.data, rows.indices, np.pad(rows.indptr, (0, tile_rows - rows.shape[0]), "edge")),
                shape=(tile_rows, x.shape[1]),
            )
            with torch.inference_mode():
                generator = torch.Generator().manual_seed(state)
                mu = self.network.embed(dense(tile, device), codes, generator)
            out[start : start + rows.shape[0]] = mu[: rows.shape[0]].cpu().numpy()
        return out


def save_model(storage: Storage, network: NDreamerNetwork, packed: Packed, settings: Settings) -> None:
    """Write `model/`: the weights, and as JSON all that is needed to use them."""
    stored = {
        "format": keys.FORMAT_VERSION,
        "settings": settings.model.model_dump(mode="json"),
        "training": {part: getattr(settings, part).bearing() for part in ("loss", "train")},
        "seed": settings.seed,
        "genes": list(packed.genes),
        "condition_key": packed.design.condition_key,
        "conditions": list(packed.design.conditions),
        "batch_keys": list(packed.design.batch_keys),
        "batch_levels": [list(levels) for levels in packed.design.batch_levels],
        "input": "log1p of counts scaled to 10 000 per cell",
        "output": "mu, the effect-modifier embedding (cells, latent)",
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    weights = save_tensors(tensors)
    storage.write_atomic(keys.MODEL_WEIGHTS, weights)
    storage.write_atomic(keys.MODEL_JSON, seal(stored | {WEIGHTS_DIGEST: digest(weights)}))
