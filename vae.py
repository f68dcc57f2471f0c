"""Seeing images: the autoencoder of Stable Diffusion 3, which turns pixels into latents and back.

An image of 8h x 8w pixels becomes a grid of h x w latents with 16 channels; the transformer works on those. The
encoder answers with a Gaussian (mean and log-variance), so that training can sample the posterior.
References: Esser et al., Scaling Rectified Flow Transformers (SD3), arXiv 2403.03206, section 5.2.1
  Rombach et al., Latent Diffusion, arXiv 2112.10752, whose module names SD3's single file still carries
"""
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


@dataclass
class VAEConfig:
    """The defaults are SD3's. `shift` and `scale` bring raw latents to mean 0 and deviation 1."""
    channels: int = 128     # of the first level inside the networks; the latents have latent_channels
    multipliers: tuple = (1, 2, 4, 4)  # channels at each level; between two levels the side halves
    latent_channels: int = 16
    groups: int = 32
    shift: float = 0.0609
    scale: float = 1.5305

    @property
    def factor(self) -> int:
        return 2 ** (len(self.multipliers) - 1)


class ResnetBlock(nn.Module):
    def __init__(self, cin, cout, groups):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, cin, 1e-6), nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, cout, 1e-6), nn.Conv2d(cout, cout, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class AttnBlock(nn.Module):
    """One head over all positions; the projections are 1x1 convolutions because SD3's file stores them so."""
    def __init__(self, channels, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, 1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (rearrange(f(h), "b c h w -> b 1 (h w) c") for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # pad only below and on the right, as in training


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, then `resample` (named downsample or upsample, as in the file)."""
    def __init__(self, cin, cout, blocks, groups, **resample):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(cin if i == 0 else cout, cout, groups) for i in range(blocks))
        for name, module in resample.items():
            self.add_module(name, module)

    def forward(self, x):
        for module in (*self.block, *(m for n, m in self.named_children() if n != "block")):
            x = module(x)
        return x


def middle(c, groups):
    return nn.Sequential(OrderedDict(
        block_1=ResnetBlock(c, c, groups), attn_1=AttnBlock(c, groups), block_2=ResnetBlock(c, c, groups)))


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths, last = [config.channels * m for m in config.multipliers], len(config.multipliers) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            Level(widths[max(i - 1, 0)], w, 2, config.groups, **({"downsample": Downsample(w)} if i < last else {}))
            for i, w in enumerate(widths))
        self.mid = middle(widths[-1], config.groups)
        self.norm_out = nn.GroupNorm(config.groups, widths[-1], 1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths, last = [config.channels * m for m in config.multipliers], len(config.multipliers) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1], config.groups)
        self.up = nn.ModuleList(  # numbered by resolution as `down` is, so it is run from the last to the first
            Level(widths[min(i + 1, last)], w, 3, config.groups, **({"upsample": Upsample(w)} if i > 0 else {}))
            for i, w in enumerate(widths))
        self.norm_out = nn.GroupNorm(config.groups, widths[0], 1e-6)
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
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def encode(self, pixels):
        """Pixels (B,3,H,W) in [-1,1], H and W multiples of 8 -> mean and log-variance, each (B,16,H/8,W/8), raw."""
        mean, logvar = self.encoder(pixels.to(self.encoder.conv_in.weight.dtype)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        """Raw latents (B,16,h,w) -> pixels (B,3,8h,8w), around [-1,1] but not clamped."""
        return self.decoder(z.to(self.decoder.conv_in.weight.dtype))

    def forward(self, pixels, noise):
        """Training's round trip through a sample of the posterior -> reconstruction, mean, log-variance."""
        mean, logvar = self.encode(pixels)
        return self.decode(self.sample(mean, logvar, noise)), mean, logvar

    @staticmethod
    def sample(mean, logvar, noise):
        """A draw from the Gaussian; noise: standard normal, of its shape."""
        return mean + torch.exp(0.5 * logvar) * noise

    def normalize(self, z):
        """Raw latents -> what the transformer sees."""
        return (z - self.config.shift) * self.config.scale

    def denormalize(self, z):
        return z / self.config.scale + self.config.shift
