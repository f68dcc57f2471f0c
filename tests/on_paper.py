"""What the paper's training asks of a cluster, computed, not measured: `python tests/on_paper.py` prints the README's
table. Everything is built on torch's "meta" device, which has shapes but no memory, at the sizes of train.RECIPES.

Sources: parameters and bytes of checkpoints, by counting; FLOPs, by torch.utils.flop_counter over one row of a step,
both halves, forward and backward, which `model_flops`, a formula, must match; saved activations, by torch's hooks on
what the backward pass keeps; an H100 SXM: 989 TFLOP/s of dense bf16 and 80 GB (NVIDIA's data sheet), half of which
FLOP/s is assumed to be reached. Memory: 20 bytes per parameter, shared out among the GPUs of a node (in float32 the
weight, its gradient, Adam's two and the running average), 2 on every GPU (the weight in bf16), the frozen T5 and VAE in
bf16, the activations of as many rows at once as fit. Where the whole share does not fit, with --checkpointing, which
takes a third more time; where it still does not, in several passes, for which every GPU keeps 4 more bytes per
parameter (the sum of the gradients so far)."""
import os
import sys
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from model import PRESETS, DDiT, JointBlock
from t5 import Block, T5Encoder
from train import RECIPES
from vae import VAE

PEAK, MEMORY, REACHED = 989e12, 80e9, 0.5


def size(module):
    return sum(p.numel() for p in module.parameters())


def model_flops(config, recipe):
    """FLOPs that one row of a step needs, whatever the implementation spends: 2 per weight and token, 4 per pair of
    tokens and channel in attention; twice that again for the gradients of what learns (PaLM, arXiv 2204.02311, appendix
    B). Both halves; the text head at half of the text's positions. The VAE's are left out: latents are encoded once."""
    d, t, length = config.ddit, config.t5, recipe.length
    patches = (recipe.size // config.vae.factor // d.patch) ** 2
    halves = 1 + (recipe.image_weight > 0)
    stream = 12 * d.width ** 2  # qkv, proj and MLP of one stream's block
    block = 2 * stream * (patches + length) + 4 * (patches + length) ** 2 * d.width + 2 * 2 * 6 * d.width ** 2
    ends = 2 * d.width * ((2 * patches * d.channels * d.patch ** 2) + length * t.d_model)
    head = 2 * d.width * d.vocab * length / 2
    inner = t.num_heads * t.d_kv
    layer = 2 * length * (4 * t.d_model * inner + 3 * t.d_model * t.d_ff) + 4 * length ** 2 * inner
    back = {"no": 0, "mask": 1, "all": 2}[recipe.learn_t5]  # "mask": back through T5, but to no matrix of its own
    return 3 * (halves * (d.depth * block + ends) + head) + (1 + back) * halves * t.num_layers * layer


def activation_bytes(run):
    """Bytes of what run() saves for a backward pass, parameters aside, each tensor counted once."""
    saved = {}

    def pack(x):
        if not isinstance(x, torch.nn.Parameter):
            base = x if x._base is None else x._base
            saved[id(base)] = base  # the reference keeps the id from being used again
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(base.nbytes for base in saved.values() if not isinstance(base, torch.nn.Parameter))


def one_row(config, recipe):
    """One row of a step, its image half and its text half -> FLOPs, bytes saved for the backward pass, and those
    bytes where every block is computed twice."""
    side, length = recipe.size // config.vae.factor, recipe.length
    with torch.device("meta"):
        ddit, t5 = DDiT(config.ddit).bfloat16(), T5Encoder(config.t5).bfloat16().requires_grad_(False)
        inputs = (torch.zeros(2, config.vae.latent_channels, side, side, dtype=torch.bfloat16), torch.zeros(2),
                  torch.zeros(2, length, config.t5.d_model, dtype=torch.bfloat16))
        tokens = torch.zeros(2, length, dtype=torch.long)
    if recipe.learn_t5 == "mask":  # the way back leads through T5
        t5.shared.requires_grad_()
    predict = torch.zeros(2, length, dtype=torch.bool)
    predict[1, ::2] = True  # half of the text half's tokens are masked, on average

    def step():
        states = t5(tokens)
        velocity, logits = ddit(inputs[0], inputs[1], states, predict=predict, image_rows=1)
        return velocity.sum() + logits.sum()
    with FlopCounterMode(display=False) as counter:
        step().backward()
    plain = activation_bytes(step)
    for block in [part for part in (*ddit.modules(), *t5.modules()) if isinstance(part, JointBlock | Block)]:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # as train.py does it
    head_copy = 4 * ddit.text_head.linear.weight.numel()  # its float32 copy, of which all rows have one
    return counter.get_total_flops(), plain - head_copy, activation_bytes(step) - head_copy


def main():
    config = PRESETS["sd3-medium"]
    with torch.device("meta"):
        ddit, t5, vae = size(DDiT(config.ddit)), size(T5Encoder(config.t5)), size(VAE(config.vae))
    print(f"parameters: transformer {ddit / 1e9:.2f}e9 (learned), T5 {t5 / 1e9:.2f}e9, VAE {vae / 1e6:.0f}e6 (frozen)")
    print(f"checkpoint to resume from {16 * ddit / 1e9:.0f} GB (weights, Adam, average); file for sample.py "
          f"{2 * (ddit + t5 + vae) / 1e9:.0f} GB\n")
    print("| stage | FLOPs a step | GPUs | memory a GPU: state + activations | rows at once | days | images/s |")
    print("|---|---|---|---|---|---|---|")
    for name, recipe in RECIPES["sd3-medium"].items():
        flops, plain, checkpointed = one_row(config, recipe)
        assert abs(model_flops(config, recipe) / flops - 1) < 0.02, (model_flops(config, recipe), flops)
        for gpus in (1, 8, 32):
            state = ddit * (20 / min(gpus, 8) + 2) + 2 * (t5 + vae)  # shared out among the eight of a node
            share, room = recipe.batch // gpus, 0.9 * MEMORY - state
            checkpointing = plain * share > room
            row_bytes = plain if not checkpointing else checkpointed + plain / config.ddit.depth  # and one block anew
            seconds = recipe.batch * flops * (4 / 3 if checkpointing else 1) / (gpus * PEAK * REACHED)
            if share * row_bytes > room:
                state, room = state + 4 * ddit, room - 4 * ddit
            rows = max((n for n in range(1, share + 1) if share % n == 0 and n * row_bytes < room), default=0)
            print(f"| {name} | {recipe.batch * flops:.2e} | {gpus} | {state / 1e9:.0f} + "
                  f"{rows * row_bytes / 1e9:.0f} GB | {rows} of {share}"
                  f"{', checkpointed' if checkpointing else ''} | {recipe.steps * seconds / 86400:.1f} | "
                  f"{recipe.batch * (2 if name == '2hr' else 1) / seconds:.0f} |")


if __name__ == "__main__":
    main()
