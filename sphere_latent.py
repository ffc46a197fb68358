"""Sphere Latent Encoder (SLE) in one file: images from random points on a sphere, in a few steps.

The method of "Efficient Image Synthesis with Sphere Latent Encoder" (arXiv 2605.15592):

  1. A frozen autoencoder turns an image into a latent z: N tokens with C channels each.
  2. Spherify, f(z), divides z by its root mean square. All points v = f(z) have the same norm,
     sqrt(N C): they lie on a sphere.
  3. Noise e ~ N(0, I) tilts a point by an angle alpha: f(cos(alpha) v + sin(alpha) e). In training
     there are two views with the same e: v_large, and v_small at a random smaller angle.
  4. A transformer, the denoiser, maps a noisy point to an estimate z_hat of the clean latent.
     It is trained with three losses, as we read the paper:
       reconstruction      z_hat_small should equal z
       consistency         z_hat_large should equal z_hat_small   (no gradient to z_hat_small)
       latent consistency  f(z_hat_large) should point where v points   (1 - cosine)
  5. To generate, start at a random point f(e) and denoise it. For each further step, tilt f(z_hat)
     back into noise and denoise again. Decode the last z_hat.

The paper's loss weights, noise parameters and tilts are unknown to us. These, and the squared error
as the distance, are our choice or that of the predecessor, Sphere Encoder (arXiv 2602.15030), which
is section 10 of this file. README.md lists the differences.

Commands, from the smallest to the largest:
  python sphere_latent.py train                                   drawn flowers, CPU, offline
  python sphere_latent.py sample --checkpoint runs/drawn --classes poppy daisy
  python sphere_latent.py evaluate --checkpoint runs/drawn
  python sphere_latent.py train --method sphere-encoder --out runs/predecessor
  python sphere_latent.py train --dataset folder --data-dir PATH  your own images
  python sphere_latent.py train --dataset flowers                 the paper's small setting, GPU
  torchrun --nproc-per-node 8 sphere_latent.py train --dataset imagenet --data-dir PATH

Contents: 1 Configuration, 2 Images, 3 The transformer, 4 Frozen autoencoders, 5 The sphere,
6 The three losses, 7 Training, 8 Sampling, 9 FID, 10 Sphere Encoder, 11 Figures, 12 Whole runs and
the command line. The method alone is sections 3, 5, 6 and 8: about 350 lines.

Shapes: B batch, N tokens, C latent channels, D width, H and W height and width of an image.
Latents are [B, N, C], images [B, 3, H, W] with values in [0, 1]. Angles are in radians; in Config
and on the command line they are in degrees.
"""
import argparse
import contextlib
import copy
import csv
import dataclasses
import datetime
import json
import math
import os
import pathlib
import shlex
import shutil
import signal
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps
from torch import distributed as dist
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset
from tqdm import tqdm


class UserError(Exception):
    """An error that the user can correct: printed without a traceback, exit code 2."""


@contextlib.contextmanager
def as_user_error(problem):
    """Raise an error of the block as a UserError that begins with `problem`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:                               # libraries fail in many ways
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{problem} ({type(error).__name__}: {reason})") from None


# ---- Helpers: processes, devices, files ----------------------------------------------------------
# torchrun starts several processes; each one trains on its part of every batch.

def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def my_part(batch):
    """This process's part of a batch, or of a list of batches: every world_size-th element."""
    return batch[rank()::world_size()]


def sum_over_processes(x):
    """Replace a tensor by its sum over all processes."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def any_process(flag):
    """Whether the flag is true in some process. All processes have to ask at the same time."""
    return sum_over_processes(torch.tensor(float(flag))).item() > 0


def wait_for_all_processes():
    sum_over_processes(torch.zeros(1))


def say(message):
    """Print once, not once in each process, and above a progress bar."""
    if rank() == 0:
        tqdm.write(message, file=sys.stdout)


def progress(iterable, name, **options):
    return tqdm(iterable, name, disable=rank() > 0, **options)


def find_device(name):
    """Return a torch.device that works for "auto", "cpu", "cuda:1" and so on; allow TF32 there."""
    if name == "auto":
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    with as_user_error(f"--device {name} cannot be used"):
        if name == "cuda" and "LOCAL_RANK" in os.environ:    # torchrun: a GPU for each process
            name = "cuda:" + os.environ["LOCAL_RANK"]
            torch.cuda.set_device(name)
        torch.zeros(1, device=name).tolist()                 # "meta" gives nothing back
    torch.set_float32_matmul_precision("high")
    return torch.device(name)


def autocast(device):
    """bfloat16 where the hardware multiplies it faster than float32, otherwise no change."""
    enabled = False
    if device.type == "cuda":
        enabled = torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        enabled = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def seeded_generator(seed, index, device="cpu"):
    """A generator for one update or one image: a resumed run needs no saved random state."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + index)     # room for 10^6 indices


# ---- 1. Configuration ----------------------------------------------------------------------------

def setting(default, meaning, options=None, low=None, high=10**9):
    """A field of Config: its default, its meaning for --help, and the values that it may take.

    Numbers go from low to high; low is 1 for int fields and 0 for float fields if it is not given.
    """
    if low is None:
        low = 1 if isinstance(default, int) else 0
    rules = {"meaning": meaning, "options": options, "low": low, "high": high}
    return dataclasses.field(default=default, metadata=rules)


@dataclasses.dataclass
class Config:
    """All settings; each one is a flag of `train`: batch_size is --batch-size."""

    method: str = setting("sphere-latent", "the paper's method, or its predecessor",
                          ("sphere-latent", "sphere-encoder"))
    # data
    dataset: str = setting("drawn", "what to learn", (
        "drawn", "folder", "cifar10", "flowers", "animal-faces", "imagenet"))
    data_dir: str = setting("", "folder of the images, or data; alone, it implies --dataset folder")
    image_size: int = setting(64, "height and width of the images, pixels", high=4096)
    flips: bool = setting(True, "also learn from mirror images")
    # the frozen autoencoder
    autoencoder: str = setting("tiny", "TinyRAE, or the paper's RAE", ("tiny", "dinov2-b"))
    weights_dir: str = setting("", "folder with published weights that you placed by hand")
    patch_size: int = setting(16, "tiny: height and width of a token's patch, pixels", high=64)
    latent_channels: int = setting(64, "tiny: channels of a token")
    autoencoder_steps: int = setting(300, "tiny: updates of its decoder")
    # the denoiser and its losses; small_ratio and latent_consistency_weight are Sphere Encoder's,
    # noise_mean was found by trying
    model_size: str = setting("tiny", "width and depth", ("tiny", "S", "B", "L", "XL"))
    noise_distribution: str = setting("logit-normal", "distribution of the large angle", (
        "logit-normal", "uniform", "uniform-tangent"))
    noise_mean: float = setting(1.2, "logit-normal: mean of the logit", low=-20, high=20)
    noise_std: float = setting(1.0, "logit-normal: standard deviation of the logit", high=20)
    max_angle: float = setting(90.0, "largest angle in training, degrees", high=90)
    small_ratio: float = setting(0.5, "largest tan(small angle) / tan(large angle)", high=1)
    reconstruction_weight: float = setting(1.0, "weight of loss 1")
    consistency_weight: float = setting(1.0, "weight of loss 2")
    latent_consistency_weight: float = setting(0.1, "weight of loss 3")
    # optimization; learning_rate and ema_decay were found by trying on the drawn flowers
    train_steps: int = setting(1000, "updates of the denoiser")
    batch_size: int = setting(32, "images in an update, over all processes", high=10**6)
    accumulate: int = setting(1, "parts that a batch is split into, to save memory")
    checkpoint_blocks: bool = setting(False, "compute each block twice, to save memory")
    learning_rate: float = setting(5e-3, "largest learning rate of AdamW", high=100)
    ema_decay: float = setting(0.995, "decay of the moving average of the weights", high=1)
    save_every: int = setting(500, "updates between checkpoints, with sample pictures")
    # sampling and evaluation
    steps: int = setting(4, "calls of the denoiser for an image", high=1000)
    cfg_scale: float = setting(1.5, "classifier-free guidance; 1 is off", high=100)
    tilt: float = setting(90.0, "sampling: largest tilt back into noise, degrees", high=90)
    eval_samples: int = setting(600, "samples behind a Fréchet distance", low=2, high=10**7)
    # the run
    seed: int = setting(0, "seed of training and sampling; drawings stay the same", low=0)
    device: str = setting("auto", "auto (CUDA, then MPS, then CPU) or a torch device")
    out: str = setting("", "run folder (default: runs/DATASET)")
    compile: bool = setting(False, "use torch.compile")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, flag = getattr(self, field.name), "--" + field.name.replace("_", "-")
            options, low, high = [field.metadata[name] for name in ("options", "low", "high")]
            if options is not None and value not in options:
                raise UserError(f"{flag} {value}: choose from {', '.join(options)}")
            is_number = field.type in (int, float)
            if is_number and not low <= value <= high:       # nan is in no range
                raise UserError(f"{flag} {value}: must be from {low} to {high:,}")
        numbers_in_patch = 3 * self.patch_size ** 2
        if self.uses_rae() and self.image_size != 256:
            raise UserError(f"--image-size {self.image_size}: dinov2-b has images of 256 pixels")
        if self.image_size % self.patch_size != 0 or self.patch_size % 2 != 0:
            raise UserError(f"--image-size {self.image_size}: must be a multiple of --patch-size "
                            f"{self.patch_size}, which must be even")
        if self.latent_channels > numbers_in_patch:
            raise UserError(f"--latent-channels {self.latent_channels}: a patch has only "
                            f"{numbers_in_patch} numbers")
        if self.noise_distribution == "uniform-tangent" and self.max_angle == 90:
            raise UserError("--max-angle 90: its tangent is infinite, uniform-tangent needs less")
        if self.batch_size % self.accumulate != 0:
            raise UserError(f"--accumulate {self.accumulate}: must divide --batch-size "
                            f"{self.batch_size}")

    def uses_rae(self):
        return self.method == "sphere-latent" and self.autoencoder == "dinov2-b"


# Where the settings of a data set differ from the defaults, which are those of "drawn".
# PHOTOS: for a folder of images, and for flowers, animal-faces and imagenet with --autoencoder tiny
# or --method sphere-encoder; guidance by a sweep on photographs (README.md), the rest by trying.
# latent_channels stays 64: both 40 and 96 channels made worse samples of photographs.
# PAPER: the paper's optimizer is unknown. Batch size, learning rate and EMA are RAE's (there the
# rate decays to 2e-5, here to 0), the 1,000 epochs (ImageNet: 800) Sphere Encoder's. accumulate:
# for one GPU (ImageNet: for eight), so that a part has at most 32 images.
PHOTOS = {"autoencoder_steps": 1000, "train_steps": 10_000, "learning_rate": 3e-3, "cfg_scale": 3.0}
PAPER = {"autoencoder": "dinov2-b", "image_size": 256, "model_size": "B", "batch_size": 1024,
         "accumulate": 32, "learning_rate": 2e-4, "ema_decay": 0.9995, "eval_samples": 50_000}
PRESETS = {
    "drawn": {},
    "folder": PHOTOS,
    "cifar10": {"image_size": 32, "patch_size": 4, "latent_channels": 16, "model_size": "S"},
    "flowers": {**PAPER, "train_steps": 8000, "eval_samples": 51_000},
    "animal-faces": {**PAPER, "train_steps": 14_000},
    "imagenet": {**PAPER, "model_size": "XL", "accumulate": 8, "train_steps": 1_000_000,
                 "save_every": 10_000},
}
# noise and weights from its paper, where the weights are 25 to 50 and 1 to 25
SPHERE_ENCODER = {"noise_distribution": "uniform-tangent", "max_angle": 85.0, "tilt": 85.0,
                  "reconstruction_weight": 25.0, "consistency_weight": 2.0}
LABEL_DROPOUT = 0.1          # share of the labels that become the null label, for guidance


def preset(dataset, method="sphere-latent", autoencoder=""):
    """The Config that a data set, a method and an autoencoder start from."""
    settings = dict(PRESETS.get(dataset, {}))
    is_of_paper = settings.get("autoencoder") == "dinov2-b"
    if is_of_paper and (autoencoder == "tiny" or method == "sphere-encoder"):
        settings = dict(PHOTOS)                              # the paper's images without RAE
    if autoencoder == "dinov2-b" and not is_of_paper:
        settings = dict(PAPER, train_steps=8000)             # other images with RAE
    if method == "sphere-encoder":
        settings.update(SPHERE_ENCODER)
    return Config(dataset=dataset, method=method, **settings)


# ---- 2. Images -----------------------------------------------------------------------------------
# The built-in data: drawn flowers. All but the class is random: place, size, lean, light, ground.

