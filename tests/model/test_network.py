"""The network gives METHOD's reference outputs; a training step gives METHOD's loss and gradients."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from ndreamer_dist.model import noise as noises
from ndreamer_dist.model.batch import MiniBatch
from ndreamer_dist.model.codebooks import Quantised, look_up
from ndreamer_dist.model.collectives import Single
from ndreamer_dist.model.losses import commitment, total_loss
from ndreamer_dist.model.network import NDreamerNetwork
from ndreamer_dist.model.noise import StepNoise
from ndreamer_dist.settings import LossSettings, ModelSettings
from tests.model.helpers import CONDITIONS, TINY, close, golden, literal_loss, random_batch, tiny_network

GOLDEN_LAYERS = {
    "encoder.encoders.encoders.0.0": "encoder.layers.0",
    "encoder.encoders.encoders.0.1": "encoder.norms.0",
    "encoder.encoders.encoders.1.1": "encoder.layers.1",
    "encoder.encoders.encoders.1.2": "encoder.norms.1",
    "encoder.encoders.encoders.2.1": "encoder.layers.2",
    "encoder.linear.0": "head.merge",
    "encoder.FFN.ln1": "head.norm_in",
    "encoder.FFN.fc1": "head.widen",
    "encoder.FFN.fc2": "head.narrow",
    "encoder.FFN.ln2": "head.norm_out",
    "encoder.mean_encoder.1": "head.mean",
    "encoder.variance_encoder.1": "head.log_variance",
    "condition_embedding": "decoder.condition",
    "batch_embedding.0": "decoder.batch.0",
    "batch_embedding.1": "decoder.batch.1",
    "decoder.decoders.0": "decoder.layers.0",
    "decoder.decoders.1.0": "decoder.layers.1",
    "decoder.out": "decoder.layers.2",
}
GOLDEN_CODEBOOK = {
    "classifier.weight": "projection",
    "classifier.bias": "bias",
    "embedding.weight": "embedding",
    "embedding_usage": "usage",
}
GOLDEN_BOOKS = 4
MIDDLE = ModelSettings(encoder=(64, 48, 32), codebooks=8, codes=64, code_dim=8, latent=32, decoder=(32, 48))


@pytest.fixture
def reference() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in golden("forward").items()}


@pytest.fixture
def reference_network(reference: dict[str, torch.Tensor]) -> NDreamerNetwork:
    settings = ModelSettings(
        encoder=(20, 14, 12), codebooks=GOLDEN_BOOKS, codes=16, code_dim=3, latent=6, decoder=(14, 20)
    )
    network = NDreamerNetwork(30, 3, (4, 2), settings)
    state = network.state_dict()
    left = {name for name in reference if name.startswith("param_") and not name.endswith("num_batches_tracked")}

    def take(name: str) -> torch.Tensor:
        left.discard(f"param_{name}")
        return reference[f"param_{name}"]

    for theirs, ours in GOLDEN_LAYERS.items():
        for part in [name.removeprefix(ours) for name in state if name.startswith(f"{ours}.")]:
            state[f"{ours}{part}"].copy_(take(f"{theirs}{part}"))
    for theirs, ours in GOLDEN_CODEBOOK.items():
        state[f"quantiser.{ours}"].copy_(
            torch.stack([take(f"encoder.codebooks.{k}.{theirs}") for k in range(GOLDEN_BOOKS)])
        )
    for part in ("weight", "bias", "running_mean", "running_var"):
        state[f"quantiser.norm.{part}"].copy_(
            torch.cat([take(f"encoder.codebooks.{k}.bn.{part}") for k in range(GOLDEN_BOOKS)])
        )
    assert not left
    return network


def test_inference_equals_the_published_outputs(
    reference: dict[str, torch.Tensor], reference_network: NDreamerNetwork
) -> None:
    network = reference_network
    projections = network.project(reference["x"])
    mean, variance = network.infer(projections)
    close(network.quantiser.probabilities(projections), reference["out_probs"])
    assert torch.equal(network.quantiser.codes(projections), reference["out_codes"])
    close(mean, reference["out_mean"])
    close(variance, reference["out_variance"])
    close(network.embed(reference["x"]), reference["out_mean"])
    rebuilt = network.reconstruct(mean, reference["condition"], reference["batch"])
    close(rebuilt, reference["out_reconstruction"])


def test_commitment_is_zero_with_hard_codes(
    reference: dict[str, torch.Tensor], reference_network: NDreamerNetwork
) -> None:
    embedding = reference_network.quantiser.embedding
    hard = look_up(embedding, reference["out_codes"])
    nothing = hard.new_zeros(())
    value = commitment(Quantised(hard, hard, hard, nothing, nothing, nothing))
    close(value, reference["out_commitment_unscaled"].item())


def test_expected_codes_are_the_mean_of_sampled_ones(
    reference: dict[str, torch.Tensor], reference_network: NDreamerNetwork
) -> None:
    quantiser, projections = reference_network.quantiser, reference_network.project(reference["x"])
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([quantiser.vectors(projections, "sampled", generator) for _ in range(4000)])
    expected = torch.einsum("knj,kjd->knd", reference["out_probs"], quantiser.embedding.detach())
    close(quantiser.vectors(projections, "expected"), expected)
    error = draws.std(dim=0) / len(draws) ** 0.5
    assert ((draws.mean(dim=0) - expected).abs() <= 5 * error + 1e-6).all()
    assert draws.std(dim=0).max() > 0.1


def test_embedding_neither_samples_nor_changes_the_network() -> None:
    network, batch = tiny_network(), random_batch()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert torch.equal(network.embed(batch.x), network.embed(batch.x))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        pytest.param(TINY, LossSettings(), id="race"),
        pytest.param(TINY.model_copy(update={"temperature": 0.05}), LossSettings(), id="long_race"),
        pytest.param(TINY.model_copy(update={"temperature": 0.5}), LossSettings(), id="one_number_per_code"),
        pytest.param(TINY, LossSettings(cross_cluster="clusters", neighbours=3, triplet_pairs=2), id="clusters"),
        pytest.param(
            TINY.model_copy(update={"encoder": (8,)}), LossSettings(neighbours=100), id="one_layer_all_neighbours"
        ),
    ],
)
def test_a_step_has_the_loss_and_gradients_of_the_literal_method(settings: ModelSettings, loss: LossSettings) -> None:
    network, batch = tiny_network(settings), random_batch(150)
    noise = noises.draw(batch, settings, 0)
    terms = total_loss(network(batch, noise, Single()), batch, noise, loss, conditions=CONDITIONS, collective=Single())
    expected = literal_loss(network, batch, noise, loss)
    close(terms.total, expected.item(), rtol=1e-9)
    parameters = dict(network.named_parameters())
    found = torch.autograd.grad(terms.total, list(parameters.values()))
    wanted = torch.autograd.grad(expected, list(parameters.values()))
    for name, ours, theirs in zip(parameters, found, wanted, strict=True):
        close(ours, theirs, rtol=1e-7, atol=1e-9 * max(1.0, theirs.abs().max().item())), name


def test_initial_weights_come_from_the_seed_alone_and_leave_torch_as_it_was() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first, again, other = (NDreamerNetwork(5, 2, (), TINY, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.quantiser.embedding, again.quantiser.embedding)
    assert not torch.equal(first.quantiser.embedding, other.quantiser.embedding)


def test_data_with_negatives_may_be_reconstructed_negative() -> None:
    mean = torch.randn(50, TINY.latent)
    codes = torch.zeros(50, dtype=torch.int64), torch.zeros(50, 0, dtype=torch.int64)
    assert NDreamerNetwork(5, 2, (), TINY, nonnegative=True).reconstruct(mean, *codes).min() >= 0
    assert NDreamerNetwork(5, 2, (), TINY, nonnegative=False).reconstruct(mean, *codes).min() < 0


def terms_of(network: NDreamerNetwork, batch: MiniBatch) -> dict[str, float]:
    noise = noises.draw(batch, network.settings, 0)
    outputs = network(batch, noise, Single())
    terms = total_loss(outputs, batch, noise, LossSettings(), conditions=CONDITIONS, collective=Single())
    terms.total.backward()
    return terms.as_floats()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("settings", [TINY, MIDDLE], ids=["tiny", "middle"])
def test_bf16_products_keep_every_loss_to_a_hundredth(settings: ModelSettings, seed: int) -> None:
    batch = random_batch(1024, dtype=torch.float32, seed=seed)
    full, half = (tiny_network(settings, torch.float32) for _ in range(2))
    half.bf16 = True
    expected, found = terms_of(full, batch), terms_of(half, batch)
    assert found != expected
    assert found == pytest.approx(expected, rel=1e-2, abs=1e-6)
    assert all(parameter.grad.dtype == torch.float32 for parameter in half.parameters())


def test_bf16_products_choose_the_same_codes() -> None:
    batch = random_batch(512, dtype=torch.float32)
    noise = noises.draw(batch, MIDDLE, 0)
    full, half = (tiny_network(MIDDLE, torch.float32) for _ in range(2))
    half.bf16 = True
    assert torch.equal(*(network(batch, noise, Single()).quantised.vectors for network in (full, half)))


def test_inference_keeps_full_precision_after_bf16_training() -> None:
    batch = random_batch(100, dtype=torch.float32)
    full, half = (tiny_network(dtype=torch.float32) for _ in range(2))
    half.bf16 = True
    assert torch.equal(full.embed(batch.x), half.embed(batch.x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_a_gpu_computes_the_losses_of_the_cpu(bf16: bool) -> None:
    batch = random_batch(512, dtype=torch.float32)
    noise = noises.draw(batch, TINY, 0)
    values = {}
    for device in ("cpu", "cuda"):
        network = tiny_network(dtype=torch.float32).to(device)
        network.bf16 = bf16 and device == "cuda"
        here = replace(batch, x=batch.x.to(device))
        drawn = StepNoise(*(getattr(noise, part.name).to(device) for part in fields(noise)))
        outputs = network(here, drawn, Single())
        terms = total_loss(outputs, here, drawn, LossSettings(), conditions=CONDITIONS, collective=Single())
        terms.total.backward()
        values[device] = terms.as_floats()
    assert values["cuda"] == pytest.approx(values["cpu"], rel=1e-2 if bf16 else 1e-4, abs=1e-3 if bf16 else 1e-5)
