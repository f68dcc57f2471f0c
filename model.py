"""The transformer: D-DiT, which draws images from text and reads images into text with one set of weights.

It is Stable Diffusion 3's MM-DiT with a second head (Figure 1). Two streams of tokens, image and text, each with
weights of its own, meet in every block in one joint attention; at the top one head predicts the image's velocity, one
the masked tokens. `DualDiffusion` is the whole system: transformer, T5, VAE and tokenizer. Modules carry the names of
SD3's single-file checkpoint, so that its weights need no translation.
References: Li et al., Dual Diffusion for Unified Image Generation and Understanding (D-DiT), arXiv 2501.00289
  Esser et al., Scaling Rectified Flow Transformers (SD3: MM-DiT), arXiv 2403.03206
  Peebles & Xie, Scalable Diffusion Models with Transformers (DiT: adaLN-Zero), arXiv 2212.09748
"""
import functools
import json
import math
import os
import re
from collections import OrderedDict, namedtuple
from dataclasses import asdict, dataclass, field, fields, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from data import parse, parsed, replacing
from t5 import Embeddings, EmbeddingsConfig, RMSNorm, T5Config, T5Encoder, Tokenizer
from vae import VAE, VAEConfig


@dataclass
class DDiTConfig:
    """The defaults are SD3-medium's."""
    depth: int = 24
    width: int = 1536
    heads: int = 24
    patch: int = 2          # a token is patch x patch latents
    channels: int = 16      # of the latents: what VAEConfig calls latent_channels
    text_dim: int = 4096    # of T5's states
    vocab: int = 32100      # outputs of the text head; the last is the mask token
    pos_size: int = 192     # side of the position table, in patches: the largest image
    qk_norm: bool = False   # RMSNorm on queries and keys, as SD3.5 has: Muon needs it, or attention logits grow


