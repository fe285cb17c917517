"""Projector and velocity network as one module: stage 3 trains and saves it, sampling loads it (paper, Sec. 3.3)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from modeling.flow import FlowConfig, drop_to_null, interpolate, sample_times, target_velocity
from modeling.flowtok import FlowTok, FlowTokConfig
from modeling.posterior import Posterior
from modeling.text_projector import TextProjector, TextProjectorConfig


class FlowPass(NamedTuple):
    """Everything the losses of stage 3 need; a named tuple, so that DDP sees its tensors."""

    velocity: Tensor  # B x K x C, predicted
    target: Tensor  # B x K x C
    text_latents: Tensor  # B x K x C, z_T before any detaching
    mean: Tensor  # B x K x C
    logvar: Tensor  # B x K x C
    alignment: Tensor  # B x K x C
    log_temperature: Tensor  # scalar


class TextToImageFlow(nn.Module):
    """z_T from the projector, velocity from FlowTok, and the measured scale of the image latents."""

    def __init__(self, projector: TextProjectorConfig, flowtok: FlowTokConfig):
        super().__init__()
        shapes = [(projector.text_tokens, projector.token_channels), (flowtok.num_tokens, flowtok.token_channels)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"the projector gives {shapes[0]} tokens x channels, flowtok expects {shapes[1]}")
        self.projector = TextProjector(projector)
        self.flowtok = FlowTok(flowtok)
        self.register_buffer("latent_scale", torch.ones(()))  # z_I = latent_scale * tokenizer latent, deviation 1
        self.projector_frozen = False

    def freeze_projector(self) -> None:
        """Let the projector learn no more; it stays in eval mode (no dropout)."""
        self.projector_frozen = True
        self.projector.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "TextToImageFlow":
        """Training mode for all but a frozen projector."""
        super().train(mode)
        self.projector.train(mode and not self.projector_frozen)
        return self

    def forward(self, text_states: Tensor, image_latents: Tensor, flow: FlowConfig) -> FlowPass:
        """Training pass: draw z_T, t and the null indicator, predict the velocity on the path.

        Args:
            text_states: B x L x T.
            image_latents: B x K x C, already scaled.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.projector_frozen):
            mean, logvar, alignment, log_temperature = self.projector(text_states)
        text = Posterior(mean, logvar).sample() if flow.sample_text_latent else mean
        source = text if flow.projector == "joint" else text.detach()
        t = sample_times(flow, len(text), text.device)
        null, image = drop_to_null(image_latents, flow.null_probability)
        velocity = self.flowtok(interpolate(source, image, t, flow.sigma_min), t, null)
        target = target_velocity(source, image, flow.sigma_min)
        return FlowPass(velocity, target, text, mean, logvar, alignment, log_temperature)
