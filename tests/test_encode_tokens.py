"""scripts/encode_tokens.py: what token shards hold, views, filters, workers; killed and run again."""

import io
import json
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import shape_sample
from test_resume import ROOT, contents, environment, program, start

from data.tar import read_shard, write_shard
from scripts import encode_tokens
from training.tokens import TokensInfo

SMALL = ("store_text_states=false", "data.num_workers=0")


def encode(chain, folder, shards, *options):
    patterns = ",".join(map(str, shards))
    return chain.run_in(folder, "tokens", f"data.shards=[{patterns}]", *SMALL, *options)


def samples_of(folder):
    return {s["__key__"]: s for path in sorted(folder.glob("*.tar")) for s in read_shard(path)}


def latent(sample):
    return np.load(io.BytesIO(sample["latent.npy"]))


@pytest.fixture
def captioned(tmp_path):
    """Shards a.tar (4 images with several captions) and b.tar (2 images, one of them cut off)."""
    folder = tmp_path / "images"
    folder.mkdir()
    samples = [shape_sample(number) for number in range(6)]
    for number, sample in enumerate(samples):
        captions = [sample["txt"], "another one"]
        sample["json"] = json.dumps({"captions": captions, "width": 100 + number})
        sample["recap_txt"] = "The image shows a shape"
    samples[5]["png"] = samples[5]["png"][:60]
    write_shard(folder / "a.tar", samples[:4])
    write_shard(folder / "b.tar", samples[4:])
    return folder


def test_token_samples_keep_every_caption_and_the_json(chain, tmp_path, captioned):
    folder = encode(chain, tmp_path, [captioned / "a.tar"])
    images = {s["__key__"]: s for s in read_shard(captioned / "a.tar")}
    tokens = samples_of(folder)
    assert tokens.keys() == images.keys()
    for key, sample in tokens.items():
        assert set(sample) == {"__key__", "latent.npy", "txt", "json", "recap_txt"}
        assert all(sample[name] == images[key][name] for name in ("txt", "json", "recap_txt"))
        assert latent(sample).shape == (2, 16, 4) and latent(sample).dtype == np.float16


def test_the_report_says_how_long_the_network_waited_for_images(
    chain, tmp_path, captioned, capsys, monkeypatch
):
    now, build, latents = [0.0], encode_tokens.build_encoding_loader, encode_tokens.Encoder.latents

    def slow_images(*arguments):
        for item in build(*arguments):
            now[0] += 3
            yield item

    def encode_in_a_second(encoder, images):
        now[0] += 1
        return latents(encoder, images)

    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(encode_tokens, "time", clock)
    monkeypatch.setattr("training.metrics.time", clock)
    monkeypatch.setattr(encode_tokens, "build_encoding_loader", slow_images)
    monkeypatch.setattr(encode_tokens.Encoder, "latents", encode_in_a_second)
    encode(chain, tmp_path, [captioned / "a.tar"], "batch_size=2")
    # two batches and the shard's end: 9 s of waiting, 2 s of work
    assert f"{9 / 11:.1%} of the time waiting for images" in capsys.readouterr().out


def test_mirrored_and_cropped_views_are_samples_of_their_own(chain, tmp_path, captioned):
    plain = samples_of(encode(chain, tmp_path / "plain", [captioned / "a.tar"]))
    folder = encode(chain, tmp_path / "views", [captioned / "a.tar"], "flip=true", "num_crops=2")
    views = samples_of(folder)
    suffixes = ("-crop0", "-crop1", "-crop0-flip", "-crop1-flip")
    assert views.keys() == {key + suffix for key in plain for suffix in suffixes}
    for key, sample in plain.items():  # the images are square: all crops are the whole
        assert np.array_equal(latent(views[key + "-crop0"]), latent(sample))
        assert np.array_equal(latent(views[key + "-crop1"]), latent(sample))
        assert not np.array_equal(latent(views[key + "-crop0-flip"]), latent(sample))
    info = TokensInfo.load(folder)
    assert (info.num_samples, info.flip, info.num_crops) == (16, True, 2)