SPECIES = [
    # name, petals, roundness of a petal's tip, depth of the gap between petals, rings of petals,
    # radius of the centre; colours of petal tip, petal base and centre: RGB from 0 to 1
    ("anemone", 7, 3.0, .45, 1, .26, (.96, .95, .98), (.80, .80, .92), (.13, .11, .30)),
    ("aster", 12, 1.6, .75, 1, .24, (.56, .38, .86), (.45, .26, .72), (.95, .78, .15)),
    ("buttercup", 5, 3.5, .50, 1, .22, (.99, .88, .12), (.95, .72, .05), (.62, .66, .12)),
    ("clematis", 6, 1.2, .72, 1, .16, (.42, .18, .66), (.62, .32, .74), (.95, .93, .72)),
    ("cosmos", 8, 4.0, .55, 1, .20, (.96, .52, .74), (.86, .30, .58), (.96, .80, .20)),
    ("daisy", 10, 1.8, .75, 1, .30, (.99, .99, .97), (.88, .90, .88), (.98, .78, .10)),
    ("forget-me-not", 5, 4.0, .60, 1, .18, (.42, .66, .97), (.62, .80, .99), (.99, .88, .3)),
    ("gerbera", 12, 1.8, .60, 2, .26, (.97, .42, .14), (.88, .25, .10), (.30, .12, .10)),
    ("lily", 6, 1.0, .78, 1, .12, (.98, .62, .22), (.99, .82, .40), (.45, .20, .08)),
    ("poppy", 4, 5.0, .30, 1, .20, (.90, .12, .10), (.62, .05, .08), (.10, .08, .10)),
    ("sunflower", 12, 1.1, .55, 2, .42, (.99, .80, .10), (.95, .60, .05), (.32, .18, .07)),
    ("wild rose", 5, 2.6, .40, 1, .17, (.95, .40, .52), (.99, .86, .84), (.97, .85, .35)),
]
GROUNDS = [(.16, .34, .14), (.34, .52, .22), (.10, .20, .16), (.55, .72, .88),       # leaves, sky,
           (.78, .86, .92), (.46, .38, .28), (.68, .62, .48), (.20, .24, .36)]       # soil, dusk


def draw_flowers(labels, size, generator):
    """Draw a flower for each label [B]. Returns images [B, 3, size, size]."""
    def uniform(low, high, channels=1):
        return low + (high - low) * torch.rand(len(labels), channels, 1, 1, generator=generator)

    def ground_colour():
        chosen = torch.randint(len(GROUNDS), (len(labels),), generator=generator)
        return torch.tensor(GROUNDS)[chosen][..., None, None]                # [B, 3, 1, 1]

    def column(number):                                      # of the table of species
        values = torch.tensor([species[number] for species in SPECIES])
        return values[labels].reshape(len(labels), -1, 1, 1)                 # [B, 1 or 3, 1, 1]

    def opacity(distance_to_edge):                           # smooth over about one pixel
        return (2 * size * distance_to_edge + 0.5).clamp(0, 1)

    petals, roundness, gap, rings, centre, tip, base, disc = [column(n) for n in range(1, 9)]
    axis = (torch.arange(2 * size) + 0.5) / (2 * size)       # draw at twice the size, average later
    y, x = axis[:, None], axis[None, :]
    flower_x, flower_y, radius = uniform(.40, .60), uniform(.38, .54), uniform(.29, .40)
    turn, light, lean = [uniform(0, 2 * math.pi) for _ in range(3)]

    # the ground: a gradient between two colours, a soft spot of a third, a stem
    angle = uniform(0, 2 * math.pi)
    slope = (.5 + (x - .5) * angle.cos() + (y - .5) * angle.sin()).clamp(0, 1)
    image = torch.lerp(ground_colour(), ground_colour(), slope)
    spot = ((x - uniform(0, 1)) ** 2 + (y - uniform(0, 1)) ** 2) / uniform(.08, .25) ** 2
    image = torch.lerp(image, ground_colour(), torch.exp(-spot) * uniform(0, .7))
    stem = .013 - (x - flower_x - uniform(-.6, .6) * (y - flower_y) ** 2).abs()
    green = torch.tensor([.20, .46, .14]).view(3, 1, 1) + uniform(-.06, .06, 3)
    image = torch.lerp(image, green, opacity(stem) * (y > flower_y))

    # polar coordinates r, theta around the centre of a flower that leans, and the flower's shadow
    dx, dy, squash = x - flower_x, y - flower_y, uniform(.75, 1)
    along = dx * lean.cos() + dy * lean.sin()
    across = (dy * lean.cos() - dx * lean.sin()) / squash
    r = (along ** 2 + across ** 2).sqrt() / radius
    theta = torch.atan2(across, along)
    image = image * (1 - .35 * torch.sigmoid(8 * (1 - r)))

    # petals, a ring at a time, then the centre
    shade = 1 + .22 * (dx * light.cos() + dy * light.sin()) / radius
    tint = 1 + uniform(-.06, .06, 3)
    for ring in range(2):                                    # most species have only the first
        turns = (theta - turn) / (2 * math.pi) * petals + .5 * ring
        u = 2 * torch.remainder(turns, 1) - 1                # from -1 to 1 across a petal
        edge = 1 - gap * u.abs() ** roundness
        edge = edge * (1 - .25 * ring)
        outwards = (r / edge.clamp(min=.1)).clamp(0, 1)
        colour = torch.lerp(base, tip, outwards)
        colour = colour * tint * shade * (1 - .3 * u ** 2) * (1 + .08 * ring)
        visible = opacity((edge - r) * radius * squash) * (rings > ring)
        image = torch.lerp(image, colour, visible)
    dome = disc * shade * (1.12 - .45 * (r / centre).clamp(0, 1) ** 2)
    image = torch.lerp(image, dome, opacity((centre - r) * radius))
    return F.avg_pool2d((image * uniform(.8, 1.15)).clamp(0, 1), 2)


class PixelImages(Dataset):
    """Images in memory: pixels uint8 [n, 3, H, W], labels [n], names of the classes."""

    def __init__(self, pixels, labels, classes):
        self.pixels = pixels
        self.labels = torch.as_tensor(labels)
        self.classes = list(classes)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.pixels[i] / 255, int(self.labels[i])


def drawn_images(split, size):
    """6,000 drawn flowers to train on, or 1,200 others to test on; always the same."""
    labels = torch.arange(6000 if split == "train" else 1200) % len(SPECIES)
    generator = torch.Generator().manual_seed(int(split == "test"))
    drawn = []
    for some in progress(labels.split(16), "drawing flowers", leave=False):
        drawn.append((255 * draw_flowers(some, size, generator)).round().byte())
    return PixelImages(torch.cat(drawn), labels, [species[0] for species in SPECIES])


IN_MEMORY = 8e9              # bytes of pixels; a larger data set stays in its files
IMAGE_ENDINGS = (".jpg", ".jpeg", ".jfif", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff",
                 ".ppm", ".pgm")
HIDDEN = (".", "__MACOSX")   # files and folders whose names begin so are left out


def read_image(path, size):
    """Read the centre square of an image file: upright, RGB, over white, uint8 [3, size, size]."""
    Image.MAX_IMAGE_PIXELS = None                            # Pillow's limit; cameras exceed it
    with as_user_error(f"{path} cannot be read"):
        image = Image.open(path)
        if image.mode.startswith(("I", "F")):
            raise ValueError("more than 8 bits per channel")
        image.draft("RGB", (2 * size, 2 * size))             # JPEG: decode at a reduced size
        image.load()                                         # a damaged image fails here
        with contextlib.suppress(Exception):                 # damaged EXIF is no reason to refuse
            image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = ImageOps.fit(image.convert("RGB"), (size, size))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class ImageFiles(Dataset):
    """Images in files: samples is a list of (path, label)."""

    def __init__(self, samples, classes, size):
        self.samples = samples
        self.labels = torch.tensor([label for _, label in samples])
        self.classes = classes
        self.size = size

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        path, label = self.samples[i]
        return read_image(path, self.size) / 255, label


def read_images(files):
    """Read ImageFiles into memory, as PixelImages. More than 8 GB of pixels stay in their files.

    Images that cannot be read are left out; the first five are named. Raises UserError if there is
    more than one such image and they exceed 1 in 100. In a data set that stays in its files, an
    unreadable image stops the training when it is reached.
    """
    if 3 * files.size ** 2 * len(files) > IN_MEMORY:
        return files

    def read(pair):
        try:
            return read_image(pair[0], files.size)
        except UserError as error:
            return error

    with ThreadPoolExecutor() as pool:
        found = pool.map(read, files.samples)
        found = list(progress(found, "reading images", total=len(files)))
    errors = [image for image in found if isinstance(image, UserError)]
    for error in errors[:5]:
        print(f"skipped: {error}", file=sys.stderr)
    if len(errors) > max(1, len(files) // 100):
        raise UserError(f"{len(errors)} of {len(files)} images cannot be read: {errors[0]}")
    if len(files) - len(errors) < 2:
        raise UserError(f"only one of {len(files)} images can be read: {errors[0]}")
    is_read = torch.tensor([torch.is_tensor(image) for image in found])
    pixels = torch.stack([image for image in found if torch.is_tensor(image)])
    return PixelImages(pixels, files.labels[is_read], files.classes)


def without_hidden(subfolders, files):
    """Sort the names of subfolders and, among the files, of images; leave hidden ones out."""
    subfolders = [name for name in subfolders if not name.startswith(HIDDEN)]
    images = [name for name in files
              if name.lower().endswith(IMAGE_ENDINGS) and not name.startswith(HIDDEN)]
    return sorted(subfolders), sorted(images)


def enter_single_folders(root):
    """Go down while a folder holds a single folder of folders, and no image. Returns its path.

    Archives often unpack like this: photos/photos/daisy. So does a folder train without val.
    """
    entered = root
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:], images = without_hidden(subfolders, files)            # where os.walk goes on
        if images or not subfolders:                         # a class: its parent was the last one
            break
        entered = folder
        if len(subfolders) > 1:
            break
    return entered


def find_image_files(root):
    """Find all images below a folder. Returns {class name: sorted paths}; a class may be empty.

    A class is a folder in root; images that lie in root itself form a class of root's name. Links
    are followed; a folder that is reached twice counts once. Hidden folders and this program's run
    folders are left out.
    """
    found = {}
    visited = set()                                          # a link may lead back up
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real_folder = os.path.realpath(folder)
        is_run_folder = "checkpoint.pt" in files
        if is_run_folder or real_folder in visited:
            subfolders.clear()                               # os.walk does not go into them
            continue
        visited.add(real_folder)
        subfolders[:], images = without_hidden(subfolders, files)
        name = os.path.relpath(folder, root).split(os.sep)[0]
        if name == ".":
            name = os.path.basename(root)
        name = name.encode("utf-8", "backslashreplace").decode()             # if it is not UTF-8
        if images or folder != root:
            found.setdefault(name, []).extend(os.path.join(folder, image) for image in images)
    return {name: sorted(found[name]) for name in sorted(found)}


def split_by_name(images, held_out):
    """The tenth of ImageFiles that is held out, or the other nine tenths.

    Chosen by a hash of the file name: it hardly changes when images are added. The last image of a
    class is never held out. If that leaves fewer than two held-out images, as it does for fewer
    than 20 in all, both parts are the whole set.
    """
    def name_hash(pair):
        return zlib.crc32(os.fsencode(os.path.basename(pair[0])))

    remaining = torch.bincount(images.labels).tolist()       # images of each class
    chosen = set()
    for path, label in sorted(images.samples, key=name_hash):
        if len(chosen) < len(images) // 10 and remaining[label] > 1:
            chosen.add(path)
            remaining[label] -= 1
    if len(chosen) < 2:
        return images
    part = [pair for pair in images.samples if (pair[0] in chosen) == held_out]
    return ImageFiles(part, images.classes, images.size)


def folder_images(config, root, held_out):
    """Find ImageFiles in a folder that holds a folder for each class, or images alone.

    If it holds the folders train and val (or test), as AFHQ and ImageNet do, these are the split.
    """
    root = enter_single_folders(os.path.abspath(root))
    splits = [name for name in ("train", "val", "test") if os.path.isdir(os.path.join(root, name))]
    is_split = "train" in splits and len(splits) > 1
    if not is_split and config.dataset != "folder":
        raise UserError("no folders train and val, or train and test")
    files = find_image_files(os.path.join(root, "train") if is_split else root)
    if not held_out:                                         # say it once
        for name in files:
            if not files[name]:
                say(f"note: folder {name} holds no image")
    classes = [name for name in files if files[name]]
    if is_split and held_out:
        files = find_image_files(os.path.join(root, splits[1]))
    samples = []
    for name, paths in files.items():
        # ImageNet's validation images may lie in no class's folder; no result needs their labels
        label = classes.index(name) if name in classes else 0
        samples += [(path, label) for path in paths]
    if len(samples) < 4:
        raise UserError(f"{len(samples)} images in {root}; at least 4 are needed")
    images = ImageFiles(samples, classes, config.image_size)
    return images if is_split else split_by_name(images, held_out)


