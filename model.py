"""The transformer: D-DiT, which draws images from text and reads images into text with one set of weights.

It is Stable Diffusion 3's MM-DiT with a second head (Figure 1). There are two streams of tokens, image
and text, each with weights of its own. They meet in every block in one joint attention. At the top one
head predicts the velocity of the image, the other the masked tokens. `DualDiffusion` is the whole system:
transformer, T5, VAE and tokenizer. Modules carry the names of SD3's single-file checkpoint, so its weights
load without translation.
References: Li et al., Dual Diffusion (D-DiT), arXiv 2501.00289
  Esser et al., Scaling Rectified Flow Transformers (SD3: MM-DiT), arXiv 2403.03206
  Peebles & Xie, Scalable Diffusion Models with Transformers (DiT: adaLN-Zero), arXiv 2212.09748
"""
import json
import math
import os
import re
from collections import OrderedDict
from dataclasses import asdict, dataclass, field, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from data import parse, replacing, slices
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
    qk_norm: bool = False   # RMSNorm on queries and keys; SD3-medium has none


@dataclass
class Settings:
    """How a checkpoint is meant to be used. The defaults are the paper's at full size."""
    size: int = 256         # pixels, the side of the images that it reads and draws
    length: int = 256       # tokens to which a prompt, caption or question with answer is padded
    cfg: float = 7.0        # classifier-free guidance when drawing
    cfg_times: tuple = (0.0, 1.0)  # guidance works between these two t; in the paper always
    shift: float = 3.0      # of the time grid of drawing; SD3's
    caption_steps: int = 256
    answer_steps: int = 16
    caption_prompt: str = ""  # the question that asks for a caption; "": captions need no question
    answer_suffix: str = ""   # is added to every question
    held_out: float = 0.0     # share of a user's images that were not learned; 0: it has learned from none


