"""Train the text decoder of image to text: projector and decoder as an autoencoder of captions (paper, Sec. 4.1, 5.1).

    accelerate launch train_text_decoder.py --config configs/demo_caption/text_decoder.yaml [key=value ...]

In: any shards with captions, of images or of tokens. Out: a run folder with projector and decoder; stage 3 takes both
from it (projector_run, text_decoder_run) and trains the flow from images to this projector's z_T.
With freeze_projector, the decoder learns the z_T of a projector that is there (projector_run).
The same command resumes, and does nothing when the run is complete. samples/step_*.json: how much of the held-out and
of the training captions comes back from z_T's mean, with EMA weights.
"""

from collections.abc import Iterable
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor, nn

from configs.load import default_values, exit_on_error, parse_stage_args, resolved
from configs.schema import TextDecoderStage
from modeling.losses import kl_loss, latent_statistics
from modeling.text_decoder import TextAutoencoder, caption_losses, correct_tokens, counted_positions
from modeling.text_encoder import load_text_encoder
from modeling.text_projector import TextProjector
from training.checkpoint import latest_checkpoint
from training.files import write_json
from training.loading import fingerprint, load_projector
from training.loop import Trainer, is_complete
from training.pictures import sample_path
from training.run import Run, list_changes, save_config, start_run
from training.stored_captions import StoredCaptions, open_stored_captions

MEASURED_CAPTIONS = 10_000  # at most, of either kind, whose reconstruction is measured
VOCABULARY_CAPTIONS = 1_000_000  # at most, whose token ids are counted
NUM_EXAMPLES = 20


def main(config: TextDecoderStage) -> None:
    """Run the stage from start or checkpoint to its last step."""
    training = config.training
    run = start_run(config.run_dir, training.precision, training.seed, training.timeout_minutes)
    started = latest_checkpoint(run.folder) is not None
    source = load_source(config)
    inputs = {
        "text_encoder": fingerprint(load_text_encoder(config.text_encoder)),
        "projector": fingerprint(source) if source else "none",
    }
    if is_complete(run, training, inputs):
        return
    captions = open_stored_captions(run, config)
    if config.heldout_shards and next(captions.read(1, config.heldout_shards), None) is None:
        raise ValueError(
            f"heldout_shards={config.heldout_shards} have no caption"
        )  # now, not at the first measurement
    model = build_model(config, source)
    if not started:
        prepare(model, captions, source)
    save_config(
        run,
        resolved(config),
        default_values(config),
        ["projector", "text_decoder", "text_encoder"],
        started,
    )
    trainer = Trainer(run, training, config.optimizer, model, captions.loader, inputs)
    trainer.train(
        partial(compute_losses, config, captions),
        config.logging,
        partial(save_accuracy, config, run, captions),
    )


def load_source(config: TextDecoderStage) -> TextProjector | None:
    """The trained projector to start from, EMA, or nothing.

    Raises:
        ValueError: that run has another projector than this config.
    """
    if not config.projector_run:
        return None
    source = load_projector(config.projector_run)
    changes = list_changes(asdict(source.config), asdict(config.projector), "projector")
    if changes:
        raise ValueError(
            f"the projector of {config.projector_run} is not this config's (there -> here): "
            + "; ".join(line for _, line in changes)
        )
    return source


def build_model(config: TextDecoderStage, source: TextProjector | None) -> TextAutoencoder:
    """Projector and decoder, with the weights of `source`."""
    model = TextAutoencoder(config.projector, config.text_decoder)
    if source is not None:
        model.projector.load_state_dict(source.state_dict())
    if config.freeze_projector:
        model.freeze_projector()
    return model


def prepare(model: TextAutoencoder, captions: StoredCaptions, source: TextProjector | None) -> None:
    """Measure on the captions what is measured once: the whitening of the text states, the vocabulary."""
    if source is None:
        captions.fit_whitening(model.projector)
    if not model.decoder.has_whole_vocabulary:
        batches = (batch["token_ids"] for batch in captions.read(VOCABULARY_CAPTIONS))
        left_out = model.decoder.fit_vocabulary(
            ids.flatten()[counted_positions(ids)] for ids in batches
        )
        if left_out:
            captions.run.say(
                f"text_decoder.vocabulary_size={model.decoder.config.vocabulary_size}: the {left_out} rarest ids of "
                "the captions are left out and can't be learned"
            )


def compute_losses(
    config: TextDecoderStage, captions: StoredCaptions, model: nn.Module, batch: dict
) -> dict[str, Tensor]:
    """Loss terms of one batch, and the deviations of z_T."""
    counted = counted_positions(batch["token_ids"])  # on the CPU, where the ids are: no device sync
    return decoder_losses(config, captions, model, batch, counted)


def decoder_losses(
    config: TextDecoderStage,
    captions: StoredCaptions,
    model: nn.Module,
    batch: dict,
    counted: Tensor,
) -> dict[str, Tensor]:
    """Loss terms over the counted positions, indices into B x L."""
    losses, device = config.losses, captions.run.device
    token_ids = batch["token_ids"].flatten()[counted].to(device, non_blocking=True)
    states = captions.text_states(batch)
    counted = counted.to(device, non_blocking=True)
    output = model(
        states, counted, token_ids, sample=bool(losses.kl_weight), noise=losses.latent_noise
    )
    terms = caption_losses(output.logits, output.classes)
    terms["loss"] = terms["cross_entropy"]
    if losses.kl_weight:
        terms["kl"] = kl_loss(output.mean, output.logvar, losses.kl_form, losses.kl_reduction)
        terms["loss"] = terms["loss"] + losses.kl_weight * terms["kl"]
    return terms | latent_statistics(output.mean)


def save_accuracy(
    config: TextDecoderStage, run: Run, captions: StoredCaptions, model: TextAutoencoder, step: int
) -> None:
    """Write how much of the captions comes back from z_T's mean."""
    report = {"step": step, "train": measure(captions, model, captions.read(MEASURED_CAPTIONS))}
    if config.heldout_shards:
        report["heldout"] = measure(
            captions, model, captions.read(MEASURED_CAPTIONS, config.heldout_shards)
        )
    write_json(report, sample_path(run.folder, step).with_suffix(".json"))
    for name in ("train", "heldout"):
        part = report.get(name)
        if part is None:
            continue
        run.say(
            f"{name}: {part['token_accuracy']:.2%} of tokens, {part['caption_accuracy']:.2%} of "
            f"{part['captions']} captions from their own z_T"
        )


@torch.no_grad()
def measure(captions: StoredCaptions, model: TextAutoencoder, batches: Iterable[dict]) -> dict:
    """Accuracy of captions from their own z_T's mean, with the first examples."""
    right = counted = whole = number = 0
    examples = []
    for batch in batches:
        latents = model.projector.posterior(captions.text_states(batch)).mean
        predicted = model.decoder(latents).cpu()
        hits, tokens = correct_tokens(predicted, batch["token_ids"])
        right, counted = right + hits.sum().item(), counted + tokens.sum().item()
        whole, number = whole + (hits == tokens).sum().item(), number + len(hits)
        for caption, ids in zip(
            batch["caption"][: NUM_EXAMPLES - len(examples)], predicted, strict=False
        ):
            examples.append({"caption": caption, "decoded": captions.tokenize.decode(ids)})
    return {
        "captions": number,
        "token_accuracy": right / counted,
        "caption_accuracy": whole / number,
        "examples": examples,
    }


if __name__ == "__main__":
    stage = parse_stage_args("text_decoder", __doc__)
    exit_on_error(lambda: main(stage))
