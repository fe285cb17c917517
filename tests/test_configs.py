"""configs/: every shipped file loads, and what is wrong is refused in one line before any work."""

import ast
import dataclasses
import re
import sys
from pathlib import Path

import pytest
import yaml
from data.mixture import SourceConfig
from data.token_text import TokenTextConfig

from configs import load
from configs.load import load_config, resolved, valid_keys
from configs.schema import STAGES
from training.loop import TrainingConfig, batch_per_pass
from training.run import start_run
from training.tokens_info import LatentStats, TokensInfo, load_tokens_info

ROOT = Path(__file__).parents[1]
PACKAGES = ("configs", "data", "eval", "modeling", "scripts", "training")
STAGE_FILES = sorted(
    path for path in (ROOT / "configs").rglob("*.yaml") if "stage:" in path.read_text()
)
FLOWTOK, TOKENIZER = ROOT / "configs/demo/flowtok.yaml", ROOT / "configs/demo/tokenizer.yaml"
PROJECTOR = ROOT / "configs/demo/text_projector.yaml"


def write(path, **values):
    path.write_text(yaml.safe_dump(values))
    return path


def error_of(path, *overrides, stage=None):
    """The message of a config that is refused; always one line."""
    with pytest.raises(ValueError) as caught:
        load_config(path, list(overrides), stage)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What ships


