"""The plain way of FlowTok's maths: what scripts/benchmark.py --baseline times, and a reference for tests.

Each formula as it is written: attention by matmul, softmax, matmul; x * (1 + scale) + shift out of place; modulation
for each sample and step; one pass for each branch of the guidance; optimizer and EMA tensor by tensor. The networks
take the state dicts of the fast ones (modeling/flowtok.py, modeling/flow_model.py) and use none of their code.
"""

import copy
import math
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from modeling.flow import FlowConfig, drop_to_null, interpolate, sample_times, target_velocity
from modeling.flow_model import FlowPass
from modeling.flowtok import FlowTokConfig
from modeling.layers import Attention
from modeling.pipeline import SamplingConfig
from modeling.posterior import Posterior
from modeling.text_projector import TextProjector, TextProjectorConfig
from training.optim import OptimizerConfig, decay_groups, learning_rate
from training.stage import TrainingConfig

STEPS = 20  # the paper's, of Euler


class PlainAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v with the scores in memory; B x N x W."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(
            self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads
        ).unbind(0)
        weights = torch.softmax(
            q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1
        )  # B x H x N x N
        return self.out(rearrange(weights.to(v.dtype) @ v, "b h n d -> b n (h d)"))


class PlainBlock(nn.Module):
    """adaLN-Zero block, B x K x W."""

    def __init__(self, config: FlowTokConfig):
        super().__init__()
        width, hidden = config.width, int(config.mlp_ratio * config.width)
        self.modulation = nn.Linear(width, 6 * width)
        self.attention = PlainAttention(width, config.num_heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width)
        )

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        modulation = self.modulation(F.silu(c))[:, None]  # B x 1 x 6 W
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=-1)
        x = x + gate_a * self.attention(normalize(x) * (1 + scale_a) + shift_a)
        return x + gate_m * self.mlp(normalize(x) * (1 + scale_m) + shift_m)


class PlainFlowTok(nn.Module):
    """The velocity network with the weights' names of modeling/flowtok.py.

    Raises:
        ValueError: a network that has no plain way here.
    """

    def __init__(self, config: FlowTokConfig):
        super().__init__()
        if config.two_way or config.predicts != "velocity":
            raise ValueError(
                "the plain way is that of flowtok.two_way=false and flowtok.predicts=velocity, got "
                f"{config.two_way} and {config.predicts}: leave --baseline out"
            )
        width = config.width
        self.embed_tokens = nn.Linear(config.token_channels, width)
        time_mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.embed_time = nn.ModuleDict({"mlp": time_mlp})
        self.embed_null = nn.Embedding(2, width)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.depth))
        self.modulation_out = nn.Linear(width, 2 * width)
        self.to_velocity = nn.Linear(width, config.token_channels)
        self.register_buffer(
            "positions", sinusoids(torch.arange(config.num_tokens), width, "sin"), persistent=False
        )

    def forward(self, tokens: Tensor, t: Tensor, null: Tensor) -> Tensor:
        """Tokens B x K x C, t B in [0, 1], null B bool -> velocity B x K x C."""
        c = self.embed_time["mlp"](sinusoids(t, 256, "cos")) + self.embed_null(null.long())  # B x W
        x = self.embed_tokens(tokens) + self.positions
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.modulation_out(F.silu(c))[:, None].chunk(2, dim=-1)
        return self.to_velocity(normalize(x) * (1 + scale) + shift)


class PlainTextToImage(nn.Module):
    """Projector and velocity network as stage 3 trains them."""

    def __init__(self, projector: TextProjectorConfig, flowtok: FlowTokConfig):
        super().__init__()
        self.projector = unfuse_attention(TextProjector(projector))
        self.flowtok = PlainFlowTok(flowtok)
        self.register_buffer("latent_scale", torch.ones(()))

    def forward(self, text_states: Tensor, image_latents: Tensor, flow: FlowConfig) -> FlowPass:
        """Text states B x L x T and scaled image latents B x K x C -> what the losses of stage 3 need."""
        mean, logvar, alignment, log_temperature = self.projector(text_states)
        text = Posterior(mean, logvar).sample() if flow.sample_text_latent else mean
        source = text if flow.projector == "joint" else text.detach()
        t = sample_times(flow, len(text), text.device)
        null, image = drop_to_null(image_latents, flow.null_probability)
        velocity = self.flowtok(interpolate(source, image, t, flow.sigma_min), t, null)
        target = target_velocity(source, image, flow.sigma_min)
        return FlowPass(velocity, target, text, mean, logvar, alignment, log_temperature)


