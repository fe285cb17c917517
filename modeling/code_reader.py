"""The reader: a causal language model of the package transformers, which reads an image's tokens.

As LLaVA and TokenFlow (CVPR 2025, arXiv 2412.03069) do: the tokens that any frozen tokenizer gives,
B x N x C, go through Linear-GELU-Linear into the model's input embeddings, and stand before those
of the caption, which is predicted. The published one answers questions and was taught in two
stages; here captions are learned. The package is optional (requirements-text.txt).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .image_tokenizer import TransformerSize
from .layers import check_heads, check_least
from .transformers_text import TransformersTokenizer, load_package, load_part, load_whole

IGNORED = -100  # in place of an id: padding, which is not predicted


@dataclass
class LanguageModelConfig:
    """Which language model reads. Expected: either model or size."""

    model: str = ""  # a folder with the model and its tokenizer, or a name on the hub
    # In place of it: a Qwen2 of this size with random weights, which reads and writes bytes
    size: TransformerSize | None = None
    freeze: bool = True  # only the projector is trained
    caption_length: int = 77  # tokens to which captions are cut, with the end token
    key: ClassVar[str] = "language_model"

    def __post_init__(self):
        check_least(self, 2, "caption_length")
        if self.size:
            check_heads(self.size, channels=2, part="size.")

    def check(self) -> None:
        """Refuse no model, two, or one that can't learn; ValueError names the keys."""
        if bool(self.model) == bool(self.size):
            raise ValueError("language_model: expected one of model and size")
        if self.size and self.freeze:
            raise ValueError(
                "language_model.size has random weights, which can't read: set "
                "language_model.freeze=false"
            )


class CaptionTokenizer(TransformersTokenizer):
    """A language model's own tokenizer: ids cut to the length with the end token, then IGNORED."""

    def __init__(self, config: LanguageModelConfig):
        if config.size:
            tokenizer = load_package().ByT5Tokenizer(extra_ids=0)
        else:
            tokenizer = load_part("AutoTokenizer", config)
        super().__init__(config, tokenizer, config.caption_length)
        self.start_id: int | None = tokenizer.bos_token_id
        self.end_id: int | None = tokenizer.eos_token_id
        if self.end_id is None:
            raise ValueError(f"language_model.model={config.model}: its tokenizer has no end token")

    def ids(self, caption: str) -> list[int]:
        """Those of the words alone."""
        return self._tokenizer(caption, add_special_tokens=False, verbose=False)["input_ids"]

    def __call__(self, captions: list[str]) -> Tensor:
        """B captions -> B x L, as long as the longest."""
        last = self.context_length - 1
        rows = [torch.tensor([*self.ids(caption)[:last], self.end_id]) for caption in captions]
        return pad_sequence(rows, batch_first=True, padding_value=IGNORED)

    def num_tokens(self, caption: str) -> int:
        return len(self.ids(caption)) + 1


def load_language_model(config: LanguageModelConfig) -> nn.Module:
    """The model in float32; ValueError as transformers_text.load_part, or it lacks weights."""
    package, size = load_package(), config.size
    if size is None:
        model = load_whole("AutoModelForCausalLM", config).float()
        # Its own may draw, or penalise what was said before.
        model.generation_config = package.GenerationConfig()
        return model
    # Bytes need no vocabulary of words, so that a tiny model can be trained from scratch.
    settings = package.Qwen2Config(
        vocab_size=len(package.ByT5Tokenizer(extra_ids=0)),
        hidden_size=size.width,
        intermediate_size=4 * size.width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_heads,
    )
    return package.Qwen2ForCausalLM(settings)


class CodeReader(nn.Module):
    """Projector and language model. A frozen one is in no checkpoint, and stays on its device."""

    def __init__(
        self, channels: int, language_model: nn.Module, start_id: int | None, freeze: bool
    ):
        """channels: C of the tokens; start_id: of the token that the model begins with, if any."""
        super().__init__()
        width = language_model.get_input_embeddings().weight.shape[1]
        # As torch initialises them, as LLaVA's
        self.projector = nn.Sequential(
            nn.Linear(channels, width), nn.GELU(), nn.Linear(width, width)
        )
        self.start_id = start_id
        if freeze:
            language_model.eval().requires_grad_(False)
        # Behind a function it is no part of this module, nor of its copies: neither EMA nor
        # checkpoints hold billions of weights that do not change.
        self._model = (lambda: language_model) if freeze else language_model

    @property
    def language_model(self) -> nn.Module:
        return self._model if isinstance(self._model, nn.Module) else self._model()

    def embed_image(self, tokens: Tensor) -> Tensor:
        """B x N x C -> B x N x W, behind the start token if there is one."""
        embedded = self.projector(tokens)
        if self.start_id is None:
            return embedded
        ids = torch.full((len(tokens), 1), self.start_id, device=tokens.device)
        return torch.cat([self.language_model.get_input_embeddings()(ids), embedded], dim=1)

    def forward(self, tokens: Tensor, token_ids: Tensor) -> Tensor:
        """Image tokens B x N x C, ids B x L of captions, then IGNORED -> logits B x L x V."""
        # The last id predicts nothing. Padding comes last, where the causal mask hides it.
        model, length = self.language_model, token_ids.shape[1]
        known = model.get_input_embeddings()(token_ids[:, :-1].clamp(min=0))
        inputs = torch.cat([self.embed_image(tokens), known], dim=1)
        output = model(inputs_embeds=inputs, use_cache=False, logits_to_keep=length)
        return output.logits[:, -length:]

    @torch.no_grad()
    def read(self, tokens: Tensor, end_id: int, max_length: int) -> Tensor:
        """Image tokens B x N x C -> B x at most max_length ids, the likeliest one by one."""
        inputs = self.embed_image(tokens)
        return self.language_model.generate(
            inputs_embeds=inputs,
            attention_mask=torch.ones(inputs.shape[:2], dtype=torch.long, device=tokens.device),
            max_new_tokens=max_length,
            eos_token_id=end_id,
            pad_token_id=end_id,
        )
