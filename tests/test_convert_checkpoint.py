"""scripts/convert_checkpoint.py, modeling/released.py: the release's numbers; what is refused.

tests/released holds names and shapes of the released files, and what the release computes with two
little models.
"""

import json
import math
import os
import re
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluations import run_program
from safetensors.torch import load_file
from sources import Evil

from modeling.clip_weights import build_clip, save_clip
from modeling.flow import FlowConfig
from modeling.flow_model import build_flow
from modeling.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from modeling.layers import sincos_position_table
from modeling.pipeline import SamplingConfig
from modeling.released import convert, rope_tables
from scripts import convert_checkpoint
from training.checkpoint import EMA_FILE, latest_checkpoint
from training.loading import read_run_config, read_section, text_encoder_config
from training.pipelines import load_flow, load_pipeline

RELEASED = Path(__file__).parent / "released"
FLOW, TOKENIZER = "flowtok_tiny", "flowtitok_small_64"
BASE, LARGE = (768, 12, 12), (1024, 24, 16)  # width, depth, heads
FULL_SIZE = {
    "flowtok_b": [BASE],
    "flowtok_xl": [(1152, 28, 16)],
    "flowtok_h": [(1280, 36, 20)],
    "flowtitok_256": [BASE, LARGE],
    "flowtitok_512": [BASE, LARGE],
}
# The text tower of the release has states of 77 x 768, too.
CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "patch_size": 16, "width": 16, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 1},
}
SCALE = "projector.alignment.log_temperature"
BLOCK = re.compile(r"\b(blocks|layers|transformer)\.\d+\.")


def shapes(name):
    """Tensor name -> shape, as in a released file."""
    return json.loads((RELEASED / f"{name}.tensors.json").read_text())


def tables(name):
    """The fixed tables of a file."""
    if "pos_embed" in shapes(name):
        _, length, width = shapes(name)["pos_embed"]
        return {"pos_embed": sincos_position_table(length, width)[None]}
    size = int(name.rpartition("_")[2])
    return rope_tables(ImageTokenizerConfig(image_size=size, num_tokens=77))


def weights(name):
    """The little models' weights: each tensor drawn from its name, as the vectors were made."""
    drawn = {"t2t_temperature": torch.tensor(math.log(1 / 0.07))} if name == FLOW else {}
    for key, shape in shapes(name).items():
        if len(shape) == 1:
            x = 0.1 * normal(zlib.crc32(key.encode()), *shape)
            drawn[key] = 1 + x if key.endswith((".weight", ".g")) else x
        elif shape:
            scale = float(np.float32(math.sqrt(math.prod(shape[1:]))))
            drawn[key] = normal(zlib.crc32(key.encode()), *shape) / scale
    return drawn | tables(name)


def only_shapes(name):
    """Meta tensors of a file's names and shapes, and its fixed tables."""
    empty = {key: torch.empty(shape, device="meta") for key, shape in shapes(name).items()}
    return empty | tables(name)


def light(name):
    """Zeros of a file's shapes that take no space, in memory or in a file."""
    return {key: torch.zeros(()).expand(shape) for key, shape in shapes(name).items()}


run_script = partial(run_program, convert_checkpoint)


def convert_file(file):
    """What the script makes of the tensors in a file."""
    return convert_checkpoint.convert_file(file, num_heads=4).tensors


def convert_saved(tensors, file):
    torch.save(tensors, file)
    return convert_file(file)


def normal(seed, *shape):
    """float32 standard normal numbers."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def vectors(name, key):
    """What the release computes."""
    with np.load(RELEASED / f"{name}.vectors.npz") as file:
        return torch.from_numpy(file[key])


def assert_near(actual, expected, tolerance=2e-4):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The two little models as released files."""
    folder = tmp_path_factory.mktemp("files")
    torch.save(weights(FLOW), folder / "flow.pth")
    torch.save({"model": weights(TOKENIZER)}, folder / "tokenizer.bin")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, files):
    """The experiment's folder that the script makes of both files, with a text tower beside it."""
    folder = tmp_path_factory.mktemp("runs")
    save_clip(build_clip(CLIP), CLIP, folder / "tower")
    chosen = ["--num-heads", 4, "--text-encoder-model", f"local-dir:{folder / 'tower'}"]
    run_script(files / "flow.pth", files / "tokenizer.bin", "--run", folder / "released", *chosen)
    return folder / "released"


