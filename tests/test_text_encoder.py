"""modeling/text_encoder.py, clip_weights.py: open_clip's states; ids and back; files; errors."""

import copy
import json
import pickle
import re
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import TINY_CLIP, refusal
from safetensors.torch import save_file

from modeling import text_encoder
from modeling.clip_weights import CONFIG_FILE, WEIGHTS_FILE, build_clip, save_clip
from modeling.text_encoder import (
    ClipTextEncoder,
    ClipTokenizer,
    TextEncoderConfig,
    TextTokenizer,
    load_text_encoder,
)

L, T = 16, 32
CAPTIONS = ["a red circle", "a black cat on a green sofa", ""]
LONG = " ".join(["circle"] * 40)


@pytest.fixture(scope="module")
def config(tiny_clip_dir):
    return TextEncoderConfig(model=f"local-dir:{tiny_clip_dir}")


@pytest.fixture(scope="module")
def tokenize(config):
    return TextTokenizer(config)


@pytest.fixture(scope="module")
def encoder(config):
    return load_text_encoder(config)


def test_states_pooled_at_the_end_token_and_projected_are_open_clips_text_features(tokenize):
    clip = build_clip(TINY_CLIP).eval()
    encoder, ids = ClipTextEncoder(copy.deepcopy(clip)), tokenize(CAPTIONS)
    states = encoder(ids)
    assert states.shape == (len(CAPTIONS), L, T) and states.dtype == torch.float32
    pooled = states[torch.arange(len(CAPTIONS)), ids.argmax(dim=-1)]
    torch.testing.assert_close(pooled @ clip.text_projection, clip.encode_text(ids))


def test_tower_of_a_clip_that_keeps_it_in_text_is_found(tokenize):
    clip, ids = build_clip(TINY_CLIP), tokenize(CAPTIONS)
    wrapper = torch.nn.Module()
    wrapper.text = copy.deepcopy(clip)
    assert torch.equal(ClipTextEncoder(wrapper)(ids), ClipTextEncoder(clip)(ids))
    with pytest.raises(ValueError, match="Linear"):
        ClipTextEncoder(torch.nn.Linear(2, 2))


def test_tower_is_frozen_and_stays_in_eval_mode(encoder, tokenize):
    assert not any(p.requires_grad for p in encoder.parameters())
    parent = torch.nn.ModuleList([encoder]).train()
    assert parent.training and not any(module.training for module in encoder.modules())
    assert not encoder(tokenize(CAPTIONS)).requires_grad
    assert encoder.shape == (L, T) and tokenize.context_length == L


def test_the_identity_follows_weights_and_activation():
    exact, quick = build_clip(TINY_CLIP), build_clip(TINY_CLIP | {"quick_gelu": True})
    quick.load_state_dict(exact.state_dict())
    towers = map(ClipTextEncoder, (exact, copy.deepcopy(exact), quick, build_clip(TINY_CLIP)))
    first, same, other_activation, other_weights = (tower.identity for tower in towers)
    assert first == same and len({first, other_activation, other_weights}) == 3


def test_a_folder_is_written_aside_and_takes_the_place_of_an_older_one(
    tmp_path, tokenize, monkeypatch
):
    folder = tmp_path / "new" / "clip"
    old, new = build_clip(TINY_CLIP), build_clip(TINY_CLIP)

    def check_states(clip):
        loaded = load_text_encoder(TextEncoderConfig(model=f"local-dir:{folder}"))
        assert torch.equal(loaded(tokenize(CAPTIONS)), ClipTextEncoder(clip)(tokenize(CAPTIONS)))

    save_clip(old, TINY_CLIP, folder)
    with monkeypatch.context() as patch:
        patch.setattr("modeling.clip_weights.save_weights", None)
        with pytest.raises(TypeError):
            save_clip(new, TINY_CLIP, folder)
    check_states(old)
    save_clip(new, TINY_CLIP, folder)
    check_states(new)
    assert [path.name for path in folder.parent.iterdir()] == ["clip"]


def test_a_model_with_another_tokenizer_than_clips_is_refused(monkeypatch):
    other = SimpleNamespace(context_length=64)  # as HFTokenizer
    monkeypatch.setattr("open_clip.get_tokenizer", lambda model: other)
    monkeypatch.setattr(text_encoder, "load_clip", None)  # before weights are downloaded
    with pytest.raises(ValueError, match="text_encoder.model ViT-B-16-SigLIP"):
        load_text_encoder(TextEncoderConfig(model="ViT-B-16-SigLIP", pretrained="webli"))

    # Theirs needs a package that may be absent
    absent = Mock(side_effect=ModuleNotFoundError("No module named 'transformers'"))
    monkeypatch.setattr("open_clip.get_tokenizer", absent)
    with pytest.raises(ValueError, match="'transformers': pip install -r requirements-text.txt$"):
        TextTokenizer(TextEncoderConfig(model="ViT-B-16-SigLIP", pretrained="webli"))


