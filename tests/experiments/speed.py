"""Where the time of an update goes: milliseconds, share of arithmetic, and a profile.

    python tests/experiments/speed.py                               the default denoiser
    python tests/experiments/speed.py --size B --batch-size 8       the paper's size, random weights
    python tests/experiments/speed.py --size XL --batch-size 256 --device cuda --compile --peak 989

FLOPs are those of matrix products, counted by PyTorch: both views, forward and backward. --peak:
what the hardware promises, in TFLOP/s; the default is measured here, with a large matrix product.
"""
import pathlib
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import sphere_latent as sl  # noqa: E402


def seconds(function, count=10):
    """Mean time of a call of a function that returns a tensor."""
    function().sum().item()                                  # waits for a GPU
    began = time.time()
    for _ in range(count):
        result = function()
    result.sum().item()
    return (time.time() - began) / count


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(sl.MODEL_SIZES), default="tiny")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--peak", type=float)
    given = parser.parse_args()
    device = sl.find_device(given.device)
    config = sl.Config(model_size=given.size, batch_size=given.batch_size)
    shape = (16, 64) if given.size == "tiny" else (256, 768)
    denoiser = sl.denoiser_for(config, shape, 1000).to(device)
    network = torch.compile(denoiser) if given.compile else denoiser
    optimizer = torch.optim.AdamW(denoiser.parameters(), fused=True)
    z = torch.randn(given.batch_size, *shape, device=device)
    labels = torch.randint(1000, (given.batch_size,), device=device)

    def losses(x, *rest):
        return sl.sphere_losses(network, sl.spherify, sl.spherify(x), x, *rest, config)

    def step():
        return sl.update(denoiser, losses, optimizer, z, labels, config, 0)["gradient_norm"]

    a = torch.randn(2048, 2048, device=device)

    def product():
        with sl.autocast(device):
            return a @ a

    with FlopCounterMode(display=False) as counter:
        step()
    took = seconds(step)
    rate = counter.get_total_flops() / took / 1e12
    peak = given.peak or 2 * 2048 ** 3 / seconds(product) / 1e12
    print(f"SiT-{given.size}, batch {given.batch_size}, {device}: {1000 * took:.0f} ms an update, "
          f"{given.batch_size / took:.1f} images/s, {rate:.3f} TFLOP/s, "
          f"{100 * rate / peak:.0f}% of {peak:.3f}")
    with torch.profiler.profile() as profile:
        step()
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=14))


if __name__ == "__main__":
    main()
