"""What is learned: two diffusions, one of images and one of text, and the loss that joins them.

Diffusion destroys data little by little and teaches a network to undo it; from pure noise the network then makes new
data. Time t runs from 0 (clean) to 1 (nothing left) for both.

- An image is a point in a continuous space, so it moves on a straight line to noise, x_t = (1-t) x + t noise, and the
  network learns the direction of that line (flow matching).
- A text is a row of tokens, and nothing lies between two tokens. So each token turns, at a random time, into one
  special token, the mask, and the network learns to put the tokens back (masked diffusion).

References: Li et al., Dual Diffusion (D-DiT), arXiv 2501.00289, whose equation numbers stand here
  Sahoo et al., Masked Diffusion Language Models, arXiv 2406.07524: Eq. 7 and the SUBS parametrisation
  Kingma et al., Variational Diffusion Models, arXiv 2107.00630: stratified times
  Esser et al., Scaling Rectified Flow Transformers (SD3), arXiv 2403.03206: logit-normal times
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F

# ---------------------------------------------------------------- text: masked diffusion

MIN_TIME = 1e-3  # the smallest time of a text in training; there the weight of the loss is largest


def alpha(t):
    """The schedule: the share of tokens still readable at time t (a tensor). All else follows from it: what is masked,
    the weight of the loss, and at which steps sampling reveals tokens. This one is the paper's, a straight line, which
    leaves a thousandth readable at t = 1."""
    return 1 - 0.999 * t


def reveal_rate(t):
    """The weight of Eq. 7, -alpha'(t) / (1 - alpha(t)): t (B,) -> (B,). For the straight line it is 1/t. It is the rate
    at which a masked token is revealed when time runs backwards: from t to t - dt the readable share grows by
    -alpha'(t) dt, all taken from the masked share 1 - alpha(t). Autograd finds the slope of any schedule."""
    with torch.enable_grad():
        t = t.detach().double().requires_grad_()
        readable = alpha(t)
        slope, = torch.autograd.grad(readable.sum(), t)
    return (-slope / (1 - readable.detach())).float()


def stratified_times(n, eps=MIN_TIME, generator=None):
    """(n,) times in [eps, 1] for the texts of a batch, in random order, one in each of n equal strata.
    Each alone is uniform, but a batch has early and late times in equal parts, so its loss varies less."""
    u = torch.rand(1, generator=generator)
    t = (u + torch.randperm(n, generator=generator)) / n
    return eps + (1 - eps) * t


def mask_tokens(tokens, t, maskable, mask_id, generator=None):
    """The forward process of text: each maskable token becomes the mask independently, with probability 1 - alpha(t).

    tokens (B,L) long, t (B,), maskable (B,L) bool -> noisy (B,L); masked (B,L) bool, which tokens are now the mask."""
    chance = torch.rand(tokens.shape, generator=generator)
    masked = (chance < 1 - alpha(t.double())[:, None]) & maskable  # Eq. 6
    return torch.where(masked, mask_id, tokens), masked


def masked_diffusion_loss(logits, tokens, masked, t):
    """Eq. 7: the cross-entropy of the masked tokens, weighted by `reveal_rate`, which for the straight line is 1/t.

    At time t only a share t of the tokens is masked and counted; dividing by t scales the sum up to the whole text.
    Averaged over t it is the cost of writing the text token by token in a random order: an upper bound on its negative
    log-likelihood, in nats.

    The sum is divided by batch · length: nats per token of the padded text. EOS padding costs like any token; the
    tokens of a question cost nothing.

    SUBS, two facts that the network need not learn: the mask token, the last of the V, is never right, so its logit is
    left out; and a token that is not masked is known, so it costs nothing.

    logits (B,L,V), or (N,V) at the N masked tokens; tokens (B,L); masked: an index of them; t (B,) -> scalar."""
    if logits.ndim == 3:
        logits = logits[masked]
    nats = F.cross_entropy(logits[:, :-1].float(), tokens[masked], reduction="none")
    weight = reveal_rate(t)[:, None].expand(tokens.shape)[masked]
    return (weight * nats).sum() / tokens.numel()  # Eq. 7