@pytest.mark.parametrize("path", STAGE_FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_shipped_file_loads_for_the_stage_that_it_is_named_after(path):
    config = load_config(path, stage=path.stem)
    assert isinstance(config, STAGES[path.stem])
    name = path.parent.name.removesuffix("_caption")  # demo_caption adds to the demo's runs
    assert config.experiment_dir == f"runs/{name}"


def test_the_demos_text_decoder_has_the_projector_that_it_reads():
    own = load_config(ROOT / "configs/demo_caption/text_decoder.yaml")
    for file in (
        "demo/text_projector.yaml",
        "demo/flowtok.yaml",
        "demo_caption/flowtok_caption.yaml",
    ):
        assert load_config(ROOT / "configs" / file).projector == own.projector, file


@pytest.mark.parametrize("path", STAGE_FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_saved_resolved_config_gives_the_same_dataclasses(path, tmp_path):
    config = load_config(path, ["experiment_dir=/elsewhere"])
    assert load_config(write(tmp_path / "config.yaml", **resolved(config))) == config


def test_the_printed_config_loads_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["configs.load", str(FLOWTOK), "training.max_steps=7"])
    load.main()
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert load_config(tmp_path / "printed.yaml") == load_config(FLOWTOK, ["training.max_steps=7"])


def test_the_program_ends_with_the_error_its_place_and_status_2(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["configs.load", str(FLOWTOK), "lr=1"])
    with pytest.raises(SystemExit) as stop:
        load.main()
    assert stop.value.code == 2
    error, place = capsys.readouterr().err.splitlines()
    assert error == "error: command line: unknown key 'lr'; did you mean 'optimizer.learning_rate'?"
    assert re.fullmatch(r"  \(raised at load\.py:\d+\)", place)


def config_classes(schema):
    """A dataclass and those of its fields."""
    parts = [f.type for f in dataclasses.fields(schema) if dataclasses.is_dataclass(f.type)]
    return {schema}.union(*(config_classes(part) for part in parts))


CONFIG_CLASSES = set().union(*(config_classes(schema) for schema in STAGES.values()))


class ReadNames(ast.NodeVisitor):
    """Names read as `x.name`, outside the bodies of the config dataclasses."""

    def __init__(self):
        self.names = set()

    def visit_ClassDef(self, node):
        if node.name not in {schema.__name__ for schema in CONFIG_CLASSES}:
            self.generic_visit(node)

    def visit_Attribute(self, node):
        if isinstance(node.ctx, ast.Load):
            self.names.add(node.attr)
        self.generic_visit(node)


def test_every_option_is_read_by_some_code():
    reader = ReadNames()
    for path in [
        *ROOT.glob("*.py"),
        *(p for folder in PACKAGES for p in (ROOT / folder).glob("*.py")),
    ]:
        reader.visit(ast.parse(path.read_text()))
    unread = {f"{c.__name__}.{f.name}" for c in CONFIG_CLASSES for f in dataclasses.fields(c)}
    unread = {name for name in unread if name.split(".")[1] not in reader.names}
    assert not unread


# base:


def test_a_file_overrides_its_base_and_the_command_line_both(tmp_path):
    write(
        tmp_path / "low.yaml",
        stage="tokens",
        experiment_dir="low",
        batch_size=1,
        data={"shards": ["low.tar"]},
    )
    write(tmp_path / "middle.yaml", base="low.yaml", experiment_dir="middle", batch_size=2)
    top = write(tmp_path / "top.yaml", base="middle.yaml", batch_size=3)
    config = load_config(top, ["experiment_dir=line"])
    assert (config.batch_size, config.experiment_dir, config.data.shards) == (
        3,
        "line",
        ["low.tar"],
    )
    assert config.tokenizer_run == "line/tokenizer"


def test_base_files_in_a_circle_are_refused(tmp_path):
    write(tmp_path / "a.yaml", base="b.yaml", stage="tokens")
    write(tmp_path / "b.yaml", base="a.yaml")
    assert "in a circle" in error_of(tmp_path / "a.yaml")


def test_a_missing_file_lists_its_folder(tmp_path):
    write(tmp_path / "tokenizer.yaml", stage="tokenizer")
    message = error_of(tmp_path / "tokeniser.yaml")
    assert "tokeniser.yaml does not exist" in message and "in its folder: tokenizer.yaml" in message
    assert "no YAML" in error_of(tmp_path / "nowhere" / "a.yaml")
    assert "missing.yaml does not exist" in error_of(
        write(tmp_path / "a.yaml", base="missing.yaml")
    )


@pytest.mark.parametrize(
    ("text", "message"), [("a: [1", "no valid YAML"), ("- a\n- b", "mapping"), ("{}", "'stage'")]
)
def test_a_file_that_is_no_config_is_refused(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    assert message in error_of(tmp_path / "x.yaml")


# Keys and values


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("lr", "optimizer.learning_rate"),
        ("optimizer.lr", "optimizer.learning_rate"),
        ("training.lr", "optimizer.learning_rate"),
        ("training.learning_rate", "optimizer.learning_rate"),
        ("optimizer.learning_rat", "optimizer.learning_rate"),
        ("bs", "training.batch_size"),
        ("max_steps", "training.max_steps"),
        ("traning.max_steps", "training"),
        ("flow.num_tokens", "flowtok.num_tokens"),
        ("projector.num_head", "projector.num_heads"),
        ("flowtok.num_head", "flowtok.num_heads"),
    ],
)
def test_an_unknown_key_names_the_nearest_valid_one(key, nearest):
    message = error_of(FLOWTOK, f"{key}=1")
    assert message.startswith("command line: unknown key ")
    assert message.endswith(f"did you mean '{nearest}'?")
    assert nearest in valid_keys(STAGES["flowtok"])


def test_a_key_like_no_other_lists_the_valid_ones_of_its_group():
    assert error_of(FLOWTOK, "training.zzz=1").endswith(
        f"valid: {', '.join(valid_keys(TrainingConfig))}"
    )


def test_an_unknown_key_in_a_file_names_the_file(tmp_path):
    path = write(tmp_path / "tokens.yaml", stage="tokens", batchsize=3)
    assert error_of(path) == f"{path}: unknown key 'batchsize'; did you mean 'batch_size'?"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "training.max_steps=x",
            "training.max_steps: Value 'x' of type 'str' could not be converted to Integer",
        ),
        ("training.max_steps=1.5", "training.max_steps: Value '1.5'"),
        ("training.max_steps=", "training.max_steps: Incompatible value 'None'"),
        (
            "training.precision=fp16",
            "training.precision: Invalid value 'fp16', expected one of ['fp32', 'bf16']",
        ),
        (
            "data.shards=a.tar",
            "'data.shards' is a list, as in data.shards=[first,second]; got 'a.tar'",
        ),
        ("optimizer.betas=[a,b]", "optimizer.betas"),
        ("training=3", "'training' is a group of keys (max_steps, "),
        ("text_encoder.model=${nope}", "text_encoder.model: Interpolation key 'nope' not found"),
        ("training.max_steps=[1", "cannot read training.max_steps=[1"),
        ("training.seed=${", "cannot read training.seed=${"),
        ("training.max_steps", "'training.max_steps' is not of the form key=value"),
        ("=3", "'=3' is not of the form key=value"),
    ],
)
def test_a_wrong_value_names_key_and_value(override, message):
    assert message in error_of(FLOWTOK, override)


