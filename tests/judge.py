"""An independent judge of the drawn flowers: a small convolutional classifier, trained on the drawings alone.

It shares no weights and no features with anything in `sphere_latent.py`. `python tests/judge.py RUN [RUN ...]` trains it and
prints, for 1, 2, 4 and 6 steps, how often it gives a sample the class that was asked for, and the Frechet distance of the
samples to held-out drawings in its features.
"""
import pathlib
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import sphere_latent as sl  # noqa: E402


class Judge(nn.Module):
    def __init__(self, classes, width=32):
        super().__init__()
        widths = [3, width, 2 * width, 4 * width, 4 * width]
        self.body = nn.Sequential(*[layer for a, b in zip(widths, widths[1:]) for layer in (
            nn.Conv2d(a, b, 4, 2, 1), nn.BatchNorm2d(b), nn.ReLU())])
        self.head = nn.Linear(4 * width, classes)

    def features(self, images):
        return self.body(images * 2 - 1).amax((2, 3))

    def forward(self, images):
        return self.head(self.features(images))


def train_judge(train, test, steps=500, seed=0):
    """-> judge in eval mode, its accuracy on the held-out images."""
    torch.manual_seed(seed)
    judge = Judge(len(train.classes)).to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(judge.parameters(), 3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(train), (64,))
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(judge(train.pixels[chosen] / 255), train.labels[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    judge.eval()
    return judge, accuracy(judge, test.pixels / 255, test.labels)


@torch.no_grad()
def accuracy(judge, images, labels):
    hits = [(judge(x).argmax(1) == y).float() for x, y in zip(images.split(100), labels.split(100))]
    return torch.cat(hits).mean().item()


@torch.no_grad()
def judge_features(judge, images):
    return torch.cat([judge.features(x) for x in images.split(100)])


def judge_run(judge, run, count, sampling):
    """-> {setting: (share of samples given the asked class, Frechet distance in the judge's features)}."""
    config, autoencoder, denoiser = sl.load_run(run)
    held_out = sl.load_images(config, "test")

    def gaussian(images):
        features = judge_features(judge, images).double()
        return features.mean(0), torch.cov(features.T)
    reference = gaussian(held_out.pixels / 255)
    scale = float(reference[1].trace())                      # in units of the drawings' own variance
    labels = torch.arange(count) % len(held_out.classes)
    with torch.no_grad():
        rebuilt = torch.cat([autoencoder.decode(autoencoder.encode(x / 255)) for x in held_out.pixels.split(100)])
    results = {"rebuilt": (accuracy(judge, rebuilt, held_out.labels),
                           sl.frechet_distance(*gaussian(rebuilt), *reference) / scale)}
    for name, changes in sampling.items():
        images = sl.sample_images(denoiser, autoencoder, labels,
                                  sl.dataclasses.replace(config, seed=1234, **changes))
        results[name] = (accuracy(judge, images, labels),
                         sl.frechet_distance(*gaussian(images), *reference) / scale)
    return results


if __name__ == "__main__":
    torch.manual_seed(0)
    judge, held_out_accuracy = train_judge(sl.drawn_images("train", 64), sl.drawn_images("test", 64))
    print(f"judge: {held_out_accuracy:.3f} of held-out drawings right")
    for run in sys.argv[1:]:
        for name, (share, distance) in judge_run(judge, run, 600, {f"{n} steps": {"steps": n} for n in (1, 2, 4, 6)}).items():
            print(f"{run}  {name:8s}  asked class {share:.3f}  Frechet distance in the judge's features {distance:.4f}")