# ---------------------------------------------------------------- images: flow matching

def logit_normal_times(n, mean=0.0, std=1.0, generator=None):
    """(n,) image times in (0,1), the sigmoid of a normal; with mean 0 most lie in the middle. (Near t = 1 the mean of
    all images is a good answer; near t = 0 it is settled what the image shows.)"""
    return torch.sigmoid(mean + std * torch.randn(n, generator=generator))


def noise_latents(latents, noise, t):
    """The forward process of images: a straight line from the image to the noise; the paper's alpha_t and sigma_t are
    1-t and t. latents, noise (B,C,H,W), t (B,) -> (B,C,H,W)."""
    t = t[:, None, None, None]
    return (1 - t) * latents + t * noise  # Eq. 1


def flow_matching_loss(velocity, latents, noise, weight=1.0):
    """The mean squared error against the line's direction, noise - latents; all (B,C,H,W). An empty batch costs 0.
    weight: 1, or (B,1,1,1). (The authors' script has t^2. That makes it the error of the image, x_t - t · velocity.)"""
    error = velocity.float() - (noise - latents)
    return (weight * error.square()).sum() / max(1, error.numel())  # Eq. 3


class ImageHalf(NamedTuple):
    """For the image loss: images, to be drawn from their captions."""
    latents: torch.Tensor   # (B,C,H,W) clean; `joint_loss` adds the noise
    captions: torch.Tensor  # (B,L) tokens, clean
    noise: torch.Tensor     # (B,C,H,W)
    t: torch.Tensor         # (B,)


class TextHalf(NamedTuple):
    """For the text loss: texts, to be read from their images."""
    latents: torch.Tensor   # (B,C,H,W) clean
    tokens: torch.Tensor    # (B,L) clean
    noisy: torch.Tensor     # (B,L) the same, some of them masked
    masked: tuple           # which: rows (N,), columns (N,)
    t: torch.Tensor         # (B,) sets how many are masked, and their weight; the network gets 0


def joint_loss(ddit, t5, images, texts, text_weight=0.2, image_weight=1.0):
    """An ImageHalf and a TextHalf -> total, image loss, text loss (scalars).

    Eq. 8 has two losses, each with the other modality clean: the image half is (noisy latents, clean text, t), the text
    half (clean latents, masked text, 0). They have the same shapes, so they are stacked along the batch, and T5 and the
    transformer run once:

        rows 0 .. n-1     noisy latents    caption        t      -> velocity, image loss
        rows n .. n+m-1   clean latents    masked text    0      -> logits at the masked tokens, text loss
    """
    n = len(images.captions)
    latents = torch.cat([noise_latents(images.latents, images.noise, images.t), texts.latents])
    times = torch.cat([images.t, torch.zeros_like(texts.t)])
    states = t5(torch.cat([images.captions, texts.noisy]))
    rows, columns = texts.masked
    predict = n + rows, columns  # in the stack, the texts stand n rows further down
    velocity, logits = ddit(latents, times, states, predict=predict, image_rows=n)
    image_loss = flow_matching_loss(velocity, images.latents, images.noise)              # Eq. 8, images
    text_loss = masked_diffusion_loss(logits, texts.tokens, texts.masked, texts.t)       # Eq. 8, text
    return image_weight * image_loss + text_weight * text_loss, image_loss, text_loss    # Eq. 9


# ------------------------------------------------- the chapter ends here; what follows makes it practical


def autoencoding_loss(vae, pixels, noise):
    """Stage 0: reconstruction + 3e-5 KL, per value -> total, reconstruction, KL. Pixels (B,3,H,W) far from their
    image's mean colour count four times, or small objects on a plain ground are learned last."""
    decoded, mean, logvar = vae(pixels, noise)
    stands_out = (pixels - pixels.mean((2, 3), keepdim=True)).abs().amax(1, keepdim=True) > 0.3
    reconstruction = ((1 + 3 * stands_out) * (decoded.float() - pixels).square()).mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).float().mean()
    return reconstruction + 3e-5 * kl, reconstruction, kl
