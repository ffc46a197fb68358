import functools
import os
import pathlib
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SMALL = ("--image-size 16 --patch-size 8 --latent-channels 8 --autoencoder-width 32 --autoencoder-depth 1 "
         "--autoencoder-steps 6 --train-steps 6 --batch-size 8 --eval-samples 24 --device cpu").split()


@pytest.fixture(scope="session", autouse=True)
def few_drawings():
    """The tests train on a fifth of the drawings, drawn once; drawn_images itself is tested whole."""
    import sphere_latent as sl
    draw = sl.drawn_images

    @functools.lru_cache
    @functools.wraps(draw)
    def fewer(split, size, seed=0):
        images = draw(split, size, seed)
        n = len(images) // 5
        return sl.Images(images.pixels[:n], images.labels[:n], images.classes)
    sl.drawn_images = fewer
    yield
    sl.drawn_images = draw


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A finished run of a few seconds on the drawn flowers."""
    import sphere_latent as sl
    folder = tmp_path_factory.mktemp("runs") / "small"
    assert sl.main(["train", *SMALL, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes, not seconds; leave out with -m 'not slow'")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)         # slow ones last