def test_ids_are_those_of_the_clip_vocabulary_at_the_folders_context_length(tokenize):
    assert torch.equal(tokenize([*CAPTIONS, LONG]), ClipTokenizer(L)([*CAPTIONS, LONG]))
    assert tokenize(["a cat"])[0, :5].tolist() == [49406, 320, 2368, 49407, 0]  # OpenAI's ids
    # What is counted is the uncut caption
    assert [tokenize.num_tokens(caption) for caption in ("", "a cat", LONG)] == [2, 4, 42]
    copied = pickle.loads(pickle.dumps(tokenize))  # as data workers get it
    assert torch.equal(copied(CAPTIONS), tokenize(CAPTIONS)) and copied.context_length == L


def test_decoding_gives_the_caption_back(tokenize):
    for caption in ("a red circle", "wow ! a cat", "!~", ""):
        assert tokenize.decode(tokenize([caption])[0]) == caption
    assert tokenize.decode(tokenize([LONG])[0]) == " ".join(["circle"] * (L - 2))
    without_end = torch.tensor([49406, 320, 2368, 0, 0])
    assert tokenize.decode(without_end) == "a cat"


def test_a_folder_that_was_cut_short_is_refused(tmp_path):
    save_clip(build_clip(TINY_CLIP), TINY_CLIP, tmp_path)
    (tmp_path / CONFIG_FILE).unlink()
    with pytest.raises(ValueError, match=f"text_encoder.model: {tmp_path} .*{CONFIG_FILE}"):
        load_text_encoder(TextEncoderConfig(model=f"local-dir:{tmp_path}"))


def test_folder_without_weights_is_refused_instead_of_giving_a_random_tower(
    tmp_path, tiny_clip_dir
):
    (tmp_path / CONFIG_FILE).write_bytes((tiny_clip_dir / CONFIG_FILE).read_bytes())
    with pytest.raises(ValueError, match="cannot load the text tower"):
        load_text_encoder(TextEncoderConfig(model=f"local-dir:{tmp_path}"))


PLAIN, QUICK = "tiny-for-tests", "tiny-for-tests-quickgelu"
REPOSITORY = "nobody/tiny_clip.openai"


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """A folder with weights of the tiny CLIP, which open_clip knows by two names, as OpenAI's."""
    folder = tmp_path_factory.mktemp("named")
    (folder / "configs").mkdir()
    for name, config in ((PLAIN, TINY_CLIP), (QUICK, TINY_CLIP | {"quick_gelu": True})):
        (folder / "configs" / f"{name}.json").write_text(json.dumps(config))
    text_encoder.open_clip.add_model_config(folder / "configs")
    save_file(build_clip(TINY_CLIP).state_dict(), folder / WEIGHTS_FILE)
    return folder


