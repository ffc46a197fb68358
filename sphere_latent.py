"""Sphere Latent Encoder (SLE) in one file: images from random points on a sphere, in a few steps.

The method, after "Efficient Image Synthesis with Sphere Latent Encoder" (arXiv 2605.15592):
  1. A frozen autoencoder turns an image into a latent z of N tokens with C channels.
  2. Spherify, f(z): divide by the root mean square. Every v = f(z) then has the norm sqrt(N C).
  3. Noise e ~ N(0, I) tilts v by an angle alpha: f(cos(alpha) v + sin(alpha) e). Two views share
     one e: v_small at a small angle, v_large at a large one.
  4. A transformer, the denoiser, goes from a noisy point back to z_hat. It has three losses:
       reconstruction      z_hat_small is z                      (little noise: come back)
       consistency         z_hat_large is z_hat_small            (much noise: land where little did)
       latent consistency  f(z_hat_large) points where v points  (1 - cosine)
  5. To draw an image: v = f(e), z_hat = denoise(v); then, for each further step, tilt f(z_hat)
     back into noise, by a smaller angle each time, and denoise again. Decode the last z_hat, once.

Sphere Encoder, the predecessor (arXiv 2602.15030), has the same losses and no frozen autoencoder:
its encoder and decoder learn together, on pixels, and both run in every step. It is here as well,
as the baseline: sphere_losses, fit_denoiser and sample serve both, SphereEncoder is its model.

Commands, from the smallest:
  python sphere_latent.py train                                  5 to 18 minutes, two cores, offline
  python sphere_latent.py sample --checkpoint runs/drawn --classes poppy daisy --out flowers.png
  python sphere_latent.py evaluate --checkpoint runs/drawn
  python sphere_latent.py train --method sphere-encoder --out runs/pixels    the predecessor
  python sphere_latent.py train --dataset folder --data-dir PATH             your own images
  python sphere_latent.py train --dataset flowers                            the paper's setting
  torchrun --nproc-per-node 8 sphere_latent.py train --dataset imagenet

This file alone runs the default. What that does not need is in extras.py beside it: images and
networks of others, with the paper's RAE; FID, latents on disk, edit and reconstruct.

Contents: 1 Configuration, 2 Images, 3 The transformer, 4 Frozen autoencoders, 5 The sphere,
6 The three losses, 7 Training, 8 Sampling, 9 Evaluation, 10 Figures, 11 Command line.

Differences from the paper: the autoencoder of the default is TinyRAE, trained here in minutes, in
place of DINOv2 and a ViT-XL decoder. The paper's loss weights, its logit-normal, its sampler's
noise and its optimiser are not known to us. Ours: weights 1, 1 and 0.1 and Adam, by choice; from
the ablations in the README a logit-normal of mean 1.2, and new noise at a smaller angle for each
step (Sphere Encoder, the predecessor, found the same noise and the same angle best). That the
denoiser is not told the noise level is inferred from the published parameter count. Sphere
Encoder's two halves have TinyRAE's patches and PCA start; on the drawings, which are learned
offline, it goes without its perceptual loss.
"""
import argparse
import contextlib
import copy
import dataclasses
import json
import math
import os
import pathlib
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import distributed as dist, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


# torchrun starts several processes and numbers them. Each has its part of every batch; what stands
# behind "RANK or" is done by the process 0 alone.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
PART = slice(RANK, None, WORLD)


class UserError(Exception):
    """Something a person can put right: the command line prints it as one line and exits with 2."""


@contextlib.contextmanager
def explained(message):
    """What fails inside, here or in a library, becomes a UserError that starts with message."""
    try:
        yield
    except Exception as error:
        # what is said already: a file that cannot be had, no memory on the GPU
        said = (isinstance(error, torch.OutOfMemoryError) or hasattr(error, "complete")) and error
        raise said or UserError(f"{message} ({type(error).__name__}: {str(error)[:300]})") from None


def refuse(wrong, message):
    if wrong:
        raise UserError(message)


def extras():
    """The file beside this one, with what the default run does not need."""
    with explained("this needs the file extras.py beside sphere_latent.py"):
        sys.modules.setdefault("sphere_latent", sys.modules[__name__])       # not a second time
        sys.path += {os.path.dirname(os.path.abspath(__file__))} - {*sys.path}
        return __import__("extras")


def __getattr__(name):                                       # RAEDecoder, InceptionFID, slerp ...
    if name.startswith("_"):
        raise AttributeError(name)
    return getattr(extras(), name)


# --------------------------------------------------------------------------------------------------
# 1. Configuration
# --------------------------------------------------------------------------------------------------

def option(default, text, choices=(), least=0, most=1e12):
    """A field of Config: its default, its line in --help, and the values it may take."""
    allowed = " or ".join(choices) or f"from {least} to {most:g}"
    text = f"{text} {' | '.join(choices)} (default: {default})"
    rule = {"help": text, "choices": choices, "least": least, "most": most, "allowed": allowed}
    return dataclasses.field(default=default, metadata=rule)


