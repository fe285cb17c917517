"""Stage 3: train FlowTok by flow matching, together with the text projector (paper, Sec. 3.3).

    accelerate launch train_flowtok.py --config configs/demo/flowtok.yaml [key=value ...]

In: token shards, the projector of stage 2. Out: a run folder that sample.py and evaluation read.
L = L_fm + the weighted terms of modeling/losses.py, source_losses; `flow.projector` says which of them reach the
projector.
Watch z_text_std and z_text_between_captions_std: the flow loss falls while they collapse (README).
The same command resumes, and does nothing when the run is complete.
"""

from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor, nn

from configs.load import default_values, exit_on_error, parse_stage_args, resolved
from configs.schema import FlowTokStage
from data.entries import Entry
from eval.captioning import caption_sheet, choose_images
from eval.during_training import FlowEvaluation
from eval.generation import load_protocol
from modeling.flow import check_guidance
from modeling.flow_model import FlowModel
from modeling.image_to_text import Captioner
from modeling.losses import (
    flow_matching_loss,
    freeze_unused_alignment,
    latent_statistics,
    source_losses,
)
from modeling.pipeline import ImageGenerator
from modeling.text_encoder import TextTokenizer, load_text_encoder
from modeling.text_projector import TextProjector
from training.checkpoint import latest_checkpoint
from training.loading import (
    fingerprint,
    load_autoencoder,
    load_flow,
    load_projector,
    load_tokenizer,
)
from training.loop import Evaluation, Trainer, is_complete
from training.pictures import caption_grid, sample_path, save_png
from training.run import Run, list_changes, save_config, start_run
from training.stored_tokens import StoredTokens, open_stored_tokens
from training.tokens_info import TokensInfo, load_tokens_info


def main(config: FlowTokStage) -> None:
    """Run the stage from start or checkpoint to its last step."""
    training = config.training
    run = start_run(config.run_dir, training.precision, training.seed, training.timeout_minutes)
    shape = (config.projector.text_tokens, config.projector.token_channels)
    origin = config.tokenizer_run, config.latent_scale, config.any_tokenizer
    info = load_tokens_info(config.data, *shape, *origin)
    started = latest_checkpoint(run.folder) is not None
    source = load_source(config)
    start = "init_from" if config.init_from else "projector"
    inputs = info.inputs() | {start: fingerprint(source) if source else "none"}
    if is_complete(run, config.training, inputs):
        return
    check_text_decoder(config, source)
    evaluation = build_evaluation(config, run)
    to_caption = pictures_to_caption(config)
    tokens = open_stored_tokens(run, config, info)
    model = build_model(config, info, source)
    if not (source or started):
        tokens.fit(model.projector)
    del source  # a second copy of all weights, on every process
    network_keys = ["projector", "flowtok", "text_encoder", "tokenizer_run"]
    save_config(run, resolved(config), default_values(config), network_keys, started)
    trainer = Trainer(run, config.training, config.optimizer, model, tokens.loader, inputs)
    save_pictures = partial(save_samples, config, run, to_caption)
    trainer.train(
        partial(compute_losses, config, info, tokens), config.logging, save_pictures, evaluation
    )


def build_evaluation(config: FlowTokStage, run: Run) -> Evaluation | None:
    """What is measured on the way, with its inputs read; None if nothing is.

    Raises:
        ValueError: a protocol, captions, reference or weights that are absent or can't serve.
    """
    every = config.evaluation.every_steps
    if not every:
        return None
    protocol = load_protocol(config.evaluation.protocol, config.evaluation.overrides)
    check_guidance(protocol.sampling(config.sampling).guidance, config.flow.null_probability)
    origin = config.tokenizer_run, config.text_encoder, config.sampling
    return Evaluation(every, FlowEvaluation(config.evaluation, protocol, run.folder, *origin))


def load_source(config: FlowTokStage) -> TextProjector | FlowModel | None:
    """Trained weights to start from, EMA: the projector of stage 2, all of another stage-3 run, or nothing.

    Raises:
        ValueError: that run has another network than this config.
    """
    if not (config.init_from or config.projector_run):
        return None
    if config.init_from:
        source = load_flow(config.init_from)
        there = asdict(source.flowtok.config)
        there["two_way"] |= (
            config.flowtok.two_way
        )  # one direction's weights do for both: the embedding starts at zero
        changes = list_changes(there, asdict(config.flowtok), "flowtok")
        projector = source.projector
    else:
        source = projector = load_projector(config.projector_run)
        changes = []
    changes += list_changes(asdict(projector.config), asdict(config.projector), "projector")
    if changes:
        raise ValueError(
            f"the network of {config.init_from or config.projector_run} is not this config's (there -> here): "
            + "; ".join(line for _, line in changes)
        )
    return source


