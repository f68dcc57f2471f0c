"""Golden values for test_networks.py, computed by other people's code: diffusers' SD3 transformer and autoencoder
and transformers' T5 encoder. Needs both packages; the tests read only the file that this writes.

    PYTHONPATH=. python tests/make_golden.py

Weights are random everywhere, also where training starts from zeros or ones, and are not stored: every tensor is drawn
from a generator seeded with its name, whose stream numpy has frozen (NEP 19). The names are SD3's single-file names.
They reach the other side through diffusers' own converters for SD3's file, so names and layouts are tested with them.
"""
import json
import math
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from model import DDiT, DDiTConfig
from t5 import T5Config, T5Encoder
from vae import VAE, VAEConfig

PATH = Path(__file__).with_name("golden.safetensors")
DDIT = DDiTConfig(depth=2, width=32, heads=2, text_dim=24, vocab=40, pos_size=8)
T5 = T5Config(d_model=16, num_layers=2, num_heads=3, d_kv=6, d_ff=40, vocab_size=64)
VAE_ = VAEConfig(channels=8, groups=4)
POOLED = 2048   # of CLIP's vector; ours has no such input
BEYOND = torch.tensor([0.0] * 16 + [100.0, -100.0] * 8)   # added to the encoder's output: every log-variance is clamped
BUCKETS = ((32, 128), (16, 40))   # (buckets, max_distance)


def random(name, shape):
    return torch.from_numpy(np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)).float()


def random_state(shapes):
    """{name: shape} -> {name: weights} under which activations stay near 1: matrices N(0, 1/fan-in), biases
    N(0, 0.2^2), the weights of norms N(1, 0.2^2)."""
    return {name: random(name, shape) * math.prod(shape[1:]) ** -0.5 if len(shape) > 1
            else random(name, shape) * 0.2 + name.endswith("weight") for name, shape in shapes.items()}


def y_embedder(width):
    """The shapes of the part of SD3 that ours folds away."""
    return {"y_embedder.mlp.0.weight": (width, POOLED), "y_embedder.mlp.0.bias": (width,),
            "y_embedder.mlp.2.weight": (width, width), "y_embedder.mlp.2.bias": (width,)}


def shapes():
    found = {part: {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
             for part, module in (("ddit", DDiT(DDIT)), ("t5", T5Encoder(T5)), ("vae", VAE(VAE_)))}
    found["ddit"] |= y_embedder(DDIT.width)
    return found


def sd3_transformer(state, cfg):
    """diffusers' model with our weights. SD3's last block ends its text stream early, so part of ours stays out."""
    from diffusers import SD3Transformer2DModel
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
    file, last = {}, f"joint_blocks.{cfg.depth - 1}.context_block."
    for name, w in state.items():
        if name.startswith("text_head") or name.startswith(last) and "qkv" not in name and "adaLN" not in name:
            continue
        file["model.diffusion_model." + name] = w[:2 * cfg.width] if name.startswith(last + "adaLN") else w
    model = SD3Transformer2DModel(
        num_layers=cfg.depth, num_attention_heads=cfg.heads, attention_head_dim=cfg.width // cfg.heads,
        patch_size=cfg.patch, in_channels=cfg.channels, out_channels=cfg.channels, joint_attention_dim=cfg.text_dim,
        caption_projection_dim=cfg.width, pooled_projection_dim=POOLED, pos_embed_max_size=cfg.pos_size)
    model.load_state_dict(convert_sd3_transformer_checkpoint_to_diffusers(file))
    assert not file, f"names that SD3's file does not have: {list(file)}"
    return model.eval()


def autoencoder(state, cfg):
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
    levels = len(cfg.multipliers)
    model = AutoencoderKL(
        block_out_channels=[cfg.channels * m for m in cfg.multipliers], layers_per_block=2, norm_num_groups=cfg.groups,
        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
        latent_channels=cfg.latent_channels, use_quant_conv=False, use_post_quant_conv=False)
    converted = convert_ldm_vae_checkpoint({f"first_stage_model.{k}": w for k, w in state.items()}, model.config)
    assert len(converted) == len(state), "names that SD3's file does not have"
    model.load_state_dict(converted)
    return model.eval()


def t5_encoder(state, cfg):
    from transformers import T5Config as Config
    from transformers import T5EncoderModel
    c = asdict(cfg)
    model = T5EncoderModel(Config(
        relative_attention_num_buckets=c.pop("buckets"), relative_attention_max_distance=c.pop("max_distance"),
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, **c))
    model.load_state_dict(state | {"encoder.embed_tokens.weight": state["shared.weight"]})
    return model.eval()


@torch.no_grad()
def golden():
    """-> {name: tensor}, inputs and outputs."""
    state = {part: random_state(s) for part, s in shapes().items()}
    g = {"t": torch.tensor([0.0, 0.3, 0.9997]), "latents": random("latents", (3, 16, 10, 8)),
         "text": random("text", (3, 7, DDIT.text_dim)), "pixels": random("pixels", (2, 3, 16, 40)),
         "z": random("z", (2, 16, 2, 5)),
         "tokens": (random("tokens", (2, 160)) * 1e4).int() % T5.vocab_size}  # farther apart than max_distance

    def transformer(state, cfg):
        model, text = sd3_transformer(state, cfg), []
        for block in model.transformer_blocks:
            block.register_forward_hook(lambda module, args, out: text.append(out[0]))
        pooled = torch.zeros(3, POOLED)
        return model(g["latents"], g["text"], pooled, 1000 * g["t"]).sample, text

    g["velocity"], _ = transformer(state["ddit"], DDIT)
    # SD3's text stream is whole up to its last block but one, so one block more shows what ours ends with.
    repeat = {k.replace("blocks.1.", "blocks.2."): w for k, w in state["ddit"].items() if "blocks.1." in k}
    _, text = transformer(state["ddit"] | repeat, replace(DDIT, depth=3))
    g["logits"] = torch.nn.functional.linear(torch.nn.functional.layer_norm(text[1], (DDIT.width,), eps=1e-6),
                                             state["ddit"]["text_head.linear.weight"],
                                             state["ddit"]["text_head.linear.bias"])

    vae = autoencoder(state["vae"], VAE_)
    posterior = vae.encode(g["pixels"]).latent_dist
    g |= {"mean": posterior.mean, "logvar": posterior.logvar, "decoded": vae.decode(g["z"]).sample}
    vae.encoder.conv_out.bias += BEYOND
    g["clamped"] = vae.encode(g["pixels"]).latent_dist.logvar

    t5 = t5_encoder(state["t5"], T5)
    g["states"] = t5(g["tokens"].long()).last_hidden_state
    bucket = t5.encoder.block[0].layer[0].SelfAttention._relative_position_bucket
    g["buckets"] = torch.stack([bucket(torch.arange(-300, 301), True, *b) for b in BUCKETS]).int()

    from diffusers.models.embeddings import PatchEmbed
    g["pos_embed"] = PatchEmbed(128, 128, 2, 16, 64, pos_embed_max_size=192).pos_embed[0, ::389]
    return {name: tensor.contiguous() for name, tensor in g.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    save_file(golden(), PATH, {"shapes": json.dumps(shapes())})
