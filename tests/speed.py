"""Where the time of a training step goes: images per second of the denoiser, one change at a time, and a profile.

    python tests/speed.py
    python tests/speed.py --paper B --batch-size 8                       the paper's sizes, random weights
    python tests/speed.py --paper XL --batch-size 256 --device cuda --compile
"""
import argparse
import contextlib
import copy
import dataclasses
import pathlib
import resource
import sys
import time

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

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


def seconds(step, device, count):
    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()
    step()
    wait()
    began = time.time()
    for _ in range(count):
        step()
    wait()
    return (time.time() - began) / count


def cost(config, shape=(256, 768), classes=1000):
    """-> parameters; FLOPs of both views of an image, forward and backward (a block that is computed twice counts once)."""
    with torch.device("meta"):
        denoiser = sl.denoiser_for(config, shape, classes)
        views, labels = torch.empty(2, *shape), torch.zeros(2, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        denoiser(views, labels).sum().backward()
    return sum(p.numel() for p in denoiser.parameters()), counter.get_total_flops()


def paper(size, batch, name, compile, count, peak):
    """A training step and 4-step samples at the paper's sizes: 256 tokens of 768 channels, 1,000 classes, and RAE's decoder."""
    config, device = dataclasses.replace(sl.Config(), model_size=size, batch_size=batch), sl.resolve_device(name)
    torch.manual_seed(0)
    denoiser = sl.denoiser_for(config, (256, 768), 1000).to(device)
    optimiser = torch.optim.Adam(denoiser.parameters(), 1e-4, fused=True)
    average = copy.deepcopy(denoiser).requires_grad_(False)
    network = torch.compile(denoiser) if compile else denoiser
    z, e = torch.randn(2, batch, 256, 768, device=device)
    labels = torch.randint(1000, (batch,), device=device)

    def loss():
        angles = (alpha.to(device) for alpha in sl.sample_angles(batch, config))
        with sl.autocast(device):
            return sl.sphere_losses(network, sl.spherify, sl.spherify(z), z, labels, e, *angles, config)["total"]

    def step():
        optimiser.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimiser.step()
        torch._foreach_lerp_([*average.parameters()], [weight.detach() for weight in denoiser.parameters()], 0.0005)
    took = seconds(step, device, count)
    rate = batch * cost(config)[1] / took / 1e12
    share = f", {100 * rate / peak:.0f}% of {peak:g}" if peak else ""
    print(f"SiT-{size}/1, training, batch {batch}: {took:.3f} s an update, {batch / took:.1f} images/s, {rate:.2f} TFLOP/s{share}")
    if device.type == "cuda":
        print(f"memory: {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB")
    else:
        print(f"memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20:.1f} GiB")
    denoiser.zero_grad()
    rae = sl.RAE(pretrained=False).to(device)

    def draw(n):
        with sl.autocast(device), torch.no_grad():
            rae.decode(sl.sample(denoiser.eval(), labels.repeat(n)[:n], 4, 1.5))
    for n in (1, 64, 256) if device.type == "cuda" else (1, batch):
        took = seconds(lambda: draw(n), device, count)
        print(f"4 steps, guidance, RAE's decoder, {n} at a time: {took:.3f} s, {n / took:.2f} images/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", choices=[*sl.MODEL_SIZES], help="measure the paper's sizes, not the default's")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument("--peak", type=float, help="bf16 TFLOP/s the card promises")
    given = parser.parse_args()
    if given.paper:
        return paper(given.paper, given.batch_size, given.device, given.compile, given.count, given.peak)
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
