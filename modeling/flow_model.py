"""The flow model: where the flow starts, and the network that it follows from there (Sec. 3.3).

Stage 3 trains it, sampling loads it; `build_flow` says which parts a run's config means. Two seams,
so that a comparison changes one part only: the source is a TextProjector or a NoiseSource, the
velocity network a FlowTok, which reads nothing but its tokens, or the text besides.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from .flow import (
    FlowConfig,
    draw_null,
    interpolate,
    sample_times,
    swap_targets,
    target_velocity,
)
from .flowtok import FlowTok, FlowTokConfig
from .layers import FlowPass
from .mean_flow import average_target, sample_intervals
from .text_projector import NoiseSource, TextProjector, TextProjectorConfig


class FlowModel(nn.Module):
    """Where the flow starts, its velocity, and the measured scale of the image latents."""

    def __init__(self, projector: TextProjector, flowtok: FlowTok, config: FlowConfig):
        super().__init__()
        if projector.shape != flowtok.shape:
            raise ValueError(
                f"the flow starts from {projector.shape} tokens x channels, the velocity network "
                f"expects {flowtok.shape}"
            )
        self.config = config
        self.projector = projector
        self.flowtok = flowtok
        # z_I = latent_scale * tokenizer latent, of deviation 1.
        self.register_buffer("latent_scale", torch.ones(()))
        if config.projector == "frozen":
            projector.freeze()

    def forward(self, text_states: Tensor, image_latents: Tensor) -> FlowPass:
        """Training pass: draw z_T, t and the null indicator; predict the velocity.

        Args:
            text_states: B x L x T.
            image_latents: B x K x C, already scaled.
        """
        # Both ends of the path: z_T and z_I, or the other way for captions (Sec. 4.1).
        flow = self.config
        source = self.projector(text_states, sample=flow.sample_text_latent)
        text, context = source.latents, source.features
        if flow.projector != "joint":
            text, context = text.detach(), context.detach()
        to_text = flow.direction == "image_to_text"
        start, end = (image_latents, text) if to_text else (text, image_latents)

        # Times, and the samples of the unconditional flow. The network leaves out a context there;
        # where the start says what the text is, only another target can hide it.
        interval = None
        if flow.objective == "mean_flow":
            t, interval = sample_intervals(flow, len(start), start.device)  # B each
        else:
            t = sample_times(flow, len(start), start.device)  # B
        null = draw_null(len(start), flow.null_probability, start.device)  # B
        if self.projector.tells_text:
            end = swap_targets(end, null)

        # L_fm regresses the network at z_t onto the path's velocity (Sec. 3.3).
        z_t = interpolate(start, end, t, flow.sigma_min)  # B x K x C
        velocity = self.flowtok(z_t, t, null, context, interval)
        target = target_velocity(start, end, flow.sigma_min)
        if interval is not None:
            network, weight = self.flowtok, flow.guidance
            target = average_target(network, target, z_t, t, interval, null, context, weight)
        return FlowPass(velocity, target, source, is_weighted=interval is not None)

    def context(self, text_states: Tensor) -> Tensor | None:
        """What the velocity network reads for sampling: text states B x L x T -> B x L x W."""
        return self.projector.features(text_states) if self.flowtok.reads_text else None


def fill_in_sizes(
    flowtok: FlowTokConfig, projector: TextProjectorConfig, num_tokens: int
) -> FlowTokConfig:
    """The velocity network's config with the sizes that tokenizer and projector decide."""
    reads_text = flowtok.condition != "none"
    return replace(
        flowtok,
        num_tokens=num_tokens,
        token_channels=projector.token_channels,
        context_tokens=projector.input_shape[0] if reads_text else 0,
        context_width=projector.width if reads_text else 0,
    )


def check_condition(flowtok: FlowTokConfig, flow: FlowConfig) -> None:
    """Refuse a flow that nothing tells the text, and one to text that reads it."""
    if flow.source == "noise" and flowtok.condition == "none":
        raise ValueError("flow.source=noise needs flowtok.condition, or nothing tells the text")
    if flow.direction == "image_to_text" and flowtok.condition != "none":
        raise ValueError("flow.direction=image_to_text with flowtok.condition: it ends in the text")


def build_flow(
    projector: TextProjectorConfig, flowtok: FlowTokConfig, flow: FlowConfig
) -> FlowModel:
    """The flow that a run's config describes, with new weights."""
    source = {"text": TextProjector, "noise": NoiseSource}[flow.source]
    takes_interval = flow.objective == "mean_flow"
    return FlowModel(source(projector), FlowTok(flowtok, takes_interval), flow)
