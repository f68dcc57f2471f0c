"""What training and sampling cost at full size, and whether they would run, on a GPU that is not there.

    python tests/fake_gpu.py                      the table of "What it costs" in tests/README.md, in some minutes
    python tests/fake_gpu.py --stage 2 --gpus 8   one row of it, and its peak
    python tests/fake_gpu.py --tiny               the tiny preset, with its checkpoints

The program's own code runs on torch's fake tensors, which have a shape, a type and the device "cuda", but no memory.
The exchange between processes is fake, too. What lies on the CPU is real. This program raises where devices or types
are mixed, and where a training step makes the host wait for the GPU. It counts FLOPs, bytes on the GPU, bytes that a
process sends, and waits. It cannot see time, values, what kernels allocate inside, fragmentation, NCCL's buffers,
and compiled code. Days are at half of an H100's 989e12 FLOP/s (bf16), with images that are encoded in every step.
Wants g++, and torch's CPU build."""
# ruff: noqa: E402
import argparse
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections import Counter
from importlib.util import find_spec
from unittest.mock import MagicMock

SHIM = """// what torch's C++ asks of a GPU
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
struct Guard : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, Device(kCUDA, 0)); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
struct CUDAHooks : at::CUDAHooksInterface {
  CUDAHooks(at::CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
};
namespace at { REGISTER_CUDA_HOOKS(CUDAHooks) }
"""
TOP, TORCH = os.path.dirname(os.path.dirname(os.path.abspath(__file__))), os.path.dirname(find_spec("torch").origin)
if not shutil.which("g++"):
    sys.exit("fake_gpu.py: wants g++; install it, and torch's CPU build")
with tempfile.TemporaryDirectory() as folder:  # before torch is imported, which looks at once for devices
    command = f"g++ -x c++ - -std=c++20 -fPIC -shared -I{TORCH}/include -o {folder}/gpu.so"
    subprocess.run(command.split(), input=SHIM, text=True, check=True)
    for library in (f"{TORCH}/lib/libtorch_cpu.so", f"{folder}/gpu.so"):
        ctypes.CDLL(library, ctypes.RTLD_GLOBAL)

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, TOP)
from first_gpu import BF16, COUNTS, PASSES, full_size, learner_and_batch, row, run_step, ways

import data
import train
from model import PARTS, PRESETS
from sample import caption, text_to_image

CUDA, aten = torch.device("cuda", 0), torch.ops.aten
plain_attention, plain_resize = F.scaled_dot_product_attention, torch.UntypedStorage.resize_


def attention(q, k, v, attn_mask=None, scale=None):
    """The kernel that torch chooses on CUDA."""
    if q.device.type == "cpu":
        return plain_attention(q, k, v, attn_mask, scale=scale)
    if attn_mask is None and q.dtype == BF16 and q.shape[-1] <= 256:
        return aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]
    bias = None if attn_mask is None else attn_mask.expand(*q.shape[:3], k.shape[2])
    return aten._scaled_dot_product_efficient_attention(q, k, v, bias, torch.is_grad_enabled(), scale=scale)[0]


def leaves(nested):
    return [leaf for x in nested for leaf in leaves(x)] if isinstance(nested, (list, tuple)) else [nested]


class GPU(TorchDispatchMode):
    """Sees every operation of the code inside `with GPU() as gpu`."""
    def __init__(self):
        super().__init__()
        self.fake, self.sizes, self.alive = FakeTensorMode(allow_non_fake_inputs=True), {}, 0
        self.begin()
        torch._C._set_only_lift_cpu_tensors(True)  # or torch.tensor(..., device="cuda") would not be seen
        F.scaled_dot_product_attention = attention
        torch.UntypedStorage.resize_ = lambda *args: self.resize(*args)  # by which FSDP frees its buffers
        torch.cuda.Stream = torch.cuda.Event = torch.cuda.stream = torch.cuda.current_stream = MagicMock()
        torch.cuda.is_bf16_supported, torch.cuda._lazy_init = lambda *args: True, lambda: None
        torch.cuda.current_device, torch.cuda.amp.common.amp_definitely_not_available = lambda: 0, lambda: False

    def begin(self):
        self.peak, self.flops, self.sent, self.waits = self.alive, 0, 0, Counter()

    def resize(self, storage, size):
        plain_resize(storage, size)
        if storage._cdata in self.sizes:
            self.hold(storage)

    def hold(self, storage):
        """Count a storage, or its new size, until its memory is freed, and with it the Python object."""
        key = storage._cdata
        if key not in self.sizes:
            weakref.finalize(storage, lambda: self.add(-self.sizes.pop(key)))
        self.add(storage.nbytes() - self.sizes.get(key, 0))
        self.sizes[key] = storage.nbytes()

    def add(self, size):
        self.alive += size
        self.peak = max(self.peak, self.alive)

    def wait(self, why):
        ours = [f for f in traceback.extract_stack() if os.path.dirname(f.filename) == TOP]
        self.waits[f"{os.path.basename(ours[-1].filename)}:{ours[-1].lineno} {why}" if ours else why] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, op = kwargs or {}, func._overloadpacket
        if any(not issubclass(t, FakeTensor) and t not in (torch.Tensor, torch.nn.Parameter) for t in types):
            return NotImplemented  # a DTensor; the operation on what it holds follows
        tensors = [x for x in leaves((*args, *kwargs.values())) if isinstance(x, torch.Tensor)]
        target = kwargs.get("device") and torch.device(kwargs["device"]).type
        if target != "cuda" and all(x.device.type != "cuda" for x in tensors):
            return func(*args, **kwargs)
        if op in (aten._local_scalar_dense, aten.equal):
            self.wait(op.__name__)
            return True
        if op is aten._to_copy and target == "cpu":
            self.wait(f"{args[0].numel()} numbers to the CPU")
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if op in (aten._to_copy, aten.copy_) and tensors[-1].device.type == "cpu" and not kwargs.get(
                "non_blocking", args[2:] == (True,)):
            self.wait("to the GPU")
        if op in (aten.index, aten.index_put_) and any(x is not None and x.device.type == "cpu" for x in args[1]):
            self.wait("an index from the CPU")
            args = args[0], [i for x in args[1] for i in (
                x.nonzero(as_tuple=True) if x is not None and x.dtype == torch.bool else [x])], *args[2:]
        if op in flop_registry and "attention" not in op.__name__ and len({x.dtype for x in tensors}) > 1:
            raise TypeError(f"{func}: {[x.dtype for x in tensors]}")
        with self.fake:
            out = func(*args, **kwargs)
        self.flops += flop_registry[op](*args, **kwargs, out_val=out) if op in flop_registry else 0
        if func.namespace == "c10d":
            n = next(dist.ProcessGroup.unbox(x).size() for x in args if "ProcessGroup" in str(x))
            self.sent += max(x.nbytes for x in tensors) * (1 + (op.__name__ == "allreduce_")) * (n - 1) // n
        for x in leaves(out):
            if isinstance(x, FakeTensor) and x.device.type == "cuda":
                self.hold(x.untyped_storage())
        return out


