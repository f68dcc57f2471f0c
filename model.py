"""The transformer: D-DiT, which draws images from text and reads images into text with one set of weights.

It is Stable Diffusion 3's MM-DiT with a second head. Two streams of tokens, image and text, each with weights of its
own, meet in every block in one joint attention; at the top one head predicts the image's velocity and another the
masked tokens. `DualDiffusion` holds the four parts of the system (transformer, T5, VAE, tokenizer) and is one file.

References:
  Li et al., Dual Diffusion for Unified Image Generation and Understanding (D-DiT), arXiv 2501.00289
  Esser et al., Scaling Rectified Flow Transformers (SD3: MM-DiT), arXiv 2403.03206
  Peebles & Xie, Scalable Diffusion Models with Transformers (DiT: adaLN-Zero), arXiv 2212.09748

Modules carry the names of SD3's single-file checkpoint, so loading one is stripping a prefix.
"""
import json
import math
import os
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from t5 import RMSNorm, T5Config, T5Encoder, Tokenizer
from vae import VAE, VAEConfig


@dataclass
class DDiTConfig:
    """The defaults are SD3-medium's."""
    depth: int = 24
    width: int = 1536
    heads: int = 24
    patch: int = 2          # a token is patch x patch latents
    channels: int = 16      # of the latents
    text_dim: int = 4096    # of T5's states
    vocab: int = 32100      # outputs of the text head; the last is the mask token
    pos_size: int = 192     # side of the position table, in patches: the largest image
    qk_norm: bool = False   # RMSNorm on queries and keys, as SD3.5 has: Muon needs it, or attention logits grow


def modulate(x, shift, scale):
    """adaLN: x (B,N,D), shift and scale (B,D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def sincos_table(size, dim):
    """(1, size*size, dim): fixed 2-D sine-cosine positions, half of the channels for x and half for y. Coordinates
    span 64 units whatever the size, which for 192 gives SD3-medium's table."""
    at = torch.arange(size, dtype=torch.float64) * 64 / size
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    one = torch.cat([torch.sin(at[:, None] * omega), torch.cos(at[:, None] * omega)], dim=1)  # (size, dim/2)
    x, y = one[None].expand(size, -1, -1), one[:, None].expand(-1, size, -1)
    return torch.cat([x, y], dim=2).reshape(1, size * size, dim).float()


class PatchEmbed(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.proj = nn.Conv2d(cfg.channels, cfg.width, cfg.patch, stride=cfg.patch)

    def forward(self, x):
        return rearrange(self.proj(x), "b d h w -> b (h w) d")


class TimestepEmbedder(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        """t (B,) in [0,1] -> (B,width). A sinusoid of 1000 t, cosines first."""
        omega = torch.exp(-math.log(10000) * torch.arange(128, device=t.device, dtype=torch.float32) / 128)
        angle = 1000 * t.float()[:, None] * omega
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1).to(self.mlp[0].weight.dtype))


