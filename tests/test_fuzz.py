"""Hostile inputs: each ends in an error of ours or a right result; no hang, no left-over file.

Seeded, so that a failure comes again. The inputs are made from the tiny experiment.
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

import pytest
import torch
import yaml
from conftest import shape_sample
from PIL import Image
from sources import Evil
from tiny_experiment import PROGRAMS, stage_configs

import sample
from configs.load import load_config
from data.tar import write_shard
from modeling.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from modeling.layers import load_weights
from scripts import check_run
from training import checkpoint as ckpt
from training.loading import read_section
from training.optim import OptimizerConfig, build_optimizer, load_optimizer
from training.pictures import caption_grid, save_png
from training.pipelines import load_pipeline

REFUSALS = (ValueError, OSError, FloatingPointError)  # what exit_on_error prints in one line
CPU_SECONDS = 10.0  # an input may take
# Captions, prompts, keys, config values.
TEXTS = ["", " ", "\0", "a\0b", "\x1b[2J\x1b]0;owned\x07", "line\nbreak\r\ttab", "\ud800", "\ufeff"]
TEXTS += ["\u202eright to left", "\udcff\udc80", "\U0001f9d1\u200d\U0001f680" * 40, "漢字" * 500]
TEXTS += ["e\u0301" + "\u0301" * 3000, "a" * 100_000, "word " * 20_000, "!" * 300, "\0\uffff\ufffe"]
TEXTS += ["<script>alert(1)</script><img src=x onerror=y>", "<|startoftext|><|endoftext|>" * 10]
TEXTS += ["../../../etc/passwd", "/etc/passwd", "C:\\windows\\system32", "NaN", "null"]
TEXTS += ["$(touch pwned)`touch pwned`;touch pwned", "{{7*7}}${7*7}%s%n%x", "' OR 1=1 --"]


class Hung(BaseException):
    """An input took too long."""


REFUSED = object()


def attempt(action, shown):
    """What an input leads to, or REFUSED; anything else than that fails, with the input `shown`."""

    def on_time(number, frame):
        raise Hung

    handler = signal.signal(signal.SIGVTALRM, on_time)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    try:
        return action()
    except REFUSALS as error:
        assert str(error), shown
        return REFUSED
    except (Exception, Hung, SystemExit) as error:
        pytest.fail(f"{type(error).__name__}: {error!s:.300} for {shown!r:.300}")
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)


def spoil_bytes(draw, data):
    """A damaged or foreign file in place of `data`."""
    flipped, end = bytearray(data), draw.choice([len(data), min(200, len(data))])
    for _ in range(draw.choice([1, 5, 30])):
        flipped[draw.randrange(end)] ^= 1 << draw.randrange(8)
    foreign = [b"", bytes(len(data)), pickle.dumps(Evil()), b'{"a":' * 50_000, b"[" * 100_000]
    foreign += [gzip.compress(data), data + draw.randbytes(100), draw.randbytes(5000)]
    foreign += [struct.pack("<Q", 1 << 60) + data]
    return draw.choice([bytes(flipped), data[: draw.randrange(end)], draw.choice(foreign)])


@pytest.fixture(autouse=True)
def nothing_is_executed(tmp_path, monkeypatch):
    """In a folder of its own, where nobody makes the file that the inputs ask for."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.rglob("pwned"))


# Configs and the command line

VALUES = [None, True, -1, 0, 1.5, float("nan"), float("inf"), 10**30, [], {}, [[1], {"a": 2}], "1"]
VALUES += [{"a": {"b": {}}}, "${nowhere}", "${", "${oc.env:HOME}", "${run_dir}", "${.}", "${..a}"]
VALUES += ["${experiment_dir}${stage}", "???", *(text for text in TEXTS if len(text) < 1000)]
RAW = r"""
- a\n- b
stage: tokenizer\nstage: tokenizer
stage: [tokenizer]
stage: !!python/object/apply:os.system ['touch pwned']
!!python/object/new:type {args: [z, !!python/tuple [], {extend: !!python/name:exec }]}
a: &a\n  b: *a
stage: tokenizer\n? {a: b}\n: c
stage: tokenizer\n1: 2
stage: tokenizer\nnull: 2
stage: tokenizer\ndata: &d {shards: *d}
base: config.yaml\nstage: tokenizer
base: /etc/passwd
base: /dev/zero
base: [a, b]
base: 3
base: .
base: {a: b}
base: 'a\0b'
stage: 'a\tb
\tstage: tokenizer
%YAML 9.9\n---\nstage: tokenizer
--- 1\n--- 2
stage: 2020-01-01
stage: tokenizer\ntraining: 2020-01-01
stage: tokenizer\ntraining: {max_steps: 1e999}
stage: tokenizer\ntraining: {max_steps: 0o17, seed: 0b1}
stage: tokenizer\ndata: {shards: !!binary aGVsbG8=}
stage: tokenizer\ndata: {shards: !!set {a, b}}
"""
RAW = [line.replace("\\n", "\n").replace("\\t", "\t") for line in RAW.splitlines()]
RAW += ["stage: tokenizer\ntraining: {" * 400, "[" * 3000]
RAW += ["stage: " + "{a: " * 300 + "1" + "}" * 300]


