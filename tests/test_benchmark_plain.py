"""scripts/benchmark_plain.py and the fast networks compute the same, to 1e-4, with weights that are nowhere zero."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from configs.load import load_config
from modeling.flow import FlowConfig
from modeling.flow_model import FlowModel
from modeling.flowtok import FlowTok, FlowTokConfig
from modeling.pipeline import ImageGenerator, SamplingConfig
from modeling.text_projector import TextProjectorConfig
from scripts.benchmark_plain import PlainFlowTok, PlainTextToImage, PlainTrainer, plain_transport
from train_flowtok import compute_losses
from training.loop import Trainer
from training.optim import OptimizerConfig
from training.run import start_run
from training.stage import TrainingConfig

NET = FlowTokConfig(num_tokens=77, token_channels=16, width=192, depth=3, num_heads=3)
PROJECTOR = TextProjectorConfig(
    text_width=96, width=64, depth=2, num_heads=4, mlp_width=128, dropout=0.0
)
SMALL = 1e-4


def fill(module, std):
    """No weight is zero, and none of its own initial size."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    return module


def both_networks():
    fast = fill(FlowTok(NET), 0.05)
    plain = PlainFlowTok(NET)
    plain.load_state_dict(fast.state_dict())
    return fast, plain


def assert_close(a, b, tolerance=SMALL):
    assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1)


def test_velocities_and_gradients_agree():
    fast, plain = both_networks()
    inputs = torch.randn(4, 77, 16), torch.rand(4), torch.tensor([False, True, False, True])
    target, velocities = torch.randn(4, 77, 16), []
    for network in (fast, plain):
        velocities.append(network(*inputs))
        F.mse_loss(velocities[-1], target).backward()
    assert velocities[0].std() > 0.1  # not degenerate
    assert_close(*velocities)
    gradients = [
        dict((name, p.grad) for name, p in network.named_parameters()) for network in (fast, plain)
    ]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        size = gradient.abs().max()
        assert size > 0
        assert_close(gradient / size, gradients[1][name] / size, 1e-3)
        assert (gradient - gradients[1][name]).abs().max() <= SMALL


@pytest.mark.parametrize("batch_size", [1, 3])
def test_twenty_guided_steps_end_at_the_same_latents(batch_size):
    flow = FlowModel(PROJECTOR, NET).eval()
    fill(flow.flowtok, 0.02)
    flow.latent_scale.fill_(0.8)
    plain = PlainFlowTok(NET)
    plain.load_state_dict(flow.flowtok.state_dict())
    start, config = torch.randn(batch_size, 77, 16), SamplingConfig(steps=20, guidance=2.0)
    fast_end = ImageGenerator(None, None, None, flow).transport(start, config)
    plain_end = plain_transport(plain, start, config, 0.8)
    assert (plain_end - start / 0.8).std() > 0.1  # it went somewhere
    assert_close(fast_end, plain_end)
    unguided = plain_transport(plain, start, replace(config, guidance=1.0), 0.8)
    assert (unguided - plain_end).abs().max() > 100 * SMALL


def test_another_solver_is_compared_with_the_papers_twenty_steps():
    network, start = PlainFlowTok(NET), torch.randn(1, 77, 16)
    fill(network, 0.02)
    configs = SamplingConfig(steps=6, sampler="heun"), SamplingConfig(steps=20, sampler="euler")
    ends = [plain_transport(network, start, config, 1.0) for config in configs]
    assert torch.equal(*ends)


def test_steps_of_optimizer_and_ema_agree(tmp_path):
    flow = FlowConfig(sample_text_latent=False, sample_image_latent=False, null_probability=0.3)
    training = TrainingConfig(max_steps=10, batch_size=4, ema_decay=0.9, max_gradient_norm=0.5)
    config = load_config("configs/flowtok_b/flowtok.yaml", ["training.precision=fp32"])
    config = replace(config, flow=flow, projector=PROJECTOR, flowtok=NET, training=training)
    config = replace(
        config, optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2, weight_decay=0.03)
    )
    model = fill(FlowModel(PROJECTOR, NET), 0.02)
    plain_model = PlainTextToImage(PROJECTOR, NET)
    plain_model.load_state_dict(model.state_dict())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = Trainer(
        start_run(tmp_path / "run", "fp32", 0), training, config.optimizer, model, None
    )
    plain = PlainTrainer(plain_model, config.optimizer, training)
    states, latents = torch.randn(4, 77, 96), torch.randn(4, 77, 16)
    posterior = SimpleNamespace(mean=latents, logvar=torch.zeros_like(latents))
    tokens = SimpleNamespace(
        text_states=lambda batch: states, image_posterior=lambda batch: posterior
    )

    def losses(network, batch=None):
        return compute_losses(config, SimpleNamespace(latent_scale=1.0), tokens, network, batch)

    trainer.player.wrapped.train()
    for step in range(3):
        torch.manual_seed(step)
        trainer.optimizer_step(iter([{"key": []}]), losses)
        torch.manual_seed(step)
        plain.update(lambda network: losses(network)["loss"])
    for fast, other in ((model, plain_model), (trainer.ema.average, plain.average)):
        others = dict(other.named_parameters())
        for name, weight in fast.named_parameters():
            assert (weight - before[name]).abs().max() > 2 * SMALL, name
            if not name.endswith(
                "qkv.bias"
            ):  # that of k has no gradient but rounding, which Adam blows up
                assert (weight - others[name]).abs().max() <= SMALL, name


@pytest.mark.parametrize("option", [{"two_way": True}, {"predicts": "end"}])
def test_networks_without_a_plain_way_are_refused(option):
    with pytest.raises(ValueError, match="leave --baseline out"):
        PlainFlowTok(replace(NET, **option))
