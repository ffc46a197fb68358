"""An independent judge of runs on the drawn flowers: a small classifier, trained on drawings alone.

    python tests/experiments/judge.py runs/drawn [RUN ...] [--samples 600] [--seed 1234]

It shares no weights and no features with anything in sphere_latent.py. For rebuilt held-out
drawings and for samples at 1, 2, 4 and 6 steps it prints
  named      how often it gives a picture the class that was asked for
  judge      the Fréchet distance to held-out drawings in its features, in units of their variance
  untrained  the same in untrained features, as `evaluate` prints it
  seams      how visible patch borders are; it matters because the distances do not see them
and last what real drawings score: 600 of the training set against the held-out ones.
"""
import pathlib
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import sphere_latent as sl  # noqa: E402


class Judge(nn.Module):
    """Images [B, 3, H, W] -> features [B, 128]; head makes logits of them."""

    def __init__(self, classes, width=32):
        super().__init__()
        widths = [3, width, 2 * width, 4 * width, 4 * width]
        layers = []
        for a, b in zip(widths, widths[1:]):
            layers += [nn.Conv2d(a, b, 4, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(4 * width, classes)

    def forward(self, images):
        return self.body(2 * images - 1).amax((2, 3))


def train_judge(images, steps=500, seed=0):
    """A judge in eval mode, trained on Images in memory."""
    torch.manual_seed(seed)
    judge = Judge(len(images.classes)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(images), (64,))
        with sl.autocast(torch.device("cpu"), "auto"):
            logits = judge.head(judge(images.pixels[chosen] / 255))
        loss = F.cross_entropy(logits.float(), images.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


def seams(images, patch=16):
    """Mean step in brightness across patch borders over that two and three pixels beside them."""
    ratios = []
    for steps in (images.diff(dim=3), images.diff(dim=2).transpose(2, 3)):
        profile = steps.abs().mean((0, 1, 2))                # one number for each column or row
        borders = torch.arange(patch - 1, len(profile), patch)
        beside = torch.cat([borders + offset for offset in (-3, -2, 2, 3)])
        ratios.append(profile[borders].mean() / profile[beside].mean())
    return (sum(ratios) / 2).item()                          # held-out drawings have 1.03


class Scores:
    """Compares pictures with held-out drawings; call it with images [n, 3, H, W], labels [n]."""

    def __init__(self, train, held_out):
        self.judge = train_judge(train)
        self.networks = {"judge": self.judge, "untrained": sl.UntrainedFeatures()}
        batches = (held_out.pixels / 255).split(100)
        self.real = {name: sl.feature_statistics(network, batches)
                     for name, network in self.networks.items()}

    @torch.no_grad()
    def __call__(self, images, labels):
        batches = images.split(100)
        logits = torch.cat([self.judge.head(self.judge(some)) for some in batches])
        found = {"named": (logits.argmax(1) == labels).float().mean().item()}
        for name, (mean, covariance) in self.real.items():
            pictures = sl.feature_statistics(self.networks[name], batches)
            distance = sl.frechet_distance(*pictures, mean, covariance)
            found[name] = distance / covariance.trace().item()
        return {**found, "seams": seams(images)}


def judge_run(scores, path, held_out, samples=600, seed=1234, step_counts=sl.STEP_COUNTS):
    """Yield (what, PSNR or "", scores) for a run: rebuilt drawings, then samples."""
    run = sl.load_run(path, seed=seed)
    batches = (held_out.pixels / 255).split(100)
    rebuilt, psnr = zip(*[sl.rebuild(run, x) for x in batches])
    yield "rebuilt", f"{torch.cat(psnr).mean():.2f}", scores(torch.cat(rebuilt), held_out.labels)
    labels = sl.balanced_labels(samples, len(held_out.classes))
    for steps in step_counts:
        images = sl.sample_images(run, labels, steps)
        yield "1 step" if steps == 1 else f"{steps} steps", "", scores(images, labels)


def show(name, what, psnr, found):
    print(f"{name:24} {what:8} {psnr:>6} {found['named']:6.3f} {found['judge']:7.4f} "
          f"{found['untrained']:9.4f} {found['seams']:6.2f}", flush=True)


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--samples", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1234)
    given = parser.parse_args()
    train, held_out = sl.drawn_images("train", 64), sl.drawn_images("test", 64)
    scores = Scores(train, held_out)
    print(f"{'run':24} {'':8} {'PSNR':>6} {'named':>6} {'judge':>7} {'untrained':>9} {'seams':>6}")
    for run in given.runs:
        for what, psnr, found in judge_run(scores, run, held_out, given.samples, given.seed):
            show(run, what, psnr, found)
    show("drawings", "real", "", scores(train.pixels[:600] / 255, train.labels[:600]))


if __name__ == "__main__":
    main()
