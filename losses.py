"""What is learned: two diffusions, one of images and one of text, and the loss that joins them.

Diffusion destroys data little by little and teaches a network to undo it; from pure noise the
network then makes new data. Time t runs from 0 (clean) to 1 (pure noise, or nothing but masks).

- An image is a point in a continuous space, so it moves on a straight line to noise,
  x_t = (1-t) x + t noise, and the network learns the direction of that line (flow matching).
- A text is a row of tokens, and nothing lies between two tokens. So each token turns, at a random
  time, into one special token, the mask, and the network learns to put the tokens back (masked
  diffusion).
References: Li et al., Dual Diffusion (D-DiT), arXiv 2501.00289, whose equation numbers stand here
  Sahoo et al., Masked Diffusion Language Models, arXiv 2406.07524: Eq. 7 and SUBS
  Kingma et al., Variational Diffusion Models, arXiv 2107.00630: stratified times
  Esser et al., Scaling Rectified Flow Transformers (SD3), arXiv 2403.03206: logit-normal times
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_TIME = 1e-3  # the smallest time of a text in training, where the weight 1/t is largest


def alpha(t):
    """Returns the share of tokens that are still readable at time t. Both the masking in training and
    the steps of sampling follow from this schedule. The paper's is a straight line from 1 to 0.001."""
    return 1 - 0.999 * t


def reveal_rate(t):
    """Returns the weight of the text loss (Eq. 7), -alpha'(t) / (1 - alpha(t)); for the straight line, 1/t.
    When time runs backwards, masked tokens are revealed at this rate."""
    return 1 / t


def stratified_times(n, eps=MIN_TIME, generator=None):
    """Returns (n,) times in [eps, 1] for the texts of a batch, in random order. The interval is cut into
    n equal parts, and each gives one time; all have the same random offset. So every time alone is
    uniform, but each batch has as many early times as late ones, and its loss varies less."""
    offset = torch.rand(1, generator=generator)
    t = (offset + torch.randperm(n, generator=generator)) / n
    return eps + (1 - eps) * t


def mask_tokens(tokens, t, maskable, mask_id, generator=None, u=None):
    """The forward process of text: each maskable token becomes the mask with probability 1 - alpha(t).
    tokens (B,L) long, t (B,), maskable (B,L) bool; u (B,L), uniform in [0,1), is drawn if not given
    -> noisy tokens (B,L); masked (B,L) bool, which of them are now the mask."""
    if u is None:
        u = torch.rand(tokens.shape, generator=generator)
    share = 1 - alpha(t.double())  # in float64: for small t the difference would lose digits
    masked = (u < share[:, None]) & maskable  # Eq. 6
    return torch.where(masked, mask_id, tokens), masked


def masked_diffusion_loss(logits, tokens, masked, t):
    """Eq. 7: the cross-entropy of the masked tokens, weighted by `reveal_rate`, which is 1/t.

    At time t about a share t of the tokens is masked and counted, so dividing by t scales the sum up to
    the whole text. Averaged over t, this is an upper bound on the text's negative log-likelihood, in
    nats (Sahoo et al.). Here it is divided by the number of tokens, all B * L of them.

    The mask token, the last of the V, is never the right answer, so its logit is left out. Tokens that
    are not masked are known, so they cost nothing. (The field calls these two rules SUBS.)
    logits (B,L,V), or (N,V) at the N masked tokens; tokens (B,L); masked (B,L) bool; t (B,)
    -> scalar. tokens, masked and t may be on the CPU while logits are on a GPU."""
    if logits.ndim == 3:
        logits = logits[masked]
    logits = logits[:, :-1].float()  # all but the mask token's
    weight = reveal_rate(t)[:, None].expand(tokens.shape)                 # (B,L)
    weight = weight[masked].to(logits.device, non_blocking=True)          # (N,)
    truth = tokens[masked].to(logits.device, non_blocking=True)           # (N,)
    nats = F.cross_entropy(logits, truth, reduction="none")
    return (weight * nats).sum() / tokens.numel()  # Eq. 7


