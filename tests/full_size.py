"""Full size on this machine: writes SD3-medium and T5-XXL with random weights in Stability's own layout (bf16, 14 GB,
in a temporary folder), loads them as sample.py does, and answers one question about a 256x256 image in 2 steps.

    python tests/full_size.py SPIECE.MODEL [FOLDER]

Prints the time to load, the peak of resident memory over the bytes of the weights, and the time of a pass. Needs 24 GB
of memory, or less: the system can reclaim pages of mapped weights.
"""
import os
import resource
import subprocess
import sys
import tempfile
import time

import torch
from safetensors.torch import save_file

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import make_golden  # noqa: E402

from model import PARTS, PREFIXES, PRESETS, DDiTConfig, DualDiffusion, make_part  # noqa: E402
from sample import unmask  # noqa: E402


def write(folder):
    config = PRESETS["sd3-medium"]
    with torch.device("meta"):
        shapes = {part: {name: tuple(w.shape) for name, w in make_part(getattr(config, part)).state_dict().items()}
                  for part in PARTS}
    shapes["ddit"] = {name: tuple(w.shape) for name, w in make_golden.sd3_part(
        {name: torch.empty(shape, device="meta") for name, shape in shapes["ddit"].items()}, DDiTConfig()).items()}
    shapes["ddit"] |= make_golden.y_embedder(1536)

    def random(shape):
        fan_in = torch.Size(shape[1:]).numel()
        return torch.empty(shape, dtype=torch.bfloat16).normal_(1.0 if len(shape) == 1 else 0.0, fan_in ** -0.5 / 2)
    save_file({name: random(shape) for name, shape in shapes["t5"].items()}, f"{folder}/t5xxl_bf16.safetensors")
    save_file({PREFIXES[part] + name: random(shape) for part in ("ddit", "vae")
               for name, shape in shapes[part].items()}, f"{folder}/sd3_medium.safetensors")


def use(folder, spiece):
    start = time.perf_counter()
    dd = DualDiffusion.load(f"{folder}/sd3_medium.safetensors", t5=f"{folder}/t5xxl_bf16.safetensors", tokenizer=spiece,
                            dtype=torch.bfloat16)
    print(f"loaded in {time.perf_counter() - start:.1f} s")
    weights = sum(w.nbytes for w in dd.state_dict().values())
    start = time.perf_counter()
    latents = dd.encode_image(torch.rand(1, 3, 256, 256) * 2 - 1)
    print(f"image encoded in {time.perf_counter() - start:.1f} s")
    ids, maskable = dd.tokenizer.text_ids(("what is this?", ""), 64)
    start = time.perf_counter()
    _, passes = unmask(dd, latents, torch.tensor([ids]), torch.tensor([maskable]), steps=2)
    print(f"one question, {passes} passes, {(time.perf_counter() - start) / passes:.1f} s per pass")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"weights {weights / 1e9:.2f} GB, peak resident {peak / 1e9:.2f} GB, ratio {peak / weights:.3f}")


if __name__ == "__main__":
    if sys.argv[1] == "--use":
        use(*sys.argv[2:])
    else:
        with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as folder:
            write(folder)  # in a process of its own, so that the peak below is that of using it
            subprocess.run([sys.executable, __file__, "--use", folder, sys.argv[1]], check=True)
