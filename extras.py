"""What the default run of sphere_latent.py does not need, and which is not the method.

  found_images     images in folders, CIFAR-10, Oxford-Flowers, Animal-Faces, ImageNet
  RAE              the paper's frozen autoencoder: DINOv2-B with registers in, a ViT-XL decoder out
                   (arXiv 2510.11690)
  InceptionFID     the features in which a Fréchet distance is an FID
  VGGDistance      the perceptual loss of Sphere Encoder
  latent_file      latents too many for memory
  slerp            the way from one point of the sphere to another
  add_commands     reconstruct and edit; side_by_side is for evaluate with several runs

sphere_latent.py opens this file for its command line and where a name is needed. Weights come from
where they were published, through the usual caches, or from a folder in which they were placed by
hand. Each network can be built without them.

Contents: 1 Images, 2 Weights that others published, 3 RAE, 4 Networks that look at images,
5 FID, 6 Latents on disk, 7 On the sphere, 8 Further commands.

    B batch   N tokens   C channels of a token   D width   H heads   K = D / H
"""
import contextlib
import dataclasses
import errno
import hashlib
import math
import os
import pathlib
import re
import shutil
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from sphere_latent import (PART, RANK, SHARES, Images, UserError, autocast, explained,
                           frechet_distance, gaussian, load_images, load_run, noisy_spherify,
                           open_checkpoint, picture, reconstruction_figure, refuse,
                           resolve_device, sample, sample_batches, sample_images, seeded_noise,
                           sent, spherify, summed, write_table)

IMAGENET = torch.tensor([[.485, .456, .406], [.229, .224, .225]]).view(2, 3, 1, 1)   # mean, std

# --------------------------------------------------------------------------------------------------
# 1. Images
# --------------------------------------------------------------------------------------------------

IN_MEMORY = 8e9                                              # bytes of pixels; more stay in files