@pytest.fixture(scope="module")
def parts(run):
    """What sample.py loads from the run folder, wherever it lies."""
    moved = run.rename(run.with_name("moved"))
    try:
        return load_pipeline(moved, torch.device("cpu"))[0]
    finally:
        moved.rename(run)


# The release's numbers


def test_the_projector_computes_what_the_release_computes(parts):
    states = normal(1, 2, 77, 768)
    posterior = parts.flow.projector.posterior(states)
    assert_near(posterior.mean, vectors(FLOW, "text_mean"))
    assert_near(posterior.logvar, vectors(FLOW, "text_logvar"))
    assert_near(parts.flow.projector.alignment(states), vectors(FLOW, "align_target"))


def test_the_velocity_is_the_releases_with_and_without_the_indicator(parts):
    null = torch.tensor([False, True])
    velocity = parts.flow.flowtok(normal(2, 2, 77, 16), torch.tensor([0.25, 0.75]), null)
    assert_near(velocity, vectors(FLOW, "velocity"))


def test_twenty_steps_on_the_releases_time_grid_end_where_the_release_ends(parts):
    release = {"sampler": "euler_release", "sample_text_latent": False}
    states = normal(1, 2, 77, 768)
    start = parts.start(states, SamplingConfig(**release), 0, [0, 1])
    ends = parts.transport(start, states, SamplingConfig(**release)) * 1.0143
    assert_near(ends, vectors(FLOW, "sampled"), 2e-3)
    other = parts.transport(start, states, SamplingConfig()) * 1.0143
    assert (other - ends).abs().max() > 2e-3  # the consistent grid is another one


def test_the_tokenizer_encodes_and_decodes_as_the_release_does(parts):
    draw_random = np.random.default_rng(3)
    image = torch.from_numpy(draw_random.random((1, 3, 64, 64)).astype(np.float32))
    states = torch.from_numpy(draw_random.standard_normal((1, 77, 768)).astype(np.float32))
    posterior = parts.tokenizer.encode(image)
    for ours, name in ((posterior.mean, "mean"), (posterior.logvar, "logvar")):
        assert_near(ours, vectors(TOKENIZER, name).squeeze(2).mT)  # 1 x 16 x 1 x 77 there
    k = int(vectors(TOKENIZER, "k"))
    pixels = parts.tokenizer.decode(posterior.mean, states)
    assert_near(pixels[:, :, ::k, ::k], vectors(TOKENIZER, "decoded_every_kth_pixel"))


@pytest.mark.parametrize("file", FULL_SIZE)
def test_the_published_files_convert_to_networks_of_the_published_size(file):
    converted = convert(only_shapes(file))
    networks = converted.networks
    with torch.device("meta"):
        if converted.stage == "flowtok":
            module, sizes = build_flow(**networks, flow=FlowConfig()), [networks["flowtok"]]
        else:
            module = ImageTokenizer(networks["tokenizer"])
            sizes = [module.config.encoder, module.config.decoder]
            assert module.config.image_size == int(file.rpartition("_")[2])
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    assert {name: tensor.shape for name, tensor in converted.tensors.items()} == expected
    assert [(size.width, size.depth, size.num_heads) for size in sizes] == FULL_SIZE[file]


# What is written


def test_what_loading_reads_is_written_once_and_nothing_else(run):
    found = {path.relative_to(run).as_posix() for path in run.rglob("*.*")}
    checkpoint = "checkpoints/step_00000000"
    names = ("config.yaml", f"{checkpoint}/ema.safetensors", f"{checkpoint}/state.json")
    assert found == {f"{stage}/{name}" for stage in ("flowtok", "tokenizer") for name in names}
    assert sorted(path.name for path in run.parent.iterdir()) == ["released", "tower"]
    assert text_encoder_config(run / "tokenizer").model == f"local-dir:{run.parent / 'tower'}"
    flow = read_run_config(run / "flowtok")
    assert (flow.stage, flow.tokenizer_run) == ("flowtok", str(run / "tokenizer"))
    assert read_section(run / "flowtok", "sampling", SamplingConfig) == SamplingConfig()
    assert load_flow(run / "flowtok").config == FlowConfig()
    assert all(flow.pictures.captions)


