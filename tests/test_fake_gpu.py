"""Training and sampling on a GPU that is not there (fake_gpu.py): no wrong device or type, no wait in a step."""
import os
import shutil
import subprocess
import sys
from textwrap import dedent

import pytest
import torch

from model import DualDiffusion
from sample import SHIPPED
from train import BLOCKS, RECIPES

pytestmark = pytest.mark.skipif(not shutil.which("g++") or bool(torch.version.cuda), reason="wants g++, no CUDA build")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def run(*args):
    done = subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def table():
    """The rows of the tiny preset, {stage: cells}. Stages 0 and 2 have also saved, loaded and gathered weights."""
    lines = [line.strip("| ").split(" | ") for line in run("tests/fake_gpu.py", "--tiny").splitlines()[2:]]
    return {name: cells for name, *cells in lines}


@pytest.mark.skipif("SLOW" not in os.environ, reason="takes a minute; SLOW=1 runs it")
def test_memory_and_flops_are_those_of_closed_forms(table):
    """Stage 1, where all learns but the VAE, each block computed twice. Bytes: float32, with one moment for Muon's
    matrices and two for the rest. FLOPs: 2 per weight and token, 4 per pair of tokens and channel in attention, for
    outputs; as many for outputs again; twice that for gradients; and Muon's 22 products of matrices."""
    dd, recipe = DualDiffusion.load(SHIPPED), RECIPES["tiny"]["1"]
    assert list(table) == [*"012", "2hr", "3"]
    _, rows, flops, _, state, *_ = table["1"]
    blocks = [block for part in (dd.ddit, dd.t5) for block in part.modules() if isinstance(block, BLOCKS)]
    def matrices_in(blocks):
        return {id(m.weight): m.weight for b in blocks for m in b.modules() if isinstance(m, torch.nn.Linear)}

    def muon(matrices):
        return sum(4 * m ** 2 * n + 5 * 8 * m ** 3 for m, n in (sorted(w.shape) for w in matrices.values()))
    matrices = matrices_in(blocks)
    size = sum(w.nbytes for w in dd.state_dict().values()) + sum(
        p.nbytes * (1 if id(p) in matrices else 2) for part in (dd.ddit, dd.t5) for p in part.parameters())
    assert float(state) * 1e9 == pytest.approx(size, rel=0.01)

    d, t, length, patches = dd.config.ddit, dd.config.t5, recipe.length, 16
    inner, both = t.num_heads * t.d_kv, patches + length
    block = 24 * d.width ** 2 * both + 4 * both ** 2 * d.width + 2 * 12 * d.width ** 2
    layer = 2 * length * (4 * t.d_model * inner + 3 * t.d_model * t.d_ff) + 4 * length ** 2 * inner
    ends = 2 * d.width * (2 * patches * d.channels * d.patch ** 2 + length * t.d_model)
    head = 2 * d.width * d.vocab * length / 2  # half of the texts' tokens are masked, on average
    unused = 4 * 18 * d.width ** 2 * both  # in the last block neither half needs the end of the other stream
    row = 2 * 4 * (d.depth * block + t.num_layers * layer) - unused + 2 * 3 * ends + 3 * head
    assert rows == "64 of 64" and float(flops) == pytest.approx(64 * row + muon(matrices), rel=0.02)
    less = 2 * t.num_layers * layer  # stage 2: the matrices of T5 get no gradients, and Muon does not turn them
    assert float(table["2"][2]) == pytest.approx(
        64 * (row - less) + muon(matrices_in(dd.ddit.joint_blocks)), rel=0.02)


def test_drawing_waits_once_reading_brings_back_no_logits_and_mistakes_are_noticed():
    """In a process of its own, for fake_gpu.py has to come before torch."""
    run("-c", dedent("""
        import sys; sys.path[:0] = ['tests']
        from pytest import raises
        from fake_gpu import *
        from first_gpu import *
        with GPU() as gpu:
            dd = DualDiffusion.load(SHIPPED, device=CUDA, dtype=BF16)
            gpu.begin()
            text_to_image(dd, ["a red circle"], steps=3)
            assert set(gpu.waits.values()) == {1}  # so none is in the loop of the three steps
            gpu.begin()
            caption(dd, torch.zeros(1, 3, 64, 64), steps=3, temperature=1.0)
            brought = [int(where.split()[1]) for where in gpu.waits if "to the CPU" in where]
            assert brought and max(brought) <= dd.config.settings.length
        with GPU() as gpu:
            x = torch.zeros(4, 4, device=CUDA)
            for mistake in (lambda: x + torch.zeros(4, 4), lambda: x @ x.bfloat16(), lambda: x.nonzero()):
                with raises((RuntimeError, TypeError)):
                    mistake()
            assert not gpu.waits and gpu.alive == 64
            x.sum().item(), x.to("cpu"), torch.zeros(4).to(CUDA)
            assert gpu.waits.total() == 3
        plain = train.losses.flow_matching_loss
        train.losses.flow_matching_loss = lambda velocity, *rest: plain(velocity * velocity.sum().item(), *rest)
        with raises(RuntimeError, match="waits for the GPU: .*losses.py"):
            step("tiny", "2", 1, "ddp")"""))