def yaml_bomb(levels, width):
    """`width` ** `levels` values by aliases."""
    lines = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels + 1)]
    return "\n".join(["a0: &a0 [x]", *lines, ""])


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
            last = draw.choice(["x", 3, "max_step", "", "a.b", "a b", "\x1b[2J"])
        if change:
            group[last] = draw.choice(VALUES)
    return values


def test_hostile_configs(tmp_path, tiny_shards):
    draw, path, ends = random.Random(0), tmp_path / "config.yaml", []
    stages = stage_configs(tiny_shards)

    def load(text, stage="flowtok"):
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        schema = PROGRAMS[stage][0]
        ends.append(attempt(lambda: load_config(schema, path), text))
        assert ends[-1] is REFUSED or isinstance(ends[-1], schema)

    for text in [*RAW, yaml_bomb(4, 9), yaml_bomb(9, 9), yaml_bomb(30, 2)]:
        load(text)
    for _ in range(80):
        stage = draw.choice(list(stages))
        values = spoil_config(draw, {"experiment_dir": "runs/x", **stages[stage]})
        load(yaml.safe_dump(values, allow_unicode=True), stage)
    whole = yaml.safe_dump(stages["flowtok"]).encode()
    for _ in range(30):
        load(spoil_bytes(draw, whole)[:20_000])  # libyaml takes a minute for 100,000 brackets
    for encoding in ("utf-16", "utf-8-sig", "latin-1"):
        load(whole.decode().encode(encoding))
    assert list(tmp_path.iterdir()) == [path] and ends.count(REFUSED) > 40


WORDS = r"""
= == a a= =b .=1 ..=1 a.=1 .a=1 training..seed=1 training[0]=1 data.shards=[ data.shards={
data.shards=] training=[1] []=1 base=x.yaml training.seed=*a data.sources.x.weight=nan
training.seed=!!python/name:os.system
"""


def test_hostile_overrides(tmp_path, tiny_shards):
    draw, path = random.Random(1), tmp_path / "config.yaml"
    values = {"experiment_dir": "runs/x", **stage_configs(tiny_shards)["flowtok"]}
    path.write_text(yaml.safe_dump(values))
    words = [*WORDS.split(), "", "training={a: 1}", "\udcff=1", "training.seed=&a 1"]
    words += ["data.sources={a: {shards: [b]}}", f"{'a.' * 500}b=1", f"{'x' * 50_000}=1"]
    words += [f"training.seed={'[' * 2000}", f"training.seed={'9' * 6000}"]
    keys = [".".join(map(str, leaf)) for leaf in leaves(values)]
    for _ in range(60):
        value = draw.choice(VALUES)
        text = value if isinstance(value, str) else yaml.safe_dump(value).strip()
        words.append(f"{draw.choice(keys)}={text}")
    schema = PROGRAMS["flowtok"][0]
    ends = [attempt(lambda word=word: load_config(schema, path, [word]), word) for word in words]
    assert ends.count(REFUSED) > 30


# Prompts


def test_hostile_prompts(chain, tmp_path):
    draw, file = random.Random(2), tmp_path / "out" / "x.png"
    parts, default = load_pipeline(chain.folder, torch.device("cpu"))
    words = sample.known_words(chain.folder)
    prompts = [*TEXTS, *("".join(draw.choices(TEXTS[1:12], k=3)) for _ in range(10))]
    for _ in range(30):
        codes = [draw.choice([draw.randrange(0x300), draw.randrange(0x110000)]) for _ in range(40)]
        prompts.append("".join(map(chr, codes)))
    arguments = ["--run", str(chain.folder), "--steps", "1", "--device", "cpu"]

    def draw_one(prompt):
        args = sample.parse_args([*arguments, "--prompts", prompt])
        captions = sample.read_prompts(args)
        with contextlib.redirect_stderr(io.StringIO()):
            print(*sample.list_remarks(parts, words, captions))
        sampling = sample.sampling_of(args, default)
        [(image, caption)] = sample.generate(parts, args, sampling, captions)
        save_png(caption_grid(image[None], [caption], 1), file)
        return Image.open(file)

    for prompt in prompts:
        file.unlink(missing_ok=True)
        image = attempt(lambda prompt=prompt: draw_one(prompt), prompt)
        assert image is REFUSED or image.size[0] > 100
        left = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert left in ([], [file]), (prompt, left)


