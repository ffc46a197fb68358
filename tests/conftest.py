"""What all tests share: one thread, small sizes, a finished run of a few seconds."""
import functools
import os
import pathlib
import signal
import subprocess
import sys

os.environ["OMP_NUM_THREADS"] = "1"                          # torch reads it when it is imported
import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import sphere_latent as sl  # noqa: E402

SMALL = ["--image-size", "16", "--patch-size", "8", "--latent-channels", "8",
         "--autoencoder-steps", "6", "--train-steps", "6", "--batch-size", "8",
         "--eval-samples", "24", "--device", "cpu"]
WHOLE = sl.drawn_images, sl.MODEL_SIZES["tiny"]              # the sizes that users get

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config):
    # As in a terminal. A job in the background of a shell ignores SIGINT, and so would the tests.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "slow: over five seconds; leave them out with -m 'not slow'")


@functools.cache
def fewer_drawings(split, size, seed=0):
    """As sl.drawn_images, but 240 drawings to train on and 48 to test on."""
    labels = torch.arange(240 if split == "train" else 48) % len(sl.SPECIES)
    generator = torch.Generator().manual_seed(2 * seed + (split == "test"))
    pixels = (255 * sl.draw_flowers(labels, size, generator)).round().byte()
    return sl.PixelImages(pixels, labels, [species[0] for species in sl.SPECIES])


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


# Where the CPU does not multiply bf16, half of the default's updates: the whole takes too long.
HAS_BF16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
UPDATES = [] if HAS_BF16 else ["--autoencoder-steps", "200", "--train-steps", "500"]


@pytest.fixture(scope="session")
def default_run(tmp_path_factory):
    """`train` with the sizes that users get, started and not waited for -> (process, folder)."""
    folder = tmp_path_factory.mktemp("default")
    command = [sys.executable, str(ROOT / "sphere_latent.py"), "train", *UPDATES]
    with open(folder / "output", "w") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output)
    yield process, folder
    process.kill()
    process.wait()


@pytest.fixture(scope="session", autouse=True)
def start_early(request):
    """The default run is started first and looked at last: the other tests run beside it."""
    if any("default_run" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("default_run")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: (item.get_closest_marker("slow") is not None,
                                 "default_run" in item.fixturenames))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
