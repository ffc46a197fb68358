"""How fast images arrive, how much arithmetic an update is, and what fits into a GPU's memory.

    python tests/experiments/speed.py --data [--photos PATH]    the loader alone, 256 pixels
    python tests/experiments/speed.py                           an update, by size; needs no GPU

FLOPs are those of matrix products, counted by PyTorch: both noisy points, forward and backward.
"""
import os
import pathlib
import sys
import tempfile
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
    """Images per second from one core."""
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


def show_update():
    """GFLOP an image, GB by --micro-batch, and the largest that leaves 10% of a GPU's memory."""
    counts, gpus = (4, 8, 16, 32, 64), (24, 40, 80)
    with torch.device("meta"):                               # shapes without numbers
        rae, x = sl.RAE(pretrained=False), torch.rand(1, 3, 256, 256)
        encoder = flops(lambda: rae.encode(x))
    print(f"GFLOP an image; kept for the backward pass, micro-batch {counts}; besides; largest in "
          f"{gpus} GB")
    for size in ("B", "XL"):
        kept = [kept_for_backward(size, count) for count in counts]
        with torch.device("meta"):
            batch = inputs(size, 1)
            update = flops(lambda: sl.sphere_losses(*batch)["total"].backward())
        denoiser, of_rae = [sum(p.numel() for p in model.parameters()) for model in (batch[0], rae)]
        # weights, gradients, Adam's two moments, moving average; RAE; 1,024 images and latents
        besides = 4 * (5 * denoiser + of_rae + 1024 * 2 * 3 * 256 ** 2)
        each = (kept[-1] - kept[0]) / (counts[-1] - counts[0])
        fixed = besides + kept[0] - counts[0] * each         # also bfloat16 copies of the weights
        largest = [int((0.9e9 * gigabytes - fixed) / each) for gigabytes in gpus]
        print(f"SiT-{size}/1: {update / 1e9:.0f} + {encoder / 1e9:.0f};",
              *[f"{value / 1e9:.1f}" for value in kept], f"; {besides / 1e9:.1f};", *largest)


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="store_true")
    parser.add_argument("--photos", help="with --data: a folder of photographs, not drawings")
    given = parser.parse_args()
    if given.data:
        show_data(given.photos)
    else:
        show_update()


if __name__ == "__main__":
    main()
