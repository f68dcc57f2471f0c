"""Seeing images: the autoencoder of Stable Diffusion 3, which turns pixels into latents and back.

An image of 8h x 8w pixels becomes a grid of h x w latents with 16 channels; the transformer works
on these. For each latent the encoder gives a Gaussian, by its mean and log-variance. In training the
decoder gets a latent drawn from it (this "samples the posterior"), so it learns to decode close
latents to similar images.
References: Esser et al., Scaling Rectified Flow Transformers (SD3), arXiv 2403.03206, section 5.2.1
  Rombach et al., Latent Diffusion, arXiv 2112.10752, whose module names SD3's file still carries
"""
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


@dataclass
class VAEConfig:
    """The defaults are SD3's. The two factors bring raw latents to mean 0 and standard deviation 1."""
    channels: int = 128     # of the finest level inside the networks
    multipliers: tuple = (1, 2, 4, 4)  # of the channels at each level; each next level halves the side
    latent_channels: int = 16
    groups: int = 32
    shift_factor: float = 0.0609
    scaling_factor: float = 1.5305

    @property
    def factor(self):
        return 2 ** (len(self.multipliers) - 1)  # pixels per latent, along a side

    @property
    def widths(self):
        return [self.channels * multiplier for multiplier in self.multipliers]


class ResnetBlock(nn.Module):
    def __init__(self, cin, cout, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, cin, eps=1e-6)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, cout, eps=1e-6)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Attention with one head over all positions. Its projections are 1x1 convolutions in SD3's file."""
    def __init__(self, channels, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        h = self.norm(x)
        q = rearrange(self.q(h), "b c h w -> b 1 (h w) c")
        k = rearrange(self.k(h), "b c h w -> b 1 (h w) c")
        v = rearrange(self.v(h), "b c h w -> b 1 (h w) c")
        h = F.scaled_dot_product_attention(q, k, v)
        h = rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(h)


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # SD3's pads only on the right and below


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, then a change of resolution, if there is one."""
    def __init__(self, cin, cout, blocks, groups, downsample=None, upsample=None):
        super().__init__()
        self.block = nn.ModuleList()
        for _ in range(blocks):
            self.block.append(ResnetBlock(cin, cout, groups))
            cin = cout
        self.downsample = downsample or nn.Identity()
        self.upsample = upsample or nn.Identity()

    def forward(self, x):
        for block in self.block:
            x = block(x)
        return self.upsample(self.downsample(x))


def middle(channels, groups):
    block_1 = ResnetBlock(channels, channels, groups)
    attn_1 = AttnBlock(channels, groups)
    block_2 = ResnetBlock(channels, channels, groups)
    return nn.Sequential(OrderedDict(block_1=block_1, attn_1=attn_1, block_2=block_2))


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        cin = widths[0]
        for k, width in enumerate(widths):
            downsample = Downsample(width) if k < len(widths) - 1 else None
            self.down.append(Level(cin, width, 2, config.groups, downsample=downsample))
            cin = width
        self.mid = middle(widths[-1], config.groups)
        self.norm_out = nn.GroupNorm(config.groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        x = self.mid(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """`up` is numbered from the finest level, as `down` is, so it runs from its last to its first."""
    def __init__(self, config):
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1], config.groups)
        self.up = nn.ModuleList()
        coarser = widths[1:] + widths[-1:]  # the decoder comes to each level from the next coarser one
        for k, width in enumerate(widths):
            upsample = Upsample(width) if k > 0 else None
            self.up.append(Level(coarser[k], width, 3, config.groups, upsample=upsample))
        self.norm_out = nn.GroupNorm(config.groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z):
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VAE(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, pixels):
        """Pixels (B,3,H,W) in [-1,1], H and W multiples of 8 -> mean and log-variance (B,16,H/8,W/8)."""
        pixels = pixels.to(self.encoder.conv_in.weight.dtype)
        mean, logvar = self.encoder(pixels).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        """Raw latents (B,16,h,w) -> pixels (B,3,8h,8w), around [-1,1] but not clamped."""
        return self.decoder(z.to(self.decoder.conv_in.weight.dtype))

    def forward(self, pixels, noise):
        """What stage 0 trains: encode, sample the posterior, decode -> reconstruction, mean, log-variance."""
        mean, logvar = self.encode(pixels)
        return self.decode(self.sample(mean, logvar, noise)), mean, logvar

    @staticmethod
    def sample(mean, logvar, noise):
        """Draws raw latents from the Gaussian; noise: standard normal, of the same shape."""
        return mean + torch.exp(0.5 * logvar) * noise

    def normalize(self, z):
        """Raw latents -> latents as the transformer sees them."""
        return (z - self.config.shift_factor) * self.config.scaling_factor

    def denormalize(self, z):
        return z / self.config.scaling_factor + self.config.shift_factor
