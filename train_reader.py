"""Understanding: a language model learns to read a tokenizer's codes, with captions as targets.

    accelerate launch train_reader.py --config configs/emoji_dual/reader.yaml [key=value ...]

In: image shards with captions; the run of a tokenizer, dual or FlowTok's, which stays frozen and
encodes in the loop; a causal language model of the package transformers, frozen or trained on
(modeling/code_reader.py). Out: a run folder with the projector, and the model if it is trained.
Loss: cross-entropy of the caption's tokens, mean over them. samples/step_*.png: images with the
captions that are read from them by EMA weights, and in brackets their own. The same command
resumes, and does nothing when the run is complete.
"""

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.load import parse_stage_args
from data.images import ImageTextConfig, image_reader
from modeling.code_reader import (
    IGNORED,
    CaptionTokenizer,
    CodeReader,
    LanguageModelConfig,
    load_language_model,
)
from modeling.dual_tokenizer import DualTokenizer
from modeling.image_tokenizer import ImageTokenizer
from modeling.layers import fingerprint
from training.checkpoint import is_complete, latest_checkpoint
from training.errors import exit_on_error
from training.loading import load_any_tokenizer
from training.loop import train_network
from training.pictures import SheetConfig, caption_grid, sample_path, save_png
from training.provenance import check_shards, save_source
from training.run import Run, save_config, start_run
from training.stage import TrainedStage, open_stream
from training.tokens import encode_images

Tokenizer = ImageTokenizer | DualTokenizer


@dataclass
class ReaderStage(TrainedStage):
    """What can be set in reader.yaml, besides the parts' own fields."""

    tokenizer_run: str = "${experiment_dir}/tokenizer"  # whose codes are read
    language_model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    data: ImageTextConfig = field(default_factory=ImageTextConfig)
    pictures: SheetConfig = field(default_factory=SheetConfig)

    stage = "reader"
    networks = ("language_model",)

    def check(self) -> None:
        super().check()
        self.language_model.check()

    def image_shards(self) -> list[str]:
        return self.data.all_shards() + self.pictures.shards


def main(config: ReaderStage) -> None:
    """Run the stage from start or checkpoint to its last step."""
    # What stage 1 gave, and the language model.
    training, language = config.training, config.language_model
    run = start_run(config.run_dir, training.precision, training.seed, training.timeout_minutes)
    tokenizer = load_any_tokenizer(config.tokenizer_run).to(run.device)
    # One process of a machine downloads, the others find it in the cache.
    with run.accelerator.local_main_process_first():
        language_model = load_language_model(language).to(run.device)
        tokenize = CaptionTokenizer(language)
    inputs = {
        "tokenizer": fingerprint(tokenizer),
        "language_model": "none" if language.size else fingerprint(language_model),
    }
    # A complete run is left alone, before anything long begins.
    shards = check_shards(run, config.data, training.max_steps)
    if is_complete(run, config, inputs):
        return

    # The network: its sizes follow from those parts.
    size = tokenizer.config.image_size
    codes = encode_images(run, tokenizer, {"image": torch.zeros(1, 3, size, size)}).mean
    model = CodeReader(codes.shape[-1], language_model, tokenize.start_id, language.freeze)

    # Images and captions.
    reader = image_reader(config.data, size, tokenize)
    loader = open_stream(run, training, reader)
    sheet = config.pictures.read(reader)
    save_config(run, config, latest_checkpoint(run.folder) is not None)
    save_source(run.folder, shards)
    train_network(
        run=run,
        stage=config,
        module=model,
        loss_fn=partial(compute_losses, run, tokenizer),
        loader=loader,
        inputs=inputs,
        save_samples=partial(save_read, run, tokenizer, tokenize, sheet),
    )


def compute_losses(
    run: Run, tokenizer: Tokenizer, model: nn.Module, batch: dict
) -> dict[str, Tensor]:
    """Cross-entropy of the captions' tokens; top1: how often the likeliest one is true."""
    token_ids = batch["token_ids"].to(run.device, non_blocking=True)
    logits = model(encode_images(run, tokenizer, batch).mean, token_ids).float()
    loss = F.cross_entropy(logits.flatten(0, 1), token_ids.flatten(), ignore_index=IGNORED)
    top1 = (logits.argmax(-1) == token_ids).sum() / (token_ids != IGNORED).sum()
    return {"loss": loss, "top1": top1}


def save_read(
    run: Run,
    tokenizer: Tokenizer,
    tokenize: CaptionTokenizer,
    batch: dict,
    model: CodeReader,
    step: int,
) -> None:
    """Images of a batch with what is read of them, and their own captions in brackets."""
    codes = encode_images(run, tokenizer, batch).mean
    ids = model.read(codes, tokenize.end_id, tokenize.context_length)
    read = [tokenize.decode(row) for row in ids]
    right = sum(text == own for text, own in zip(read, batch["caption"]))
    run.say(f"{right} of {len(read)} captions on the sheet are read word for word")
    labels = [f"{text} [{own}]" for text, own in zip(read, batch["caption"])]
    sheet = caption_grid(batch["image"].float() / 255, labels, columns=4)
    save_png(sheet, sample_path(run.folder, step))


if __name__ == "__main__":
    exit_on_error(lambda: main(parse_stage_args(ReaderStage, __doc__)))
