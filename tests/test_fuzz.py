"""Hostile inputs: each ends in a clear error of ours or a right result; no other exception, no hang, no left-over file.

Seeded, so that a failure comes again. What the inputs are made from is read from the tiny experiment.
"""

import contextlib
import copy
import gzip
import io
import json
import pickle
import random
import shutil
import signal
import struct
from collections import Counter

import pytest
import torch
import yaml
from conftest import shape_sample
from PIL import Image
from tiny_experiment import PROGRAMS, stage_configs

import sample
from configs.load import load_config
from data.tar import write_shard
from modeling.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from scripts import check_run
from training import checkpoint as ckpt
from training.loading import read_section
from training.optim import OptimizerConfig, build_optimizer, load_optimizer
from training.pictures import caption_grid, save_png
from training.pipelines import load_pipeline

REFUSALS = (ValueError, OSError, FloatingPointError)  # what exit_on_error prints in one line
CPU_SECONDS = 10.0  # an input may take
TEXTS = [  # captions, prompts, keys, config values
    "",
    " ",
    "\0",
    "a\0b",
    "\x1b[2J\x1b]0;owned\x07",
    "line\nbreak\r\ttab",
    "\u202eright to left",
    "\ud800",
    "\udcff\udc80",
    "\ufeff",
    "\U0001f9d1\u200d\U0001f680" * 40,
    "e\u0301" + "\u0301" * 3000,
    "a" * 100_000,
    "word " * 20_000,
    "<script>alert(1)</script><img src=x onerror=y>",
    "../../../etc/passwd",
    "/etc/passwd",
    "C:\\windows\\system32",
    "$(touch pwned)`touch pwned`;touch pwned",
    "{{7*7}}${7*7}%s%n%x",
    "' OR 1=1 --",
    "NaN",
    "null",
    "\u0000\uffff\ufffe",
    "漢字" * 500,
    "<|startoftext|><|endoftext|>" * 10,
    "!" * 300,
]


class Hung(BaseException):
    """An input took too long."""


class Tally:
    """Tries inputs and counts how they end."""

    def __init__(self, what):
        self.what, self.outcomes, self.failures = what, Counter(), []

    def __call__(self, action, shown, is_right=lambda result: True):
        """Run `action` on an input, which is `shown` if it ends in neither an error of ours nor a right result."""

        def on_time(number, frame):
            raise Hung

        handler = signal.signal(signal.SIGVTALRM, on_time)
        signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
        try:
            result = action()
        except REFUSALS as error:
            outcome = "refused" if str(error) else "an error without a message"
        except (Exception, Hung, SystemExit) as error:
            outcome = f"{type(error).__name__}: {error!s:.300}"
        else:
            outcome = "right" if is_right(result) else "a wrong result"
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, handler)
        if outcome not in ("refused", "right"):
            self.failures.append(f"{outcome} for {shown!r:.300}")
            outcome = "failed"
        self.outcomes[outcome] += 1

    def finish(self, record_property, at_least):
        """Print the count; it is not for nothing that all were tried."""
        text = f"{self.what}: {self.outcomes.total()} inputs, " + ", ".join(
            f"{count} {name}" for name, count in sorted(self.outcomes.items())
        )
        print(text)
        record_property("counted", text)
        assert not self.failures, "\n".join([text, *self.failures])
        assert self.outcomes.total() >= at_least and self.outcomes["refused"] >= at_least // 5, text


