"""Where the time of an update goes, how fast images arrive, and what fits into a GPU's memory.

    python tests/experiments/speed.py                               the default denoiser
    python tests/experiments/speed.py --size B --batch-size 8       the paper's size, random weights
    python tests/experiments/speed.py --size XL --batch-size 256 --device cuda --compile --peak 989
    python tests/experiments/speed.py --data [--photos PATH]        the loader alone, 256 pixels
    python tests/experiments/speed.py --memory                      what an update keeps, by size

FLOPs are those of matrix products, counted by PyTorch: both views, forward and backward. --peak:
what the hardware promises, in TFLOP/s; the default is measured here, with a large matrix product.
"""
import os
import pathlib
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import sphere_latent as sl  # noqa: E402


def inputs(size, count):
    """A denoiser for the latents of RAE, and what else sphere_losses takes for `count` images."""
    config = sl.Config(model_size=size)
    z, e = torch.randn(2, count, *sl.RAE.latent_shape)
    labels = torch.zeros(count, dtype=torch.long)
    denoiser = sl.denoiser_for(config, sl.RAE.latent_shape, 1000)
    return denoiser, z, labels, e, *torch.rand(2, count), config


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def loader_rate(images, batches):
    """Images per second of processor time, of this process and its one worker together."""
    indices = torch.randint(len(images), (batches, 32)).tolist()
    began = sum(os.times()[:4])                              # other programs do not count
    for _ in sl.make_loader(images, indices, torch.device("cpu")):
        pass
    return 32 * batches / (sum(os.times()[:4]) - began)