@dataclasses.dataclass
class Config:
    method: str = option("sphere-latent", "which paper", ("sphere-latent", "sphere-encoder"))
    # data
    dataset: str = option("drawn", "what to learn", ("drawn", "folder", "cifar10", "flowers",
                                                     "animal-faces", "imagenet"))
    data_dir: str = option("", "folder of the images; if not given: data")
    image_size: int = option(64, "side of the square images, pixels", least=1, most=4096)
    flips: bool = option(True, "also learn each image mirrored left to right")
    # the frozen autoencoder
    autoencoder: str = option("tiny", "which one makes the latents", ("tiny", "dinov2-b"))
    weights_dir: str = option("", "folder of published weights that were placed by hand")
    latents: str = option("", "file of latents to share; else the run's, if they exceed 1 GB")
    patch_size: int = option(16, "tiny: side of the square that becomes a token, pixels", least=1)
    latent_channels: int = option(64, "tiny: channels C of a token", least=1)
    autoencoder_width: int = option(256, "tiny: width of encoder and decoder", least=4, most=8192)
    autoencoder_depth: int = option(3, "tiny: blocks in encoder and decoder", least=1, most=1000)
    autoencoder_steps: int = option(1200, "tiny: updates before it is frozen", least=1)
    # the denoiser, or the two halves of Sphere Encoder, and the losses
    model_size: str = option("tiny", "size of each of them", ("tiny", "S", "B", "L", "XL"))
    spherify: bool = option(True, "project latents to the sphere (off: an ablation)")
    sphere_target: bool = option(False, "sphere-latent: aim at f(z), on the sphere, not at z")
    noise_distribution: str = option("logit-normal", "distribution of the large angle",
                                     ("logit-normal", "uniform", "uniform-tangent"))
    noise_mean: float = option(1.2, "logit-normal: mean of the logit", least=-100)
    noise_std: float = option(1.0, "logit-normal: standard deviation of the logit")
    max_angle: float = option(90.0, "largest noise angle in training, degrees", most=90)
    small_ratio: float = option(0.5, "tan(small angle) = s tan(large angle), s uniform up to this")
    reconstruction_weight: float = option(1.0, "weight of the reconstruction loss")
    consistency_weight: float = option(1.0, "weight of the consistency loss")
    latent_consistency_weight: float = option(0.1, "weight of the latent consistency loss")
    perceptual_weight: float = option(1.0, "sphere-encoder, not of drawings: weight of VGG's part")
    label_dropout: float = option(0.1, "share of labels that become the null label", most=1)
    # optimisation
    train_steps: int = option(1700, "updates of the denoiser", least=1)
    batch_size: int = option(32, "images in an update", least=1, most=65536)
    learning_rate: float = option(3e-3, "AdamW (no weight decay: Adam): largest learning rate")
    ema_decay: float = option(0.995, "decay of the average of the weights; 0 is off", most=1)
    save_every: int = option(500, "updates between checkpoints and sample pictures", least=1)
    # sampling and evaluation
    steps: int = option(4, "denoiser steps to make an image", least=1, most=1000)
    cfg_scale: float = option(1.5, "classifier-free guidance; 1 is off")
    cfg_position: str = option("both", "sphere-encoder: guide it", ("encoder", "decoder", "both"))
    tilt: float = option(90.0, "angle back into noise, degrees; decaying: (1 - k / steps) times it")
    tilt_schedule: str = option("decaying", "the angle over the steps", ("decaying", "fixed"))
    fresh_noise: bool = option(True, "new noise at each step (off: the same at all steps)")
    eval_samples: int = option(600, "samples behind a Fréchet distance", least=2, most=100_000)
    features: str = option("untrained", "inception is FID", ("untrained", "inception"))
    reference: str = option("", "inception: .npz with mu and sigma in place of the images")
    # the run
    seed: int = option(0, "seed of everything random")
    device: str = option("auto", "auto (CUDA, then MPS, then CPU), or the name of a torch device")
    out: str = option("", "run folder; if not given, runs/DATASET")
    resume: str = option("", "run folder to go on with; needs no other flag")
    overwrite: bool = option(False, "replace the run that the run folder holds")
    compile: bool = option(False, "torch.compile the denoiser")

    def __post_init__(self):
        def need(good, name, allowed):
            refuse(not good, f"--{name.replace('_', '-')} {getattr(self, name)}: must be {allowed}")
        for field in dataclasses.fields(self):               # nan is in no range
            value, rule = getattr(self, field.name), field.metadata
            good = (rule["least"] <= value <= rule["most"] if field.type in (int, float) else
                    value in (rule["choices"] or [value]))
            need(good, field.name, rule["allowed"])
        size, p, width = self.image_size, self.patch_size, self.autoencoder_width
        angle, kind, rae = self.max_angle, self.noise_distribution, (self.method, self.autoencoder)
        need(size == 256 or rae != ("sphere-latent", "dinov2-b"), "image_size", "256 for dinov2-b")
        need(self.batch_size % WORLD == 0, "batch_size", f"a multiple of {WORLD}, the processes")
        need(size % p == 0 < size - p, "image_size", f"a larger multiple of --patch-size {p}")
        need(width % (64 if width > 64 else 4) == 0, "autoencoder_width", "4, 8 .. 64, 128, 192 ..")
        need(angle < 90 or kind != "uniform-tangent", "max_angle", "below 90 for uniform-tangent")
        need(self.latent_channels <= 3 * p ** 2, "latent_channels", f"up to {3 * p ** 2}, a patch")


def preset(dataset, method="sphere-latent", autoencoder="", **_):
    """The Config that a data set and a method start from; those of the paper are in extras.py.

    With autoencoder "tiny" the paper's data sets have the settings of any folder of images. All
    flags of train may be given; the others change nothing here.
    """
    start = {"drawn": {}, "folder": dict(train_steps=9000, autoencoder_steps=4000, cfg_scale=3.0),
             "cifar10": dict(image_size=32, patch_size=4, latent_channels=16, model_size="S"),
             "sphere-encoder": dict(noise_distribution="uniform-tangent", max_angle=85.0,
                                    reconstruction_weight=25.0, consistency_weight=2.0, tilt=85.0,
                                    tilt_schedule="fixed", fresh_noise=False, learning_rate=5e-3)}
    start |= {} if dataset in start or autoencoder == "tiny" else extras().PAPER_PRESETS
    return Config(method, dataset, **start.get(method, {}) | start.get(dataset, start["folder"]))


# --------------------------------------------------------------------------------------------------
# 2. Images
# --------------------------------------------------------------------------------------------------

#    name           petals, roundness, gap, layers, centre; colour of the tip, the base, the centre
SPECIES = (
    ("anemone",        7, 3.0, .45, 1, .26, (.96, .95, .98), (.80, .80, .92), (.13, .11, .30)),
    ("aster",         12, 1.6, .75, 1, .24, (.56, .38, .86), (.45, .26, .72), (.95, .78, .15)),
    ("buttercup",      5, 3.5, .50, 1, .22, (.99, .88, .12), (.95, .72, .05), (.62, .66, .12)),
    ("clematis",       6, 1.2, .72, 1, .16, (.42, .18, .66), (.62, .32, .74), (.95, .93, .72)),
    ("cosmos",         8, 4.0, .55, 1, .20, (.96, .52, .74), (.86, .30, .58), (.96, .80, .20)),
    ("daisy",         10, 1.8, .75, 1, .30, (.99, .99, .97), (.88, .90, .88), (.98, .78, .10)),
    ("forget-me-not",  5, 4.0, .60, 1, .18, (.42, .66, .97), (.62, .80, .99), (.99, .88, .30)),
    ("gerbera",       12, 1.8, .60, 2, .26, (.97, .42, .14), (.88, .25, .10), (.30, .12, .10)),
    ("lily",           6, 1.0, .78, 1, .12, (.98, .62, .22), (.99, .82, .40), (.45, .20, .08)),
    ("poppy",          4, 5.0, .30, 1, .20, (.90, .12, .10), (.62, .05, .08), (.10, .08, .10)),
    ("sunflower",     12, 1.1, .55, 2, .42, (.99, .80, .10), (.95, .60, .05), (.32, .18, .07)),
    ("wild rose",      5, 2.6, .40, 1, .17, (.95, .40, .52), (.99, .86, .84), (.97, .85, .35)))
GROUNDS = ((.16, .34, .14), (.34, .52, .22), (.10, .20, .16), (.55, .72, .88),       # leaves, sky,
           (.78, .86, .92), (.46, .38, .28), (.68, .62, .48), (.20, .24, .36))       # soil, dusk


def draw_flowers(labels, size, generator):
    """Draw a flower for each label [B], all else at random -> [B, 3, size, size] in [0, 1]."""
    def uniform(low, high, channels=1):
        return low + (high - low) * torch.rand(len(labels), channels, 1, 1, generator=generator)

    def ground():
        chosen = torch.randint(len(GROUNDS), (len(labels),), generator=generator)
        return torch.tensor(GROUNDS)[chosen][..., None, None]

    def cover(distance):                                     # signed distance to an edge -> opacity
        return (2 * size * distance + 0.5).clamp(0, 1)

    petals, roundness, gap, layers, centre, tip, base, disc = (
        torch.tensor(column)[labels].reshape(len(labels), -1, 1, 1)
        for column in list(zip(*SPECIES))[1:])
    axis = (torch.arange(2 * size) + 0.5) / (2 * size)       # twice the pixels, for smooth edges
    y, x = axis[:, None], axis[None, :]
    cx, cy, radius = uniform(.40, .60), uniform(.38, .54), uniform(.29, .40)
    turn, light, lean = (uniform(0, 2 * math.pi) for _ in range(3))

    # the ground: a gradient, a soft spot, a stem
    angle = uniform(0, 2 * math.pi)
    slope = (.5 + (x - .5) * angle.cos() + (y - .5) * angle.sin()).clamp(0, 1)
    image = torch.lerp(ground(), ground(), slope)
    spot = ((x - uniform(0, 1)) ** 2 + (y - uniform(0, 1)) ** 2) / uniform(.08, .25) ** 2
    image = torch.lerp(image, ground(), torch.exp(-spot) * uniform(0, .7))
    stem = .013 - (x - cx - uniform(-.6, .6) * (y - cy) ** 2).abs()
    green = torch.tensor([[[.20]], [[.46]], [[.14]]]) + uniform(-.06, .06, 3)
    image = torch.lerp(image, green, cover(stem) * (y > cy))

    # polar coordinates around the centre of a flower that leans; its shadow; petals; centre
    dx, dy, squash = x - cx, y - cy, uniform(.75, 1)
    along, across = dx * lean.cos() + dy * lean.sin(), (dy * lean.cos() - dx * lean.sin()) / squash
    r, theta = (along ** 2 + across ** 2).sqrt() / radius, torch.atan2(across, along)
    image = image * (1 - .35 * torch.sigmoid(8 * (1 - r)))
    shade = 1 + .22 * (dx * light.cos() + dy * light.sin()) / radius
    tint = 1 + uniform(-.06, .06, 3)
    for layer in range(int(layers.max())):
        u = 2 * torch.remainder((theta - turn) * petals / (2 * math.pi) + .5 * layer, 1) - 1
        edge = (1 - .25 * layer) * (1 - gap * u.abs() ** roundness)  # u: -1 to 1 across a petal
        colour = torch.lerp(base, tip, (r / edge.clamp(min=.1)).clamp(0, 1)) * tint
        colour = colour * shade * (1 - .3 * u ** 2) * (1 + .08 * layer)
        image = torch.lerp(image, colour, cover((edge - r) * radius * squash) * (layers > layer))
    dome = disc * shade * (1.12 - .45 * (r / centre).clamp(0, 1) ** 2)
    image = torch.lerp(image, dome, cover((centre - r) * radius))
    return F.avg_pool2d((image * uniform(.8, 1.15)).clamp(0, 1), 2)


