"""Where the time of a training step goes: images per second of the denoiser, one change at a time, and a profile.

    python tests/speed.py
"""
import contextlib
import pathlib
import sys
import time

import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import sphere_latent as sl  # noqa: E402


def fused_attention(block, x):
    q, k, v = (sl.rearrange(project(x), "b n (h k) -> b h n k", h=block.heads) for project in (block.q, block.k, block.v))
    y = F.scaled_dot_product_attention(block.q_norm(q), block.k_norm(k), v)
    return block.out(sl.rearrange(y, "b h n k -> b n (h k)"))


def make_step(config, tokens=16):
    torch.manual_seed(0)
    denoiser = sl.denoiser_for(config, (tokens, config.latent_channels), 12)
    optimiser = torch.optim.AdamW(denoiser.parameters(), 1e-4, fused=True)
    z, e = torch.randn(2, config.batch_size, tokens, config.latent_channels)
    labels = torch.randint(12, (config.batch_size,))

    def decode(v, y):
        with sl.autocast(torch.device("cpu")):
            return denoiser(v, y).float()

    def step():
        losses = sl.sphere_losses(decode, sl.spherify, sl.spherify(z), z, labels, e,
                                  *sl.sample_angles(config.batch_size, config), config)
        optimiser.zero_grad()
        losses["total"].backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimiser.step()
    return step


def milliseconds(step, count=40):
    for _ in range(5):
        step()
    began = time.time()
    for _ in range(count):
        step()
    return (time.time() - began) / count * 1e3


def main():
    config, bf16, plain = sl.Config(), sl.autocast, sl.Block.attention
    step = make_step(config)
    for round in range(2):                                           # in turns: the machine drifts
        for name, cast, attention in (("fp32, fused attention", None, fused_attention), ("fp32, plain attention", None, plain),
                                      ("bf16, fused attention", bf16, fused_attention), ("bf16, plain attention", bf16, plain)):
            sl.autocast, sl.Block.attention = cast or (lambda device: contextlib.nullcontext()), attention
            took = milliseconds(step)
            print(f"{name}: {took:.0f} ms a step, {config.batch_size / took * 1e3:.0f} images/s")
    with torch.profiler.profile() as profile:
        for _ in range(10):
            step()
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=30))


if __name__ == "__main__":
    main()
