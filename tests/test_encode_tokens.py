"""scripts/encode_tokens.py: what token shards hold, views, filters, workers; run again."""

import io
import json
import os
import re
import resource
import shutil
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from conftest import full_disk, refusal, shape_sample
from forks import Program, can_mount, mount_little
from PIL import Image
from test_resume import contents, program

from data.captions import CaptionConfig
from data.images import ImageTextConfig, ShardEnd, encoding_sources
from data.readers import TokenTextConfig
from data.tar import read_shard, write_shard
from scripts import encode_tokens
from training.loading import text_encoder_config
from training.run import locked, start_run
from training.tokens import TokensInfo, open_stored_captions, refuse_damage

SMALL = ("store_text_states=false", "data.num_workers=0")


def encode(chain, folder, shards, *options):
    patterns = ",".join(map(str, shards))
    return chain.run_in(folder, "tokens", f"data.shards=[{patterns}]", *SMALL, *options)


def samples_of(folder):
    return {s["__key__"]: s for path in sorted(folder.glob("*.tar")) for s in read_shard(path)}


def latent(sample):
    return np.load(io.BytesIO(sample["latent.npy"]))


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Shards a.tar (4 images with several captions) and b.tar (2 images, one of them cut off)."""
    folder = tmp_path_factory.mktemp("images")
    samples = [shape_sample(number) for number in range(6)]
    for number, sample in enumerate(samples):
        captions = [sample["txt"], "another one"]
        sample["json"] = json.dumps({"captions": captions, "width": 100 + number})
        sample["recap_txt"] = "The image shows a shape"
    samples[5]["png"] = samples[5]["png"][:60]
    write_shard(folder / "a.tar", samples[:4])
    write_shard(folder / "b.tar", samples[4:])
    return folder


@pytest.fixture(scope="module")
def encoded(chain, captioned, tmp_path_factory):
    """The tokens of its a.tar; tests leave them as they are."""
    return encode(chain, tmp_path_factory.mktemp("encoded"), [captioned / "a.tar"])


def test_token_samples_keep_every_caption_and_the_json(captioned, encoded):
    images = {s["__key__"]: s for s in read_shard(captioned / "a.tar")}
    tokens = samples_of(encoded)
    assert tokens.keys() == images.keys()
    for key, sample in tokens.items():
        assert set(sample) == {"__key__", "latent.npy", "txt", "json", "recap_txt"}
        assert all(sample[name] == images[key][name] for name in ("txt", "json", "recap_txt"))
        assert latent(sample).shape == (2, 16, 4) and latent(sample).dtype == np.float16


def test_mirrored_and_cropped_views_are_samples_of_their_own(chain, tmp_path, captioned, encoded):
    plain = samples_of(encoded)
    folder = encode(chain, tmp_path, [captioned / "a.tar"], "flip=true", "num_crops=2")
    views = samples_of(folder)
    suffixes = ("-crop0", "-crop1", "-crop0-flip", "-crop1-flip")
    assert views.keys() == {key + suffix for key in plain for suffix in suffixes}
    for key, sample in plain.items():  # the images are square: all crops are the whole
        assert np.array_equal(latent(views[key + "-crop0"]), latent(sample))
        assert np.array_equal(latent(views[key + "-crop1"]), latent(sample))
        assert not np.array_equal(latent(views[key + "-crop0-flip"]), latent(sample))
    info = TokensInfo.load(folder)
    assert (info.num_samples, info.flip, info.num_crops) == (16, True, 2)


def test_crops_lie_evenly_along_the_longer_side_with_both_ends(captioned):
    columns = np.repeat(np.arange(48, dtype=np.uint8)[None], 16, axis=0)
    png = io.BytesIO()
    Image.fromarray(columns).convert("RGB").save(png, "PNG")
    [source] = encoding_sources(ImageTextConfig([str(captioned / "a.tar")]), 16, num_crops=3)
    views = source.decode({"__key__": "a", "png": png.getvalue(), "txt": b"a"}, None)["image"]
    assert views[:, 0, 0].tolist() == [[*range(left, left + 16)] for left in (0, 16, 32)]


def test_what_is_skipped_is_counted_and_named_and_an_empty_shard_is_no_error(
    chain, tmp_path, captioned, capsys
):
    shards, lenient = [captioned / "a.tar", captioned / "b.tar"], "data.max_bad_share=1"
    folder = encode(chain, tmp_path / "bad", shards, lenient)
    info, printed = TokensInfo.load(folder), capsys.readouterr()
    assert info.num_samples == 5
    assert sum(info.skipped.values()) == 1 and "image: " in next(iter(info.skipped))
    assert re.search(r"image: .*: 1, the first: 00005 \(members png txt", printed.out)
    assert re.search(r"5 images, [\d.]+% of the time waiting for images", printed.err)
    names = "a.tar b.tar latent_stats.json source.json tokens.json vocabulary.json"
    assert contents(folder).keys() == {*names.split()}
    with pytest.raises(ValueError, match="no usable sample"):  # nothing at all: no statistics
        encode(chain, tmp_path / "none", shards, lenient, "data.filters.min_longer_side=33")
    files = sorted((tmp_path / "none/tokens").glob("*.count.json"))
    filtered = [json.loads(path.read_text()) for path in files]
    assert [counts["num_samples"] for counts in filtered] == [0, 0]
    assert [sum(counts["skipped"].values()) for counts in filtered] == [4, 2]


def test_the_vocabulary_is_of_the_captions_that_are_read_whatever_the_text_members_hold(tmp_path):
    config = encode_tokens.TokensStage(data=ImageTextConfig(["a.tar"]))
    sample = {"__key__": "a", "txt": "ein Hündchen".encode("utf-16")}
    shards, read = (None, tmp_path / "a.tar"), (["ein Hündchen"], ShardEnd(1, {}, {}))
    encode_tokens.write_tokens(config, *shards, [sample], *read)
    written = encode_tokens.read_counts(tmp_path / "a.tar", None)
    assert written["vocabulary"]["words"] == ["ein", "hündchen"]
    assert next(read_shard(tmp_path / "a.tar"))["txt"] == sample["txt"]


# what the tokens are made of


def remake(path, sample):
    """A shard under the same name: as it was, with another sample, or only touched."""
    samples = [shape_sample(number) for number in range(4)]
    if sample is not None:
        samples[2] |= sample
    write_shard(path, samples)


@pytest.mark.parametrize(
    ("sample", "is_whole"),
    [({"txt": "a corrected caption"}, True), ({"png": shape_sample(9)["png"]}, False)],
)
def test_image_shards_made_anew_under_the_same_names_are_refused(chain, tmp_path, sample, is_whole):
    for name in "ab":
        remake(tmp_path / f"{name}.tar", None)
    shards = [f"{tmp_path}/*.tar"]
    folder = encode(chain, tmp_path / "run", shards)
    before = contents(folder)
    assert contents(encode(chain, tmp_path / "run", shards)) == before
    if not is_whole:
        (folder / "a.tar").unlink()
    remake(tmp_path / "b.tar", sample)
    with pytest.raises(ValueError, match=r"source: .*\.b\.tar was .*bytes, .* is .*Delete it"):
        encode(chain, tmp_path / "run", shards)
    # they are the same after all, says the user
    (folder / "source.json").unlink()
    encode(chain, tmp_path / "run", shards)
    after = contents(folder)
    assert after.pop("source.json") != before.pop("source.json") and after == before


def test_whole_tokens_need_their_images_no_more(chain, tmp_path, capsys):
    for name in "ab":
        remake(tmp_path / f"{name}.tar", None)
    shards = [tmp_path / "a.tar", tmp_path / "b.tar"]
    folder = encode(chain, tmp_path / "run", shards)
    before = contents(folder)
    shards[1].unlink()
    assert contents(encode(chain, tmp_path / "run", shards)) == before
    said = capsys.readouterr().out.splitlines()[-1]
    assert "complete" in said and str(shards[1]) in said
    with pytest.raises(ValueError, match="flip was False, is True"):
        encode(chain, tmp_path / "run", shards, "flip=true")
    (folder / "a.tar").unlink()
    with pytest.raises(ValueError, match="b.tar, which does not exist"):
        encode(chain, tmp_path / "run", shards)


def test_token_shards_that_were_cut_short_or_lost_are_made_again(
    chain, tmp_path, captioned, capsys, monkeypatch
):
    def cannot_write(*arguments):
        raise OSError

    shards, lenient = [captioned / "a.tar", captioned / "b.tar"], "data.max_bad_share=1"
    folder = encode(chain, tmp_path, shards, lenient)
    before = contents(folder)
    os.truncate(folder / "a.tar", 1000)
    (folder / "b.tar").unlink()
    cut, lost = TokensInfo.load(folder).damage(folder)
    assert cut.startswith("a.tar has 1000 bytes instead of") and lost == "b.tar is missing"
    with refusal(cut):
        refuse_damage(TokenTextConfig([f"{folder}/*.tar"]))
    with monkeypatch.context() as patch, pytest.raises(OSError):  # and stopped meanwhile
        patch.setattr(encode_tokens, "write_shard", cannot_write)
        encode(chain, tmp_path, shards, lenient)
    encode(chain, tmp_path, shards, lenient)
    assert "2 shards are lost or damaged, made again: a.tar, b.tar" in capsys.readouterr().out
    assert contents(folder) == before


def test_later_stages_tell_tokens_of_other_captions_apart(chain, tmp_path):
    inputs = []
    for number, caption in enumerate(("", "a corrected caption", "")):
        remake(tmp_path / "a.tar", {"txt": caption} if caption else None)
        folder = encode(chain, tmp_path / str(number), [f"{tmp_path}/a.tar"])
        inputs.append(TokensInfo.load(folder).inputs())
    first, other, again = inputs
    assert first == again
    assert {name for name in first if first[name] != other[name]} == {"tokens"}


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("data.filters.min_longer_side=20", "data.filters.min_longer_side was 0, is 20"),
        ("precision=bf16", "precision was fp32, is bf16"),
        ("store_text_states=true", "has_text_states was False, is True"),
        ("data.shards=[IMAGES/b.tar]", "shards was ['a.tar'], is ['b.tar']"),
    ],
)
def test_tokens_of_other_options_are_refused(chain, captioned, encoded, option, named):
    option, before = option.replace("IMAGES", str(captioned)), contents(encoded)
    with refusal(named):
        encode(chain, encoded.parent, [captioned / "a.tar"], option)
    assert contents(encoded) == before


def test_the_number_of_workers_changes_no_byte(chain, tmp_path, tiny_shards):
    for workers in (1, 3):
        folder = chain.run_in(tmp_path / str(workers), "tokens", f"data.num_workers={workers}")
        assert contents(folder) == contents(chain.folder / "tokens")


def test_bf16_encodes_nearly_the_same_latents(chain, tmp_path, captioned, encoded):
    exact = samples_of(encoded)
    half = samples_of(encode(chain, tmp_path, [captioned / "a.tar"], "precision=bf16"))
    differences = [latent(exact[key]).astype(float) - latent(half[key]) for key in exact]
    assert 0 < np.abs(differences).max() < 0.2


def test_each_data_set_of_a_mixture_keeps_its_own_filters(chain, tmp_path, captioned):
    x = f"x: {{shards: [{captioned}/a.tar], filters: {{min_longer_side: 33}}}}"
    both = f"{{{x}, y: {{shards: [{captioned}/b.tar]}}}}"
    options = ("data.shards=[]", f"data.sources={both}", "data.max_bad_share=1", *SMALL)
    info = TokensInfo.load(chain.run_in(tmp_path, "tokens", *options))
    assert info.num_samples == 1 and info.skipped["filter: min_longer_side"] == 4


@pytest.mark.parametrize(
    "option", ["keys=[json:captions]", "recaption_keys=[recap_txt]", "window=sentences"]
)
def test_states_of_one_caption_are_neither_stored_nor_read_for_several(chain, tmp_path, option):
    with pytest.raises(ValueError, match="store_text_states=true stores .* of one caption"):
        chain.config("tokens", f"data.captions.{option}")

    # nor are they read for another one, by a stage that trains on the tokens
    with pytest.raises(ValueError, match=r"data\.captions draws .*store_text_states=false"):
        chain.run_in(tmp_path, "text_projector", f"data.captions.{option}")


def test_captions_that_are_drawn_are_not_read_with_the_stored_states_of_another(chain, tmp_path):
    run = start_run(tmp_path, "fp32", seed=0)
    config = chain.config("text_decoder")
    tower = text_encoder_config(chain.folder / "tokenizer")

    def reads_states(**captions):
        data = replace(config.data, captions=CaptionConfig(**captions))
        captions = open_stored_captions(run, data, config.training, tower)
        return "text_states" in next(captions.reader.once(1))

    assert reads_states()
    assert not reads_states(keys=["json:captions", "txt"])
    assert not reads_states(recaption_keys=["txt"])


def test_tokens_that_another_process_writes_are_left_alone(chain, tmp_path, captioned):
    folder = tmp_path / "tokens"
    with locked(start_run(folder, "fp32", seed=0)), refusal(folder, f"process {os.getpid()}"):
        encode(chain, tmp_path, [captioned / "a.tar"])
    assert not contents(folder)


def test_an_encoding_that_ends_just_before_the_look_is_not_made_again(
    chain, tmp_path, captioned, encoded, monkeypatch, capsys
):
    @contextmanager
    def locked_after_another_has_ended(run):
        shutil.copytree(encoded, run.folder)
        yield

    monkeypatch.setattr(encode_tokens, "locked", locked_after_another_has_ended)
    encode(chain, tmp_path, [captioned / "a.tar"])
    assert "complete, 1 shards, nothing to do" in capsys.readouterr().out


def test_killed_at_random_moments_and_run_again_it_writes_identical_bytes(chain, tmp_path):
    for shard in range(6):
        samples = [shape_sample(number) for number in range(shard * 40, shard * 40 + 40)]
        write_shard(tmp_path / f"{shard}.tar", samples)
    options = [f"data.shards=[{tmp_path}/*.tar]", "data.num_workers=1", "batch_size=4"]
    whole = chain.run_in(tmp_path / "whole", "tokens", *options)
    words = program(chain, tmp_path / "killed", "tokens", *options)
    folder, kills = tmp_path / "killed" / "tokens", 0
    rng = np.random.default_rng(0)
    for number in range(4):
        running = Program(tmp_path / f"log{number}", "scripts.encode_tokens", *words)
        running.wait_until((folder / "source.json").is_file)
        time.sleep(rng.uniform(0, 0.3))
        kills += running.process.exitcode is None
        with suppress(ProcessLookupError):  # it was through
            running.kill()
        if (folder / "tokens.json").is_file():
            break
    # a shard is whole once its counts are there
    done = [folder / path.name.removesuffix(".count.json") for path in folder.glob("*.count.json")]
    written = {path: path.stat().st_mtime_ns for path in done}
    chain.run_in(tmp_path / "killed", "tokens", *options)
    assert kills and contents(folder) == contents(whole)
    assert all(path.stat().st_mtime_ns == moment for path, moment in written.items())


# disks, workers, shared memory


def test_a_full_disk_names_the_file_and_leaves_nothing_half_written(chain, tmp_path, captioned):
    with full_disk(4096), pytest.raises(OSError, match="too large.*run/tokens/a.tar"):
        encode(chain, tmp_path / "run", [captioned / "a.tar"])
    assert contents(tmp_path / "run/tokens").keys() == {"source.json"}


def test_a_shard_of_which_not_all_images_arrived_is_not_written(
    chain, tmp_path, captioned, monkeypatch
):
    build = encode_tokens.build_encoding_loader

    def lossy(*arguments):
        return list(build(*arguments))[1:]

    monkeypatch.setattr(encode_tokens, "build_encoding_loader", lossy)
    with pytest.raises(ChildProcessError, match=r"a\.tar is not written: of the 4 .* 2 arrived"):
        encode(chain, tmp_path, [captioned / "a.tar"], "batch_size=2")
    assert not list((tmp_path / "tokens").glob("*.tar"))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A shard of 800 images, which are 2.5 MB as pixels."""
    sample, path = shape_sample(0), tmp_path_factory.mktemp("many") / "many.tar"
    write_shard(path, ({**sample, "__key__": f"{i:05d}"} for i in range(800)))
    return path