def sent(x, device):
    """x on the device; to a GPU from pinned memory: nothing waits for what it computes just now."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class Images(torch.utils.data.Dataset):
    """Images of one size; [i] gives (image [3, H, W] float in [0, 1], label int)."""

    def __init__(self, pixels, labels, classes):
        # pixels [n, 3, H, W] uint8, or ImageFiles; labels [n]; classes: their names
        self.pixels, self.labels, self.classes = pixels, torch.as_tensor(labels), list(classes)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.batch(torch.tensor([i]))[0], int(self.labels[i])

    def batch(self, numbers, device=torch.device("cpu")):
        """Images [B, 3, H, W] of these numbers [B]; from len(self) on, mirrored ones."""
        x = sent(self.pixels[numbers % len(self)], device) / 255
        return torch.where(sent(numbers >= len(self), device).view(-1, 1, 1, 1), x.flip(3), x)


def drawn_images(split, size, seed=0):
    """The built-in data: flowers, the same for the same seed; no drawing is in both splits."""
    labels = torch.arange({"train": 6000, "test": 1200}[split]) % len(SPECIES)
    generator = torch.Generator().manual_seed(2 * seed + (split == "test"))
    pixels = [(255 * draw_flowers(few, size, generator)).round().byte() for few in labels.split(16)]
    return Images(torch.cat(pixels), labels, [species[0] for species in SPECIES])


def load_images(config, split):
    """-> Images of one split, "train" or "test"; no image is in both. Raises UserError."""
    return (drawn_images(split, config.image_size) if config.dataset == "drawn" else
            extras().found_images(config, split))


# --------------------------------------------------------------------------------------------------
# 3. The transformer
# --------------------------------------------------------------------------------------------------
#     B batch   N tokens   C channels of a token   D width   H heads   K = D / H

class RMSNorm(nn.RMSNorm):
    """Divide by the root mean square over the last axis; one learned weight a channel."""

    def forward(self, x):                                    # in bf16 too, without a warning
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), eps=1e-6)


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the label (adaLN-Zero of DiT)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = RMSNorm(width // heads), RMSNorm(width // heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"),
                                 nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)

    def attention(self, x):
        q, k, v = (rearrange(project(x), "b n (h k) -> b h n k", h=self.heads)
                   for project in (self.q, self.k, self.v))                  # [B, H, N, K] each
        q, k = self.q_norm(q), self.k_norm(k)
        if x.device.type == "cpu" and torch.is_grad_enabled():              # measured: faster
            weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1)    # [B, H, N, N]
            y = weights.to(v.dtype) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.out(rearrange(y, "b h n k -> b n (h k)"))                # [B, N, D]

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)   # [B, N, D]


class Transformer(nn.Module):
    """Tokens [B, N, in] and labels [B] -> tokens [B, N, out]; no labels: the null label for all.

    It starts as the zero function, its blocks as the identity.
    """

    def __init__(self, tokens, in_channels, out_channels, width, depth, heads, num_classes=0):
        super().__init__()
        self.num_classes = num_classes                                       # also the null label
        self.embed = nn.Linear(in_channels, width)
        self.positions = nn.Parameter(sincos_positions(tokens, width), requires_grad=False)
        self.labels = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = RMSNorm(width)
        self.modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, out_channels)
        for linear in (module for module in self.modules() if isinstance(module, nn.Linear)):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        for linear in [block.modulation for block in self.blocks] + [self.modulation, self.head]:
            nn.init.zeros_(linear.weight)
        nn.init.normal_(self.labels.weight, std=0.02)

    def forward(self, x, labels=None):
        if labels is None:
            labels = torch.full((len(x),), self.num_classes, device=x.device)
        if labels.device.type == "cpu" and not ((0 <= labels) & (labels <= self.num_classes)).all():
            raise ValueError(f"labels go from 0 to {self.num_classes} (the null label): {labels}")
        c = F.silu(self.labels(labels))                                      # [B, D]
        x = self.embed(x) + self.positions                                   # [B, N, D]
        for block in self.blocks:
            large = x.numel() * len(self.blocks) > 4e8       # to keep 30 GB or more: compute twice
            x = checkpoint(block, x, c, use_reentrant=False) if large else block(x, c)   # [B, N, D]
        shift, scale = self.modulation(c)[:, None].chunk(2, dim=-1)          # [B, 1, D] each
        return self.head(self.norm(x) * (1 + scale) + shift)                 # [B, N, out]


def sincos_positions(tokens, width):
    """Fixed sine and cosine embedding of a square grid [N, D]: half for columns, half for rows."""
    side = math.isqrt(tokens)
    frequency = 1e4 ** -(torch.arange(width // 4) / (width // 4))
    angle = torch.arange(side)[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], dim=-1)                     # [side, D/2]
    return torch.cat([line.repeat(side, 1), line.repeat_interleave(side, 0)], dim=-1)


class Denoiser(Transformer):
    """Noisy latents [B, N, C] and labels [B] -> clean ones [B, N, C]; null label: num_classes.

    It is not told the noise level: on the sphere every input has the same length, and the angle to
    the data has to be read from the content.
    """

    def __init__(self, latent_shape, num_classes, width, depth, heads):
        super().__init__(*latent_shape, latent_shape[1], width, depth, heads, num_classes)
        self.latent_shape = latent_shape


MODEL_SIZES = {"tiny": (256, 6, 4), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16),
               "XL": (1152, 28, 16)}                                         # width, depth, heads


def denoiser_for(config, latent_shape, num_classes):
    """-> Denoiser of config.model_size for latents of latent_shape (N, C), or a SphereEncoder."""
    if config.method == "sphere-encoder":
        return SphereEncoder(config, num_classes, MODEL_SIZES[config.model_size])
    return Denoiser(latent_shape, num_classes, *MODEL_SIZES[config.model_size])


# --------------------------------------------------------------------------------------------------
# 4. Frozen autoencoders
# --------------------------------------------------------------------------------------------------
#     P numbers in a patch of the image

class TinyRAE(nn.Module):
    """A small autoencoder that is trained first and then frozen, in the place of the paper's RAE.

    It starts as PCA of the patches (the best linear autoencoder), but for the length of a latent,
    which spherify drops; a transformer on each side, zero at first, learns the rest. The decoder is
    trained on noisy latents, so that it forgives the denoiser's errors.
    """

    def __init__(self, config, num_classes=0, sizes=None):
        super().__init__()
        size, c, width = config.patch_size, config.latent_channels, config.autoencoder_width
        n, p, self.num_classes = (config.image_size // size) ** 2, 3 * size ** 2, num_classes
        self.patch_size, self.window, self.latent_shape = size, size + 2 * (size // 4), (n, c)
        sizes = sizes or (width, config.autoencoder_depth, width // 64 or 1)
        self.encoder = Transformer(n, p, c, *sizes, num_classes)
        self.decoder = Transformer(n, c, 3 * self.window ** 2, *sizes, num_classes)  # they overlap
        for name, start in dict(patch_mean=torch.zeros(p), whiten=torch.eye(p), mix=torch.eye(p, c),
                                unmix=torch.eye(c, p), latent_mean=torch.zeros(1, c),
                                latent_var=torch.ones(1, c)).items():
            self.register_buffer(name, start)

    def patches(self, images):
        p = self.patch_size
        return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)

    @torch.no_grad()
    def start_from_pca(self, images):
        """Set the linear part from images [n, 3, H, W].

        The latent keeps part of the natural spectrum, coarse strong and detail weak, spread by a
        rotation so that normalising each channel cannot level it: noise then hides detail first.
        """
        patches, c = self.patches(images).flatten(0, 1), self.latent_shape[1]
        variance, basis = (x.flip(-1) for x in torch.linalg.eigh(torch.cov(patches.T)))
        scale = variance.clamp(min=1e-5).sqrt()
        strength = scale[:c].sqrt() / scale[:c].mean().sqrt()
        rotation = torch.linalg.qr(torch.randn(c, c))[0]
        self.patch_mean[:], self.whiten[:] = patches.mean(0), basis / scale
        self.mix[:c] = strength[:, None] * rotation
        self.unmix[:] = rotation.T / strength * scale[:c] @ basis[:, :c].T

    def encode_raw(self, images, labels=None):
        t = (self.patches(images) - self.patch_mean) @ self.whiten           # [B, N, P]
        return spherify(t @ self.mix + self.encoder(t, labels))              # [B, N, C]

    def decode_raw(self, z, labels=None):
        t, size, side = z @ self.unmix + self.patch_mean, self.patch_size, math.isqrt(z.shape[1])
        linear = rearrange(t, "b (h w) (p q c) -> b c (h p) (w q)", h=side, p=size, q=size)
        windows = 0.1 * self.decoder(z, labels).float().transpose(1, 2)      # [B, 3 window^2, N]
        return linear + F.fold(windows, (side * size, side * size), self.window, stride=size,
                               padding=(self.window - size) // 2)            # summed: no seams

    def encode(self, images):
        """Images [B, 3, H, W] in [0, 1] -> latents [B, N, C], mean 0 and variance 1 a channel."""
        return (self.encode_raw(images) - self.latent_mean) / (self.latent_var + 1e-5).sqrt()

    def decode(self, z):
        """Latents [B, N, C] -> images [B, 3, H, W] in [0, 1]."""
        return self.decode_raw(z * (self.latent_var + 1e-5).sqrt() + self.latent_mean).clamp(0, 1)


class SphereEncoder(TinyRAE):
    """The predecessor: both halves with labels and learned as one. Calling it decodes."""

    forward = TinyRAE.decode_raw


def load_autoencoder(name, config=None, pretrained=True):
    """-> "tiny": TinyRAE of the sizes in config, whose weights come from a run. "dinov2-b": RAE.

    RAE has the published weights, or, with pretrained=False, random ones, mean 0 and variance 1.
    """
    refuse(name not in ("tiny", "dinov2-b"), f"no autoencoder {name}: tiny or dinov2-b")
    config = config or Config()
    return TinyRAE(config) if name == "tiny" else extras().RAE(config.weights_dir, pretrained)


# --------------------------------------------------------------------------------------------------
# 5. The sphere
# --------------------------------------------------------------------------------------------------
#     A latent [N, C] is one vector of L = N C numbers; the sphere has the radius sqrt(L).
#     angle_between and slerp, for looking and editing, are in extras.py.

def spherify(z):
    """f(z): divide by the root mean square over all but the batch axis: the norm becomes sqrt(L).

    z [B, ...] -> fp32, same shape. The zero latent has no direction and stays zero; the 1e-6 under
    the root keeps its gradient finite (a new denoiser predicts exactly zero).
    """
    return F.rms_norm(z.float(), z.shape[1:], eps=1e-6)


def tilt(v, e, alpha):
    """cos(alpha) v + sin(alpha) e: v tilted towards e by alpha, a number or [B], radians."""
    alpha = torch.as_tensor(alpha, dtype=torch.float32, device=v.device)
    alpha = alpha.view(-1, *[1] * (v.dim() - 1))             # broadcasts over [B, ...]
    return alpha.cos() * v.float() + alpha.sin() * e.float()


def noisy_spherify(v, e, alpha):
    """f(cos(alpha) v + sin(alpha) e): equals f(v + tan(alpha) e), but v at 0 and f(e) at pi/2."""
    return spherify(tilt(v, e, alpha))


def sample_angles(batch, config, generator=None):
    """-> alpha_small, alpha_large, each [B], radians: tan(alpha_small) = s tan(alpha_large)."""
    on = {"generator": generator, "device": generator and generator.device}
    limit = math.radians(config.max_angle)
    if config.noise_distribution == "logit-normal":
        large = limit * (config.noise_mean + config.noise_std * torch.randn(batch, **on)).sigmoid()
    else:
        r = torch.rand(batch, **on)
        parts = (torch.arange(batch, device=on["device"]) + r) / batch       # one r in each
        uniform = config.noise_distribution == "uniform"
        large = limit * r if uniform else torch.atan(parts * math.tan(limit))
    s = config.small_ratio * torch.rand(batch, **on)
    return torch.atan2(s * large.sin(), large.cos()), large


# --------------------------------------------------------------------------------------------------
# 6. The three losses
# --------------------------------------------------------------------------------------------------

def distance(a, b):
    """Mean squared error between latents [B, N, C], smooth L1 between images [B, 3, H, W]."""
    return (F.smooth_l1_loss if a.dim() == 4 else F.mse_loss)(a.float(), b.float())


def reconstruction_loss(z_hat_small, target):
    """Loss 1: from little noise, come back to the target."""
    return distance(z_hat_small, target)


def consistency_loss(z_hat_large, z_hat_small):
    """Loss 2: from much noise, come to where little noise came; no gradient to z_hat_small."""
    return distance(z_hat_large, z_hat_small.detach())


def latent_consistency_loss(v_hat_large, v):
    """Loss 3: from much noise, point where v points: 1 - cosine; no gradient to v."""
    return 1 - (spherify(v_hat_large) * spherify(v.detach())).mean()


def sphere_losses(decode, encode, v, target, labels, e, alpha_small, alpha_large, config, vgg=None):
    """The training loss of Sphere Latent Encoder, and of Sphere Encoder, which adds a perceptual.

    Sphere Latent Encoder: decode = the denoiser, encode = f, target = the clean latent.
    Sphere Encoder:        decode = D, encode = f o E, target = the image.
    v, e [B, N, C]; angles [B]; labels [B]. decode(views, labels) is called once, on both views.
    vgg(images, images): the perceptual distance, if there is one.
    -> {"reconstruction", "consistency", "latent_consistency": unweighted, "total": weighted}
    """
    noisy = noisy_spherify if config.spherify else tilt
    v_small, v_large = noisy(v, e, alpha_small), noisy(v, e, alpha_large)    # [B, N, C], same e
    out_small, out_large = decode(torch.cat([v_small, v_large]), labels.repeat(2)).chunk(2)
    losses = {"reconstruction": reconstruction_loss(out_small, target),
              "consistency": consistency_loss(out_large, out_small),
              "latent_consistency": latent_consistency_loss(encode(out_large), v)}
    if vgg:
        losses["perceptual"] = vgg(out_small, target) + vgg(out_large, out_small.detach())
    total = sum(getattr(config, name + "_weight") * loss for name, loss in losses.items())
    return {**losses, "total": total}


# --------------------------------------------------------------------------------------------------
# 7. Training
# --------------------------------------------------------------------------------------------------

def resolve_device(name):
    """-> torch.device, one that gives back the numbers it was given ("meta" would not)."""
    name = (torch.accelerator.current_accelerator(True) or "cpu") if name == "auto" else name
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if str(name) == "cuda" else name
    with explained(f"--device {name} cannot be used"):
        torch.set_float32_matmul_precision("high")           # on a GPU: TF32 for what is not bf16
        return torch.tensor(torch.zeros(1, device=name).tolist(), device=name).device


def autocast(device):
    """bf16 where the hardware multiplies it faster than fp32; elsewhere nothing."""
    pays = {"cpu": torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
            "cuda": torch.cuda.is_available() and torch.cuda.is_bf16_supported(False)}
    return torch.autocast(device.type, torch.bfloat16, enabled=pays.get(device.type, False))


def seeded(seed, number, device="cpu"):
    """The generator of update, or of image, `number`: a resumed run needs no generator state."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + number)    # a prime: seeds apart


