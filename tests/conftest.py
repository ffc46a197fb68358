import functools
import pathlib
import signal
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import sphere_latent as sl  # noqa: E402

SMALL = ("--image-size 16 --patch-size 8 --latent-channels 8 --autoencoder-width 32 --autoencoder-depth 1 "
         "--autoencoder-steps 6 --train-steps 6 --batch-size 8 --eval-samples 24 --device cpu").split()
DRAW, TINY, THREADS = sl.drawn_images, sl.MODEL_SIZES["tiny"], torch.get_num_threads()


@functools.lru_cache
def fewer_drawings(split, size, seed=0):
    images = DRAW(split, size, seed)
    n = len(images) // 5
    return sl.Images(images.pixels[:n], images.labels[:n], images.classes)


@pytest.fixture(scope="session", autouse=True)
def small():
    """The quick tests train a smaller denoiser on a fifth of the drawings; so small, one thread is the quickest."""
    torch.set_num_threads(1)
    sl.drawn_images, sl.MODEL_SIZES["tiny"] = fewer_drawings, (64, 2, 2)


@pytest.fixture
def whole(small):
    """The sizes that users get."""
    sl.drawn_images, sl.MODEL_SIZES["tiny"] = DRAW, TINY
    torch.set_num_threads(THREADS)
    yield
    sl.drawn_images, sl.MODEL_SIZES["tiny"] = fewer_drawings, (64, 2, 2)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def run(small, tmp_path_factory):
    """A finished run of a few seconds on the drawn flowers."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    assert sl.main(["train", *SMALL, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def predecessor(small, tmp_path_factory):
    """A finished run of Sphere Encoder, a few updates."""
    folder = tmp_path_factory.mktemp("runs") / "predecessor"
    assert sl.main(["train", *SMALL, "--method", "sphere-encoder", "--out", str(folder)]) == 0
    return folder


def pytest_configure(config):
    signal.signal(signal.SIGINT, signal.default_int_handler)     # as in a terminal; a job in the background ignores it
    config.addinivalue_line("markers", "slow: minutes, not seconds; leave out with -m 'not slow'")


def pytest_collection_modifyitems(items):
    for item in items:
        if {"rae", "placed", "inceptions"} & set(item.fixturenames):                   # networks of full size
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)         # slow ones last
