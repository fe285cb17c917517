"""data/token_text.py: both stored formats, the batches, wrong and broken arrays, resuming."""

import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from data.mixture import SourceConfig
from data.token_text import TokenTextConfig, build_token_loader, read_tokens

from data.filters import FilterConfig
from data.tar import write_shard

torch.set_num_threads(1)
K, C = 6, 4


def tokenize(captions):
    return torch.tensor([[ord(c) for c in caption[:4].ljust(4)] for caption in captions])


def latent(seed):
    return np.random.default_rng(seed).standard_normal((2, K, C)).astype(np.float16)


def states(seed, length=5, width=8):
    return np.random.default_rng(seed).standard_normal((length, width)).astype(np.float16)


def sample(number, **parts):
    base = {
        "__key__": f"{number:03d}",
        "latent.npy": latent(number),
        "txt": f"text {number}",
        "json": {"n": number},
    }
    return {**base, **parts}


def write(tmp_path, samples, name="0.tar"):
    write_shard(tmp_path / name, samples)
    return str(tmp_path / name)


def config(*shards, **options):
    return TokenTextConfig(
        shards=list(shards), **{"num_workers": 0, "shuffle_buffer": 5, **options}
    )


def read(path, batch_size=8, tokenizer=None, **options):
    return list(read_tokens(config(path), K, C, tokenizer, batch_size, **options))


def test_stored_values_come_back_as_written(tmp_path):
    path = write(tmp_path, [sample(i, **{"text.npy": states(i)}) for i in range(3)])
    (batch,) = read(path, tokenizer=tokenize)
    assert set(batch) == {
        "latent_mean",
        "latent_logvar",
        "text_states",
        "token_ids",
        "caption",
        "key",
        "skipped",
    }
    stored = torch.from_numpy(np.stack([latent(i) for i in range(3)])).float()
    assert torch.equal(batch["latent_mean"], stored[:, 0]) and torch.equal(
        batch["latent_logvar"], stored[:, 1]
    )
    assert batch["latent_mean"].dtype == torch.float32 and batch["latent_logvar"].is_contiguous()
    assert batch["text_states"].dtype == torch.float16
    assert torch.equal(
        batch["text_states"], torch.from_numpy(np.stack([states(i) for i in range(3)]))
    )
    assert batch["key"] == ["000", "001", "002"] and batch["caption"] == [
        "text 0",
        "text 1",
        "text 2",
    ]
    assert torch.equal(batch["token_ids"], tokenize(batch["caption"])) and batch["skipped"] == {}


def test_headerless_release_tokens_equal_the_same_latents_in_our_format(tmp_path):
    ours = write(tmp_path, [sample(i) for i in range(2)], "ours.tar")
    flat = [
        latent(i).transpose(0, 2, 1).reshape(2 * C, K) for i in range(2)
    ]  # mean channels first, then log-variance
    release = [
        {"__key__": f"{i:03d}", "token.npy": flat[i].astype("<f2").tobytes(), "txt": "x"}
        for i in range(2)
    ]
    (expected,), (batch,) = read(ours), read(write(tmp_path, release, "release.tar"))
    assert torch.equal(batch["latent_mean"], expected["latent_mean"])
    assert torch.equal(batch["latent_logvar"], expected["latent_logvar"])


def test_samples_without_text_states_or_tokenizer_have_no_such_keys(tmp_path):
    (batch,) = read(write(tmp_path, [sample(0)]))
    assert set(batch) == {"latent_mean", "latent_logvar", "caption", "key", "skipped"}


def test_text_states_in_only_some_samples_stop_the_run_naming_both(tmp_path):
    path = write(tmp_path, [sample(0, **{"text.npy": states(0)}), sample(1)])
    with pytest.raises(ValueError, match="in 1 of 2 samples.*with it: 000, without: 001"):
        read(path)


def test_text_states_of_two_shapes_stop_the_run(tmp_path):
    path = write(
        tmp_path,
        [sample(0, **{"text.npy": states(0)}), sample(1, **{"text.npy": states(1, length=7)})],
    )
    with pytest.raises(ValueError, match=r"001.text.npy: given \(7, 8\), expected \(5, 8\)"):
        read(path)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"latent.npy": np.zeros((2, K, C + 1), np.float16)},
            r"000.latent.npy.*\(2, 6, 5\), expected \(2, 6, 4\)",
        ),
        ({"latent.npy": np.zeros((2, C, K), np.float16)}, r"expected \(2, 6, 4\)"),
        ({"latent.npy": np.zeros((2, K, C), np.float32)}, "000.latent.npy.*<f4.*expected '<f2'"),
        ({"latent.npy": np.asfortranarray(latent(0))}, "Fortran order True"),
        (
            {"text.npy": np.zeros(4, np.float16)},
            r"000.text.npy: given shape \(4,\), expected \(L, W\)",
        ),
    ],
)
def test_arrays_of_another_shape_or_type_stop_the_run_naming_key_given_and_expected(
    tmp_path, parts, message
):
    path = write(tmp_path, [sample(0, **parts)])
    with pytest.raises(ValueError, match=message):
        read(path)
    with pytest.raises(ValueError, match=message):
        next(iter(build_token_loader(config(path), K, C, None, 1, seed=0)))


def test_release_tokens_of_another_length_stop_the_run(tmp_path):
    path = write(tmp_path, [{"__key__": "a", "token.npy": bytes(90), "txt": "x"}])
    with pytest.raises(ValueError, match=r"a.token.npy: given 90 bytes, expected 96.*\(8, 6\)"):
        read(path)


