"""Stage 3: train FlowTok by flow matching, together with the text projector (paper, Sec. 3.3).

    accelerate launch train_flowtok.py --config configs/emoji/flowtok.yaml [key=value ...]

In: token shards, the tokenizer's run, the projector of stage 2. Out: a run folder that sample.py
and the evaluations read. L = L_fm + the weighted terms of modeling/losses.py; `flow.projector` says
which of them reach the projector. With flow.direction=image_to_text the same flow makes captions.
Watch z_text_between_captions_std: the flow loss falls while it collapses (docs/recipe.md).
The same command resumes, and does nothing when the run is complete.
"""

from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.load import load_dataclass, parse_stage_args
from data.entries import Entry
from data.readers import TokenTextConfig
from eval.generation import EvaluationConfig, FlowEvaluation
from eval.images import caption_images, choose_images, sheet_of
from eval.protocol import Protocol, protocol_file
from modeling.activation_checkpointing import ActivationCheckpointing, set_activation_checkpointing
from modeling.flow import FlowConfig
from modeling.flow_model import FlowModel, build_flow, check_condition, fill_in_sizes
from modeling.flowtok import FlowTokConfig
from modeling.layers import check_least, fingerprint
from modeling.losses import (
    FlowLossConfig,
    freeze_unused_alignment,
    has_projector_loss,
    latent_statistics,
    loss_weights,
    projector_losses,
    velocity_losses,
    weighted_terms,
)
from modeling.pipeline import Captioner, ImageGenerator, SamplingConfig
from modeling.text_encoder import TextEncoderConfig, TextTokenizer, load_text_encoder
from modeling.text_projector import TextProjector, TextProjectorConfig
from training.checkpoint import is_complete, latest_checkpoint
from training.errors import exit_on_error
from training.loading import load_tokenizer, text_encoder_config
from training.loop import Evaluation, train_network
from training.pictures import caption_grid, sample_path, save_png
from training.pipelines import load_autoencoder, load_flow, load_projector
from training.run import Run, list_changes, save_config, start_run
from training.stage import TrainedStage
from training.tokens import (
    StoredTokens,
    TokensInfo,
    complete_projector,
    load_tokens_info,
    open_stored_tokens,
    projector_sizes,
)


@dataclass
class PictureConfig:
    """The pictures on the way, which sample.py also draws without prompts and images."""

    captions: list[str] = field(default_factory=list)  # to make images of
    images: list[str] = field(default_factory=list)  # folders or shards to make captions of
    num_images: int = 24  # so many of them, evenly spaced

    def __post_init__(self):
        check_least(self, 1, "num_images")
        if not all(caption.strip() for caption in self.captions):
            raise ValueError("captions has an empty caption")