def logit_normal_times(n, mean=0.0, std=1.0, generator=None):
    """Returns (n,) image times in (0,1), the sigmoid of a normal variable. With mean 0 most lie in the
    middle, where the network has most to learn."""
    return torch.sigmoid(mean + std * torch.randn(n, generator=generator))


def noise_latents(latents, noise, t):
    """The forward process of images: a straight line from the image to the noise. The paper's
    alpha_t and sigma_t are 1-t and t. latents, noise (B,C,H,W), t (B,) -> (B,C,H,W)."""
    t = t[:, None, None, None]
    return (1 - t) * latents + t * noise  # Eq. 1


def flow_matching_loss(velocity, latents, noise, weight=1.0):
    """The mean squared error against the direction of the line, noise - latents.
    velocity, latents, noise (B,C,H,W); weight: 1, or one per image, (B,1,1,1) -> scalar."""
    if len(latents) == 0:
        return velocity.float().sum()  # no image: 0, and gradients of 0
    error = velocity.float() - (noise - latents)
    return (weight * error.square()).mean()  # Eq. 3


class ImageHalf(NamedTuple):
    """What the image loss learns from: images to be drawn from their captions."""
    latents: Tensor   # (B,C,H,W) clean
    noise: Tensor     # (B,C,H,W)
    noisy: Tensor     # (B,C,H,W) latents and noise, mixed by `noise_latents`
    t: Tensor         # (B,)
    captions: Tensor  # (B,L) tokens, clean


class TextHalf(NamedTuple):
    """What the text loss learns from: texts to be read from their images."""
    latents: Tensor   # (B,C,H,W) clean
    tokens: Tensor    # (B,L) clean; on the CPU, and so are masked and t
    noisy: Tensor     # (B,L) the same tokens, some of them masked by `mask_tokens`
    masked: Tensor    # (B,L) bool, which of them are masked
    t: Tensor         # (B,) at which they were masked; the network is given time 0


def joint_loss(ddit, t5, images, texts, text_weight=0.2, image_weight=1.0):
    """An ImageHalf and a TextHalf -> total, image loss, text loss (scalars).

    Eq. 8 has two losses, each with the other modality clean. Rows of both halves have the same shapes.
    So they are stacked into one batch, and T5 and the transformer run once:

        rows 0 .. n-1     noisy latents    caption        t    -> velocity, image loss
        rows n .. n+m-1   clean latents    masked text    0    -> logits at the masks, text loss
    """
    n = len(images.t)
    latents = torch.cat([images.noisy, texts.latents])
    tokens = torch.cat([images.captions, texts.noisy])
    times = torch.cat([images.t, images.t.new_zeros(len(texts.t))])
    velocity, logits = ddit(latents, times, t5(tokens), predict=texts.masked, image_rows=n)
    image_loss = flow_matching_loss(velocity, images.latents, images.noise)         # Eq. 8, images
    text_loss = masked_diffusion_loss(logits, texts.tokens, texts.masked, texts.t)  # Eq. 8, text
    total = image_weight * image_loss + text_weight * text_loss                     # Eq. 9
    return total, image_loss, text_loss


# ------------------------------------------------- the chapter ends here; what follows makes it practical

def autoencoding_loss(vae, pixels, noise):
    """The loss of stage 0: reconstruction + 3e-5 KL, per value -> total, reconstruction, KL. The arguments
    are those of `VAE.forward`. Pixels far from the mean colour of their image count four times:
    otherwise small objects on a plain ground are learned last."""
    decoded, mean, logvar = vae(pixels, noise)
    ground = pixels.mean((2, 3), keepdim=True)
    stands_out = (pixels - ground).abs().amax(1, keepdim=True) > 0.3
    weight = 1 + 3 * stands_out
    error = decoded.float() - pixels
    reconstruction = (weight * error.square()).mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).float().mean()
    return reconstruction + 3e-5 * kl, reconstruction, kl
