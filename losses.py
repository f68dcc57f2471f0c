"""What is learned: the two diffusions, their corruption and their losses. Equation numbers are the D-DiT paper's.

Images, continuous: x_t = (1-t) x + t noise, and the network learns the velocity noise - x (flow matching).
Text, discrete: every token is replaced by the mask token with probability 1 - alpha(t), and the network learns to
put it back (masked diffusion). Times run from 0 (clean) to 1 (nothing left) in both.

References:
  Li et al., Dual Diffusion (D-DiT), arXiv 2501.00289
  Sahoo et al., Masked Diffusion Language Models, arXiv 2406.07524: the weight of Eq. 7 and the SUBS parametrisation
  Esser et al., SD3, arXiv 2403.03206: logit-normal times
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F

EPS = 1e-3  # what alpha keeps at t = 1, and the smallest text time, where Eq. 7's weight 1/t is largest


def alpha(t):
    """The share of tokens still readable at time t, log-linear schedule."""
    return 1 - (1 - EPS) * t


def stratified_times(n, eps=EPS, generator=None):
    """(n,) times in [eps, 1], one in each of n equal strata, in random order: the same offset in every stratum
    (antithetic), so that a batch covers the whole range and the loss varies less."""
    u = torch.rand(1, generator=generator)
    t = (u + torch.randperm(n, generator=generator)) / n
    return eps + (1 - eps) * t


def mask_tokens(tokens, t, maskable, mask_id, generator=None):
    """Forward process of masked diffusion, Eq. 6: each maskable token turns into `mask_id` independently.

    tokens (B,L) long, t (B,), maskable (B,L) bool -> noisy (B,L), masked (B,L) bool: what was hidden."""
    masked = (torch.rand(tokens.shape, generator=generator) < 1 - alpha(t)[:, None]) & maskable  # Eq. 6
    return torch.where(masked, mask_id, tokens), masked


def flat_positions(mask):
    """(B,L) bool -> (N,) long: where it is true, counted row by row. The CPU makes them and a GPU indexes by them; from
    the mask itself a GPU would first have to count, while the program waits for the count."""
    return mask.flatten().nonzero()[:, 0]


def masked_diffusion_loss(logits, tokens, masked, t):
    """Eq. 7: cross-entropy at the masked positions, weighted by -alpha'(t) / (1 - alpha(t)), which is 1/t for the
    log-linear schedule, over batch x length.

    logits (B,L,V), or (N,V) at the N masked positions in row order; tokens (B,L); masked (B,L) bool, or (N,) from
    `flat_positions`; t (B,); all on one device -> scalar.
    The last of the V outputs is the mask token. SUBS: it has probability zero, and tokens that are not masked are
    carried over, so they cost nothing."""
    at = masked if masked.ndim == 1 else flat_positions(masked)
    logits = logits.flatten(0, 1)[at] if logits.ndim == 3 else logits
    nats = F.cross_entropy(logits[:, :-1].float(), tokens.flatten()[at], reduction="none")
    weight = 1 / t[at // tokens.shape[1]]
    return (weight * nats).sum() / tokens.numel()  # Eq. 7


def logit_normal_times(n, mean=0.0, std=1.0, generator=None):
    """(n,) image times in (0,1): the sigmoid of a normal, most of them in the middle, where the task is hardest."""
    return torch.sigmoid(mean + std * torch.randn(n, generator=generator))


def noise_latents(latents, noise, t):
    """Forward process of flow matching, Eq. 1 with alpha_t = 1-t and sigma_t = t: a straight line from image to noise.
    latents, noise (B,C,H,W), t (B,) -> (B,C,H,W)."""
    t = t[:, None, None, None]
    return (1 - t) * latents + t * noise  # Eq. 1


def flow_matching_loss(velocity, latents, noise):
    """Eq. 3: mean squared error against the line's direction, noise - latents; all (B,C,H,W). Every t weighs the same.
    (The authors' script weighs by t^2, the loss of a network that predicts the image; the paper does not.)"""
    return F.mse_loss(velocity.float(), noise - latents)  # Eq. 3


class Corruption(NamedTuple):
    """What is random about the two losses of a training step."""
    image_t: torch.Tensor  # (B,)
    noise: torch.Tensor    # (B,C,H,W)
    text_t: torch.Tensor   # (B,)
    noisy: torch.Tensor    # (B,L) tokens, some masked
    masked: torch.Tensor   # (B,L) bool, or the same as `flat_positions`


def joint_loss(ddit, t5, latents, captions, tokens, corruption, text_weight=0.2, image_weight=1.0, read=None):
    """Eq. 9, both losses in one forward pass -> total, image loss, text loss (scalars). With image_weight 0 (Table 10,
    understanding alone) the image half is not run, and its loss is 0.

    latents (B,C,H,W) clean; captions (B,L) what the image half reads; tokens (B,L) what the text half learns to
    write (captions again, or questions with answers); corruption: a Corruption; read (B,C,H,W): the latents that the
    text is about, where those are other images (stage 2hr). All on one device; nothing here waits for it.

    Eq. 8 has two halves, each with the other modality clean: the image half is (noisy latents, clean text, t), the text
    half (clean latents, masked text, 0). They have the same shapes, so they are stacked along the batch: T5 and the
    transformer run once."""
    image_t, noise, text_t, noisy, masked = corruption
    n = len(latents) if image_weight else 0  # rows of the image half
    read = latents if read is None else read
    masked = masked if masked.ndim == 1 else flat_positions(masked)
    stacked = torch.cat([noise_latents(latents, noise, image_t)[:n], read])
    times = torch.cat([image_t[:n], torch.zeros_like(text_t)])
    states = t5(torch.cat([captions[:n], noisy]))
    predict = masked + n * tokens.shape[1]  # in the stacked batch the text half comes after the image half
    velocity, logits = ddit(stacked, times, states, predict=predict, draw=n)
    # The sum of nothing is 0, and gives the image head a gradient, which the processes of a parallel run expect.
    image_loss = flow_matching_loss(velocity, latents, noise) if n else velocity.sum()  # Eq. 8, images
    text_loss = masked_diffusion_loss(logits, tokens, masked, text_t)                   # Eq. 8, text
    return image_weight * image_loss + text_weight * text_loss, image_loss, text_loss   # Eq. 9


def autoencoding_loss(vae, pixels, noise):
    """Stage 0: reconstruction + 3e-5 KL, per value. Pixels (B,3,H,W) far from their picture's mean colour count four
    times, or small objects on a plain ground are learned last. -> total, reconstruction, KL."""
    decoded, mean, logvar = vae(pixels, noise)
    stands_out = (pixels - pixels.mean((2, 3), keepdim=True)).abs().amax(1, keepdim=True) > 0.3
    reconstruction = ((1 + 3 * stands_out) * (decoded.float() - pixels).square()).mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).float().mean()
    return reconstruction + 3e-5 * kl, reconstruction, kl