def summed(x):
    """The sum of a tensor over all processes, in its place. All of them wait here for the last."""
    WORLD > 1 and dist.all_reduce(x)
    return x


def save_checkpoint(path, state):
    """Write beside `path`, then rename: a reader finds the old file or the new, never a half."""
    temporary = path.with_name(path.name + ".part")
    with explained(f"cannot write {path}, the one before is kept: make room, then --resume"):
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def read_checkpoint(path):
    with explained(f"{path} is no checkpoint of this program, or damaged"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {**state, "step": state["step"], "config": Config(**state["config"])}


def write_table(path, rows):
    RANK or path.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))


def learning_rate_at(step, steps, config):
    """Linear warm-up over 50 updates, constant, linear decay over the second half."""
    return config.learning_rate * min((step + 1) / 50, 1, 2 - 2 * step / steps)


def optimise(model, losses_of, steps, config, path, keep, on_save=lambda average: None):
    """The one training loop, for the autoencoder and for the denoiser -> the averaged model (EMA).

    losses_of(step) gives a dict of scalars with a "total", of this process's part of the batch.
    State and the entries of `keep` go to the file `path`, mean losses to a .csv; if `path` is there
    already, training goes on from it.
    """
    device, weights = next(model.parameters()).device, list(model.parameters())
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimiser = torch.optim.Adam(weights, betas=(0.9, 0.95), fused=device.type != "mps")
    parts = {"model": model, "ema": average, "optimiser": optimiser}
    first, log, recent, asked, began = 0, [], [], [], time.time()
    table = path.with_name("log.csv" if keep else "autoencoder.csv")
    if path.exists():
        state = read_checkpoint(path)
        refuse(state.get("classes") != keep.get("classes"), f"{path} is of other classes than now")
        with explained(f"{path} is no checkpoint of this program, or damaged"):
            first, log, began = int(state["step"]), state["log"], began - state["log"][-1][-1]
            for name, part in parts.items():
                part.load_state_dict(state[name])
        write_table(table, log)                              # the file may be cut, or gone
    before = signal.signal(signal.SIGINT, lambda *_: asked.append("Ctrl-C"))
    try:
        for step in (bar := tqdm(range(first, steps), path.stem, steps, initial=first)):
            optimiser.param_groups[0]["lr"] = learning_rate_at(step, steps, config)
            losses = losses_of(step)
            optimiser.zero_grad()
            (losses["total"] / WORLD).backward()
            _ = [summed(weight.grad) for weight in weights if weight.requires_grad]
            norm = nn.utils.clip_grad_norm_(weights, 1.0)
            optimiser.step()
            decay = min(config.ema_decay, (2 + step) / (11 + step))          # short memory at first
            torch._foreach_lerp_([*average.parameters()], [w.detach() for w in weights], 1 - decay)
            # 0 * norm: a gradient that is not finite shows, even under a loss that is
            recent.append(torch.stack([loss.detach() + 0 * norm for loss in losses.values()]))
            save = (step + 1) % config.save_every == 0 or step + 1 == steps or asked and WORLD == 1
            if save or step % 10 == 9:
                mean = torch.stack(recent).mean(0) / WORLD   # asked: any process may have been
                *means, stop = summed(torch.cat([mean, mean.new_tensor([len(asked)])])).tolist()
                recent.clear()
                refuse(not math.isfinite(sum(means)), f"the loss is not finite near update "
                       f"{step + 1}; the last good checkpoint is kept: lower --learning-rate")
                log = log or [["step", *losses, "seconds"]]
                log.append([step + 1, *means, time.time() - began])
                bar.set_postfix_str(" ".join(f"{k} {x:.3f}" for k, x in zip(losses, means)))
            step == first and bar.unpause()                  # it may compile: the clock starts now
            if step - first == 9 and (days := bar.format_dict["elapsed"] * steps / 9 / 86400) > 1:
                tqdm.write(f"{steps} updates, at the pace of the first: about {days:.1f} days")
            if save or step % 10 == 9 and stop:
                state = {name: part.state_dict() for name, part in parts.items()} | keep
                state |= {"step": step + 1, "log": log, "config": dataclasses.asdict(config)}
                on_save(average)                             # first, or a kill could lose it
                RANK or save_checkpoint(path, state)
                write_table(table, log)
                if summed(torch.tensor(len(asked))):         # none goes on before it is written
                    raise KeyboardInterrupt(path.parent)
    finally:
        signal.signal(signal.SIGINT, before)
    return average


