"""Captions as the text decoder's stage uses them: a loader, and text states in the run's precision."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from data.config import ReaderConfig
from data.readers import caption_reader
from data.storage import is_remote
from modeling.text_encoder import TextEncoder, TextTokenizer, load_text_encoder
from modeling.text_projector import TextProjector
from training.loading import fingerprint
from training.loop import batch_per_pass
from training.run import Run
from training.stored_tokens import MEASURED_SAMPLES
from training.tokens_info import TOKENS_INFO_FILE, TokensInfo


@dataclass
class StoredCaptions:
    """Batches of captions. Stored text states are used where they are the tower's own; else the tower runs."""

    run: Run
    loader: object
    data: ReaderConfig
    tokenize: TextTokenizer
    text_encoder: TextEncoder
    has_states: bool

    def text_states(self, batch: dict) -> Tensor:
        """Text states of a batch, B x L x T on the device: as stored (then float32), else encoded now."""
        if "text_states" in batch:
            return batch["text_states"].to(self.run.device, non_blocking=True).float()
        with self.run.accelerator.autocast():
            return self.text_encoder(batch["token_ids"].to(self.run.device, non_blocking=True))

    def read(self, limit: int, shards: list[str] | None = None) -> Iterator[dict]:
        """The first captions in order; of other shards without looking for stored states."""
        has_states = self.has_states and shards is None
        return caption_reader(self.data, self.tokenize, has_states).once(100, shards, limit)

    def fit_whitening(self, projector: TextProjector) -> None:
        """Measure the projector's whitening of text states on the first captions, if it has one."""
        if projector.config.whiten_text:
            projector.whitening.fit(
                self.text_states(batch).cpu() for batch in self.read(MEASURED_SAMPLES)
            )


def open_stored_captions(run: Run, config) -> StoredCaptions:
    """Open the shards of a text_decoder config for this process.

    Raises:
        ValueError: the text tower is not the projector's.
    """
    encoder, projector, training = (
        load_text_encoder(config.text_encoder),
        config.projector,
        config.training,
    )
    if (encoder.context_length, encoder.width) != (projector.text_tokens, projector.text_width):
        raise ValueError(
            f"{config.text_encoder.model} gives {encoder.context_length} x {encoder.width} text states, the config "
            f"expects projector.text_tokens x text_width = {projector.text_tokens} x {projector.text_width}"
        )
    has_states = all(holds_states_of(encoder, pattern) for pattern in config.data.all_shards())
    tokenize = TextTokenizer(config.text_encoder)
    loader = caption_reader(config.data, tokenize, has_states).stream(
        batch_per_pass(run, training),
        training.seed,
        run.accelerator.process_index,
        run.accelerator.num_processes,
    )
    return StoredCaptions(run, loader, config.data, tokenize, encoder.to(run.device), has_states)


def holds_states_of(encoder: TextEncoder, pattern: str) -> bool:
    """Whether shards lie in a folder of token shards that has this tower's text states."""
    folder = Path(pattern).expanduser().parent
    if is_remote(pattern) or not (folder / TOKENS_INFO_FILE).is_file():
        return False
    info = TokensInfo.load(folder)
    return info.has_text_states and info.text_encoder_fingerprint == fingerprint(encoder)
