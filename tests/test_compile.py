"""training.compile: the blocks run compiled and train what they train without; what it refuses."""

import shutil

import pytest
import torch
import torch._inductor.config
from tiny_experiment import metrics, weights
from torch._dynamo.utils import counters

OPTION = "training.compile=true"
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")


@needs_compiler
@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["flowtok", "tokenizer"])
# No vector code, which depends on the processor: nor is it tried out which kinds there are.
@torch._inductor.config.patch({"cpp.simdlen": 1, "cpp.vec_isa_ok": False, "compile_threads": 1})
def test_compiled_blocks_train_the_same_weights(chain, tmp_path, stage):
    # No dropout: compiled, it draws other numbers.
    options = ["flow.projector=frozen"] if stage == "flowtok" else []
    plain = chain.run_in(tmp_path / "plain", stage, *options)
    torch._dynamo.reset()
    counters.clear()
    compiled = chain.run_in(tmp_path / "compiled", stage, OPTION, *options)
    assert counters["stats"]["unique_graphs"] >= 2 and not counters["graph_break"]
    for left, right in zip(metrics(plain), metrics(compiled), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)
    before, after = weights(plain), weights(compiled)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=1e-3, atol=1e-4, msg=name)
    if stage == "flowtok":  # once is enough: it compiles anew
        chain.run_in(tmp_path / "compiled", stage, OPTION, *options, "training.max_steps=6")
        assert metrics(compiled)[-1]["step"] == 6
