"""Sphere Latent Encoder, in one file. (docstring to come)"""
import argparse
import concurrent.futures
import contextlib
import copy
import csv
import dataclasses
import functools
import json
import math
import os
import pathlib
import signal
import sys
import time
import warnings
import zlib

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps
from tqdm import tqdm


class UserError(Exception):
    """Something a person can put right: the command line prints it as one line and exits with 2."""


# ---------------------------------------------------------------------------------------------
# 1. Configuration
# ---------------------------------------------------------------------------------------------

def option(default, text, choices=None):
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


@dataclasses.dataclass
class Config:
    # data
    dataset: str = option("drawn", "what to learn", ("drawn", "folder", "cifar10"))
    data_dir: str = option("data", "where the images are, or are downloaded to")
    image_size: int = option(64, "side of the square images, pixels")
    flips: bool = option(True, "also learn each image mirrored left to right")
    # the frozen autoencoder
    autoencoder: str = option("tiny", "which autoencoder makes the latents", ("tiny",))
    patch_size: int = option(16, "tiny: side of the square that becomes one token, pixels")
    latent_channels: int = option(64, "tiny: channels C of a token")
    autoencoder_width: int = option(256, "tiny: width of its encoder and of its decoder")
    autoencoder_depth: int = option(3, "tiny: blocks in its encoder and in its decoder")
    autoencoder_noise: float = option(0.3, "tiny: the decoder learns under noise of scale |N(0, this)|")
    autoencoder_steps: int = option(1200, "tiny: updates before it is frozen")
    # the denoiser and its losses
    model_size: str = option("tiny", "size of the denoiser", ("tiny", "S", "B", "L", "XL"))
    spherify: bool = option(True, "project latents to the sphere (off: an ablation)")
    noise_distribution: str = option("logit-normal", "how the large angle is drawn",
                                     ("logit-normal", "uniform", "uniform-tangent"))
    noise_mean: float = option(0.0, "logit-normal: mean of the logit")
    noise_std: float = option(1.0, "logit-normal: standard deviation of the logit")
    max_angle: float = option(90.0, "largest angle of noise in training, degrees")
    small_ratio: float = option(0.5, "tan(small angle) = s * tan(large angle), s uniform in 0 to this")
    reconstruction_weight: float = option(1.0, "weight of the reconstruction loss")
    consistency_weight: float = option(1.0, "weight of the consistency loss")
    latent_consistency_weight: float = option(0.1, "weight of the latent consistency loss")
    label_dropout: float = option(0.1, "share of labels replaced by the null label, for guidance")
    # optimisation
    train_steps: int = option(1000, "updates of the denoiser")
    batch_size: int = option(64, "images in an update")
    learning_rate: float = option(1e-3, "AdamW: largest learning rate")
    warmup_steps: int = option(50, "updates until the learning rate is largest")
    ema_decay: float = option(0.995, "decay of the moving average of the weights (0: off)")
    save_every: int = option(500, "updates between checkpoints and sample pictures")
    # sampling and evaluation
    steps: int = option(4, "denoiser steps to make an image")
    cfg_scale: float = option(1.0, "classifier-free guidance; 1 is off")
    tilt: float = option(90.0, "angle of the noise between steps, degrees")
    tilt_schedule: str = option("decaying", "the angle between steps", ("decaying", "fixed"))
    fresh_noise: bool = option(False, "new noise at each step instead of the same")
    eval_samples: int = option(600, "samples behind each Frechet distance")
    # the run
    seed: int = option(0, "seed of everything random")
    device: str = option("auto", "auto (CUDA, then MPS, then CPU), or a torch device")
    out: str = option("", "run folder; empty: runs/DATASET")
    resume: str = option("", "run folder to go on with; needs no other flag")
    overwrite: bool = option(False, "replace the run that --out already holds")
    compile: bool = option(False, "torch.compile the network")


def preset(dataset):
    """The Config that a data set starts from."""
    changes = {"drawn": {}, "folder": {"train_steps": 6000, "autoencoder_steps": 4000},
               "cifar10": {"image_size": 32, "patch_size": 4, "latent_channels": 16, "model_size": "S"}}
    return Config(dataset=dataset, **changes[dataset])


FEW_STEPS = (1, 2, 4, 6)
RUN_FILES = ("checkpoint.pt", "autoencoder.pt", "config.json", "log.csv", "autoencoder_log.csv",
             "frechet.csv", "loss.png", "samples.png", "reconstructions.png")


# ---------------------------------------------------------------------------------------------
# 2. Images
# ---------------------------------------------------------------------------------------------

#    name            petals, roundness, gap, layers, centre, colour at tip, at base, of the centre
SPECIES = (
    ("anemone",        7, 3.0, .45, 1, .26, (.96, .95, .98), (.80, .80, .92), (.13, .11, .30)),
    ("aster",         16, 1.6, .75, 1, .24, (.56, .38, .86), (.45, .26, .72), (.95, .78, .15)),
    ("buttercup",      5, 3.5, .50, 1, .22, (.99, .88, .12), (.95, .72, .05), (.62, .66, .12)),
    ("clematis",       6, 1.2, .72, 1, .16, (.42, .18, .66), (.62, .32, .74), (.95, .93, .72)),
    ("cosmos",         8, 4.0, .55, 1, .20, (.96, .52, .74), (.86, .30, .58), (.96, .80, .20)),
    ("daisy",         13, 1.8, .80, 1, .30, (.99, .99, .97), (.88, .90, .88), (.98, .78, .10)),
    ("forget-me-not",  5, 4.0, .60, 1, .18, (.42, .66, .97), (.62, .80, .99), (.99, .88, .30)),
    ("gerbera",       18, 1.8, .60, 2, .26, (.97, .42, .14), (.88, .25, .10), (.30, .12, .10)),
    ("lily",           6, 1.0, .78, 1, .12, (.98, .62, .22), (.99, .82, .40), (.45, .20, .08)),
    ("poppy",          4, 5.0, .30, 1, .20, (.90, .12, .10), (.62, .05, .08), (.10, .08, .10)),
    ("sunflower",     15, 1.1, .55, 2, .42, (.99, .80, .10), (.95, .60, .05), (.32, .18, .07)),
    ("wild rose",      5, 2.6, .40, 1, .17, (.95, .40, .52), (.99, .86, .84), (.97, .85, .35)),
)
GROUNDS = ((.16, .34, .14), (.34, .52, .22), (.10, .20, .16), (.55, .72, .88),   # leaves, sky,
           (.78, .86, .92), (.46, .38, .28), (.68, .62, .48), (.20, .24, .36))   # soil, dusk


