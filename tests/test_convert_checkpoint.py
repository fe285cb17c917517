"""scripts/convert_checkpoint.py, modeling/released.py: the release's numbers, from files to sample.py; refusals.

tests/released holds names and shapes of the released files, and of two little models what the release computes.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sample
from modeling.clip_weights import build_clip, save_clip
from modeling.flow import FlowConfig
from modeling.flow_model import build_flow
from modeling.image_tokenizer import ImageTokenizer, ImageTokenizerConfig, TransformerSize
from modeling.layers import sincos_position_table
from modeling.pipeline import SamplingConfig
from modeling.released import convert, generic, rope_tables
from modeling.text_encoder import TextEncoderConfig
from scripts import convert_checkpoint
from training.checkpoint import EMA_FILE, latest_checkpoint
from training.loading import load_tokenizer, read_run_config, read_section, text_encoder_config
from training.pipelines import load_flow, load_pipeline

RELEASED = Path(__file__).parent / "released"
FLOW, TOKENIZER = "flowtok_tiny", "flowtitok_small_64"
# name: (file, millions of weights, sizes). The paper counts a flow's position table, too (153.93, 698.08, 1092.10), and
# leaves out a tokenizer's latent tokens (85.74 + 304.05).
FULL_SIZE = {
    "B": ("flowtok_b", 153.93 - 77 * 768e-6, (768, 12, 12)),
    "XL": ("flowtok_xl", 698.08 - 77 * 1152e-6, (1152, 28, 16)),
    "H": ("flowtok_h", 1092.10 - 77 * 1280e-6, (1280, 36, 20)),
    "256": ("flowtitok_256", 85.74 + 304.05 + 77 * 768e-6, (256, (768, 12, 12), (1024, 24, 16))),
    "512": ("flowtitok_512", 85.74 + 304.05 + 77 * 768e-6, (512, (768, 12, 12), (1024, 24, 16))),
}


def shapes(name):
    """Tensor name -> shape, as in a released file."""
    return json.loads((RELEASED / f"{name}.tensors.json").read_text())


def tables(name):
    """The fixed tables of a file."""
    if "pos_embed" in shapes(name):
        _, length, width = shapes(name)["pos_embed"]
        return {"pos_embed": sincos_position_table(length, width)[None]}
    size = TransformerSize(width=512, depth=8, num_heads=8)
    small = {"encoder": size, "decoder": size} if name == TOKENIZER else {}
    return rope_tables(ImageTokenizerConfig(image_size=int(name.rpartition("_")[2]), **small))


def weights(name):
    """The little models' weights: each tensor drawn from its name, as the vectors were made."""
    drawn = {}
    for key, shape in shapes(name).items():
        x = (
            np.random.default_rng(zlib.crc32(key.encode()))
            .standard_normal(shape)
            .astype(np.float32)
        )
        if len(shape) == 1:
            x = 1 + 0.1 * x if key.endswith((".weight", ".g")) else 0.1 * x
        elif shape:
            x = x / np.float32(math.sqrt(math.prod(shape[1:])))
        drawn[key] = torch.from_numpy(x) if shape else torch.tensor(math.log(1 / 0.07))
    return drawn | tables(name)


def only_shapes(name):
    """Meta tensors of a file's names and shapes, and its fixed tables."""
    return {key: torch.empty(shape, device="meta") for key, shape in shapes(name).items()} | tables(
        name
    )


def light(name):
    """Zeros of a file's shapes that take no space, in memory or in a file."""
    return {key: torch.zeros(()).expand(shape) for key, shape in shapes(name).items()}


def run_script(*arguments):
    """The script's own command line, in this process."""
    convert_checkpoint.main(convert_checkpoint.parse_args(list(map(str, arguments))))


def normal(seed, *shape):
    """float32 standard normal numbers."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def vectors(name, key):
    """What the release computes."""
    with np.load(RELEASED / f"{name}.vectors.npz") as file:
        return torch.from_numpy(file[key])


def assert_near(actual, expected, tolerance=2e-4):
    """Equal within an absolute tolerance."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The two little models as released files."""
    folder = tmp_path_factory.mktemp("files")
    torch.save(weights(FLOW), folder / "flow.pth")
    torch.save({"model": weights(TOKENIZER)}, folder / "tokenizer.bin")
    return folder


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """A CLIP whose text states are 77 x 768, as the release's: one layer of random weights."""
    folder = tmp_path_factory.mktemp("tower")
    config = {
        "embed_dim": 8,
        "vision_cfg": {
            "image_size": 16,
            "patch_size": 16,
            "width": 16,
            "layers": 1,
            "head_width": 16,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 768,
            "heads": 12,
            "layers": 1,
        },
    }
    save_clip(build_clip(config), config, folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, files, tower):
    """The run folder that the script makes of both files."""
    folder = tmp_path_factory.mktemp("runs") / "released"
    chosen = ["--num-heads", 4, "--text-encoder-model", f"local-dir:{tower}"]
    run_script(files / "flow.pth", files / "tokenizer.bin", "--run", folder, *chosen)
    return folder


