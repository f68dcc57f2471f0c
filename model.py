"""The transformer: D-DiT, which draws images from text and reads images into text with one set of weights.

It is Stable Diffusion 3's MM-DiT with a second head (Figure 1). Two streams of tokens, image and text, each with
weights of its own, meet in every block in one joint attention; at the top one head predicts the image's velocity, one
the masked tokens. `DualDiffusion` is the whole system: transformer, T5, VAE and tokenizer. Modules carry the names of
SD3's single-file checkpoint, so that its weights need no translation.
References:
  Li et al., Dual Diffusion for Unified Image Generation and Understanding (D-DiT), arXiv 2501.00289
  Esser et al., Scaling Rectified Flow Transformers (SD3: MM-DiT), arXiv 2403.03206
  Peebles & Xie, Scalable Diffusion Models with Transformers (DiT: adaLN-Zero), arXiv 2212.09748
"""
import functools
import json
import math
import os
import re
import shutil
from collections import OrderedDict, namedtuple
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from data import parse, regular_file, replacing
from losses import flat_positions
from t5 import SENTINELS, RMSNorm, T5Config, T5Encoder, Tokenizer
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


class StreamBlock(nn.Module):
    """A DiT block of one stream, split at the joint attention: what goes into it, and what follows it."""
    def __init__(self, cfg):
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(cfg)
        self.norm2 = nn.LayerNorm(cfg.width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(cfg.width, 4 * cfg.width), gelu=nn.GELU("tanh"), fc2=nn.Linear(4 * cfg.width, cfg.width)))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.width, 6 * cfg.width))

    def before(self, x, vec):
        """-> (q, k, v), and the modulation for `after`."""
        shift, scale, *rest = self.adaLN_modulation(vec).chunk(6, dim=1)
        return self.attn(modulate(self.norm1(x), shift, scale)), rest

    def after(self, x, attended, rest):
        gate_attn, shift_mlp, scale_mlp, gate_mlp = rest
        x = x + gate_attn[:, None] * self.attn.proj(attended)
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class JointBlock(nn.Module):
    """MM-DiT: two streams, separate weights, one joint attention."""
    def __init__(self, cfg):
        super().__init__()
        self.context_block, self.x_block = StreamBlock(cfg), StreamBlock(cfg)

    def forward(self, x, text, vec):
        from_text, text_rest = self.context_block.before(text, vec)
        from_image, image_rest = self.x_block.before(x, vec)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(from_text, from_image))
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")  # no mask: EOS counts
        to_text, to_image = attended.split([text.shape[1], x.shape[1]], dim=1)
        return self.x_block.after(x, to_image, image_rest), self.context_block.after(text, to_text, text_rest)


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
        """Logits in float32: bf16 has 128 values from 8 to 16, so one row in a hundred has a tie for the largest."""
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

        -> velocity (B,C,H,W) and logits (B,L,V). With `predict`, (B,L) bool or (N,) positions counted row by row,
        logits only there, (N,V); with `image_rows` n, velocity only of the first n rows (0: none)."""
        p, h, w = self.config.patch, latents.shape[2] // self.config.patch, latents.shape[3] // self.config.patch
        vec = self.t_embedder(t)
        x = rearrange(self.x_embedder["proj"](latents.to(vec.dtype)), "b d h w -> b (h w) d")
        x = x + self.positions(h, w).to(x.dtype)
        text = self.context_embedder(text.to(vec.dtype))
        for block in self.joint_blocks:
            x, text = block(x, text, vec)
        x = self.final_layer(x[:image_rows], vec[:image_rows])
        velocity = rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=h, w=w, p=p, q=p)
        if predict is not None:
            positions = predict if predict.ndim == 1 else flat_positions(predict)
            text = text.flatten(0, 1)[positions.to(text.device)]
        return velocity, self.text_head(text)


@dataclass
class Settings:
    """How a checkpoint is meant to be used. The defaults are the paper's at full size."""
    size: int = 256         # side of the images it reads and draws, pixels
    length: int = 256       # tokens a prompt, caption or question with answer is padded to
    cfg: float = 7.0        # classifier-free guidance when drawing
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
        Settings(size=64, length=24, cfg=3.0)),
}

MODULES = {"ddit": DDiT, "t5": T5Encoder, "vae": VAE}