def draw_flowers(labels, size, generator):
    """Draw one flower for each label [B], all else random -> [B, 3, size, size] in [0, 1]."""
    def uniform(low, high, channels=1):
        return low + (high - low) * torch.rand(len(labels), channels, 1, 1, generator=generator)

    def ground():
        return torch.tensor(GROUNDS)[torch.randint(len(GROUNDS), (len(labels),),
                                                   generator=generator)][..., None, None]

    def cover(distance):                                 # from signed distance to opacity
        return (2 * size * distance + 0.5).clamp(0, 1)

    petals, roundness, gap, layers, centre, tip, base, disc = (
        torch.tensor(column)[labels].reshape(len(labels), -1, 1, 1)
        for column in list(zip(*SPECIES))[1:])
    axis = (torch.arange(2 * size) + 0.5) / (2 * size)   # twice the pixels: smooth edges
    y, x = axis[:, None], axis[None, :]
    cx, cy, radius = uniform(.34, .66), uniform(.32, .58), uniform(.24, .38)
    turn, light, lean = uniform(0, 2 * math.pi), uniform(0, 2 * math.pi), uniform(0, math.pi)

    # the ground: a gradient, two soft spots, a stem, the flower's shadow
    angle = uniform(0, 2 * math.pi)
    slope = (.5 + (x - .5) * angle.cos() + (y - .5) * angle.sin()).clamp(0, 1)
    image = torch.lerp(ground(), ground(), slope)
    for _ in range(2):
        spot = ((x - uniform(0, 1)) ** 2 + (y - uniform(0, 1)) ** 2) / uniform(.08, .25) ** 2
        image = torch.lerp(image, ground(), torch.exp(-spot) * uniform(0, .7))
    stem = .013 - (x - cx - uniform(-.6, .6) * (y - cy) ** 2).abs()
    green = torch.tensor([.20, .46, .14]).view(3, 1, 1) + uniform(-.06, .06, 3)
    image = torch.lerp(image, green, cover(stem) * (y > cy))

    # polar coordinates (r, theta) around the centre, seen from the side
    dx, dy, squash = x - cx, y - cy, uniform(.7, 1)
    along = dx * lean.cos() + dy * lean.sin()
    across = (dy * lean.cos() - dx * lean.sin()) / squash
    r, theta = (along ** 2 + across ** 2).sqrt() / radius, torch.atan2(across, along)
    image = image * (1 - .35 * torch.sigmoid(8 * (1 - r)))
    shade = 1 + .22 * (dx * light.cos() + dy * light.sin()) / radius
    tint = 1 + uniform(-.06, .06, 3)
    for layer in range(int(layers.max())):
        u = 2 * torch.remainder((theta - turn) * petals / (2 * math.pi) + .5 * layer, 1) - 1
        edge = (1 - .25 * layer) * (1 - gap * u.abs() ** roundness)      # u in [-1, 1] across a petal
        colour = torch.lerp(base, tip, (r / edge.clamp(min=.1)).clamp(0, 1)) * tint
        colour = colour * shade * (1 - .3 * u ** 2) * (1 + .08 * layer)
        image = torch.lerp(image, colour, cover((edge - r) * radius * squash) * (layers > layer))
    dome = disc * shade * (1.12 - .45 * (r / centre).clamp(0, 1) ** 2)
    image = torch.lerp(image, dome, cover((centre - r) * radius))
    return F.avg_pool2d((image * uniform(.8, 1.15)).clamp(0, 1), 2)


class Images(torch.utils.data.Dataset):
    """Images in memory: pixels [n, 3, H, W] uint8, labels [n]; [i] gives ([3, H, W] in [0, 1], int)."""

    def __init__(self, pixels, labels, classes):
        self.pixels, self.labels, self.classes = pixels, torch.as_tensor(labels), list(classes)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return self.pixels[i] / 255, int(self.labels[i])


def drawn_images(split, size, seed=0):
    """The built-in data: flowers drawn on the fly, all from `seed`; train and test share no drawing."""
    labels = torch.arange({"train": 6000, "test": 1200}[split]) % len(SPECIES)
    generator = torch.Generator().manual_seed(2 * seed + (split == "test"))
    pixels = torch.cat([draw_flowers(part, size, generator).mul(255).round().byte()
                        for part in labels.split(16)])               # 16 at a time fit the cache
    return Images(pixels, labels, [species[0] for species in SPECIES])