def test_one_file_becomes_one_run_folder(files, run, tmp_path):
    (tmp_path / "mine").mkdir()  # an empty folder is filled
    run_script(files / "flow.pth", tmp_path / "mine", "--num-heads", 4)
    folders = (tmp_path / "mine", run / "flowtok")
    mine, both = (load_file(latest_checkpoint(folder)[1] / EMA_FILE) for folder in folders)
    torch.testing.assert_close(mine, both, rtol=0, atol=0)
    assert mine["latent_scale"] == pytest.approx(1.0143)
    assert load_flow(tmp_path / "mine").config == FlowConfig()


def test_a_local_text_tower_is_named_by_its_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(light(TOKENIZER), "tokenizer.bin")
    Path("clip.safetensors").touch()
    run_script("tokenizer.bin", "out", "--text-encoder-pretrained", "clip.safetensors")
    assert read_run_config("out").text_encoder.pretrained == str(tmp_path / "clip.safetensors")


# Forms of a file


@pytest.mark.parametrize("keys", [[], ["model"], ["state_dict", "nnet_ema"]])
def test_wrappers_and_prefixes_are_taken_off_and_averaged_weights_come_first(keys):
    content = {"module.module.a": torch.zeros(1), "module.module.b.c": torch.arange(96.0)}
    for key in reversed(keys):
        content = {key: content, "step": 7} | ({"model": {}} if key == "nnet_ema" else {})
    found = convert_checkpoint.unwrap(content)
    assert found.keys() == {"a", "b.c"} and torch.equal(found["b.c"], torch.arange(96.0))


def test_a_file_of_the_older_form_gives_the_same_weights(files, tmp_path):
    torch.save(weights(FLOW), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    new, old = (convert_file(file) for file in (files / "flow.pth", tmp_path / "old.pth"))
    torch.testing.assert_close(new, old, rtol=0, atol=0)


def test_other_precisions_become_float32(tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in weights(FLOW).items()}
    converted = convert_saved(tensors, tmp_path / "flow.pth")
    assert {tensor.dtype for tensor in converted.values()} == {torch.float32}
    expected = tensors["x_embedder.weight"].float()
    assert torch.equal(converted["flowtok.embed_tokens.weight"], expected)


def test_the_temperature_is_the_files_or_its_starting_value():
    tensors = light(FLOW) | {"t2t_temperature": torch.tensor(3.0)}
    assert convert(tensors, num_heads=4).tensors[SCALE] == 3
    del tensors["t2t_temperature"]
    assert convert(tensors, num_heads=4).tensors[SCALE] == torch.tensor(math.log(1 / 0.07))


# What is refused


@pytest.mark.parametrize("file", [FLOW, TOKENIZER])
def test_a_tensor_that_is_missing_or_of_a_wrong_shape_is_named_and_no_other(file):
    whole, optional = only_shapes(file), {"t2t_temperature", *tables(file)}
    names = {BLOCK.sub(r"\1.N.", name): name for name in shapes(file)}.values()
    for name in list(names)[::3]:  # a tenth of a second each
        tensors = dict(whole)
        shape = tensors.pop(name).shape
        if name not in optional:  # may be missing
            with pytest.raises(ValueError, match=f"^{re.escape(name)} is missing$"):
                convert(tensors, num_heads=4)
        tensors[name] = torch.empty([*shape[:-1], shape[-1] + 1] if shape else [1], device="meta")
        with pytest.raises(ValueError, match=f"^{re.escape(name)} is .*, expected [^;\n]*$"):
            convert(tensors, num_heads=4)


def test_fixed_tables_may_be_missing_or_empty_but_not_others():
    tensors = only_shapes(FLOW)
    for harmless in ({}, {"pos_embed": torch.zeros(1, 77, 96)}):
        assert convert(tensors | harmless, num_heads=4).stage == "flowtok"
    for wrong in (tables(FLOW)["pos_embed"] + 2e-4, torch.full((1, 77, 96), math.nan)):
        with pytest.raises(ValueError, match="^pos_embed differs"):
            convert(tensors | {"pos_embed": wrong}, num_heads=4)
    del tensors["pos_embed"]
    assert convert(tensors, num_heads=4).stage == "flowtok"
    name = "decoder.positional_embedding.freqs_sin"
    with pytest.raises(ValueError, match=f"^{name} differs"):
        convert(only_shapes(TOKENIZER) | {name: tables(TOKENIZER)[name].flip(0)})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.1.attn.q_norm.weight", r"^blocks\.1\.attn\.q_norm\.weight is unknown$"),
        ("blocks.99999999.attn.qkv.bias", r"^blocks\.2\.\S+ is missing; .*; and \d+ more$"),
    ],
)
def test_unknown_tensors_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        convert(only_shapes(FLOW) | {name: torch.empty(288, device="meta")}, num_heads=4)