@pytest.fixture
def hub(named, monkeypatch):
    """The tag `openai` of both names; downloads give the file and are counted, without network."""
    tag = {"openai": {"hf_hub": f"{REPOSITORY}/", "quick_gelu": True}}
    for name in (PLAIN, QUICK):
        monkeypatch.setitem(text_encoder.open_clip.pretrained._PRETRAINED, name, tag)
    downloads = []

    def download(repo_id, filename, **options):
        downloads.append(f"{repo_id}/{filename}")
        return str(named / filename)

    session = SimpleNamespace(head=lambda url, timeout: None)
    monkeypatch.setattr("open_clip.pretrained.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: session)
    return downloads


def states_of(tokenize, *arguments, **options):
    """Text states of some captions by the tower of a config."""
    return load_text_encoder(TextEncoderConfig(*arguments, **options))(tokenize(CAPTIONS))


@pytest.mark.parametrize("form", ["pickle", "float16"])
def test_a_local_file_gives_the_same_states_as_the_hubs_name(named, hub, tokenize, tmp_path, form):
    file = named / WEIGHTS_FILE
    clip = build_clip(TINY_CLIP)
    if form == "float16":  # as OpenAI's are
        clip.half()
    save_file(clip.state_dict(), file)
    if form == "pickle":
        file = tmp_path / "clip.bin"
        weights = {f"module.{name}": tensor for name, tensor in clip.state_dict().items()}
        torch.save({"state_dict": weights}, file)
    from_hub = states_of(tokenize, QUICK, "openai")
    assert torch.equal(from_hub, states_of(tokenize, QUICK, str(file)))
    assert from_hub.dtype == torch.float32 and hub == [f"{REPOSITORY}/{WEIGHTS_FILE}"]


def test_the_name_or_the_option_says_the_activation_of_a_file(named, tokenize):
    file = str(named / WEIGHTS_FILE)
    quick = load_text_encoder(TextEncoderConfig(QUICK, file))
    exact = load_text_encoder(TextEncoderConfig(PLAIN, file, exact_gelu=True))
    difference = quick(tokenize(CAPTIONS)) - exact(tokenize(CAPTIONS))
    assert difference.abs().max() > 1e-4


@pytest.mark.parametrize(
    ("model", "pretrained", "exact_gelu", "keys"),
    [
        # what does not exist
        ("ViT-L-14-337", "openai", False, "text_encoder.model: .*'ViT-L-14-337'"),
        ("ViT-B-32", "opena1", False, "text_encoder.pretrained=opena1 .*ViT-B-32 .*openai, "),
        # weights that want the other activation, or may want it
        (PLAIN, "openai", False, f"set text_encoder.model={QUICK}"),
        (PLAIN, "FILE", False, f"model={QUICK}.*text_encoder.exact_gelu=true"),
        # an activation that is said already
        (QUICK, "FILE", True, "text_encoder.exact_gelu"),
        (PLAIN, "openai", True, "text_encoder.exact_gelu"),
    ],
)
def test_weights_that_are_not_there_or_of_an_unclear_activation_are_refused(
    named, hub, model, pretrained, exact_gelu, keys
):
    pretrained = pretrained.replace("FILE", str(named / WEIGHTS_FILE))
    with pytest.raises(ValueError, match=keys):
        load_text_encoder(TextEncoderConfig(model, pretrained, exact_gelu))
    assert not hub


def test_weights_in_the_hubs_cache_are_used_without_asking_the_hub(
    hub, tokenize, tmp_path, monkeypatch
):
    folder = tmp_path / f"models--{REPOSITORY.replace('/', '--')}"
    file = folder / "snapshots" / "abc" / WEIGHTS_FILE
    for path in (folder / "refs", file.parent):
        path.mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    save_file(build_clip(TINY_CLIP).state_dict(), file)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.get_session", None)
    cached = states_of(tokenize, QUICK, "openai")
    assert torch.equal(cached, states_of(tokenize, QUICK, str(file))) and not hub


def test_without_network_the_error_says_what_to_download_and_how_to_name_it(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_session", Mock(side_effect=ConnectionError))
    source = f"{WEIGHTS_FILE} of https://huggingface.co/{REPOSITORY}"
    way_out = "text_encoder.pretrained=PATH_OF_THE_FILE"
    for offline, reason in ((True, "HF_HUB_OFFLINE"), (False, "does not answer")):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        with refusal(f"{QUICK}, openai", reason, source, way_out):
            load_text_encoder(TextEncoderConfig(QUICK, "openai"))
    assert not hub


def test_a_repository_that_cannot_be_had_is_named_with_the_way_to_use_its_files(monkeypatch):
    monkeypatch.setattr("open_clip.pretrained.hf_hub_download", None)
    with pytest.raises(ValueError, match="huggingface.co/a/b elsewhere.*model=local-dir:FOLDER"):
        load_text_encoder(TextEncoderConfig("hf-hub:a/b"))


# torch gives TorchScript up
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_openais_own_torchscript_file_is_refused_with_a_command_that_makes_it_readable(
    tokenize, named, tmp_path
):
    clip = build_clip(TINY_CLIP).eval().half()
    rounded = copy.deepcopy(clip).float()
    # The state dict of OpenAI's files has no mask, but three numbers.
    clip.register_buffer("attn_mask", None)
    for name in ("input_resolution", "context_length", "vocab_size"):
        vars(clip).pop(name, None)
        clip.register_buffer(name, torch.tensor(7))
    file = tmp_path / "ViT-L-14-336px.pt"
    example = (torch.randn(1, 3, 32, 32).half(), tokenize(CAPTIONS[:1]))
    torch.jit.trace(clip, example, check_trace=False, strict=False).save(str(file))
    with pytest.raises(ValueError, match="TorchScript") as error:
        load_text_encoder(TextEncoderConfig(QUICK, str(file)))
    exec(re.search(r'python -c "(.+?)" and', str(error.value))[1], {})
    states = states_of(tokenize, PLAIN, f"{file}.safetensors", exact_gelu=True)
    assert torch.equal(states, ClipTextEncoder(rounded)(tokenize(CAPTIONS)))


@pytest.mark.parametrize("name", ["clip.pt", "clip.safetensors"])
def test_a_broken_weights_file_is_named_in_one_line(named, tmp_path, name):
    file = tmp_path / name
    file.write_bytes(b"PK\x03\x04")
    with refusal(f"cannot load the text tower {QUICK}, {file}: "):
        load_text_encoder(TextEncoderConfig(QUICK, str(file)))


def test_under_bf16_autocast_the_weights_and_the_final_norm_stay_float32(encoder, tokenize):
    with torch.autocast("cpu", torch.bfloat16):
        states = encoder(tokenize(CAPTIONS))
    assert {p.dtype for p in encoder.parameters()} == {states.dtype} == {torch.float32}
    assert 0 < (states - encoder(tokenize(CAPTIONS))).abs().max() < 0.1


def test_the_package_is_whole_after_code_that_looks_at_all_modules():
    code = """
import torch
from modeling.clip_weights import open_clip
with torch.compiler.set_stance("force_eager"):
    torch.func.jvp(torch.sin, (torch.ones(3),), (torch.ones(3),))
assert open_clip.model.CLIP
"""
    subprocess.run([sys.executable, "-c", code], check=True)
