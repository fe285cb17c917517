"""Train the text decoder of image to text: projector and decoder as an autoencoder of captions.

    accelerate launch train_text_decoder.py --config configs/emoji_caption/text_decoder.yaml

(Paper, Sec. 4.1 and 5.1.) In: any shards with captions, of images or of tokens; the tokenizer's run
for the text tower and the sizes. Out: a run folder with projector and decoder; stage 3 takes both
from it (projector_run, text_decoder_run) and trains the flow from images to this projector's z_T.
With freeze_projector, the decoder learns the z_T of a trained projector (projector_run).
The same command resumes, and does nothing when the run is complete. samples/step_*.json: how much
of the held-out and of the training captions comes back from z_T's mean, with EMA weights.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from configs.load import parse_stage_args
from data.config import ReaderConfig
from data.files import write_json
from data.readers import caption_reader
from modeling.image_tokenizer import ImageTokenizerConfig
from modeling.layers import fingerprint
from modeling.losses import kl_loss, latent_statistics
from modeling.text_decoder import (
    CLIP_VOCABULARY,
    TextAutoencoder,
    TextDecoderConfig,
    TextDecoderLossConfig,
    caption_losses,
    correct_tokens,
    counted_positions,
)
from modeling.text_encoder import load_text_encoder
from modeling.text_projector import TextProjector, TextProjectorConfig
from training.checkpoint import is_complete, latest_checkpoint
from training.errors import exit_on_error
from training.loading import read_section, text_encoder_config
from training.loop import train_network
from training.pictures import sample_path
from training.pipelines import load_projector
from training.provenance import check_shards, save_source
from training.run import save_config, start_run
from training.stage import TrainedStage
from training.tokens import StoredText, complete_projector, open_stored_captions, projector_sizes

MEASURED_CAPTIONS = 10_000  # at most, of either kind, whose reconstruction is measured
VOCABULARY_CAPTIONS = 1_000_000  # at most, whose token ids are counted
NUM_EXAMPLES = 20


@dataclass
class TextDecoderStage(TrainedStage):
    """What can be set in text_decoder.yaml, besides the parts' own fields."""

    tokenizer_run: str = "${experiment_dir}/tokenizer"  # whose text tower and sizes are used
    projector_run: str = ""  # a trained projector to start from; empty: random weights
    freeze_projector: bool = False  # train the decoder only, on the z_T that projector_run gives
    projector: TextProjectorConfig | None = None  # null: as in projector_run
    text_decoder: TextDecoderConfig = field(default_factory=TextDecoderConfig)
    data: ReaderConfig = field(default_factory=ReaderConfig)
    heldout_shards: list[str] = field(default_factory=list)  # captions to measure on
    losses: TextDecoderLossConfig = field(default_factory=TextDecoderLossConfig)

    stage = "text_decoder"
    networks = ("projector", "text_decoder")

    def check(self) -> None:
        super().check()
        if self.projector_run and self.projector:
            raise ValueError(f"projector is as in {self.projector_run}: leave it out")
        if self.projector and self.projector.linear_skip:
            raise ValueError("projector.linear_skip needs image latents: train it in stage 2")
        if self.freeze_projector and not self.projector_run:
            raise ValueError("freeze_projector=true needs a trained projector: set projector_run")
        if self.freeze_projector and self.losses.kl_weight:
            raise ValueError(
                f"losses.kl_weight={self.losses.kl_weight} with freeze_projector=true teaches "
                "nothing: set losses.kl_weight=0"
            )

    def image_shards(self) -> list[str]:
        return self.heldout_shards

    def token_shards(self) -> list[str]:
        return self.data.all_shards()


def main(config: TextDecoderStage) -> None:
    """Run the stage from start or checkpoint to its last step."""
    # What earlier stages gave.
    training = config.training
    run = start_run(config.run_dir, training.precision, training.seed, training.timeout_minutes)
    tokenizer_config = read_section(config.tokenizer_run, "tokenizer", ImageTokenizerConfig)
    text_config = text_encoder_config(config.tokenizer_run)
    sizes = projector_sizes(tokenizer_config)
    # The vocabulary and the end token are CLIP's, and token i of z_T stands for word i.
    if text_config.family != "open_clip" or sizes["num_queries"]:
        raise ValueError(
            f"{config.tokenizer_run}: a text decoder reads one of CLIP's token ids from each "
            "token: it needs text_encoder.family=open_clip and tokenizer.num_tokens=0"
        )
    source = load_projector(config.projector_run) if config.projector_run else None
    config.projector = complete_projector(
        config.projector, source, config.projector_run, config.tokenizer_run, sizes
    )
    inputs = {
        "text_encoder": load_text_encoder(text_config).identity,
        "projector": fingerprint(source) if source else "none",
    }
    shards = check_shards(run, config.data, training.max_steps)
    # A complete run ends here: it needs no captions.
    if is_complete(run, config, inputs):
        return

    # Data and networks.
    # Any shards with captions do: stored text states are used where they are the tower's own.
    captions = open_stored_captions(run, config.data, training, text_config)
    if config.heldout_shards and next(read_heldout(config, captions, limit=1), None) is None:
        raise ValueError(f"heldout_shards={config.heldout_shards} have no caption")
    has_checkpoint = latest_checkpoint(run.folder) is not None
    model = build_model(config, source)
    # A checkpoint has what is measured on the captions, as part of the weights.
    if not has_checkpoint:
        if source is None:
            captions.fit_whitening(model.projector)
        choose_vocabulary(model, captions)
    save_config(run, config, has_checkpoint)
    save_source(run.folder, shards)
    train_network(
        run=run,
        stage=config,
        module=model,
        loss_fn=partial(compute_losses, config, captions),
        loader=captions.loader,
        inputs=inputs,
        save_samples=partial(save_accuracy, config, captions),
    )


