"""Golden values for test_networks.py, computed by other people's code: diffusers' SD3 transformer and autoencoder
and transformers' T5 encoder. Needs both packages; the tests read only the file that this writes.

    PYTHONPATH=. python tests/make_golden.py path/to/spiece.model

Weights are random everywhere, also where training starts from zeros or ones, and are not stored: every tensor is drawn
from a generator seeded with its name, whose stream numpy has frozen (NEP 19). The names are SD3's single-file names.
They reach the other side through diffusers' own converters for SD3's file, so names and layouts are tested with them.
"""
import hashlib
import json
import math
import sys
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from random import Random

import numpy as np
import torch
from safetensors.torch import save_file

from model import DDiT, DDiTConfig
from t5 import T5Config, T5Encoder
from vae import VAE, VAEConfig

PATH = Path(__file__).with_name("golden.safetensors")
DDIT = DDiTConfig(depth=2, width=32, heads=2, text_dim=24, vocab=40, pos_size=8)
T5 = T5Config(d_model=16, num_layers=2, num_heads=3, d_kv=6, d_ff=40, vocab_size=64)
SINGLE = replace(DDIT, width=128)   # SD3's single file says nothing of heads: there are 64 channels in each
VAE_ = VAEConfig(channels=32)
POOLED = 2048   # of CLIP's vector; ours has no such input
BEYOND = torch.tensor([0.0] * 16 + [100.0, -100.0] * 8)   # added to the encoder's output: every log-variance is clamped
BUCKETS = ((32, 128), (16, 40))   # (buckets, max_distance)


# The diffusers layout, under diffusers' own names: SD3-medium's folder and the authors' release, in small. These dicts
# are each part's config.json too.
FOLDER = {
    "transformer": dict(num_layers=3, num_attention_heads=2, attention_head_dim=16, patch_size=2, in_channels=16,
                        out_channels=16, joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=12,
                        pos_embed_max_size=8, sample_size=16),
    "vae": dict(block_out_channels=[8, 16, 32, 32], layers_per_block=2, norm_num_groups=4, latent_channels=16,
                down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
                use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=1.3),
    "text_encoder": dict(d_model=24, num_layers=2, num_heads=3, d_kv=6, d_ff=40, vocab_size=64,
                         relative_attention_num_buckets=32, relative_attention_max_distance=128,
                         feed_forward_proj="gated-gelu", tie_word_embeddings=False)}
