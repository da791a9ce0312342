"""The optimizer of a run's model, its learning rate schedule, and the moving average of its weights. (Seraena and the
PatchGAN have their own optimizers.)"""
import math

import torch


def make_optimizer(model, cfg, device):
    """AdamW over the parameters that require gradients, in the model's order. A group's `factor` multiplies
    `learning_rate`."""
    parts = [(model, 1.0)]
    if cfg.model == "taehv":
        parts = [(model.encoder[:-1], cfg.encoder_lr_factor),
                 (model.encoder[-1], cfg.encoder_lr_factor * cfg.latents_lr_factor), (model.decoder, 1.0)]
    groups = [dict(params=[p for p in part.parameters() if p.requires_grad], lr=cfg.lr * factor, factor=factor)
              for part, factor in parts]
    # eps: gradients of 1e-10 are rounding noise. PyTorch's 1e-8 turns them into steps: the weights of a run on one rank
    # and of the same run on two then differ by 3e-6.
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=(cfg.beta1, cfg.beta2),
                             weight_decay=cfg.weight_decay, eps=1e-7, fused=device.type in ("cuda", "cpu"))


def learning_rate(cfg, step, elapsed=0.0):
    """The learning rate of optimizer step `step`, counted from 0. elapsed: the part of max_minutes that has passed."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "cosine":
        done = min(1, max(elapsed, (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps)))
        return cfg.lr * (cfg.lr_final + (1 - cfg.lr_final) * 0.5 * (1 + math.cos(math.pi * done)))
    return cfg.lr * cfg.lr_decay ** ((step - cfg.warmup_steps) / 1000) if cfg.schedule == "exponential" else cfg.lr


@torch.no_grad()  # otherwise the average keeps a graph that grows with each step
def average_weights(average, model, decay):
    """Update the exponential moving average in place: decay * average + (1 - decay) * model. Parameters and buffers of
    floating point are averaged, so BatchNorm's statistics and codebooks too (in two short runs of vqvae2, this was
    0.3 dB better than averaged weights with the newest codebooks). Other buffers are copied."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    for mine, other in zip(average.buffers(), model.buffers()):
        if mine.is_floating_point():
            mine.lerp_(other, 1 - decay)
        else:
            mine.copy_(other)