def cifar_images(config, root, held_out):
    from torchvision.datasets import CIFAR10
    data = CIFAR10(root, train=not held_out, download=True)
    pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2)                 # [n, 3, 32, 32]
    size = (config.image_size, config.image_size)
    pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
    return PixelImages(pixels, data.targets, data.classes)


def oxford_flowers(config, root, held_out):
    """Oxford-Flowers 102. We train on all 8,189 photographs and compare samples with all of them;
    without RAE's encoder, all is learned from these alone, and a tenth is held out."""
    from torchvision.datasets import Flowers102
    samples = []
    for split in ("train", "val", "test"):
        part = Flowers102(root, split, download=True)
        samples += zip(map(str, part._image_files), part._labels)
    images = ImageFiles(samples, Flowers102.classes, config.image_size)
    return split_by_name(images, held_out) if config.autoencoder == "tiny" else images


SOURCES = {
    "folder": "your images",
    "cifar10": "cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html",
    "flowers": "a folder flowers-102 with jpg/ (102flowers.tgz, unpacked), imagelabels.mat and "
               "setid.mat from https://www.robots.ox.ac.uk/~vgg/data/flowers/102",
    "animal-faces": "the folders train and val of AFHQ, https://github.com/clovaai/stargan-v2",
    "imagenet": "the folders train and val of ImageNet-1K, https://image-net.org",
}


def find_images(config, split):
    """Find the images of a split, "train" or "test", without reading them. Raises UserError."""
    sources = {"cifar10": cifar_images, "flowers": oxford_flowers}
    source = sources.get(config.dataset, folder_images)
    root = os.path.expanduser(config.data_dir or "data")
    try:
        return source(config, root, split == "test")
    except Exception as error:                               # of a download, of a broken file
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"no data set {config.dataset} in {root} ({reason}): put "
                        f"{SOURCES[config.dataset]} there, or add --data-dir FOLDER") from None


def load_images(config, split):
    """Load a split, "train" or "test". Returns a data set with .labels and .classes.

    [i] gives (image [3, H, W] float in [0, 1], label int). Raises UserError if there are none.
    """
    if config.dataset == "drawn":
        return drawn_images(split, config.image_size)
    images = find_images(config, split)
    if isinstance(images, ImageFiles):
        images = read_images(images)
    return images


def random_index_batches(count, config, first_step, last_step):
    """Yield the indices of the images of each update; they depend on seed and step alone."""
    for step in range(first_step, last_step):
        generator = seeded_generator(config.seed, step)      # drawn with replacement
        yield torch.randint(count, (config.batch_size,), generator=generator).tolist()


def index_batches(count, size=100):
    """This process's share of the indices below count, as lists of at most `size` of them."""
    batches = torch.arange(count).split(size)
    return my_part([batch.tolist() for batch in batches])


def ignore_signals(worker):
    """The main process decides what Ctrl-C or SIGTERM means; its workers exit with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def make_loader(dataset, batches, device=torch.device("cpu")):
    """Return a DataLoader of (images or latents [B, ...], labels [B]), one per list of indices."""
    workers = min(8, os.cpu_count()) if isinstance(dataset, ImageFiles) else 0
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers,
                      pin_memory=device.type == "cuda", worker_init_fn=ignore_signals)


def random_images(images, seed):
    """Choose images for PCA at random: 2,000, or fewer if they are large. Returns [n, 3, H, W]."""
    count = min(2000, 10**8 // images[0][0].numel())         # 10^8 float32 numbers are 0.4 GB
    count = max(20, count)
    order = torch.randperm(len(images), generator=seeded_generator(seed, 0))
    return torch.stack([images[i][0] for i in order[:count].tolist()])


def iterate_images(images):
    """This process's share of a data set, as batches [B, 3, H, W]."""
    for x, _ in make_loader(images, index_batches(len(images))):
        yield x


# ---- 3. The transformer --------------------------------------------------------------------------
#     D width   K = D / heads, the channels of a head

class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2)) over the last axis, times one learned weight per channel."""

    def forward(self, x):                                    # under autocast q, k are bfloat16
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), eps=1e-6)


def modulate(x, shift, scale):
    """Shift and scale each channel of x [B, N, D] by values [B, 1, D] that depend on the label."""
    return x * (1 + scale) + shift


class Block(nn.Module):
    """Attention and MLP. The label shifts, scales and gates both (adaLN-Zero, from DiT).

    RMSNorm, normalised q and k, and projections without bias are inferred: with them the paper's XL
    has exactly its published 675,160,896 parameters.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.q, self.k, self.v, self.out = [nn.Linear(width, width, bias=False) for _ in range(4)]
        self.q_norm, self.k_norm = RMSNorm(width // heads), RMSNorm(width // heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)

    def attention(self, x):
        q = rearrange(self.q(x), "b n (h k) -> b h n k", h=self.heads)       # [B, heads, N, K]
        k = rearrange(self.k(x), "b n (h k) -> b h n k", h=self.heads)
        v = rearrange(self.v(x), "b n (h k) -> b h n k", h=self.heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if x.device.type == "cpu" and torch.is_grad_enabled():
            # On a CPU the fused backward pass is slower than this for TinyRAE's short sequences.
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5           # [B, heads, N, N]
            y = scores.softmax(-1).to(v.dtype) @ v                           # [B, heads, N, K]
        else:
            y = F.scaled_dot_product_attention(q, k, v)                      # [B, heads, N, K]
        return self.out(rearrange(y, "b h n k -> b n (h k)"))                # [B, N, D]

    def forward(self, x, c):
        modulation = self.modulation(c)[:, None]                             # [B, 1, 6 D]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        x = x + gate1 * self.attention(modulate(self.norm1(x), shift1, scale1))
        x = x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x                                                             # [B, N, D]


def sincos_positions(tokens, width):
    """Return sines and cosines of the column and the row of each token of a square grid, [N, D]."""
    side = math.isqrt(tokens)
    frequency = 10_000 ** -(torch.arange(width // 4) / (width // 4))         # [D/4]
    angle = torch.arange(side)[:, None] * frequency                          # [side, D/4]
    line = torch.cat([angle.sin(), angle.cos()], dim=-1)                     # [side, D/2]
    columns = line.repeat(side, 1)                                           # [N, D/2]
    rows = line.repeat_interleave(side, dim=0)                               # [N, D/2]
    return torch.cat([columns, rows], dim=-1)


def unpatchify(x, p):
    """Put tokens [B, N, p p C] of a square grid together as maps [B, C, H, W] of p x p patches."""
    side = math.isqrt(x.shape[1])
    return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=side, p=p, q=p)


class Transformer(nn.Module):
    """Maps tokens [B, N, in_channels] and labels [B] to tokens [B, N, out_channels].

    The label num_classes is the null label, "no class"; it is used where labels is None. The
    denoiser, the decoder of TinyRAE and both halves of Sphere Encoder are made of it.
    """

    def __init__(self, tokens, in_channels, out_channels, width, depth, heads, num_classes=0,
                 checkpoint_blocks=False):
        super().__init__()
        self.num_classes = num_classes
        self.checkpoint_blocks = checkpoint_blocks
        self.embed = nn.Linear(in_channels, width)
        self.positions = nn.Parameter(sincos_positions(tokens, width), requires_grad=False)
        self.label_embedding = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = RMSNorm(width)
        self.modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, out_channels)
        self.initialize()

    def initialize(self):
        """As in DiT: zero modulation makes each block the identity, a zero head the output zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.label_embedding.weight, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.modulation.weight)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.head.weight)

    def forward(self, x, labels=None):
        if labels is None:
            labels = torch.full((len(x),), self.num_classes, device=x.device)
        c = F.silu(self.label_embedding(labels))                                    # [B, D]
        x = self.embed(x) + self.positions                                   # [B, N, D]
        for block in self.blocks:
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(block, x, c, use_reentrant=False)             # [B, N, D]
            else:
                x = block(x, c)                                              # [B, N, D]
        shift, scale = self.modulation(c)[:, None].chunk(2, dim=-1)          # [B, 1, D]
        return self.head(modulate(self.norm(x), shift, scale))               # [B, N, out]


class Denoiser(Transformer):
    """Estimates clean latents, z_hat [B, N, C], from noisy latents [B, N, C] and labels [B].

    It is not told the noise level. On the sphere all inputs have the same norm, and their angle to
    the data has to be read from the content. We infer this from the parameter count of the paper's
    XL model, which leaves no room for an embedding of the noise level.
    """

    def __init__(self, latent_shape, num_classes, width, depth, heads, checkpoint_blocks=False):
        tokens, channels = latent_shape
        super().__init__(tokens, channels, channels, width, depth, heads, num_classes,
                         checkpoint_blocks)
        self.latent_shape = latent_shape


MODEL_SIZES = {              # width, depth, heads
    "tiny": (256, 6, 4),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}


def denoiser_for(config, latent_shape, num_classes):
    """A new Denoiser of size config.model_size for latents of shape (N, C)."""
    width, depth, heads = MODEL_SIZES[config.model_size]
    return Denoiser(latent_shape, num_classes, width, depth, heads, config.checkpoint_blocks)


# ---- 4. Frozen autoencoders ----------------------------------------------------------------------
# RAE is a frozen encoder, DINOv2, with a decoder trained on noisy latents. TinyRAE is a small RAE.
# Its encoder is PCA of patches, in closed form: C numbers say how strongly a patch shows each
# of C patterns. The patterns reach a little into the neighbouring patches, which hides the borders.
# Each number is divided by the square root of its standard deviation. So fine patterns keep a
# smaller variance than coarse ones, and noise hides them first. The decoder adds the patterns up; a
# transformer, which sees all patches, and convolutions, which see across their borders, add what is
# missing.
#     P numbers in a patch   M feature maps

def border_angles(size, patch_size):
    """Return, for each pixel of a row, its partner [size] and its rotation angle [size].

    The partner is the pixel's mirror image at the nearest border of patches. The angle falls from
    45 degrees on the border to 0 at a distance of `reach` pixels, measured at the centres of the
    pixels, and is negative to the right of the border. Beyond `reach`, a pixel is its own partner.
    """
    partner, angle = torch.arange(size), torch.zeros(size)
    reach = patch_size // 4          # pixels on each side of a border; a quarter was best by trying
    for border in range(patch_size, size, patch_size):
        for k in range(reach):
            left, right = border - 1 - k, border + k
            partner[left], partner[right] = right, left
            angle[left] = math.pi / 4 * (1 - (k + 0.5) / reach)
            angle[right] = -angle[left]
    return partner, angle


class PatchPCA(nn.Module):
    """PCA of overlapping patches: images [B, 3, H, W] to tokens [B, N, C] and back, both linear."""

    def __init__(self, image_size, patch_size, channels):
        super().__init__()
        numbers = 3 * patch_size ** 2                                        # P
        self.patch_size = patch_size
        self.channels = channels
        partner, angle = border_angles(image_size, patch_size)
        self.register_buffer("partner", partner)                             # [H]
        self.register_buffer("angle", angle)                                 # [H]
        self.register_buffer("mean", torch.zeros(3, image_size, image_size))
        self.register_buffer("analysis", torch.eye(numbers, channels))       # [P, C]
        self.register_buffer("synthesis", torch.eye(channels, numbers))      # [C, P]

    def rotate(self, images, angle):
        """Mix pixels that mirror each other at a border: rotate each such pair by its angle.

        Next to a border of large patches they become nearly their sum and their difference, over
        sqrt(2). In smooth images the difference is almost 0. This is the lapped transform of audio
        and image coding.
        """
        for _ in range(2):                                   # along one axis, then the other
            images = images.transpose(2, 3)
            images = angle.cos() * images + angle.sin() * images[..., self.partner]
        return images

    def patches(self, images):
        p = self.patch_size
        rotated = self.rotate(images - self.mean, self.angle)                # [B, 3, H, W]
        return rearrange(rotated, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)    # [B, N, P]

    @torch.no_grad()
    def fit(self, images):
        """Compute the mean image and the patterns from images [n, 3, H, W]."""
        self.mean.copy_(images.mean(0))
        patches = self.patches(images).flatten(0, 1).cpu().double()          # [n N, P]
        variances, patterns = torch.linalg.eigh(torch.cov(patches.T))        # ascending
        variances = variances.flip(0)[:self.channels].clamp(min=1e-8)        # [C]
        patterns = patterns.flip(1)[:, :self.channels]                       # [P, C]
        root = variances.sqrt().sqrt()                       # of the standard deviation
        scale = root * (variances / root ** 2).mean().sqrt()                 # mean variance 1
        self.analysis.copy_(patterns / scale)
        self.synthesis.copy_((patterns * scale).T)

    def encode(self, images):
        return self.patches(images) @ self.analysis                          # [B, N, C]

    def decode(self, z):
        rotated = unpatchify(z @ self.synthesis, self.patch_size)            # [B, 3, H, W]
        return self.rotate(rotated, -self.angle) + self.mean


class PixelDecoder(nn.Module):
    """Returns a correction [B, 3, H, W] to the image that PatchPCA makes of tokens [B, N, C]."""

    def __init__(self, tokens, channels, patch_size, width, depth, heads, num_classes=0,
                 checkpoint_blocks=False, feature_maps=32, hidden=48):
        super().__init__()
        self.half_patch = patch_size // 2
        self.transformer = Transformer(tokens, channels, feature_maps * self.half_patch ** 2,
                                       width, depth, heads, num_classes, checkpoint_blocks)
        # Convolutions at half the size, a quarter of the work: 12 = 3 colours of 2 x 2 pixels.
        self.conv_in = nn.Conv2d(feature_maps + 12, hidden, 3, padding=1)
        self.residual = nn.ModuleList([nn.Sequential(
            nn.GELU(), nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.GELU(), nn.Conv2d(hidden, hidden, 3, padding=1)) for _ in range(2)])
        self.conv_out = nn.Conv2d(hidden, 12, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)
        self.to(memory_format=torch.channels_last)           # the faster layout on a CPU

    def forward(self, z, image, labels=None):
        maps = unpatchify(self.transformer(z, labels), self.half_patch)      # [B, M, H/2, W/2]
        pixels = F.pixel_unshuffle(image - 0.5, 2)                           # [B, 12, H/2, W/2]
        x = torch.cat([maps, pixels], dim=1).contiguous(memory_format=torch.channels_last)
        x = self.conv_in(x)                                                  # [B, hidden, H/2, W/2]
        for block in self.residual:
            x = x + block(x)
        return F.pixel_shuffle(self.conv_out(F.gelu(x)), 2)                  # [B, 3, H, W]


class TinyRAE(nn.Module):
    """RAE in miniature: images [B, 3, H, W] to latents [B, N, C] and back. fit_tiny_rae freezes it.

    Averaged over the channels, latents have mean 0 and variance 1. Coarse channels vary more.
    """

    def __init__(self, image_size, patch_size, channels):
        super().__init__()
        tokens = (image_size // patch_size) ** 2
        self.latent_shape = (tokens, channels)
        self.pca = PatchPCA(image_size, patch_size, channels)
        self.decoder = PixelDecoder(tokens, channels, patch_size, width=256, depth=2, heads=4)
        # as in RAE; 0 and 1, because PatchPCA normalises its tokens
        self.register_buffer("latent_mean", torch.zeros(1, channels))
        self.register_buffer("latent_var", torch.ones(1, channels))

    def encode(self, images):
        """Turn images in [0, 1] into latents."""
        return self.pca.encode(images)

    def decode_unclamped(self, z):
        """For training: clamp would stop the gradient outside [0, 1]."""
        image = self.pca.decode(z)
        return image + self.decoder(z, image).float()

    def decode(self, z):
        """Turn latents into images in [0, 1]."""
        return self.decode_unclamped(z).clamp(0, 1)


# The paper's autoencoder, Inception (for FID) and VGG (for Sphere Encoder's loss) have published
# weights. They are fetched when they are needed; files in --weights-dir take precedence.
# The digits at the end of a .pth name are the start of the file's SHA-256; downloads are checked.

HUGGING_FACE_FILES = {       # name in --weights-dir: (repository, path in it)
    "model.safetensors": ("timm/vit_base_patch14_reg4_dinov2.lvd142m", "model.safetensors"),
    "model.pt": ("nyu-visionx/RAE-collections", "decoders/dinov2/wReg_base/ViTXL_n08/model.pt"),
    "stat.pt": ("nyu-visionx/RAE-collections", "stats/dinov2/wReg_base/imagenet1k/stat.pt"),
}
INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
VGG = "vgg16-397923af.pth"
URLS = {
    INCEPTION: f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION}",
    VGG: f"https://download.pytorch.org/models/{VGG}",
}
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def hugging_face_file(repository, path):
    """The path of a file on Hugging Face: in the library's cache, or downloaded now."""
    import huggingface_hub
    cached = huggingface_hub.try_to_load_from_cache(repository, path)
    if isinstance(cached, str):
        return pathlib.Path(cached)
    # Without a network this request fails at once; the download would retry for 30 seconds.
    huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repository, path))
    return pathlib.Path(huggingface_hub.hf_hub_download(repository, path))


