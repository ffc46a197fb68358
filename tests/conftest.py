"""What all tests share: one thread, small sizes, a finished run of a few seconds."""
import functools
import os
import pathlib
import subprocess
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")               # torch reads it when it is imported
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import sphere_latent as sl  # noqa: E402

SMALL = ["--image-size", "16", "--patch-size", "8", "--latent-channels", "8",
         "--autoencoder-steps", "6", "--train-steps", "6", "--batch-size", "8",
         "--eval-samples", "24", "--device", "cpu"]
WHOLE = sl.drawn_images, sl.MODEL_SIZES["tiny"]              # the sizes that users get


def pytest_addoption(parser):
    parser.addoption("--precision", choices=("float32", "bfloat16"),
                     help="of matrix products in all tests; default: bfloat16 where it is fast")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: over five seconds; leave them out with -m 'not slow'")
    precision = config.getoption("precision")
    if precision is not None:
        sl.has_fast_bfloat16 = lambda device: precision == "bfloat16"


def points(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def angle_between(a, b):
    """Angles [B] of latents [B, N, C], radians; exact where they are small, too."""
    a, b = sl.spherify(a).flatten(1), sl.spherify(b).flatten(1)
    return 2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1))


def fill(folder, *names):
    """Make small images, and empty files under other names. Returns the folder."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        if path.suffix == ".png":
            Image.new("RGB", (9, 9)).save(path)
    return folder


@functools.cache
def fewer_drawings(split, size):
    """240 drawings to train on and 48 to test on, of classes not in the order of the alphabet."""
    labels = torch.arange(240 if split == "train" else 48) % len(sl.SPECIES)
    generator = torch.Generator().manual_seed(int(split == "test"))
    pixels = (255 * sl.draw_flowers(labels, size, generator)).round().byte()
    return sl.Images(labels, [species[0] for species in reversed(sl.SPECIES)], pixels=pixels)


@pytest.fixture(scope="session", autouse=True)
def small_sizes():
    """All tests draw fewer flowers and train a smaller denoiser."""
    sl.drawn_images, sl.MODEL_SIZES["tiny"] = fewer_drawings, (64, 2, 2)


@pytest.fixture(scope="session")
def small_run(small_sizes, tmp_path_factory):
    """The folder of a finished run. Copy it before you change it."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    assert sl.main(["train", *SMALL, "--out", str(folder)]) == 0
    return folder


def pytest_collection_modifyitems(items):
    """Slow tests come after the others, and the one that waits for the default run comes last."""
    items.sort(key=lambda item: (item.get_closest_marker("slow") is not None,
                                 item.path.name == "test_default_run.py"))


@pytest.fixture(scope="session", autouse=True)
def default_run(request, tmp_path_factory):
    """`train` with the sizes that users get, but half the updates, beside all other tests."""
    if request.session.items[-1].path.name != "test_default_run.py":
        yield None
        return
    precision = request.config.getoption("precision") or "auto"
    command = [sys.executable, str(ROOT / "sphere_latent.py"), "train", "--precision", precision,
               "--autoencoder-steps", "200", "--train-steps", "500", "--ema-decay", "0.99"]
    folder = tmp_path_factory.mktemp("default")
    with open(folder / "output", "w") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output)
    yield process, folder
    process.kill()
    process.wait()


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
