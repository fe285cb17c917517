"""Stops and restarts: resuming bit for bit, complete runs, broken losses, kills, two processes."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from conftest import shape_sample
from forks import start_ranks
from safetensors.torch import load_file, save_file
from sources import Evil
from tiny_experiment import PROGRAMS, equal, metrics, training, weights

import train_flowtok
import train_text_decoder
import train_tokenizer
from data.tar import write_shard
from eval.programs import start_processes
from modeling.layers import fingerprint
from training import checkpoint as ckpt
from training.pipelines import load_projector
from training.run import LOCK_FILE, start_run
from training.tokens import TokensInfo

ROOT = Path(__file__).parents[1]
LOSSES = {
    "tokenizer": (train_tokenizer, "generator_terms"),
    "text_decoder": (train_text_decoder, "compute_losses"),
    "flowtok": (train_flowtok, "compute_losses"),
}


class Stop(Exception):
    """What the tests interrupt a run with."""


def spoil(monkeypatch, stage, call, action):
    """Let `action` change the terms of the call-th call of a stage's losses."""
    (owner, name), calls = LOSSES[stage], []
    original = getattr(owner, name)

    def spoiled(*args):
        calls.append(1)
        terms = original(*args)
        return action(terms) if len(calls) == call else terms

    monkeypatch.setattr(owner, name, spoiled)


def stop(terms):
    raise Stop


def interrupt(monkeypatch, call, chain, folder, stage, *options):
    """Run a stage up to the call-th call of its losses."""
    with monkeypatch.context() as patch, pytest.raises(Stop):
        spoil(patch, stage, call, stop)
        chain.run_in(folder, stage, *options)


def refused(keys):
    """The body ends with an error that names these."""
    return pytest.raises(ValueError, match=keys)


def state(run):
    """All of the newest checkpoint."""
    folder = ckpt.latest_checkpoint(run)[1]
    saved = {path.name: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}
    values = ckpt.read_state(folder)
    del values["files"]
    return saved | {"model": weights(run), "ema": weights(run, ckpt.EMA_FILE), "state": values}


def inputs_of(chain, stage):
    """What a checkpoint must say of the earlier stages."""
    info = TokensInfo.load(chain.folder / "tokens")
    tower = {"text_encoder": info.text_encoder_fingerprint}
    if stage == "tokenizer":
        return tower
    if stage == "text_decoder":
        return tower | {"projector": "none"}
    projector = load_projector(chain.folder / "text_projector")
    return info.inputs() | {"projector": fingerprint(projector)}


# Resuming