class DualDiffusion(nn.Module):
    """The whole system. `ddit`, `t5`, `vae` are modules, `tokenizer` a t5.Tokenizer, `config` a Config; a part that is
    missing from the file (stage 0 writes no ddit) is None."""
    def __init__(self, config, tokenizer, ddit=None, t5=None, vae=None):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.ddit, self.t5, self.vae = ddit, t5, vae

    @classmethod
    def build(cls, config, tokenizer, parts=tuple(MODULES)):
        """Fresh random weights. Both vocabularies follow the tokenizer, T5's rounded up to a multiple of 128."""
        config.ddit.vocab = tokenizer.vocab_size
        config.t5.vocab_size = -(-tokenizer.vocab_size // 128) * 128
        return cls(config, tokenizer, **{part: MODULES[part](getattr(config, part)) for part in parts})

    def encode_image(self, pixels, generator=None):
        """Pixels (B,3,H,W) in [-1,1] -> the latents the transformer sees. With a generator a sample of the posterior
        (training), without one its mean."""
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

    def export(self, folder):
        write_folder(self, folder)  # diffusers layout, as the authors' release has it


# ------------------------------------------------- the chapter ends here; what follows makes it practical


def sincos_table(size, dim):
    """(1, size*size, dim): fixed 2-D sine-cosine positions, half of the channels for x and half for y. Coordinates
    span 64 units whatever the size, which for 192 gives SD3-medium's table."""
    at = torch.arange(size, dtype=torch.float64) * 64 / size
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    one = torch.cat([torch.sin(at[:, None] * omega), torch.cos(at[:, None] * omega)], dim=1)  # (size, dim/2)
    x, y = one[None].expand(size, -1, -1), one[:, None].expand(-1, size, -1)
    return torch.cat([x, y], dim=2).reshape(1, size * size, dim).float()


def init_weights(ddit):
    """DiT's adaLN-Zero: every block starts as the identity, and both heads at zero."""
    if ddit.pos_embed.is_meta:  # a file will give the values
        return
    ddit.pos_embed.copy_(sincos_table(ddit.config.pos_size, ddit.config.width))
    for name, module in ddit.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            nn.init.zeros_(module.bias)
            if "adaLN" in name or name in ("final_layer.linear", "text_head.linear"):
                nn.init.zeros_(module.weight)
    for i in (0, 2):
        nn.init.normal_(ddit.t_embedder.mlp[i].weight, std=0.02)


# ---------------------------------------------------------------- open: what lies in the files
# `inspect` finds out from names and shapes what a file or folder holds, and reads no tensor. `read_parts` builds the
# modules and reads what they need, nothing else. `write_folder` is the way back.

PART_NAMES = {"ddit": "transformer", "t5": "T5", "vae": "VAE"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # to compute in; fp16 is too narrow for T5-XXL
TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}
TensorInfo = namedtuple("TensorInfo", "file name shape dtype")  # a tensor in a file; dtype: a key of TYPES
open_safetensors = functools.partial(safe_open, framework="pt")

# Other models in .safetensors files, by pieces of tensor names: a file with all pieces of a key holds that.
UNET = "a U-Net (Stable Diffusion 1, 2 or XL), another architecture"
SD35 = "SD3.5, which has norms on queries and keys: D-DiT starts from SD3-medium (sd3_medium.safetensors)"
OTHER_MODELS = {
    "lora_": "a LoRA: changes to a model, not a model",
    "double_blocks.": "FLUX, another architecture", "single_transformer_blocks.": "FLUX, another architecture",
    "input_blocks.": UNET, "down_blocks.0.attentions": UNET,
    ".attn2.": "SD3.5-medium, whose blocks attend twice: D-DiT starts from SD3-medium (sd3_medium.safetensors)",
    "y_embedder. .attn.ln_q.": SD35, "time_text_embed.text_embedder. .attn.norm_q.": SD35,
    "scale_weight": "T5 in scaled fp8, which this program cannot read: take t5xxl_fp8_e4m3fn or t5xxl_fp16",
}


def read_bytes(path):
    with open(regular_file(path), "rb") as f:
        return f.read(1 << 26)  # no tokenizer or JSON file is larger


def read_json(path):
    """A JSON object; an empty one where there is no file."""
    return parse(read_bytes(path), path, dict) if os.path.exists(path) else {}


def safetensors_files(folder):
    """The .safetensors files of a part's folder: one, or the shards that an index names. Of several variants the
    shortest name, which is the plain one."""
    names = sorted(os.listdir(folder), key=len)
    files = [name for name in names if name.endswith(".safetensors") and "-of-" not in name][:1]
    index = next((os.path.join(folder, name) for name in names if ".safetensors.index" in name), None)
    if not files and not index:
        raise ValueError(f"{folder}: holds no .safetensors file")
    if not files:
        shards = read_json(index).get("weight_map")
        files = list(shards.values()) if isinstance(shards, dict) else [None]
    for name in files:
        if not isinstance(name, str) or os.path.basename(name) != name:
            raise ValueError(f'{index}: its "weight_map" should name files of this folder, not {name!r:.60}')
        if not os.path.exists(os.path.join(folder, name)):
            raise FileNotFoundError(f"{os.path.join(folder, name)}: this shard is missing ({index} names it)")
    return [os.path.join(folder, name) for name in sorted(set(files))]


def open_checkpoint(path):
    """A .safetensors file, or a folder of one or of shards -> {name in the file: TensorInfo}, and what header and
    config.json say of its parts' configurations, {part: {name: value}}. Raises ValueError for other models."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such checkpoint")
    infos, metadata = {}, {}
    for file in safetensors_files(path) if os.path.isdir(path) else [path]:
        if file.endswith((".ckpt", ".pth", ".pt", ".bin")):
            raise ValueError(f"{file}: a pickle, which could run any code when opened; take the model's .safetensors")
        try:
            with open_safetensors(regular_file(file)) as f:
                slices = {name: f.get_slice(name) for name in f.keys()}
                infos |= {k: TensorInfo(file, k, tuple(x.get_shape()), x.get_dtype()) for k, x in slices.items()}
                metadata |= f.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{file}: not a readable .safetensors file, or not all of one ({error})") from error
    for pieces, model in OTHER_MODELS.items():
        names = [next((name for name in infos if piece in name), None) for piece in pieces.split()]
        if all(names):
            raise ValueError(f"{path}: this is {model} (it has a tensor {names[-1]})")
    header = parse(metadata.get("config", "{}"), f"{path}, header", dict)
    if not all(isinstance(values, dict) for values in header.values()):
        raise ValueError(f"{path}: the configuration in its header should hold an object for each part")
    json_file = read_json(os.path.join(path, "config.json"))
    for part, names in DIFFUSERS_FIELDS.items():
        header.setdefault(part, {names[name]: value for name, value in json_file.items() if name in names})
    return infos, header


# ---------------------------------------------------------------- name: a tensor of ours in other people's files

# Stability's single files have a prefix per part. Ours are written so too.
PREFIXES = {"ddit": "model.diffusion_model.", "vae": "first_stage_model.", "t5": "text_encoders.t5xxl.transformer."}
# A tensor that every file with that part has; how the names of its numbered blocks or levels begin.
KEY_TENSORS = {"ddit": "joint_blocks.0.x_block.attn.qkv.weight", "vae": "encoder.down.0.block.0.conv1.weight",
               "t5": "encoder.final_layer_norm.weight"}
BLOCKS = {"ddit": "joint_blocks|transformer_blocks", "vae": "encoder.down|encoder.down_blocks", "t5": "encoder.block"}
HEAD = "text_head.linear.weight"  # if it is missing, the text head is new
SPIECE = "spiece_model"  # in our files: the tokenizer, as a uint8 tensor

# diffusers: a folder per part (the authors' release: text_encoder; SD3's own: text_encoder_3, beside two of CLIP's),
# and other names. Each line replaces a piece of our name, one after the other. {x}: three tensors, q, k and v. The
# authors' names have image_, SD3's do not. T5's table has two names, and a file has either or both.
FOLDERS = {"ddit": ["transformer"], "t5": ["text_encoder_3", "text_encoder"], "vae": ["vae"]}
DIFFUSERS = {"t5": "shared encoder.embed_tokens", "ddit": """
    pos_embed                         pos_embed.pos_embed
    x_embedder                        pos_embed
    t_embedder.mlp.0                  time_text_embed.timestep_embedder.linear_1
    t_embedder.mlp.2                  time_text_embed.timestep_embedder.linear_2
    y_embedder.mlp.0                  time_text_embed.text_embedder.linear_1
    y_embedder.mlp.2                  time_text_embed.text_embedder.linear_2
    joint_blocks                      transformer_blocks
    x_block.adaLN_modulation.1        norm1.linear
    x_block.attn.qkv                  attn.to_{x}
    x_block.attn.ln_                  attn.norm_
    x_block.attn.proj                 attn.to_out.0
    x_block.mlp.fc1                   ff.net.0.proj
    x_block.mlp.fc2                   ff.net.2
    context_block.adaLN_modulation.1  norm1_context.linear
    context_block.attn.qkv            attn.add_{x}_proj
    context_block.attn.ln_            attn.norm_added_
    context_block.attn.proj           attn.to_add_out
    context_block.mlp.fc1             ff_context.net.0.proj
    context_block.mlp.fc2             ff_context.net.2
    final_layer.adaLN_modulation.1    image_norm_out.linear
    final_layer.linear                image_proj_out
    text_head.linear                  text_proj_out
""", "vae": """
    norm_out                          conv_norm_out
    mid.block_1                       mid_block.resnets.0
    mid.block_2                       mid_block.resnets.1
    mid.attn_1.norm                   mid_block.attentions.0.group_norm
    mid.attn_1.proj_out               mid_block.attentions.0.to_out.0
    mid.attn_1.                       mid_block.attentions.0.to_
    .block.                           .resnets.
    nin_shortcut                      conv_shortcut
    downsample                        downsamplers.0
    upsample                          upsamplers.0
    encoder.down                      encoder.down_blocks
    decoder.up                        decoder.up_blocks
"""}


@functools.cache
def diffusers_names(part, name, blocks):
    """Our name of a tensor -> [its one name, or three] in diffusers. blocks: how many blocks or levels the part has;
    diffusers counts the VAE's levels going up from the other end."""
    for line in DIFFUSERS[part].strip().splitlines():
        name = name.replace(*line.split())
    name = re.sub(r"(?<=up_blocks\.)\d+", lambda level: str(blocks - 1 - int(level[0])), name)
    return [name.replace("{x}", x) for x in ("qkv" if "{x}" in name else "-")]


class Tensors:
    """The tensors of one part in a file or folder, by our names whatever the file calls them. Nothing is read yet."""
    def __init__(self, part, path, infos):
        self.part, self.path = part, path
        self.infos = {re.sub(f"^({PREFIXES[part]}|image_)", "", name): info for name, info in infos.items()}
        matches = (re.match(rf"({BLOCKS[part]})\.(\d+)\.", name) for name in self.infos)
        self.blocks = len({match[2] for match in matches if match})  # or levels

    def pieces(self, name):
        """-> [TensorInfo]: one, or three to be joined along the first axis, or none if it is missing."""
        if name in self.infos:
            return [self.infos[name]]
        names = [name.removeprefix("image_") for name in diffusers_names(self.part, name, self.blocks)]
        return [self.infos[name] for name in names] if self.infos.keys() >= {*names} else []

    def __contains__(self, name):
        return bool(self.pieces(name))

    def shape(self, name, *expected):
        """-> the tensor's. Raises ValueError if it is missing, or not as expected (None: any size)."""
        pieces, where = self.pieces(name), f"{self.path}: the tensor {name}"
        if not pieces:
            raise ValueError(f"{where} is missing; the file is incomplete")
        shape = tuple(n * len(pieces) if axis == 0 else n for axis, n in enumerate(pieces[0].shape))
        if ".attn_1." in name and len(shape) == 2:  # a matrix in diffusers, a 1x1 convolution here
            shape += (1, 1)
        if len(shape) != len(expected) or any(n not in (None, m) for n, m in zip(expected, shape)):
            raise ValueError(f"{where} is {shape}, it should be {expected}".replace("None", "any"))
        if any(piece.shape != pieces[0].shape for piece in pieces):
            raise ValueError(f"{where} and those beside it should have one shape")
        return shape

    def read(self, name, shape, device="cpu", dtype=torch.float32, open_file=open_safetensors):
        """-> the tensor. It must be there, in that shape, of a type that we can read, and finite: NaN or infinity would
        give empty answers. dtype None is the file's, but fp8 becomes bf16: nothing computes in fp8. A tensor that
        needs no conversion stays memory-mapped."""
        shape, pieces, tensors = self.shape(name, *shape), self.pieces(name), []
        if (code := pieces[0].dtype) not in TYPES:
            raise ValueError(f"{self.path}: the tensor {name} is of type {code}; this program reads {', '.join(TYPES)}")
        dtype = dtype or (torch.bfloat16 if code == "F8_E4M3" else TYPES[code])
        for piece in pieces:
            tensors.append(open_file(piece.file).get_tensor(piece.name).to(device, dtype))
            if not torch.stack(tensors[-1].aminmax()).isfinite().all():  # isfinite alone makes copies: 40 times slower
                raise ValueError(f"{piece.file}: the tensor {piece.name} holds NaN or infinity; the file is damaged, "
                                 f"get it again")
        tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0].reshape(shape)
        # Where no MLP follows, diffusers stores (scale, shift), SD3 (shift, scale): in the image head, and in SD3's
        # last block, which ends its text stream early.
        swap = "adaLN" in name and "adaLN" not in piece.name and re.sub("adaLN.*", "mlp.fc2.weight", name) not in self
        return torch.cat(tensor.chunk(2)[::-1]) if swap else tensor


