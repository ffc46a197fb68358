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