def show_data(photos):
    """Images per second from one core, beside what an H100 at 45% of 989 TFLOP/s asks for."""
    os.environ["LOCAL_WORLD_SIZE"] = str(os.cpu_count())     # one worker
    labels = torch.arange(200) % len(sl.SPECIES)
    if photos:
        paths = sorted(pathlib.Path(photos).rglob("*.jpg"))
        pictures = [Image.open(paths[i * len(paths) // 200]).convert("RGB") for i in range(200)]
    else:
        drawn = 255 * sl.draw_flowers(labels, 128, torch.Generator().manual_seed(0))
        pictures = [Image.fromarray(x.permute(1, 2, 0).byte().numpy()) for x in drawn]
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{number}.jpg" for number in range(200)]
        for path, image in zip(paths, pictures):             # as large as those of Oxford-Flowers
            ImageOps.fit(image, (667, 500)).save(path, quality=90)
        files = sl.Images(labels, sl.SPECIES, paths=paths, size=256)
        in_memory = sl.Images(labels, sl.SPECIES, pixels=sl.read_images(files).pixels)
        kilobytes = sum(map(os.path.getsize, paths)) / 200 / 1000
        print(f"in memory: {loader_rate(in_memory, 200):.0f} images/s")
        print(f"JPEGs, 667 x 500, {kilobytes:.0f} kB each: {loader_rate(files, 40):.0f} images/s")
    with torch.device("meta"):                               # shapes without numbers
        rae, x = sl.RAE(pretrained=False), torch.rand(1, 3, 256, 256)
        encoder = flops(lambda: rae.encode(x))
        for size in ("B", "XL"):
            batch = inputs(size, 1)
            update = flops(lambda: sl.sphere_losses(*batch)["total"].backward())
            print(f"SiT-{size}/1 asks for {0.45 * 989e12 / (update + encoder):.0f} images/s: "
                  f"{update / 1e9:.0f} + {encoder / 1e9:.0f} GFLOP an image")


def kept_for_backward(size, count):
    """Bytes of all tensors that the backward pass of `count` images needs, but the weights."""
    aten, kept = torch.ops.aten, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage                       # by its address: each counts once
        return tensor

    def attention(q, k, v):                                  # as on CUDA: scores are not kept
        q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
        return aten._scaled_dot_product_flash_attention(q, k, v)[0]

    def rms_norm(x, shape, weight=None, eps=None):           # as on CUDA: one kernel
        return aten._fused_rms_norm(x, shape, weight, eps)[0]

    F.scaled_dot_product_attention, F.rms_norm = attention, rms_norm
    with FakeTensorMode(), torch.device("cuda"):             # needs no GPU
        batch = inputs(size, count)
        weights = {p.untyped_storage()._cdata for p in batch[0].parameters()}
        torch.set_autocast_dtype("cuda", torch.bfloat16)     # torch.autocast would ask for a GPU
        torch.set_autocast_enabled("cuda", True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            sl.sphere_losses(*batch)
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()
    return sum(storage.nbytes() for address, storage in kept.items() if address not in weights)


def show_memory():
    """GB of an update by --micro-batch, and the largest that leaves 10% of a GPU's memory."""
    counts, gpus = (4, 8, 16, 32, 64), (24, 40, 80)
    print(f"kept for the backward pass, micro-batch {counts}; besides; largest in {gpus} GB")
    for size in ("B", "XL"):
        kept = [kept_for_backward(size, count) for count in counts]
        with torch.device("meta"):
            models = inputs(size, 1)[0], sl.RAE(pretrained=False)
        denoiser, rae = [sum(p.numel() for p in model.parameters()) for model in models]
        # weights, gradients, Adam's two moments, moving average; RAE; 1,024 images and latents
        besides = 4 * (5 * denoiser + rae + 1024 * 2 * 3 * 256 ** 2)
        each = (kept[-1] - kept[0]) / (counts[-1] - counts[0])
        fixed = besides + kept[0] - counts[0] * each         # also bfloat16 copies of the weights
        largest = [int((0.9e9 * gigabytes - fixed) / each) for gigabytes in gpus]
        print(f"SiT-{size}/1:", *[f"{value / 1e9:.1f}" for value in kept],
              f"; {besides / 1e9:.1f};", *largest)


def seconds(function, count=10):
    """Mean time of a call of a function that returns a tensor."""
    function().sum().item()                                  # waits for a GPU
    began = time.time()
    for _ in range(count):
        result = function()
    result.sum().item()
    return (time.time() - began) / count


def show_update(given):
    """Milliseconds of an update, its share of the peak, and a profile."""
    device = sl.find_device(given.device)
    config = sl.Config(model_size=given.size)
    shape = (16, 64) if given.size == "tiny" else sl.RAE.latent_shape
    denoiser = sl.denoiser_for(config, shape, 1000).to(device)
    average = sl.denoiser_for(config, shape, 1000).to(device).requires_grad_(False)
    if given.compile:
        sl.compile_blocks(denoiser)
    optimizer = torch.optim.AdamW(denoiser.parameters(), fused=True)
    z = torch.randn(given.batch_size, *shape, device=device)
    labels = torch.randint(1000, (given.batch_size,), device=device)
    batch = list(zip(z.split(given.micro_batch), labels.split(given.micro_batch)))
    generator = torch.Generator(device)
    a = torch.randn(2048, 2048, device=device)

    def step():
        losses = sl.training_step(denoiser, average, optimizer, batch, config, generator)
        return losses["gradient_norm"]

    def product():
        with sl.autocast(device, "auto"):
            return a @ a

    count = flops(step)
    took = seconds(step)
    peak = given.peak or 2 * 2048 ** 3 / seconds(product) / 1e12
    rate = count / took / 1e12
    print(f"SiT-{given.size}, batch {given.batch_size}, {device}: {1000 * took:.0f} ms an update, "
          f"{given.batch_size / took:.1f} images/s, {rate:.3f} TFLOP/s, "
          f"{100 * rate / peak:.0f}% of {peak:.3f}")
    with torch.profiler.profile() as profile:
        step()
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=14))


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(sl.MODEL_SIZES), default="tiny")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--peak", type=float)
    parser.add_argument("--data", action="store_true")
    parser.add_argument("--photos", help="with --data: a folder of photographs, not drawings")
    parser.add_argument("--memory", action="store_true")
    given = parser.parse_args()
    if given.data:
        show_data(given.photos)
    elif given.memory:
        show_memory()
    else:
        show_update(given)


if __name__ == "__main__":
    main()