@pytest.fixture(scope="module")
def parts(run):
    """What sample.py loads from the run folder."""
    return load_pipeline(run, torch.device("cpu"))[0]


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
    sampling = SamplingConfig(
        steps=20, guidance=2.0, sampler="euler_release", sample_text_latent=False
    )
    states = normal(1, 2, 77, 768)
    start = parts.start(states, sampling, 0, [0, 1])
    expected = vectors(FLOW, "sampled")
    assert_near(parts.transport(start, states, sampling) * 1.0143, expected, 2e-3)
    other = parts.transport(start, states, SamplingConfig(steps=20, guidance=2.0)) * 1.0143
    assert (other - expected).abs().max() > 2e-3  # the consistent grid is another one


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


def test_sample_draws_from_the_converted_run_wherever_it_lies(run, tmp_path, capsys):
    output = str(tmp_path / "x.png")
    arguments = ["--prompts", "a cat", "--steps", "2", "--output", output, "--device", "cpu"]

    def draw(folder, images):
        sample.main(
            sample.parse_args(["--run", str(folder), *arguments, "--save-dir", str(images)])
        )

    draw(run, tmp_path / "a")
    assert "2 steps, guidance 2" in capsys.readouterr().out
    moved = run.with_name("moved")
    run.rename(moved)
    try:
        draw(moved, tmp_path / "b")
    finally:
        moved.rename(run)
    first, second = (tmp_path / name / "00000.png" for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_the_written_configs_say_what_loading_reads(run, tower):
    assert text_encoder_config(run / "tokenizer").model == f"local-dir:{tower}"
    flow = read_run_config(run / "flowtok")
    assert (flow.stage, flow.tokenizer_run) == ("flowtok", str(run / "tokenizer"))
    assert read_section(run / "flowtok", "sampling", SamplingConfig) == SamplingConfig()
    assert load_flow(run / "flowtok").config == FlowConfig()
    assert all(flow.pictures.captions)


def test_weights_are_written_once_and_nothing_else_is(run):
    found = {path.relative_to(run).as_posix() for path in run.rglob("*.*")}
    checkpoint = "checkpoints/step_00000000"
    names = ("config.yaml", f"{checkpoint}/ema.safetensors", f"{checkpoint}/state.json")
    assert found == {f"{stage}/{name}" for stage in ("flowtok", "tokenizer") for name in names}
    assert [path.name for path in run.parent.iterdir()] == ["released"]


def test_one_file_becomes_one_run_folder(files, run, tmp_path):
    run_script(files / "tokenizer.bin", tmp_path / "mine")
    assert load_tokenizer(tmp_path / "mine").config.image_size == 64
    assert text_encoder_config(tmp_path / "mine") == TextEncoderConfig()
    written, same = (
        latest_checkpoint(folder)[1] / EMA_FILE for folder in (tmp_path / "mine", run / "tokenizer")
    )
    assert written.read_bytes() == same.read_bytes()


def test_the_other_latent_scale_is_written(files, tmp_path):
    run_script(files / "flow.pth", tmp_path / "flow", "--num-heads", 4, "--latent-scale", 0.5)
    assert load_file(latest_checkpoint(tmp_path / "flow")[1] / EMA_FILE)["latent_scale"] == 0.5


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "nnet_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "module.module."])
def test_wrappers_and_prefixes_are_taken_off(wrapper, prefix, tmp_path):
    tensors = {prefix + name: tensor for name, tensor in light(FLOW).items()}
    tensors[f"{prefix}x_embedder.bias"] = torch.arange(96.0)
    torch.save({wrapper: tensors, "step": 7} if wrapper else tensors, tmp_path / "flow.pth")
    read = convert_checkpoint.read_tensors(tmp_path / "flow.pth")
    assert {name: list(tensor.shape) for name, tensor in read.items()} == shapes(FLOW)
    assert torch.equal(read["x_embedder.bias"], torch.arange(96.0))


def test_wrappers_in_each_other_are_taken_off_and_averaged_weights_come_first(tmp_path):
    inner = {"module.a": torch.ones(1)}
    torch.save(
        {"state_dict": {"model": {"a": torch.zeros(1)}, "nnet_ema": inner}}, tmp_path / "x.pth"
    )
    assert torch.equal(convert_checkpoint.read_tensors(tmp_path / "x.pth")["a"], torch.ones(1))


def test_all_forms_of_a_file_give_the_same_tensors(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.nn.Parameter(torch.randn(()))}
    torch.save(tensors, tmp_path / "zip.pth")
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(tensors, tmp_path / "x.safetensors")
    for file in tmp_path.iterdir():
        read = convert_checkpoint.read_tensors(file)
        assert read.keys() == tensors.keys() and all(
            torch.equal(read[name], tensors[name]) for name in tensors
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32_and_that_is_said(dtype, tmp_path, capsys):
    tensors = {name: tensor.to(dtype) for name, tensor in weights(FLOW).items()}
    torch.save(tensors, tmp_path / "flow.pth")
    arguments = argparse.Namespace(num_heads=4, latent_scale=1.0)
    converted = convert_checkpoint.convert_file(tmp_path / "flow.pth", arguments).tensors
    assert {tensor.dtype for tensor in converted.values()} == {torch.float32}
    assert torch.equal(
        converted["flowtok.embed_tokens.weight"], tensors["x_embedder.weight"].float()
    )
    assert (
        f"note: {str(dtype).removeprefix('torch.')} converted to float32" in capsys.readouterr().out
    )


def test_a_file_without_the_temperature_gets_its_starting_value_and_what_is_not_the_files_is_said(
    tmp_path, capsys
):
    tensors = light(FLOW)
    del tensors["t2t_temperature"]
    torch.save(tensors, tmp_path / "flow.pth")
    arguments = argparse.Namespace(num_heads=4, latent_scale=1.0)
    converted = convert_checkpoint.convert_file(tmp_path / "flow.pth", arguments).tensors
    assert converted["projector.alignment.log_temperature"] == torch.tensor(math.log(1 / 0.07))
    printed = capsys.readouterr().out
    assert (
        "t2t_temperature is not in the file" in printed
        and "pos_embed all zero; computed here" in printed
    )


def test_the_files_temperature_is_kept():
    converted = convert(light(FLOW) | {"t2t_temperature": torch.tensor(3.0)}, num_heads=4)
    assert converted.tensors["projector.alignment.log_temperature"] == 3


def test_converted_weights_share_no_memory_with_the_file():
    tensors = {name: torch.zeros(shape) for name, shape in shapes(FLOW).items()}
    converted = convert(tensors, num_heads=4).tensors
    for tensor in tensors.values():
        tensor.fill_(1.0)
    del converted["latent_scale"]
    assert not any(tensor.any() for tensor in converted.values())


@pytest.mark.parametrize("size", FULL_SIZE)
def test_the_published_files_convert_to_networks_of_the_published_size(size):
    file, millions, sizes = FULL_SIZE[size]
    converted = convert(only_shapes(file))
    networks = converted.networks
    with torch.device("meta"):
        if converted.stage == "flowtok":
            module, part = build_flow(**networks, flow=FlowConfig()), networks["flowtok"]
            found = (part.width, part.depth, part.num_heads)
        else:
            module, part = ImageTokenizer(networks["tokenizer"]), networks["tokenizer"]
            found = (
                part.image_size,
                *((p.width, p.depth, p.num_heads) for p in (part.encoder, part.decoder)),
            )
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    assert {name: tensor.shape for name, tensor in converted.tensors.items()} == expected
    assert found == sizes
    assert sum(p.numel() for p in module.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize("file", [FLOW, TOKENIZER])
def test_one_tensor_of_a_wrong_shape_is_named(file):
    tested = set()
    for name, shape in shapes(file).items():
        if generic(name) in tested:
            continue
        tested.add(generic(name))
        wrong = [*shape[:-1], shape[-1] + 1] if shape else [1]
        with pytest.raises(ValueError) as error:
            convert(only_shapes(file) | {name: torch.empty(wrong, device="meta")}, num_heads=4)
        assert name in str(error.value) and "\n" not in str(error.value), name
        assert str(error.value).count("expected") == 1, name  # and no other is blamed


@pytest.mark.parametrize("file", [FLOW, TOKENIZER])
def test_one_missing_tensor_is_named(file):
    tested = {"t2t_temperature", *tables(file)}  # these may be missing
    for name in shapes(file):
        if generic(name) not in tested:
            tested.add(generic(name))
            tensors = only_shapes(file)
            del tensors[name]
            with pytest.raises(ValueError, match=f"^{name} is missing$"):
                convert(tensors, num_heads=4)


def test_fixed_tables_may_be_missing_or_empty_but_not_others():
    tensors = only_shapes(FLOW)
    for harmless in ({}, {"pos_embed": torch.zeros(1, 77, 96)}):
        assert convert(tensors | harmless, num_heads=4).stage == "flowtok"
    del tensors["pos_embed"]
    assert convert(tensors, num_heads=4).stage == "flowtok"
    for wrong in (tables(FLOW)["pos_embed"] + 2e-4, torch.full((1, 77, 96), math.nan)):
        with pytest.raises(ValueError, match="pos_embed differs from the table of this network by"):
            convert(tensors | {"pos_embed": wrong}, num_heads=4)
    name = "decoder.positional_embedding.freqs_sin"
    with pytest.raises(ValueError, match=f"{name} differs"):
        convert(only_shapes(TOKENIZER) | {name: tables(TOKENIZER)[name].flip(0)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks.1.attn.q_norm.weight": (24,)}, "blocks.1.attn.q_norm.weight is unknown"),
        (
            {"blocks.7.attn.qkv.bias": (288,)},
            "blocks.2.adaLN_modulation.1.weight is missing; .*; and [0-9]+ more",
        ),
        (
            {"blocks.99999999.attn.qkv.bias": (288,)},
            "blocks are missing between blocks.0 and blocks.99999999",
        ),
        ({"a\nb" + "c" * 200: (1,)}, r"'a\\nbc{96,98}' is unknown"),
    ],
)
def test_unknown_tensors_are_named(changes, message):
    extra = {name: torch.empty(shape, device="meta") for name, shape in changes.items()}
    with pytest.raises(ValueError, match=message) as error:
        convert(only_shapes(FLOW) | extra, num_heads=4)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "num_heads", "message"),
    [
        (
            FLOW,
            None,
            "a flow of width 96 and depth 2, none of B, XL, H, .* heads: give --num-heads",
        ),
        (FLOW, 5, "--num-heads 5 does not divide the flow's width 96"),
        (FLOW, 0, "--num-heads 0 does not divide"),
        ("flowtok_b", 16, "a flow of width 768 and depth 12 has 12 heads, --num-heads says 16"),
    ],
)
def test_heads_that_are_not_known_or_wrong_are_refused(file, num_heads, message):
    with pytest.raises(ValueError, match=message):
        convert(only_shapes(file), num_heads)


class Attack:
    """An object whose unpickling runs a command."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def truncated(content, file, share, **options):
    """A file of which only the first part is there."""
    torch.save(content, file, **options)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


def write_bad_file(case, file):
    """One file of each kind that is refused; returns what the error says after the file's name."""
    tensors = light(TOKENIZER)
    if case.startswith("cut "):
        old = {"_use_new_zipfile_serialization": "old" not in case}
        truncated({"a": torch.ones(9)}, file, float(case.split()[-1]), **old)
        return "cannot be read, it is cut short or no checkpoint"
    if case == "cut-off safetensors":
        save_file({"a": torch.ones(99)}, file)
        file.write_bytes(file.read_bytes()[:-40])
        return "cannot be read, it is cut short"
    contents = {
        "attack": (
            {"model": Attack(file.with_name("mark"))},
            "refused: its pickle needs posix.system",
        ),
        "namespace": (
            tensors | {"args": argparse.Namespace(a=1)},
            "refused: its pickle needs argparse.Namespace",
        ),
        "network": (
            torch.nn.Linear(2, 2),
            "refused: its pickle needs torch.nn.modules.linear.Linear",
        ),
        "list": ([torch.ones(2)], "it holds a list, expected tensors by name"),
        "empty": ({}, "it is no released flow or tokenizer file: it holds nothing"),
        "number": (tensors | {"epoch": 3}, "epoch is a int, expected a tensor"),
        "numbered": ({0: torch.ones(1)}, "0 is a Tensor, expected a tensor"),
        "integers": (
            tensors | {"latent_tokens": torch.ones(77, 512).long()},
            "latent_tokens is torch.int64",
        ),
        "no values": (
            tensors | {"latent_tokens": torch.ones(77, 512, device="meta")},
            "latent_tokens is .* on meta",
        ),
        "sparse": (
            tensors | {"latent_tokens": torch.ones(77, 512).to_sparse()},
            "latent_tokens is .*sparse",
        ),
        "infinite": (
            tensors | {"decoder.mask_token": torch.full((1, 1, 512), math.inf)},
            "decoder.mask_token has values that are not finite",
        ),
        "shape": (
            tensors | {"latent_tokens": torch.ones(76, 512)},
            "latent_tokens is 76 x 512, expected 77 x 512",
        ),
        "other": (
            {"layer1.0.conv1.weight": torch.ones(2)},
            "it is no released .*: it holds layer1.0.conv1.weight",
        ),
        "similar": (  # a DiT
            {"x_embedder.proj.weight": torch.ones(96, 4, 2, 2), "pos_embed": torch.ones(1, 64, 96)}
            | {name: tensor for name, tensor in light(FLOW).items() if name.startswith("blocks")},
            "pos_embed is 1 x 64 x 96, expected 1 x 77 x 96; .* is missing; .* more",
        ),
    }
    content, message = contents[case]
    torch.save(content, file)
    return message


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize(
    "case",
    [
        *(
            "attack",
            "namespace",
            "network",
            "list",
            "empty",
            "number",
            "numbered",
            "integers",
            "no values",
            "sparse",
        ),
        *("infinite", "shape", "other", "similar", "cut-off safetensors"),
        *(f"cut {form}{share}" for form in ("", "old ") for share in (0, 0.1, 0.5, 0.99)),
    ],
)
def test_a_bad_file_is_refused_in_one_line_and_nothing_is_written(case, tmp_path):
    file = tmp_path / "bad.pth"
    message = write_bad_file(case, file)
    with pytest.raises(ValueError, match=f"^{file}: {message}") as error:
        run_script(file, tmp_path / "out")
    assert "\n" not in str(error.value) and "weights_only" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pth"]


def test_a_bad_second_file_leaves_nothing_of_the_first(files, tmp_path):
    (tmp_path / "bad.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="bad.bin: cannot be read"):
        run_script(
            files / "flow.pth", tmp_path / "bad.bin", "--run", tmp_path / "out", "--num-heads", 4
        )
    assert [path.name for path in tmp_path.iterdir()] == ["bad.bin"]


def test_a_write_that_fails_leaves_nothing(files, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(convert_checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        run_script(files / "tokenizer.bin", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_not_touched(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    torch.save(light(TOKENIZER), tmp_path / "tokenizer.bin")
    with pytest.raises(ValueError, match="out exists already: name a new folder"):
        run_script(tmp_path / "tokenizer.bin", tmp_path / "out")
    (tmp_path / "out" / "notes.txt").unlink()
    run_script(tmp_path / "tokenizer.bin", tmp_path / "out")  # an empty one is filled
    assert latest_checkpoint(tmp_path / "out")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.pth", "out"], "nowhere.pth does not exist"),
        (
            ["a.bin", "b.bin", "--run", "out"],
            "a.bin is a tokenizer file and b.bin is a tokenizer file",
        ),
        (
            ["a.bin", "out", "--num-heads", "4"],
            "--num-heads is for a flow, but a.bin is a tokenizer file",
        ),
        (["a.bin", "out", "--latent-scale", "0"], "--latent-scale must be positive, got 0.0"),
        (["a.bin", "out", "--latent-scale", "nan"], "--latent-scale must be positive, got nan"),
        (
            ["a.bin", "out", "--text-encoder-model", "ViT-L-14-337"],
            "unknown open_clip model 'ViT-L-14-337'",
        ),
        (
            ["a.bin", "out", "--text-encoder-model", "ViT-L-14-336"],
            "set text_encoder.model=ViT-L-14-336-quickgelu",
        ),
        (
            ["a.bin", "out", "--text-encoder-pretrained", "clip.pt"],
            "clip.pt is neither a file nor a tag of",
        ),
    ],
)
def test_impossible_arguments_are_refused_and_nothing_is_written(
    arguments, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("a.bin", "b.bin"):
        torch.save(light(TOKENIZER), name)
    with pytest.raises(ValueError, match=message):
        run_script(*arguments)
    assert sorted(os.listdir()) == ["a.bin", "b.bin"]


def test_a_local_text_tower_is_named_by_its_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(light(TOKENIZER), "tokenizer.bin")
    Path("clip.safetensors").touch()
    run_script("tokenizer.bin", "out", "--text-encoder-pretrained", "clip.safetensors")
    assert read_run_config("out").text_encoder.pretrained == str(tmp_path / "clip.safetensors")


def test_the_program_runs_from_anywhere_and_ends_a_users_error_with_status_2(tmp_path):
    script = Path(convert_checkpoint.__file__)
    command = [sys.executable, str(script), "nowhere.pth", "out"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stderr.startswith("error: nowhere.pth does not exist")
