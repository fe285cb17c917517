"""eval/report.py: the pool, and figures of made-up cases whose answers are known."""

import io
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image

from data.tar import write_shard
from eval import report
from eval.report import PIXEL_SIZE, ReportStage, build_pool, compare, mean_psnr, read_all
from modeling.layers import Posterior

# A tokenizer whose latent means are the image's rows
TOKENIZER = SimpleNamespace(encode=lambda images: Posterior(images.flatten(2), torch.zeros(1)))
GENERATOR = SimpleNamespace(tokenizer=TOKENIZER, device=torch.device("cpu"))


def pool_of(*images, captions=None, variant=""):
    config = ReportStage(caption_variant=variant)
    sets = [{"image": x, "caption": captions or [""] * len(x)} for x in images]
    return build_pool(config, GENERATOR, sets)


def test_the_pool_numbers_pixel_identical_images_as_one_group():
    first, second = torch.rand(3, 3, 32, 32), torch.rand(4, 3, 32, 32)
    second[1] = first[2]
    second[3] = second[0]
    almost = first[:1].clone()
    almost[0, 0, 0, 0] += 1 / 255
    pool = pool_of(first, second, almost)
    assert pool["groups"].tolist() == [0, 1, 2, 3, 2, 4, 3, 5] and "subjects" not in pool
    assert pool["pixels"].shape == (8, 3, PIXEL_SIZE, PIXEL_SIZE)
    assert torch.equal(pool["latents"][3:7].view(4, 3, 32, 32), second)


def test_subjects_and_a_set_of_its_own_are_easier_and_equal_sets_have_no_frechet_distance():
    images, own = torch.rand(12, 3, 32, 32), torch.tensor([0, 1])
    captions = ["hand", "hand, dark skin tone", *"abcdefghij"]
    pool = pool_of(images, captions=captions, variant=", [^,]* skin tone$")
    assert pool["subjects"].tolist() == [0, 0, *range(1, 11)]
    pool["latents"] = pool["latents"][:, :, :4]
    found = compare(images[:2], images[:2], pool["latents"][[1, 0]], pool, own)
    assert found["latent"]["top1"] == 0 and found["latent_same_subject"]["top1"] == 1
    # The first looks like another set's image
    found = compare(images[:2], images[:2], pool["latents"][[5, 1]], pool, own)
    assert found["latent"]["top1"] == 0.5 and found["latent_among_own_set"]["top5"] == 1
    found = compare(images[:2], images[:2], pool["latents"][:2], pool, own)
    assert found["frechet_latent"] == pytest.approx(0, abs=1e-6)


def test_a_pair_that_is_equal_has_no_psnr():
    images = torch.ones(3, 3, 4, 4)
    others = images - torch.tensor([0, 0.1, 0.01]).view(3, 1, 1, 1)
    assert mean_psnr(images, others) == pytest.approx(30, abs=1e-4)  # 20 and 40
    assert mean_psnr(images, images) is None


def test_images_and_captions_are_read_as_the_tokenizer_was_trained_on_them(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(buffer, format="PNG")
    sample = {"__key__": "0", "png": buffer.getvalue(), "txt": "one", "json": b'{"title": "two"}'}
    write_shard(tmp_path / "a.tar", [sample])
    generator = SimpleNamespace(tokenizer=SimpleNamespace(config=SimpleNamespace(image_size=8)))
    data = {"background": [255, 0, 51], "captions": {"keys": ["json:title"]}}
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    config = ReportStage(experiment_dir=str(tmp_path))
    found = read_all(config, generator, [str(tmp_path / "a.tar")])
    assert found["caption"] == ["two"]
    colour = torch.tensor([1, 0, 0.2]).view(1, 3, 1, 1)
    torch.testing.assert_close(found["image"], colour.expand(1, 3, 8, 8))


def test_the_report_of_the_chain_is_whole_and_made_once(chain, tmp_path, monkeypatch, capsys):
    shutil.copytree(chain.folder, tmp_path, dirs_exist_ok=True)
    config = chain.config("report", f"experiment_dir={tmp_path}")
    monkeypatch.setattr(report, "save_pairs", lambda samples, images, path: path.touch())
    report.main(config)
    found = json.loads((tmp_path / "report.json").read_text())
    for name, captions in (("train", 6), ("heldout", 24)):
        for suffix in ("", "_source_without_flow", "_ridge"):
            figures = found[f"{name}{suffix}"]
            assert figures["captions"] == captions and figures["psnr_db"] > 0
            for measure in ("latent", "latent_among_own_set", "pixels_16x16"):
                assert 0 <= figures[measure]["top1"] <= figures[measure]["top5"] <= 1
        assert found["tokenizer"][f"{name}_psnr_db"] > 0
    assert (found["num_train_captions"], found["num_pool_images"]) == (24, 48)
    assert {"strength", "left_out_top5", "left_out_mse"} == found["ridge"].keys()
    monkeypatch.setattr(report, "read_all", None)
    report.main(config)
    assert "complete" in capsys.readouterr().out
    (tmp_path / "report_train.png").unlink()
    with pytest.raises(TypeError, match="NoneType"):  # it begins again
        report.main(config)


def test_a_report_of_codes_has_the_ridge_quantised_in_the_place_of_a_source(
    dual_chain, tiny_shards, monkeypatch
):
    train, heldout = ([f"{tiny_shards}/train-0000{number}.tar"] for number in (0, 1))
    folder = str(dual_chain.folder)
    config = ReportStage(experiment_dir=folder, train_shards=train, heldout_shards=heldout)
    monkeypatch.setattr(report, "save_pairs", lambda samples, images, path: path.touch())
    report.main(config)
    found = json.loads((dual_chain.folder / "report.json").read_text())
    suffixes = ("", "_ridge", "_ridge_quantised")
    sets = {f"{name}{suffix}" for name in ("train", "heldout") for suffix in suffixes}
    assert {name for name in found if name.startswith(("train", "heldout"))} == sets