def find_weights(name, weights_dir=""):
    """The path of a published file: in weights_dir, in the cache of its library, or fetched now."""
    placed = pathlib.Path(weights_dir).expanduser() / name
    if weights_dir and placed.is_file():
        return placed
    source = URLS.get(name) or " ".join(HUGGING_FACE_FILES[name])
    with as_user_error(f"no {name} from {source}"):
        if name in HUGGING_FACE_FILES:
            return hugging_face_file(*HUGGING_FACE_FILES[name])
        cached = pathlib.Path(torch.hub.get_dir()) / "checkpoints" / name
        if not cached.is_file():
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(source, str(cached), hash_prefix=name[-12:-4])
        return cached


def read_weights(path):
    with as_user_error(f"{path} cannot be read"):
        return torch.load(path, map_location="cpu", weights_only=True)


def load_weights(module, path):
    """Load a file of weights into a module; a missing or unexpected key is an error."""
    weights = read_weights(path)
    with as_user_error(f"{path} holds other weights"):
        module.load_state_dict(weights)


def rename_decoder_keys(decoder, state_dict, prefix, *unused):
    """Rename published keys to those of nn.TransformerEncoderLayer; it joins query, key, value."""
    names = {"attention.output.dense": "self_attn.out_proj", "intermediate.dense": "linear1",
             "output.dense": "linear2", "layernorm_before": "norm1", "layernorm_after": "norm2"}
    for number in range(len(decoder.decoder_layers)):
        layer = f"{prefix}decoder_layers.{number}."
        for kind in (".weight", ".bias"):
            for published, name in names.items():
                if layer + published + kind in state_dict:
                    state_dict[layer + name + kind] = state_dict.pop(layer + published + kind)
            parts = [f"{layer}attention.attention.{part}{kind}"
                     for part in ("query", "key", "value")]
            if set(parts) <= set(state_dict):
                joined = torch.cat([state_dict.pop(part) for part in parts])
                state_dict[f"{layer}self_attn.in_proj{kind.replace('.', '_')}"] = joined


class RAEDecoder(nn.Module):
    """RAE's decoder, a ViT as in MAE: maps tokens [B, N, C] to images [B, 3, H, W].

    load_state_dict takes the published key names and is strict about them.
    """

    def __init__(self, latent_channels=768, tokens=256, width=1152, depth=28, heads=16,
                 mlp_width=4096, patch_size=16):
        super().__init__()
        self.patch_size = patch_size
        self.decoder_embed = nn.Linear(latent_channels, width)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, width))
        positions = F.pad(sincos_positions(tokens, width), (0, 0, 1, 0))     # 0 for the class token
        self.decoder_pos_embed = nn.Parameter(positions[None], requires_grad=False)
        self.decoder_layers = nn.ModuleList([nn.TransformerEncoderLayer(
            width, heads, mlp_width, dropout=0.0, activation="gelu", layer_norm_eps=1e-12,
            batch_first=True, norm_first=True) for _ in range(depth)])
        self.decoder_norm = nn.LayerNorm(width, eps=1e-12)
        self.decoder_pred = nn.Linear(width, 3 * patch_size ** 2)
        self.register_load_state_dict_pre_hook(rename_decoder_keys)

    def forward(self, z):
        class_token = self.trainable_cls_token.expand(len(z), 1, -1)         # [B, 1, D]
        x = torch.cat([class_token, self.decoder_embed(z)], dim=1)           # [B, 1 + N, D]
        x = x + self.decoder_pos_embed
        for layer in self.decoder_layers:
            x = layer(x)
        patches = self.decoder_pred(self.decoder_norm(x))[:, 1:].float()     # [B, N, 3 p p]
        images = unpatchify(patches, self.patch_size)                        # [B, 3, H, W]
        return images * IMAGENET_STD.to(images) + IMAGENET_MEAN.to(images)


class RAE(nn.Module):
    """The paper's autoencoder, frozen: images [B, 3, 256, 256] to latents [B, 256, 768] and back.

    Patches have 14 pixels in the encoder and 16 in the decoder, so images go in at 224 pixels and
    come out at 256: 16 x 16 patches both times. pretrained=False: random weights, no statistics.
    """

    latent_shape = (256, 768)                                                # N, C

    def __init__(self, weights_dir="", pretrained=True):
        super().__init__()
        import timm
        file = str(find_weights("model.safetensors", weights_dir)) if pretrained else ""
        with as_user_error(f"{file} is not DINOv2 with registers"):
            self.encoder = timm.create_model(                # resamples positions, 37 to 16 a side
                "vit_base_patch14_reg4_dinov2.lvd142m", pretrained=pretrained, num_classes=0,
                img_size=224, pretrained_cfg_overlay={"file": file})
        self.encoder.norm = nn.LayerNorm(768, eps=1e-6, elementwise_affine=False)    # as in RAE
        self.decoder = RAEDecoder()
        statistics = {"mean": torch.zeros(768, 1), "var": torch.ones(768, 1)}
        if pretrained:
            load_weights(self.decoder, find_weights("model.pt", weights_dir))
            statistics = read_weights(find_weights("stat.pt", weights_dir))  # [C, 16, 16] or [C]
        with as_user_error("stat.pt holds no mean and var of 768 channels"):
            for name in ("mean", "var"):
                values = statistics[name].float().reshape(768, -1).T         # [N, C] or [1, C]
                self.register_buffer("latent_" + name, values.contiguous())
        self.eval().requires_grad_(False)

    def encode(self, images):
        """Turn images in [0, 1] into latents with mean 0 and variance 1."""
        x = F.interpolate(images, (224, 224), mode="bicubic")                # [B, 3, 224, 224]
        x = (x - IMAGENET_MEAN.to(x)) / IMAGENET_STD.to(x)
        tokens = self.encoder.forward_features(x).float()                    # [B, 5 + N, C]
        z = tokens[:, 5:]                                    # no class token, no registers
        return (z - self.latent_mean) / (self.latent_var + 1e-5).sqrt()

    def decode(self, z):
        """Turn latents into images in [0, 1]."""
        return self.decoder(z * (self.latent_var + 1e-5).sqrt() + self.latent_mean).clamp(0, 1)


def load_autoencoder(name, config=None, pretrained=True):
    """Build "tiny", a TinyRAE of config's sizes that is not trained yet, or "dinov2-b", the paper's
    RAE with the published weights or, with pretrained=False, random ones."""
    config = config or Config()
    if name == "tiny":
        return TinyRAE(config.image_size, config.patch_size, config.latent_channels)
    if name == "dinov2-b":
        return RAE(config.weights_dir, pretrained)
    raise UserError(f"no autoencoder {name}: choose tiny or dinov2-b")


# ---- 5. The sphere -------------------------------------------------------------------------------
#     A latent [N, C] is one vector of L = N C numbers. The sphere has the radius sqrt(L).
#     With so many numbers a random e is nearly orthogonal to v and nearly as long. So the angle
#     from v to f(cos(alpha) v + sin(alpha) e) is alpha, to within a few degrees.

def spherify(z):
    """f(z) = z / sqrt(mean(z^2)), the mean over all but the batch axis: the norm becomes sqrt(L).

    z is [B, ...]; the result is float32 of the same shape. Zero stays zero; 1e-6 under the root, as
    in Sphere Encoder, keeps the gradient there finite.
    """
    return F.rms_norm(z.float(), z.shape[1:], eps=1e-6)


def noisy_spherify(v, e, alpha):
    """f(cos(alpha) v + sin(alpha) e): v at 0, pure noise f(e) at pi/2.

    v and e are [B, ...], alpha is a number or [B], radians. Below pi/2 this equals
    f(v + sigma e) with sigma = tan(alpha), the form of Sphere Encoder's paper.
    """
    alpha = torch.as_tensor(alpha, dtype=torch.float32, device=v.device)
    alpha = alpha.view(-1, *[1] * (v.dim() - 1))             # broadcasts over [B, ...]
    return spherify(alpha.cos() * v.float() + alpha.sin() * e.float())


def angle_between(a, b):
    """Angles [B] between points a and b [B, ...], radians; exact for small angles too."""
    a = spherify(a).flatten(1)
    b = spherify(b).flatten(1)
    return 2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1))


def slerp(a, b, t):
    """Spherical interpolation: the point at the share t (a number or [B]) of the arc from a to b.

    Opposite points have no single arc between them and give 0.
    """
    a, b = spherify(a), spherify(b)
    shape = (-1, *[1] * (a.dim() - 1))                       # broadcasts over [B, ...]
    t = torch.as_tensor(t, dtype=torch.float32, device=a.device).view(shape)
    omega = angle_between(a, b).view(shape)
    on_arc = torch.sin((1 - t) * omega) * a + torch.sin(t * omega) * b
    on_arc = on_arc / omega.clamp(min=1e-3)                  # keeps small angles above eps
    on_line = torch.lerp(a, b, t)                            # for tiny angles on_arc vanishes
    return spherify(torch.where(omega < 1e-3, on_line, on_arc))


