import functools
import os
import pathlib
import signal
import subprocess
import sys

os.environ["OMP_NUM_THREADS"] = "1"                          # the quickest for networks so small; read by torch
import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import sphere_latent as sl  # noqa: E402

SMALL = ("--image-size 16 --patch-size 8 --latent-channels 8 --autoencoder-width 32 --autoencoder-depth 1 "
         "--autoencoder-steps 6 --train-steps 6 --batch-size 8 --eval-samples 24 --device cpu").split()
DRAW, TINY = sl.drawn_images, sl.MODEL_SIZES["tiny"]

# Where the CPU does not multiply bf16, the default takes about a quarter of an hour: there, two fifths of its updates.
UPDATES = [] if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else [
    "--autoencoder-steps", "450", "--train-steps", "700"]


@functools.lru_cache
def fewer_drawings(split, size, seed=0):
    images = DRAW(split, size, seed)
    n = len(images) // 5
    return sl.Images(images.pixels[:n], images.labels[:n], images.classes)


@pytest.fixture(scope="session", autouse=True)
def small():
    """The quick tests train a smaller denoiser on a fifth of the drawings."""
    sl.drawn_images, sl.MODEL_SIZES["tiny"] = fewer_drawings, (64, 2, 2)


@pytest.fixture
def whole(small):
    """The sizes that users get."""
    sl.drawn_images, sl.MODEL_SIZES["tiny"] = DRAW, TINY
    yield
    sl.drawn_images, sl.MODEL_SIZES["tiny"] = fewer_drawings, (64, 2, 2)


@pytest.fixture(scope="session")
def default_run(tmp_path_factory):
    """The command of the README, on one thread, started and not waited for -> (process, its folder, with out and err)."""
    folder = tmp_path_factory.mktemp("default")
    with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
        process = subprocess.Popen([sys.executable, str(ROOT / "sphere_latent.py"), "train", *UPDATES],
                                   cwd=folder, stdout=out, stderr=err)
    yield process, folder
    process.kill()
    process.wait()


@pytest.fixture(scope="session", autouse=True)
def beside(request):
    """It is started first and tested last: all the others fit into its time, on the other core."""
    if any("default_run" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("default_run")


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
    config.addinivalue_line("markers", "slow: runs of the real size, other processes, attempts to break it; leave out: -m 'not slow'")


def pytest_collection_modifyitems(items):
    for item in items:
        if {"rae", "placed", "inceptions"} & set(item.fixturenames):                   # networks of full size
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: (item.get_closest_marker("slow") is not None, "default_run" in item.fixturenames))