def modulate(x, shift, scale):
    """adaLN: x (B,N,D), shift and scale (B,D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class TimestepEmbedder(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        """t (B,) in [0,1] -> (B,width). Cosines, then sines, of 1000 t at 128 frequencies from 1 to nearly 1/10000."""
        omega = torch.exp(-math.log(10000) * torch.arange(128, device=t.device, dtype=torch.float32) / 128)
        angle = 1000 * t.float()[:, None] * omega
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1).to(self.mlp[0].weight.dtype))


class Attention(nn.Module):
    """One stream's part in the joint attention: its own projections in (qkv) and out (proj)."""
    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        norm = RMSNorm if config.qk_norm else nn.Identity
        self.ln_q, self.ln_k = (norm(config.width // config.heads) for _ in range(2))

    def forward(self, x):
        """-> q, k, v, each (B,heads,N,head_dim)."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        return self.ln_q(q), self.ln_k(k), v


class StreamBlock(nn.Module):
    """A DiT block of one stream, split at the joint attention: what goes into it, and what follows it.

    From `vec` (B,width), which says the time, come six vectors: shift, scale and gate for the attention, and for the
    MLP. Shift and scale change what goes in, the gate how much of the result is added. Gates begin at zero (`DDiT`):
    a new block passes its input on unchanged, and learns from there."""
    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(config.width, 4 * config.width), gelu=nn.GELU("tanh"),
                                             fc2=nn.Linear(4 * config.width, config.width)))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))

    def before(self, x, vec):
        """-> (q, k, v), and the four vectors that `after` needs."""
        shift, scale, *modulation = self.adaLN_modulation(vec).chunk(6, dim=1)
        return self.attn(modulate(self.norm1(x), shift, scale)), modulation

    def after(self, x, attended, modulation):
        gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        x = x + gate_attn[:, None] * self.attn.proj(attended)
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class JointBlock(nn.Module):
    """MM-DiT: two streams, separate weights, one joint attention."""
    def __init__(self, config):
        super().__init__()
        self.context_block, self.x_block = StreamBlock(config), StreamBlock(config)

    def forward(self, x, text, vec):
        from_text, text_modulation = self.context_block.before(text, vec)
        from_image, image_modulation = self.x_block.before(x, vec)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(from_text, from_image))
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")  # no mask: EOS counts
        to_text, to_image = attended.split([text.shape[1], x.shape[1]], dim=1)
        x = self.x_block.after(x, to_image, image_modulation)
        return x, self.context_block.after(text, to_text, text_modulation)


class FinalLayer(nn.Module):
    """The image head, SD3's. Its two vectors are shift and scale, in this order."""
    def __init__(self, config):
        super().__init__()
        self.norm_final = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(config.width, config.patch ** 2 * config.channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 2 * config.width))

    def forward(self, x, vec):
        return self.linear(modulate(self.norm_final(x), *self.adaLN_modulation(vec).chunk(2, dim=1)))


class TextHead(nn.Module):
    """The part that SD3 does not have: a logit for every token of the vocabulary."""
    def __init__(self, config):
        super().__init__()
        self.norm_final = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(config.width, config.vocab)

    def forward(self, text):
        """Logits in float32: in bf16 the two largest would be equal in one row of a hundred."""
        x = self.norm_final(text).float()
        return F.linear(x, self.linear.weight.float(), self.linear.bias.float())


class DDiT(nn.Module):
    """Figure 1. The time embedding modulates both streams; wherever text is predicted, the time is 0."""
    def __init__(self, config: DDiTConfig):
        super().__init__()
        self.config = config
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(config.channels, config.width, config.patch, config.patch)})
        self.t_embedder = TimestepEmbedder(config.width)
        self.context_embedder = nn.Linear(config.text_dim, config.width)
        self.register_buffer("pos_embed", torch.empty(1, config.pos_size ** 2, config.width))
        self.joint_blocks = nn.ModuleList(JointBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.text_head = TextHead(config)
        init_weights(self)
        for name, p in self.named_parameters():  # adaLN-Zero: gates, shifts, scales and both heads begin at zero
            if "adaLN" in name or name.startswith(("final_layer.linear", "text_head.linear")):
                nn.init.zeros_(p)

    def positions(self, h, w):
        """The centred h x w crop of the position table -> (1, h*w, width). Raises ValueError where h or w is larger."""
        side = self.config.pos_size
        if h > side or w > side:
            raise ValueError(f"an image of {h}x{w} patches is larger than the model's {side}x{side} positions")
        table = rearrange(self.pos_embed, "1 (h w) d -> 1 h w d", h=side)
        top, left = (side - h) // 2, (side - w) // 2
        return table[:, top:top + h, left:left + w].flatten(1, 2)

    def forward(self, latents, t, text, predict=None, image_rows=None):
        """latents (B,C,H,W), H and W multiples of the patch; t (B,) in [0,1]; text (B,L,text_dim), T5's states.

        -> velocity (B,C,H,W) and logits (B,L,V). With `predict`, an index of (B,L), logits only there, (N,V); an empty
        slice gives none. With `image_rows` n, velocity only of the first n rows."""
        p, h, w = self.config.patch, latents.shape[2] // self.config.patch, latents.shape[3] // self.config.patch
        vec = self.t_embedder(t)
        x = rearrange(self.x_embedder["proj"](latents.to(vec.dtype)), "b d h w -> b (h w) d")
        x = x + self.positions(h, w).to(x.dtype)
        text = self.context_embedder(text.to(vec.dtype))
        for block in self.joint_blocks:
            x, text = block(x, text, vec)
        x = self.final_layer(x[:image_rows], vec[:image_rows])
        velocity = rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=h, w=w, p=p, q=p)
        return velocity, self.text_head(text if predict is None else text[predict])


@dataclass
class Settings:
    """How a checkpoint is meant to be used. The defaults are the paper's at full size."""
    size: int = 256         # side of the images it reads and draws, pixels
    length: int = 256       # tokens a prompt, caption or question with answer is padded to
    cfg: float = 7.0        # classifier-free guidance when drawing
    cfg_times: tuple = (0.0, 1.0)  # it guides from the first t to the second; in the paper always
    shift: float = 3.0      # of the drawing time grid, SD3's
    caption_steps: int = 256
    answer_steps: int = 16
    caption_prompt: str = ""  # the question that asks for a caption; empty: captions are written without one
    answer_suffix: str = ""   # added to every question


