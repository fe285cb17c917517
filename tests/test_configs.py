"""configs/: every shipped file loads; what is wrong is refused in one line before any work."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from shipped import FILES, load
from tiny_experiment import PROGRAMS

from configs.load import load_config, load_dataclass, valid_keys
from modeling.discriminator import AdversarialConfig
from modeling.dual_quantizer import QuantizerConfig
from modeling.flow import FlowConfig
from modeling.flowtok import FlowTokConfig
from modeling.image_tokenizer import ImageTokenizerConfig
from modeling.image_tokenizer import TransformerSize as Size
from modeling.losses import FlowLossConfig, ProjectorLossConfig, ReconstructionLossConfig
from modeling.next_scale import NextScaleConfig, NextScaleSampling
from modeling.perceptual import PerceptualConfig
from modeling.pipeline import SamplingConfig
from modeling.text_decoder import TextDecoderConfig, TextDecoderLossConfig
from modeling.text_projector import TextProjectorConfig
from train_flowtok import FlowTokStage
from train_tokenizer import TokenizerStage
from training.optim import OptimizerConfig

ROOT = Path(__file__).parents[1]
FLOWTOK = ROOT / "configs/emoji/flowtok.yaml"
TOKENIZER = ROOT / "configs/emoji/tokenizer.yaml"


def write(path, **values):
    path.write_text(yaml.safe_dump(values))
    return path


def error_of(stage, path, *overrides):
    """The message of a config that is refused; always one line."""
    with pytest.raises(ValueError) as caught:
        load_config(stage, path, list(overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What ships


@pytest.mark.parametrize("file", FILES)
def test_a_shipped_file_loads_and_its_place_names_its_run(file):
    config = load(file)
    path = Path(file)
    folder = path.parent.name.removesuffix("_caption") if "emoji" in file else path.parent.name
    assert config.run_dir == f"runs/{folder}/{path.stem}"
    assert path.stem.startswith(config.stage)


# base: and places


def test_a_file_overrides_its_base_and_the_command_line_both(tmp_path):
    write(tmp_path / "low.yaml", tokenizer_run="${experiment_dir}/t", batch_size=1)
    write(tmp_path / "middle.yaml", base="low.yaml", experiment_dir="middle", batch_size=2)
    top = write(tmp_path / "top.yaml", base="middle.yaml", batch_size=3, data={"shards": ["a.tar"]})
    config = load_config(PROGRAMS["tokens"][0], top, ["experiment_dir=line"])
    assert (config.batch_size, config.data.shards) == (3, ["a.tar"])
    assert (config.tokenizer_run, config.run_dir) == ("line/t", "line/top")


def test_files_that_can_not_be_read_are_named(tmp_path):
    a = write(tmp_path / "a.yaml", base="b.yaml")
    write(tmp_path / "b.yaml", base="a.yaml")
    assert "circle" in error_of(TokenizerStage, a)
    assert "in its folder: a.yaml, b.yaml" in error_of(TokenizerStage, tmp_path / "c.yaml")
    assert "no YAML" in error_of(TokenizerStage, tmp_path / "nowhere" / "a.yaml")
    for text, message in (("a: [1", "no valid YAML"), ("- a\n- b", "mapping")):
        (tmp_path / "x.yaml").write_text(text)
        assert message in error_of(TokenizerStage, tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        ("~/runs", "/home/me/runs"),
        ("2024_11_29", "2024_11_29"),
        ("[a]{b,c}: d #1", "[a]{b,c}: d #1"),
        ("'quoted'", "quoted"),
        ("~", "~"),
    ],
)
def test_a_folder_is_what_was_typed(given, folder, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config(FlowTokStage, FLOWTOK, [f"experiment_dir={given}"])
    assert config.run_dir == f"{folder}/flowtok".replace("~", "/home/me")
    assert config.data.shards == [f"{folder}/tokens/train-*.tar".replace("~", "/home/me")]


@pytest.mark.parametrize("name", ["{b,c} #'", "2024_11_29", "$a"])
def test_the_folder_of_a_yaml_may_have_any_name(tmp_path, name):
    (tmp_path / name).mkdir()
    path = write(tmp_path / name / "tokens.yaml", data={"shards": ["a.tar"]})
    assert load_config(PROGRAMS["tokens"][0], path).run_dir == f"runs/{name}/tokens"


def test_home_is_filled_in_wherever_a_path_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    model = "text_encoder.model=local-dir:~/clip"
    captions = "text_encoder.pretrained=~"
    config = load_config(TokenizerStage, TOKENIZER, ["data.shards=[~/a.tar]", model, captions])
    assert config.data.shards == ["/home/me/a.tar"]
    assert config.text_encoder.model == "local-dir:/home/me/clip"
    assert config.text_encoder.pretrained == "~"
    assert "~no-one" in error_of(TokenizerStage, TOKENIZER, "runs_dir=~no-one/x")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_a_yaml_is_read_in_the_encodings_that_editors_write(tmp_path, encoding):
    path = tmp_path / "tokens.yaml"
    path.write_bytes("data: {shards: [ü.tar]}\n".encode(encoding))
    assert load_config(PROGRAMS["tokens"][0], path).data.shards == ["ü.tar"]


# Keys and values


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("lr", "optimizer.learning_rate"),
        ("training.lr", "optimizer.learning_rate"),
        ("optimizer.learning_rat", "learning_rate"),
        ("traning.max_steps", "training"),
        ("flowtok.num_head", "num_heads"),
    ],
)
def test_an_unknown_key_names_the_nearest_valid_one(key, nearest):
    message = error_of(FlowTokStage, FLOWTOK, f"{key}=1")
    assert message.startswith("command line: ") and key.split(".")[0] in message
    assert f"'{nearest}'" in message


def test_an_unknown_key_in_a_file_names_the_file(tmp_path):
    path = write(tmp_path / "tokens.yaml", batchsize=3)
    message = error_of(PROGRAMS["tokens"][0], path)
    assert str(path) in message and "'batchsize'" in message and "'batch_size'" in message


@pytest.mark.parametrize(
    ("override", "texts"),
    [
        ("training.max_steps=x", ["training.max_steps", "'x'"]),
        ("training.precision=fp16", ["training.precision", "fp16", "fp32", "bf16"]),
        ("data.shards=a.tar", ["data.shards"]),
        ("training=3", ["3", "TrainingConfig"]),
        ("tokenizer_run=${nope}", ["tokenizer_run", "nope"]),
        ("training.seed=${", ["training.seed=${"]),
        ("training.max_steps", ["'training.max_steps'", "key=value"]),
        ("=3", ["'=3'"]),
    ],
)
def test_a_wrong_value_names_key_and_value(override, texts):
    message = error_of(FlowTokStage, FLOWTOK, override)
    assert all(text in message for text in texts)


def test_a_size_that_an_earlier_stage_knows_can_not_be_set():
    keys = ("flowtok.num_tokens", "flowtok.token_channels", "projector.text_width")
    for key in (*keys, "projector.text_tokens"):
        assert key in error_of(FlowTokStage, FLOWTOK, f"{key}=3")
        assert key not in valid_keys(FlowTokStage)


NOISE = "flow.source=noise losses.alignment_weight=0 losses.kl_weight=0"
READ = f"{NOISE} flow.sample_text_latent=true flowtok.condition=concatenation"
SHARDED, MEAN_FLOW = "training.shard=full", "flow.objective=mean_flow"
UNFILLED = "projector_run='' flow.projector=joint projector.linear_skip=true"
SELECTIVE, HEUN = "activation_checkpointing=selective", "sampling.sampler=heun"
UNTOLD = "next_scale.null_probability=0 sampling.guidance=2"
REFUSED = {
    "emoji/tokenizer": [
        ("tokenizer.encoder.num_heads=5", "encoder.*128"),
        ("data.shards=[]", "data.*shards"),
        ("runs_dir=", "^runs_dir is empty"),  # it would be the root
        ("training.batch_size=0", "training.batch_size .*0"),
        ("training.max_gradient_norm=-1", "max_gradient_norm .*-1"),
        ("training.ema_decay=1", "training.ema_decay .*1.0"),
        ("adversarial.weight=1", "start_step=200000.*2000"),
        ("freeze_encoder=true", "freeze_encoder.*init_from"),
    ],
    "emoji/text_projector": [
        ("losses.image_regression_weight=0", "losses"),
        ("linear_start=0", "linear_skip.*linear_start"),
    ],
    "emoji/flowtok": [
        ("pictures.captions=[a,'']", "pictures.captions"),
        ("projector_run=''", "flow.projector=frozen.*projector_run"),
        ("flow.projector=detached", "flow.projector=detached"),
        ("sampling.sampler=rk4", "sampling.*rk4.*euler_release"),
        ("flow.null_probability=0", "1.5.*null_probability"),
        ("flow.direction=image_to_text", "text decoder"),
        (NOISE, "flowtok.condition"),
        (f"{READ} losses.kl_weight=1", "losses"),
        (f"{READ} sampling.sample_text_latent=false", "sampling.sample_text_"),
        ("flowtok.condition=cross-attention", "cross_attention"),
        (UNFILLED, "projector.linear_skip.*projector_run"),
        (f"training.compile=true {SELECTIVE}", "activation_checkpointing to none"),
        (f"{SHARDED} training.compile=true", f"{SHARDED}.*training.compile"),
        (f"{SHARDED} {MEAN_FLOW}", f"{MEAN_FLOW}.*{SHARDED}"),
        (f"{MEAN_FLOW} {HEUN}", f"sampler heun.*{MEAN_FLOW}.*euler"),
    ],
    "emoji_dual/tokenizer": [(SHARDED, f"{SHARDED}.*dual tokenizer")],
    "emoji_dual/next_scale": [
        ("linear_start=-1", "linear_start.*-1"),
        (SHARDED, f"{SHARDED}.*dual tokenizer"),
        (UNTOLD, "null_probability"),
    ],
    "emoji/report": [("heldout_shards=[]", "heldout_shards")],
}


@pytest.mark.parametrize(
    ("file", "overrides", "message"),
    [(file, *case) for file, cases in REFUSED.items() for case in cases],
)
def test_settings_that_cannot_work_are_refused_naming_them(file, overrides, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(f"configs/{file}.yaml", *overrides.split())
    assert "\n" not in str(caught.value)


# Parts of configs, and the values that each refuses by itself
IMPOSSIBLE = [
    (AdversarialConfig, {"lecam_weight": -1}, "^lecam_weight .*-1"),
    (FlowConfig, {"null_probability": 1.0}, "^null_probability .*1.0"),
    (FlowConfig, {"time_power": 0.0}, "^time_power .*0.0"),
    (FlowLossConfig, {"flow_matching_weight": 0.0}, "^flow_matching_weight .*0"),
    (FlowTokConfig, {"width": 21, "num_heads": 3}, "^width .* num_heads"),
    (FlowTokConfig, {"num_heads": 0}, "^num_heads .*0"),
    (ImageTokenizerConfig, {"image_size": 18}, "^image_size 18 .*patch_size 16"),
    (ImageTokenizerConfig, {"encoder": Size(36, 1, 2)}, "^encoder.width 36 .*num_heads = 8"),
    (NextScaleConfig, {"width": 15}, "num_heads"),
    (NextScaleConfig, {"quantizer": QuantizerConfig(scales=[8])}, "scales begin with 8"),
    (NextScaleSampling, {"top_k": [1]}, "top_k"),
    (NextScaleSampling, {"top_p": [0.0, 0.5, 2.0]}, "top_p"),
    (OptimizerConfig, {"learning_rate": 0.0}, "learning_rate"),
    (OptimizerConfig, {"weight_decay": -0.1}, "weight_decay"),
    (OptimizerConfig, {"betas": [0.9]}, "betas"),
    (OptimizerConfig, {"hold_fraction": 1.0}, "hold_fraction"),
    (PerceptualConfig, {"lpips_weight": -1.0}, "^lpips_weight .*-1.0"),
    (ProjectorLossConfig, {"alignment_margin": 2.0}, "^alignment_margin .*2.0"),
    (QuantizerConfig, {"scales": [2, 1]}, "scales"),
    (QuantizerConfig, {"drop_scale_probability": 2.0}, "drop_scale_probability"),
    (ReconstructionLossConfig, {"l2_weight": 0.0}, "^l2_weight and l1_weight .*0"),
    (SamplingConfig, {"guidance_interval": [0.6, 0.5]}, r"^guidance_interval .*\[0.6, 0.5\]"),
    (TextDecoderConfig, {"width": 15, "num_heads": 2}, "^width 15 .*num_heads 2"),
    (TextDecoderConfig, {"dropout": 1.0}, "^dropout .*1.0"),
    (TextDecoderConfig, {"vocabulary_size": 50000}, "^vocabulary_size .* 50000$"),
    (TextDecoderLossConfig, {"latent_noise": -1.0}, "^latent_noise .*-1.0"),
    (TextProjectorConfig, {"width": 24, "num_heads": 5}, "^width 24 .*num_heads 5"),
    (TextProjectorConfig, {"dropout": 1.0}, "^dropout .*1.0"),
    (
        TextProjectorConfig,
        {"text_width": 24, "alignment_target": "average_pool", "token_channels": 5},
        "^alignment_target.*24.*5",
    ),
]


@pytest.mark.parametrize(("part", "values", "message"), IMPOSSIBLE)
def test_a_part_refuses_impossible_values_by_name(part, values, message):
    with pytest.raises(ValueError, match=message):
        part(**values)


@dataclasses.dataclass
class Part:
    size: int = 1

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")


@dataclasses.dataclass
class Whole:
    parts: dict[str, Part] = dataclasses.field(default_factory=dict)
    one: Part | None = None


def test_parts_in_mappings_are_built_and_named(tmp_path):
    path = write(tmp_path / "x.yaml", parts={"a": {"size": 2}})
    assert load_dataclass(Whole, path) == Whole({"a": Part(2)})
    assert load_dataclass(Whole, path, ["one.size=3"]).one == Part(3)
    with pytest.raises(ValueError, match=r"parts\.a\.size must be at least 1, got 0"):
        load_dataclass(Whole, path, ["parts.a.size=0"])