class ImageFiles:
    """In the place of pixels that are too many for memory: [numbers] reads those files."""

    def __init__(self, paths, labels, size):
        self.paths, self.labels, self.size = list(paths), labels, size
        self.pool, self.bad = ThreadPoolExecutor(), set()

    def __getitem__(self, chosen):
        return torch.stack([*self.pool.map(self.read, chosen)])              # [B, 3, size, size]

    def read(self, number):
        """That image; in the place of a broken one, which is named, the next of its class."""
        number, n = int(number), len(self.paths)
        while path := self.paths[number]:
            try:
                return open_image(path, self.size)
            except Exception as error:                       # image decoders raise anything at all
                refuse(getattr(error, "errno", None), f"{error}; once it can be read, --resume")
                path in self.bad or skipped(path, error)
                self.bad.add(path)
            same = (self.paths[i % n] for i in range(number + 1, number + n)
                    if self.labels[i % n] == self.labels[number])
            self.paths[number] = next((other for other in same if other not in self.bad), "")
            refuse(not self.paths[number] or len(self.bad) > max(1, n // 100),
                   f"{len(self.bad)} of {n} images cannot be read; see {path.parent}")


def open_image(path, size):
    """Any image file -> uint8 [3, size, size]: upright, on white, scaled, the centre cropped."""
    with Image.open(path) as image:
        if image.width * image.height > Image.MAX_IMAGE_PIXELS or image.mode[0] in "IF":
            raise ValueError("a decompression bomb, or more than 8 bits a channel")
        image.draft("RGB", (2 * size, 2 * size))             # JPEG: decode no more than is needed
        image = ImageOps.exif_transpose(image).convert("RGBA")
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def skipped(path, error):
    tqdm.write(f"skipped {path} ({type(error).__name__}: {error})", file=sys.stderr)


def image_files(root):
    """Every image file under a folder -> names relative to it; hidden ones are passed over."""
    kinds = Image.registered_extensions()
    names = (path.relative_to(root) for path in root.rglob("*"))
    return sorted(name for name in names if kinds.get(name.suffix.lower()) in Image.OPEN
                  and (root / name).is_file() and not any(part[0] == "." for part in name.parts))


def read_images(paths, labels, classes, size):
    """-> Images. Unreadable files are named and left out: one, or 1 in 100.

    More than 8 GB are not read now, but when they are asked for.
    """
    if 3 * size ** 2 * len(paths) > IN_MEMORY:
        return Images(ImageFiles(paths, labels, size), labels, classes)

    def read(path):
        try:
            return open_image(path, size)
        except Exception as error:                           # image decoders raise anything at all
            skipped(path, error)
    with ThreadPoolExecutor() as pool:
        pixels = [*tqdm(pool.map(read, paths), "reading images", len(paths), unit="img")]
    good = [i for i, image in enumerate(pixels) if image is not None]
    refuse(len(good) < max(2, 0.99 * len(paths) - 1),
           f"{len(good)} of {len(paths)} images can be read; see {paths[0].parent}")
    return Images(torch.stack([pixels[i] for i in good]), [labels[i] for i in good], classes)


SOURCES = {"cifar10": "cifar-10-python.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html",
           "flowers": "a folder flowers-102 of jpg (102flowers.tgz, unpacked), imagelabels.mat and "
                      "setid.mat, all of https://www.robots.ox.ac.uk/~vgg/data/flowers/102",
           "animal-faces": "AFHQ of https://github.com/clovaai/stargan-v2, with train and val",
           "imagenet": "ImageNet-1K of https://image-net.org, with train and val, a folder a class"}

CLASSES = {"animal-faces": "cat|dog|wild", "imagenet": r"n\d{8}"}

# where the paper is silent, RAE's recipe for its second stage; 1,000 epochs, of ImageNet 800
RECIPE = dict(autoencoder="dinov2-b", image_size=256, model_size="B", batch_size=1024,
              learning_rate=2e-4, ema_decay=0.9995, features="inception", eval_samples=50_000)
PAPER_PRESETS = {"flowers": RECIPE | dict(train_steps=8000, eval_samples=51_000),
                 "animal-faces": RECIPE | dict(train_steps=14_000),
                 "imagenet": RECIPE | dict(train_steps=1_000_000, model_size="XL")}


def found_images(config, split):
    """-> Images of one split, "train" or "test", of any data set but the drawings."""
    images = images_of(config, split)
    if config.features == "inception" and split == "train":  # if absent, said before the training
        published(INCEPTION, config.weights_dir,
                  "; --features untrained --eval-samples 2000 needs none")
    size = 4 * 12 * config.eval_samples * config.image_size ** 2             # at four step counts
    refuse(config.features == "untrained" and size > 2e10,
           f"--features untrained keeps {size / 1e9:.0f} GB of samples: lower --eval-samples")
    return images


def images_of(config, split):
    """-> Images of one split; no image is in both. Raises UserError.

    The class of an image in a folder is the first folder of its name; images in no folder are a
    class as well. A tenth, chosen by name, is for testing; animal-faces and imagenet have folders
    train and val. flowers is the exception: as in the papers, all 8,189 are learned and tested on.
    """
    in_test, root = {"train": False, "test": True}[split], pathlib.Path(config.data_dir or "data")
    needs = (f"put {SOURCES.get(config.dataset)}, into {root}, or name its place with --data-dir; "
             f"train without flags needs none of it")
    if config.dataset == "cifar10":
        from torchvision.datasets import CIFAR10
        with first_alone(), explained(f"no CIFAR-10 in {root} and no download: {needs}"):
            data = CIFAR10(root, train=not in_test, download=True)
        pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2)
        return Images(F.interpolate(pixels, config.image_size), data.targets, data.classes)
    if config.dataset == "flowers":
        with first_alone(), explained(f"no Oxford-Flowers in {root} and no download: {needs}"):
            files = flower_files(root)
        return read_images(*files, config.image_size)
    if config.dataset != "folder":
        root = root / ("val" if in_test else "train")
        refuse(not root.is_dir(), f"no folder {root}: {needs}")
    refuse(not root.is_dir(), f"--data-dir {root}: no such folder")
    names = image_files(root)
    refuse(len(names) < 4, f"--data-dir {root}: {len(names)} image files; at least 4 are needed")
    owners = [os.fsencode((*n.parts[:-1], root.name)[0]).decode(errors="replace") for n in names]
    classes, tenth = sorted(set(owners)), max(2, len(names) // 10)
    if config.dataset in CLASSES:                            # another one's train and val, say
        wrong = {name for name in classes if not re.fullmatch(CLASSES[config.dataset], name)}
        refuse(root.name in wrong, f"{root} has images in no folder of a class: {needs}")
        refuse(wrong, f"{root} is not {config.dataset}, with {min(wrong, default='')} in it: "
               f"{needs}")
    numbers = {name: number for number, name in enumerate(classes)}
    chosen = sorted(range(len(names)), key=lambda i: zlib.crc32(os.fsencode(names[i])))
    if config.dataset == "folder":
        chosen = sorted(chosen[:tenth] if in_test else chosen[tenth:])
    return read_images([root / names[i] for i in chosen],
                       [numbers[owners[i]] for i in chosen], classes, config.image_size)


@contextlib.contextmanager
def first_alone():
    """Process 0 does what is inside before the others: it fetches, they find it there."""
    RANK and summed(torch.zeros(1))
    try:
        yield
    finally:
        RANK or summed(torch.zeros(1))


def flower_files(root):
    """Oxford-Flowers 102, all three splits -> 8,189 paths, their labels, the 102 names."""
    from torchvision.datasets import Flowers102
    parts = [Flowers102(root, split, download=True) for split in ("train", "val", "test")]
    return (sum((part._image_files for part in parts), []),
            sum((part._labels for part in parts), []), Flowers102.classes)


# --------------------------------------------------------------------------------------------------
# 2. Weights that others published
# --------------------------------------------------------------------------------------------------

HUB = "https://huggingface.co/"
ENCODER = HUB + "timm/vit_base_patch14_reg4_dinov2.lvd142m", "model.safetensors"
DECODER = HUB + "nyu-visionx/RAE-collections", "decoders/dinov2/wReg_base/ViTXL_n08/model.pt"
STATISTICS = HUB + "nyu-visionx/RAE-collections", "stats/dinov2/wReg_base/imagenet1k/stat.pt"
INCEPTION = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights",
             "pt_inception-2015-12-05-6726825d.pth")
