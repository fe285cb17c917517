"""How far do the captions of an experiment determine its images? Ridge regressions from text to image latents.

    python -m eval.text_limits --config configs/demo/report.yaml [key=value ...]

What a flow could at most know about a held-out caption depends on what the text states say and on how many captions it
has seen. Both are varied here, in closed form and without a flow: ridge (modeling/ridge.py) from the text states, or
from a bag of the caption's words instead, on a quarter, half and all of the training captions, each part drawn three
times. Retrieval is among the held-out images alone. `doubled`: the prediction's distance from the mean image times 2,
as guidance 2 does. Writes EXPERIMENT/text_limits.json.
"""

import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from configs.load import exit_on_error, parse_stage_args
from configs.schema import ReportStage
from eval.demo import encode, encode_texts, read_all, retrieval
from eval.loading import load_pipeline
from eval.report import write_json
from modeling.ridge import fit_ridge

SHARES = (0.25, 0.5, 1.0)  # of the training captions
DRAWS = 3  # parts of each share


def main(config: ReportStage) -> None:
    """Measure, print, write; seconds to a minute on a CPU."""
    parts, _ = load_pipeline(Path(config.experiment_dir), torch.device("cpu"))
    train, heldout = (read_all(config, parts, shards) for shards in (config.train_shards, config.heldout_shards))
    latents = [encode(config, parts, samples["image"]) for samples in (train, heldout)]
    captions = train["caption"], heldout["caption"]
    texts = {
        "text states": [encode_texts(config, parts, part) for part in captions],
        "bag of words": bags_of_words(*(parts.tokenize(part) for part in captions)),
    }
    rows = list(measure(texts, *latents))
    print("| text | captions | top-1 | top-5 | top-1, doubled | top-5, doubled |\n|---|---|---|---|---|---|")
    for row in rows:
        cells = " | ".join(mean_and_deviation(row[key]) for key in ("top1", "top5", "top1_doubled", "top5_doubled"))
        print(f"| {row['text']} | {row['captions']} | {cells} |")
    path = Path(config.experiment_dir) / "text_limits.json"
    write_json({"heldout_captions": len(heldout["caption"]), "rows": rows}, path)
    print(f"{path}: written")


def bags_of_words(train: Tensor, heldout: Tensor) -> list[Tensor]:
    """Token ids N x L -> N x 1 x V: which ids a caption has, weighted by their rarity in training, rows of length 1."""
    vocabulary = train.unique()
    seen = (train[:, :, None] == vocabulary).any(dim=1).float()  # N x V
    rarity = (len(train) / seen.sum(dim=0)).log()  # 0 for start, end and padding, which all have
    bags = [(ids[:, :, None] == vocabulary).any(dim=1).float() * rarity for ids in (train, heldout)]
    return [torch.nn.functional.normalize(bag, dim=1)[:, None] for bag in bags]


def measure(texts: dict[str, list[Tensor]], train: Tensor, heldout: Tensor) -> Iterator[dict]:
    """A row for each text and share, with a value for each draw. train, heldout: latents N x K x C."""
    own = torch.arange(len(heldout))
    for name, (states, heldout_states) in texts.items():
        for share in SHARES:
            number, row = max(2, round(share * len(train))), {}
            for draw in range(DRAWS if share < 1 else 1):
                chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(draw))[:number]
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
    stage = parse_stage_args("report", __doc__)
    exit_on_error(lambda: main(stage))
