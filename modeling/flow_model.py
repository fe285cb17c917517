"""Projector and velocity network as one module: stage 3 trains and saves it, sampling loads it (paper, Sec. 3.3).

Either way round, or both (flow.direction): t = 0 is the source, t = 1 the target; "text" and "image" in
modeling/flow.py then stand for source and target.
"""

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


class FlowModel(nn.Module):
    """z_T from the projector, velocity from FlowTok, and the measured scale of the image latents."""

    def __init__(self, projector: TextProjectorConfig, flowtok: FlowTokConfig):
        super().__init__()
        shapes = [
            (projector.text_tokens, projector.token_channels),
            (flowtok.num_tokens, flowtok.token_channels),
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"the projector gives {shapes[0]} tokens x channels, flowtok expects {shapes[1]}"
            )
        self.projector = TextProjector(projector)
        self.flowtok = FlowTok(flowtok)
        self.register_buffer(
            "latent_scale", torch.ones(())
        )  # z_I = latent_scale * tokenizer latent, deviation 1
        self.projector_frozen = False
        self.null_probability = (
            FlowConfig.null_probability
        )  # of its training; 0: it can't be guided

    def freeze_projector(self) -> None:
        """Let the projector learn no more; it stays in eval mode (no dropout)."""
        self.projector_frozen = True
        self.projector.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "FlowModel":
        """Training mode for all but a frozen projector."""
        super().train(mode)
        self.projector.train(mode and not self.projector_frozen)
        return self

    def forward(self, text_states: Tensor, image_latents: Tensor, flow: FlowConfig) -> FlowPass:
        """Training pass: draw z_T, t, the null indicator and in the joint case the direction; predict the velocity.

        Args:
            text_states: B x L x T.
            image_latents: B x K x C, already scaled.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.projector_frozen):
            mean, logvar, alignment, log_temperature = self.projector(text_states)
        text = Posterior(mean, logvar).sample() if flow.sample_text_latent else mean
        t = sample_times(flow, len(text), text.device)
        source = limit_gradient(text, t, flow)
        start, null, end, to_text = draw_ends(source, image_latents, flow)
        velocity = self.flowtok(interpolate(start, end, t, flow.sigma_min), t, null, to_text)
        target = target_velocity(start, end, flow.sigma_min)
        return FlowPass(velocity, target, text, mean, logvar, alignment, log_temperature)


def limit_gradient(text: Tensor, t: Tensor, flow: FlowConfig) -> Tensor:
    """z_T, B x K x C, with as much of the flow's gradient as `flow` lets through; t is B."""
    if flow.projector != "joint":
        return text.detach()
    if flow.gradient_into_text == flow.gradient_until == 1:
        return text
    share = flow.gradient_into_text * (t <= flow.gradient_until).view(-1, 1, 1)
    fixed = text.detach()
    return fixed + share * (text - fixed)  # the value of z_T, share times its gradient


def draw_ends(
    text: Tensor, image: Tensor, flow: FlowConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Text and image latents B x K x C -> (start, null indicator B, end, samples that flow to text B or None).

    A sample whose indicator is on gets another sample's latent as its end, of the same kind as its own.
    """
    if flow.direction == "text_to_image":
        return text, *drop_to_null(image, flow.null_probability), None
    if flow.direction == "image_to_text":
        return image, *drop_to_null(text, flow.null_probability), None
    null, others = drop_to_null(torch.cat([text, image], dim=-1), flow.null_probability)
    other_text, other_image = others.chunk(2, dim=-1)
    to_text = torch.rand(len(text), device=text.device) < 0.5
    chosen = to_text.view(-1, 1, 1)
    return (
        torch.where(chosen, image, text),
        null,
        torch.where(chosen, other_text, other_image),
        to_text,
    )
