"""A tiny experiment with a dual tokenizer: tests run the real main() of its stages in-process."""

from pathlib import Path

from tiny_experiment import Experiment

import train_next_scale
import train_reader
import train_tokenizer

SIZE = {"width": 16, "depth": 1, "num_heads": 2}
QUANTIZER = {"num_codes": 32, "semantic_channels": 6, "pixel_channels": 4, "scales": [1, 2]}
DUAL = {  # but for its teacher
    "image_size": 32,
    "semantic_depth": 1,
    "semantic_heads": 2,
    "pixel_nets": "transformer",
    "encoder": SIZE,
    "decoder": SIZE,
    "quantizer": {**QUANTIZER, "drop_scale_probability": 0.5},
}


class DualExperiment(Experiment):
    """Stages on 32 px images with a grid of 2 x 2, 4 steps each."""

    def __init__(self, folder: Path, clip: Path, shards: Path):
        self.programs = {
            "tokenizer": (train_tokenizer.TokenizerStage, train_tokenizer.main),
            "next_scale": (train_next_scale.NextScaleStage, train_next_scale.main),
            "reader": (train_reader.ReaderStage, train_reader.main),  # with transformers
        }
        self.teacher = {"model": f"local-dir:{clip}"}
        super().__init__(folder, shards)

    def stage_configs(self, shards: Path) -> dict[str, dict]:
        latents = super().stage_configs(shards)["tokenizer"]
        common = {section: latents[section] for section in ("data", "training", "optimizer")}
        common["data"]["shards"] = [f"{shards}/train-00000.tar"]
        return {
            "tokenizer": {
                **common,
                "dual": {**DUAL, "teacher": self.teacher},
                "text_encoder": self.teacher,
                "pictures": {"num_samples": 4, "shards": [f"{shards}/train-00001.tar"]},
                "evaluation": {"every_steps": 4, "num_images": 4},
            },
            "next_scale": {
                **common,
                "next_scale": SIZE,
                "sampling": {"top_k": [8, 1], "top_p": [0.9, 0.0], "guidance": 2.0},
                "pictures": {"captions": ["a red circle", "a blue square"]},
            },
            "reader": {
                **common,
                "language_model": {"size": {**SIZE, "width": 32}, "freeze": False},
                "pictures": {"num_samples": 3},
            },
        }