def modulate(x, shift, scale):
    """adaLN: x (B,N,D), shift and scale (B,D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class TimestepEmbedder(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        """t (B,) in [0,1] -> (B,width). Cosines, then sines, of 1000 t at 128 frequencies, 1 to 1/10000."""
        k = torch.arange(128, device=t.device, dtype=torch.float32)
        omega = torch.exp(-math.log(10000) * k / 128)
        angle = 1000 * t.float()[:, None] * omega
        waves = torch.cat([angle.cos(), angle.sin()], dim=1)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


class Attention(nn.Module):
    """One stream's part in the joint attention: its own projections in (qkv) and out (proj)."""
    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        norm = RMSNorm if config.qk_norm else nn.Identity
        self.ln_q = norm(config.width // config.heads)
        self.ln_k = norm(config.width // config.heads)

    def forward(self, x):
        """-> q, k, v, each (B,heads,N,head_dim)."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        return self.ln_q(q), self.ln_k(k), v


class StreamBlock(nn.Module):
    """A DiT block of one stream, split at the joint attention: `before` makes what goes into it,
    `after` uses what comes out. `vec` (B,width) is the time, embedded. From it come shift, scale and
    gate for the attention, and the same for the MLP. Shift and scale change what goes in; the gate
    says how much of the result is added to the stream. Gates begin at zero (`DDiT.init_weights`)."""
    def __init__(self, config):
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(width, 4 * width),
            gelu=nn.GELU("tanh"),
            fc2=nn.Linear(4 * width, width)))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def before(self, x, vec):
        """-> (q, k, v), and the six vectors (B,6*width): the first two are used here, the others by `after`."""
        vectors = self.adaLN_modulation(vec)
        shift, scale, *_ = vectors.chunk(6, dim=1)
        return self.attn(modulate(self.norm1(x), shift, scale)), vectors

    def after(self, x, attended, vectors):
        _, _, gate_attn, shift_mlp, scale_mlp, gate_mlp = vectors.chunk(6, dim=1)
        x = x + gate_attn[:, None] * self.attn.proj(attended)
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class JointBlock(nn.Module):
    """MM-DiT: two streams with weights of their own, one joint attention."""
    def __init__(self, config):
        super().__init__()
        self.context_block = StreamBlock(config)
        self.x_block = StreamBlock(config)

    def forward(self, x, text, vec, image_rows=None):
        """image_rows, for the last block: rows [:image_rows] go on with x alone, [image_rows:] with the text alone."""
        (text_q, text_k, text_v), text_vectors = self.context_block.before(text, vec)
        (image_q, image_k, image_v), image_vectors = self.x_block.before(x, vec)
        q = torch.cat([text_q, image_q], dim=2)
        k = torch.cat([text_k, image_k], dim=2)
        v = torch.cat([text_v, image_v], dim=2)
        attended = F.scaled_dot_product_attention(q, k, v)  # no mask: EOS padding is text, too
        attended = rearrange(attended, "b h n d -> b n (h d)")
        to_text, to_image = attended.split([text.shape[1], x.shape[1]], dim=1)
        drawn = slice(image_rows)  # both slices: if None, all rows
        read = slice(image_rows, None)
        x = self.x_block.after(x[drawn], to_image[drawn], image_vectors[drawn])
        text = self.context_block.after(text[read], to_text[read], text_vectors[read])
        return x, text


class FinalLayer(nn.Module):
    """The image head, as in SD3."""
    def __init__(self, config):
        super().__init__()
        self.norm_final = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(config.width, config.patch ** 2 * config.channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 2 * config.width))

    def forward(self, x, vec):
        shift, scale = self.adaLN_modulation(vec).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class TextHead(nn.Module):
    """The part that SD3 does not have: a logit for every token of the vocabulary."""
    def __init__(self, config):
        super().__init__()
        self.norm_final = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(config.width, config.vocab)

    def forward(self, text):
        """Computes in float32: in bf16 the two largest logits of a row are often equal."""
        x = self.norm_final(text).float()
        return F.linear(x, self.linear.weight.float(), self.linear.bias.float())


def sincos_table(size, dim):
    """Makes the fixed 2-D position table, (1, size*size, dim): half of the channels hold sines and cosines of
    x, the other half of y. As in SD3, x and y run from 0 to 64, however many positions there are."""
    position = torch.arange(size, dtype=torch.float64) * 64 / size
    k = torch.arange(dim // 4, dtype=torch.float64)
    omega = 10000.0 ** (-k / (dim // 4))
    angle = position[:, None] * omega
    waves = torch.cat([angle.sin(), angle.cos()], dim=1)  # (size, dim/2)
    x = waves[None].expand(size, -1, -1)
    y = waves[:, None].expand(-1, size, -1)
    return torch.cat([x, y], dim=2).reshape(1, size * size, dim).float()


class DDiT(nn.Module):
    """Figure 1. The time modulates both streams. Where text is predicted, the image is clean: the time is 0."""
    def __init__(self, config: DDiTConfig):
        super().__init__()
        self.config = config
        patches = nn.Conv2d(config.channels, config.width, config.patch, stride=config.patch)
        self.x_embedder = nn.ModuleDict({"proj": patches})
        self.t_embedder = TimestepEmbedder(config.width)
        self.context_embedder = nn.Linear(config.text_dim, config.width)
        self.register_buffer("pos_embed", torch.empty(1, config.pos_size ** 2, config.width))
        self.joint_blocks = nn.ModuleList(JointBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.text_head = TextHead(config)
        if not self.pos_embed.is_meta:  # else a file will give the values
            self.init_weights()

    def init_weights(self):
        """Draws the weights as DiT does. adaLN-Zero: gates, shifts, scales and both heads begin at zero."""
        self.pos_embed.copy_(sincos_table(self.config.pos_size, self.config.width))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # in place: flatten gives a view
                nn.init.zeros_(module.bias)
        for k in (0, 2):
            nn.init.normal_(self.t_embedder.mlp[k].weight, std=0.02)
        for name, p in self.named_parameters():
            if "adaLN" in name or name.startswith(("final_layer.linear", "text_head.linear")):
                nn.init.zeros_(p)

    def positions(self, h, w):
        """Returns the centred h x w crop of the position table, (1, h*w, width), or raises ValueError."""
        side = self.config.pos_size
        if h > side or w > side:
            raise ValueError(f"an image of {h}x{w} patches is larger than the model's {side}x{side} positions")
        table = rearrange(self.pos_embed, "1 (h w) d -> 1 h w d", h=side)
        top = (side - h) // 2
        left = (side - w) // 2
        return table[:, top:top + h, left:left + w].flatten(1, 2)

    def forward(self, latents, t, text, predict=None, image_rows=None):
        """latents (B,C,H,W), H and W multiples of the patch; t (B,) in [0,1]; text (B,L,text_dim), T5's
        states -> velocity (B,C,H,W), logits (B,L,V).
        image_rows: rows [:image_rows] give velocities only, [image_rows:] logits only; None: all give both.
        predict: bool on the CPU, (rows with logits, L); where it is true logits are computed, (N,V)."""
        vec = self.t_embedder(t)
        x = self.x_embedder["proj"](latents.to(vec.dtype))
        h, w = x.shape[2:]
        x = rearrange(x, "b d h w -> b (h w) d") + self.positions(h, w).to(x.dtype)
        text = self.context_embedder(text.to(vec.dtype))
        *blocks, last = self.joint_blocks
        for block in blocks:
            x, text = block(x, text, vec)
        x, text = last(x, text, vec, image_rows)  # after it nothing mixes rows or streams
        x = self.final_layer(x, vec[:image_rows])
        p = self.config.patch
        velocity = rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=h, w=w, p=p, q=p)
        if predict is not None:
            places = torch.as_tensor(predict).flatten().nonzero()[:, 0]  # a tensor, or train.py's array
            text = text.flatten(0, 1)[places.to(text.device, non_blocking=True)]
        return velocity, self.text_head(text)


class DualDiffusion(nn.Module):
    """The whole system: three modules, a t5.Tokenizer, a Config. A part that a file does not hold is None."""
    def __init__(self, config, tokenizer, ddit=None, t5=None, vae=None):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.ddit = ddit
        self.t5 = t5
        self.vae = vae

    @classmethod
    def build(cls, config, tokenizer, parts=("ddit", "t5", "vae")):
        """Makes a system with fresh random weights. (T5's table has a multiple of 128 rows.)"""
        config.ddit.vocab = tokenizer.vocab_size
        config.t5.vocab_size = 128 * math.ceil(tokenizer.vocab_size / 128)
        return cls(config, tokenizer, **{part: make_part(getattr(config, part)) for part in parts})

    def encode_image(self, pixels):
        """Pixels (B,3,H,W) in [-1,1] -> latents as the transformer sees them (the mean of the posterior)."""
        return self.vae.normalize(self.vae.encode(pixels.to(self.device))[0])

    def decode_image(self, latents):
        """Latents as the transformer sees them -> pixels (B,3,8h,8w), clamped to [-1,1]."""
        return decode_in_parts(self.vae, self.vae.denormalize(latents)).clamp(-1, 1)

    @property
    def device(self):
        return next(self.parameters()).device

    @classmethod
    def load(cls, path, t5=None, vae=None, tokenizer=None, device="cpu", dtype=torch.float32, offload=False):
        """Reads a file of ours, an SD3 single file, or a folder in diffusers layout: see `read_parts`."""
        return cls(**read_parts(path, t5, vae, tokenizer, device, dtype, offload)).eval()

    def save(self, path, dtype=None):
        write_file(self, path, dtype)  # one self-contained .safetensors


# ------------------------------------------------- the chapter ends here; what follows makes it practical

@dataclass
class Config:
    ddit: DDiTConfig = field(default_factory=DDiTConfig)
    t5: T5Config = field(default_factory=T5Config)
    vae: VAEConfig = field(default_factory=VAEConfig)
    settings: Settings = field(default_factory=Settings)


PRESETS = {
    "sd3-medium": Config(),
    "tiny": Config(  # its vocabularies follow the tokenizer that stage 0 makes
        DDiTConfig(depth=6, width=128, heads=2, text_dim=128, pos_size=8, qk_norm=True),
        T5Config(d_model=128, num_layers=2, num_heads=4, d_kv=32, d_ff=256, max_distance=32),
        VAEConfig(channels=8, groups=4),
        Settings(size=64, length=24, cfg=3.0, cfg_times=(0.5, 0.95))),
}
PARTS = {"ddit": "transformer", "t5": "T5 (--t5)", "vae": "VAE (--vae)"}
MODULES = {DDiTConfig: DDiT, T5Config: T5Encoder, EmbeddingsConfig: Embeddings, VAEConfig: VAE}


def make_part(config):
    return MODULES[type(config)](config)


def decode_in_parts(vae, z):
    """Decodes raw latents in slices of half the usual size: it takes more memory than the transformer. Raises
    ValueError."""
    height = z.shape[2] * vae.config.factor
    width = z.shape[3] * vae.config.factor
    parts = [vae.decode(z[part]) for part in slices(len(z), 2 * height, width, z.device)]
    return finite(torch.cat(parts).float())


def finite(tensor):
    """Returns the tensor. Raises ValueError if it holds NaN or infinity."""
    if not tensor.isfinite().all():
        raise ValueError("the model computes NaN or infinity: its weights are damaged, or too large for --dtype")
    return tensor


# ---------------------------------------------------------------- files
# `find_parts` finds the tensors of each part, under our modules' names, and the configuration: in the header (our
# files), in config.json (diffusers' folders), or SD3-medium's and T5-XXL's (other files). `read_part` makes a module,
# the only specification of its tensors: other names or shapes are refused. Only then are values read from disk.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # T5-XXL's activations overflow fp16
# Stability's single files have a prefix for each part, and so have ours.
PREFIXES = {"ddit": "model.diffusion_model.", "vae": "first_stage_model.", "t5": "text_encoders.t5xxl.transformer."}
# A tensor that every file with that part has, and beginnings of names that we do not use.
KEY_TENSORS = {"ddit": "joint_blocks.0.x_block.mlp.fc1.weight", "vae": "encoder.down.0.block.0.conv1.weight",
               "t5": "encoder.final_layer_norm.weight"}
UNUSED = {"ddit": ("y_embedder.", "null_image_embd"), "vae": (), "t5": ("decoder.", "lm_head.", "logit_scale")}
SPIECE = "spiece_model"  # in our files the tokenizer, as a uint8 tensor
# Each line has a piece of a name in diffusers, as a regular expression, and our name for it.
RENAME = {"t5": "encoder.embed_tokens shared", "ddit": r"""
    pos_embed.proj                              x_embedder.proj
    pos_embed.pos_embed                         pos_embed
    time_text_embed.timestep_embedder.linear_1  t_embedder.mlp.0
    time_text_embed.timestep_embedder.linear_2  t_embedder.mlp.2
    time_text_embed.text_embedder.linear_1      y_embedder.mlp.0
    time_text_embed.text_embedder.linear_2      y_embedder.mlp.2
    transformer_blocks                          joint_blocks
    norm1.linear                                x_block.adaLN_modulation.1
    attn.to_([qkv])                             x_block.attn.\1
    attn.norm_added_                            context_block.attn.ln_
    attn.norm_                                  x_block.attn.ln_
    attn.to_out.0                               x_block.attn.proj
    ff.net.0.proj                               x_block.mlp.fc1
    ff.net.2                                    x_block.mlp.fc2
    norm1_context.linear                        context_block.adaLN_modulation.1
    attn.add_([qkv])_proj                       context_block.attn.\1
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
    up_blocks.0                                 up.3
    up_blocks.1                                 up.2
    up_blocks.2                                 up.1
    up_blocks.3                                 up.0
"""}
# The fields of a config.json that have other names than ours.
FIELDS = {
    "ddit": {"num_layers": "depth", "num_attention_heads": "heads", "patch_size": "patch", "in_channels": "channels",
             "joint_attention_dim": "text_dim", "vocab_size": "vocab", "pos_embed_max_size": "pos_size"},
    "t5": {"relative_attention_num_buckets": "buckets", "relative_attention_max_distance": "max_distance"},
    "vae": {"norm_num_groups": "groups"}}
# The authors' release is tuned on instructions, to caption and to answer briefly.
AUTHORS = {"size": 512, "length": 128, "caption_prompt": "Describe the image concisely.",
           "answer_suffix": "Answer the question using a single word or phrase."}


def read_json(path):
    if not os.path.exists(path):
        return {}
    with open(path, "rb") as f:
        return parse(f.read(), path, dict)


def safetensors_files(folder):
    """Lists a part's .safetensors: one file, or its shards. Variants, as model.fp16.safetensors, have longer names."""
    names = [name for name in sorted(os.listdir(folder)) if name.endswith(".safetensors")]
    if not names:
        raise ValueError(f"{folder}: holds no .safetensors file")
    shortest = min(map(len, names))
    return [f"{folder}/{name}" for name in names if len(name) == shortest]


def open_checkpoint(path):
    """Opens a .safetensors file, or a folder of one or of shards -> {name: tensor}, the header's {key: str}."""
    tensors, header = {}, {}
    for file in safetensors_files(path) if os.path.isdir(path) else [path]:
        try:
            with safe_open(file, "pt") as f:
                header |= f.metadata() or {}
                for name in f.keys():
                    tensors[name] = f.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file}: not a whole .safetensors file, or a git-lfs pointer to one ({error})") from error
    return tensors, header


def by_our_names(part, tensors):
    """Finds a part's tensors in a file of ours, Stability's or diffusers' -> {our name: tensor}."""
    found = {}
    for name, tensor in tensors.items():
        name = name.removeprefix(PREFIXES[part])
        if name.startswith((*PREFIXES.values(), "text_encoders.")):
            continue
        for line in RENAME[part].strip().splitlines():
            theirs, ours = line.split()
            name = re.sub(theirs, ours, name)
        found[name] = tensor
    return found


def our_config(path, header):
    """Reads the configuration in a header -> Config, or None. Raises ValueError for fields not ours."""
    try:
        sections = json.loads(header.get("config", "{}"))
    except ValueError:
        sections = {}
    if not isinstance(sections, dict) or "ddit" not in sections:  # other tools write a "config", too
        return None
    config = Config()
    for name in vars(config):
        values = sections.get(name, {})
        kind = EmbeddingsConfig if "positions" in values else type(getattr(config, name))
        wrong = values.keys() ^ kind.__annotations__.keys()
        if wrong:
            raise ValueError(f"{path}: the configuration in its header, {name}, lacks a field or has an unknown one "
                             f"({', '.join(sorted(wrong))})")
        setattr(config, name, kind(**values))
    return config


def their_config(part, values):
    """Reads a part's configuration from a config.json; what it lacks is SD3-medium's or T5-XXL's."""
    config = getattr(Config(), part)
    for key, value in values.items():
        name = FIELDS[part].get(key, key)
        if name in vars(config):
            setattr(config, name, value or 0)  # diffusers writes null for none
    if "attention_head_dim" in values:
        config.width = config.heads * values["attention_head_dim"]
    if "block_out_channels" in values:
        widths = values["block_out_channels"]
        config.channels = widths[0]
        config.multipliers = tuple(width // widths[0] for width in widths)
    return config


def find_sources(path):
    """Lists the folders of the parts in a diffusers layout. Anything else is one source itself."""
    names = ["transformer", "vae", "text_encoder"]
    if os.path.isdir(f"{path}/text_encoder_3"):
        names[2] = "text_encoder_3"  # beside it text_encoder is CLIP's
    return [f"{path}/{name}" for name in names if os.path.isdir(f"{path}/{name}")] or [path]


def find_parts(path, t5=None, vae=None, tokenizer=None, like=None):
    """Finds what a checkpoint holds -> Config, {part: {our name: tensor}}, Tokenizer or None. like: the configuration
    of a file that carries none."""
    config = replace(like) if like else Config()
    parts, spiece = {}, None
    for source in find_sources(path):
        tensors, header = open_checkpoint(source)
        ours = our_config(source, header)
        if SPIECE in tensors:
            spiece = tensors.pop(SPIECE).numpy().tobytes()
        for part in PARTS:
            found = by_our_names(part, tensors)
            if KEY_TENSORS[part] in found:
                parts[part] = found
                theirs = read_json(f"{source}/config.json")
                if theirs or not like:
                    setattr(config, part, their_config(part, theirs))
        config = ours or config
    if not parts:
        raise ValueError(f"{path}: holds no part of SD3, T5 or D-DiT")
    if "null_image_embd" in parts.get("ddit", ()):
        config.settings = Settings(**AUTHORS)
    scheduler = read_json(f"{path}/scheduler/scheduler_config.json")
    config.settings.shift = scheduler.get("shift", config.settings.shift)
    for part, other in (("t5", t5), ("vae", vae)):
        if other is not None:
            other_config, other_parts, _ = find_parts(other, like=config)
            if part not in other_parts:
                raise ValueError(f"{other}: holds no {PARTS[part]}")
            parts[part] = other_parts[part]
            setattr(config, part, getattr(other_config, part))
    return config, parts, find_tokenizer(path, tokenizer, spiece)


def find_tokenizer(path, file, spiece):
    """Makes a Tokenizer from a file, a folder in `path`, or these bytes; None without any of them."""
    for folder in ("tokenizer_3", "tokenizer"):
        beside = f"{path}/{folder}/spiece.model"
        if file is None and os.path.exists(beside):
            file = beside
    if file:
        with open(file, "rb") as f:
            spiece = f.read()
    if spiece is None:
        return None
    try:
        return Tokenizer(spiece)
    except ValueError as error:
        raise ValueError(f"{file or path}: {error}") from error


def read_parts(path, t5=None, vae=None, tokenizer=None, device="cpu", dtype=torch.float32, offload=False):
    """Reads a file of ours, an SD3 single file, or a folder in diffusers layout -> the arguments of
    DualDiffusion. t5, vae: another file or folder to take that part from; tokenizer: a spiece.model; dtype: to
    compute in, one for all or {"ddit": dtype, "t5": dtype, "vae": dtype} (float32 for a part that is not named),
    None as in the file; offload: T5 stays on the CPU. Raises FileNotFoundError or ValueError with one line."""
    config, parts, tokenizer = find_parts(path, t5, vae, tokenizer)
    check_fit(path, config, parts, tokenizer)
    dtypes = dtype if isinstance(dtype, dict) else dict.fromkeys(PARTS, dtype)
    files = {"ddit": path, "t5": t5 or path, "vae": vae or path}
    modules = {}
    for part, tensors in parts.items():
        on = "cpu" if offload and part == "t5" else device
        try:
            modules[part] = read_part(part, tensors, getattr(config, part), on, dtypes.get(part, torch.float32))
        except KeyError as error:
            raise ValueError(f"{files[part]}: the tensor {error.args[0]} is missing: not all of the file") from None
        except ValueError as error:
            raise ValueError(f"{files[part]}: {error}") from None
    return {"config": config, "tokenizer": tokenizer, **modules}


def check_fit(path, config, parts, tokenizer):
    """Raises ValueError where parts come from different models."""
    for part, gives, takes in (("t5", config.t5.d_model, config.ddit.text_dim),
                               ("vae", config.vae.latent_channels, config.ddit.channels)):
        if part in parts and "ddit" in parts and gives != takes:
            raise ValueError(f"{path}: takes {takes} channels from its {PARTS[part]}, this one gives {gives}; "
                             f"give the one that it was trained with")
    if not tokenizer:
        return
    tokens = tokenizer.vocab_size
    head_differs = "ddit" in parts and config.ddit.vocab != tokens
    spare = config.t5.vocab_size - tokens  # the rows of T5's table are rounded up
    if head_differs or "t5" in parts and not 0 <= spare < 128:
        raise ValueError(f"{path}: the text head knows {config.ddit.vocab} tokens, T5 {config.t5.vocab_size}, the "
                         f"tokenizer {tokens}; give the one that they were trained with (--spiece)")


def read_part(part, tensors, config, device, dtype):
    """Makes a part's module, on its device. Raises KeyError for a missing tensor, ValueError for another model's."""
    with torch.device("meta"):  # no memory yet, and no time spent on initial values
        module = make_part(config)
    if dtype is None:
        dtype = tensors[KEY_TENSORS[part]].dtype
        if dtype.itemsize == 1:  # nothing computes in fp8, and what is learned would be lost in it
            dtype = torch.float16
    if part == "ddit":
        tensors = join_qkv(tensors)
        tensors = tensors | new_in_ddit(tensors, config)
    wanted = module.state_dict()
    for name in tensors:
        if name not in wanted and not name.startswith(UNUSED[part]):
            raise ValueError(f"has a tensor {name}, as no {PARTS[part]} that this program knows")
    state = {}
    for name, meta in wanted.items():
        tensor = tensors[name]
        if tensor.shape not in (meta.shape, meta.shape[:2]):  # diffusers' 1x1 convolutions are 2-D
            raise ValueError(f"the tensor {name} is {tuple(tensor.shape)}, it should be {tuple(meta.shape)}: "
                             "another model, or not all of it")
        state[name] = tensor.to(device, dtype).reshape(meta.shape)
    module.load_state_dict(state, assign=True)
    if part == "vae" and torch.device(device).type == "cpu":
        module.to(memory_format=torch.channels_last)  # in which convolutions are faster there
    return module


def join_qkv(tensors):
    """Brings tensors of diffusers' transformer into SD3's layout; others are returned as they are. diffusers keeps q,
    k and v apart. Where no MLP follows a modulation, it stores scale, then shift."""
    if "joint_blocks.0.x_block.attn.q.weight" not in tensors:
        return tensors
    joined = {}
    for name, tensor in tensors.items():
        if ".attn.q." in name:
            tensor = torch.cat([tensors[name.replace(".q.", f".{x}.")] for x in "qkv"])
            name = name.replace(".q.", ".qkv.")
        elif ".attn.k." in name or ".attn.v." in name:
            continue
        elif "adaLN" in name and re.sub("adaLN.*", "mlp.fc2.weight", name) not in tensors:
            scale, shift = tensor.chunk(2)
            tensor = torch.cat([shift, scale])
        joined[name] = tensor
    return joined


def new_in_ddit(tensors, config):
    """Makes what D-DiT has and SD3 lacks -> {name: tensor}; empty if the file is not SD3's. SD3 adds
    CLIP's pooled vector to the time. With that vector at zero a constant is left, y_embedder(0), which
    goes into the last bias of t_embedder. The last block of SD3 ends its text stream with the attention.
    What follows there is new, and so is the text head; the velocity depends on neither. With gates at zero
    the text passes unchanged. So for the same latents, time and text states the velocity is SD3's own."""
    new = {}
    if "y_embedder.mlp.0.bias" in tensors:
        hidden = F.silu(tensors["y_embedder.mlp.0.bias"].float())
        bias = tensors["t_embedder.mlp.2.bias"].float() + tensors["y_embedder.mlp.2.weight"].float() @ hidden
        new["t_embedder.mlp.2.bias"] = bias + tensors["y_embedder.mlp.2.bias"].float()
    last = f"joint_blocks.{config.depth - 1}.context_block."
    modulation = last + "adaLN_modulation.1."
    early = 2 * config.width  # SD3's last modulation: shift and scale before the attention
    if len(tensors.get(modulation + "bias", ())) != early:
        return new
    fresh = DDiT(replace(config, depth=1, pos_size=1))  # its heads and gates are zero
    for name, tensor in fresh.state_dict().items():
        name = name.replace("joint_blocks.0.context_block.", last)
        if name.startswith(("text_head.", last + "attn.proj.", last + "mlp.")):
            new[name] = tensor
        elif name.startswith(modulation):
            new[name] = torch.cat([tensors[name].float(), tensor[early:]])
    return new


def write_file(dd, path, dtype=None):
    """Writes all parts, tokenizer and configuration into one .safetensors; dtype: of its tensors."""
    tensors = {}
    for part, prefix in PREFIXES.items():
        module = getattr(dd, part)
        if module is not None:
            for name, tensor in module.state_dict().items():
                tensors[prefix + name] = tensor.to("cpu", dtype or tensor.dtype).contiguous()
    if dd.tokenizer:
        tensors[SPIECE] = torch.frombuffer(bytearray(dd.tokenizer.model), dtype=torch.uint8)
    with replacing(path) as beside:
        save_file(tensors, beside, {"config": json.dumps(asdict(dd.config))})  # two keys would change places by chance


def check_complete(dd, path):
    """Raises ValueError for a system that lacks what it needs to draw and read."""
    names = PARTS | {"tokenizer": "tokenizer (--spiece)"}
    missing = [name for part, name in names.items() if getattr(dd, part) is None]
    if missing:
        raise ValueError(f"{path}: holds no {' and no '.join(missing)}")