def test_what_is_skipped_is_counted_also_over_a_restart_and_an_empty_shard_is_no_error(
    chain, tmp_path, captioned
):
    shards, lenient = [captioned / "a.tar", captioned / "b.tar"], "data.max_bad_share=1"
    filters = "data.filters.min_longer_side=33"
    assert TokensInfo.load(encode(chain, tmp_path / "good", shards[:1], lenient)).skipped == {}
    folder = encode(chain, tmp_path / "bad", shards, lenient)
    info = TokensInfo.load(folder)
    assert info.num_samples == 5
    assert sum(info.skipped.values()) == 1 and "image: " in next(iter(info.skipped))
    assert sorted(path.name for path in folder.iterdir()) == [
        "a.tar",
        "b.tar",
        "latent_stats.json",
        "tokens.json",
        "vocabulary.json",
    ]
    with pytest.raises(ValueError, match="no usable sample"):  # nothing at all: no statistics
        encode(chain, tmp_path / "none", shards, lenient, filters)
    filtered = [
        json.loads(p.read_text()) for p in sorted((tmp_path / "none/tokens").glob("*.count.json"))
    ]
    assert [c["num_samples"] for c in filtered] == [0, 0]
    assert [sum(c["skipped"].values()) for c in filtered] == [4, 2]


def test_the_number_of_workers_changes_no_byte(chain, tmp_path, tiny_shards):
    for workers in (1, 3):
        folder = chain.run_in(tmp_path / str(workers), "tokens", f"data.num_workers={workers}")
        assert contents(folder) == contents(chain.folder / "tokens")


def test_bf16_encodes_nearly_the_same_latents(chain, tmp_path, captioned):
    folders = [
        encode(chain, tmp_path / p, [captioned / "a.tar"], f"precision={p}")
        for p in ("fp32", "bf16")
    ]
    exact, half = map(samples_of, folders)
    differences = [
        np.abs(latent(exact[key]).astype(float) - latent(half[key])).max() for key in exact
    ]
    assert 0 < max(differences) < 0.2


def test_each_data_set_of_a_mixture_keeps_its_own_filters(chain, tmp_path, captioned):
    x = f"x: {{shards: [{captioned}/a.tar], filters: {{min_longer_side: 33}}}}"
    both = f"{{{x}, y: {{shards: [{captioned}/b.tar]}}}}"
    options = ("data.shards=[]", f"data.sources={both}", "data.max_bad_share=1", *SMALL)
    info = TokensInfo.load(chain.run_in(tmp_path, "tokens", *options))
    assert info.num_samples == 1 and info.skipped["filter: min_longer_side"] == 4


def test_states_of_one_caption_are_not_stored_for_several(chain):
    for option in (
        "data.captions.keys=[json:captions]",
        "data.captions.recaption_keys=[recap_txt]",
    ):
        with pytest.raises(
            ValueError, match="store_text_states=true stores the states of one caption"
        ):
            chain.config("tokens", option)


def test_killed_at_random_moments_and_run_again_it_writes_identical_bytes(chain, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for shard in range(6):
        write_shard(
            images / f"{shard}.tar",
            [shape_sample(number) for number in range(shard * 40, shard * 40 + 40)],
        )
    options = [f"data.shards=[{images}/*.tar]", "data.num_workers=1", "batch_size=4"]
    whole = chain.run_in(tmp_path / "whole", "tokens", *options)
    command = [
        sys.executable,
        "-m",
        "scripts.encode_tokens",
        *program(chain, tmp_path / "killed", "tokens", *options),
    ]
    folder, kills = tmp_path / "killed" / "tokens", 0
    rng = np.random.default_rng(0)
    for _ in range(4):
        process = start(command)
        while not (folder / "source.json").is_file() and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if (folder / "tokens.json").is_file():
            break
    chain.run_in(tmp_path / "killed", "tokens", *options)
    assert kills and contents(folder) == contents(whole)


def test_the_program_reports_a_bad_tokenizer_run_in_one_line(chain, tmp_path):
    words = program(chain, tmp_path, "tokens", f"tokenizer_run={chain.folder}/flowtok")
    process = start([sys.executable, "-m", "scripts.encode_tokens", *words])
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and "is a run of stage 'flowtok'" in output
    assert environment()["PYTHONPATH"] == str(ROOT) and not (tmp_path / "tokens").exists()