def fit_autoencoder(config, images, path, device):
    """Train TinyRAE on `images`, measure the mean and variance of its latents, freeze it."""
    torch.manual_seed(config.seed)
    autoencoder = TinyRAE(config).to(device)
    autoencoder.start_from_pca(images.pixels[torch.randperm(len(images))[:2000]] / 255)

    def losses_of(step):
        generator = seeded(config.seed, step)
        chosen = torch.randint(len(images), (config.batch_size,), generator=generator)
        mirrored = torch.rand(len(chosen), generator=generator) < 0.5 * config.flips
        x = images.batch((chosen + len(images) * mirrored)[PART], device)    # [B, 3, H, W]
        with autocast(device):
            z = autoencoder.encode_raw(x)                    # of size 1, noise about half of it
            sigma = 0.5 * torch.randn(len(chosen), 1, 1, generator=generator).abs()
            noise = sigma * torch.randn(len(chosen), *z.shape[1:], generator=generator)
            y = autoencoder.decode_raw(z + noise[PART].to(device))
        edges = sum(F.l1_loss(y.diff(dim=axis), x.diff(dim=axis)) for axis in (2, 3))
        return {"pixels": F.l1_loss(y, x), "edges": edges, "total": F.l1_loss(y, x) + edges}

    autoencoder = optimise(autoencoder, losses_of, config.autoencoder_steps, config, path, {})
    some = torch.arange((1 + config.flips) * len(images))[:100_000].split(256)     # are enough
    with torch.no_grad(), autocast(device):
        z = torch.cat([autoencoder.encode(images.batch(i, device)) for i in some])
    autoencoder.latent_mean[0], autoencoder.latent_var[0] = z.mean((0, 1)), z.var((0, 1))
    return autoencoder