@pytest.fixture
def repeatable_kernels(monkeypatch):
    """On a GPU some kernels add in another order each time, in a run without a stop as well."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(torch.cuda.is_available(), warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.usefixtures("repeatable_kernels")
@pytest.mark.parametrize(
    ("stage", "num_workers"), [("tokenizer", 1), ("text_decoder", 0), ("flowtok", 0)]
)
def test_a_stopped_and_resumed_run_ends_bit_for_bit_like_an_undisturbed_one(
    chain, tmp_path, monkeypatch, capsys, stage, num_workers
):
    options = training(max_steps=9, checkpoint_every_steps=3, log_every_steps=1)
    options += ["training.gradient_accumulation=2", f"data.num_workers={num_workers}"]
    whole = chain.run_in(tmp_path / "whole", stage, *options)
    # In the second pass of step 5, then, of the resumed run, in step 8.
    for call in (2 * 4 + 2, 2 * 4 + 1):
        interrupt(monkeypatch, call, chain, tmp_path / "parts", stage, *options)
    capsys.readouterr()
    parts = chain.run_in(tmp_path / "parts", stage, *options)
    assert f"{parts}: resuming at step 6" in capsys.readouterr().out
    assert [line["step"] for line in metrics(parts)] == list(range(1, 10))
    assert metrics(parts) == metrics(whole)
    assert equal(state(parts), state(whole))
    expected = {"step": 9, "ema_updates": 9, "num_processes": 1}
    assert state(parts)["state"] == expected | {"inputs": inputs_of(chain, stage)}


def test_a_longer_run_continues_a_complete_one_whose_last_step_is_saved(chain, tmp_path, capsys):
    options = ["optimizer.schedule=constant", "training.log_every_steps=1"]
    whole = chain.run_in(tmp_path / "whole", "tokenizer", *options, "training.max_steps=6")
    parts = chain.run_in(tmp_path / "parts", "tokenizer", *options, "training.max_steps=3")
    assert list(ckpt.checkpoint_folders(parts)) == [2, 3]  # every 2 steps, and the last
    (parts / "checkpoints" / "step_00000004.tmp").mkdir()  # half-written: not resumed from
    parts = chain.run_in(tmp_path / "parts", "tokenizer", *options, "training.max_steps=6")
    assert "training.max_steps: 3 -> 6" in capsys.readouterr().out
    assert equal(weights(parts), weights(whole)) and metrics(parts) == metrics(whole)
    assert not list((parts / "checkpoints").glob("*.tmp"))


def test_another_network_is_refused_when_resuming_and_another_batch_size_restarts_the_data(
    chain, tmp_path, capsys
):
    chain.run_in(tmp_path, "tokenizer", "training.max_steps=1")
    with refused("another network: tokenizer.encoder.width: 16 -> 32"):
        chain.run_in(tmp_path, "tokenizer", "tokenizer.encoder.width=32")
    capsys.readouterr()
    chain.run_in(tmp_path, "tokenizer", "training.max_steps=2", "training.batch_size=4")
    printed = capsys.readouterr().out
    assert "training.batch_size: 8 -> 4" in printed
    assert "data continues with epoch 1" in printed and "batch_size was 8, is 4" in printed


@pytest.mark.parametrize("file", [ckpt.OPTIMIZER_FILE, ckpt.rank_file(0)])
def test_a_checkpoint_executes_nothing(chain, tmp_path, monkeypatch, file):
    monkeypatch.chdir(tmp_path)
    run = chain.run_in(tmp_path, "tokenizer", "training.max_steps=1")
    folder = ckpt.latest_checkpoint(run)[1]
    path = folder / file
    torch.save(Evil(), path)
    with refused("no checkpoint of .* is whole .*; to start over, delete .*checkpoints"):
        chain.run_in(tmp_path, "tokenizer", "training.max_steps=2")
    # As a hostile author would write it, with checksums that vouch for the file.
    saved = ckpt.read_state(folder)
    saved["files"][file] = {"bytes": path.stat().st_size, "crc32": ckpt.file_crc32(path)}
    (folder / ckpt.STATE_FILE).write_text(json.dumps(saved))
    with refused(f"{file} is broken, or holds more .*: refused"):
        chain.run_in(tmp_path, "tokenizer", "training.max_steps=2")
    assert not (tmp_path / "pwned").exists()


# Complete runs


def contents(folder):
    """The lock's is another in each process."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != LOCK_FILE}