def open_image(path, size):
    """Any image file -> uint8 [3, size, size]: upright, on white, shorter side scaled, centre cropped."""
    with warnings.catch_warnings(), Image.open(path) as image:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image.draft("RGB", (2 * size, 2 * size))                     # a JPEG need not be decoded in full
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):                        # 16 and 32 bits a pixel
            grey = np.asarray(image, dtype=np.float32)
            image = Image.fromarray((grey / max(65535 if image.mode != "F" else 1, grey.max()) * 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@functools.lru_cache(maxsize=1)
def folder_images(data_dir, size):
    """Every readable image under data_dir, one class a folder (images alone: one class) -> Images, names."""
    root = pathlib.Path(data_dir)
    if not root.is_dir():
        raise UserError(f"--data-dir {root}: no such folder")
    endings = tuple(Image.registered_extensions())
    def files(folder):
        return sorted(pathlib.Path(at, name) for at, _, names in os.walk(folder) for name in names
                      if name.lower().endswith(endings))
    groups = {folder.name: files(folder) for folder in sorted(root.iterdir()) if folder.is_dir()}
    groups = {name: paths for name, paths in groups.items() if paths}
    if not groups:
        groups = {root.name: files(root)}
    paths = [(path, label) for label, group in enumerate(groups.values()) for path in group]
    pixels, labels, names, unreadable = [], [], [], []

    def read(item):
        try:
            return open_image(item[0], size)
        except Exception as error:                                   # decoders raise anything at all
            return f"{item[0]}: {error}"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for (path, label), image in zip(paths, tqdm(pool.map(read, paths), "reading images", len(paths))):
            if isinstance(image, str):
                unreadable.append(image)
                continue
            pixels.append(image)
            labels.append(label)
            names.append(str(path.relative_to(root)))
    for line in unreadable[:20]:
        print(f"skipped {line}", file=sys.stderr)
    if not pixels or len(unreadable) > 0.01 * len(paths):
        raise UserError(f"{data_dir}: {len(unreadable)} of {len(paths)} images cannot be read"
                        if paths else f"{data_dir}: no images in it")
    return Images(torch.stack(pixels), labels, groups), names


def cifar_images(data_dir, split):
    import torchvision
    try:
        data = torchvision.datasets.CIFAR10(data_dir, train=split == "train", download=True)
    except Exception as error:
        raise UserError(
            f"CIFAR-10 is not in {data_dir} and cannot be downloaded ({error}). Put cifar-10-python.tar.gz "
            f"there by hand, or run without it: python sphere_latent.py train") from None
    return Images(torch.from_numpy(data.data).permute(0, 3, 1, 2), data.targets, data.classes)


def load_images(config, split):
    """-> Images of one split, "train" or "test"; no image is in both. Raises UserError."""
    if split not in ("train", "test"):
        raise ValueError(f"split is 'train' or 'test', not {split!r}")
    if config.dataset == "drawn":
        return drawn_images(split, config.image_size)
    if config.dataset == "cifar10":
        return cifar_images(config.data_dir, split)
    images, names = folder_images(config.data_dir, config.image_size)
    held_out = torch.tensor([zlib.crc32(name.encode()) % 10 == 0 for name in names])
    chosen = (held_out == (split == "test")).nonzero()[:, 0]
    return Images(images.pixels[chosen], images.labels[chosen], images.classes)


# ---------------------------------------------------------------------------------------------
# 3. The transformer
# ---------------------------------------------------------------------------------------------
#     B batch   N tokens   C channels of a token   D width   H heads   K = D / H

class RMSNorm(nn.Module):
    """Divide by the root mean square over the last axis; one learned weight a channel."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), eps=1e-6)


class Block(nn.Module):
    """Attention and MLP, each scaled, shifted and gated by the label (adaLN-Zero)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = RMSNorm(width // heads), RMSNorm(width // heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)

    def attention(self, x):
        q, k, v = (rearrange(f(x), "b n (h k) -> b h n k", h=self.heads) for f in (self.q, self.k, self.v))
        q, k = self.q_norm(q), self.k_norm(k)
        if x.device.type == "cpu" and torch.is_grad_enabled():
            y = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1).to(v.dtype) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.out(rearrange(y, "b h n k -> b n (h k)"))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Transformer(nn.Module):
    """Tokens [B, N, in] and labels [B] -> tokens [B, N, out]."""

    def __init__(self, tokens, in_channels, out_channels, width, depth, heads, num_classes=0):
        super().__init__()
        self.num_classes = num_classes                                   # also the null label
        self.embed = nn.Linear(in_channels, width)
        self.positions = nn.Parameter(sincos_positions(tokens, width), requires_grad=False)
        self.labels = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = RMSNorm(width)
        self.modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, out_channels)
        self.initialise()

    def initialise(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.labels.weight, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.modulation.weight)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.head.weight)

    def forward(self, x, labels=None):
        if labels is None:
            labels = torch.full((len(x),), self.num_classes, device=x.device)
        c = F.silu(self.labels(labels))                                  # [B, D]
        x = self.embed(x) + self.positions                               # [B, N, D]
        for block in self.blocks:
            x = block(x, c)                                              # [B, N, D]
        shift, scale = self.modulation(c)[:, None].chunk(2, dim=-1)      # [B, 1, D] each
        return self.head(self.norm(x) * (1 + scale) + shift)             # [B, N, out]


def sincos_positions(tokens, width):
    """Fixed 2-D sine and cosine position embedding of a square grid [N, D]: half for rows, half for columns."""
    side = math.isqrt(tokens)
    frequency = 1e4 ** -(torch.arange(width // 4) / (width // 4))
    angle = torch.arange(side)[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], dim=-1)                 # [side, D/2]
    return torch.cat([line.repeat(side, 1), line.repeat_interleave(side, 0)], dim=-1)



class Denoiser(Transformer):
    """The Transformer from noisy latents [B, N, C] and labels [B] to clean latents [B, N, C].

    The null label is num_classes. It is not told the noise level: the angle is read from the content.
    """

    def __init__(self, latent_shape, num_classes, width, depth, heads):
        tokens, channels = latent_shape
        super().__init__(tokens, channels, channels, width, depth, heads, num_classes)

    def forward(self, v, labels):
        if labels.device.type == "cpu" and not 0 <= labels.min() <= labels.max() <= self.num_classes:
            raise ValueError(f"labels are 0 to {self.num_classes} (the null label), not {labels.tolist()}")
        return super().forward(v, labels)


MODEL_SIZES = {"tiny": (256, 6, 4), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16),
               "XL": (1152, 28, 16)}                                     # width, depth, heads


def denoiser_for(config, latent_shape, num_classes):
    return Denoiser(latent_shape, num_classes, *MODEL_SIZES[config.model_size])


# ---------------------------------------------------------------------------------------------
# 4. Frozen autoencoders
# ---------------------------------------------------------------------------------------------
#     P numbers in a patch