STEPS, CFG, SHIFT = 28, 5.0, 3.0


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
    modules = {"ddit": DDiT(DDIT), "single": DDiT(SINGLE), "t5": T5Encoder(T5), "vae": VAE(VAE_)}
    result = {part: {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
              for part, module in modules.items()}
    result["ddit"] |= y_embedder(DDIT.width)
    result["single"] |= y_embedder(SINGLE.width)
    return result


def sd3_part(state, cfg):
    """Of a transformer's state, what SD3's file has: no text head, and a last block that ends its text stream early."""
    last = f"joint_blocks.{cfg.depth - 1}.context_block."
    return {name: w[:2 * cfg.width] if name.startswith(last + "adaLN") else w for name, w in state.items()
            if not (name.startswith("text_head") or name.startswith((last + "attn.proj", last + "mlp")))}


def sd3_transformer(state, cfg):
    """diffusers' model with our weights. SD3's last block ends its text stream early, so part of ours stays out."""
    from diffusers import SD3Transformer2DModel
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
    file = {"model.diffusion_model." + name: w for name, w in sd3_part(state, cfg).items()}
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


def folder_modules(authors):
    """-> {part's folder: diffusers' or transformers' module}, {part's folder: random weights}. The authors' transformer
    is SD3's without the pooled vector, with a whole last block, a text head, and other names for the image head."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from transformers import T5Config, T5EncoderModel
    modules = {"transformer": SD3Transformer2DModel(**FOLDER["transformer"]), "vae": AutoencoderKL(**FOLDER["vae"]),
               "text_encoder": T5EncoderModel(T5Config(**FOLDER["text_encoder"]))}
    transformer, rename = modules["transformer"], lambda name: name
    if authors:
        from diffusers.models.attention import JointTransformerBlock
        transformer.transformer_blocks[-1] = JointTransformerBlock(32, 2, 16, context_pre_only=False)
        transformer.text_proj_out = torch.nn.Linear(32, FOLDER["text_encoder"]["vocab_size"] - 4)
        transformer.null_image_embd = torch.nn.Parameter(torch.zeros(1, 8, 32))
        for p in transformer.time_text_embed.text_embedder.parameters():
            p.zero_()
        rename = lambda name: f"image_{name}" if name.startswith(("norm_out", "proj_out")) else name  # noqa: E731
    states = {}
    for part, module in modules.items():
        shapes = {name: tuple(w.shape) for name, w in module.state_dict().items()
                  if not (authors and ".text_embedder." in name) and name != "encoder.embed_tokens.weight"}
        states[part] = random_state({rename(name): shape for name, shape in shapes.items()})
        missing, extra = module.load_state_dict({name: states[part][rename(name)] for name in shapes}, strict=False)
        assert not extra and all(".text_embedder." in name or "embed_tokens" in name for name in missing)
        module.eval()
    if hasattr(modules["text_encoder"].encoder, "embed_tokens"):
        modules["text_encoder"].encoder.embed_tokens.weight = modules["text_encoder"].shared.weight
    return modules, states


def golden_folders(g):
    """-> {name: tensor}, {name of the folder: {part: {tensor: shape}}}."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    out, names = {}, {}
    for kind in ("sd3", "authors"):
        modules, states = folder_modules(kind == "authors")
        names[kind] = {part: {name: tuple(w.shape) for name, w in state.items()} for part, state in states.items()}
        transformer, vae, t5, text = *modules.values(), []
        pooled = torch.zeros(3, FOLDER["transformer"]["pooled_projection_dim"])
        transformer.transformer_blocks[-1].register_forward_hook(lambda module, args, output: text.append(output[0]))
        out[f"{kind}.velocity"] = transformer(g["latents"], g["text"], pooled, 1000 * g["t"]).sample
        if kind == "authors":
            out["authors.logits"] = transformer.text_proj_out(torch.nn.functional.layer_norm(text[0], (32,), eps=1e-6))
            continue
        posterior = vae.encode(g["pixels"]).latent_dist
        out |= {"sd3.mean": posterior.mean, "sd3.logvar": posterior.logvar}
        tokens = g["tokens"].long()[:, :7]
        out["sd3.states"] = states = t5(tokens).last_hidden_state
        scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)  # the plain grid 1, 27/28 .. 1/28, shifted
        scheduler.set_timesteps(STEPS, sigmas=np.linspace(1, 1 / STEPS, STEPS))
        x = g["latents"][:1]
        for t in scheduler.timesteps:  # the first row of tokens is the prompt, the second the negative prompt
            yes, no = transformer(torch.cat([x, x]), states, pooled[:2], t.expand(2)).sample.chunk(2)
            x = scheduler.step(no + CFG * (yes - no), t, x).prev_sample
        out["sd3.drawn"] = vae.decode(x / vae.config.scaling_factor + vae.config.shift_factor).sample.clamp(-1, 1)
    return out, names


WORDS = ("the a of and to in is was photograph unbelievably antidisestablishmentarianism Paris Washington don't it's "
         "e-mail U.S.A. naïve café façade Zürich Straße größer œuvre señor ação Ελλάδα κόσμος Москва привет мир שלום "
         "مرحبا नमस्ते 你好 世界 日本語 カタカナ 한국어 สวัสดี fi ½ ² Å ① ™ … “quoted” «guillemets» — – 😀 👩‍👩‍👧 🇫🇷 ❤️ 1 "
         "42 2024 3.14159 1,000,000 -7 50% $9.99 #tag @user http://example.org/a?b=c&d=e foo_bar CamelCase x86 "
         "C++ <b> </b> {json: [1]} \\n / | ~ ^ ` ' \" ! ? ; : . , ( ) [ ] * + = é ﬁne ｆｕｌｌ "
         "\u200bzero\u00adsoft").split()
SPACES = [" ", " ", " ", "  ", "   ", "\t", "\n", "\u00a0", "\u3000", ""]


def tokenizer_lines():
    """6,000 lines in several scripts, with punctuation, digits, emoji and every kind of space."""
    rng = Random(0)
    for _ in range(6000):
        text = "".join(rng.choice(WORDS) + rng.choice(SPACES) for _ in range(rng.randint(1, 12)))
        yield rng.choice(["", "", "", " ", "\n"]) + rng.choice([str, str, str, str.upper, str.title])(text)


def tokenizer_checksum(spiece):
    """Of the ids that transformers' T5 tokenizer gives for those lines."""
    from transformers import T5Tokenizer
    reference = T5Tokenizer.from_pretrained(Path(spiece).parent)
    ids = [reference(line).input_ids for line in tokenizer_lines()]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


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
    g["single.velocity"], _ = transformer(state["single"], SINGLE)
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

    g |= golden_folders(g)[0]
    from diffusers.models.embeddings import PatchEmbed
    g["pos_embed"] = PatchEmbed(128, 128, 2, 16, 64, pos_embed_max_size=192).pos_embed[0, ::389]
    return {name: tensor.contiguous() for name, tensor in g.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    values = golden()
    with torch.no_grad():
        folders = golden_folders(values)[1]
    save_file(values, PATH, {"shapes": json.dumps(shapes()), "folders": json.dumps(folders),
                             "tokenizer": tokenizer_checksum(sys.argv[1])})