def sample_angles(batch, config, generator=None):
    """Draw alpha_small and alpha_large, each [B], radians.

    tan(alpha_small) = s tan(alpha_large), with s uniform from 0 to small_ratio. The paper draws
    noise levels from a logit-normal whose parameters are unknown. In ours, alpha_large / max_angle
    is logit-normal. "uniform-tangent" is Sphere Encoder's: one tangent in each of B intervals.
    """
    device = generator.device if generator is not None else None
    largest = math.radians(config.max_angle)
    if config.noise_distribution == "logit-normal":
        normal = torch.randn(batch, generator=generator, device=device)
        logit = config.noise_mean + config.noise_std * normal
        alpha_large = largest * torch.sigmoid(logit)
    elif config.noise_distribution == "uniform":
        alpha_large = largest * torch.rand(batch, generator=generator, device=device)
    else:                                                    # uniform-tangent
        within_interval = torch.rand(batch, generator=generator, device=device)
        r = (torch.arange(batch, device=device) + within_interval) / batch
        alpha_large = torch.atan(r * math.tan(largest))
    s = config.small_ratio * torch.rand(batch, generator=generator, device=device)
    # = atan(s tan(alpha_large)); at 90 degrees rounding can make the cosine negative
    alpha_small = torch.atan2(s * alpha_large.sin(), alpha_large.cos().clamp(min=0))
    return alpha_small, alpha_large


# ---- 6. The three losses -------------------------------------------------------------------------

def distance(a, b):
    """Mean squared error between latents [B, N, C], smooth L1 between images [B, 3, H, W]."""
    if a.dim() == 4:
        return F.smooth_l1_loss(a.float(), b.float())
    return F.mse_loss(a.float(), b.float())


def reconstruction_loss(z_hat_small, target):
    """Loss 1: from little noise, return to the clean point."""
    return distance(z_hat_small, target)


def consistency_loss(z_hat_large, z_hat_small):
    """Loss 2: from much noise, arrive where little noise arrived.

    No gradient flows to z_hat_small, or the better estimate would be drawn to the worse one.
    """
    return distance(z_hat_large, z_hat_small.detach())


def latent_consistency_loss(v_hat_large, v):
    """Loss 3: from much noise, point where v points: 1 - cosine. No gradient to v.

    It ties the view with much noise to the data itself, in direction alone.
    """
    cosine = (spherify(v_hat_large) * spherify(v.detach())).mean()           # norms are sqrt(L)
    return 1 - cosine


def sphere_losses(decode, encode, v, target, labels, e, alpha_small, alpha_large, config,
                  perceptual=None):
    """The training loss of both papers.

                            decode           encode        v              target
    Sphere Latent Encoder   the denoiser     f             f(z)           z
    Sphere Encoder          its decoder D    f after E     f(E(image))    the image

    v and e are [B, N, C], labels and angles [B]. decode(points, labels) is called once, for both
    views. perceptual(images, images) is a further distance for Sphere Encoder.
    Returns a dict of the losses without their weights, and their weighted sum as "total".
    """
    v_small = noisy_spherify(v, e, alpha_small)                              # [B, N, C]
    v_large = noisy_spherify(v, e, alpha_large)                              # [B, N, C]
    both = decode(torch.cat([v_small, v_large]), labels.repeat(2))           # latents or images
    z_hat_small, z_hat_large = both.chunk(2)
    losses = {
        "reconstruction": reconstruction_loss(z_hat_small, target),
        "consistency": consistency_loss(z_hat_large, z_hat_small),
        "latent_consistency": latent_consistency_loss(encode(z_hat_large), v),
    }
    total = (config.reconstruction_weight * losses["reconstruction"]
             + config.consistency_weight * losses["consistency"]
             + config.latent_consistency_weight * losses["latent_consistency"])
    if perceptual is not None:
        losses["perceptual"] = (perceptual(z_hat_small, target)
                                + perceptual(z_hat_large, z_hat_small.detach()))
        total = total + losses["perceptual"]
    losses["total"] = total
    return losses


# ---- 7. Training ---------------------------------------------------------------------------------

def learning_rate_at(step, steps, largest):
    """Linear warm-up over 50 updates, then constant, then linear decay over the second half."""
    warm_up = (step + 1) / 50
    decay = 2 - 2 * step / steps                             # 1 at half of the steps, then less
    return largest * min(warm_up, 1, decay)


def mirror(images, chosen):
    """Mirror those images [B, 3, H, W] left to right for which chosen [B] is true."""
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(-1), images)


def fit_tiny_rae(autoencoder, images, config):
    """Compute the encoder of a TinyRAE from some images, train its decoder, freeze both.

    The decoder sees noisy latents, because the denoiser's estimates will not be perfect either. Its
    loss is the squared error of the pixels and of the differences between neighbouring pixels. The
    constants (rate, noise, weight 3, clipping) were found by trying on the drawn flowers.
    """
    device, steps = autoencoder.latent_mean.device, config.autoencoder_steps
    autoencoder.pca.fit(random_images(images, config.seed).to(device))
    weights = list(autoencoder.decoder.parameters())
    optimizer = torch.optim.Adam(weights, betas=(0.9, 0.95))
    batches = random_index_batches(len(images), config, 0, steps)
    bar = progress(make_loader(images, batches, device), "decoder", total=steps)
    for step, (x, _) in enumerate(bar):
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, steps, 2e-3)
        generator = seeded_generator(config.seed, step)
        if config.flips:
            x = mirror(x, torch.rand(len(x), generator=generator) < 0.5)     # [B, 3, H, W]
        sigma = 0.25 * torch.randn(len(x), 1, 1, generator=generator).abs()
        noise = sigma * torch.randn(len(x), *autoencoder.latent_shape, generator=generator)
        x, noise = x.to(device), noise.to(device)
        with autocast(device):
            y = autoencoder.decode_unclamped(autoencoder.encode(x) + noise)  # [B, 3, H, W]
        pixels = F.mse_loss(y, x)
        across = F.mse_loss(y.diff(dim=3), x.diff(dim=3))
        down = F.mse_loss(y.diff(dim=2), x.diff(dim=2))
        optimizer.zero_grad()
        (pixels + 3 * across + 3 * down).backward()
        nn.utils.clip_grad_norm_(weights, 0.1)
        optimizer.step()
        if step % 10 == 9:
            bar.set_postfix_str(f"squared error {pixels.item():.5f}")
    return autoencoder.eval().requires_grad_(False)


def file_tensor(path, shape):
    """A float16 tensor whose memory is a file; the file is made if it is not there."""
    numbers = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=torch.float16)
    return numbers.view(shape)


@torch.no_grad()
def write_latents(autoencoder, images, path, shape):
    """Encode images, and their mirror images if shape[0] is 2, into a float16 file of this shape.

    Each process encodes its share. The file gets its name when it is whole.
    """
    device = autoencoder.latent_mean.device
    temporary = path.with_name(path.name + ".part")
    latents = file_tensor(temporary, shape)                                  # [1 or 2, n, N, C]
    batches = index_batches(len(images))
    loader = make_loader(images, batches, device)
    for indices, (x, _) in zip(batches, progress(loader, "encoding", total=len(batches))):
        for view in latents:                                 # 0: as they are, 1: mirrored
            with autocast(device):
                z = autoencoder.encode(x.to(device))                         # [B, N, C]
            view[indices] = z.half().cpu()
            x = x.flip(-1)
    wait_for_all_processes()
    if rank() == 0:
        os.replace(temporary, path)
    wait_for_all_processes()


def encode_images(autoencoder, images, config, folder):
    """Encode every image, and with flips its mirror image. Returns a data set of (latent, label).

    The latents are in a file that all processes share; one that is there already is used. If the
    disk has no room, the images are returned, and the autoencoder runs in every update.
    """
    views = 1 + config.flips
    shape = (views, len(images), *autoencoder.latent_shape)
    path, size = folder / "latents.bin", 2 * math.prod(shape)                # bytes
    if rank() == 0:
        path.with_name("latents.bin.part").unlink(missing_ok=True)           # of an interruption
    wait_for_all_processes()
    is_there = path.exists() and path.stat().st_size == size
    has_room = is_there or size < 0.9 * shutil.disk_usage(folder).free
    if any_process(not has_room):
        say(f"no room in {folder} for {size / 1e9:.1f} GB of latents: the autoencoder will run in "
            "every update, which is slower")
        return images
    if not is_there:
        write_latents(autoencoder, images, path, shape)
    latents = file_tensor(path, shape)
    return TensorDataset(latents.flatten(0, 1), images.labels.repeat(views))


class Objective(nn.Module):
    """Maps a batch to its losses. A module, because DistributedDataParallel wraps only modules."""

    def __init__(self, model, loss_function):
        super().__init__()
        self.model = model                                   # so that its parameters are found
        self.loss_function = loss_function

    def forward(self, *batch):
        return self.loss_function(*batch)


def update(model, objective, optimizer, x, labels, config, step):
    """Make one update from this process's part (x, labels) of a batch. Returns a dict of losses.

    All that is random is drawn for the whole batch: any number of processes gives the same result.
    """
    device = next(model.parameters()).device
    x, labels = x.to(device, non_blocking=True), labels.to(device, non_blocking=True)
    generator = seeded_generator(config.seed, step, device)
    is_mirrored = torch.rand(config.batch_size, generator=generator, device=device) < 0.5
    is_dropped = torch.rand(config.batch_size, generator=generator, device=device) < LABEL_DROPOUT
    alpha_small, alpha_large = sample_angles(config.batch_size, config, generator)
    e = torch.randn(config.batch_size, *model.latent_shape, generator=generator, device=device)
    if x.dim() == 4 and config.flips:                        # images; latents include mirror images
        x = mirror(x, my_part(is_mirrored))
    labels = labels.masked_fill(my_part(is_dropped), model.num_classes)      # for guidance
    batch = (x, labels, my_part(e), my_part(alpha_small), my_part(alpha_large))

    optimizer.zero_grad()
    totals = []
    chunks = [tensor.chunk(config.accumulate) for tensor in batch]
    for i, micro_batch in enumerate(zip(*chunks), 1):
        # DistributedDataParallel exchanges gradients where this is true: in the last part alone
        objective.require_backward_grad_sync = i == config.accumulate
        with autocast(device):
            losses = objective(*micro_batch)
        (losses["total"] / config.accumulate).backward()
        totals.append(torch.stack([loss.detach() for loss in losses.values()]))
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    means = torch.stack(totals).mean(0)
    return {**dict(zip(losses.keys(), means)), "gradient_norm": norm.detach()}


@torch.no_grad()
def update_average(average, model, decay):
    """Update the exponential moving average (EMA) of the weights, which generates the images."""
    for averaged, current in zip(average.parameters(), model.parameters()):
        averaged.lerp_(current, 1 - decay)


def mean_losses(recent):
    """Average dicts of scalars over updates and processes. Returns a dict of floats."""
    table = torch.stack([torch.stack(list(losses.values())) for losses in recent])
    means = sum_over_processes(table.mean(0)) / world_size()
    return dict(zip(recent[0], means.tolist()))


class StopRequest:
    """Ctrl-C, or SIGTERM from a cluster's scheduler: the training loop saves, then stops."""

    def __enter__(self):
        self.received = False
        self.old_handlers = {}                               # only the main thread may set them
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.old_handlers[number] = signal.signal(number, self.receive)
        return self

    def receive(self, number, frame):
        self.received = True

    def __exit__(self, *error):
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)

    def any_process_received(self, done):
        """Several processes ask each other at every tenth update."""
        if world_size() > 1 and done % 10 != 0:
            return False
        return any_process(self.received)


def save_checkpoint(path, state):
    """Write under another name, then rename: at every moment the file is whole, old or new."""
    temporary = path.with_name(path.name + ".part")
    with as_user_error(f"cannot write {path}, the one before it is kept"):
        torch.save(state, temporary)
        os.replace(temporary, path)


def read_checkpoint(path):
    """Read a checkpoint, or that of a run folder, as a dict. Never runs code from the file."""
    path = pathlib.Path(path)
    if path.is_dir():
        path = path / "checkpoint.pt"
    if not path.exists():
        raise UserError(f"no checkpoint {path}; an unfinished run goes on with train --resume RUN")
    state = read_weights(path)
    with as_user_error(f"{path} is not a checkpoint of this program"):
        unknown = set(state["config"]) - {field.name for field in dataclasses.fields(Config)}
        if unknown:
            raise UserError(f"{path} is from another version, with the settings "
                            + ", ".join(sorted(unknown)))
        return {**state, "step": int(state["step"]), "classes": list(state["classes"]),
                "config": Config(**state["config"])}