def latent_reader(autoencoder, images, config, folder, device):
    """-> a function from numbers [B], as those of Images.batch, to latents [B, N, C].

    They are encoded once, in memory if they fit into 1 GB, else in a file in half precision; where
    the disk is too small for that, the autoencoder runs in every update.
    """
    @torch.no_grad()
    def encode(numbers):
        with autocast(device):
            return autoencoder.encode(images.batch(numbers, device)).float()
    shape = (1 + config.flips) * len(images), *autoencoder.latent_shape
    if config.latents or 4 * math.prod(shape) > 1e9:
        return extras().latent_file(config.latents or folder / "latents.npy", shape, encode, device)
    data = torch.cat([encode(i) for i in tqdm(torch.arange(shape[0]).split(256), "encoding")])
    return lambda numbers: data[sent(numbers, device)]


def fit_denoiser(config, images, autoencoder, path, device):
    """Train with the three losses -> the averaged model, a Denoiser or a SphereEncoder.

    It learns from latents or, for a SphereEncoder, where autoencoder is None, from images.
    """
    read = (latent_reader(autoencoder, images, config, path.parent, device) if autoencoder else
            lambda numbers: images.batch(numbers, device))
    torch.manual_seed(config.seed)
    labels, pool, ahead = images.labels.repeat(1 + config.flips), ThreadPoolExecutor(1), {}
    model = denoiser_for(config, autoencoder and autoencoder.latent_shape, len(images.classes))
    if pixels := isinstance(model, SphereEncoder):
        model.start_from_pca(images.batch(torch.randperm(len(labels))[:2000]))
    network = torch.compile(model.to(device)) if config.compile else model.to(device)
    project = spherify if config.spherify else lambda z: z
    vgg = pixels and config.dataset != "drawn" and extras().perceptual_distance(config, device)

    def batch(step):
        generator = seeded(config.seed, step)
        chosen = torch.randint(len(labels), (config.batch_size,), generator=generator)
        dropped = torch.rand(len(chosen), generator=generator) < config.label_dropout
        y = labels[chosen].masked_fill(dropped, model.num_classes)
        return read(chosen[PART]), sent(y[PART], device), generator          # [B, ...], [B]

    def losses_of(step):
        x, y, generator = (ahead.pop(step, None) or pool.submit(batch, step)).result()
        ahead[step + 1] = pool.submit(batch, step + 1)       # read while this one is computed
        with autocast(device):
            target = spherify(x) if config.sphere_target and not pixels else x
            encode = (lambda images: model.encode_raw(images, y)) if pixels else project
            v = encode(target)                                               # [B, N, C]
            # on a GPU so much noise is quicker drawn there
            generator = generator if device.type == "cpu" else seeded(config.seed, step, device)
            e = torch.randn(config.batch_size, *v.shape[1:], generator=generator, device=device)
            angles = [a[PART] for a in sample_angles(config.batch_size, config, generator)]
            return sphere_losses(network, encode, v, target, y, e[PART], *angles, config, vgg)

    own = isinstance(autoencoder, TinyRAE)                   # the published one is not copied
    keep = {"autoencoder": autoencoder.state_dict() if own else {}, "classes": images.classes}
    steps, figure = config.train_steps, path.with_name("samples.png")
    return optimise(model, losses_of, steps, config, path, keep, lambda average: sample_figure(
        average, autoencoder or average, images.classes, config, figure))


def train(config):
    """Images in, run folder out: autoencoder, latents, denoiser, pictures, Fréchet distances."""
    device = resolve_device(config.device)
    with open_run(config) as (folder, config):
        images, held_out = load_images(config, "train"), load_images(config, "test")
        if not (config.resume or RANK):                      # an old run goes only now
            for name in RUN_FILES * config.overwrite:        # else latents alone: they serve
                (folder / name).unlink(missing_ok=True)
            (folder / "config.json").write_text(json.dumps(vars(config), indent=1) + "\n")
        summed(torch.zeros(1))
        autoencoder = None                                   # Sphere Encoder is its own
        if config.method == "sphere-latent":
            autoencoder = (load_run(folder, device)[1] if (folder / "checkpoint.pt").exists() else
                           fit_autoencoder(config, images, folder / "autoencoder.pt", device)
                           if config.autoencoder == "tiny" else
                           load_autoencoder(config.autoencoder, config).to(device))
        denoiser = fit_denoiser(config, images, autoencoder, folder / "checkpoint.pt", device)
        RANK or loss_figure(folder / "checkpoint.pt")
        autoencoder = autoencoder or denoiser
        reconstruction_figure(autoencoder, held_out, folder / "reconstructions.png")
        evaluate_run(config, autoencoder, denoiser, folder / "frechet.csv", held_out)
        for name in ("autoencoder.pt", "latents.npy")[:1 if config.latents else 2]:
            RANK or (folder / name).unlink(missing_ok=True)  # checkpoint.pt holds what is needed
    return folder


RUN_FILES = ("checkpoint.pt", "autoencoder.pt", "log.csv", "autoencoder.csv", "frechet.csv",
             "loss.png", "samples.png", "reconstructions.png", "latents.npy", "reference.npz")


@contextlib.contextmanager
def open_run(config):
    """-> run folder, config; until the end no other run may write there.

    A run that is there already is neither lost nor taken for another.
    """
    folder = pathlib.Path(config.resume or config.out or f"runs/{config.dataset}")
    held = [folder / name for name in RUN_FILES[:-2] if (folder / name).exists()]
    if config.resume:
        refuse(not held or held[0].suffix != ".pt", f"no checkpoint in {folder}: start again")
        saved = read_checkpoint(held[0])["config"]
        config = dataclasses.replace(saved, resume=config.resume, device=config.device,
                                     data_dir=config.data_dir or saved.data_dir)
    refuse(held and not (config.resume or config.overwrite), f"{folder} already holds a run: go on "
           f"with it (--resume {folder}), replace it (--overwrite), or choose another --out")
    # --resume works from anywhere, but for the default folder data, which is looked for there
    config = dataclasses.replace(config, **{name: os.path.abspath(path) for name, path in vars(
        config).items() if path and name in ("data_dir", "weights_dir", "latents", "reference")})
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:                # gone with the process, in any case
        with contextlib.suppress(ImportError):               # Windows has no fcntl
            import fcntl
            with explained(f"{folder} is in use by another run"):
                RANK or fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        summed(torch.zeros(1))                               # none writes before all have looked
        yield folder, config


# --------------------------------------------------------------------------------------------------
# 8. Sampling
# --------------------------------------------------------------------------------------------------

SHARES = {"encoder": 1.0, "decoder": 0.0, "both": 0.5}       # --cfg-position: the encoder's part


def guided(network, x, labels, null, scale):
    """Classifier-free guidance: network(x, labels), pushed away from what the null label gives."""
    if scale == 1:
        return network(x, labels).float()
    both = torch.cat([x, x]), torch.cat([labels, torch.full_like(labels, null)])
    z, z_null = network(*both).float().chunk(2)
    return z_null + scale * (z - z_null)