def build_model(config: TextDecoderStage, source: TextProjector | None) -> TextAutoencoder:
    """Projector and decoder, with the weights of `source`."""
    model = TextAutoencoder(config.projector, config.text_decoder)
    if source is not None:
        model.projector.load_state_dict(source.state_dict())
    # The flow ends in the z_T that this projector gives, so a trained one may have to stay.
    if config.freeze_projector:
        model.projector.freeze()
    return model


def choose_vocabulary(model: TextAutoencoder, captions: StoredText) -> None:
    """Give a decoder with a small vocabulary the most frequent token ids of the captions."""
    size = model.decoder.config.vocabulary_size
    if size == CLIP_VOCABULARY:
        return
    all_ids = (batch["token_ids"] for batch in captions.reader.once(100, limit=VOCABULARY_CAPTIONS))
    counted = (ids.flatten()[counted_positions(ids)] for ids in all_ids)
    if left_out := model.decoder.fit_vocabulary(counted):
        captions.run.say(
            f"text_decoder.vocabulary_size={size}: the {left_out} rarest ids of the captions are "
            "left out and can't be learned"
        )


def compute_losses(
    config: TextDecoderStage, captions: StoredText, model: nn.Module, batch: dict
) -> dict[str, Tensor]:
    """Loss terms of one batch, and the deviations of z_T."""
    losses, device = config.losses, captions.run.device
    # Only the positions up to the end token count; the ids are on the CPU, so no device sync.
    counted = counted_positions(batch["token_ids"])
    token_ids = batch["token_ids"].flatten()[counted].to(device, non_blocking=True)
    states = captions.text_states(batch)
    output = model(
        states,
        counted.to(device, non_blocking=True),
        token_ids,
        sample=bool(losses.kl_weight),
        noise=losses.latent_noise,
    )
    terms = caption_losses(output.logits, output.classes)
    terms["loss"] = terms["cross_entropy"]
    if losses.kl_weight:
        terms["kl"] = kl_loss(output.mean, output.logvar)
        terms["loss"] = terms["loss"] + losses.kl_weight * terms["kl"]
    return terms | latent_statistics(output.mean)


def save_accuracy(
    config: TextDecoderStage, captions: StoredText, model: TextAutoencoder, step: int
) -> None:
    """Write how much of the captions comes back from z_T's mean."""
    run = captions.run
    train = captions.reader.once(100, limit=MEASURED_CAPTIONS)
    # Training captions beside held-out ones: their difference is what was learned by heart.
    parts = {"train": measure(captions, model, train)}
    if config.heldout_shards:
        heldout = read_heldout(config, captions, MEASURED_CAPTIONS)
        parts["heldout"] = measure(captions, model, heldout)
    write_json({"step": step, **parts}, sample_path(run.folder, step).with_suffix(".json"))
    for name, part in parts.items():
        run.say(
            f"{name}: {part['token_accuracy']:.2%} of tokens, {part['caption_accuracy']:.2%} of "
            f"{part['captions']} captions from their own z_T"
        )


def read_heldout(config: TextDecoderStage, captions: StoredText, limit: int) -> Iterator[dict]:
    """Batches of the first held-out captions; no stored text states are looked for."""
    reader = caption_reader(config.data, captions.text_encoder.tokenize, with_states=False)
    return reader.once(100, config.heldout_shards, limit)


@torch.no_grad()
def measure(captions: StoredText, model: TextAutoencoder, batches: Iterable[dict]) -> dict:
    """Accuracy of captions from their own z_T's mean, with the first examples."""
    tokenize = captions.text_encoder.tokenize
    hits, counted, examples = [], [], []
    for batch in batches:
        latents = model.projector.posterior(captions.text_states(batch)).mean
        predicted = model.decoder(latents).cpu()
        right, tokens = correct_tokens(predicted, batch["token_ids"])
        hits.append(right)
        counted.append(tokens)
        # The same examples at every step, as people read them.
        shown = batch["caption"][: NUM_EXAMPLES - len(examples)]
        for caption, ids in zip(shown, predicted):
            examples.append({"caption": caption, "decoded": tokenize.decode(ids)})
    hits, counted = torch.cat(hits), torch.cat(counted)
    return {
        "captions": len(hits),
        "token_accuracy": hits.sum().item() / counted.sum().item(),
        "caption_accuracy": (hits == counted).sum().item() / len(hits),
        "examples": examples,
    }


if __name__ == "__main__":
    exit_on_error(lambda: main(parse_stage_args(TextDecoderStage, __doc__)))
