"""eval/report.py and reconstruction.py: retrieval and PSNR on made-up cases whose answers are known."""

import io
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from data.tar import write_shard
from eval.reconstruction_metrics import psnr
from eval.report import (
    PIXEL_SIZE,
    ReportStage,
    build_pool,
    choose_evenly,
    compare,
    encode,
    read_all,
    retrieval,
    shrink,
    take,
)
from modeling.posterior import Posterior

N = 12
POOL = torch.arange(N).float().view(N, 1, 1) * torch.ones(
    1, 2, 3
)  # point i at distance |i - j| sqrt(6) of point j
UNIQUE = torch.arange(N) + 100  # group numbers are no positions in the pool


def fake_parts(seen=None):
    """A tokenizer whose latent means are the image's rows."""

    def encode_images(images):
        if seen is not None:
            seen.append(len(images))
        return Posterior(images.flatten(2), torch.zeros(1))

    return SimpleNamespace(
        tokenizer=SimpleNamespace(encode=encode_images), device=torch.device("cpu")
    )


CONFIG = SimpleNamespace(batch_size=4, caption_variant="")


def test_perfect_queries_are_found_first():
    own = torch.tensor([3, 0, 11])
    assert retrieval(POOL[own] + 0.1, POOL, UNIQUE, own) == {"top1": 1.0, "top5": 1.0}


def test_queries_far_from_their_own_image_are_not_found():
    own = torch.tensor([0, 1])
    assert retrieval(POOL[[11, 10]], POOL, UNIQUE, own) == {"top1": 0.0, "top5": 0.0}


def test_the_fifth_nearest_counts_and_the_sixth_does_not():
    query = POOL[:1] - 1.0  # nearest are images 0, 1, 2, ...
    for own, top5 in ((0, 1.0), (1, 1.0), (4, 1.0), (5, 0.0)):
        assert retrieval(query, POOL, UNIQUE, torch.tensor([own])) == {
            "top1": float(own == 0),
            "top5": top5,
        }


def test_scores_are_the_share_of_queries():
    own = torch.tensor([0, 1, 2, 3])
    queries = POOL[[0, 11, 2, 4]]  # right, far off, right, next to it
    assert retrieval(queries, POOL, UNIQUE, own) == {"top1": 0.5, "top5": 0.75}


def test_finding_a_pixel_identical_image_is_finding_the_image():
    pool, own = POOL.clone(), torch.tensor([7])
    pool[2] = pool[7]
    groups = UNIQUE.clone()
    groups[7] = groups[2]
    assert retrieval(pool[own], pool, groups, own)["top1"] == 1.0
    groups[2] = 999  # the same place, but another image: a tie, and 2 comes first or 7 does
    assert retrieval(pool[own], pool, groups, own)["top5"] == 1.0


def test_identical_images_elsewhere_in_the_pool_do_not_make_a_far_query_right():
    groups = UNIQUE.clone()
    groups[7] = groups[8]
    assert retrieval(POOL[[2]], POOL, groups, torch.tensor([7])) == {"top1": 0.0, "top5": 0.0}


def test_pool_numbers_pixel_identical_images_as_one_group():
    first, second = torch.rand(3, 3, 32, 32), torch.rand(4, 3, 32, 32)
    second[1] = first[2]
    second[3] = second[0]
    almost = first[:1].clone()
    almost[0, 0, 0, 0] += 1 / 255
    pool = build_pool(
        CONFIG, fake_parts(), [{"image": first}, {"image": second}, {"image": almost}]
    )
    assert pool["groups"].tolist() == [0, 1, 2, 3, 2, 4, 3, 5]
    assert pool["latents"].shape == (8, 3, 32 * 32) and pool["pixels"].shape == (
        8,
        3,
        PIXEL_SIZE,
        PIXEL_SIZE,
    )
    torch.testing.assert_close(pool["latents"][3:7].view(4, 3, 32, 32), second)


def test_captions_that_differ_in_the_variant_alone_are_one_subject():
    sets = [
        {"image": torch.rand(2, 3, 32, 32), "caption": ["hand, body", "hand, body, dark skin tone"]}
    ]
    sets += [{"image": torch.rand(1, 3, 32, 32), "caption": ["foot, body"]}]
    config = SimpleNamespace(batch_size=4, caption_variant=", [^,]* skin tone$")
    pool = build_pool(config, fake_parts(), sets)
    assert pool["subjects"].tolist() == [0, 0, 1] and pool["groups"].tolist() == [0, 1, 2]
    found = compare(
        sets[0]["image"], sets[0]["image"], pool["latents"][[1, 0]], pool, torch.tensor([0, 1])
    )
    assert found["latent"]["top1"] == 0 and found["latent_same_subject"]["top1"] == 1