def test_broken_samples_are_skipped_and_counted(tmp_path):
    good = write(tmp_path, [sample(0)])
    with open(good, "rb") as file:
        whole = file.read()[512:][: 128 + 2 * 2 * K * C]  # the npy file, as it lies in the tar
    endless = latent(0)
    endless[1, 2, 3] = np.inf
    samples = [
        sample(0),
        sample(1, **{"latent.npy": whole[:-2]}),
        sample(2, **{"latent.npy": b""}),
        sample(3, **{"latent.npy": b"\x93NUMPY\x01\x00\x05\x00{][}(((" + bytes(50)}),
        sample(4, **{"latent.npy": endless}),
        sample(5, txt=""),
        {"__key__": "006", "txt": "no latent"},
        sample(7, **{"latent.npy": whole}),
    ]
    (batch,) = read(write(tmp_path, samples, "bad.tar"))
    assert batch["key"] == ["000", "007"]
    assert batch["skipped"] == {
        "latent: truncated": 1,
        "latent: not an npy file": 2,
        "latent: not finite": 1,
        "latent: missing": 1,
        "caption: missing": 1,
    }


def test_each_sample_once_per_epoch_over_two_ranks_and_two_workers(tmp_path):
    for index in range(4):
        write(tmp_path, [sample(10 * index + i) for i in range(6)], f"{index}.tar")
    keys = Counter()
    for rank in range(2):
        cfg = config(str(tmp_path / "*.tar"), num_workers=2)
        loader = iter(build_token_loader(cfg, K, C, None, 3, seed=1, rank=rank, world_size=2))
        for _ in range(4):
            keys.update(next(loader)["key"])
    assert keys == {f"{10 * index + i:03d}": 1 for index in range(4) for i in range(6)}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_resumes_bit_for_bit(tmp_path, num_workers):
    path = write(tmp_path, [sample(i, **{"text.npy": states(i)}) for i in range(20)])

    def loader():
        return build_token_loader(
            config(path, num_workers=num_workers), K, C, tokenize, batch_size=3, seed=5
        )

    whole = loader()
    batches = iter(whole)
    for _ in range(4):
        next(batches)
    state = pickle.loads(pickle.dumps(whole.state_dict()))
    expected = [next(batches) for _ in range(5)]
    resumed = loader()
    resumed.load_state_dict(state)
    for batch, other in zip(expected, iter(resumed), strict=False):
        assert batch["key"] == other["key"]
        for name in ("latent_mean", "latent_logvar", "text_states", "token_ids"):
            assert torch.equal(batch[name], other[name])


def test_two_samples_of_one_key_keep_their_own_states(tmp_path):
    for index in range(2):
        write(tmp_path, [sample(0, **{"text.npy": states(index)})], f"{index}.tar")
    (batch,) = read(str(tmp_path / "*.tar"))
    assert torch.equal(batch["text_states"], torch.from_numpy(np.stack([states(0), states(1)])))


def test_one_pass_can_be_limited_and_given_other_shards(tmp_path):
    first = write(tmp_path, [sample(i) for i in range(4)], "0.tar")
    second = write(tmp_path, [sample(10 + i) for i in range(4)], "1.tar")
    batches = read(first, batch_size=2, shards=[second], limit=3)
    assert [batch["key"] for batch in batches] == [["010", "011"], ["012"]]


def test_each_source_has_its_own_captions_filters_and_share(tmp_path):
    first = [
        sample(i, json={"aesthetic": 4 + i % 3}, recap_txt="The image shows more")
        for i in range(12)
    ]
    second = [sample(100 + i, json={"captions": ["one", "two"]}) for i in range(12)]
    sources = {
        "first": SourceConfig([write(tmp_path, first, "0.tar")], 3.0, recaption_keys=["recap_txt"]),
        "second": SourceConfig([write(tmp_path, second, "1.tar")], filters=FilterConfig()),
    }
    filters = FilterConfig(min_aesthetic_score=5.0)
    cfg = TokenTextConfig(
        sources=sources, caption_keys=["json:captions", "txt"], filters=filters, num_workers=0
    )
    batches = iter(build_token_loader(cfg, K, C, None, 100, seed=0))
    captions, keys, skipped = Counter(), Counter(), Counter()
    for batch in (next(batches) for _ in range(4)):
        captions.update(
            caption if caption in ("more", "one", "two") else "ordinary"
            for caption in batch["caption"]
        )
        keys.update(batch["key"])
        skipped.update(batch["skipped"])
    assert (
        captions["more"] > 250
        and captions["ordinary"] > 0
        and captions["one"] > 20
        and captions["two"] > 20
    )
    assert set(keys) == {f"{i:03d}" for i in range(12) if i % 3} | {
        f"{100 + i:03d}" for i in range(12)
    }
    assert set(skipped) == {"filter: min_aesthetic_score"}
    ordered = next(read_tokens(cfg, K, C, None, 100))
    assert ordered["caption"][:1] + ordered["caption"][-1:] == ["text 1", "one"]


def test_a_crowd_of_broken_latents_stops_the_run(tmp_path):
    path = write(
        tmp_path, [sample(i, **({"latent.npy": b""} if i % 9 == 0 else {})) for i in range(120)]
    )
    for batches in (
        read_tokens(config(path), K, C, None, 8),
        iter(build_token_loader(config(path), K, C, None, 8, 0)),
    ):
        with pytest.raises(
            ValueError, match="samples are bad.*max_bad_share = 0.05.*latent: not an npy file"
        ):
            for _ in range(20):
                next(batches)
    assert len(list(read_tokens(config(path, max_bad_share=1.0), K, C, None, 8))) == 14


@pytest.mark.parametrize(
    "options", [{"shards": []}, {"caption_keys": []}, {"shuffle_buffer": -1}, {"num_workers": -2}]
)
def test_a_wrong_field_is_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        TokenTextConfig(**{"shards": ["a.tar"], **options}).validate()