def test_a_list_may_refer_to_another_value(tmp_path):
    path = write(
        tmp_path / "report.yaml",
        stage="report",
        train_shards=["a.tar"],
        heldout_shards="${train_shards}",
    )
    assert load_config(path).heldout_shards == ["a.tar"]


def test_another_stage_is_refused(tmp_path):
    assert "configures stage 'flowtok', this program runs stage 'tokenizer'" in error_of(
        FLOWTOK, stage="tokenizer"
    )
    assert "valid: text_encoder, tokenizer" in error_of(
        write(tmp_path / "x.yaml", stage="tokeniser")
    )
    assert "stage=tokens, but" in error_of(FLOWTOK, "stage=tokens")


# Impossible combinations


@pytest.mark.parametrize(
    ("path", "override", "message"),
    [
        (TOKENIZER, "tokenizer.patch_size=7", "image_size 64 is not divisible by patch_size 7"),
        (TOKENIZER, "tokenizer.encoder.num_heads=5", "encoder.width 128 must be a multiple"),
        (
            TOKENIZER,
            "tokenizer.num_tokens=31",
            "latent_grid [4, 8] must be [rows, columns] with 31 cells",
        ),
        (TOKENIZER, "data.shards=[]", "data.shards: given [], expected at least one"),
        (TOKENIZER, "data.flip_probability=2", "data.flip_probability: given 2.0, expected 0..1"),
        (TOKENIZER, "data.caption_keys=[]", "data.caption_keys: given []"),
        (TOKENIZER, "training.batch_size=0", "training.batch_size must be at least 1, got 0"),
        (
            TOKENIZER,
            "training.keep_checkpoints=0",
            "training.keep_checkpoints must be at least 1, got 0",
        ),
        (TOKENIZER, "optimizer.betas=[0.9]", "two betas"),
        (TOKENIZER, "pictures.num_samples=0", "pictures.num_samples must be at least 1, got 0"),
        (FLOWTOK, "pictures.captions=[]", "pictures.captions is empty"),
        (FLOWTOK, "pictures.captions=[a, ' ']", "pictures.captions has an empty caption"),
        (FLOWTOK, "pictures.num_samples=3", "unknown key 'pictures.num_samples'"),
        (PROJECTOR, "pictures.captions=[a]", "unknown key 'pictures.captions'"),
        (PROJECTOR, "pictures.shards=[a]", "unknown key 'pictures.shards'"),
        (TOKENIZER, "losses.kl_weight=-1", "losses.kl_weight must not be negative, got -1.0"),
        (
            TOKENIZER,
            "training.max_gradient_norm=-1",
            "training.max_gradient_norm must not be negative, got -1.0",
        ),
        (
            FLOWTOK,
            "projector.text_tokens=77",
            "projector.text_tokens x token_channels = (77, 16) must equal flowtok",
        ),
        (FLOWTOK, "flowtok.token_channels=8", "(32, 8): text flows into image token by token"),
        (
            FLOWTOK,
            "projector_run=",
            "flow.projector=frozen needs a trained projector: set projector_run",
        ),
        (FLOWTOK, "flow.projector=detached", "leaves the projector without any loss"),
        (FLOWTOK, "sampling.sampler=rk4", "unknown sampler 'rk4'; valid: euler, euler_release"),
        (
            FLOWTOK,
            "flow.null_probability=0",
            "guidance 1.5 needs an unconditional flow; flow.null_probability=0",
        ),
        (FLOWTOK, "flow.null_probability=1", "flow.null_probability must be in [0, 1), got 1.0"),
        (
            ROOT / "configs/demo/report.yaml",
            "heldout_shards=[]",
            "needs train_shards and heldout_shards",
        ),
    ],
)
def test_impossible_settings_are_refused_with_both_sides(path, override, message):
    # an empty value is null on the command line; '' is the empty string
    assert message in error_of(path, override.replace("projector_run=", "projector_run=''"))