def test_a_set_of_its_own_is_an_easier_pool_and_equal_sets_have_no_frechet_distance():
    images = torch.rand(12, 3, 32, 32)
    pool = build_pool(CONFIG, fake_parts(), [{"image": images}])
    pool["latents"] = pool["latents"][:, :, :4]
    own = torch.tensor([0, 1])
    latents = pool["latents"][[5, 1]]  # the first looks like another set's image
    found = compare(images[:2], images[:2], latents, pool, own)
    assert found["latent"]["top1"] == 0.5 and "latent_same_subject" not in found
    assert found["latent_among_own_set"]["top5"] == 1.0
    found = compare(images[:2], images[:2], pool["latents"][:2], pool, own)
    assert found["frechet_latent"] == pytest.approx(0, abs=1e-6)


def test_pool_is_encoded_in_batches_in_order():
    seen, images = [], torch.rand(10, 3, 8, 8)
    assert torch.equal(encode(CONFIG, fake_parts(seen), images), images.flatten(2))
    assert seen == [4, 4, 2]


def test_shrinking_averages_areas():
    images = torch.rand(2, 3, 32, 32)
    expected = images.view(2, 3, PIXEL_SIZE, 2, PIXEL_SIZE, 2).mean(dim=(3, 5))
    torch.testing.assert_close(shrink(images), expected)


def test_images_and_captions_are_read_with_the_configured_background_and_keys(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(buffer, format="PNG")
    sample = {"__key__": "0", "png": buffer.getvalue(), "txt": "one", "json": b'{"title": "two"}'}
    write_shard(tmp_path / "a.tar", [sample])
    parts = SimpleNamespace(tokenizer=SimpleNamespace(config=SimpleNamespace(image_size=8)))
    for options, caption, colour in [
        ({}, "one", [1, 1, 1]),
        ({"caption_keys": ["json:title"], "background": [255, 0, 51]}, "two", [1, 0, 0.2]),
    ]:
        config = ReportStage(**options)
        found = read_all(config, parts, [str(tmp_path / "a.tar")])
        assert found["caption"] == [caption]
        torch.testing.assert_close(
            found["image"], torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, 8, 8).float()
        )


def test_captions_are_chosen_evenly_with_both_ends():
    assert choose_evenly(11, 3) == [0, 5, 10] and choose_evenly(2, 5) == [0, 1]


def test_a_report_on_nothing_is_refused():
    with pytest.raises(ValueError, match="train_shards and heldout_shards"):
        ReportStage(train_shards=["a.tar"]).check()


def test_taking_samples_keeps_images_and_captions_together():
    samples = {"image": torch.arange(5).view(5, 1, 1, 1), "caption": list("abcde")}
    taken = take(samples, [4, 1])
    assert taken["image"].flatten().tolist() == [4, 1] and taken["caption"] == ["e", "b"]


def test_psnr_of_a_constant_error_is_its_closed_form():
    images = torch.full((3, 3, 8, 8), 0.5)
    errors = torch.tensor([0.1, 0.01, 0.5]).view(3, 1, 1, 1)
    torch.testing.assert_close(
        psnr(images, images + errors),
        torch.tensor([20.0, 40.0, 6.0206]).double(),
        rtol=1e-4,
        atol=0,
    )


def test_psnr_is_an_images_own_and_symmetric():
    images, others = torch.rand(2, 4, 3, 8, 8)
    values = psnr(images, others)
    assert values.shape == (4,)
    torch.testing.assert_close(psnr(images[2:3], others[2:3]), values[2:3])
    torch.testing.assert_close(psnr(others, images), values)


def test_psnr_of_equal_images_is_infinite():
    assert psnr(torch.ones(1, 3, 4, 4), torch.ones(1, 3, 4, 4)).item() == float("inf")


def test_psnr_of_8_bit_rounding_is_known():
    images = torch.rand(1, 3, 64, 64)
    rounded = (images * 255).round() / 255
    assert psnr(images, rounded).item() == pytest.approx(58.92, abs=0.1)  # 20 log10(255 sqrt(12))