# ---------------------------------------------------------------- configure: what the shapes and the file say

# The authors' release is tuned on instructions: it captions on request, and answers briefly on request.
AUTHORS = {"size": 512, "length": 128, "caption_prompt": "Describe the image concisely.",
           "answer_suffix": "Answer the question using a single word or phrase."}
# A part's configuration comes from its tensors' shapes; the rest comes from the file's header or a config.json, which
# has other names for some fields:
DIFFUSERS_FIELDS = {"ddit": {"num_attention_heads": "heads", "num_layers": "depth"},
                    "t5": {"relative_attention_max_distance": "max_distance", "num_layers": "num_layers"},
                    "vae": {"norm_num_groups": "groups", "shift_factor": "shift", "scaling_factor": "scale"}}


def from_shapes(part, tensors, header):
    """What the shapes of a part's tensors say of its configuration -> {name: value}."""
    def size(module, axis, axes=2):
        return tensors.shape(f"{module}.weight", *[None] * axes)[axis]

    if part == "ddit":
        width, head = size("x_embedder.proj", 0, 4), {"vocab": size("text_head.linear", 0)} if HEAD in tensors else {}
        return head | {"depth": tensors.blocks, "width": width, "heads": header.get("heads", width // 64),
                       "patch": size("x_embedder.proj", 2, 4), "channels": size("x_embedder.proj", 1, 4),
                       "text_dim": size("context_embedder", 1),
                       "pos_size": math.isqrt(tensors.shape("pos_embed", 1, None, None)[1]),
                       "qk_norm": "joint_blocks.0.x_block.attn.ln_q.weight" in tensors}
    if part == "vae":
        convs = ["conv_in", *(f"down.{i}.block.0.conv1" for i in range(tensors.blocks)), "conv_out"]
        base, *widths, moments = (size(f"encoder.{conv}", 0, 4) for conv in convs)
        return {"channels": base, "multipliers": [width // max(base, 1) for width in widths],
                "latent_channels": moments // 2}
    table = {"vocab_size": size("shared", 0), "d_model": size("shared", 1), "num_layers": tensors.blocks}
    if "places" in tensors:
        return table | {"places": tensors.shape("places", None, None)[0]}
    attend, dense = "encoder.block.0.layer.0.SelfAttention.", "encoder.block.0.layer.1.DenseReluDense."
    buckets, heads = (size(attend + "relative_attention_bias", axis) for axis in (0, 1))
    return table | {"num_heads": heads, "d_kv": size(attend + "q", 0) // max(heads, 1), "buckets": buckets,
                    "d_ff": size(dense + "wi_0", 0), "places": 0}


RULES = {
    "ddit": (lambda c: c.width % c.heads == 0 and c.width % 4 == 0, "width should be a multiple of heads and of 4"),
    "t5": (lambda c: 0 < c.buckets // 4 < c.max_distance, "max_distance should be above a quarter of buckets"),
    "vae": (lambda c: c.scale > 0 and not any(c.channels * m % c.groups for m in c.multipliers),
            "scale should be above 0, and the channels of every level a multiple of groups"),
    "settings": (lambda c: c.shift > 0 and c.size % 16 == 0, "shift should be above 0, and size a multiple of 16")}


def configure(part, header, where, shapes=None):
    """What a file's header says of a part or of the settings, and what its shapes say, each {name: value} -> the part's
    dataclass. Configurations are checked here and nowhere else: an impossible value would fail far from its source."""
    kind = type(getattr(Config(), part))
    values, usual, most = header | (shapes or {}), asdict(kind()), 2 ** (14 if part == "settings" else 20)
    for name, value in values.items():
        least = 0 if name in ("places", "num_layers") else 2 if name == "length" else 1
        why = (", which this program does not know; a newer one may" if name not in usual else
               f" by its tensors, {header[name]!r:.60} by its configuration" if header.get(name, value) != value else
               "" if fits(value, usual[name], least, most) else f", which cannot be; {usual[name]!r} is usual")
        if why:
            raise ValueError(f"{where}: {part}.{name} is {value!r:.60}{why}")
    config = kind(**{name: type(usual[name])(value) for name, value in values.items()})
    holds, rule = RULES[part]
    if not holds(config):
        raise ValueError(f"{where}: {rule}; here it is {config}")
    return config


def fits(value, usual, least, most):
    if isinstance(usual, tuple):
        return isinstance(value, list | tuple) and 0 < len(value) < 9 and all(fits(v, 1, 1, most) for v in value)
    if type(usual) in (int, float):
        return type(value) in (int, type(usual)) and (least if type(usual) is int else -most) <= value <= most
    return type(value) is type(usual)


def check_together(config, parts, tokenizer):
    """Parts of several files must fit each other."""
    for part, gives, takes in (("t5", config.t5.d_model, config.ddit.text_dim),
                               ("vae", config.vae.latent_channels, config.ddit.channels)):
        if {"ddit", part} <= parts.keys() and gives != takes:
            raise ValueError(f"{parts[part].path}: this {PART_NAMES[part]} gives {gives} channels, the transformer in "
                             f"{parts['ddit'].path} takes {takes}; give the one that it was trained with (--{part})")
    if tokenizer and (config.ddit.vocab != tokenizer.vocab_size or config.t5.vocab_size < tokenizer.vocab_size):
        raise ValueError(f"{next(iter(parts.values())).path}: the text head knows {config.ddit.vocab} tokens, T5 "
                         f"{config.t5.vocab_size}, the tokenizer {tokenizer.vocab_size}; give the one that they were "
                         f"trained with (--spiece)")


# ---------------------------------------------------------------- inspect, read


def inspect(path, t5=None, vae=None, tokenizer=None):
    """Look into a checkpoint, a file or a folder, and read nothing but the tokenizer -> Config, {part: Tensors},
    Tokenizer or None. t5, vae: take that part from there; tokenizer: a file."""
    if os.path.isdir(os.path.join(path, "unet")):
        raise ValueError(f"{path}: this is {UNET}")
    config, parts, spiece, settings = Config(), {}, None, {}
    folders = [os.path.join(path, name) for names in FOLDERS.values() for name in names]
    for where in [folder for folder in folders if os.path.isdir(folder)] or [path]:
        infos, header = open_checkpoint(where)
        settings |= header.get("settings", {})
        if SPIECE in infos:
            spiece = open_safetensors(infos[SPIECE].file).get_tensor(SPIECE).to(torch.uint8).numpy().tobytes()
        for part in MODULES:
            tensors, values = Tensors(part, where, infos), header[part]
            if part not in parts and KEY_TENSORS[part] in tensors:
                parts[part] = tensors
                setattr(config, part, configure(part, values, where, from_shapes(part, tensors, values)))
    if not parts:
        raise ValueError(f"{path}: holds no part of SD3, T5 or D-DiT")
    settings |= read_json(os.path.join(path, "d_dit.json"))
    if "ddit" in parts and "null_image_embd" in parts["ddit"] and not settings:
        settings = dict(AUTHORS)
    scheduler = read_json(os.path.join(path, "scheduler", "scheduler_config.json"))
    settings |= {name: value for name, value in scheduler.items() if name == "shift"}
    config.settings = configure("settings", settings, path)

    for part, other in (("t5", t5), ("vae", vae)):
        if other is not None:
            other_config, other_parts, _ = inspect(other)
            if part not in other_parts:
                raise ValueError(f"{other}: holds no {PART_NAMES[part]}")
            parts[part] = other_parts[part]
            setattr(config, part, getattr(other_config, part))

    beside = [os.path.join(path, name, "spiece.model") for name in ("tokenizer_3", "tokenizer")]
    file = tokenizer or next(filter(os.path.exists, beside), None)
    spiece = read_bytes(file) if file else spiece
    try:
        tokenizer = Tokenizer(spiece) if spiece is not None else None
    except ValueError as error:
        raise ValueError(f"{file or path}: {error}") from error
    if tokenizer and HEAD not in parts.get("ddit", []):  # a new head, which fits
        config.ddit.vocab = tokenizer.vocab_size
    return config, parts, tokenizer


def read_parts(path, t5=None, vae=None, tokenizer=None, device="cpu", dtype=torch.float32, offload=False):
    """A file of ours, an SD3 single file, or a folder in diffusers layout -> what DualDiffusion is made of, by name.

    t5, vae: another file or folder to take that part from; tokenizer: a spiece.model; dtype: to compute in, one for
    all or {"ddit": dtype, "t5": dtype, "vae": dtype} (a part not named: float32), None as in the file; offload: T5
    stays on the CPU. Modules are built without memory; a tensor is mapped from its file and converted once, straight to
    its device and type. Raises FileNotFoundError or ValueError with one line that says what is wrong, and where."""
    dtypes = dtype if isinstance(dtype, dict) else dict.fromkeys(MODULES, dtype)
    if unknown := dtypes.keys() - MODULES.keys():
        raise ValueError(f"dtype names {', '.join(sorted(unknown))}; the parts are {', '.join(MODULES)}")
    config, parts, tokenizer = inspect(path, t5, vae, tokenizer)
    if tokenizer is None:
        raise ValueError(f"{path}: holds no tokenizer; give T5's spiece.model (--spiece)")
    check_together(config, parts, tokenizer)
    modules = {part: read_part(part, tensors, getattr(config, part), "cpu" if offload and part == "t5" else device,
                               dtypes.get(part, torch.float32)) for part, tensors in parts.items()}
    return {"config": config, "tokenizer": tokenizer, **modules}


def read_part(part, tensors, config, device, dtype):
    """-> the module, on its device. Every tensor it wants must be there, in the right shape and a type we can read."""
    with torch.device("meta"):  # no memory yet, and no time spent on initial values that would be overwritten
        module = MODULES[part](config)
    new = from_sd3(tensors, config) if part == "ddit" else {}
    state, mapped, open_file = {}, 0, functools.cache(open_safetensors)
    for name, tensor in module.state_dict().items():
        state[name] = (tensors.read(name, tensor.shape, device, dtype, open_file) if name not in new else
                       new[name].to(device, state["x_embedder.proj.weight"].dtype))
        mapped += state[name].nbytes
        if mapped > 1 << 26:  # pages read from an open file count as our memory: close it now and then
            mapped = open_file.cache_clear() or 0
    module.load_state_dict(state, assign=True)
    return module


def from_sd3(tensors, config):
    """What D-DiT has and SD3 lacks -> {name: tensor}; empty if the file is not SD3. For the same inputs the velocity
    stays SD3's own with CLIP's pooled vector at zero. (But the inputs differ: SD3 puts CLIP's 77 tokens before T5's,
    and pads T5's with 0, we with EOS.)

    The pooled vector enters only as y_embedder(0), a constant, which goes into the last bias of t_embedder. SD3's last
    block ends its text stream with the attention. What follows here is new and does not touch the velocity; with its
    gates at zero it passes the text unchanged to the text head, which is new too."""
    new = {}
    if "y_embedder.mlp.0.bias" in tensors:
        b0, b2, bias = (tensors.read(f"{name}.bias", [config.width]) for name in (
            "y_embedder.mlp.0", "y_embedder.mlp.2", "t_embedder.mlp.2"))
        w2 = tensors.read("y_embedder.mlp.2.weight", [config.width, config.width])
        new["t_embedder.mlp.2.bias"] = bias + w2 @ F.silu(b0) + b2
    last = f"joint_blocks.{config.depth - 1}.context_block."
    modulation, early = last + "adaLN_modulation.1.", 2 * config.width  # shift and scale before the attention
    if tensors.shape(modulation + "bias", None) == (early,):
        for name, tensor in DDiT(replace(config, depth=1, pos_size=1)).state_dict().items():  # heads and gates are zero
            name = name.replace("joint_blocks.0.context_block.", last)
            if name.startswith(("text_head.", last + "attn.proj.", last + "mlp.")):
                new[name] = tensor
            elif name.startswith(modulation):
                new[name] = torch.cat([tensors.read(name, (early, *tensor.shape[1:])), tensor[early:]])
    return new


# ---------------------------------------------------------------- write: our file, and diffusers' folder


def write_file(dd, path, dtype=None):
    """One self-contained .safetensors: all parts under SD3's names, the tokenizer as bytes, the configuration as JSON
    in the header. `dtype`: of the floating-point tensors on disk, e.g. torch.float16; as they are when None. Raises
    OSError with one line, and leaves what was there."""
    tensors = {prefix + name: tensor.to("cpu", dtype or tensor.dtype).contiguous()
               for part, prefix in PREFIXES.items() if getattr(dd, part) is not None
               for name, tensor in getattr(dd, part).state_dict().items()}
    tensors[SPIECE] = torch.frombuffer(bytearray(dd.tokenizer.model), dtype=torch.uint8)
    with replacing(path) as beside:
        save_file(tensors, beside, {"format": "pt", "config": json.dumps(asdict(dd.config))})


def missing_parts(dd):
    """What a system still needs to draw and read, in words: ["T5"]; empty when whole."""
    return [name for part, name in PART_NAMES.items() if getattr(dd, part) is None]


def refuse_full(folder):
    """Refuse to export into a folder that holds other files."""
    if not folder or os.path.lexists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
        raise FileExistsError(f"--export {folder or '(nothing)'}: give the name of a new folder, or of an empty one")


def write_folder(dd, folder):
    """The diffusers layout as the authors' release has it, whole or not at all: a folder per part. The tensors are this
    model's, bit for bit. Raises ValueError or OSError with one line."""
    if missing_parts(dd):
        raise ValueError(f"nothing written to {folder}: holds no {' and no '.join(missing_parts(dd))}")
    if dd.config.t5.places:
        raise ValueError(f"nothing written to {folder}: that layout knows no learned embeddings in T5's place")
    refuse_full(folder)
    beside = os.path.abspath(folder) + ".partial"
    shutil.rmtree(beside, ignore_errors=True)  # left by a kill
    try:
        for name, content in diffusers_files(dd):
            path = os.path.join(beside, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with replacing(path) as file:
                if isinstance(content, bytes):
                    Path(file).write_bytes(content)
                else:
                    save_file(content, file, {"format": "pt"})
        os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def diffusers_files(dd):
    """-> pairs of a file's name and its content, tensors or bytes. The authors feed `null_image_embd` where there is no
    image; we neither use nor keep it, and write zeros."""
    for part in MODULES:
        state = {"null_image_embd": dd.ddit.pos_embed.new_zeros(1, 8, dd.config.ddit.width)} if part == "ddit" else {}
        for name, tensor in getattr(dd, part).state_dict().items():
            if name.startswith("final_layer.adaLN"):
                tensor = torch.cat(tensor.chunk(2)[::-1])
            if ".attn_1." in name and tensor.ndim == 4:
                tensor = tensor.flatten(1)
            names = [name] if part == "t5" else diffusers_names(part, name, len(dd.config.vae.multipliers))
            state |= {n: piece.cpu().contiguous() for n, piece in zip(names, tensor.chunk(len(names)))}
        yield f"{FOLDERS[part][-1]}/{'model' if part == 't5' else 'diffusion_pytorch_model'}.safetensors", state
    for name, content in diffusers_configs(dd.config).items():
        yield name, json.dumps(content, indent=2).encode()
    yield "tokenizer/spiece.model", dd.tokenizer.model


def diffusers_configs(config):
    """The JSON files of the diffusers layout, {path: content}."""
    ddit, t5, vae, levels = config.ddit, config.t5, config.vae, len(config.vae.multipliers)
    return {
        "model_index.json": {
            "_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"],
            "text_encoder": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "T5Tokenizer"],
            "vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]},
        "d_dit.json": asdict(config.settings),  # ours alone
        "transformer/config.json": {
            "_class_name": "SD3JointModelFlexible", "vocab_size": ddit.vocab, "sample_size": 128,
            "patch_size": ddit.patch, "in_channels": ddit.channels, "out_channels": ddit.channels,
            "num_layers": ddit.depth, "num_attention_heads": ddit.heads, "attention_head_dim": ddit.width // ddit.heads,
            "joint_attention_dim": ddit.text_dim, "caption_projection_dim": ddit.width, "pooled_projection_dim": 2048,
            "pos_embed_max_size": ddit.pos_size, **({"qk_norm": "rms_norm"} if ddit.qk_norm else {})},
        "text_encoder/config.json": {
            "model_type": "t5", "architectures": ["T5EncoderModel"], "feed_forward_proj": "gated-gelu",
            "d_model": t5.d_model, "num_layers": t5.num_layers, "num_heads": t5.num_heads, "d_kv": t5.d_kv,
            "d_ff": t5.d_ff, "vocab_size": t5.vocab_size, "relative_attention_num_buckets": t5.buckets,
            "relative_attention_max_distance": t5.max_distance, "tie_word_embeddings": False},
        "vae/config.json": {
            "_class_name": "AutoencoderKL", "block_out_channels": [vae.channels * m for m in vae.multipliers],
            "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
            "layers_per_block": 2, "latent_channels": vae.latent_channels, "norm_num_groups": vae.groups,
            "shift_factor": vae.shift, "scaling_factor": vae.scale, "use_quant_conv": False,
            "use_post_quant_conv": False},
        "scheduler/scheduler_config.json": {
            "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000,
            "shift": config.settings.shift},
        "tokenizer/tokenizer_config.json": {"tokenizer_class": "T5Tokenizer", "extra_ids": SENTINELS},
    }