@dataclass
class FlowTokStage(TrainedStage):
    """What can be set in flowtok.yaml, besides the parts' own fields."""

    # whose tokens are read, with its text tower and sizes; decodes the pictures
    tokenizer_run: str = "${experiment_dir}/tokenizer"
    # Where the weights come from: a stage-2 run for the projector, or a stage-3 run for everything
    # (fine-tuning: its EMA weights, with a fresh optimiser); both empty: random weights.
    projector_run: str = "${experiment_dir}/text_projector"
    init_from: str = ""
    text_decoder_run: str = ""  # of a flow to text: reads its z_T, and has its projector
    # null: as in projector_run or init_from; only random weights need it
    projector: TextProjectorConfig | None = None
    flowtok: FlowTokConfig = field(default_factory=FlowTokConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    activation_checkpointing: ActivationCheckpointing = "none"  # of the DiT
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    data: TokenTextConfig = field(default_factory=TokenTextConfig)
    losses: FlowLossConfig = field(default_factory=FlowLossConfig)
    pictures: PictureConfig = field(default_factory=PictureConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    stage = "flowtok"
    networks = ("projector", "flowtok", "tokenizer_run")
    networks += ("flow.source", "flow.direction", "flow.objective")

    @property
    def source_run(self) -> str:
        """The run that the weights start from, "" if they are random."""
        return self.init_from or self.projector_run

    def check(self) -> None:
        super().check()
        flow = self.flow

        # Where the projector's weights come from, and what trains them.
        if self.init_from and self.projector_run:
            raise ValueError(
                f"init_from={self.init_from} has a projector, and projector_run="
                f'{self.projector_run} names another: leave one empty (projector_run: "")'
            )
        if self.source_run and self.projector:
            raise ValueError(f"projector is as in {self.source_run}: leave it out")
        if self.projector and self.projector.linear_skip:
            raise ValueError(
                "projector.linear_skip is filled by stage 2: set projector_run to such a run"
            )
        if flow.projector == "frozen" and not self.source_run:
            raise ValueError("flow.projector=frozen needs projector_run or init_from")
        if flow.projector == "detached" and not has_projector_loss(self.losses):
            raise ValueError("flow.projector=detached and all losses on z_T are 0: set one above 0")

        # What tells the network the text.
        check_condition(self.flowtok, flow)
        if flow.source == "noise":
            if has_projector_loss(self.losses):
                raise ValueError("flow.source=noise has no z_T: set the losses on it to 0")
            if not (flow.sample_text_latent and self.sampling.sample_text_latent):
                raise ValueError(
                    "flow.source=noise needs flow.sample_text_latent=true and "
                    "sampling.sample_text_latent=true"
                )
        if flow.objective == "mean_flow" and self.training.shard == "full":
            raise ValueError("flow.objective=mean_flow with training.shard=full: set it to none")

        # What is sampled on the way.
        self.sampling.check_flow(flow)
        if self.evaluation.every_steps:
            protocol_file(self.evaluation.protocol)
        if flow.direction == "image_to_text":
            self._check_flow_to_text()
        elif not self.pictures.captions:
            raise ValueError("pictures.captions is empty: name the captions of the pictures")

    def _check_flow_to_text(self) -> None:
        direction = "flow.direction=image_to_text"
        if self.flow.projector != "frozen":
            raise ValueError(
                f"{direction} with flow.projector={self.flow.projector}: set it to frozen, z_T is "
                "what the text decoder has learned to read"
            )
        if has_projector_loss(self.losses):
            raise ValueError(f"{direction} has no loss but the flow's: set all losses to 0")
        if not self.text_decoder_run:
            raise ValueError(f"{direction} needs a text decoder: set text_decoder_run")
        if not self.pictures.images:
            raise ValueError("pictures.images is empty: name folders or shards to caption")
        if self.evaluation.every_steps:
            raise ValueError(f"evaluation.every_steps with {direction}: it measures images, set 0")

    def token_shards(self) -> list[str]:
        return self.data.all_shards()


def main(config: FlowTokStage) -> None:
    """Run the stage from start or checkpoint to its last step."""
    # What earlier stages gave: tokens, the tokenizer with its text tower, weights to start from.
    training = config.training
    run = start_run(config.run_dir, training.precision, training.seed, training.timeout_minutes)
    tokenizer = load_tokenizer(config.tokenizer_run)
    text_config = text_encoder_config(config.tokenizer_run)
    info = load_tokens_info(config.data, tokenizer, config.tokenizer_run)
    source = load_source(config, run)
    config.projector = complete_projector(
        config.projector,
        getattr(source, "projector", source),  # of a flow, or one itself
        config.source_run,
        config.tokenizer_run,
        projector_sizes(tokenizer.config),
    )
    config.flowtok = fill_in_sizes(config.flowtok, config.projector, info.num_tokens)
    del tokenizer
    source_key = "init_from" if config.init_from else "projector"
    inputs = info.inputs() | {source_key: fingerprint(source) if source else "none"}
    # A complete run ends here: it needs no tokens.
    if is_complete(run, config, inputs):
        return

    # All that a picture or an evaluation will read, so that nothing is missed after hours.
    images_to_caption = []
    if config.flow.direction == "image_to_text":
        check_text_decoder(config, source)
        images_to_caption = choose_images(config.pictures.images, config.pictures.num_images)
    evaluation = build_evaluation(config, run, text_config)

    # Data and networks.
    tokens = open_stored_tokens(run, config.data, training, info, text_config)
    has_checkpoint = latest_checkpoint(run.folder) is not None
    model = build_model(config, info, source)
    # Measured once on the captions; whoever gave weights has measured it, and a checkpoint has it.
    if not (source or has_checkpoint):
        tokens.fit_whitening(model.projector)
    del source  # a second copy of all weights, on every process
    save_config(run, config, has_checkpoint)
    train_network(
        run=run,
        stage=config,
        module=model,
        loss_fn=partial(compute_losses, config, tokens),
        loader=tokens.loader,
        inputs=inputs,
        save_samples=partial(save_samples, config, run, text_config, images_to_caption),
        evaluation=evaluation,
    )


def load_source(config: FlowTokStage, run: Run) -> TextProjector | FlowModel | None:
    """EMA weights to start from: the projector of stage 2, all of a stage-3 run, or nothing.

    ValueError: the velocity network of init_from is not this config's.
    """
    if not config.init_from:
        return load_projector(config.projector_run) if config.projector_run else None
    source = load_flow(config.init_from)
    if source.config.objective == "mean_flow" and config.flow.objective == "velocity":
        raise ValueError(
            f"{config.init_from} has average velocities: expected flow.objective=mean_flow"
        )
    # Some sizes come from tokenizer and projector; all others are typed, and may disagree.
    found = source.flowtok.config
    derived = {f.name: getattr(found, f.name) for f in fields(found) if f.metadata.get("derived")}
    wanted = replace(config.flowtok, **derived)
    changes = list_changes(asdict(found), asdict(wanted), "flowtok")
    if changes:
        lines = "; ".join(line for _, line in changes)
        raise ValueError(f"{config.init_from} has another network (there -> here): {lines}")
    # The network fits another path, which it then has to learn.
    for name in ("source", "direction"):
        before, now = (getattr(flow, name) for flow in (source.config, config.flow))
        if before != now:
            run.say(f"{config.init_from} was trained with flow.{name}={before}, goes on with {now}")
    return source


def check_text_decoder(config: FlowTokStage, source: TextProjector | FlowModel) -> None:
    """Refuse a text decoder that reads another projector's z_T than the flow ends in."""
    # Both read z_T, and its coordinates are a matter of the projector's weights alone.
    autoencoder = load_autoencoder(config.text_decoder_run)
    projector = getattr(source, "projector", source)
    if fingerprint(autoencoder.projector) != fingerprint(projector):
        raise ValueError(
            f"the text decoder of {config.text_decoder_run} reads another projector's z_T than "
            f"that of {config.source_run}: set projector_run={config.text_decoder_run}, or train "
            "the text decoder with freeze_projector=true on that one"
        )


def build_evaluation(
    config: FlowTokStage, run: Run, text_config: TextEncoderConfig
) -> Evaluation | None:
    """What is measured on the way, None if nothing is; ValueError if an input is absent."""
    if not config.evaluation.every_steps:
        return None
    path = protocol_file(config.evaluation.protocol)
    protocol = load_dataclass(Protocol, path, config.evaluation.overrides)
    sampling = protocol.sampling(config.sampling)
    # The protocol's own settings count, not those of the config's pictures.
    sampling.check_flow(config.flow)
    sampling.check_images("images_per_caption", protocol.images_per_caption)
    measure = FlowEvaluation(
        config.evaluation, protocol, run.folder, config.tokenizer_run, text_config, config.sampling
    )
    return Evaluation(config.evaluation.every_steps, measure)


def build_model(
    config: FlowTokStage, info: TokensInfo, source: TextProjector | FlowModel | None
) -> FlowModel:
    """Projector and DiT with the weights of `source`; freezes what gets no gradient."""
    model = build_flow(config.projector, config.flowtok, config.flow)
    if isinstance(source, FlowModel):
        # Where a velocity flow becomes a mean flow, the interval's weights stay new.
        model.load_state_dict(model.state_dict() | source.state_dict())
    elif source is not None:
        model.projector.load_state_dict(source.state_dict())
    # A buffer of the network: sampling divides by the scale that training multiplied with.
    model.latent_scale.fill_(info.latent_scale)
    set_activation_checkpointing(model, config.activation_checkpointing)
    # What gets no gradient is not computed, and DDP does not wait for it.
    if config.flow.projector == "frozen":
        model.projector.gives_alignment = False
    else:
        freeze_unused_alignment(model.projector, config.losses)
    return model


def compute_losses(
    config: FlowTokStage, tokens: StoredTokens, model: nn.Module, batch: dict
) -> dict[str, Tensor]:
    """Loss terms of one batch, and the deviations of z_T."""
    # z_I: the latents, scaled to deviation 1 over all tokens.
    posterior = tokens.image_posterior(batch)
    latents = posterior.sample() if config.flow.sample_image_latent else posterior.mean
    image = latents * tokens.info.latent_scale  # B x K x C

    # L = L_fm, and the losses on z_T where they can change it (paper, Sec. 3.3).
    output = model(tokens.text_states(batch), image)
    terms = velocity_losses(config.losses, output)
    # A frozen projector has nothing to learn from them.
    if config.flow.projector != "frozen":
        image_mean = posterior.mean * tokens.info.latent_scale
        terms |= projector_losses(config.losses, output.source, image_mean)
    loss = sum(weighted_terms(terms, loss_weights(config.losses)).values())
    terms |= {"loss": loss}
    if output.is_weighted:  # L_fm stays near 1
        terms |= {"squared_error": F.mse_loss(output.velocity, output.target).detach()}
    # Noise has no captions to collapse between.
    if config.flow.source == "noise":
        return terms
    return terms | latent_statistics(output.source.mean)


@torch.no_grad()
def save_samples(
    config: FlowTokStage,
    run: Run,
    text_config: TextEncoderConfig,
    images_to_caption: list[Entry],
    model: FlowModel,
    step: int,
) -> None:
    """Pictures with EMA weights: captions of images, or images of captions."""
    # Tokenizer and tower are loaded for the picture only: the GPU is the training's meanwhile.
    tokenizer = load_tokenizer(config.tokenizer_run).to(run.device)
    path = sample_path(run.folder, step)
    if config.flow.direction == "image_to_text":
        decoder = load_autoencoder(config.text_decoder_run).decoder.to(run.device)
        captioner = Captioner(TextTokenizer(text_config), tokenizer, model, decoder)
        entries = images_to_caption
        [batch] = caption_images(captioner, entries, config.sampling, len(entries))
        sheet = sheet_of([batch["image"]], batch["caption"])
        save_png(sheet, path.with_stem(f"{path.stem}_captions"))
        return
    text_encoder = load_text_encoder(text_config).to(run.device)
    generator = ImageGenerator(text_encoder, tokenizer, model)
    images, _ = generator.generate(config.pictures.captions, config.sampling)
    save_png(caption_grid(images, config.pictures.captions, columns=4), path)


if __name__ == "__main__":
    exit_on_error(lambda: main(parse_stage_args(FlowTokStage, __doc__)))
