"""configs/finetune_xl on small made-up weights: published weights go on with a folder."""

import torch
from conftest import reset_accelerate, shape_sample
from PIL import Image
from shipped import ROOT
from test_convert_checkpoint import CLIP, FLOW, TOKENIZER, run_script, weights
from tiny_experiment import PROGRAMS, draw
from tiny_experiment import weights as newest_weights
from torch import nn

from modeling.clip_weights import build_clip, save_clip
from scripts import make_shards
from scripts.run_experiment.checks import check_inputs
from scripts.run_experiment.stages import read_stages
from training.checkpoint import EMA_FILE

# Sizes of the made-up weights, and a run of seconds
SMALL = """
flowtok.flowtok.width=96 flowtok.flowtok.depth=2 flowtok.flowtok.num_heads=4
data.num_workers=0 tokens.precision=fp32 flowtok.training.precision=fp32
flowtok.training.max_steps=2 flowtok.training.batch_size=8 flowtok.optimizer.warmup_steps=1
flowtok.training.checkpoint_every_steps=2 flowtok.training.sample_every_steps=0
"""


def test_converted_weights_and_a_folder_of_images_give_a_run_that_samples(
    tmp_path, capsys, monkeypatch
):
    # Every weight comes from a file: what the networks are made with takes a third of the time
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda x, **bounds: nn.init.zeros_(x))

    # Files of the release's form, and their text tower
    runs, photos = tmp_path / "runs", tmp_path / "photos"
    torch.save(weights(FLOW), tmp_path / "flow.pth")
    torch.save(weights(TOKENIZER), tmp_path / "tokenizer.bin")
    save_clip(build_clip(CLIP), CLIP, tmp_path / "tower")
    released, files = runs / "released_xl", (tmp_path / "flow.pth", tmp_path / "tokenizer.bin")
    tower = ["--text-encoder-model", f"local-dir:{tmp_path / 'tower'}"]
    run_script(*files, "--run", released, "--num-heads", 4, *tower)

    # What a user has
    photos.mkdir()
    for sample in map(shape_sample, range(20)):
        (photos / f"{sample['__key__']}.png").write_bytes(sample["png"])
        (photos / f"{sample['__key__']}.txt").write_text(sample["txt"])
    output = ["--output", str(tmp_path / "datasets" / "finetune"), "--workers", "1"]
    make_shards.main(["folder", str(photos), *output, "--samples-per-shard", "10"])

    # The one command
    places = [f"data_dir={tmp_path / 'datasets'}", f"runs_dir={runs}"]
    stages = read_stages(["finetune_xl", *SMALL.split(), *places], "", ROOT / "configs")
    check_inputs(stages)
    for stage in stages:
        reset_accelerate()
        PROGRAMS[stage.config.stage][1](stage.config)
    prompts = ("a red circle", "a corgi in fresh snow")  # one of the folder's, one that is not
    draw(runs / "finetune_xl", "--prompts", *prompts, "--output", tmp_path / "x.png")
    Image.open(tmp_path / "x.png").verify()
    printed = capsys.readouterr()
    assert "1 of 2 prompts are captions" in printed.out and "corgi" not in printed.err

    # All weights began where the published ones are, and have gone a few small steps.
    before = newest_weights(released / "flowtok", EMA_FILE)
    after = newest_weights(runs / "finetune_xl" / "flowtok", EMA_FILE)
    assert before["latent_scale"] == after["latent_scale"]
    config = stages[-1].config
    farthest = 2 * config.optimizer.learning_rate * config.training.max_steps
    distance = {name: (after[name] - before[name]).abs().max().item() for name in before}
    assert max(distance.values()) < farthest
    for network in ("flowtok", "projector"):
        moved = [name for name, far in distance.items() if name.startswith(network) and far > 0]
        assert len(moved) > 5