VGG = "https://download.pytorch.org/models", "vgg16-397923af.pth"


class Missing(UserError):
    """A published file cannot be had. The message says all: explained() lets it through."""

    complete = True


@first_alone()
def published(source, folder="", instead=""):
    """-> path of a published file: placed in `folder` by hand, or in a cache, or fetched now.

    source: (site, name). A name that ends in .pth has the first eight digits of the file's SHA-256
    in it, which is checked. Raises Missing: what was looked for, why it failed, what to do.
    """
    site, name = source
    path = pathlib.Path(folder, pathlib.PurePath(name).name)
    digest = name[-12:-4] if name.endswith(".pth") else ""
    try:
        if not (folder and path.is_file()):
            if not digest:
                from huggingface_hub import hf_hub_download, logging
                logging.set_verbosity_error()                # a line for each retry is too many
                return pathlib.Path(hf_hub_download(site.removeprefix(HUB), name))
            path = pathlib.Path(torch.hub.get_dir(), "checkpoints", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file():
                torch.hub.download_url_to_file(f"{site}/{name}", str(path), hash_prefix=digest)
        with open(path, "rb") as file:
            if digest and not hashlib.sha256(file.read()).hexdigest().startswith(digest):
                raise ValueError(f"{path} is damaged: its SHA-256 does not begin with {digest}")
        return path
    except Exception as error:
        raise Missing(f"no {name} of {site}{folder and f', nor in {folder}'} "
                      f"({type(error).__name__}: {str(error)[:200]}): put it as {path.name} in a "
                      f"folder and add --weights-dir FOLDER{instead}") from None


# --------------------------------------------------------------------------------------------------
# 3. RAE
# --------------------------------------------------------------------------------------------------

class RAE(nn.Module):
    """Images [B, 3, 256, 256] in [0, 1] to latents [B, 256, 768] and back; frozen.

    The image goes in at 224 pixels, 14 a token, and comes out at 256, 16 a token. weights_dir:
    where model.safetensors (encoder), model.pt (decoder) and stat.pt were placed, if by hand.
    pretrained=False: random weights, latents with mean 0 and variance 1 by declaration.
    """

    latent_shape = 256, 768                                                  # N, C

    def __init__(self, weights_dir="", pretrained=True):
        super().__init__()
        import timm
        files, moments = [""] * 3, {"mean": torch.zeros(768, 1), "var": torch.ones(768, 1)}
        options = {"map_location": "cpu", "weights_only": True}
        if pretrained:
            instead = ", or train without it: --autoencoder tiny"
            files = [published(source, weights_dir, instead)
                     for source in (ENCODER, DECODER, STATISTICS)]
        with explained(f"{files[0]} is no DINOv2 of timm, or damaged"):
            self.encoder = timm.create_model(
                "vit_base_patch14_reg4_dinov2.lvd142m", pretrained, num_classes=0, img_size=224,
                pretrained_cfg_overlay={"file": str(files[0])})              # resamples positions
        self.encoder.norm = nn.LayerNorm(768, eps=1e-6, elementwise_affine=False)
        self.decoder = RAEDecoder()
        if pretrained:
            with explained(f"{files[1]} is no decoder of RAE, or damaged"):
                self.decoder.load_state_dict(torch.load(files[1], **options))
            with explained(f"{files[2]} is no statistics of RAE, or damaged"):
                found = torch.load(files[2], **options)      # [C, side, side] or [C] each
                moments = {k: found[k].reshape(len(found[k]), -1).float() for k in moments}
                shapes = {tuple(moment.shape) for moment in moments.values()}
                refuse(not shapes <= {(768, 256), (768, 1)}, f"shapes {shapes}")
        for name, moment in moments.items():
            self.register_buffer("latent_" + name, moment.T)                 # [N, C] or [1, C]
        self.eval().requires_grad_(False)

    def encode(self, images):
        """Images [B, 3, 256, 256] in [0, 1] -> latents [B, 256, 768], mean 0, variance 1."""
        mean, std = IMAGENET.to(images)
        x = (F.interpolate(images, (224, 224), mode="bicubic") - mean) / std
        z = self.encoder.forward_features(x)[:, 5:].float()  # without the class and four registers
        return (z - self.latent_mean) / (self.latent_var + 1e-5).sqrt()

    def decode(self, z):
        """Latents [B, 256, 768] -> images [B, 3, 256, 256] in [0, 1]."""
        return self.decoder(z * (self.latent_var + 1e-5).sqrt() + self.latent_mean).clamp(0, 1)


class RAEDecoderLayer(nn.Module):
    """A pre-norm block [B, N, D] -> [B, N, D] whose weights have the names of RAE's file."""

    def __init__(self, width, heads, mlp_width):
        super().__init__()
        def dense(a, b):
            return nn.ModuleDict({"dense": nn.Linear(a, b)})
        self.heads = heads
        self.attention = nn.ModuleDict({
            "attention": nn.ModuleDict({name: nn.Linear(width, width)
                                        for name in ("query", "key", "value")}),
            "output": dense(width, width)})
        self.intermediate, self.output = dense(width, mlp_width), dense(mlp_width, width)
        self.layernorm_before, self.layernorm_after = (nn.LayerNorm(width, 1e-12) for _ in range(2))

    def forward(self, x):
        h = self.layernorm_before(x)
        q, k, v = (rearrange(project(h), "b n (h k) -> b h n k", h=self.heads)
                   for project in self.attention["attention"].values())      # [B, H, N, K] each
        y = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n k -> b n (h k)")
        x = x + self.attention["output"]["dense"](y)
        h = F.gelu(self.intermediate["dense"](self.layernorm_after(x)))
        return x + self.output["dense"](h)                                   # [B, N, D]


class RAEDecoder(nn.Module):
    """De-normalised tokens [B, N, C] -> images [B, 3, H, W] (not clamped): a ViT of MAE's kind.

    load_state_dict takes the published file as it is; a missing or unexpected key is an error.
    """

    def __init__(self, latent_channels=768, tokens=256, width=1152, depth=28, heads=16,
                 mlp_width=4096, patch_size=16):
        super().__init__()
        self.patch_size = patch_size
        self.decoder_embed = nn.Linear(latent_channels, width)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(               # sines and cosines, from the file
            0.02 * torch.randn(1, 1 + tokens, width), requires_grad=False)
        self.decoder_layers = nn.ModuleList(
            RAEDecoderLayer(width, heads, mlp_width) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(width, 1e-12)
        self.decoder_pred = nn.Linear(width, 3 * patch_size ** 2)

    def forward(self, z):
        x = torch.cat([self.trainable_cls_token.expand(len(z), 1, -1), self.decoder_embed(z)], 1)
        x = x + self.decoder_pos_embed                                       # [B, 1 + N, D]
        for layer in self.decoder_layers:
            x = layer(x)
        x, p = self.decoder_pred(self.decoder_norm(x))[:, 1:].float(), self.patch_size
        x = rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=math.isqrt(z.shape[1]), p=p, q=p)
        mean, std = IMAGENET.to(x)
        return x * std + mean                                                # [B, 3, H, W]


# --------------------------------------------------------------------------------------------------
# 4. Networks that look at images: Inception for FID, VGG for the perceptual loss
# --------------------------------------------------------------------------------------------------

class InceptionFID(nn.Module):
    """Images [B, 3, H, W] in [0, 1] -> pool features [B, 2048], logits [B, 1008].

    The network of the original FID, from torchvision's Inception v3 with the weights and the three
    peculiarities of the TensorFlow graph: its average pools do not count the padding, its last
    block takes the maximum, and it has 1008 classes. weights: a path; None: the published file.
    """

    def __init__(self, weights=None):
        super().__init__()
        from torchvision.models import inception_v3
        self.network = inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
        state = torch.load(weights or published(INCEPTION), map_location="cpu", weights_only=True)
        self.network.load_state_dict(state)
        self.fc, self.network.fc = self.network.fc, nn.Identity()
        for name, block in self.network.named_children():
            if hasattr(block, "branch_pool"):
                self.pool_otherwise(block, maximum=name == "Mixed_7c")
        self.eval().requires_grad_(False)

    @staticmethod
    def pool_otherwise(block, maximum):
        """What torchvision pooled for the branch is put aside: the block's input is pooled anew."""
        seen = []

        def pool(*_):
            x = seen.pop()
            return (F.max_pool2d(x, 3, 1, 1) if maximum else
                    F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        block.branch_pool.register_forward_pre_hook(pool)

    def forward(self, images):
        x = F.interpolate(images.float(), (299, 299), mode="bilinear", align_corners=False)
        features = self.network(2 * x - 1)                                   # [B, 2048]
        return features, self.fc(features)


class VGGDistance(nn.Module):
    """Perceptual distance of images [B, 3, H, W] in [0, 1]: in features of five depths of VGG16.

    They are normalised over channels, as LPIPS does, without its learned weights.
    """

    def __init__(self, weights=None):
        super().__init__()
        from torchvision.models import vgg16
        network = vgg16()
        if weights:
            network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self.layers = network.features.eval().requires_grad_(False)

    def forward(self, a, b):
        mean, std = IMAGENET.to(a)
        x, total = (torch.cat([a, b]) - mean) / std, 0
        for layer in self.layers:
            if isinstance(layer, nn.MaxPool2d):
                a, b = F.normalize(x.float(), dim=1).chunk(2)
                total = total + (a - b).square().sum(1).mean()
            if x.shape[-1] == 1:                             # small images end before the network
                break
            x = layer(x)
        return total


def perceptual_distance(config, device):
    """-> VGGDistance with the published weights; None, and a word on it, if there are none."""
    if not config.perceptual_weight:
        return None
    try:
        path = published(VGG, config.weights_dir)
    except Missing as error:
        path = None
        print(f"Sphere Encoder learns without its perceptual loss: {error}")
    if not summed(torch.tensor(float(path is None))):        # all processes have it, or none
        return VGGDistance(path).to(device)


# --------------------------------------------------------------------------------------------------
# 5. FID
# --------------------------------------------------------------------------------------------------

def statistics(inception, batches, device):
    """Batches of images [B, 3, H, W] -> (mean, covariance) of their features, Inception Score.

    Of several processes each sees its own batches. Pixels are rounded to 8 bits, as in files. The
    score is over all images at once, from logits without the bias, as in the original.
    """
    sums = [torch.zeros(shape).double() for shape in (2048, (2048, 2048), 1008, 1, 1)]
    for x in batches:                                        # what makes them may run in bf16
        with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
            f, logits = (y.cpu().double() for y in inception((255 * x.to(device)).round() / 255))
        p = (logits - inception.fc.bias.cpu()).softmax(1)
        parts = f.sum(0), f.T @ f, p.sum(0), torch.special.entr(p).sum(), len(x)
        for total, part in zip(sums, parts):
            total += part
    first, second, p, entropy, n = map(summed, sums)
    covariance = (second - first[:, None] * first / n) / (n - 1)
    return (first / n, covariance), float((torch.special.entr(p / n).sum() - entropy / n).exp())


def inception_and_reference(config, folder, device):
    """-> InceptionFID, (mean, covariance) of the real images, in words what these are.

    From the .npz config.reference with mu and sigma, or of the training images: computed once, kept
    in reference.npz of the folder, and computed anew where that is of other images.
    """
    inception = InceptionFID(published(INCEPTION, config.weights_dir)).to(device)
    path = pathlib.Path(config.reference or folder / "reference.npz")
    of = f"{config.dataset}, {config.image_size} px"
    of += config.data_dir and f", {os.path.abspath(config.data_dir)}"

    def read():
        with explained(f"{path} has no mu and sigma of Inception features: "
                       f"{'name another' if config.reference else 'delete it'}"):
            with np.load(path) as file:                      # others keep images in it as well
                found = {name: file[name] for name in ("mu", "sigma", "n", "of") if name in file}
            refuse((*found["mu"].shape, *found["sigma"].shape) != (2048,) * 3, "wrong shape")
            return found
    file = read() if config.reference or path.exists() else {}
    if not config.reference and file.get("of") != of:
        images = load_images(config, "train")
        turns = tqdm(torch.arange(len(images)).split(100)[PART], "real features")
        batches = (images.pixels[chosen] / 255 for chosen in turns)
        (mean, covariance), _ = statistics(inception, batches, device)
        if not RANK:
            part = path.with_name("reference.part.npz")      # then renamed: never half a file
            np.savez(part, mu=mean, sigma=covariance, n=len(images), of=of)
            os.replace(part, path)
        summed(torch.zeros(1))
        file = read()
    images = f"{file['n']} training images of {file['of']}" if "of" in file else (
        "an unknown number of images")
    return inception, (file["mu"], file["sigma"]), f"{path} ({images})"


def evaluate_fid(config, autoencoder, denoiser, path):
    """Print, and write to `path`, FID and Inception Score at 1, 2, 4 and 6 steps."""
    device = next(denoiser.parameters()).device
    inception, reference, words = inception_and_reference(config, path.parent, device)
    labels, rows = torch.arange(config.eval_samples) % denoiser.num_classes, []
    print(f"against {words}, CFG {config.cfg_scale:g}:" + few(labels))
    for steps in (1, 2, 4, 6):
        each = dataclasses.replace(config, steps=steps)
        turns = tqdm(sample_batches(denoiser, autoencoder, labels, each), "samples",
                     len(labels.split(100)[PART]), leave=False)
        batches = (x for _, x in turns)
        moments, score = statistics(inception, batches, device)
        rows.append((steps, frechet_distance(*moments, *reference), score))
        print(f"  steps: {steps}   Fréchet distance FID-{len(labels)} {rows[-1][1]:.4f}   "
              f"Inception Score {score:.2f}")
    write_table(path, [["steps", f"fid_{len(labels)}", "inception_score"], *rows])


def reconstruction_fid(config, autoencoder, images, folder):
    """Print the rFID: held-out images after encoding and decoding, against the same ones before.

    With config.reference: against that.
    """
    device = autoencoder.latent_mean.device
    chosen = torch.arange(min(len(images), config.eval_samples))

    def batches(rebuild):
        for i in tqdm(chosen.split(100)[PART], "rebuilt features" if rebuild else "real features"):
            x = images.pixels[i].to(device) / 255
            if rebuild:
                with torch.no_grad(), autocast(device):
                    x = autoencoder.decode(autoencoder.encode(x))
            yield x
    if config.reference:
        inception, reference, words = inception_and_reference(config, folder, device)
    else:
        inception = InceptionFID(published(INCEPTION, config.weights_dir)).to(device)
        reference, words = statistics(inception, batches(False), device)[0], "the images themselves"
    moments, _ = statistics(inception, batches(True), device)
    print(f"Fréchet distance rFID-{len(chosen)} {frechet_distance(*moments, *reference):.4f} "
          f"against {words}" + few(chosen))


def few(samples):
    """A warning for FIDs of few samples."""
    return "" if len(samples) >= 2048 else (
        f"\nWarning: {len(samples)} samples are fewer than 2048: the FID is far too high. Raise "
        f"--eval-samples")


# --------------------------------------------------------------------------------------------------
# 6. Latents on disk
# --------------------------------------------------------------------------------------------------

def latent_file(path, shape, encode, device):
    """-> a function from numbers [B] to latents [B, N, C]: those of encode, kept in a file.

    Half precision, written once, shape [n, N, C]. A file that is half written is completed; one of
    other images or of another autoencoder (its shape or some of its latents differ) is refused.
    Where the disk has no room, encode itself is returned: it runs in every update.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    size, free = 2 * math.prod(shape), shutil.disk_usage(path.parent).free
    there = 512 * getattr(path.stat(), "st_blocks", math.inf) if path.exists() else 0
    full = not RANK and size - there > 0.9 * free
    if not (RANK or full or there >= size):                  # it takes its room at once: a disk
        if new := not path.exists():                         # full later would end the process
            print(f"{path} will take {size / 1e9:.1f} GB")
            np.lib.format.open_memmap(path, "w+", np.float16, shape)
        try:
            with open(path, "r+b") as file, contextlib.suppress(AttributeError):  # not Linux
                whole, piece = os.fstat(file.fileno()).st_size, 2 ** 30
                for start in tqdm(range(0, whole, piece), "room", leave=False):
                    os.posix_fallocate(file.fileno(), start, min(piece, whole - start))
        except OSError as error:                             # others: the disk cannot do this
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            full and new and path.unlink()
    if summed(torch.tensor([float(full)])):                  # all do the same
        print(f"no room for {path}: {size / 1e9:.1f} GB of latents, {free / 1e9:.1f} GB free. The "
              f"autoencoder will run in every update, which is slower")
        return encode
    with explained(f"{path} is no file of latents: delete it, or name another with --latents"):
        data = np.load(path, mmap_mode="r+")
        refuse(data.dtype != np.float16, "not in half precision")

    def written(rows):                                       # a new file holds zeros
        return data[rows].any(2).all(1)                      # [B]
    some = torch.linspace(0, shape[0] - 1, 4).long()
    other = data.shape != shape
    if not other:
        apart = np.abs(data[some] - encode(some).cpu().numpy()).mean((1, 2))
        other = (apart[written(some)] > 0.1).any()
    refuse(other, f"{path} holds latents of other images or of another autoencoder: delete it, or "
                  f"name another with --latents")
    for chosen in tqdm(torch.arange(len(data)).split(256)[PART], "encoding"):
        if not written(chosen[[0, -1]]).all():
            z = encode(chosen).half().cpu()
            data[chosen[:-1]] = z[:-1]
            data.flush()                                     # the last one, which tells that all
            data[chosen[-1]] = z[-1]                         # are there, reaches the disk last
    data.flush()
    summed(torch.zeros(1))
    return lambda chosen: sent(torch.from_numpy(data[chosen.numpy()]), device).float()


# --------------------------------------------------------------------------------------------------
# 7. On the sphere: looking and editing
# --------------------------------------------------------------------------------------------------

def angle_between(a, b):
    """Angles [B] between a and b [B, ...], radians; exact for small angles too."""
    a, b = spherify(a).flatten(1), spherify(b).flatten(1)
    return 2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1))


def slerp(a, b, t):
    """The point at share t (a number or [B]) of the great circle from a to b, both spherified."""
    a, b = spherify(a), spherify(b)
    t, omega = (torch.as_tensor(x, dtype=torch.float32, device=a.device).view(
        -1, *[1] * (a.dim() - 1)) for x in (t, angle_between(a, b)))
    arc = ((1 - t) * omega).sin() * a + (t * omega).sin() * b
    return spherify(torch.where(omega < 1e-3, torch.lerp(a, b, t), arc))


# --------------------------------------------------------------------------------------------------
# 8. Further commands
# --------------------------------------------------------------------------------------------------

def add_commands(add):
    """Add reconstruct and edit to the command line -> their parsers."""
    rebuild = add(reconstruct_command,
                  "eval_samples data_dir weights_dir features reference device".split())
    change = add(edit_command, "steps cfg_scale cfg_position tilt tilt_schedule fresh_noise seed "
                               "weights_dir device".split())
    two = {"nargs": 2, "metavar": ("A", "B")}
    change.add_argument("--between", **two, help="walk from A to B: image files, or seeds")
    change.add_argument("--image", nargs=1, metavar="A", help="make something else of A")
    change.add_argument("--crossover", **two, help="left half of A, right half of B")
    change.add_argument("--to", metavar="CLASS", help="class to denoise as (default: no class)")
    return rebuild, change


def reconstruct_command(given):
    """Show held-out images beside what the autoencoder (of them alone, without labels) makes."""
    config, autoencoder, _, out = open_checkpoint(given, "reconstructions.png")
    images = load_images(config, "test")
    psnr = reconstruction_figure(autoencoder, images, out)
    print(f"{out}: PSNR {psnr:.2f} dB on held-out images")
    if config.features == "inception":
        reconstruction_fid(config, autoencoder, images, out.parent)


@torch.no_grad()
def edit_command(given):
    """Walk from one image to another, give an image another class, or cross two images.

    A point of the sphere is tilted into noise and denoised. That of a seed is noise already.
    """
    modes = {mode: given.pop(mode) for mode in ("between", "image", "crossover") if mode in given}
    refuse(len(modes) != 1, "edit needs one of --between A B, --image A and --crossover A B")
    (mode, words), = modes.items()
    to, seeds = given.pop("to", None), all(word.isdecimal() for word in words)
    given.setdefault("tilt", 90.0 if seeds else 40.0)
    config, autoencoder, denoiser, out = open_checkpoint(given, "edited.png")
    shape, label = autoencoder.latent_shape, denoiser.num_classes
    device = next(denoiser.parameters()).device
    names = [*denoiser.classes, *map(str, range(label))]     # a class may be called by its number
    with explained(f"--to {to}: choose from {', '.join(denoiser.classes)}"):
        label = label if to is None else names.index(to) % label

    def point(word):
        if word.isdecimal():
            return spherify(seeded_noise(1, shape, int(word))[0]).to(device)
        with explained(f"--{mode} {word}: neither a seed nor an image file"):
            x = open_image(word, config.image_size)[None].to(device) / 255
        return spherify(autoencoder.encode(x))
    points = torch.cat([point(word) for word in words])                      # [1 or 2, N, C]
    if mode == "between":
        t = torch.linspace(0, 1, 9)
        points = slerp(*(end.expand(9, *shape) for end in points), t)
        words = [f"{x:.2f}" for x in t]
    elif mode == "crossover":
        side = math.isqrt(shape[0])
        left = (torch.arange(shape[0], device=device) % side < side / 2)[:, None]
        words = [*words, "half of each"]
        points = torch.cat([points, torch.where(left, *points)[None]])
    # the same noise for all points: what differs in the pictures is the way alone
    noise = seeded_noise(1, shape, config.seed, config.steps if config.fresh_noise else 1)
    noise = noise.to(device).expand(config.steps, len(points), *shape).clone()
    alpha = math.radians(config.tilt)
    noise[0] = points if seeds else noisy_spherify(points, noise[0], alpha)
    labels = torch.full((len(points),), label, device=device)
    z = sample(denoiser, labels, config.steps, config.cfg_scale, alpha, config.tilt_schedule,
               sphere=config.spherify, noise=noise, share=SHARES[config.cfg_position])
    made = z.clamp(0, 1) if z.dim() == 4 else autoencoder.decode(z)
    rows = [x.cpu() for x in (autoencoder.decode(points), autoencoder.decode(noise[0]), made)]
    tilted = "random" if seeds else f"tilted by\n{config.tilt:g} degrees"
    picture(out, rows, ["input", tilted, f"as {to}" if to else "denoised"], words)
    if mode == "between" and not RANK:
        frames = [Image.fromarray((255 * x).byte().permute(1, 2, 0).numpy()) for x in made.cpu()]
        frames[0].save(out.with_suffix(".gif"), save_all=True, append_images=frames[1:],
                       duration=150, loop=0)
    print(out)


def side_by_side(paths, given):
    """Print a table of several runs and leave a figure, samples from the same noise.

    Parameters; FLOPs of an image (2 a multiply-add) and milliseconds of an image (50 at a time, the
    runs in turns, the best of three), decoding included; Fréchet distance in features of fixed
    random weights, learned from nothing: they are no nearer to one run than to another.
    """
    out = pathlib.Path(given.pop("out", "side_by_side.png"))
    refuse(out.suffix != ".png" or out.is_dir(), f"--out {out}: not a file that ends in .png")
    given["device"] = resolve_device(given.get("device", "auto"))
    jobs, sheets, kinds = {}, {}, set()
    for path in paths:
        config, autoencoder, denoiser = load_run(path, **given)
        kinds.add((config.dataset, config.data_dir, config.image_size, *denoiser.classes))
        for steps in (1, 2, 4, 6):
            each = dataclasses.replace(config, steps=steps)
            jobs[path, steps] = (denoiser, autoencoder, each), []
    refuse(len(kinds) > 1, "these runs have not learned the same images")
    real = load_images(config, "test")
    reference = gaussian(real.pixels[i] / 255 for i in torch.arange(len(real)).split(100))
    labels = torch.arange(min(config.eval_samples, 2000))    # all are held in memory
    labels = labels % denoiser.num_classes
    for _ in range(3):
        for (denoiser, autoencoder, each), seconds in jobs.values():
            began = time.perf_counter()
            sample_images(denoiser, autoencoder, labels[:50], each)
            seconds.append((time.perf_counter() - began) / len(labels[:50]))
    print(f"{len(labels)} samples, {len(real)} held-out images; Fréchet distance in features of "
          f"an untrained network, in units of the real variance:")
    print(f"{'run':24} steps   CFG  parameters    GFLOPs        ms  Fréchet distance")
    for (path, steps), ((denoiser, autoencoder, each), seconds) in jobs.items():
        with FlopCounterMode(display=False) as counter:
            sample_images(denoiser, autoencoder, labels[:1], each)
        images = sample_images(denoiser, autoencoder, labels, each)
        distance = frechet_distance(*gaussian(images), *reference) / float(reference[1].trace())
        size = sum(p.numel() for model in {autoencoder, denoiser} for p in model.parameters())
        print(f"{path:24} {steps:5} {each.cfg_scale:5g} {size:11,} "
              f"{counter.get_total_flops() / 1e9:9.3f} {1000 * min(seconds):9.2f} {distance:17.4f}")
        sheets[f"{path}: {steps}"] = images[:12]
    picture(out, [*sheets.values()], [*sheets], [denoiser.classes[y] for y in labels[:12]])
    print(out)