@dataclass
class Config:
    ddit: DDiTConfig = field(default_factory=DDiTConfig)
    t5: T5Config = field(default_factory=T5Config)
    vae: VAEConfig = field(default_factory=VAEConfig)
    settings: Settings = field(default_factory=Settings)


PRESETS = {
    "sd3-medium": Config(),
    # Table 9 says 1.1 billion parameters, all trained from scratch; depth and width are a guess to match.
    "end-to-end": Config(DDiTConfig(depth=19, width=1216, heads=19)),
    "tiny": Config(  # vocab and vocab_size follow the tokenizer that stage 0 makes
        DDiTConfig(depth=6, width=128, heads=2, text_dim=128, pos_size=8, qk_norm=True),
        T5Config(d_model=128, num_layers=2, num_heads=4, d_kv=32, d_ff=256, max_distance=32),
        VAEConfig(channels=8, groups=4),
        Settings(size=64, length=24, cfg=3.0, cfg_times=(0.5, 0.95))),
}


class DualDiffusion(nn.Module):
    """The whole system. `ddit`, `t5`, `vae` are modules, `tokenizer` a t5.Tokenizer, `config` a Config; a part that is
    missing from the file (stage 0 writes no ddit, SD3's file has no T5) is None."""
    def __init__(self, config, tokenizer, ddit=None, t5=None, vae=None):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.ddit, self.t5, self.vae = ddit, t5, vae

    @classmethod
    def build(cls, config, tokenizer, parts=("ddit", "t5", "vae")):
        """Fresh random weights. Both vocabularies follow the tokenizer, T5's rounded up to a multiple of 128."""
        config.ddit.vocab = tokenizer.vocab_size
        config.t5.vocab_size = -(-tokenizer.vocab_size // 128) * 128
        return cls(config, tokenizer, **{part: make_part(getattr(config, part)) for part in parts})

    def encode_image(self, pixels, generator=None):
        """Pixels (B,3,H,W) in [-1,1] -> the latents the transformer sees: a sample with a generator, else the mean."""
        mean, logvar = self.vae.encode(pixels.to(self.device))
        noise = torch.randn(mean.shape, generator=generator, device=generator.device) if generator else torch.zeros(1)
        return self.vae.normalize(self.vae.sample(mean, logvar, noise.to(mean)))

    def decode_image(self, latents):
        """Latents as the transformer sees them -> pixels (B,3,8h,8w), clamped to [-1,1]."""
        return self.vae.decode(self.vae.denormalize(latents)).float().clamp(-1, 1)

    @property
    def device(self):
        return next(self.parameters()).device

    @classmethod
    def load(cls, path, t5=None, vae=None, tokenizer=None, device="cpu", dtype=torch.float32, offload=False):
        """A file of ours, an SD3 single file, or a folder in diffusers layout -> the system. See `read_parts`."""
        return cls(**read_parts(path, t5, vae, tokenizer, device, dtype, offload)).eval()

    def save(self, path, dtype=None):
        write_file(self, path, dtype)  # one self-contained .safetensors


# ------------------------------------------------- the chapter ends here; what follows makes it practical


PARTS = {"ddit": "transformer", "t5": "T5", "vae": "VAE"}
MODULES = {DDiTConfig: DDiT, T5Config: T5Encoder, EmbeddingsConfig: Embeddings, VAEConfig: VAE}


def make_part(config):
    """A part's configuration -> its module."""
    return MODULES[type(config)](config)


def sincos_table(size, dim):
    """(1, size*size, dim): fixed 2-D sine-cosine positions, half of the channels for x and half for y. Coordinates
    span 64 units whatever the size, which for 192 gives SD3-medium's table."""
    at = torch.arange(size, dtype=torch.float64) * 64 / size
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    one = torch.cat([torch.sin(at[:, None] * omega), torch.cos(at[:, None] * omega)], dim=1)  # (size, dim/2)
    x, y = one[None].expand(size, -1, -1), one[:, None].expand(-1, size, -1)
    return torch.cat([x, y], dim=2).reshape(1, size * size, dim).float()


def init_weights(ddit):
    """As DiT does it."""
    if ddit.pos_embed.is_meta:  # a file will give the values
        return
    ddit.pos_embed.copy_(sincos_table(ddit.config.pos_size, ddit.config.width))
    for module in ddit.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            nn.init.zeros_(module.bias)
    for i in (0, 2):
        nn.init.normal_(ddit.t_embedder.mlp[i].weight, std=0.02)


# ---------------------------------------------------------------- files: names, shapes, configurations
# `find_parts` learns from names and shapes what a file or folder holds, and reads no tensor. `read_parts` makes the
# modules and reads their tensors. A module is the only specification of its file: other names or shapes are refused.

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # to compute in; fp16 is too narrow for T5-XXL
TensorInfo = namedtuple("TensorInfo", "file name shape")  # a tensor in a file

# Stability's single files have a prefix per part, ours are written so too. diffusers has a folder per part (the
# authors' release: text_encoder; SD3's own: text_encoder_3, beside two of CLIP's).
PREFIXES = {"ddit": "model.diffusion_model.", "vae": "first_stage_model.", "t5": "text_encoders.t5xxl.transformer."}
FOLDERS = {"ddit": ["transformer"], "t5": ["text_encoder_3", "text_encoder"], "vae": ["vae"]}
# A tensor that every file with that part has, and beginnings of names that we know and do not want.
KEY_TENSORS = {"ddit": "joint_blocks.0.x_block.attn.qkv.weight", "vae": "encoder.down.0.block.0.conv1.weight",
               "t5": "encoder.final_layer_norm.weight"}
UNUSED = {"ddit": ("y_embedder.", "null_image_embd"), "vae": (), "t5": ("decoder.", "lm_head.", "logit_scale")}
HEAD = "text_head.linear.weight"  # if it is missing, the text head is new
SPIECE = "spiece_model"  # in our files: the tokenizer, as a uint8 tensor
RENAME = {"t5": "encoder.embed_tokens shared", "ddit": """
    pos_embed.proj                              x_embedder.proj
    pos_embed.pos_embed                         pos_embed
    time_text_embed.timestep_embedder.linear_1  t_embedder.mlp.0
    time_text_embed.timestep_embedder.linear_2  t_embedder.mlp.2
    time_text_embed.text_embedder.linear_1      y_embedder.mlp.0
    time_text_embed.text_embedder.linear_2      y_embedder.mlp.2
    transformer_blocks                          joint_blocks
    norm1.linear                                x_block.adaLN_modulation.1
    attn.to_[qkv]                               x_block.attn.qkv
    attn.norm_added_                            context_block.attn.ln_
    attn.norm_                                  x_block.attn.ln_
    attn.to_out.0                               x_block.attn.proj
    ff.net.0.proj                               x_block.mlp.fc1
    ff.net.2                                    x_block.mlp.fc2
    norm1_context.linear                        context_block.adaLN_modulation.1
    attn.add_[qkv]_proj                         context_block.attn.qkv
    attn.to_add_out                             context_block.attn.proj
    ff_context.net.0.proj                       context_block.mlp.fc1
    ff_context.net.2                            context_block.mlp.fc2
    text_proj_out                               text_head.linear
    ^(image_)?norm_out.linear                   final_layer.adaLN_modulation.1
    ^(image_)?proj_out                          final_layer.linear
""", "vae": """
    conv_norm_out                               norm_out
    mid_block.resnets.0                         mid.block_1
    mid_block.resnets.1                         mid.block_2
    mid_block.attentions.0.group_norm           mid.attn_1.norm
    mid_block.attentions.0.to_out.0             mid.attn_1.proj_out
    mid_block.attentions.0.to_                  mid.attn_1.
    resnets                                     block
    conv_shortcut                               nin_shortcut
    downsamplers.0                              downsample
    upsamplers.0                                upsample
    down_blocks                                 down
"""}  # each line: a piece of a name in diffusers, as a regular expression, and ours
# A part's configuration comes from its tensors' shapes; the rest from the file's header, or from a config.json, which
# has other names for some fields. The authors' release is tuned on instructions, to caption and to answer briefly.
DIFFUSERS_FIELDS = {"num_attention_heads": "heads", "relative_attention_max_distance": "max_distance",
                    "norm_num_groups": "groups", "shift_factor": "shift", "scaling_factor": "scale"}
AUTHORS = {"size": 512, "length": 128, "caption_prompt": "Describe the image concisely.",
           "answer_suffix": "Answer the question using a single word or phrase."}


def read_json(path):
    """A JSON object; an empty one where there is no file."""
    if not os.path.exists(path):
        return {}
    with open(path, "rb") as f:
        return parse(f.read(), path, dict)


def safetensors_files(folder):
    """The .safetensors of a part's folder: one, or its shards. Of several variants the shortest name, the plain one."""
    stems = {name: name.split("-00")[0].removesuffix(".safetensors") for name in os.listdir(folder)
             if name.endswith(".safetensors")}
    if not stems:
        raise ValueError(f"{folder}: holds no .safetensors file")
    return [os.path.join(folder, name) for name in stems if stems[name] == min(stems.values(), key=len)]


def open_checkpoint(path):
    """A .safetensors file, or a folder of one or of shards -> [TensorInfo], and its configuration, {part: {...}}."""
    infos, metadata = [], {}
    for file in safetensors_files(path) if os.path.isdir(path) else [path]:
        try:
            with safe_open(file, "pt") as f:
                infos += [TensorInfo(file, name, tuple(f.get_slice(name).get_shape())) for name in f.keys()]
                metadata |= f.metadata() or {}
        except SafetensorError as error:
            refuse_pointer(file)
            raise ValueError(f"{file}: not a readable .safetensors file, or not all of one ({error})") from error
    config = {DIFFUSERS_FIELDS.get(k, k): v for k, v in read_json(os.path.join(path, "config.json")).items()}
    if "shift" in config:
        config["shift"] = config["shift"] or 0.0  # diffusers writes null for none
    ours = parsed(metadata.get("config", "").encode())  # other tools write a "config", too
    ours = {k: v for k, v in ours.items() if isinstance(v, dict)} if isinstance(ours, dict) else {}
    return infos, dict.fromkeys(PARTS, config) | ours


def refuse_pointer(file):
    """Raises ValueError for what git leaves in a file's place without git-lfs."""
    with open(file, "rb") as f:
        if f.read(40).startswith(b"version https://git-lfs"):
            raise ValueError(f"{file}: a git-lfs pointer, not the file itself: fetch it (git lfs pull)")


def by_our_names(part, infos):
    """-> {our name: [TensorInfo]} of one part: one, or three (q, k, v) to be joined."""
    ours = [info for info in infos if info.name.startswith(PREFIXES[part])]
    levels = len({level for info in infos for level in re.findall(r"up_blocks\.(\d+)", info.name)})
    found = {}
    for info in ours or [info for info in infos if not info.name.startswith((*PREFIXES.values(), "text_encoders."))]:
        name = info.name.removeprefix(PREFIXES[part])
        for line in RENAME[part].strip().splitlines():
            name = re.sub(*line.split(), name)
        # diffusers counts the VAE's levels going up from the other end
        name = re.sub(r"up_blocks\.(\d+)", lambda level: f"up.{levels - 1 - int(level[1])}", name)
        found.setdefault(name, {})[(re.findall(r"attn\.(?:to|add)_([qkv])", info.name) or [""])[0]] = info
    return {name: [pieces[x] for x in ("", "q", "k", "v") if x in pieces] for name, pieces in found.items()}


def shape_of(pieces):
    return sum(info.shape[0] for info in pieces), *pieces[0].shape[1:]


def configure(part, tensors, header):
    """The configuration of a part: what the shapes of its tensors say and, for the rest, the file's header."""
    def size(name, axis):
        return shape_of(tensors[f"{name}.weight"])[axis]

    def count(blocks):
        return len({match[1] for match in map(re.compile(rf"{blocks}\.(\d+)\.").match, tensors) if match})

    def make(kind, **shapes):
        known = header | shapes
        return kind(**{f.name: known[f.name] for f in fields(kind) if f.name in known})

    if part == "ddit":
        width, head = size("x_embedder.proj", 0), {"vocab": size("text_head.linear", 0)} if HEAD in tensors else {}
        return make(DDiTConfig, depth=count("joint_blocks"), width=width, heads=header.get("heads", width // 64),
                    patch=size("x_embedder.proj", 2), channels=size("x_embedder.proj", 1),
                    text_dim=size("context_embedder", 1), pos_size=math.isqrt(shape_of(tensors["pos_embed"])[1]),
                    qk_norm="joint_blocks.0.x_block.attn.ln_q.weight" in tensors, **head)
    if part == "vae":
        widths = [size(f"encoder.down.{i}.block.0.conv1", 0) for i in range(count("encoder.down"))]
        return make(VAEConfig, channels=widths[0], multipliers=tuple(width // widths[0] for width in widths),
                    latent_channels=size("encoder.conv_out", 0) // 2)
    table = {"vocab_size": size("shared", 0), "d_model": size("shared", 1)}
    if "positions" in tensors:
        return make(EmbeddingsConfig, positions=shape_of(tensors["positions"])[0], **table)
    attend, dense = "encoder.block.0.layer.0.SelfAttention.", "encoder.block.0.layer.1.DenseReluDense."
    buckets, heads = (size(attend + "relative_attention_bias", axis) for axis in (0, 1))
    return make(T5Config, num_layers=count("encoder.block"), num_heads=heads, d_kv=size(attend + "q", 0) // heads,
                buckets=buckets, d_ff=size(dense + "wi_0", 0), **table)


def find_parts(path, t5=None, vae=None, tokenizer=None):
    """A checkpoint, a file or a folder -> Config, {part: {our name: [TensorInfo]}}, Tokenizer or None. Of tensors only
    the tokenizer's is read. t5, vae: take that part from there; tokenizer: a file."""
    config, parts, spiece, settings = Config(), {}, None, {}
    folders = [[os.path.join(path, name) for name in names] for names in FOLDERS.values()]
    folders = [next(filter(os.path.isdir, names), None) for names in folders]  # CLIP's, the second, must not stop T5's
    for source in list(filter(None, folders)) or [path]:
        infos, header = open_checkpoint(source)
        settings |= header.get("settings", {})
        for info in infos:
            if info.name == SPIECE:
                spiece = safe_open(info.file, "pt").get_tensor(SPIECE).numpy().tobytes()
        for part in PARTS:
            tensors = by_our_names(part, infos)
            if part not in parts and KEY_TENSORS[part] in tensors:
                try:
                    setattr(config, part, configure(part, tensors, header[part]))
                except (KeyError, IndexError, ZeroDivisionError) as error:
                    raise ValueError(f"{source}: the tensor {error} is missing, or no {PARTS[part]}'s") from None
                parts[part] = tensors
    if not parts:
        raise ValueError(f"{path}: holds no part of SD3, T5 or D-DiT")
    if "null_image_embd" in parts.get("ddit", ()):
        settings = settings or AUTHORS
    settings = settings | read_json(os.path.join(path, "scheduler", "scheduler_config.json"))  # has "shift"
    config.settings = Settings(**{f.name: settings[f.name] for f in fields(Settings) if f.name in settings})
    for part, other in (("t5", t5), ("vae", vae)):
        if other is not None:
            other_config, other_parts, _ = find_parts(other)
            if part not in other_parts:
                raise ValueError(f"{other}: holds no {PARTS[part]}")
            parts[part] = other_parts[part]
            setattr(config, part, getattr(other_config, part))

    beside = [os.path.join(path, name, "spiece.model") for name in ("tokenizer_3", "tokenizer")]
    if file := tokenizer or next(filter(os.path.exists, beside), None):
        refuse_pointer(file)
        with open(file, "rb") as f:
            spiece = f.read()
    try:
        tokenizer = Tokenizer(spiece) if spiece is not None else None
    except ValueError as error:
        raise ValueError(f"{file or path}: {error}") from error
    if tokenizer and HEAD not in parts.get("ddit", ()):  # a new head, which fits
        config.ddit.vocab = tokenizer.vocab_size
    return config, parts, tokenizer


def read_parts(path, t5=None, vae=None, tokenizer=None, device="cpu", dtype=torch.float32, offload=False):
    """A file of ours, an SD3 single file, or a folder in diffusers layout -> what DualDiffusion is made of, by name.

    t5, vae: another file or folder to take that part from; tokenizer: a spiece.model; dtype: to compute in, one for
    all or {"ddit": dtype, "t5": dtype, "vae": dtype} (a part not named: float32), None as in the file; offload: T5
    stays on the CPU. Raises FileNotFoundError or ValueError with one line that says what is wrong, and where."""
    dtypes = dtype if isinstance(dtype, dict) else dict.fromkeys(PARTS, dtype)
    config, parts, tokenizer = find_parts(path, t5, vae, tokenizer)
    for part, gives, takes in (("t5", config.t5.d_model, config.ddit.text_dim),
                               ("vae", config.vae.latent_channels, config.ddit.channels)):
        if {part, "ddit"} <= parts.keys() and gives != takes:
            raise ValueError(f"{path}: takes {takes} channels from its {PARTS[part]}, this one gives {gives}; "
                             f"give the one that it was trained with (--{part})")
    spare = config.t5.vocab_size - tokenizer.vocab_size if tokenizer and "t5" in parts else 0  # of a rounded table
    if tokenizer and config.ddit.vocab != tokenizer.vocab_size or not 0 <= spare < 128:
        raise ValueError(f"{path}: the text head knows {config.ddit.vocab} tokens, T5 {config.t5.vocab_size}, the "
                         f"tokenizer {tokenizer.vocab_size}; give the one that they were trained with (--spiece)")
    modules = {part: read_part(part, tensors, getattr(config, part), "cpu" if offload and part == "t5" else device,
                               dtypes.get(part, torch.float32)) for part, tensors in parts.items()}
    return {"config": config, "tokenizer": tokenizer, **modules}


def read_part(part, tensors, config, device, dtype):
    """-> the module, on its device. Names and shapes in the file must be those of the module. A tensor is mapped from
    its file and converted once; one that needs no conversion stays mapped."""
    with torch.device("meta"):  # no memory yet, and no time spent on initial values that would be overwritten
        module = make_part(config)
    new = from_sd3(tensors, config) if part == "ddit" else {}
    file, wanted = next(iter(tensors.values()))[0].file, module.state_dict()
    open_file = functools.cache(functools.partial(safe_open, framework="pt"))
    for name in wanted.keys() - new.keys():
        shape = shape_of(tensors[name]) if name in tensors else "missing"
        if shape not in (wanted[name].shape, wanted[name].shape[:2]):  # a 1x1 convolution is a matrix in diffusers
            raise ValueError(f"{file}: the tensor {name} is {shape}, it should be {tuple(wanted[name].shape)}: "
                             f"another model, or not all of it")
    if others := [name for name in tensors if name not in wanted and not name.startswith(UNUSED[part])]:
        raise ValueError(f"{file}: has a tensor {others[0]}, as no {PARTS[part]} that this program knows")
    state = {name: read(tensors, name, device, dtype, open_file).reshape(tensor.shape)
             for name, tensor in wanted.items() if name not in new}
    stored = next(iter(state.values())).dtype
    state |= {name: tensor.to(device, stored) for name, tensor in new.items()}
    module.load_state_dict(state, assign=True)
    if part == "vae" and torch.device(device).type == "cpu":  # there convolutions are faster with channels last
        module.to(memory_format=torch.channels_last)
    return module


def read(tensors, name, device="cpu", dtype=torch.float32, open_file=functools.partial(safe_open, framework="pt")):
    """-> the tensor. dtype None is the file's, but fp8 becomes bf16: nothing computes in fp8."""
    pieces = [open_file(info.file).get_tensor(info.name) for info in tensors[name]]
    dtype = dtype or (torch.bfloat16 if pieces[0].dtype == torch.float8_e4m3fn else pieces[0].dtype)
    tensor = torch.cat([piece.to(device, dtype) for piece in pieces]) if pieces[1:] else pieces[0].to(device, dtype)
    # Where no MLP follows, diffusers stores (scale, shift), SD3 (shift, scale): in the image head, and in SD3's last
    # block, which ends its text stream early.
    swap = "adaLN" in name and "adaLN" not in tensors[name][0].name
    if swap and re.sub("adaLN.*", "mlp.fc2.weight", name) not in tensors:
        tensor = torch.cat(tensor.chunk(2)[::-1])
    return tensor


def from_sd3(tensors, config):
    """What D-DiT has and SD3 lacks -> {name: tensor}; empty if the file is not SD3.

    SD3 adds CLIP's pooled vector to the time. With that vector at zero a constant is left, y_embedder(0), which goes
    into the last bias of t_embedder. SD3's last block ends its text stream with the attention. What follows there is
    new, and so is the text head; the velocity does not depend on them. With gates at zero the text passes unchanged.
    So for the same latents, time and text states the velocity is SD3's own."""
    new = {}
    if "y_embedder.mlp.0.bias" in tensors:
        b0, w2, b2, bias = (read(tensors, name) for name in ("y_embedder.mlp.0.bias", "y_embedder.mlp.2.weight",
                                                             "y_embedder.mlp.2.bias", "t_embedder.mlp.2.bias"))
        new["t_embedder.mlp.2.bias"] = bias + w2 @ F.silu(b0) + b2
    last = f"joint_blocks.{config.depth - 1}.context_block."
    modulation, early = last + "adaLN_modulation.1.", 2 * config.width  # shift and scale before the attention
    if shape_of(tensors.get(modulation + "bias", [TensorInfo("", "", (0,))])) == (early,):
        for name, tensor in DDiT(replace(config, depth=1, pos_size=1)).state_dict().items():  # heads and gates are zero
            name = name.replace("joint_blocks.0.context_block.", last)
            if name.startswith(("text_head.", last + "attn.proj.", last + "mlp.")):
                new[name] = tensor
            elif name.startswith(modulation):
                new[name] = torch.cat([read(tensors, name), tensor[early:]])
    return new


def write_file(dd, path, dtype=None):
    """One self-contained .safetensors: all parts under SD3's names, the tokenizer as bytes, the configuration as JSON
    in the header. dtype: of the tensors on disk; None: as they are. Raises OSError, and leaves what was there."""
    tensors = {prefix + name: tensor.to("cpu", dtype or tensor.dtype).contiguous()
               for part, prefix in PREFIXES.items() if getattr(dd, part) is not None
               for name, tensor in getattr(dd, part).state_dict().items()}
    if dd.tokenizer:
        tensors[SPIECE] = torch.frombuffer(bytearray(dd.tokenizer.model), dtype=torch.uint8)
    with replacing(path) as beside:
        save_file(tensors, beside, {"format": "pt", "config": json.dumps(asdict(dd.config))})


def missing_parts(dd):
    """What a system still needs to draw and read, in words: ["T5 (--t5)"]; empty when whole."""
    names = {"ddit": "transformer", "t5": "T5 (--t5)", "vae": "VAE (--vae)", "tokenizer": "tokenizer (--spiece)"}
    return [name for part, name in names.items() if getattr(dd, part) is None]
