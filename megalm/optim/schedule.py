"""The learning rate as a pure function of the step."""

import math

from megalm.optim.config import ScheduleConfig


def learning_rate(step: int, config: ScheduleConfig, peak: float, steps: int) -> float:
    """Rate of optimizer step `step`, counted from 0, of a run of `steps` steps.

    The n-th step (n = step + 1) of a warm-up of w steps takes n / w of the peak: the first one trains, the w-th is at
    the peak. Without warm-up the first step is at the peak. The lowest rate is that of the total_steps-th step and
    of every later one. Sources: cosine, Loshchilov and Hutter 2017 (SGDR, equation 5); wsd, Hu et al. 2024 (MiniCPM,
    section 4); inverse_sqrt, Vaswani et al. 2017 (section 5.3), never below min_ratio.
    """
    total = config.total_steps or steps
    warmup = max(config.warmup_steps, 1)
    n = min(step + 1, max(total, warmup))
    if n <= warmup:
        return peak * (n / warmup)
    if config.kind == "constant":
        return peak
    if config.kind == "inverse_sqrt":
        return peak * max(math.sqrt(warmup / n), config.min_ratio)
    start = warmup
    if config.kind == "wsd":
        decay = max(1, total // 10) if config.decay_steps is None else config.decay_steps
        start = max(warmup, total - decay)
        if n <= start:
            return peak
    progress = (n - start) / (total - start)
    left = (1 + math.cos(math.pi * progress)) / 2 if config.kind == "cosine" else 1 - progress
    return peak * (config.min_ratio + (1 - config.min_ratio) * left)
