"""What is learned: two diffusions, one of images and one of text, and the loss that joins them.

Diffusion destroys data little by little and teaches a network to undo it; from pure noise the network then makes new
data. Time t runs from 0 (clean) to 1 (nothing left) for both.

- An image is a point in a continuous space, so it moves on a straight line to noise, x_t = (1-t) x + t noise, and the
  network learns the direction of that line (flow matching).
- A text is a row of tokens, and nothing lies between two tokens. So each token turns, at a random time, into one
  special token, the mask, and the network learns to put the tokens back (masked diffusion).

Equation numbers are the D-DiT paper's.
References:
  Li et al., Dual Diffusion (D-DiT), arXiv 2501.00289
  Sahoo et al., Masked Diffusion Language Models, arXiv 2406.07524: Eq. 7 and the SUBS parametrisation
  Kingma et al., Variational Diffusion Models, arXiv 2107.00630: antithetic times
  Esser et al., Scaling Rectified Flow Transformers (SD3), arXiv 2403.03206: logit-normal times
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F

# ---------------------------------------------------------------- text: masked diffusion

MIN_TIME = 1e-3  # the smallest time of a text in training; there the weight of the loss is largest


def alpha(t):
    """The schedule: the share of tokens still readable at time t (a tensor). All else follows from it: what is masked,
    the weight of the loss, and at which steps sampling reveals tokens. This one is the paper's, a straight line; a
    thousandth stays readable at t = 1. (Papers with alpha = exp(-sigma) call it log-linear; the thousandth keeps sigma
    finite.)"""
    return 1 - 0.999 * t


def reveal_rate(t):
    """The weight of Eq. 7, -alpha'(t) / (1 - alpha(t)): t (B,) -> (B,).

    Run time backwards, from t to t - dt. The share of readable tokens grows by -alpha'(t) dt, all taken from the
    masked share 1 - alpha(t). So this is the rate at which a masked token is revealed. For the straight line it
    is 0.999 / (0.999 t) = 1/t. Autograd finds the slope of any schedule; in float64, as 1 - alpha can be small."""
    with torch.enable_grad():
        t = t.detach().double().requires_grad_()
        readable = alpha(t)
        slope, = torch.autograd.grad(readable.sum(), t)
    return (-slope / (1 - readable.detach())).float()


def stratified_times(n, eps=MIN_TIME, generator=None):
    """(n,) times in [eps, 1] for the texts of a batch, in random order. One lies in each of n equal strata, all with
    the same random offset (variational diffusion models call that antithetic). Each time alone is uniform, but a batch
    has early and late times in equal parts, so its loss varies less."""
    u = torch.rand(1, generator=generator)
    t = (u + torch.randperm(n, generator=generator)) / n
    return eps + (1 - eps) * t


def mask_tokens(tokens, t, maskable, mask_id, chance):
    """The forward process of text: each maskable token becomes the mask independently, with probability 1 - alpha(t).

    tokens (B,L) long, t (B,), maskable (B,L) bool, chance (B,L) uniform random numbers -> noisy (B,L); masked (B,L)
    bool, which tokens are now the mask."""
    masked = (chance < 1 - alpha(t.double())[:, None]) & maskable  # Eq. 6
    return torch.where(masked, mask_id, tokens), masked


def masked_diffusion_loss(logits, tokens, masked, t):
    """Eq. 7: the cross-entropy of the masked tokens, each weighted by the rate at which it is revealed at that time.

    Run time backwards, and the text is written. In a short time dt a masked token is revealed with probability rate·dt,
    and to reveal it costs its cross-entropy, in nats. So the expected cost is rate · cross-entropy · dt. Its integral
    over t is the cost of the whole text, averaged over orders of its tokens: an upper bound on its negative log-
    likelihood. What is masked depends on alpha alone, and the network does not see t. As time runs back alpha grows by
    d(alpha) = -alpha'(t) dt, so rate · dt = d(alpha) / (1 - alpha). So the cost is the integral of cross-entropy(alpha)
    / (1 - alpha) over alpha. The schedule only decides how often training shows few masks or many.

    The sum is divided by batch · length, so the loss is in nats per token of the padded text, and every row counts
    alike. Length includes the question, which is never masked and costs nothing, and the EOS padding, which is masked
    and costs like any token. (To divide by a row's masked tokens, about t · length, would weight by 1/t twice.)

    SUBS, two facts that the network need not learn: the mask token is never right, so its logit, the last of the V, is
    left out; and a token that is not masked is known, so it costs nothing.

    logits (N,V) at the N masked tokens; tokens (B,L); masked: where, an index of them; t (B,) -> scalar."""
    nats = F.cross_entropy(logits[:, :-1].float(), tokens[masked], reduction="none")
    weight = reveal_rate(t)[:, None].expand(tokens.shape)[masked]
    return (weight * nats).sum() / tokens.numel()  # Eq. 7


# ---------------------------------------------------------------- images: flow matching


def logit_normal_times(n, mean=0.0, std=1.0, generator=None):
    """(n,) image times in (0,1), the sigmoid of a normal: most in the middle (the tiny recipe draws later ones)."""
    return torch.sigmoid(mean + std * torch.randn(n, generator=generator))


def noise_latents(latents, noise, t):
    """The forward process of images: a straight line from the image to the noise; the paper's alpha_t and sigma_t are
    1-t and t. latents, noise (B,C,H,W), t (B,) -> (B,C,H,W)."""
    t = t[:, None, None, None]
    return (1 - t) * latents + t * noise  # Eq. 1


def flow_matching_loss(velocity, latents, noise):
    """The mean squared error against the line's direction, noise - latents; all (B,C,H,W). An empty batch costs 0.
    (The authors' script weights by t^2, as if comparing the predicted image, x_t - t velocity.)"""
    error = velocity.float() - (noise - latents)
    return error.square().sum() / max(1, error.numel())  # Eq. 3


class ImageHalf(NamedTuple):
    """For the image loss: images, to be drawn from their captions."""
    latents: torch.Tensor   # (B,C,H,W) clean
    captions: torch.Tensor  # (B,L) tokens, clean
    noise: torch.Tensor     # (B,C,H,W)
    t: torch.Tensor         # (B,)


class TextHalf(NamedTuple):
    """For the text loss: texts, to be written from their images."""
    latents: torch.Tensor   # (B,C,H,W) clean
    tokens: torch.Tensor    # (B,L) clean
    noisy: torch.Tensor     # (B,L) the same, some of them masked
    masked: tuple           # where: rows (N,), columns (N,)
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