def check_text_decoder(config: FlowTokStage, source: TextProjector | FlowModel | None) -> None:
    """Refuse a text decoder that was trained on another projector's z_T than the one that a flow to text ends in.

    Raises:
        ValueError: naming both runs and the ways out.
    """
    if config.flow.direction == "text_to_image":
        return
    autoencoder = load_autoencoder(config.text_decoder_run)
    projector = getattr(source, "projector", source)
    if fingerprint(autoencoder.projector) != fingerprint(projector):
        raise ValueError(
            f"the text decoder of {config.text_decoder_run} reads another projector's z_T than that of "
            f"{config.init_from or config.projector_run}: set projector_run={config.text_decoder_run}, or train the "
            "text decoder with freeze_projector=true on that one"
        )


def pictures_to_caption(config: FlowTokStage) -> list[Entry]:
    """Images whose captions a flow to text shows; listed now, so that absent ones are not first missed after hours."""
    if config.flow.direction == "text_to_image":
        return []
    return choose_images(config.pictures.images, config.pictures.num_images)


def build_model(
    config: FlowTokStage, info: TokensInfo, source: TextProjector | FlowModel | None
) -> FlowModel:
    """Projector and DiT, with the weights of `source` and the measured latent scale; freezes what has no gradient."""
    model = FlowModel(config.projector, config.flowtok)
    if isinstance(source, FlowModel):
        model.load_state_dict(
            model.state_dict() | source.state_dict()
        )  # all but an embed_direction it lacks
    elif source is not None:
        model.projector.load_state_dict(source.state_dict())
    model.latent_scale.fill_(info.latent_scale)
    model.flowtok.recompute = config.activation_checkpointing
    if config.flow.projector == "frozen":
        model.freeze_projector()
    else:
        freeze_unused_alignment(model.projector, config.losses)
    return model


def compute_losses(
    config: FlowTokStage, info: TokensInfo, tokens: StoredTokens, model: nn.Module, batch: dict
) -> dict[str, Tensor]:
    """Loss terms of one batch, and the deviations of z_T."""
    posterior = tokens.image_posterior(batch)
    image = (
        posterior.sample() if config.flow.sample_image_latent else posterior.mean
    ) * info.latent_scale
    output = model(tokens.text_states(batch), image, config.flow)
    terms = {"flow_matching": flow_matching_loss(output.velocity, output.target)}
    terms["loss"] = terms["flow_matching"]
    if config.flow.projector != "frozen":
        source = (
            output.text_latents,
            output.mean,
            output.logvar,
            output.alignment,
            output.log_temperature,
        )
        terms |= source_losses(config.losses, *source, posterior.mean * info.latent_scale)
        terms["loss"] = terms["loss"] + terms.pop("source")
    return terms | latent_statistics(output.mean)


@torch.no_grad()
def save_samples(
    config: FlowTokStage, run: Run, to_caption: list[Entry], model: FlowModel, step: int
) -> None:
    """Pictures with EMA weights: images for the configured captions, captions for the configured images."""
    tokenizer = load_tokenizer(config.tokenizer_run)[0].to(run.device)
    if to_caption:
        decoder = load_autoencoder(config.text_decoder_run).decoder.to(run.device)
        captioner = Captioner(TextTokenizer(config.text_encoder), tokenizer, model, decoder)
        path = sample_path(run.folder, step)
        save_png(
            caption_sheet(captioner, to_caption, config.sampling),
            path.with_stem(f"{path.stem}_captions"),
        )
    if config.flow.direction == "image_to_text":
        return
    captions = config.pictures.captions
    text_encoder = load_text_encoder(config.text_encoder).to(run.device)
    parts = ImageGenerator(TextTokenizer(config.text_encoder), text_encoder, tokenizer, model)
    images, _ = parts.generate(captions, config.sampling)
    save_png(caption_grid(images, captions, columns=4), sample_path(run.folder, step))


if __name__ == "__main__":
    stage = parse_stage_args("flowtok", __doc__)
    exit_on_error(lambda: main(stage))