def flip_bits(draw, data, number):
    """Some bits turned over."""
    data = bytearray(data)
    for _ in range(number):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def spoil_bytes(draw, data):
    """A damaged or foreign file in place of `data`."""
    kinds = [
        lambda: data[: draw.randrange(len(data))],
        lambda: data[: draw.randrange(min(200, len(data)))],
        lambda: flip_bits(draw, data, 1),
        lambda: flip_bits(draw, data, 30),
        lambda: flip_bits(draw, data[: len(data) // 8], 5) + data[len(data) // 8 :],
        lambda: draw.randbytes(draw.choice([1, 7, 8, 100, 5000])),
        lambda: b"",
        lambda: b"\0" * len(data),
        lambda: data + draw.randbytes(100),
        lambda: gzip.compress(data),
        lambda: pickle.dumps({"a": [1, 2]}),
        lambda: pickle.dumps(Evil()),
        lambda: b'{"a":' * 50_000,
        lambda: b"[" * 100_000,
        lambda: struct.pack("<Q", 1 << 60) + data,
    ]
    return draw.choice(kinds)()


class Evil:
    """Unpickled, it makes a file."""

    def __reduce__(self):
        return (open, ("pwned", "w"))


@pytest.fixture(autouse=True)
def nothing_is_executed(tmp_path, monkeypatch):
    """In a folder of its own, where nobody makes the file that the inputs ask for."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.rglob("pwned"))


# Configs and the command line

VALUES = [
    None,
    True,
    -1,
    0,
    1.5,
    float("nan"),
    float("inf"),
    10**30,
    [],
    {},
    [[1], {"a": 2}],
    {"a": {"b": {}}},
    "1",
]
VALUES += [
    "${nowhere}",
    "${",
    "${oc.env:HOME}",
    "${run_dir}",
    "${experiment_dir}${stage}",
    "${.}",
    "${..a}",
    "???",
]
VALUES += [text for text in TEXTS if len(text) < 1000]
RAW = [
    "",
    "- a\n- b\n",
    "stage: tokenizer\nstage: tokenizer\n",
    "stage: [tokenizer]\n",
    "stage: !!python/object/apply:os.system ['touch pwned']\n",
    "!!python/object/new:type {args: [z, !!python/tuple [], {extend: !!python/name:exec }]}\n",
    "a: &a\n  b: *a\n",
    "stage: tokenizer\n? {a: b}\n: c\n",
    "stage: tokenizer\n1: 2\n",
    "stage: tokenizer\nnull: 2\n",
    "stage: tokenizer\ndata: &d {shards: *d}\n",
    "base: config.yaml\nstage: tokenizer\n",
    "base: /etc/passwd\n",
    "base: /dev/zero\n",
    "base: [a, b]\n",
    "base: 3\n",
    "base: .\n",
    "base: {a: b}\n",
    "base: 'a\\0b'\n",
    "stage: 'a\tb\n",
    "\tstage: tokenizer\n",
    "stage: tokenizer\ntraining: {" * 400,
    "[" * 3000,
    "stage: " + "{a: " * 300 + "1" + "}" * 300,
    "%YAML 9.9\n---\nstage: tokenizer\n",
    "--- 1\n--- 2\n",
    "stage: 2020-01-01\n",
    "stage: tokenizer\ntraining: 2020-01-01\n",
    "stage: tokenizer\ntraining: {max_steps: 1e999}\n",
    "stage: tokenizer\ntraining: {max_steps: 0o17, seed: 0b1}\n",
    "stage: tokenizer\ndata: {shards: !!binary aGVsbG8=}\n",
    "stage: tokenizer\ndata: {shards: !!set {a, b}}\n",
]


def yaml_bomb(levels, width):
    """`width` ** `levels` values by aliases."""
    lines = ["a0: &a0 [x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels + 1)]
    return "\n".join([*lines, ""])


def leaves(values, path=()):
    """Paths of all values of nested dicts, groups included."""
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))


def spoil_config(draw, values):
    """A config with some values of another kind, lost, or never heard of."""
    values = copy.deepcopy(values)
    for _ in range(draw.choice([1, 1, 2, 5])):
        *parents, last = draw.choice(list(leaves(values)))
        group = values
        for key in parents:
            group = group[key]
        change = draw.randrange(5)
        if change == 0:
            del group[last]
        elif change == 1:
            group[draw.choice(["x", 3, "max_step", "", "a.b", "a b", "\x1b[2J"])] = draw.choice(
                VALUES
            )
        else:
            group[last] = draw.choice(VALUES)
    return values


def test_hostile_configs(tmp_path, tiny_shards, record_property):
    draw, tally, path = random.Random(0), Tally("configs"), tmp_path / "config.yaml"
    stages = stage_configs(tiny_shards)

    def load(text, stage="flowtok"):
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        return lambda: load_config(PROGRAMS[stage][0], path)

    for text in [*RAW, yaml_bomb(4, 9), yaml_bomb(9, 9), yaml_bomb(30, 2)]:
        tally(load(text), text)
    for _ in range(150):
        stage = draw.choice(list(stages))
        values = {"experiment_dir": "runs/x", **stages[stage]}
        text = yaml.safe_dump(spoil_config(draw, values), allow_unicode=True)
        schema = PROGRAMS[stage][0]
        tally(load(text, stage), text, lambda config, schema=schema: isinstance(config, schema))
    whole = yaml.safe_dump(stages["flowtok"]).encode()
    for _ in range(60):
        data = spoil_bytes(draw, whole)[:20_000]  # libyaml takes a minute for 100,000 brackets
        tally(load(data), data)
    for encoding in ("utf-16", "utf-8-sig", "latin-1"):
        tally(load(whole.decode().encode(encoding)), encoding)
    assert list(tmp_path.iterdir()) == [path]
    tally.finish(record_property, 200)


def test_hostile_overrides(tmp_path, tiny_shards, record_property):
    draw, tally, path = random.Random(1), Tally("overrides"), tmp_path / "config.yaml"
    values = {
        "experiment_dir": "runs/x",
        **stage_configs(tiny_shards)["flowtok"],
    }
    path.write_text(yaml.safe_dump(values))
    valid = [".".join(map(str, leaf)) for leaf in leaves(values)]
    words = [
        "",
        "=",
        "==",
        "a",
        "a=",
        "=b",
        ".=1",
        "..=1",
        "a.=1",
        ".a=1",
        "training..seed=1",
        "training[0]=1",
    ]
    words += [
        "data.shards=[",
        "data.shards={",
        "data.shards=]",
        "training={a: 1}",
        "training=[1]",
        "[]=1",
        "\udcff=1",
    ]
    words += [
        "base=x.yaml",
        "training.seed=*a",
        "training.seed=!!python/name:os.system",
    ]
    words += ["data.sources.x.weight=nan", "data.sources={a: {shards: [b]}}", "training.seed=&a 1"]
    words += [
        f"{'a.' * 500}b=1",
        f"{'x' * 50_000}=1",
        f"training.seed={'[' * 2000}",
        f"training.seed={'9' * 6000}",
    ]
    for _ in range(100):
        value = draw.choice(VALUES)
        words.append(
            f"{draw.choice(valid)}={value if isinstance(value, str) else yaml.safe_dump(value).strip()}"
        )
    for word in words:
        tally(lambda word=word: load_config(PROGRAMS["flowtok"][0], path, [word]), word)
    tally.finish(record_property, 100)


# Prompts


def test_hostile_prompts(chain, tmp_path, record_property):
    draw, tally = random.Random(2), Tally("prompts")
    parts, default = load_pipeline(chain.folder, torch.device("cpu"))
    prompts = [*TEXTS, *("".join(draw.choices(TEXTS[1:12], k=3)) for _ in range(10))]
    for _ in range(30):
        codes = [draw.choice([draw.randrange(0x300), draw.randrange(0x110000)]) for _ in range(40)]
        prompts.append("".join(map(chr, codes)))
    arguments = ["--run", str(chain.folder), "--steps", "1", "--device", "cpu"]

    def draw_one(prompt):
        args = sample.parse_args([*arguments, "--prompts", prompt])
        captions = sample.read_prompts(args)
        sampling = sample.sampling_of(args, default)
        with contextlib.redirect_stderr(io.StringIO()):
            print(*sample.list_cuts(parts, captions), *sample.list_strangers(args.run, captions))
        [(image, caption)] = sample.generate(parts, args, sampling, captions)
        save_png(caption_grid(image[None], [caption], 1), tmp_path / "out" / "x.png")
        return Image.open(tmp_path / "out" / "x.png")

    for prompt in prompts:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        tally(lambda prompt=prompt: draw_one(prompt), prompt, lambda image: image.size[0] > 100)
        left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
        assert left in ([], ["x.png"]), (prompt, left)
    tally.finish(record_property, 0)


# Checkpoints


def rehash(folder):
    """Checksums that vouch for what is there: what a hostile author would write."""
    try:
        state = json.loads((folder / ckpt.STATE_FILE).read_text())
        files = [path for path in folder.iterdir() if path.name != ckpt.STATE_FILE]
        state["files"] = {
            path.name: {"bytes": path.stat().st_size, "crc32": ckpt.file_crc32(path)}
            for path in files
        }
        (folder / ckpt.STATE_FILE).write_text(json.dumps(state))
    except (ValueError, TypeError, RecursionError):
        pass  # the state itself is what was spoiled


def test_hostile_checkpoints(chain, tmp_path, record_property):
    draw, tally = random.Random(3), Tally("checkpoints")
    config = read_section(chain.folder / "tokenizer", "tokenizer", ImageTokenizerConfig)
    run, pristine = tmp_path / "tokenizer", chain.folder / "tokenizer"
    step = "checkpoints/step_00000004"
    network = ImageTokenizer(config)
    optimizer = build_optimizer(network, OptimizerConfig())
    files = sorted(path.name for path in (pristine / step).iterdir())

    def read(name):
        path = run / step / name
        if name == ckpt.STATE_FILE:
            latest = ckpt.latest_checkpoint(run, verify=[ckpt.ALL_FILES])
            return ckpt.check_inputs(latest[1], ckpt.read_state(latest[1])["inputs"])
        if name.endswith(".safetensors"):
            return ckpt.load_weights(network, path)
        return (
            load_optimizer(optimizer, path)
            if name == ckpt.OPTIMIZER_FILE
            else ckpt.load_plain(path)
        )

    texts = [
        "null",
        "[]",
        "3",
        '"x"',
        "{}",
        '{"step": "4"}',
        '{"step": 1e400}',
        '{"step": ' + "9" * 5000 + "}",
    ]
    texts += [
        '{"files": {"../../x": {"bytes": 0, "crc32": ""}}}',
        '{"files": []}',
        '{"files": {"ema.safetensors": []}}',
    ]
    shutil.copytree(pristine, run, symlinks=True)
    for number in range(170):
        name = draw.choice(files)
        original = (pristine / step / name).read_bytes()
        data = spoil_bytes(draw, original)
        if name.endswith(".json") and number % 2:
            data = draw.choice(texts).encode()
        (
            run / step / name
        ).unlink()  # not overwritten: the optimiser that was loaded from it is mapped
        (run / step / name).write_bytes(data)
        is_vouched_for = draw.random() < 0.5
        if is_vouched_for:
            rehash(run / step)
        shown = (name, len(data), data[:60])
        tally(lambda name=name: read(name), shown)
        if number % 4 == 0:
            tally(
                lambda: check_run.check_folder(run, quick=False),
                ("check_run", *shown),
                lambda report, vouched=is_vouched_for: vouched or report.problems,
            )
        shutil.rmtree(run / step)
        shutil.copytree(pristine / step, run / step)
    for number, state in enumerate(foreign_optimizers(optimizer)):
        torch.save(state, tmp_path / f"{number}.pt")
        tally(
            lambda number=number: load_optimizer(optimizer, tmp_path / f"{number}.pt"),
            state,
            lambda result: False,
        )
    tally.finish(record_property, 200)


def foreign_optimizers(optimizer):
    """What is no state of this optimiser, though it looks like one."""
    whole = optimizer.state_dict()
    yield from (
        [],
        {},
        {"state": {}},
        {"state": [], "param_groups": []},
        {"state": {}, "param_groups": [{}]},
    )
    yield {**whole, "param_groups": whole["param_groups"][:1]}
    yield {**whole, "param_groups": 3}
    yield {**whole, "state": {0: 3}}
    moments = {
        "step": torch.tensor(1.0),
        "exp_avg": torch.zeros(3, 3),
        "exp_avg_sq": torch.zeros(1),
    }
    yield {**whole, "state": {0: moments}}


def test_hostile_checkpoints_are_not_trained_on(chain, tmp_path, record_property, capsys):
    draw, tally = random.Random(4), Tally("resumes")
    run = tmp_path / "tokenizer"
    step = "checkpoints/step_00000004"
    names = [
        ckpt.MODEL_FILE,
        ckpt.EMA_FILE,
        ckpt.OPTIMIZER_FILE,
        ckpt.STATE_FILE,
        ckpt.rank_file(0),
        "config.yaml",
    ]
    for _ in range(40):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(chain.folder / "tokenizer", run, symlinks=True)
        name = draw.choice(names)
        path = run / name if name == "config.yaml" else run / step / name
        data = spoil_bytes(draw, path.read_bytes())
        path.write_bytes(data)
        if draw.random() < 0.7:
            rehash(run / step)
        options = ["training.max_steps=5", "training.sample_every_steps=0"]
        tally(
            lambda options=options: chain.run_in(tmp_path, "tokenizer", *options),
            (name, len(data), data[:60]),
        )
        assert ckpt.latest_checkpoint(run)[0] in (2, 4, 5)
        assert not list(run.glob("checkpoints/step_*.tmp"))
    tally.finish(record_property, 40)


# Keys


def test_keys_from_data_name_no_file(chain, tmp_path):
    shards = tmp_path / "images"
    shards.mkdir()
    samples = [
        shape_sample(number) | {"__key__": f"../../out{number}/../{number}"} for number in range(4)
    ]
    write_shard(shards / "train.tar", samples)
    chain.run_in(tmp_path / "inside", "tokens", f"data.shards=[{shards}/*.tar]")
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    names = ("train.tar", "tokens.json", "latent_stats.json")
    assert written == {"images/train.tar", *(f"inside/tokens/{name}" for name in names)}