@torch.no_grad()
def sample(denoiser, labels, steps=4, cfg_scale=1.0, angle=math.pi / 2, schedule="decaying",
           fresh_noise=True, sphere=True, noise=None, generator=None, return_path=False, share=0.5):
    """Random points of the sphere to clean latents [B, N, C], with `steps` calls of the denoiser.

    labels [B]; cfg_scale 1 is off; angle, radians: how far the point is tilted back before the next
    step, each time ("fixed") or less and less ("decaying"). noise: e of all steps [B, N, C] or of
    each [steps, B, N, C]; None draws it, once or, with fresh_noise, for each step. The last output
    is returned as it is; with return_path: (z, [each noisy point and each output in turn]).
    A SphereEncoder puts out images [B, 3, H, W], which it encodes before the next step; share: how
    much of the guidance its encoder has: 0.5, as much as the decoder, is the root for each.
    """
    if noise is None:
        shape = [steps] * fresh_noise + [len(labels), *denoiser.latent_shape]
        noise = torch.randn(shape, generator=generator, device=(generator or labels).device)
    project, path, null = spherify if sphere else lambda z: z, [], denoiser.num_classes
    if pixels := isinstance(denoiser, SphereEncoder):
        encoder_scale, cfg_scale = cfg_scale ** share, cfg_scale ** (1 - share)
    for k, e in enumerate(noise.to(labels.device).expand(steps, *noise.shape[-3:])):
        alpha = angle if schedule == "fixed" else angle * (1 - k / steps)
        if k and pixels:
            z = guided(denoiser.encode_raw, z, labels, null, encoder_scale)
        v = project(tilt(project(z), e, alpha) if k else e)                  # [B, N, C]
        z = guided(denoiser, v, labels, null, cfg_scale)                     # [B, N, C]
        path += [v, z]
    return (z, path) if return_path else z


def seeded_noise(count, latent_shape, seed, draws=1, first=0):
    """Noise [draws, count, N, C]; that of image n = first + i depends on the seed and n alone."""
    generators = [seeded(seed, first + i) for i in range(count)]
    with ThreadPoolExecutor() as pool:                       # one generator counts on one core
        return torch.stack([torch.stack([*pool.map(lambda generator: torch.randn(
            latent_shape, generator=generator), generators)]) for _ in range(draws)])


@torch.no_grad()
def sample_batches(denoiser, autoencoder, labels, config, batch=100):
    """Sample as config says, decode once: labels [n] -> (numbers, images [B, 3, H, W]) in turns.

    An image depends on its label, its number and the seed, not on how many are drawn at a time. Of
    several processes each draws its part.
    """
    device, draws = next(denoiser.parameters()).device, config.steps if config.fresh_noise else 1
    for chosen in torch.arange(len(labels)).split(batch)[PART]:
        e = seeded_noise(len(chosen), autoencoder.latent_shape, config.seed, draws, int(chosen[0]))
        with autocast(device):
            z = sample(denoiser, labels[chosen].to(device), config.steps, config.cfg_scale, noise=e,
                       angle=math.radians(config.tilt), schedule=config.tilt_schedule,
                       sphere=config.spherify, share=SHARES[config.cfg_position])
            yield chosen, (z.clamp(0, 1) if z.dim() == 4 else autoencoder.decode(z)).cpu()


def sample_images(denoiser, autoencoder, labels, config, batch=100):
    """Labels [n] -> all n images [n, 3, H, W], in every process."""
    images = torch.zeros(len(labels), 3, config.image_size, config.image_size)
    for chosen, x in sample_batches(denoiser, autoencoder, labels, config, batch):
        images[chosen] = x
    return summed(images)


def at_each_step_count(denoiser, autoencoder, labels, config):
    """-> {1: images [n, 3, H, W], 2: ..., 4: ..., 6: ...}: the same noise, that many steps."""
    return {steps: sample_images(denoiser, autoencoder, labels, dataclasses.replace(
        config, steps=steps)) for steps in (1, 2, 4, 6)}


# --------------------------------------------------------------------------------------------------
# 9. Evaluation
# --------------------------------------------------------------------------------------------------

def frechet_distance(mean_a, cov_a, mean_b, cov_b):
    """Squared Fréchet distance of two Gaussians: |m_a - m_b|^2 + tr A + tr B - 2 tr (A B)^(1/2).

    The last trace is the sum of the roots of the eigenvalues of A^(1/2) B A^(1/2), which is
    symmetric: nothing complex arises, and singular covariances are allowed. float64.
    """
    m_a, c_a, m_b, c_b = (torch.as_tensor(x).double() for x in (mean_a, cov_a, mean_b, cov_b))
    values, vectors = torch.linalg.eigh(c_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c_b @ root).clamp(min=0).sqrt().sum()
    return float((m_a - m_b).square().sum() + c_a.trace() + c_b.trace() - 2 * cross)


def untrained_features(images, widths=(3, 32, 64, 128, 128)):
    """Images [n, 3, H, W] -> features [n, 256] of convolutions with fixed random weights.

    They were learned from nothing, so no run is nearer to them than another. On the drawings they
    rank samples as a trained classifier does (README).
    """
    x = 2 * F.interpolate(images, (64, 64), mode="bilinear") - 1
    for number, (a, b) in enumerate(zip(widths, widths[1:])):
        weight = nn.init.orthogonal_(torch.empty(b, a, 4, 4), 2 ** 0.5, seeded(0, number))
        x = F.relu(F.conv2d(x, weight, stride=2, padding=1))                 # [n, b, H/2, W/2]
    return torch.cat([x.mean((2, 3)), x.std((2, 3))], dim=1)


def gaussian(images):
    """Mean and covariance of the features of images [n, 3, H, W], or of batches of them."""
    batches = images.split(100) if torch.is_tensor(images) else images
    features = torch.cat([untrained_features(x) for x in batches]).double()
    return features.mean(0), torch.cov(features.T)


def evaluate_run(config, autoencoder, denoiser, path, real=None):
    """Print, and write to `path`, the Fréchet distance to real images at 1, 2, 4 and 6 steps."""
    if config.features == "inception":
        return extras().evaluate_fid(config, autoencoder, denoiser, path)
    labels = torch.arange(config.eval_samples) % denoiser.num_classes
    real, found = real or load_images(config, "test"), {}
    reference = gaussian(real.pixels[i] / 255 for i in torch.arange(len(real)).split(100))
    unit = reference[1].trace().clamp(min=1e-9).item()       # images that are all the same have 0
    print(f"Fréchet distance in features of an untrained network, in units of real variance, "
          f"{len(labels)} samples against {len(real)} held-out images, CFG {config.cfg_scale:g}:")
    for steps, images in at_each_step_count(denoiser, autoencoder, labels, config).items():
        found[steps] = frechet_distance(*gaussian(images), *reference) / unit
        print(f"  steps: {steps}   Fréchet distance {found[steps]:.4f}")
    write_table(path, [["steps", "frechet_distance"], *found.items()])


# --------------------------------------------------------------------------------------------------
# 10. Figures
# --------------------------------------------------------------------------------------------------