@pytest.mark.parametrize("name", ["encoding", "training", "evaluation"])
def test_too_little_shared_memory_ends_the_program_with_one_line(chain, tmp_path, many, name):
    # 1 MB is left; the second way needs no privileges
    little = partial(mount_little, "/dev/shm", "1m")
    if not can_mount():
        little = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    if name == "evaluation":
        words = ["eval.reconstruction", chain.folder / "tokenizer", many, "--output"]
        words += [tmp_path / "r.json", "--batch-size=800", "--num-workers=2", "--device=cpu"]
    else:
        script = "scripts.encode_tokens" if name == "encoding" else "train_tokenizer.py"
        stage, prefix = ("tokens", "") if name == "encoding" else ("tokenizer", "training.")
        options = [f"data.shards=[{many}]", "data.num_workers=2", f"{prefix}batch_size=800"]
        words = [script, *program(chain, tmp_path, stage, *options)]
    running = Program(tmp_path / "log", *map(str, words), first=little)
    assert running.wait() == 2, running.output
    lines = [line for line in running.output.splitlines() if "error: " in line]
    assert len(lines) == 1, running.output
    assert re.search(r"batch of 2\.\d MB in /dev/shm, where .* --shm-size", lines[0]), lines
    assert not list(tmp_path.rglob("*.tar*")) and not (tmp_path / "r.json").exists()
