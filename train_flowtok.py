"""Stage 3: train FlowTok by flow matching, together with the text projector (paper, Sec. 3.3).

    accelerate launch train_flowtok.py --config configs/demo/flowtok.yaml [key=value ...]

In: token shards, the projector of stage 2. Out: a run folder that sample.py and evaluation read.
L = L_fm + the weighted terms of modeling/losses.py, source_losses; `flow.projector` says which of them reach the
projector.
Watch z_text_std and z_text_between_captions_std: the flow loss falls while they collapse (README).
The same command resumes, and does nothing when the run is complete.
"""

from functools import partial

import torch
from torch import Tensor, nn

from configs.load import exit_on_error, parse_stage_args, resolved
from configs.schema import FlowTokStage
from eval.loading import TokensInfo, fingerprint, load_projector, load_tokenizer, load_tokens_info
from eval.pictures import caption_grid, sample_path, save_png
from eval.stored_tokens import StoredTokens, open_stored_tokens
from modeling.losses import flow_matching_loss, latent_statistics, source_losses
from modeling.pipeline import TextToImage
from modeling.text_encoder import TextTokenizer, load_text_encoder
from modeling.text_projector import TextProjector
from modeling.text_to_image import TextToImageFlow
from training.checkpoint import latest_checkpoint
from training.loop import Trainer, is_complete
from training.run import Run, save_config, start_run


def main(config: FlowTokStage) -> None:
    """Run the stage from start or checkpoint to its last step."""
    run = start_run(config.run_dir, config.training.precision, config.training.seed)
    shape = (config.projector.text_tokens, config.projector.token_channels)
    info = load_tokens_info(config.data.shards, *shape, config.tokenizer_run)
    source = load_projector(config.projector_run) if config.projector_run else None
    inputs = info.inputs() | {"projector": fingerprint(source) if source else "none"}
    if is_complete(run, config.training, inputs):
        return
    started = latest_checkpoint(run.folder) is not None
    tokens = open_stored_tokens(run, config, info)
    model = build_model(config, info, source)
    if not (source or started):
        tokens.fit_whitening(model.projector)
    network_keys = ["projector", "flowtok", "text_encoder", "tokenizer_run"]
    save_config(run, resolved(config), network_keys, started)
    trainer = Trainer(run, config.training, config.optimizer, model, tokens.loader, inputs)
    trainer.train(partial(compute_losses, config, info, tokens), config.logging, partial(save_samples, config, run))


def build_model(config: FlowTokStage, info: TokensInfo, source: TextProjector | None) -> TextToImageFlow:
    """Projector of stage 2, if any, and a fresh DiT, with the measured latent scale; freezes what has no gradient."""
    model = TextToImageFlow(config.projector, config.flowtok)
    model.latent_scale.fill_(info.latent_scale)
    if source is not None:
        if source.config != config.projector:
            raise ValueError(
                f"projector of {config.projector_run} is {source.config}, this config says {config.projector}"
            )
        model.projector.load_state_dict(source.state_dict())
    if config.flow.projector == "frozen":
        model.freeze_projector()
    elif not config.losses.alignment_weight:
        model.projector.alignment.requires_grad_(False)
    return model


def compute_losses(
    config: FlowTokStage, info: TokensInfo, tokens: StoredTokens, model: nn.Module, batch: dict
) -> dict[str, Tensor]:
    """Loss terms of one batch, and the deviations of z_T."""
    posterior = tokens.image_posterior(batch)
    image = (posterior.sample() if config.flow.sample_image_latent else posterior.mean) * info.latent_scale
    output = model(tokens.text_states(batch), image, config.flow)
    terms = {"flow_matching": flow_matching_loss(output.velocity, output.target)}
    terms["loss"] = terms["flow_matching"]
    if config.flow.projector != "frozen":
        source = output.text_latents, output.mean, output.logvar, output.alignment, output.log_temperature
        terms |= source_losses(config.losses, *source, posterior.mean * info.latent_scale)
        terms["loss"] = terms["loss"] + terms.pop("source")
    return terms | latent_statistics(output.mean)


@torch.no_grad()
def save_samples(config: FlowTokStage, run: Run, model: TextToImageFlow, step: int) -> None:
    """Picture of images for the configured captions, with EMA weights."""
    captions = config.pictures.captions
    tokenizer = load_tokenizer(config.tokenizer_run)[0].to(run.device)
    text_encoder = load_text_encoder(config.text_encoder).to(run.device)
    parts = TextToImage(TextTokenizer(config.text_encoder), text_encoder, tokenizer, model)
    images, _ = parts.generate(captions, config.sampling)
    save_png(caption_grid(images, captions, columns=4), sample_path(run.folder, step))


if __name__ == "__main__":
    stage = parse_stage_args("flowtok", __doc__)
    exit_on_error(lambda: main(stage))