@pytest.mark.parametrize(
    ("file", "num_heads", "message"),
    [
        (FLOW, None, "width 96 and depth 2, .* --num-heads"),
        (FLOW, 5, "--num-heads 5 .* 96"),
        ("flowtok_b", 16, "12 heads, --num-heads says 16"),
    ],
)
def test_heads_that_are_not_known_or_wrong_are_refused(file, num_heads, message):
    with pytest.raises(ValueError, match=message):
        convert(only_shapes(file), num_heads)


DIT = {name: x for name, x in light(FLOW).items() if name.startswith("blocks")}
DIT |= {"x_embedder.proj.weight": torch.ones(96, 4, 2, 2), "pos_embed": torch.ones(1, 64, 96)}
BAD_CONTENTS = {  # what a file holds -> what the error says after the file's name
    "attack": ({"model": Evil()}, "refused$"),
    "list": ([torch.ones(2)], "it holds a list"),
    "integers": ({"latent_tokens": torch.ones(77, 512).long()}, "latent_tokens is torch.int64"),
    "infinite": (
        light(TOKENIZER) | {"decoder.mask_token": torch.full((1, 1, 512), math.inf)},
        "decoder.mask_token has values that are not finite",
    ),
    "other": ({"layer1.0.conv1.weight": torch.ones(2)}, ".* layer1.0.conv1.weight$"),
    "DiT": (DIT, "x_embedder.weight is missing$"),
}


@pytest.mark.parametrize("case", BAD_CONTENTS)
def test_a_file_of_something_else_is_refused_and_nothing_is_written(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, message = BAD_CONTENTS[case]
    torch.save(content, "bad.pth")
    check_refused("bad.pth", f"^bad.pth.* {message}")


@pytest.mark.parametrize("is_new", [True, False])
def test_a_file_that_is_cut_short_is_refused(is_new, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = Path("bad.pth")
    torch.save({"a": torch.ones(99)}, file, _use_new_zipfile_serialization=is_new)
    whole = file.read_bytes()
    for share in (0, 0.5, 0.99):
        file.write_bytes(whole[: int(len(whole) * share)])
        check_refused(file, "^bad.pth is broken")


def check_refused(file, message):
    """In one line, without torch's advice to execute the file."""
    with pytest.raises(ValueError, match=message) as error:
        run_script(file, "out")
    assert "\n" not in str(error.value) and "weights_only" not in str(error.value)
    assert os.listdir() == ["bad.pth"]


def test_a_bad_second_file_and_a_full_disk_leave_nothing(files, tmp_path, monkeypatch):
    (tmp_path / "bad.bin").write_bytes(b"PK\x03\x04")
    both = [files / "flow.pth", tmp_path / "bad.bin", "--run", tmp_path / "out", "--num-heads", 4]
    with pytest.raises(ValueError, match=r"bad\.bin is broken"):
        run_script(*both)

    def fail(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(convert_checkpoint, "save_weights", fail)
    with pytest.raises(OSError, match="No space left"):
        run_script(files / "tokenizer.bin", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.bin"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("a.bin b.bin --run out", "a.bin is a tokenizer file and b.bin is a tokenizer file"),
        ("a.bin out --num-heads 4", "--num-heads .* a.bin is a tokenizer file"),
        ("a.bin .", "exists already"),
        ("a.bin out --text-encoder-model ViT-L-14-337", "unknown open_clip model 'ViT-L-14-337'"),
        ("a.bin out --text-encoder-pretrained clip.pt", "clip.pt is neither a file nor a tag of"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.bin", "b.bin"):
        torch.save(light(TOKENIZER), name)
    with pytest.raises(ValueError, match=message):
        run_script(*arguments.split())
    assert sorted(os.listdir()) == ["a.bin", "b.bin"]
