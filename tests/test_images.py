"""eval/images.py: every image once over all processes, as it is; clean-fid's resize."""

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import shape_sample
from PIL import Image

from data.tar import write_shard
from eval.images import (
    CLEAN_SIZE,
    ImageSet,
    choose_images,
    iterate_images,
    list_images,
    list_pictures,
    spread_evenly,
)


@pytest.mark.parametrize("num_processes", [1, 2, 5])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_image_is_read_once_over_all_processes(tiny_shards, num_processes, num_workers):
    images = ImageSet(list_images([f"{tiny_shards}/*.tar"]), 32, ("txt",))
    found = {}
    for rank in range(num_processes):
        state = SimpleNamespace(process_index=rank, num_processes=num_processes)
        for batch in iterate_images(images, 7, num_workers, state):
            assert batch["image"].shape == (len(batch["index"]), 3, 32, 32)
            for index, image, caption in zip(batch["index"], batch["image"], batch["caption"]):
                assert index not in found and index % num_processes == rank
                found[index] = image, caption
    assert sorted(found) == [*range(48)]
    for index in (0, 30, 47):
        sample = shape_sample(index)
        expected = np.asarray(Image.open(io.BytesIO(sample["png"])).convert("RGB"))
        image, caption = found[index]
        assert np.array_equal(image.permute(1, 2, 0), expected) and caption == sample["txt"]


def test_sources_come_in_the_order_given_and_unreadable_images_are_listed(tiny_shards, tmp_path):
    shard = f"{tiny_shards}/train-00001.tar"
    write_shard(tmp_path / "bare.tar", [{"__key__": "7", "txt": "no image"}])
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "0.png").write_bytes(shape_sample(0)["png"])
    (photos / "1.png").write_bytes(b"no image")
    (photos / "2.png").symlink_to(photos / "nowhere.png")
    entries = list_images([str(photos), shard, f"{tmp_path}/bare.tar"])
    assert [Path(entry.path).name for entry in entries[:4]] == [
        "0.png",
        "1.png",
        "2.png",
        "train-00001.tar",
    ]
    batches = [*iterate_images(ImageSet(entries, 32), 30)]
    assert [index for batch in batches for index in batch["index"]] == [0, *range(3, 27)]
    assert [item for batch in batches for item in batch["skipped"]] == [
        (f"{photos}/1.png", "image: unreadable (UnidentifiedImageError)"),
        (f"{photos}/2.png", "image: missing"),
        (f"{tmp_path}/bare.tar: 7", "image: missing"),
    ]


def test_an_image_named_twice_and_a_broken_shard_are_refused(tiny_shards, tmp_path):
    shard = str(tiny_shards / "train-00000.tar")
    with pytest.raises(ValueError, match=f"{shard}: 00000"):
        list_images([shard, f"{tiny_shards}/*.tar"])
    (tmp_path / "cut.tar").write_bytes(Path(shard).read_bytes()[:20_000])
    for name in (f"{tmp_path}/cut.tar", f"{tmp_path}/absent.tar"):
        with pytest.raises(ValueError, match=name):
            list_images([name])


@pytest.mark.parametrize("size", [(40, 40), (700, 500), (299, 299), (31, 640)])  # width, height
def test_the_clean_resize_is_clean_fids_on_whole_images(size, tmp_path):
    module = pytest.importorskip("cleanfid.resize")
    # Sharp edges, at which bicubic overshoots
    noise = np.random.default_rng(0).integers(0, 2, (*size[::-1], 3)).astype(np.uint8) * 255
    Image.fromarray(noise).save(tmp_path / "a.png")
    found = ImageSet(list_images([str(tmp_path)]), CLEAN_SIZE, rule="clean")[0]["image"]
    expected = module.build_resizer("clean")(noise)
    assert found.dtype == np.float32 and np.array_equal(found.transpose(1, 2, 0), expected)


def test_images_of_shards_are_chosen_evenly(tiny_shards):
    entries = choose_images([f"{tiny_shards}/*.tar"], 3)
    assert [entry.key for entry in entries] == ["00000", "00024", "00047"]
    assert len(choose_images([f"{tiny_shards}/*.tar"], 99)) == 48
    assert len(list_pictures([f"{tiny_shards}/train-00000.tar"])) == 24
    assert spread_evenly(11, 3) == [0, 5, 10] and spread_evenly(2, 5) == [0, 1]