class TinyRAE(nn.Module):
    """A small autoencoder that is trained first and then frozen, in the place of the paper's RAE.

    Encoder and decoder start as PCA of the patches, the best linear autoencoder, and each learns a
    correction with a transformer whose last layer starts at zero. The decoder is trained on noisy
    latents, as RAE's is, so that it forgives the denoiser's errors.
    """

    def __init__(self, config):
        super().__init__()
        side, p, c = config.image_size // config.patch_size, config.patch_size, config.latent_channels
        self.patch, self.side, self.latent_shape = p, side, (side * side, c)
        width, depth, patch = config.autoencoder_width, config.autoencoder_depth, 3 * p * p
        heads = max(1, width // 64)
        self.encoder = Transformer(side * side, patch, c, width, depth, heads)
        self.decoder = Transformer(side * side, c, patch, width, depth, heads)
        for name, value in (("patch_mean", torch.zeros(patch)), ("patch_scale", torch.ones(patch)),
                            ("patch_basis", torch.eye(patch)), ("mix", torch.eye(c)),
                            ("unmix", torch.eye(c)), ("latent_mean", torch.zeros(1, c)),
                            ("latent_var", torch.ones(1, c))):
            self.register_buffer(name, value)

    def patchify(self, images):
        return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=self.patch, q=self.patch)

    def unpatchify(self, patches):
        return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", p=self.patch, q=self.patch,
                         h=self.side)

    @torch.no_grad()
    def start_from_pca(self, images):
        """Set the linear maps from images [n, 3, H, W]."""
        patches = self.patchify(images).flatten(0, 1)
        variance, basis = torch.linalg.eigh(torch.cov(patches.T))
        order = variance.argsort(descending=True)
        scale = variance[order].clamp(min=1e-5).sqrt()
        # The channels keep part of the natural spectrum (coarse strong, detail weak), spread by a
        # rotation so that normalising each channel does not level it: noise then hides detail first.
        strength = scale[:len(self.mix)].sqrt()
        strength = strength / strength.square().mean().sqrt()
        rotation = torch.linalg.qr(torch.randn(self.mix.shape))[0]
        self.patch_mean.copy_(patches.mean(0))
        self.patch_basis.copy_(basis[:, order])
        self.patch_scale.copy_(scale)
        self.mix.copy_(strength[:, None] * rotation)
        self.unmix.copy_(rotation.T / strength)

    def encode_raw(self, images):
        t = (self.patchify(images) - self.patch_mean) @ self.patch_basis / self.patch_scale   # [B, N, P]
        return spherify(t[..., :len(self.mix)] @ self.mix + self.encoder(t).float())          # [B, N, C]

    def decode_raw(self, z):
        t = self.decoder(z).float()                                                           # [B, N, P]
        t = t + F.pad(z @ self.unmix, (0, t.shape[-1] - z.shape[-1]))
        return self.unpatchify(t * self.patch_scale @ self.patch_basis.T + self.patch_mean)

    def encode(self, images):
        """Images [B, 3, H, W] in [0, 1] -> latents [B, N, C], each channel of mean 0 and variance 1."""
        return (self.encode_raw(images) - self.latent_mean) / (self.latent_var + 1e-5).sqrt()

    def decode(self, z):
        """Latents [B, N, C] -> images [B, 3, H, W] in [0, 1]."""
        return self.decode_raw(z.float() * (self.latent_var + 1e-5).sqrt() + self.latent_mean).clamp(0, 1)


def load_autoencoder(name, config=None, pretrained=True):
    """"tiny" -> TinyRAE of the sizes in config (its weights come from training, none are published)."""
    if name != "tiny":
        raise UserError(f"no autoencoder named {name!r}: the choice is tiny")
    return TinyRAE(config or Config())


# ---------------------------------------------------------------------------------------------
# 5. The sphere
# ---------------------------------------------------------------------------------------------
#     A latent [N, C] is one vector of L = N * C numbers. The sphere has radius sqrt(L).

def spherify(z):
    """f(z): divide by the root mean square over all but the batch axis, so that the norm is sqrt(L).

    z [B, ...] -> fp32, the same shape. The zero latent has no direction: it stays zero, and the 1e-6
    under the root keeps its gradient finite (a new denoiser predicts exactly zero).
    """
    return F.rms_norm(z.float(), z.shape[1:], eps=1e-6)


def per_image(x, like):
    """A number, or one for each image [B], shaped to multiply `like` [B, ...]."""
    x = torch.as_tensor(x, dtype=torch.float32, device=like.device)
    return x.view(-1, *[1] * (like.dim() - 1))


def tilt(v, e, alpha):
    """cos(alpha) v + sin(alpha) e: v, tilted by the angle alpha (a number or [B], radians) towards e."""
    alpha = per_image(alpha, v)
    return alpha.cos() * v.float() + alpha.sin() * e.float()


def noisy_spherify(v, e, alpha):
    """f(cos(alpha) v + sin(alpha) e), which is f(v + tan(alpha) e) but finite up to 90 degrees."""
    return spherify(tilt(v, e, alpha))


def angle_between(a, b):
    """Angles [B] between latents a and b [B, ...], radians: exact for small angles too."""
    a, b = spherify(a).flatten(1), spherify(b).flatten(1)
    return 2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1))


def slerp(a, b, t):
    """Along the great circle from a (t = 0) to b (t = 1), both spherified first; t a number or [B]."""
    a, b = spherify(a), spherify(b)
    t, omega = per_image(t, a), per_image(angle_between(a, b), a)
    weight_a, weight_b = (((1 - t) * omega).sin(), (t * omega).sin())
    return spherify(torch.where(omega < 1e-4, torch.lerp(a, b, t), weight_a * a + weight_b * b))


def sample_angles(batch, config, generator=None):
    """-> alpha_small, alpha_large, each [B], radians; tan(alpha_small) = s tan(alpha_large)."""
    device = generator.device if generator is not None else "cpu"
    largest = math.radians(config.max_angle)
    if config.noise_distribution == "logit-normal":
        logit = config.noise_mean + config.noise_std * torch.randn(
            batch, generator=generator, device=device)
        alpha_large = largest * logit.sigmoid()
    else:
        u = torch.rand(batch, generator=generator, device=device)
        alpha_large = (largest * u if config.noise_distribution == "uniform" else
                       torch.atan(u * math.tan(largest)))
    s = config.small_ratio * torch.rand(batch, generator=generator, device=device)
    return torch.atan2(s * alpha_large.sin(), alpha_large.cos()), alpha_large