def write_table(path, rows):
    """Write dicts to a .csv file. A key that a dict lacks leaves an empty cell."""
    names = list(dict.fromkeys(name for row in rows for name in row))        # of all, in order
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def restore(parts, classes, path):
    """Load model, average and optimizer from a checkpoint, if it is there. Returns step and log."""
    if not path.exists():
        return 0, []
    state = read_checkpoint(path)
    if state["classes"] != list(classes):
        raise UserError(f"{path} is of other classes than the images that are there now")
    with as_user_error(f"{path} does not fit this program"):
        for name, part in parts.items():
            part.load_state_dict(state[name])
    return state["step"], state["log"]


def fit(model, loss_function, dataset, classes, config, folder, keep, on_save):
    """The training loop. Goes on from folder/checkpoint.pt if that exists; returns the EMA model.

    loss_function(x, labels, e, alpha_small, alpha_large) returns a dict with "total". keep: further
    entries of the checkpoint. on_save(average, log) is called with every checkpoint.
    """
    device, path = next(model.parameters()).device, folder / "checkpoint.pt"
    say(f"{type(model).__name__}: {sum(p.numel() for p in model.parameters()):,} parameters")
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=device.type != "mps")
    parts = {"model": model, "average": average, "optimizer": optimizer}
    first_step, log = restore(parts, classes, path)
    began = time.time()
    if log:
        began -= log[-1]["seconds"]                          # those of the run so far
    objective = Objective(model, loss_function)
    if world_size() > 1:
        objective = nn.parallel.DistributedDataParallel(objective)
    batches = map(my_part, random_index_batches(len(dataset), config, first_step,
                                                config.train_steps))
    bar = progress(make_loader(dataset, batches, device), config.method, initial=first_step,
                   total=config.train_steps)
    recent, done = [], first_step
    with StopRequest() as stop:
        for step, (x, labels) in enumerate(bar, first_step):
            rate = learning_rate_at(step, config.train_steps, config.learning_rate)
            optimizer.param_groups[0]["lr"] = rate
            recent.append(update(model, objective, optimizer, x, labels, config, step))
            done = step + 1
            early_decay = (1 + done) / (10 + done)           # forgets the random start sooner
            update_average(average, model, min(config.ema_decay, early_decay))

            stopping = stop.any_process_received(done)
            saving = stopping or done % config.save_every == 0 or done == config.train_steps
            if saving or done % 10 == 0:
                means = mean_losses(recent)
                recent = []
                if not math.isfinite(sum(means.values())):
                    raise UserError(f"the loss is not finite near update {done}: lower "
                                    f"--learning-rate; the last checkpoint is kept in {folder}")
                log.append({"step": done, **means, "seconds": time.time() - began})
                bar.set_postfix(reconstruction=f"{means['reconstruction']:.3f}")
            if saving:
                if rank() == 0:
                    state = {name: part.state_dict() for name, part in parts.items()}
                    save_checkpoint(path, {**state, **keep, "step": done, "log": log,
                                           "classes": list(classes), "config": vars(config)})
                    write_table(folder / "log.csv", log)
                wait_for_all_processes()                     # until the checkpoint is written
                on_save(average, log)
            if stopping:
                break
        if any_process(stop.received):                       # perhaps during the last pictures
            raise KeyboardInterrupt(
                f"stopped after update {done} of {config.train_steps}; go on with: "
                f"python sphere_latent.py train --resume {shlex.quote(str(folder))}")
    if first_step == config.train_steps:                     # perhaps stopped before the pictures
        on_save(average, log)
    return average


# ---- 8. Sampling ---------------------------------------------------------------------------------

def guided(network, x, labels, null_label, scale):
    """Classifier-free guidance: network(x, labels), pushed away from network(x, null label)."""
    if scale == 1:
        return network(x, labels).float()
    null_labels = torch.full_like(labels, null_label)
    both = network(torch.cat([x, x]), torch.cat([labels, null_labels])).float()
    conditional, unconditional = both.chunk(2)
    return unconditional + scale * (conditional - unconditional)


def share_noise(noise, share=0.4):
    """Give the noise [steps, B, N, C] of later steps a part of the first step's; variance stays 1.

    share 0: new noise in each step; 1: the same in all, which Sphere Encoder found best. 0.4 is
    ours, found by trying on the drawn flowers.
    """
    later = share * noise[:1] + math.sqrt(1 - share ** 2) * noise[1:]
    return torch.cat([noise[:1], later])


@torch.no_grad()
def sample(denoiser, labels, steps=4, cfg_scale=1.0, largest_tilt=math.pi / 2, noise=None,
           generator=None, return_path=False):
    """Generate latents z [B, N, C] from random points on the sphere: `steps` calls of the denoiser.

    labels [B]; noise [steps, B, N, C], drawn if None. After call k of n the estimate is tilted back
    into noise by (1 - k/n)^0.7 largest_tilt, radians: 74, 55 and 34 degrees for four steps. The
    paper's angles and its noise are unknown; these were found by trying. The last estimate is
    returned as it is, not spherified, as we read the paper's "raw final step".
    return_path: also return all noisy points and estimates, in turn.
    """
    if noise is None:
        noise = share_noise(torch.randn(
            steps, len(labels), *denoiser.latent_shape, generator=generator,
            device=labels.device if generator is None else generator.device))
    noise = noise.to(labels.device)                                          # [steps, B, N, C]
    v, trajectory = spherify(noise[0]), []                                   # [B, N, C]
    for k in range(1, steps + 1):
        z_hat = guided(denoiser, v, labels, denoiser.num_classes, cfg_scale)         # [B, N, C]
        trajectory += [v, z_hat]
        if k < steps:
            alpha = (1 - k / steps) ** 0.7 * largest_tilt
            v = noisy_spherify(spherify(z_hat), noise[k], alpha)             # [B, N, C]
    return (z_hat, trajectory) if return_path else z_hat


def seeded_noise(indices, latent_shape, seed, draws):
    """Noise [draws, B, N, C] for the images with these indices, whatever batch they are in."""
    noise = [torch.randn(draws, *latent_shape, generator=seeded_generator(seed, index))
             for index in indices]
    return torch.stack(noise, dim=1)


@torch.no_grad()
def sample_batches(denoiser, autoencoder, labels, config, steps):
    """Generate an image for each label [n]. Yields (indices, images), this process's part."""
    device, largest_tilt = next(denoiser.parameters()).device, math.radians(config.tilt)
    for indices in index_batches(len(labels)):
        noise = seeded_noise(indices, denoiser.latent_shape, config.seed, steps).to(device)
        y = labels[indices].to(device)
        with autocast(device):
            if config.method == "sphere-encoder":            # the denoiser is that of section 10
                images = denoiser.sample(y, steps, config.cfg_scale, largest_tilt, noise[0])
            else:
                z = sample(denoiser, y, steps, config.cfg_scale, largest_tilt, share_noise(noise))
                images = autoencoder.decode(z)
        if not images.isfinite().all():
            raise UserError("the samples are not finite: the weights of this run are damaged")
        yield indices, images.float().cpu()


def sample_images(denoiser, autoencoder, labels, config, steps):
    """Generate an image for each label [n]. Returns all, [n, 3, H, W], in every process."""
    images = torch.zeros(len(labels), 3, config.image_size, config.image_size)
    for indices, some in sample_batches(denoiser, autoencoder, labels, config, steps):
        images[indices] = some
    return sum_over_processes(images)                        # each drew its part


def balanced_labels(count, num_classes):
    """Return `count` labels spread evenly over the classes, even if they are fewer."""
    if count < num_classes:
        return torch.arange(count) * num_classes // count
    return torch.arange(count) % num_classes


# ---- 9. FID --------------------------------------------------------------------------------------