def files(folder):
    """When each file was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("stage", PROGRAMS)
def test_a_complete_stage_does_nothing_and_says_so(chain, capsys, stage):
    before = files(chain.folder)
    chain.run(stage)
    assert files(chain.folder) == before
    printed = capsys.readouterr().out
    assert "complete" in printed and printed.strip().endswith("nothing to do")
    assert "warning" not in printed
    if "training" in vars(chain.config(stage)):
        chain.run(stage, "training.seed=7", "training.log_every_steps=9", "data.num_workers=1")
        assert files(chain.folder) == before
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
        keys = ("training.seed", "training.log_every_steps", "data.num_workers")
        assert all(key in line for key in keys) and line.count(",") == len(keys)


# Non-finite losses


# The log or the save finds it.
@pytest.mark.parametrize(("stage", "log_every"), [("tokenizer", 1), ("flowtok", 8)])
def test_a_non_finite_loss_stops_naming_the_step_and_leaves_the_last_checkpoint(
    chain, tmp_path, monkeypatch, stage, log_every
):
    def break_loss(terms):
        return terms | {"loss": terms["loss"] * float("nan")}

    options = training(max_steps=8, log_every_steps=log_every, checkpoint_every_steps=2)
    message = "at step 3, rank 0: .*samples: .*last checkpoint"
    with monkeypatch.context() as patch, pytest.raises(FloatingPointError, match=message):
        spoil(patch, stage, call=3, action=break_loss)
        chain.run_in(tmp_path, stage, *options)
    run = tmp_path / stage
    assert list(ckpt.checkpoint_folders(run)) == [2]
    assert all(torch.isfinite(x).all() for x in weights(run).values())
    chain.run_in(tmp_path, stage, *options)
    assert [line["step"] for line in metrics(run)] == list(range(log_every, 9, log_every))


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(chain, tmp_path, capsys):
    options = [*training(checkpoint_every_steps=2), "optimizer.schedule=constant"]
    run = chain.run_in(tmp_path, "tokenizer", *options, "training.max_steps=4")
    path = ckpt.latest_checkpoint(run)[1] / ckpt.MODEL_FILE
    path.write_bytes(path.read_bytes()[:-4] + b"abcd")
    chain.run_in(tmp_path, "tokenizer", *options, "training.max_steps=5")
    output = capsys.readouterr()
    assert "step_00000004 is damaged (model.safetensors" in output.err
    assert "resuming at step 2" in output.out
    whole = chain.run_in(tmp_path / "whole", "tokenizer", *options, "training.max_steps=5")
    assert equal(state(run), state(whole))


# Stale inputs


def alter(run):
    """Change the weights of a finished run, as training it anew would."""
    path = ckpt.latest_checkpoint(run)[1] / ckpt.EMA_FILE
    tensors = load_file(path)
    save_file({name: x + 1e-3 if x.is_floating_point() else x for name, x in tensors.items()}, path)


# A complete run, a run to be resumed.
@pytest.mark.parametrize(("stage", "max_steps"), [("text_projector", 4), ("flowtok", 6)])
def test_a_run_on_tokens_that_were_made_anew_is_refused_naming_what_changed(
    chain, tmp_path, stage, max_steps
):
    folder = tmp_path / "experiment"
    shutil.copytree(chain.folder, folder)
    options = [path.replace(str(chain.folder), str(folder)) for path in chain.inputs(stage)]
    options += [f"experiment_dir={folder}", f"training.max_steps={max_steps}"]
    alter(folder / "tokenizer")
    shutil.rmtree(folder / "tokens")
    chain.run("tokens", f"tokenizer_run={folder}/tokenizer", f"experiment_dir={folder}")
    before = files(folder / stage)
    with refused(f"{stage} was trained: tokenizer was .*; latent_scale was .*Delete the"):
        chain.run(stage, *options)
    assert files(folder / stage) == before


@pytest.mark.parametrize(
    ("source", "key", "other"),
    [("text_projector", "projector_run", ""), ("flowtok", "init_from", "projector_run=''")],
)
def test_a_flow_whose_start_was_trained_anew_is_refused(chain, tmp_path, source, key, other):
    start = tmp_path / "start"
    shutil.copytree(chain.folder / source, start)
    options = [f"{key}={start}", "training.sample_every_steps=0", *other.split()]
    chain.run_in(tmp_path, "flowtok", *options)
    alter(start)
    name = key.removesuffix("_run")
    with refused(f"flowtok was trained: {name} was [0-9a-f]{{16}}, is .{{16}}. "):
        chain.run_in(tmp_path, "flowtok", *options, "training.max_steps=6")


@pytest.mark.parametrize("stage", ["text_encoder", "tokenizer", "text_decoder"])
def test_a_run_on_shards_that_were_made_anew_is_refused_naming_them(chain, tmp_path, capsys, stage):
    samples = [shape_sample(number) for number in range(8)]
    write_shard(tmp_path / "a.tar", samples)
    options = [f"data.shards=[{tmp_path}/*.tar]", "training.sample_every_steps=0"]
    run = chain.run_in(tmp_path, stage, *options, "training.max_steps=1")
    before = files(run)
    samples[3]["txt"] = "a new caption"
    write_shard(tmp_path / "a.tar", samples)
    write_shard(tmp_path / "b.tar", samples)
    said = f"{stage} was made of another .*a.tar was .*, is .*; .*b.tar is new. Delete it"
    for max_steps in (1, 2):  # a complete run, a run to be resumed
        with refused(said):
            chain.run_in(tmp_path, stage, *options, f"training.max_steps={max_steps}")
    assert files(run) == before
    # on another machine, where the data lies elsewhere
    samples[3] = shape_sample(3)
    (tmp_path / "copy").mkdir()
    write_shard(tmp_path / "copy" / "a.tar", samples)
    options.append(f"data.shards=[{tmp_path}/copy/*.tar]")
    for max_steps, said in ((1, "complete at step 1"), (2, "resuming at step 1")):
        chain.run_in(tmp_path, stage, *options, f"training.max_steps={max_steps}")
        assert said in capsys.readouterr().out


def test_a_run_goes_on_with_the_shards_that_its_config_adds_or_leaves_out(chain, tmp_path, capsys):
    for number, name in enumerate("abc"):
        samples = [shape_sample(number * 8 + index) for index in range(8)]
        write_shard(tmp_path / f"{name}.tar", samples)

    def run(max_steps, **weights):
        sources = [f"data.sources.{name}.shards=[{tmp_path}/{name}.tar]" for name in weights]
        sources += [f"data.sources.{name}.weight={weight}" for name, weight in weights.items()]
        sources += ["data.shards=[]", f"training.max_steps={max_steps}"]
        folder = chain.run_in(tmp_path, "text_encoder", *sources)
        return folder, capsys.readouterr().out

    run(1, a=1)
    # a complete run has not seen them
    with refused(r"b\.tar is new"):
        run(1, a=1, b=1)
    folder, said = run(2, a=1, b=2)
    assert "goes on with other shards: b.tar is new" in said and "resuming at step 1" in said
    folder, said = run(3, a=0, b=2, c=1)
    assert "c.tar is new; a.tar is gone" in said
    assert {*json.loads((folder / "source.json").read_text())["source_shards"]} == {
        "b.tar",
        "c.tar",
    }
    # what it was trained on must be the same
    write_shard(tmp_path / "b.tar", [shape_sample(index) for index in range(8)])
    with refused(r"b\.tar was .*, is "):
        run(4, b=1, a=1)


# What a start takes from the config


def test_a_network_key_that_did_not_exist_yet_counts_as_its_default(chain, tmp_path, capsys):
    run = chain.run_in(tmp_path, "tokenizer", "training.max_steps=1")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["tokenizer"].pop("latent_grid") is False
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with refused("another network: tokenizer.latent_grid: False -> True"):
        chain.run_in(tmp_path, "tokenizer", "tokenizer.latent_grid=true")
    capsys.readouterr()
    chain.run_in(tmp_path, "tokenizer", "training.max_steps=2")
    printed = [line for line in capsys.readouterr().out.splitlines() if "config changed" in line]
    assert printed == ["config changed since the last start: training.max_steps: 1 -> 2"]


@pytest.mark.parametrize(
    "begin", [lambda: start_run("a", "fp32", 0), lambda: start_processes("cpu")]
)
def test_engines_that_the_environment_asks_for_are_refused(monkeypatch, begin):
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        with monkeypatch.context() as patch, refused(f"{name}=true: "):
            patch.setenv(name, "true")
            begin()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    begin()


def test_a_first_start_that_fails_does_not_hold_its_config(chain, tmp_path, monkeypatch):
    interrupt(monkeypatch, 1, chain, tmp_path, "tokenizer")
    assert ckpt.latest_checkpoint(tmp_path / "tokenizer") is None
    run = chain.run_in(tmp_path, "tokenizer", "tokenizer.encoder.width=32", "training.max_steps=1")
    assert yaml.safe_load((run / "config.yaml").read_text())["tokenizer"]["encoder"]["width"] == 32


# Programs


def program(chain, folder, stage, *overrides):
    """Arguments of a stage's script."""
    overrides = [*chain.inputs(stage), f"experiment_dir={folder}", *overrides]
    return ["--config", str(chain.config_file(stage)), *overrides]