# ---------------------------------------------------------------------------------------------
# 6. The three losses
# ---------------------------------------------------------------------------------------------

def distance(a, b):
    """Mean squared error between latents [B, N, C], smooth L1 between images [B, 3, H, W]."""
    return F.smooth_l1_loss(a.float(), b.float()) if a.dim() == 4 else F.mse_loss(a.float(), b.float())


def reconstruction_loss(z_hat_small, target):
    return distance(z_hat_small, target)


def consistency_loss(z_hat_large, z_hat_small):
    return distance(z_hat_large, z_hat_small.detach())


def latent_consistency_loss(v_hat_large, v):
    return 1 - (spherify(v_hat_large) * spherify(v.detach())).mean()


def sphere_losses(decode, encode, v, target, labels, e, alpha_small, alpha_large, config):
    noisy = noisy_spherify if config.spherify else tilt
    views = torch.cat([noisy(v, e, alpha_small), noisy(v, e, alpha_large)])     # [2B, N, C]
    out_small, out_large = decode(views, labels.repeat(2)).chunk(2)
    losses = {"reconstruction": reconstruction_loss(out_small, target),
              "consistency": consistency_loss(out_large, out_small),
              "latent_consistency": latent_consistency_loss(encode(out_large), v)}
    losses["total"] = sum(getattr(config, f"{name}_weight") * loss for name, loss in losses.items())
    return losses


# ---------------------------------------------------------------------------------------------
# 7. Training
# ---------------------------------------------------------------------------------------------

def resolve_device(name):
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else
                        "mps" if torch.backends.mps.is_available() else "cpu")


def autocast(device):
    """bf16 where the hardware multiplies it faster than fp32; elsewhere nothing."""
    pays = (torch.cuda.is_bf16_supported() if device.type == "cuda" else device.type == "cpu" and
            (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()))
    return torch.autocast(device.type, torch.bfloat16, enabled=pays)


