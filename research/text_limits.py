"""How far do the captions of an experiment determine its images? Ridge regressions say.

    python -m research.text_limits --config configs/demo/report.yaml [key=value ...]

What a flow could at most know about a held-out caption depends on what the text states say, on how
many captions it has seen, and on what can be read off a state. All are varied here, in closed form
and without a flow, by ridge regressions (training/ridge.py) from text to image latents on a
quarter, half and all of the training captions, each part drawn three times:
- text states: linear; the baseline of the report;
- curved: the same states under a Gaussian kernel, which fits what no linear map can;
- shuffled tower: linear, from the states of a text tower whose weights were shuffled, so that it
  has learned nothing;
- bag of words: linear, from which words a caption has.
Retrieval is among the held-out images only. `doubled`: the prediction's distance from the mean
image times 2, as guidance 2 does. Writes EXPERIMENT/text_limits.json.
"""

import copy
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

# Run as a file, Python looks into research/ only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.load import parse_stage_args
from data.files import write_json
from eval.report import ReportStage, encode, encode_texts, read_all
from eval.scores import retrieval
from training.errors import exit_on_error
from training.pipelines import load_pipeline
from training.ridge import fit_ridge

SHARES = (0.25, 0.5, 1.0)  # of the training captions
DRAWS = 3  # parts of each share
# On the diagonal of the Gaussian kernel, which equal captions would make singular
JITTER = 1e-6


def main(config: ReportStage) -> None:
    """Measure, print, write; up to a few minutes on a CPU."""
    # Images as latents, captions as text states
    parts, _ = load_pipeline(Path(config.experiment_dir), torch.device("cpu"))
    sets = [
        read_all(config, parts, shards) for shards in (config.train_shards, config.heldout_shards)
    ]
    train, heldout = (encode(parts, samples["image"]) for samples in sets)
    captions = [samples["caption"] for samples in sets]
    states = [encode_texts(parts, part) for part in captions]
    # What a regression may read of a caption
    shuffled = replace(parts, text_encoder=shuffle_weights(parts.text_encoder))
    tokenize = parts.text_encoder.tokenize
    texts = {
        "text states": states,
        "text states, curved": gaussian_features(*states),
        "states of the shuffled tower": [encode_texts(shuffled, part) for part in captions],
        "bag of words": bags_of_words(*map(tokenize, captions)),
    }
    rows = list(measure(texts, train, heldout))
    # The table
    columns = {
        "top1": "top-1",
        "top5": "top-5",
        "top1_doubled": "top-1, doubled",
        "top5_doubled": "top-5, doubled",
    }
    print(f"| text | captions | {' | '.join(columns.values())} |")
    print("|---" * (2 + len(columns)) + "|")
    for row in rows:
        cells = " | ".join(mean_and_deviation(row[key]) for key in columns)
        print(f"| {row['text']} | {row['captions']} | {cells} |")
    path = Path(config.experiment_dir) / "text_limits.json"
    write_json({"heldout_captions": len(heldout), "rows": rows}, path)
    print(f"{path}: written")


def shuffle_weights(module: nn.Module) -> nn.Module:
    """A copy with the numbers of every weight in other places: it keeps scales, knows nothing."""
    module, generator = copy.deepcopy(module), torch.Generator().manual_seed(0)
    for weight in module.parameters():
        order = torch.randperm(weight.numel(), generator=generator)
        weight.data = weight.data.flatten()[order.to(weight.device)].view_as(weight)
    return module


def gaussian_features(train: Tensor, heldout: Tensor) -> list[Tensor]:
    """States N x L x T -> N x 1 x D, whose products are exp(-|x - y|^2 / 2 m).

    m: the mean squared distance in train. D: the number of training states; the features are the
    rows of their kernel's Cholesky factor.
    """
    train, heldout = train.flatten(1).double(), heldout.flatten(1).double()
    squares = torch.cdist(train, train).square()
    scale = 2 * squares.sum() / (len(train) * (len(train) - 1))
    factor = torch.linalg.cholesky(
        (-squares / scale).exp() + JITTER * torch.eye(len(train), dtype=torch.float64)
    )
    cross = (-torch.cdist(heldout, train).square() / scale).exp()
    return [factor[:, None], torch.linalg.solve_triangular(factor, cross.T, upper=False).T[:, None]]


def bags_of_words(train: Tensor, heldout: Tensor) -> list[Tensor]:
    """Token ids N x L -> N x 1 x V: the ids of a caption, weighted by rarity, rows of length 1."""
    vocabulary = train.unique()
    seen = (train[:, :, None] == vocabulary).any(dim=1).float()  # N x V
    rarity = (len(train) / seen.sum(dim=0)).log()  # 0 for start, end and padding, which all have
    bags = [(ids[:, :, None] == vocabulary).any(dim=1).float() * rarity for ids in (train, heldout)]
    return [torch.nn.functional.normalize(bag, dim=1)[:, None] for bag in bags]


def measure(texts: dict[str, list[Tensor]], train: Tensor, heldout: Tensor) -> Iterator[dict]:
    """A row for each text and share with a value per draw; train, heldout: latents N x K x C."""
    own = torch.arange(len(heldout))
    for name, (states, heldout_states) in texts.items():
        for share in SHARES:
            number = max(2, round(share * len(train)))
            row: dict[str, list[float]] = {}
            for draw in range(DRAWS if share < 1 else 1):
                generator = torch.Generator().manual_seed(draw)
                chosen = torch.randperm(len(train), generator=generator)[:number]
                ridge = fit_ridge(states[chosen], train[chosen])
                for suffix, scale in (("", 1.0), ("_doubled", 2.0)):
                    predicted = torch.lerp(ridge.latent_mean, ridge(heldout_states), scale)
                    for key, value in retrieval(predicted, heldout, own, own).items():
                        row.setdefault(key + suffix, []).append(value)
            yield {"text": name, "captions": number, **row}


def mean_and_deviation(shares: list[float]) -> str:
    """In percent."""
    deviation = f" +- {100 * statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
    return f"{100 * statistics.fmean(shares):.1f}{deviation}"


if __name__ == "__main__":
    exit_on_error(lambda: main(parse_stage_args(ReportStage, __doc__)))
