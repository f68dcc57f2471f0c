"""What the paper's training asks of a cluster, computed, not measured: `python tests/on_paper.py` prints the README's
table. Everything is built on torch's "meta" device, which has shapes but no memory, at the sizes of train.RECIPES.

Sources: parameters and bytes of checkpoints, by counting; FLOPs, by torch.utils.flop_counter over one row of a step,
both halves, forward and backward; saved activations, by torch's hooks on what the backward pass keeps; an H100 SXM:
989 TFLOP/s of dense bf16 and 80 GB (NVIDIA's data sheet), half of which FLOP/s is assumed to be reached. Memory: 20
bytes a parameter shared out among the GPUs (in float32 the weight, its gradient, Adam's two and the running average), 2
on every GPU (the weight in bf16), the frozen T5 and VAE in bf16, the activations of as many rows at once as fit; where
the whole share does not, with --checkpointing, which takes a third more time, and where it still does not, in several
passes, for which every GPU keeps 4 bytes more a parameter (the sum of the gradients so far)."""
import os
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from model import PRESETS, DDiT, T5Encoder
from train import RECIPES, model_flops
from vae import VAE

PEAK, MEMORY, REACHED = 989e12, 80e9, 0.5


def size(module):
    return sum(p.numel() for p in module.parameters())


def kept_for_backward(run):
    """Bytes of activations, each tensor counted once."""
    kept = {}

    def pack(x):
        if not isinstance(x, torch.nn.Parameter):
            base = x if x._base is None else x._base
            kept[id(base)] = (base, base.nbytes)  # the reference keeps the id from being used again
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(count for base, count in kept.values() if not isinstance(base, torch.nn.Parameter))


def one_row(config, recipe):
    """One row of a step, its image half and its text half -> FLOPs, bytes kept for the backward pass, and with every
    block computed twice."""
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
        velocity, logits = ddit(inputs[0], inputs[1], states, predict=predict, draw=1)
        return velocity.sum() + logits.sum()
    with FlopCounterMode(display=False) as counter:
        step().backward()
    plain = kept_for_backward(step)
    ddit.checkpointing = t5.checkpointing = True
    once = 4 * ddit.text_head.linear.weight.numel()  # its float32 copy, of which all rows have one
    return counter.get_total_flops(), plain - once, kept_for_backward(step) - once


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
            twice = plain * share > room
            each = checkpointed + plain / config.ddit.depth if twice else plain  # and one block at a time anew
            seconds = recipe.batch * flops * (4 / 3 if twice else 1) / (gpus * PEAK * REACHED)
            if share * each > room:
                state, room = state + 4 * ddit, room - 4 * ddit
            rows = max((n for n in range(1, share + 1) if share % n == 0 and n * each < room), default=0)
            print(f"| {name} | {recipe.batch * flops:.2e} | {gpus} | {state / 1e9:.0f} + "
                  f"{rows * each / 1e9:.0f} GB | {rows} of {share}"
                  f"{', checkpointed' if twice else ''} | {recipe.steps * seconds / 86400:.1f} | "
                  f"{recipe.batch * (2 if name == '2hr' else 1) / seconds:.0f} |")


if __name__ == "__main__":
    main()