def step_generator(seed, step, device="cpu"):
    """All randomness of one update comes from (seed, step): a resumed run needs no saved state."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + step)


def save_checkpoint(path, state):
    """Write beside `path`, then rename: a reader finds the old file or the new one, never half of one."""
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_checkpoint(path, device="cpu"):
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        state["step"], state["config"]
        return state
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}") from None
    except Exception as error:
        raise UserError(f"{path} is damaged, or no checkpoint of this program "
                        f"({type(error).__name__})") from None


@contextlib.contextmanager
def deferred_interrupt():
    """Turn Ctrl-C into an entry of the yielded list, so that an update is never cut in two."""
    asked = []
    try:
        previous = signal.signal(signal.SIGINT, lambda *_: asked.append("interrupt"))
    except ValueError:                                   # not the main thread: leave Ctrl-C alone
        yield asked
        return
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, previous)


def optimise(model, losses_of, steps, config, path, name, keep, on_save=None):
    """The one training loop, for the autoencoder and for the denoiser -> the averaged model.

    losses_of(step) gives a dict of scalars with a "total". The state lies at `path`, together with
    the entries of `keep`; if it is there already, training goes on from it.
    """
    device = next(model.parameters()).device
    average = copy.deepcopy(model).eval().requires_grad_(False)
    weights = [p for p in model.parameters() if p.requires_grad]
    averaged = [a for a, p in zip(average.parameters(), model.parameters()) if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, config.learning_rate, betas=(0.9, 0.95), weight_decay=0,
                                  fused=device.type in ("cpu", "cuda"))
    log, step, sums, began = path.with_name(f"{name}log.csv"), 0, {}, time.time()
    if path.exists():
        state = read_checkpoint(path, device)
        for part, key in ((model, "model"), (average, "ema"), (optimiser, "optimiser")):
            part.load_state_dict(state[key])
        step = state["step"]
    truncate_log(log, step)

    def save():
        save_checkpoint(path, {"step": step, "config": dataclasses.asdict(config), **keep,
                               "model": model.state_dict(), "ema": average.state_dict(),
                               "optimiser": optimiser.state_dict()})
        if on_save:
            on_save(average, step)

    with deferred_interrupt() as asked, tqdm(total=steps * config.batch_size, unit="img", unit_scale=True,
                                             initial=step * config.batch_size, desc=name or "denoiser") as bar:
        while step < steps and not asked:
            for group in optimiser.param_groups:
                group["lr"] = config.learning_rate * schedule(step, steps, config.warmup_steps)
            losses = losses_of(step)
            optimiser.zero_grad(set_to_none=True)
            losses["total"].backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimiser.step()
            step += 1
            decay = min(config.ema_decay, (1 + step) / (10 + step))      # short memory at first
            torch._foreach_lerp_(averaged, weights, 1 - decay)
            sums = {key: sums.get(key, 0) + value.detach() for key, value in losses.items()}
            bar.update(config.batch_size)
            if step % 10 == 0 or step == steps or asked:
                count = (step - 1) % 10 + 1
                means = {key: float(value) / count for key, value in sums.items()}
                sums = {}
                if not math.isfinite(means["total"]):
                    raise UserError(f"the loss is not finite near step {step}; the last good checkpoint "
                                    f"is kept. Try a smaller --learning-rate")
                append_log(log, {"step": step, **means, "seconds": time.time() - began})
                bar.set_postfix({key: f"{value:.3f}" for key, value in means.items() if key != "total"})
            if step % config.save_every == 0 or step == steps or asked:
                save()
    if asked:
        raise KeyboardInterrupt
    return average


def schedule(step, steps, warmup):
    """Share of the learning rate: linear warm-up, constant, linear decay over the last half."""
    return min(1, (step + 1) / max(1, warmup), 2 * (1 - step / steps))


def append_log(path, row):
    fresh = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if fresh:
            writer.writeheader()
        writer.writerow({key: f"{value:.6g}" for key, value in row.items()})


def truncate_log(path, step):
    """Drop the rows after `step`, which a broken run wrote after its last checkpoint."""
    if path.exists():
        header, *rows = path.read_text().splitlines()
        kept = [row for row in rows if float(row.split(",")[0]) <= step]
        path.write_text("\n".join([header, *kept]) + "\n")


def pixel_batch(images, chosen, device):
    return images.pixels[chosen].to(device, non_blocking=True) / 255                # [B, 3, H, W]


def fit_autoencoder(config, images, folder, device):
    """Train TinyRAE on `images`, measure the mean and variance of its latents, freeze it."""
    torch.manual_seed(config.seed)
    autoencoder = load_autoencoder("tiny", config)
    some = torch.randperm(len(images), generator=step_generator(config.seed, 0))[:2000]
    autoencoder.start_from_pca(pixel_batch(images, some, "cpu"))
    autoencoder.to(device)

    def losses_of(step):
        generator = step_generator(config.seed, step)
        x = pixel_batch(images, torch.randint(len(images), (config.batch_size,), generator=generator), device)
        if config.flips:
            x = torch.where(torch.rand(len(x), 1, 1, 1, generator=generator).to(device) < 0.5, x.flip(3), x)
        with autocast(device):
            z = autoencoder.encode_raw(x)
            sigma = config.autoencoder_noise * torch.randn(len(z), 1, 1, generator=generator).abs()
            y = autoencoder.decode_raw(z + (sigma * torch.randn(z.shape, generator=generator)).to(device))
        losses = {"pixels": F.l1_loss(y, x),
                  "edges": F.l1_loss(y.diff(dim=2), x.diff(dim=2)) + F.l1_loss(y.diff(dim=3), x.diff(dim=3))}
        return {**losses, "total": sum(losses.values())}

    autoencoder = optimise(autoencoder, losses_of, config.autoencoder_steps, config,
                           folder / "autoencoder.pt", "autoencoder_", {"classes": images.classes})
    z, _ = encode_all(autoencoder, images, dataclasses.replace(config, flips=False), device)
    autoencoder.latent_mean.copy_(z.mean((0, 1))[None])
    autoencoder.latent_var.copy_(z.var((0, 1))[None])
    return autoencoder


@torch.no_grad()
def encode_all(autoencoder, images, config, device):
    """Encode once what training will read many times -> latents [n, N, C] and labels [n], in memory."""
    latents = []
    with autocast(device):
        for mirrored in ((False, True) if config.flips else (False,)):
            for chosen in torch.arange(len(images)).split(256):
                x = pixel_batch(images, chosen, device)
                latents.append(autoencoder.encode(x.flip(3) if mirrored else x).float().cpu())
    return torch.cat(latents), images.labels.repeat(2 if config.flips else 1)


def fit_denoiser(config, latents, labels, autoencoder, classes, folder, device):
    torch.manual_seed(config.seed)
    denoiser = denoiser_for(config, autoencoder.latent_shape, len(classes)).to(device)
    network = torch.compile(denoiser) if config.compile else denoiser

    def decode(v, y):
        with autocast(device):
            return network(v, y).float()

    def losses_of(step):
        generator = step_generator(config.seed, step)
        chosen = torch.randint(len(latents), (config.batch_size,), generator=generator)
        z, y = latents[chosen].to(device), labels[chosen].to(device)
        dropped = torch.rand(len(y), generator=generator) < config.label_dropout
        y = y.masked_fill(dropped.to(device), denoiser.num_classes)
        e = torch.randn(z.shape, generator=generator).to(device)
        angles = (alpha.to(device) for alpha in sample_angles(len(z), config, generator))
        project = spherify if config.spherify else (lambda z: z)
        return sphere_losses(decode, project, project(z), z, y, e, *angles, config)

    keep = {"autoencoder": autoencoder.state_dict(), "classes": classes}
    return optimise(denoiser, losses_of, config.train_steps, config, folder / "checkpoint.pt", "", keep,
                    lambda model, step: sample_figure(model, autoencoder, classes, config, folder / "samples.png"))


def train(config):
    """Images in, run folder out: autoencoder, latents, denoiser, pictures, Frechet distances."""
    folder, config = open_run(config)
    device = resolve_device(config.device)
    images = load_images(config, "train")
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        autoencoder = load_autoencoder(config.autoencoder, config)
        autoencoder.load_state_dict(read_checkpoint(checkpoint)["autoencoder"])
        autoencoder.to(device).eval().requires_grad_(False)
    else:
        autoencoder = fit_autoencoder(config, images, folder, device)
    reconstruction_figure(autoencoder, load_images(config, "test"), folder / "reconstructions.png")
    latents, labels = encode_all(autoencoder, images, config, device)
    denoiser = fit_denoiser(config, latents, labels, autoencoder, images.classes, folder, device)
    (folder / "autoencoder.pt").unlink(missing_ok=True)
    loss_figure(folder)
    evaluate_run(config, autoencoder, denoiser, images.classes, folder / "frechet.csv")
    return folder


def open_run(config):
    """-> run folder, config. A run that is there already is neither lost nor taken for another."""
    if config.resume:
        folder = pathlib.Path(config.resume)
        found = [path for path in (folder / "checkpoint.pt", folder / "autoencoder.pt") if path.exists()]
        if not found:
            raise UserError(f"nothing to resume: no checkpoint in {folder}")
        return folder, dataclasses.replace(Config(**read_checkpoint(found[0])["config"]), resume=config.resume)
    folder = pathlib.Path(config.out or f"runs/{config.dataset}")
    held = [path for name in RUN_FILES if (path := folder / name).exists()]
    if held and not config.overwrite:
        raise UserError(f"{folder} already holds a run: continue it with --resume {folder}, replace it "
                        f"with --overwrite, or choose another --out")
    for path in held:
        path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n")
    return folder, config


# ---------------------------------------------------------------------------------------------
# 8. Sampling
# ---------------------------------------------------------------------------------------------

def tilt_angles(steps, angle, schedule):
    """The angles, radians, by which the point is tilted back before steps 2, 3, ..."""
    return [angle if schedule == "fixed" else angle * (1 - k / steps) for k in range(1, steps)]


@torch.no_grad()
def sample(denoiser, labels, steps=4, cfg_scale=1.0, angle=math.pi / 2, schedule="decaying",
           fresh_noise=False, sphere=True, e=None, generator=None, return_path=False):
    project = spherify if sphere else (lambda z: z)

    def denoise(v):
        if cfg_scale == 1:
            return denoiser(v, labels)
        null = torch.full_like(labels, denoiser.num_classes)
        z, z_null = denoiser(v.repeat(2, 1, 1), torch.cat([labels, null])).chunk(2)
        return z_null + cfg_scale * (z - z_null)
    v = project(e)
    z = denoise(v)
    for a in tilt_angles(steps, angle, schedule):
        if fresh_noise:
            e = torch.randn(e.shape, generator=generator)
        v = project(tilt(project(z), e, a))
        z = denoise(v)
    return z


def seeded_noise(count, latent_shape, seed):
    """Noise [count, N, C]: number i depends on the seed and i alone, not on how many are asked for."""
    return torch.stack([torch.randn(latent_shape, generator=step_generator(seed, i)) for i in range(count)])


@torch.no_grad()
def sample_images(denoiser, autoencoder, labels, e, config, steps=None, batch=100):
    """Sample with the settings of `config` and decode once: labels [n], e [n, N, C] -> [n, 3, H, W]."""
    device = next(denoiser.parameters()).device
    images = []
    for start in range(0, len(labels), batch):
        part = slice(start, start + batch)
        with autocast(device):
            z = sample(denoiser, labels[part].to(device), steps or config.steps, config.cfg_scale,
                       math.radians(config.tilt), config.tilt_schedule, config.fresh_noise,
                       config.spherify, e[part].to(device))
            images.append(autoencoder.decode(z).float().cpu())
    return torch.cat(images)


# ---------------------------------------------------------------------------------------------
# 9. Evaluation
# ---------------------------------------------------------------------------------------------

def frechet_distance(mean_a, cov_a, mean_b, cov_b):
    """Squared Frechet distance between two Gaussians: |m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)).

    tr (A B)^(1/2) is the sum of the square roots of the eigenvalues of A^(1/2) B A^(1/2), which is
    symmetric: no complex numbers, singular covariances allowed.
    """
    mean_a, cov_a, mean_b, cov_b = (torch.as_tensor(x, dtype=torch.float64) for x in (mean_a, cov_a, mean_b, cov_b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def gaussian(features):
    """Features [n, F] -> mean [F], covariance [F, F], float64."""
    features = features.double()
    return features.mean(0), torch.cov(features.T)


@torch.no_grad()
def latent_features(autoencoder, images):
    """Mean and standard deviation over the tokens of the latents of images [n, 3, H, W] -> [n, 2C]."""
    device = autoencoder.latent_mean.device
    features = []
    for x in images.split(100):
        z = autoencoder.encode(x.to(device)).float().cpu()
        features.append(torch.cat([z.mean(1), z.std(1)], dim=1))
    return torch.cat(features)


def evaluate_run(config, autoencoder, denoiser, classes, path):
    """Print, and write to `path`, the Frechet distance to held-out images at 1, 2, 4 and 6 steps."""
    real = load_images(config, "test")
    reference = gaussian(latent_features(autoencoder, real.pixels / 255))
    labels = torch.arange(config.eval_samples) % len(classes)
    e = seeded_noise(len(labels), autoencoder.latent_shape, config.seed)
    print(f"Fréchet distance in the latents of the frozen autoencoder ({config.autoencoder}), "
          f"{len(labels)} samples against {len(real)} held-out images:")
    lines = ["steps,frechet_distance"]
    for steps in FEW_STEPS:
        images = sample_images(denoiser, autoencoder, labels, e, config, steps)
        distance = frechet_distance(*gaussian(latent_features(autoencoder, images)), *reference)
        print(f"{steps:6d} step{'s' if steps > 1 else ' '}   Fréchet distance {distance:.3f}")
        lines.append(f"{steps},{distance:.6g}")
    path.write_text("\n".join(lines) + "\n")


# ---------------------------------------------------------------------------------------------
# 10. Figures
# ---------------------------------------------------------------------------------------------

def picture(path, rows, row_names, column_names=None, title=""):
    """A picture of images: rows is a list of [n, 3, H, W] in [0, 1], one name a row, one a column."""
    from matplotlib.figure import Figure
    side, columns = rows[0].shape[-1], len(rows[0])
    sheet = rearrange(torch.stack([row.cpu() for row in rows]), "r n c h w -> (r h) (n w) c").numpy()
    figure = Figure((1.0 * columns + 1.2, 1.0 * len(rows) + 0.7), dpi=128)
    axes = figure.add_axes((1.1 / figure.get_figwidth(), 0.02, 1 - 1.2 / figure.get_figwidth(),
                            1 - 0.62 / figure.get_figheight()))
    axes.imshow(sheet, interpolation="nearest", aspect="auto")
    axes.set_yticks([side * (r + 0.5) for r in range(len(rows))], row_names)
    axes.set_xticks([side * (n + 0.5) for n in range(columns)], column_names or [""] * columns)
    axes.tick_params(length=0, labelsize=7, labeltop=True, labelbottom=False)
    axes.set_title(title, fontsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def sample_figure(denoiser, autoencoder, classes, config, path):
    """The same noise after 1, 2, 4 and 6 steps, a class a column."""
    columns = min(12, max(8, len(classes)))
    labels = torch.arange(columns) % len(classes)
    e = seeded_noise(columns, autoencoder.latent_shape, config.seed)
    rows = [sample_images(denoiser, autoencoder, labels, e, config, steps) for steps in FEW_STEPS]
    picture(path, rows, [f"{steps} step{'s' * (steps > 1)}" for steps in FEW_STEPS],
            [classes[y] for y in labels])


def reconstruction_figure(autoencoder, images, path):
    """Held-out images above what the autoencoder makes of them -> mean PSNR, decibels."""
    device = autoencoder.latent_mean.device
    chosen = torch.linspace(0, len(images) - 1, min(len(images), 64)).long()
    x = images.pixels[chosen] / 255
    with torch.no_grad(), autocast(device):
        y = autoencoder.decode(autoencoder.encode(x.to(device))).float().cpu()
    psnr = float(-10 * (x - y).square().mean((1, 2, 3)).clamp(min=1e-10).log10().mean())
    names = [images.classes[int(y)] for y in images.labels[chosen[:12]]]
    picture(path, [x[:12], y[:12]], ["image", "rebuilt"], names, f"PSNR {psnr:.1f} dB")
    return psnr


def loss_figure(folder):
    """loss.png: the three unweighted losses against updates, from log.csv."""
    from matplotlib.figure import Figure
    with open(folder / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure((6, 3.5), dpi=128)
    axes = figure.subplots()
    for name in ("reconstruction", "consistency", "latent_consistency"):
        axes.plot([float(row["step"]) for row in rows], [float(row[name]) for row in rows],
                  label=name.replace("_", " "), linewidth=1)
    axes.set(xlabel="updates", ylabel="unweighted loss", yscale="log")
    axes.legend(fontsize=8)
    figure.savefig(folder / "loss.png", bbox_inches="tight")


# ---------------------------------------------------------------------------------------------
# 11. Command line
# ---------------------------------------------------------------------------------------------

def build_parser():
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UserError(f"{message} (see {self.prog} --help)")

    parser = Parser(prog="sphere_latent.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    fields = {field.name: field for field in dataclasses.fields(Config)}

    def add(name, help, names):
        command = commands.add_parser(name, help=help, description=help, allow_abbrev=False,
                                      argument_default=argparse.SUPPRESS)
        for field in (fields[n] for n in names):
            kind = {"type": field.type}
            if field.type is bool:
                kind = {"action": argparse.BooleanOptionalAction}
            elif field.metadata["choices"]:
                kind = {"choices": field.metadata["choices"]}
            default = "" if field.default == "" else f" (default: {field.default})"
            command.add_argument("--" + field.name.replace("_", "-"), help=field.metadata["help"] + default, **kind)
        return command

    sampling = ["cfg_scale", "tilt", "tilt_schedule", "fresh_noise", "seed", "device"]
    add("train", "learn the autoencoder and the denoiser, then draw and measure samples", fields)
    draw = add("sample", "draw images from a checkpoint", ["steps", *sampling])
    draw.add_argument("--classes", nargs="+", help="classes to draw, by name or number (default: all)")
    draw.add_argument("--count", type=int, help="images of each class (default: 8)")
    measure = add("evaluate", "Frechet distance of a checkpoint at 1, 2, 4 and 6 steps", ["eval_samples", *sampling])
    rebuild = add("reconstruct", "show images beside what the autoencoder makes of them", ["device"])
    for command, out in ((draw, "samples.png"), (measure, "evaluation.csv"), (rebuild, "reconstructions.png")):
        command.add_argument("--checkpoint", required=True, help="run folder or checkpoint file")
        command.add_argument("--out", help=f"file to write (default: {out} in the run folder)")
    return parser


def load_run(path, device="cpu"):
    """A run folder or checkpoint file -> config, autoencoder, denoiser (averaged weights, eval mode)."""
    path = pathlib.Path(path)
    state = read_checkpoint(path / "checkpoint.pt" if path.is_dir() else path, device)
    config = Config(**state["config"])
    autoencoder = load_autoencoder(config.autoencoder, config)
    denoiser = denoiser_for(config, autoencoder.latent_shape, len(state["classes"]))
    denoiser.classes = state["classes"]
    for model, key in ((autoencoder, "autoencoder"), (denoiser, "ema")):
        model.load_state_dict(state[key])
        model.to(device).eval().requires_grad_(False)
    return config, autoencoder, denoiser


def open_checkpoint(given, default_out):
    """-> config with the given flags, autoencoder, denoiser, where to write."""
    checkpoint, out = pathlib.Path(given.pop("checkpoint")), given.pop("out", None)
    config, autoencoder, denoiser = load_run(checkpoint, resolve_device(given.get("device", "auto")))
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    return dataclasses.replace(config, **given), autoencoder, denoiser, pathlib.Path(out or folder / default_out)


def train_command(given):
    config = dataclasses.replace(preset(given.get("dataset", "drawn")), **given)
    print(f"done: look into {train(config)}")


def sample_command(given):
    wanted, count = given.pop("classes", None), given.pop("count", 8)
    config, autoencoder, denoiser, out = open_checkpoint(given, "samples.png")
    chosen = [class_index(name, denoiser.classes) for name in wanted or denoiser.classes]
    labels = torch.tensor(chosen).repeat_interleave(count)
    e = seeded_noise(len(labels), autoencoder.latent_shape, config.seed)
    images = sample_images(denoiser, autoencoder, labels, e, config)
    picture(out, images.split(count), [denoiser.classes[y] for y in chosen])
    print(out)


def class_index(name, classes):
    if name in classes:
        return classes.index(name)
    if name.isdecimal() and int(name) < len(classes):
        return int(name)
    raise UserError(f"--classes {name}: the classes are 0 to {len(classes) - 1}: {', '.join(classes)}")


def evaluate_command(given):
    config, autoencoder, denoiser, out = open_checkpoint(given, "frechet.csv")
    evaluate_run(config, autoencoder, denoiser, denoiser.classes, out)


def reconstruct_command(given):
    config, autoencoder, _, out = open_checkpoint(given, "reconstructions.png")
    psnr = reconstruction_figure(autoencoder, load_images(config, "test"), out)
    print(f"{out}: PSNR {psnr:.2f} dB on held-out images")


def main(argv=None):
    """Run one command -> exit code: 0, 2 for what a person can put right, 130 for Ctrl-C."""
    try:
        given = vars(build_parser().parse_args(argv))
        {"train": train_command, "sample": sample_command, "evaluate": evaluate_command,
         "reconstruct": reconstruct_command}[given.pop("command")](given)
        return 0
    except UserError as error:
        print(f"sphere_latent.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"\nsphere_latent.py: stopped. {interrupt}", file=sys.stderr)
        return 130
    except SystemExit as asked:                          # --help
        return asked.code or 0


if __name__ == "__main__":
    sys.exit(main())