def test_a_batch_that_processes_and_accumulation_do_not_divide_is_refused(tmp_path):
    run = start_run(tmp_path, "fp32", seed=0)
    assert batch_per_pass(run, TrainingConfig(batch_size=12, gradient_accumulation=3)) == 4
    with pytest.raises(ValueError, match="training.batch_size 10 is not divisible by .* = 1 x 3"):
        batch_per_pass(run, TrainingConfig(batch_size=10, gradient_accumulation=3))


def test_stored_tokens_of_another_shape_or_place_are_refused(tmp_path):
    stats = LatentStats(10, [0.0], [1.0], 1.0)
    TokensInfo(10, 32, 16, "a", "b", False, False, 1, ["a.tar"], {}, stats).save(tmp_path)
    data = TokenTextConfig(shards=[f"{tmp_path}/*.tar"])
    with pytest.raises(ValueError, match="holds 32 x 16 tokens, the config expects 77 x 16"):
        load_tokens_info(data, 77, 16, "no run", any_tokenizer=True)
    for shards in ([f"{tmp_path}/none/*.tar"], ["https://host/{0..3}.tar"]):
        with pytest.raises(
            ValueError, match="tokens.json.* does not exist: .* any_tokenizer=true and"
        ):
            load_tokens_info(TokenTextConfig(shards=shards), 32, 16, "no run", any_tokenizer=True)


def test_tokens_of_unknown_origin_need_consent_and_a_scale(tmp_path):
    info = load_tokens_info(
        TokenTextConfig(shards=["elsewhere/*.tar"]), 32, 16, "no run", 1.0143, any_tokenizer=True
    )
    assert (info.latent_scale, info.tokenizer_fingerprint, info.has_text_states) == (
        1.0143,
        "unknown",
        False,
    )


def test_the_scale_over_several_folders_is_that_of_all_samples(tmp_path):
    data = TokenTextConfig(
        sources={name: SourceConfig([f"{tmp_path}/{name}/*.tar"]) for name in "ab"}
    )
    for name, count, deviation in (("a", 30, 1.0), ("b", 10, 3.0)):
        (tmp_path / name).mkdir()
        stats = LatentStats(count, [0.0], [1.0], 1 / deviation)
        TokensInfo(count, 32, 16, "t", "e", False, False, 1, [], {}, stats).save(tmp_path / name)
    info = load_tokens_info(data, 32, 16, "no run", any_tokenizer=True)
    assert info.num_samples == 40 and info.latent_scale == pytest.approx(
        (0.75 * 1 + 0.25 * 9) ** -0.5
    )
    assert load_tokens_info(data, 32, 16, "no run", 2.0, True).latent_scale == 2.0
    TokensInfo(10, 32, 16, "t", "other", False, False, 1, [], {}, stats).save(tmp_path / "b")
    with pytest.raises(ValueError, match="text_encoder_fingerprint is e in .*/a, other in .*/b"):
        load_tokens_info(data, 32, 16, "no run", any_tokenizer=True)


def test_a_way_through_a_folder_that_does_not_exist_yet_is_cut_short(tmp_path):
    (tmp_path / "shared" / "tokens").mkdir(parents=True)
    (tmp_path / "shared" / "tokens" / "a.tar").touch()
    path = tmp_path / "x.yaml"
    path.write_text(
        f"stage: flowtok\nexperiment_dir: {tmp_path}/new\ntokenizer_run: ${{experiment_dir}}/../shared/tokenizer\n"
        "data: {shards: ['${experiment_dir}/../shared/tokens/*.tar']}\npictures: {captions: [a]}\n"
    )
    config = load_config(path)
    assert config.tokenizer_run == f"{tmp_path}/shared/tokenizer"
    assert config.data.shards == [f"{tmp_path}/shared/tokens/*.tar"]