def frechet_distance(mean_a, cov_a, mean_b, cov_b):
    """Squared Fréchet distance of two Gaussians: |m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)).

    tr (A B)^(1/2) is the sum of the roots of the eigenvalues of A^(1/2) B A^(1/2), which is
    symmetric: no complex numbers appear, and singular covariances are allowed. float64.
    """
    m_a, a, m_b, b = [torch.as_tensor(x).double() for x in (mean_a, cov_a, mean_b, cov_b)]
    values, vectors = torch.linalg.eigh(a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    trace_of_root = torch.linalg.eigvalsh(root_a @ b @ root_a).clamp(min=0).sqrt().sum()
    return float((m_a - m_b).square().sum() + a.trace() + b.trace() - 2 * trace_of_root)


class InceptionFID(nn.Module):
    """Maps images [B, 3, H, W] in [0, 1] to pool features [B, 2048] and logits [B, 1008].

    The network of the original FID: torchvision's Inception v3 with the weights of the TensorFlow
    graph and its peculiarities. There are 1008 outputs, average pools do not count the padding, and
    the last block pools by maximum. weights: a file; None: the published one.
    """

    def __init__(self, weights=None):
        super().__init__()
        from torchvision.models import inception_v3
        self.network = inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
        load_weights(self.network, weights or find_weights(INCEPTION))
        self.fc = self.network.fc
        self.network.fc = nn.Identity()
        for name, block in self.network.named_children():
            if hasattr(block, "branch_pool"):
                self.replace_pool(block, use_maximum=name == "Mixed_7c")
        self.eval().requires_grad_(False)

    @staticmethod
    def replace_pool(block, use_maximum):
        """torchvision calls branch_pool(avg_pool2d(x)). Keep x; give branch_pool our pooling."""
        kept = {}

        def keep_input(block, inputs):
            kept["x"] = inputs[0]

        def pool_again(branch, pooled):
            if use_maximum:
                return F.max_pool2d(kept["x"], 3, stride=1, padding=1)
            return F.avg_pool2d(kept["x"], 3, stride=1, padding=1, count_include_pad=False)

        block.register_forward_pre_hook(keep_input)
        block.branch_pool.register_forward_pre_hook(pool_again)

    def forward(self, images):
        x = F.interpolate(images.float(), (299, 299), mode="bilinear", align_corners=False)
        features = self.network(2 * x - 1)                                   # [B, 2048]
        return features, self.fc(features)


class UntrainedFeatures(nn.Module):
    """Maps images [B, 3, H, W] in [0, 1] to 256 features: convolutions with fixed random weights.

    They need no download and favour no run. Their distance compares runs on the same images and is
    not an FID.
    """

    def __init__(self):
        super().__init__()
        widths = [3, 32, 64, 128, 128]
        self.convs = nn.ModuleList()
        for i in range(4):
            conv = nn.Conv2d(widths[i], widths[i + 1], 4, stride=2, padding=1, bias=False)
            nn.init.orthogonal_(conv.weight, gain=2 ** 0.5, generator=seeded_generator(0, i))
            self.convs.append(conv)

    def forward(self, images):
        x = 2 * F.interpolate(images.float(), (64, 64), mode="bilinear") - 1
        for conv in self.convs:
            x = F.relu(conv(x))                                              # [B, width, H/2, W/2]
        return torch.cat([x.mean((2, 3)), x.std((2, 3))], dim=1), None


@torch.no_grad()
def feature_statistics(network, batches):
    """Return mean and covariance of the features of all images, and the Inception Score.

    batches: this process's part of the images. The score is None for a network without logits. It
    uses logits without bias, as the original does, and all images at once, not ten parts of them.
    """
    device = next(network.parameters()).device
    features, logits = network(torch.zeros(1, 3, 64, 64, device=device))     # to know the sizes
    size, classes = features.shape[1], 0 if logits is None else logits.shape[1]
    n = torch.zeros((), dtype=torch.float64)                 # these five: sums over the images
    first = torch.zeros(size, dtype=torch.float64)
    second = torch.zeros(size, size, dtype=torch.float64)
    p = torch.zeros(classes, dtype=torch.float64)
    entropy = torch.zeros((), dtype=torch.float64)
    for images in batches:
        images = (255 * images.to(device)).round() / 255     # 8 bits, as in image files
        features, logits = network(images)
        features = features.cpu().double()                                   # [B, features]
        n += len(features)
        first += features.sum(0)
        second += features.T @ features
        if logits is not None:
            p_of_image = (logits - network.fc.bias).cpu().double().softmax(1)        # [B, classes]
            p += p_of_image.sum(0)
            entropy += torch.special.entr(p_of_image).sum()
    for total in (n, first, second, p, entropy):
        sum_over_processes(total)
    mean = first / n
    covariance = (second - n * torch.outer(mean, mean)) / (n - 1)
    score = None
    if classes > 0:                                          # exp(H(mean p) - mean H(p))
        score = (torch.special.entr(p / n).sum() - entropy / n).exp().item()
    return mean, covariance, score


def rebuild(autoencoder, x):
    """Encode and decode images [B, 3, H, W]. Returns the results and their PSNR [B], decibels."""
    device = next(autoencoder.parameters()).device
    with torch.no_grad(), autocast(device):
        y = autoencoder.decode(autoencoder.encode(x.to(device))).float().clamp(0, 1).cpu()
    error = (x - y).square().mean((1, 2, 3)).clamp(min=1e-10)
    return y, -10 * error.log10()


STEP_COUNTS = (1, 2, 4, 6)


def evaluate_run(name, run, network, held_out, reference, unit):
    """Yield the rows of the table for one run: rebuilt held-out images, then samples at 1, 2, 4
    and 6 steps. The distance to `reference` is divided by unit."""
    config, autoencoder, denoiser = run
    models = {autoencoder, denoiser}                         # a set: Sphere Encoder is both
    parameters = sum(p.numel() for model in models for p in model.parameters())
    decibels = torch.zeros(1, dtype=torch.float64)           # rebuilt_images adds to it

    def rebuilt_images():
        for x in iterate_images(held_out):
            y, psnr = rebuild(autoencoder, x)
            decibels.add_(psnr.sum())
            yield y

    def measure(kind, batches):
        mean, covariance, score = feature_statistics(network, batches)
        fid = frechet_distance(mean, covariance, *reference) / unit
        return {"run": name, "images": kind, "parameters": parameters, "ms_per_image": "",
                "psnr": "", "inception_score": "" if score is None else f"{score:.2f}",
                "frechet_distance": f"{fid:.4f}"}

    row = measure("rebuilt", rebuilt_images())
    row["psnr"] = f"{sum_over_processes(decibels).item() / len(held_out):.2f}"
    yield row
    labels = balanced_labels(config.eval_samples, denoiser.num_classes)
    sample_images(denoiser, autoencoder, labels[:50], config, 1)             # warm up, not timed
    for steps in STEP_COUNTS:
        began = time.perf_counter()
        sample_images(denoiser, autoencoder, labels[:50], config, steps)
        milliseconds = 1000 * (time.perf_counter() - began) / len(labels[:50])
        batches = sample_batches(denoiser, autoencoder, labels, config, steps)
        what = "1 step" if steps == 1 else f"{steps} steps"
        bar = progress(batches, what, total=len(index_batches(len(labels))), leave=False)
        row = measure(what, (images for _, images in bar))
        row["ms_per_image"] = f"{milliseconds:.1f}"
        yield row


def evaluate(runs):
    """Print a table of runs of one data set, {name: (config, autoencoder, denoiser)}. Returns rows.

    With the paper's autoencoder the distance is FID, to the training images. Otherwise it is in
    untrained features, to the held-out images, in units of their variance.
    """
    config, _, denoiser = next(iter(runs.values()))
    device = next(denoiser.parameters()).device
    kinds = {(c.dataset, c.data_dir, c.image_size, c.uses_rae(), c.eval_samples)
             for c, _, _ in runs.values()}
    if len(kinds) > 1:
        raise UserError("these runs differ in images, autoencoder or --eval-samples: evaluate them "
                        "one by one")
    held_out = load_images(config, "test")
    if config.uses_rae():
        network = InceptionFID(find_weights(INCEPTION, config.weights_dir)).to(device)
        real, unit = load_images(config, "train"), 1.0
        mean, covariance, _ = feature_statistics(network, iterate_images(real))
        say(f"Fréchet distance: FID-{config.eval_samples} to {len(real):,} training images")
        if min(config.eval_samples, len(held_out)) < 2048:
            say("warning: FID is too high for few images, above all for fewer than 2,048")
    else:
        network = UntrainedFeatures().to(device)
        mean, covariance, _ = feature_statistics(network, iterate_images(held_out))
        unit = covariance.trace().clamp(min=1e-9).item()
        say(f"Fréchet distance: in untrained features, {config.eval_samples} samples to "
            f"{len(held_out):,} held-out images, in units of their variance")
    line = "{:20} {:8} {:>12} {:>9} {:>6} {:>16} {:>17}"
    say(line.format("run", "images", "parameters", "ms/image", "PSNR", "Inception Score",
                    "Fréchet distance"))
    rows = []
    for name, run in runs.items():
        for row in evaluate_run(name, run, network, held_out, (mean, covariance), unit):
            say(line.format(*row.values()))
            rows.append(row)
    return rows


# ---- 10. Sphere Encoder --------------------------------------------------------------------------

class SphereEncoder(nn.Module):
    """The predecessor: an encoder E and a decoder D, trained together on pixels.

    E maps an image to a point on the sphere; D maps any point on the sphere, however noisy, to an
    image, and so is the generator. Both get the label. That both start from PCA of patches is ours.
    """

    def __init__(self, config, num_classes):
        super().__init__()
        width, depth, heads = MODEL_SIZES[config.model_size]
        sizes = {"width": width, "depth": depth, "heads": heads, "num_classes": num_classes,
                 "checkpoint_blocks": config.checkpoint_blocks}
        tokens, channels = (config.image_size // config.patch_size) ** 2, config.latent_channels
        self.latent_shape = (tokens, channels)
        self.num_classes = num_classes
        self.pca = PatchPCA(config.image_size, config.patch_size, channels)
        self.encoder = Transformer(tokens, channels, channels, **sizes)
        self.decoder = PixelDecoder(tokens, channels, config.patch_size, **sizes)

    def encode(self, images, labels=None):
        """Return f(E(images)): points on the sphere [B, N, C] for images [B, 3, H, W]."""
        z = self.pca.encode(images)
        return spherify(z + self.encoder(z, labels))

    def decode(self, v, labels=None):
        """Return D(v): images [B, 3, H, W], not clamped, for points on the sphere [B, N, C]."""
        image = self.pca.decode(v)
        return image + self.decoder(v, image, labels).float()

    def losses(self, images, labels, e, alpha_small, alpha_large, config, perceptual=None):
        """Compute sphere_losses with D, E and images in place of the denoiser, f and latents."""
        def encode(x):
            return self.encode(x, labels)

        return sphere_losses(self.decode, encode, encode(images), images, labels, e, alpha_small,
                             alpha_large, config, perceptual)

    @torch.no_grad()
    def sample(self, labels, steps=4, cfg_scale=1.0, angle=math.radians(85), noise=None):
        """Generate images [B, 3, H, W] from random points. E and D both run in every step.

        The first point is f(noise); all steps tilt with the same noise [B, N, C] and angle, which
        its paper found best. Guidance acts on both halves, with the square root of cfg_scale each.
        """
        if noise is None:
            noise = torch.randn(len(labels), *self.latent_shape, device=labels.device)
        null, scale = self.num_classes, math.sqrt(cfg_scale)
        x = guided(self.decode, spherify(noise), labels, null, scale)
        for _ in range(steps - 1):
            v = spherify(guided(self.encode, x, labels, null, scale))
            x = guided(self.decode, noisy_spherify(v, noise, angle), labels, null, scale)
        return x.clamp(0, 1)


class PerceptualDistance(nn.Module):
    """Distance of images [B, 3, H, W] in the features of VGG16 before each of its five poolings."""

    def __init__(self, weights):
        super().__init__()
        from torchvision.models import vgg16
        network = vgg16()
        load_weights(network, weights)
        self.layers = network.features.eval().requires_grad_(False)

    def forward(self, a, b):
        x = torch.cat([a, b])
        x = (x - IMAGENET_MEAN.to(x)) / IMAGENET_STD.to(x)
        total = 0.0
        for layer in self.layers:
            if isinstance(layer, nn.MaxPool2d):
                features_a, features_b = F.normalize(x.float(), dim=1).chunk(2)      # as in LPIPS
                total = total + (features_a - features_b).square().sum(1).mean()
                if x.shape[-1] == 1:                         # 1 x 1 maps cannot be pooled
                    break
            x = layer(x)
        return total


# ---- 11. Figures ---------------------------------------------------------------------------------

def picture(path, rows, row_names, column_names=()):
    """Write a sheet of images: rows is a list of [n, 3, H, W] in [0, 1], with a name for each."""
    if rank() > 0:
        return
    from matplotlib.figure import Figure
    side, columns = rows[0].shape[-1], len(rows[0])
    most = 30_000 // max(columns, len(rows))                 # at most 30,000 pixels a side
    pixels_of_an_image = max(128, min(side, most))           # but 128 for an image in any case
    figure = Figure((columns, len(rows)), dpi=pixels_of_an_image)            # an inch for each
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(rearrange(torch.stack(rows), "r n c h w -> (r h) (n w) c").numpy(), aspect="auto")
    names = []
    for name in (*row_names, *column_names):                 # the font lacks many scripts
        if max(map(ord, name), default=0) > 0x52F:
            name = name.encode("ascii", "backslashreplace").decode()
        names.append(name[:24])
    middles = [side * (n + 0.5) for n in range(len(names))]
    axes.set_yticks(middles[:len(rows)], names[:len(rows)], parse_math=False)
    axes.set_xticks(middles[:len(column_names)], names[len(rows):], parse_math=False)
    axes.tick_params(length=0, labelsize=7, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    figure.savefig(path, format="png", bbox_inches="tight", pad_inches=0.05)


def sample_figure(denoiser, autoencoder, classes, config, path):
    """The same random points after 1, 2, 4 and 6 steps, a class in each column."""
    labels = balanced_labels(12, len(classes))
    rows = [sample_images(denoiser, autoencoder, labels, config, n) for n in STEP_COUNTS]
    picture(path, rows, [f"steps: {n}" for n in STEP_COUNTS], [classes[y] for y in labels])


def reconstruction_figure(autoencoder, images, path):
    """Held-out images, and below them the same images encoded and decoded."""
    count = min(12, len(images))
    some = [images[i * len(images) // count][0] for i in range(count)]
    x = torch.stack(some)                                                    # [count, 3, H, W]
    y, psnr = rebuild(autoencoder, x)
    picture(path, [x, y], ["image", f"rebuilt, {psnr.mean():.1f} dB"])


def loss_figure(log, path):
    """The three losses, unweighted, against the number of updates."""
    if rank() > 0:
        return
    from matplotlib.figure import Figure
    figure = Figure((6, 3.5), dpi=128)
    axes = figure.subplots()
    for name in ("reconstruction", "consistency", "latent_consistency"):
        axes.plot([row["step"] for row in log], [row[name] for row in log], label=name, lw=1)
    axes.set(xlabel="updates", ylabel="loss, unweighted", yscale="log")
    axes.legend(fontsize=8)
    figure.savefig(path, bbox_inches="tight")


# ---- 12. Whole runs, and the command line --------------------------------------------------------

RUN_FILES = ("config.json", "autoencoder.pt", "checkpoint.pt", "latents.bin", "log.csv", "loss.png",
             "samples.png", "reconstructions.png", "evaluation.csv")
CPU_SECONDS_PER_IMAGE = {"tiny": 0.01, "S": 0.2, "B": 2.6, "L": 9.0, "XL": 13.0}     # two cores


def small_command(config):
    """The command that trains on the same images without published weights."""
    command = f"python sphere_latent.py train --dataset {config.dataset} --autoencoder tiny"
    if config.data_dir:
        command += f" --data-dir {shlex.quote(config.data_dir)}"
    return command


def check_inputs(config):
    """Find or download all data and weights before anything long; name all that is missing."""
    problems = []
    advice = "python sphere_latent.py train"                 # the drawn flowers need no files
    if config.dataset != "drawn":
        try:
            find_images(config, "test")                      # it needs the training images too
            advice = small_command(config)
        except UserError as error:
            problems.append(str(error))
    names = [*HUGGING_FACE_FILES, INCEPTION] if config.uses_rae() else []
    for name in names:
        try:
            find_weights(name, config.weights_dir)
        except UserError as error:
            problems.append(f"{error}: put it in a folder and add --weights-dir FOLDER")
    if problems:
        raise UserError(";\n  ".join(problems) + f".\nTo train without these files: {advice}")


def prepare_folder(config, resume, overwrite):
    """Make the run folder, with config.json in it. A run there must be resumed or replaced."""
    folder = pathlib.Path(config.out or f"runs/{config.dataset}").expanduser()
    held = [name for name in RUN_FILES[:3] if (folder / name).exists()]
    if held and not resume and not overwrite:
        name = shlex.quote(str(folder))
        raise UserError(f"{folder} already holds a run: go on with it (train --resume {name}), "
                        "replace it (--overwrite) or choose another folder (--out)")
    folder.mkdir(parents=True, exist_ok=True)
    wait_for_all_processes()                                 # nobody deletes before all have looked
    if rank() == 0:
        if overwrite:
            for name in RUN_FILES:
                (folder / name).unlink(missing_ok=True)
                (folder / (name + ".part")).unlink(missing_ok=True)
        if resume:
            saved = json.loads((folder / "config.json").read_text())
            if saved["data_dir"] != config.data_dir:         # perhaps they are other images
                (folder / "latents.bin").unlink(missing_ok=True)
        (folder / "config.json").write_text(json.dumps(vars(config), indent=1) + "\n")
    wait_for_all_processes()
    return folder


def load_run(path, device="cpu", **changes):
    """Load config, autoencoder and denoiser (averaged weights, eval mode) of a run or checkpoint.

    changes: fields of config to replace. denoiser.classes has the names of the classes. In a run of
    Sphere Encoder one model is both autoencoder and denoiser.
    """
    state = read_checkpoint(path)
    config = dataclasses.replace(state["config"], device=str(device), **changes)
    num_classes = len(state["classes"])
    if config.method == "sphere-encoder":
        autoencoder = denoiser = SphereEncoder(config, num_classes)
    else:
        autoencoder = load_autoencoder(config.autoencoder, config)
        denoiser = denoiser_for(config, autoencoder.latent_shape, num_classes)
    with as_user_error(f"{path} does not fit this program"):
        denoiser.load_state_dict(state["average"])
        if isinstance(autoencoder, TinyRAE):
            autoencoder.load_state_dict(state["autoencoder"])
    denoiser.classes = state["classes"]
    for model in (autoencoder, denoiser):
        model.to(device).eval().requires_grad_(False)
    return config, autoencoder, denoiser


def frozen_autoencoder(config, images, folder, device):
    """The autoencoder of the run in this folder; in a new run RAE, or a TinyRAE trained now."""
    if (folder / "checkpoint.pt").exists():
        return load_run(folder, device)[1]
    torch.manual_seed(config.seed)
    autoencoder = load_autoencoder(config.autoencoder, config).to(device)
    if isinstance(autoencoder, RAE):
        return autoencoder
    path = folder / "autoencoder.pt"
    if rank() == 0 and not path.exists():
        save_checkpoint(path, fit_tiny_rae(autoencoder, images, config).state_dict())
    wait_for_all_processes()
    load_weights(autoencoder, path)
    return autoencoder.eval().requires_grad_(False)


def fit_denoiser(config, autoencoder, images, folder):
    """Encode the images and train a denoiser on the latents. Returns it with averaged weights."""
    latents = encode_images(autoencoder, images, config, folder)
    torch.manual_seed(config.seed)
    denoiser = denoiser_for(config, autoencoder.latent_shape, len(images.classes))
    denoiser.to(next(autoencoder.parameters()).device)
    network = torch.compile(denoiser) if config.compile else denoiser

    def loss_function(x, labels, e, alpha_small, alpha_large):
        if x.dim() == 4:                                     # there was no room for the latents
            with torch.no_grad():
                x = autoencoder.encode(x)
        z = x.float()                                                        # [B, N, C]
        return sphere_losses(network, spherify, spherify(z), z, labels, e, alpha_small, alpha_large,
                             config)

    def draw(average, log):
        sample_figure(average, autoencoder, images.classes, config, folder / "samples.png")
        loss_figure(log, folder / "loss.png")

    keep = {"autoencoder": {}}                               # the published one is not copied
    if isinstance(autoencoder, TinyRAE):
        keep["autoencoder"] = autoencoder.state_dict()
    return fit(denoiser, loss_function, latents, images.classes, config, folder, keep, draw)


def fit_sphere_encoder(config, images, folder, device):
    """Train a SphereEncoder on the images. Returns it with averaged weights."""
    torch.manual_seed(config.seed)
    model = SphereEncoder(config, len(images.classes))
    model.pca.fit(random_images(images, config.seed))
    model.to(device)
    perceptual = None
    if config.dataset != "drawn":                            # drawings are learned offline
        problem = "another process lacks its weights"
        try:
            perceptual = PerceptualDistance(find_weights(VGG, config.weights_dir)).to(device)
        except UserError as error:
            problem = error
        if any_process(perceptual is None):                  # all processes need the same loss
            perceptual = None
            say(f"training without the perceptual distance: {problem}")

    def loss_function(*batch):
        return model.losses(*batch, config, perceptual)

    def draw(average, log):
        sample_figure(average, average, images.classes, config, folder / "samples.png")
        loss_figure(log, folder / "loss.png")

    return fit(model, loss_function, images, images.classes, config, folder, {}, draw)


def train(config, resume=False, overwrite=False):
    """Images in, run folder out: autoencoder, latents, denoiser, pictures, Fréchet distances.

    resume: go on with the run in the folder. overwrite: replace the run in the folder.
    """
    device = find_device(config.device)
    if device.type == "cpu" and config.uses_rae():
        seconds = CPU_SECONDS_PER_IMAGE[config.model_size] * config.train_steps * config.batch_size
        say(f"No GPU found: on a CPU this takes about {seconds / 86_400:,.0f} days. For a CPU: "
            + small_command(config))
    parts = world_size() * config.accumulate
    if config.batch_size % parts != 0:
        raise UserError(f"--batch-size {config.batch_size}: must be a multiple of {parts}, the "
                        "number of processes times --accumulate")
    if rank() == 0:
        check_inputs(config)                                 # one process downloads
    wait_for_all_processes()
    folder = prepare_folder(config, resume, overwrite)
    images, held_out = load_images(config, "train"), load_images(config, "test")
    counts = torch.bincount(images.labels, minlength=len(images.classes)).tolist()
    if 0 in counts:
        raise UserError(f"no image of class {images.classes[counts.index(0)]} can be read")
    say(f"{len(images):,} images to learn and {len(held_out):,} to compare with; device {device}, "
        f"{config.train_steps:,} updates of {config.batch_size} images, folder {folder}")
    shown = [f"{name} {count}" for name, count in zip(images.classes, counts)]
    say(f"{len(shown)} classes: {', '.join(shown[:100])}")
    if config.method == "sphere-encoder":
        autoencoder = denoiser = fit_sphere_encoder(config, images, folder, device)
    else:
        autoencoder = frozen_autoencoder(config, images, folder, device)
        denoiser = fit_denoiser(config, autoencoder, images, folder)
    reconstruction_figure(autoencoder, held_out, folder / "reconstructions.png")
    rows = evaluate({folder.name: (config, autoencoder, denoiser)})
    if rank() == 0:
        write_table(folder / "evaluation.csv", rows)
        (folder / "autoencoder.pt").unlink(missing_ok=True)  # checkpoint.pt holds it as well
        (folder / "latents.bin").unlink(missing_ok=True)
    return folder


def refuse_unused_flags(given, config):
    """Raise UserError for a flag that would have no effect."""
    unused = []
    if config.dataset == "drawn":
        unused += ["data_dir"]
    if config.method == "sphere-encoder":
        unused += ["autoencoder", "autoencoder_steps", "compile"]
    elif config.uses_rae():
        unused += ["patch_size", "latent_channels", "autoencoder_steps"]
    if not config.uses_rae() and (config.method == "sphere-latent" or config.dataset == "drawn"):
        unused += ["weights_dir"]
    if config.noise_distribution != "logit-normal":
        unused += ["noise_mean", "noise_std"]
    for name in unused:
        if name in given:
            raise UserError(f"--{name.replace('_', '-')} has no effect here: leave it out")


def resumed_config(folder, given):
    """Return the settings of a run, updated with the flags in `given`."""
    unwanted = sorted(set(given) - {"train_steps", "data_dir", "device"})
    if unwanted:
        flag = "--" + unwanted[0].replace("_", "-")
        raise UserError(f"{flag} with --resume: a run goes on with its own settings; only "
                        "--train-steps, --data-dir and --device may be new")
    folder = pathlib.Path(folder).expanduser()
    if folder.is_file():                                     # RUN/checkpoint.pt
        folder = folder.parent
    with as_user_error(f"--resume {folder}: no run of this program"):
        saved = json.loads((folder / "config.json").read_text())
        return Config(**{**saved, "out": str(folder), **given})


def train_command(given):
    """Train a model; write its checkpoint, pictures and distances to a run folder.

    The defaults below are those of the drawn flowers. Other data sets have their own; see PRESETS.
    """
    resume = given.pop("resume", None)
    if resume is not None:
        config = resumed_config(resume, given)
        overwrite = False
    else:
        overwrite = given.pop("overwrite", False)
        if "data_dir" in given:
            given.setdefault("dataset", "folder")
        choices = {name: given[name] for name in ("method", "autoencoder") if name in given}
        config = dataclasses.replace(preset(given.get("dataset", "drawn"), **choices), **given)
    refuse_unused_flags(given, config)
    folder = train(config, resume=resume is not None, overwrite=overwrite)
    say(f"look at {folder / 'samples.png'}")


def open_run(path, given):
    """Load a run, with its settings updated by the flags in `given`."""
    changes = {name: value for name, value in given.items() if name != "device"}
    device = find_device(given.get("device", "auto"))
    run = load_run(pathlib.Path(path).expanduser(), device, **changes)
    refuse_unused_flags(given, run[0])
    return run


def class_number(word, classes):
    """Find a label by name or number. Where classes are called by numbers, a number is a name."""
    if word in classes:
        return classes.index(word)
    is_number = word.isdecimal() and len(word) < 10
    if is_number and int(word) < len(classes) and not any(map(str.isdecimal, classes)):
        return int(word)
    more = ", ..." if len(classes) > 40 else ""
    raise UserError(f"--classes {word}: choose from {', '.join(classes[:40])}{more}")


def sample_command(given):
    """Draw images from a checkpoint, a row for each class."""
    path = pathlib.Path(given.pop("checkpoint")).expanduser()
    words, count = given.pop("classes", None), given.pop("count", 8)
    folder = path if path.is_dir() else path.parent
    out = pathlib.Path(given.pop("out", folder / "sampled.png")).expanduser()
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: must be the name of a .png file")
    config, autoencoder, denoiser = open_run(path, given)
    out.parent.mkdir(parents=True, exist_ok=True)
    classes = denoiser.classes
    chosen = sorted(set(balanced_labels(12, len(classes)).tolist()))         # twelve, evenly spread
    if words is not None:
        chosen = [class_number(word, classes) for word in words]
    if not 1 <= count * len(chosen) <= 500:
        raise UserError(f"--count {count}, {len(chosen)} classes: a sheet has room for 500 images")
    labels = torch.tensor(chosen).repeat_interleave(count)
    images = sample_images(denoiser, autoencoder, labels, config, config.steps)
    picture(out, images.split(count), [classes[label] for label in chosen])
    say(str(out))


def evaluate_command(given):
    """Print one table for one or more runs: rebuilt images, then samples at 1, 2, 4 and 6 steps."""
    paths = given.pop("checkpoint")
    evaluate({path: open_run(path, given) for path in paths})


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")


def build_parser():
    """Flags are made from the fields of Config. The result holds only the flags that were given."""
    parser = Parser(prog="sphere_latent.py", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(required=True, metavar="train | sample | evaluate")
    fields = {field.name: field for field in dataclasses.fields(Config)}
    sampling = ["cfg_scale", "tilt", "seed", "device", "weights_dir"]
    flags = {train_command: fields, sample_command: ["steps", *sampling],
             evaluate_command: ["eval_samples", "data_dir", *sampling]}
    for function, names in flags.items():
        command = commands.add_parser(
            function.__name__.removesuffix("_command"), help=function.__doc__.split("\n")[0],
            description=function.__doc__, argument_default=argparse.SUPPRESS, allow_abbrev=False)
        command.set_defaults(function=function)
        for name in names:
            field = fields[name]
            meaning = field.metadata["meaning"]
            if function is not train_command and name != "device":
                meaning += " (default: that of the run)"
            elif field.default != "":
                meaning += f" (default: {field.default})"
            how = {"type": field.type, "choices": field.metadata["options"]}
            if field.type is bool:
                how = {"action": argparse.BooleanOptionalAction}
            command.add_argument("--" + name.replace("_", "-"), help=meaning, **how)
        if function is train_command:
            command.add_argument("--resume", metavar="RUN", help="run folder to go on with")
            command.add_argument("--overwrite", action="store_true", help="replace the run there")
        if function is sample_command:
            command.add_argument("--out", help="picture to write (default: RUN/sampled.png)")
            command.add_argument("--checkpoint", required=True, help="run folder or checkpoint")
            command.add_argument("--classes", nargs="+", help="names or numbers of classes")
            command.add_argument("--count", type=int, help="images of each class (default: 8)")
        if function is evaluate_command:
            command.add_argument("--checkpoint", required=True, nargs="+", help="one or several")
    return parser


def main(argv=None):
    """Run one command. Returns 0, 2 for an error that the user can correct, or 130 for Ctrl-C."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():       # torchrun
        # gloo for tensors on the CPU (sums of losses, flags), nccl for gradients on GPUs
        backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backends, timeout=datetime.timedelta(days=1))
    code = 2                                                 # of all errors but Ctrl-C
    try:
        given = vars(build_parser().parse_args(argv))
        given.pop("function")(given)
        if dist.is_initialized():
            dist.destroy_process_group()
        return 0
    except SystemExit as leaving:                            # argparse, after --help
        return leaving.code or 0
    except KeyboardInterrupt as stopped:
        message = str(stopped) or "stopped; an unfinished training goes on with train --resume RUN"
        code = 130
    except torch.OutOfMemoryError as error:
        message = f"{error}; to train, raise --accumulate or lower --batch-size"
    except (UserError, OSError) as error:
        # an error from a DataLoader worker begins with its traceback
        message = str(error).split("UserError: ")[-1].strip()
    print(f"sphere_latent.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):                   # a notebook's %run has no such stream
        sys.stdout.reconfigure(errors="backslashreplace")    # any name, in any terminal
    signal.signal(signal.SIGTERM, signal.default_int_handler)                # as Ctrl-C
    sys.exit(main())