def step(preset, stage, gpus, parallel="fsdp", checkpointing=True, passes=1):
    """A row about a training step -> its peak, GB. At most two passes are run, and FLOPs scaled up."""
    os.environ["LOCAL_WORLD_SIZE"] = str(min(8, gpus))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    recipe, run = train.RECIPES[preset][stage], min(passes, 2)
    rows = recipe.batch // gpus // passes
    with GPU() as gpu, tempfile.TemporaryDirectory() as out:
        learner, batch = learner_and_batch(preset, stage, rows, CUDA, out, parallel, checkpointing)
        state = gpu.alive
        gpu.begin()
        run_step(learner, [batch] * run)
        flops = gpu.flops * passes / run * gpus
        days = recipe.steps * flops / (gpus * 0.5 * 989e12) / 86400
        row(stage, f"{gpus} {parallel}{', checkpointed' * checkpointing}", f"{rows} of {rows * passes}", flops, days,
            state / 1e9, gpu.peak / 1e9, gpu.sent / 1e9, gpu.waits.total())
        if gpu.waits:
            raise RuntimeError(f"a training step waits for the GPU: {dict(gpu.waits)}")
        if preset == "tiny" and stage in ("0", "2"):
            learner.save(2)
            assert learner.load() == 2
            learner.final_weights()
    dist.destroy_process_group()
    return gpu.peak / 1e9


def use(dd, gpu, size, length=256):
    """Rows about drawing and captioning an image of that size."""
    state, pixels = gpu.alive, torch.zeros(1, 3, size, size)
    for what, run in (("picture", lambda: text_to_image(dd, ["x"], "", size, size, length, steps=2)),
                      ("caption", lambda: caption(dd, pixels, length, 2, temperature=1.0))):
        gpu.begin()
        run()
        row(f"a {what} of {size}, 2 steps", 1, "1 of 1", float(gpu.flops), "", state / 1e9, gpu.peak / 1e9, "",
            gpu.waits.total())


def at_once(dd, gpu):
    """A table of the peak above the weights, in GB, of several images at once."""
    data.PIXELS["cuda"] = 2 ** 40  # no slices
    state = gpu.alive
    print()
    row("GB above the weights, at once", *COUNTS)
    row(*["---"] * 5)
    for size in (256, 512, 1024):
        for what, run in ways(dd, size).items():
            peaks = []
            for count in COUNTS:
                gpu.begin()
                with torch.no_grad():
                    run(count)
                peaks.append((gpu.peak - state) / 1e9)
            row(f"{what}, {size} pixels", *peaks)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=PASSES)
    parser.add_argument("--gpus", type=int, metavar="N", help="a number that divides the batch")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--use", action="store_true", help="only the rows of drawing and reading")
    asked = parser.parse_args()
    stages = [asked.stage] if asked.stage else PASSES
    row("stage", "GPUs", "rows at once", "FLOPs a step", "days", "state, GB", "peak, GB", "sent, GB", "waits")
    row(*["---"] * 9)
    if asked.tiny:
        for stage in ("0", *stages):
            step("tiny", stage, 1, "ddp", checkpointing=stage != "0", passes=2 if stage == "2hr" else 1)
        return
    train.DualDiffusion.load, train.find_parts = full_size, lambda *files: (PRESETS["sd3-medium"], {}, None)
    for stage in () if asked.use else stages:
        for gpus in [asked.gpus] if asked.gpus else (1, 8, 32):
            passes = PASSES[stage] if gpus == 1 else 1
            peak = step("sd3-medium", stage, gpus, "fsdp", gpus < 32 or stage not in ("1", "3"), passes)
    if asked.stage and asked.gpus:
        print(f"peak {peak:.1f} GB")
    elif not (asked.stage or asked.gpus):
        with GPU() as gpu:
            dd = full_size(None, None, None, None, CUDA, dict.fromkeys(PARTS, BF16))
            use(dd, gpu, 512)
            use(dd, gpu, 1024)
            at_once(dd, gpu)


if __name__ == "__main__":
    main()