def plain_copy(
    model: nn.Module, projector: TextProjectorConfig, flowtok: FlowTokConfig
) -> PlainTextToImage:
    """The plain network with the weights of stage 3's, on its device; the same ones are trained."""
    weight = next(model.parameters())
    with torch.device(weight.device):
        plain = PlainTextToImage(projector, flowtok)
    plain.load_state_dict(model.state_dict())
    trained = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(trained[name].requires_grad)
    return plain.train(model.training)


class PlainTrainer:
    """Optimizer steps without any fusion: forward and backward, clip, AdamW and EMA, tensor by tensor."""

    def __init__(self, model: nn.Module, optimizer: OptimizerConfig, training: TrainingConfig):
        self.model, self.config, self.training, self.step = model, optimizer, training, 0
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        groups = decay_groups(model, optimizer.weight_decay)
        betas = tuple(optimizer.betas)
        self.optimizer = torch.optim.AdamW(
            groups, optimizer.learning_rate, betas, foreach=False, fused=False
        )
        self.average = copy.deepcopy(model).eval().requires_grad_(False)

    def update(self, loss_fn: Callable[[nn.Module], Tensor]) -> None:
        """One step on `loss_fn(model)`."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step, self.training.max_steps)
        loss_fn(self.model).backward()
        limit = self.training.max_gradient_norm or float("inf")
        torch.nn.utils.clip_grad_norm_(self.trainable, limit, foreach=False)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(self.training.optim_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for average, weight in zip(
                self.average.parameters(), self.model.parameters(), strict=True
            ):
                average.mul_(decay).add_(weight, alpha=1 - decay)
        self.step += 1


@torch.no_grad()
def plain_transport(
    network: nn.Module, source: Tensor, config: SamplingConfig, latent_scale: float
) -> Tensor:
    """Euler steps with both branches one after the other at every step, B x K x C -> B x K x C.

    Takes `steps` and `guidance` of the config; for another solver than Euler the paper's 20 steps.
    """
    x, steps = source.float(), config.steps if config.sampler == "euler" else STEPS
    with torch.autocast(x.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        for step in range(steps):
            t = torch.full((len(x),), step / steps, device=x.device)
            on = torch.ones(len(x), dtype=torch.bool, device=x.device)
            conditional, unconditional = network(x, t, ~on).float(), network(x, t, on).float()
            x = x + (unconditional + config.guidance * (conditional - unconditional)) / steps
    return x / latent_scale


def normalize(x: Tensor) -> Tensor:
    """LayerNorm without weights, eps 1e-6."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def sinusoids(values: Tensor, width: int, first: str) -> Tensor:
    """N -> N x width: sines and cosines of the values at frequencies 10000^(-2i / width), `first` of them first."""
    frequencies = 10000.0 ** (
        -torch.arange(0, width, 2, dtype=torch.float64, device=values.device) / width
    )
    angles = values.double()[:, None] * frequencies
    parts = [angles.sin(), angles.cos()]
    return torch.cat(parts if first == "sin" else parts[::-1], dim=-1).float()


def unfuse_attention(module: nn.Module) -> nn.Module:
    """Put PlainAttention with the same weights in the place of each modeling.layers.Attention; returns the module."""
    for name, child in module.named_children():
        if isinstance(child, Attention):
            plain = PlainAttention(child.qkv.in_features, child.num_heads)
            plain.load_state_dict(child.state_dict())
            setattr(module, name, plain)
        else:
            unfuse_attention(child)
    return module