def picture(path, rows, row_names, column_names=None):
    """A sheet of images: rows is a list of [n, 3, H, W] in [0, 1], with one name each."""
    from matplotlib.figure import Figure
    side, columns = rows[0].shape[-1], len(rows[0])
    axes = Figure((columns, len(rows)), dpi=128).add_axes((0, 0, 1, 1))      # an inch an image
    axes.imshow(rearrange(torch.stack(rows), "r n c h w -> (r h) (n w) c").numpy(), aspect="auto")
    middle = [side * (n + 0.5) for n in range(max(columns, len(rows)))]
    axes.set_yticks(middle[:len(rows)], row_names, parse_math=False)
    axes.set_xticks(middle[:columns], column_names or [""] * columns, parse_math=False)
    axes.tick_params(length=0, labelsize=7, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    RANK or axes.figure.savefig(path, bbox_inches="tight", pad_inches=0.05)


def sample_figure(denoiser, autoencoder, classes, config, path):
    """The same random points after 1, 2, 4 and 6 steps, a class a column."""
    labels = torch.arange(12) % len(classes)
    rows = at_each_step_count(denoiser, autoencoder, labels, config)
    picture(path, [*rows.values()], [f"steps: {n}" for n in rows], [classes[y] for y in labels])


def reconstruction_figure(autoencoder, images, path):
    """Held-out images above what the autoencoder makes of them -> mean PSNR of 60, decibels."""
    chosen = torch.randperm(len(images), generator=seeded(0, 0))[:60]
    x = images.pixels[chosen] / 255
    with torch.no_grad(), autocast(autoencoder.latent_mean.device):
        y = autoencoder.decode(autoencoder.encode(x.to(autoencoder.latent_mean.device))).cpu()
    psnr = float(-10 * (x - y).square().mean((1, 2, 3)).clamp(min=1e-10).log10().mean())
    names = [images.classes[label] for label in images.labels[chosen[:12]]]
    picture(path, [x[:12], y[:12]], ["image", f"rebuilt:\n{psnr:.1f} dB"], names)
    return psnr


def loss_figure(path):
    """The three unweighted losses of a checkpoint against updates, beside it as loss.png."""
    from matplotlib.figure import Figure
    names, *rows = read_checkpoint(path)["log"]
    axes = (figure := Figure((6, 3.5), dpi=128)).subplots()
    axes.plot([row[0] for row in rows], [row[1:4] for row in rows], label=names[1:4], lw=1)
    axes.set(xlabel="updates", ylabel="loss, unweighted", yscale="log")
    axes.legend(fontsize=8)
    figure.savefig(path.with_name("loss.png"), bbox_inches="tight")


# --------------------------------------------------------------------------------------------------
# 11. Command line
# --------------------------------------------------------------------------------------------------

def load_run(path, device="cpu", **given):
    """A run folder or checkpoint file -> config, autoencoder, averaged denoiser in eval mode.

    Sphere Encoder is both: the second and the third are one model. given: fields of config that
    are to be others than those of the run.
    """
    path = pathlib.Path(path)
    state = read_checkpoint(path / "checkpoint.pt" if path.is_dir() else path)
    refuse("autoencoder" not in state, f"{path} is half a run: train --resume {path.parent}")
    config = dataclasses.replace(state["config"], **given)
    with explained(f"{path} is no checkpoint of this program, or damaged"):
        frozen = config.method == "sphere-latent" and load_autoencoder(config.autoencoder, config)
        denoiser = denoiser_for(config, frozen and frozen.latent_shape, len(state["classes"]))
        denoiser.load_state_dict(state["ema"])
        denoiser.classes = state["classes"]
        if isinstance(frozen, TinyRAE):                      # RAE has its own weights
            frozen.load_state_dict(state["autoencoder"])
    models = frozen or denoiser, denoiser
    return config, *(model.to(device).eval().requires_grad_(False) for model in models)


def open_checkpoint(given, default_out):
    """-> config with the flags that were given, autoencoder, denoiser, path to write to."""
    checkpoint, ending = pathlib.Path(given.pop("checkpoint")), default_out[-4:]
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    out = pathlib.Path(given.pop("out", folder / default_out))
    given["device"] = resolve_device(given.get("device", "auto"))
    refuse(out.suffix != ending or out.is_dir(), f"--out {out}: not a file that ends in {ending}")
    config, *models = load_run(checkpoint, **given)
    out.parent.mkdir(parents=True, exist_ok=True)
    return config, *models, out


def train_command(given):
    """Learn the autoencoder and the denoiser, then draw samples and measure them."""
    other = set(given) - {"resume", "device", "data_dir"} or not given.get("resume")
    refuse("resume" in given and other, "--resume RUN: no other flag but --device and --data-dir")
    given.setdefault("dataset", "folder" if "data_dir" in given else "drawn")
    config = dataclasses.replace(preset(**given), **given)
    print(f"The pictures are in {train(config)}")


def sample_command(given):
    """Draw images from a checkpoint."""
    wanted, count = given.pop("classes", None), given.pop("count", 8)
    config, autoencoder, denoiser, out = open_checkpoint(given, "sampled.png")
    names = [*(classes := denoiser.classes), *map(str, range(len(classes)))]     # also by number
    with explained(f"--classes {wanted}: choose from {', '.join(classes)}"):
        chosen = [names.index(name) % len(classes) for name in wanted or classes]
    refuse(not 1 <= count <= 100_000 / len(chosen), f"--count {count}: 1 to 100000 in all")
    labels = torch.tensor(chosen).repeat_interleave(count)
    images = sample_images(denoiser, autoencoder, labels, config)
    picture(out, images.split(count), [classes[y] for y in chosen])
    print(out)


def evaluate_command(given):
    """Fréchet distance of samples to real images at 1, 2, 4 and 6 steps; several runs: a table."""
    if len(given["checkpoint"]) > 1:
        return extras().side_by_side(given.pop("checkpoint"), given)
    evaluate_run(*open_checkpoint({**given, "checkpoint": given["checkpoint"][0]}, "frechet.csv"))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}. See {self.prog} --help")


def build_parser():
    """One flag a field of Config, with dashes; the result holds only the flags that were given."""
    parser = Parser(prog="sphere_latent.py", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    fields = {field.name: field for field in dataclasses.fields(Config)}

    def add(function, names):
        command = commands.add_parser(
            function.__name__.split("_")[0], help=function.__doc__, description=function.__doc__,
            allow_abbrev=False, argument_default=argparse.SUPPRESS)
        for name in names:
            kind, flag = fields[name].type, "--" + name.replace("_", "-")
            how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
            command.add_argument(flag, help=fields[name].metadata["help"], **how)
        command.set_defaults(function=function)
        return command

    sampling = "cfg_scale cfg_position tilt tilt_schedule fresh_noise seed weights_dir device"
    add(train_command, fields)
    draw, more = add(sample_command, ["steps", *sampling.split()]), ()
    draw.add_argument("--classes", nargs="+", help="names or numbers of classes (default: all)")
    draw.add_argument("--count", type=int, help="images of each class (default: 8)")
    measure = add(evaluate_command, f"eval_samples data_dir features reference {sampling}".split())
    with contextlib.suppress(UserError):                     # without extras.py there are no more
        more = extras().add_commands(add)
    for command in (draw, measure, *more):
        several = {"nargs": "+"} if command is measure else {}
        command.add_argument("--checkpoint", required=True, help="run folder or file", **several)
        command.add_argument("--out", help="file to write (default: one in the run folder)")
    return parser


def main(argv=None):
    """Run one command -> exit code: 0, 2 for what a person can put right, 130 for Ctrl-C."""
    try:
        WORLD > 1 and dist.init_process_group("cpu:gloo" + ",cuda:nccl" * torch.cuda.is_available())
        if RANK:
            sys.stdout = sys.stderr = open(os.devnull, "w", errors="ignore")
        given = vars(build_parser().parse_args(argv))
        return given.pop("function")(given) or 0
    except SystemExit as leave:                              # --help
        return leave.code or 0
    except KeyboardInterrupt as stop:
        text, code = f"stopped; training goes on with train --resume {stop or 'RUN_FOLDER'}", 130
    except (UserError, OSError, torch.linalg.LinAlgError) as error:     # the last: nan in samples
        text, code = error, 2
    except (MemoryError, RuntimeError) as error:
        if not any(x in f"{error} {type(error)}" for x in ("MemoryError", "of memory", "allocate")):
            raise
        text, code = "out of memory: lower --batch-size, --image-size, --model-size or --count", 2
    time.sleep(3 * (RANK > 0))       # where all fail, 0 says so, and torchrun ends the others now
    line = " ".join(["sphere_latent.py:", *str(text).split()]) + "\n"     # written at once: whole
    (sys.__stderr__ if RANK else sys.stderr).write(line)
    return code


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")        # any name, in any terminal
    sys.exit(record(main)())                                 # torchrun shows every traceback
