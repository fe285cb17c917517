"""Stage 2: train the text projector alone (paper, Sec. 3.3): KL, alignment to the text, and as an option to the image.

    accelerate launch train_text_projector.py --config configs/demo/text_projector.yaml [key=value ...]

In: token shards of scripts/encode_tokens.py. Out: a run folder; its EMA weights are where stage 3 starts from.
The same command resumes, and does nothing when the run is complete. Losses: modeling/losses.py, source_losses.
"""

from functools import partial

import torch
from torch import Tensor, nn

from configs.load import default_values, exit_on_error, parse_stage_args, resolved
from configs.schema import TextProjectorStage
from modeling.losses import freeze_unused_alignment, latent_statistics, source_losses
from modeling.posterior import Posterior
from modeling.text_projector import TextProjector
from training.checkpoint import latest_checkpoint
from training.loading import load_tokenizer
from training.loop import Trainer, is_complete
from training.pictures import caption_grid, pair_rows, sample_path, save_png
from training.run import Run, save_config, start_run
from training.stored_tokens import StoredTokens, open_stored_tokens
from training.tokens_info import TokensInfo, load_tokens_info


def main(config: TextProjectorStage) -> None:
    """Run the stage from start or checkpoint to its last step."""
    training = config.training
    run = start_run(config.run_dir, training.precision, training.seed, training.timeout_minutes)
    shape = (config.projector.text_tokens, config.projector.token_channels)
    origin = config.tokenizer_run, config.latent_scale, config.any_tokenizer
    info = load_tokens_info(config.data, *shape, *origin)
    if is_complete(run, config.training, info.inputs()):
        return
    started = latest_checkpoint(run.folder) is not None
    tokens = open_stored_tokens(run, config, info)
    model = TextProjector(config.projector)
    if not started:
        tokens.fit(model)
    freeze_unused_alignment(model, config.losses)
    save_config(
        run, resolved(config), default_values(config), ["projector", "text_encoder"], started
    )
    trainer = Trainer(run, config.training, config.optimizer, model, tokens.loader, info.inputs())
    trainer.train(
        partial(compute_losses, config, info, tokens),
        config.logging,
        partial(save_decoded, config, run, info, tokens),
    )


def compute_losses(
    config: TextProjectorStage,
    info: TokensInfo,
    tokens: StoredTokens,
    model: nn.Module,
    batch: dict,
) -> dict[str, Tensor]:
    """Loss terms of one batch, and the deviations of z_T."""
    mean, logvar, alignment, log_temperature = model(tokens.text_states(batch))
    text = Posterior(mean, logvar).sample() if config.losses.kl_weight else mean
    image_mean = tokens.image_posterior(batch).mean * info.latent_scale
    terms = source_losses(config.losses, text, mean, logvar, alignment, log_temperature, image_mean)
    terms["loss"] = terms.pop("source")
    return terms | latent_statistics(mean)


@torch.no_grad()
def save_decoded(
    config: TextProjectorStage,
    run: Run,
    info: TokensInfo,
    tokens: StoredTokens,
    model: TextProjector,
    step: int,
) -> None:
    """Picture of what the source already shows, decoded without any flow, right of the image that it should be."""
    if not config.losses.image_regression_weight:
        return  # z_T has nothing to do with the image then
    batch = tokens.first(config.pictures.num_samples)
    tokenizer = load_tokenizer(config.tokenizer_run)[0].to(run.device)
    states = tokens.text_states(batch)
    true = tokenizer.decode(tokens.image_posterior(batch).mean, states)
    source = tokenizer.decode(model.posterior(states).mean / info.latent_scale, states)
    save_png(
        caption_grid(pair_rows(true, source), batch["caption"], columns=4),
        sample_path(run.folder, step),
    )


if __name__ == "__main__":
    stage = parse_stage_args("text_projector", __doc__)
    exit_on_error(lambda: main(stage))
