"""Where the time of an update goes: milliseconds, share of arithmetic, and a profile.

    python tests/experiments/speed.py                               the default denoiser
    python tests/experiments/speed.py --size B --batch-size 8       the paper's sizes, random weights
    python tests/experiments/speed.py --size XL --batch-size 256 --device cuda --compile --peak 989

FLOPs are those of matrix products, counted by PyTorch: both views, forward and backward. --peak: what
the hardware promises, in TFLOP/s; the default is measured here, with one large matrix product.
"""
import argparse
import pathlib
import resource
import sys
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import sphere_latent as sl  # noqa: E402


def seconds(function, count, device):
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.time()
    for _ in range(count):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.time() - began) / count


def measured_peak(device):
    a = torch.randn(2048, 2048, device=device)
    with sl.autocast(device):
        return 2 * 2048 ** 3 / seconds(lambda: a @ a, 10, device) / 1e12


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(sl.MODEL_SIZES), default="tiny")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--peak", type=float)
    given = parser.parse_args()
    device = sl.find_device(given.device)
    config = sl.Config(model_size=given.size, batch_size=given.batch_size)
    shape = (16, 64) if given.size == "tiny" else (256, 768)
    torch.manual_seed(0)
    denoiser = sl.denoiser_for(config, shape, 1000).to(device)
    network = torch.compile(denoiser) if given.compile else denoiser
    optimizer = torch.optim.AdamW(denoiser.parameters(), fused=True)
    z = torch.randn(given.batch_size, *shape, device=device)
    labels = torch.randint(1000, (given.batch_size,), device=device)

    def losses(x, *rest):
        return sl.sphere_losses(network, sl.spherify, sl.spherify(x), x, *rest, config)

    objective = sl.Objective(denoiser, losses)

    def step():
        sl.update(denoiser, objective, optimizer, z, labels, config, 0)

    with FlopCounterMode(display=False) as counter:
        step()
    took = seconds(step, given.count, device)
    rate = counter.get_total_flops() / took / 1e12
    peak = given.peak or measured_peak(device)
    print(f"SiT-{given.size}, batch {given.batch_size}, {device}: {1000 * took:.0f} ms an update, "
          f"{given.batch_size / took:.1f} images/s, {rate:.3f} TFLOP/s, {100 * rate / peak:.0f}% of "
          f"{peak:.3f}")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2 ** 30
    print(f"memory: {memory:.1f} GiB")
    with torch.profiler.profile() as profile:
        for _ in range(3):
            step()
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=14,
                                       max_name_column_width=40))


if __name__ == "__main__":
    main()