# Checkpoints


def rehash(folder):
    """Checksums that vouch for what is there: what a hostile author would write."""
    path = folder / ckpt.STATE_FILE
    with contextlib.suppress(ValueError, TypeError, RecursionError):  # the state itself is spoiled
        state = json.loads(path.read_text())
        state["files"] = {
            file.name: {"bytes": file.stat().st_size, "crc32": ckpt.file_crc32(file)}
            for file in folder.iterdir()
            if file != path
        }
        path.write_text(json.dumps(state))


STATES = ["null", "[]", "3", '"x"', "{}", '{"step": "4"}', '{"step": 1e400}', '{"files": []}']
STATES += ['{"step": ' + "9" * 5000 + "}", '{"files": {"ema.safetensors": []}}']
STATES += ['{"files": {"../../x": {"bytes": 0, "crc32": ""}}}']


def test_hostile_checkpoints(chain, tmp_path):
    draw = random.Random(3)
    run, step = tmp_path / "tokenizer", "checkpoints/step_00000004"
    shutil.copytree(chain.folder / "tokenizer", run, symlinks=True)
    pristine = chain.folder / "tokenizer" / step
    network = ImageTokenizer(read_section(run, "tokenizer", ImageTokenizerConfig))
    optimizer = build_optimizer(network, OptimizerConfig())

    def read(name):
        path = run / step / name
        if name == ckpt.STATE_FILE:
            latest = ckpt.latest_checkpoint(run, verify=True)
            return ckpt.check_inputs(latest[1], ckpt.read_state(latest[1])["inputs"])
        if name.endswith(".safetensors"):
            return load_weights(network, path)
        is_optimizer = name == ckpt.OPTIMIZER_FILE
        return load_optimizer(optimizer, path) if is_optimizer else ckpt.load_plain(path)

    files, ends = sorted(path.name for path in pristine.iterdir()), []
    for number in range(90):
        name = draw.choice(files)
        data = spoil_bytes(draw, (pristine / name).read_bytes())
        if name.endswith(".json") and number % 2:
            data = draw.choice(STATES).encode()
        # Not overwritten: the optimiser that was loaded from it is mapped.
        (run / step / name).unlink()
        (run / step / name).write_bytes(data)
        is_vouched_for = draw.random() < 0.5
        if is_vouched_for:
            rehash(run / step)
        shown = (name, len(data), data[:60])
        ends.append(attempt(lambda name=name: read(name), shown))
        if number % 4 == 0:
            found = attempt(lambda: check_run.check_folder(run), ("check_run", *shown))
            assert found is REFUSED or is_vouched_for or found[1], shown
        shutil.rmtree(run / step)
        shutil.copytree(pristine, run / step)
    assert ends.count(REFUSED) > 20


def test_what_is_no_state_of_an_optimizer_is_refused(tmp_path):
    """Though it looks like one."""
    optimizer = build_optimizer(torch.nn.Linear(3, 3), OptimizerConfig())
    whole = optimizer.state_dict()
    moments = {"exp_avg": torch.zeros(3, 4), "exp_avg_sq": torch.zeros(1)}
    foreign = [[], {}, {"state": {}}, {"state": [], "param_groups": []}]
    foreign += [{"state": {}, "param_groups": [{}]}, {**whole, "param_groups": 3}]
    foreign += [{**whole, "param_groups": whole["param_groups"][:1]}, {**whole, "state": {0: 3}}]
    foreign += [{**whole, "state": {0: moments | {"step": torch.tensor(1.0)}}}]
    for state in foreign:
        torch.save(state, tmp_path / "foreign.pt")
        end = attempt(lambda: load_optimizer(optimizer, tmp_path / "foreign.pt"), state)
        assert end is REFUSED, state


# Keys


def test_keys_from_data_name_no_file(chain, tmp_path):
    shards = tmp_path / "images"
    shards.mkdir()
    keys = [{"__key__": f"../../out{number}/../{number}"} for number in range(4)]
    samples = [shape_sample(number) | key for number, key in enumerate(keys)]
    write_shard(shards / "train.tar", samples)
    chain.run_in(tmp_path / "inside", "tokens", f"data.shards=[{shards}/*.tar]")
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    names = ["train.tar", "tokens.json", "latent_stats.json", "source.json", "vocabulary.json"]
    tokens = {f"inside/tokens/{name}" for name in [*names, "lock"]}
    assert written == {"images/train.tar"} | tokens