class Attention(nn.Module):
    """One stream's part in the joint attention: its own projections in (qkv) and out (proj)."""
    def __init__(self, cfg):
        super().__init__()
        self.heads = cfg.heads
        self.qkv = nn.Linear(cfg.width, 3 * cfg.width)
        self.proj = nn.Linear(cfg.width, cfg.width)
        self.ln_q, self.ln_k = (RMSNorm(cfg.width // cfg.heads) if cfg.qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x):
        """-> q, k, v, each (B,heads,N,head_dim)."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        return self.ln_q(q), self.ln_k(k), v


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class StreamBlock(nn.Module):
    """A DiT block of one stream, open in the middle: what goes into the joint attention, and what follows it."""
    def __init__(self, cfg):
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(cfg)
        self.norm2 = nn.LayerNorm(cfg.width, elementwise_affine=False, eps=1e-6)
        self.mlp = MLP(cfg.width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.width, 6 * cfg.width))

    def before(self, x, vec):
        """-> (q, k, v), and the modulation of the rest."""
        shift, scale, *rest = self.adaLN_modulation(vec).chunk(6, dim=1)
        return self.attn(modulate(self.norm1(x), shift, scale)), rest

    def after(self, x, attended, rest):
        gate_attn, shift, scale, gate_mlp = rest
        x = x + gate_attn[:, None] * self.attn.proj(attended)
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift, scale))


class JointBlock(nn.Module):
    """MM-DiT: two streams, weights apart, attention over both together."""
    def __init__(self, cfg):
        super().__init__()
        self.context_block, self.x_block = StreamBlock(cfg), StreamBlock(cfg)

    def forward(self, x, text, vec):
        from_text, text_rest = self.context_block.before(text, vec)
        from_image, image_rest = self.x_block.before(x, vec)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(from_text, from_image))
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        length = text.shape[1]
        return (self.x_block.after(x, attended[:, length:], image_rest),
                self.context_block.after(text, attended[:, :length], text_rest))


class FinalLayer(nn.Module):
    """The image head, SD3's: shift, then scale."""
    def __init__(self, cfg):
        super().__init__()
        self.norm_final = nn.LayerNorm(cfg.width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(cfg.width, cfg.patch ** 2 * cfg.channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.width, 2 * cfg.width))

    def forward(self, x, vec):
        return self.linear(modulate(self.norm_final(x), *self.adaLN_modulation(vec).chunk(2, dim=1)))


class TextHead(nn.Module):
    """The one part that SD3 does not have: a logit for every token of the vocabulary."""
    def __init__(self, cfg):
        super().__init__()
        self.norm_final = nn.LayerNorm(cfg.width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(cfg.width, cfg.vocab)

    def forward(self, text):
        return self.linear(self.norm_final(text))


class DDiT(nn.Module):
    def __init__(self, config: DDiTConfig):
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbedder(config.width)
        self.context_embedder = nn.Linear(config.text_dim, config.width)
        self.register_buffer("pos_embed", sincos_table(config.pos_size, config.width))
        self.joint_blocks = nn.ModuleList(JointBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.text_head = TextHead(config)
        self.init_weights()

    def init_weights(self):
        """DiT's adaLN-Zero: every block starts as the identity, and both heads at zero."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
                if "adaLN" in name or name in ("final_layer.linear", "text_head.linear"):
                    nn.init.zeros_(module.weight)
        for i in (0, 2):
            nn.init.normal_(self.t_embedder.mlp[i].weight, std=0.02)

    def positions(self, h, w):
        """The centred h x w crop of the position table -> (1, h*w, width)."""
        side = self.config.pos_size
        if h > side or w > side:
            raise ValueError(f"an image of {h}x{w} patches is larger than the model's {side}x{side} positions")
        table = rearrange(self.pos_embed, "1 (h w) d -> 1 h w d", h=side)
        top, left = (side - h) // 2, (side - w) // 2
        return table[:, top:top + h, left:left + w].flatten(1, 2)

    def forward(self, latents, t, text, predict=None, draw=None):
        """latents (B,C,H,W), H and W multiples of the patch; t (B,) in [0,1]; text (B,L,text_dim), T5's states.

        -> velocity (B,C,H,W) and logits (B,L,V). With `predict` (B,L) bool, logits only there, (N,V) in row order;
        with `draw`, an int, velocity only of that many first rows (0: none)."""
        p, c = self.config.patch, self.config.channels
        h, w = latents.shape[2] // p, latents.shape[3] // p
        vec = self.t_embedder(t)
        x = self.x_embedder(latents.to(vec.dtype))
        x = x + self.positions(h, w).to(x.dtype)
        text = self.context_embedder(text.to(vec.dtype))
        for block in self.joint_blocks:
            x, text = block(x, text, vec)
        x = self.final_layer(x[:draw], vec[:draw])
        velocity = rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=h, w=w, p=p, q=p, c=c)
        return velocity, self.text_head(text if predict is None else text[predict])


@dataclass
class Settings:
    """How a checkpoint is meant to be used. The defaults are the paper's at full size."""
    size: int = 256         # side of the images it reads and draws, pixels
    length: int = 256       # tokens a prompt, caption or question with answer is padded to
    cfg: float = 7.0        # classifier-free guidance when drawing
    shift: float = 3.0      # of the drawing time grid
    caption_steps: int = 64
    answer_steps: int = 16


@dataclass
class Config:
    ddit: DDiTConfig = field(default_factory=DDiTConfig)
    t5: T5Config = field(default_factory=T5Config)
    vae: VAEConfig = field(default_factory=VAEConfig)
    settings: Settings = field(default_factory=Settings)

    @classmethod
    def from_dict(cls, d):
        return cls(DDiTConfig(**d["ddit"]), T5Config(**d["t5"]), VAEConfig(**d["vae"]), Settings(**d["settings"]))


PRESETS = {
    "sd3-medium": Config(),
    "tiny": Config(  # vocab and vocab_size follow the tokenizer that stage 0 makes
        DDiTConfig(depth=6, width=128, heads=2, text_dim=128, pos_size=8, qk_norm=True),
        T5Config(d_model=128, num_layers=2, num_heads=4, d_kv=32, d_ff=256, max_distance=32),
        VAEConfig(channels=8, groups=4),
        Settings(size=64, length=24, cfg=3.0, shift=3.0, caption_steps=24, answer_steps=8)),
}

PREFIXES = {"ddit": "model.diffusion_model.", "vae": "first_stage_model.", "t5": "text_encoders.t5xxl.transformer."}
SPIECE = "spiece_model"  # the tokenizer, as a uint8 tensor


class DualDiffusion(nn.Module):
    """The whole system. `ddit`, `t5`, `vae` are modules, `tokenizer` a t5.Tokenizer, `config` a Config; a part that a
    file does not hold (what stage 0 writes has no ddit) is None."""
    def __init__(self, config, tokenizer, ddit=None, t5=None, vae=None):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.ddit, self.t5, self.vae = ddit, t5, vae

    @classmethod
    def build(cls, config, tokenizer, parts=("ddit", "t5", "vae")):
        """Fresh random weights. Both vocabularies follow the tokenizer; T5's table is rounded up to a multiple of
        128 rows (32,100 -> 32,128), as T5's authors did."""
        config.ddit.vocab = tokenizer.vocab_size
        config.t5.vocab_size = -(-tokenizer.vocab_size // 128) * 128
        make = {"ddit": lambda: DDiT(config.ddit), "t5": lambda: T5Encoder(config.t5), "vae": lambda: VAE(config.vae)}
        return cls(config, tokenizer, **{part: make[part]() for part in parts})

    @property
    def device(self):
        return next(self.parameters()).device

    def encode_image(self, pixels, generator=None):
        """Pixels (B,3,H,W) in [-1,1] -> the latents the transformer sees. With a generator a sample of the posterior
        (training), without one its mean."""
        mean, logvar = self.vae.encode(pixels.to(self.device))
        if generator is not None:
            noise = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean)
            mean = mean + torch.exp(0.5 * logvar) * noise
        return self.vae.normalize(mean)

    def decode_image(self, latents):
        """Latents as the transformer sees them -> pixels (B,3,8h,8w), clamped to [-1,1]."""
        return self.vae.decode(self.vae.denormalize(latents)).float().clamp(-1, 1)

    def save(self, path, dtype=None):
        """One self-contained .safetensors: all parts under SD3's names, the tokenizer as bytes, the configuration as
        JSON in the header. Written beside, then renamed, so a reader never meets half a file. `dtype`: of the
        floating-point tensors on disk, e.g. torch.float16; as they are when None."""
        tensors = {prefix + name: tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
                   for part, prefix in PREFIXES.items() if getattr(self, part) is not None
                   for name, tensor in getattr(self, part).state_dict().items()}
        tensors[SPIECE] = torch.frombuffer(bytearray(self.tokenizer.model), dtype=torch.uint8)
        save_file(tensors, f"{path}.partial", {"format": "pt", "config": json.dumps(asdict(self.config))})
        os.replace(f"{path}.partial", path)

    @classmethod
    def load(cls, path, t5=None, vae=None, tokenizer=None, device="cpu", dtype=torch.float32):
        """Read a file written by `save`. `t5`, `vae`: files of ours to take that part from instead; `tokenizer`: a
        spiece.model. Raises FileNotFoundError or ValueError with one line that says what is wrong."""
        config, spiece, states = read_checkpoint(path, device, dtype)
        for part, other in (("t5", t5), ("vae", vae)):
            if other is not None:
                other_config, _, other_states = read_checkpoint(other, device, dtype)
                setattr(config, part, getattr(other_config, part))
                states[part] = other_states[part]
        if tokenizer is not None:
            with open(tokenizer, "rb") as f:
                spiece = f.read()
        if spiece is None:
            raise ValueError(f"{path}: holds no tokenizer; give its spiece.model")
        with torch.device("meta"):  # no memory yet, and no time spent on initial values that would be overwritten
            dd = cls.build(config, Tokenizer(spiece), [part for part, state in states.items() if state])
        for part, state in states.items():
            if state:
                try:
                    getattr(dd, part).load_state_dict(state, assign=True)
                except RuntimeError as error:
                    detail = " ".join(str(error).split())[:200]
                    raise ValueError(f"{path}: the weights do not fit the configuration: {detail}") from error
        return dd.eval()


def read_checkpoint(path, device, dtype):
    """-> Config, tokenizer bytes or None, {part: {name: tensor}}. Tensors are mapped from the file and converted one
    at a time, straight to their device and type."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        with safe_open(path, framework="pt") as f:
            config = (f.metadata() or {}).get("config")
            if config is None:
                raise ValueError(f"{path}: a .safetensors file, but not one of this project's: no configuration inside")
            states = {part: {name[len(prefix):]: f.get_tensor(name).to(device, dtype)
                             for name in f.keys() if name.startswith(prefix)} for part, prefix in PREFIXES.items()}
            spiece = bytes(f.get_tensor(SPIECE).numpy().astype(np.uint8)) if SPIECE in f.keys() else None
    except (SafetensorError, IsADirectoryError, OSError) as error:
        raise ValueError(f"{path}: not a readable .safetensors checkpoint ({error})") from error
    return Config.from_dict(json.loads(config)), spiece, states