def environment(**variables):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "ACCELERATE_"))}
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return {**kept, **own, **variables}


def start(command, **variables):
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # or a signal to its group would reach this process
    )


MAINS_IN_TURN = """
import os, signal, sys
from configs.load import load_config
from tiny_experiment import PROGRAMS
import train_flowtok
killed_at, calls, original = int(sys.argv[1]), [], train_flowtok.compute_losses
def compute_losses(*args):
    calls.append(1)
    if len(calls) == killed_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)
train_flowtok.compute_losses = compute_losses
for words in sys.argv[2:]:
    name, _, file, *overrides = words.split("|")
    stage, main = PROGRAMS[name]
    main(load_config(stage, file, overrides))
"""


def run_on_two(folder, *words, killed_at=0):
    """Stages in turn on two processes: (their exit statuses, what they said)."""
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "mains.py"
    script.write_text(MAINS_IN_TURN)
    words = ["|".join(each) for each in words]
    ranks = start_ranks(folder / "log", 2, str(script), str(killed_at), *words)
    return [rank.wait() for rank in ranks], "".join(rank.output for rank in ranks)


def test_two_processes_run_all_stages_and_one_can_go_on(chain, tmp_path, capsys):
    stages = ["text_encoder", "tokenizer", "tokens", "text_projector", "text_decoder", "flowtok"]
    runs = [[stage, *program(chain, tmp_path, stage)] for stage in stages]
    frozen = program(chain, tmp_path / "frozen", "flowtok", "flow.projector=frozen")
    statuses, said = run_on_two(tmp_path / "log", *runs, ["flowtok", *frozen])
    assert statuses == [0, 0], said
    assert said.count(f"{tmp_path}/tokenizer: 4 steps in ") == 1  # one process talks
    assert contents(tmp_path / "tokens") == contents(chain.folder / "tokens")
    for stage in [*stages[:2], *stages[3:], "frozen/flowtok"]:
        assert ckpt.read_state(ckpt.latest_checkpoint(tmp_path / stage)[1])["num_processes"] == 2
        assert [line["step"] for line in metrics(tmp_path / stage)] == [2, 4]
        assert not list((tmp_path / stage).rglob("*.tmp"))

    # The tokenizer's checkpoint
    newest = ckpt.latest_checkpoint(tmp_path / "tokenizer")[1]
    ranks = [ckpt.rank_file(0), ckpt.rank_file(1)]
    assert sorted(path.name for path in newest.glob("rank_*")) == ranks
    expected = {"step": 4, "ema_updates": 4, "num_processes": 2}
    expected["inputs"] = inputs_of(chain, "tokenizer")
    assert ckpt.read_state(newest).items() >= expected.items()
    states = [torch.load(newest / rank, weights_only=True) for rank in ranks]
    assert [saved["loader"]["settings"]["rank"] for saved in states] == [0, 1]
    chain.run_in(tmp_path, "tokenizer", "training.max_steps=6")
    assert "data continues with epoch 1" in capsys.readouterr().out
    assert [line["step"] for line in metrics(tmp_path / "tokenizer")] == [2, 4, 6]
