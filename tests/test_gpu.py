"""The path of a GPU without a GPU: FakeTensorMode has devices and shapes, but computes nothing.

It raises where devices are mixed and where the value of a tensor is asked for. It has neither
backward passes nor random generators of CUDA; these are left out here.
"""
import contextlib
import copy
import dataclasses

import pytest
import torch
from test_readme import SmallRAE
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import sphere_latent as sl

VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
pytestmark = pytest.mark.skipif(VERSION < (2, 14), reason="torch 2.7 and 2.9 abort on fake CUDA "
                                "tensors, 2.14 does not; the others were not tried")
CUDA = torch.device("cuda", 0)
CONFIG = sl.Config(image_size=16, patch_size=8, latent_channels=8, precision="float32")


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for the GPU: values and blocking copies."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        result = function(*arguments, **options)
        self.count += "local_scalar_dense" in function.__name__
        if function.__name__.startswith("_to_copy"):
            crosses = arguments[0].device.type != result.device.type
            self.count += crosses and not options.get("non_blocking", False)
        return result


@pytest.fixture
def to_cuda(monkeypatch):
    """A function that moves modules to a GPU that does not exist; from then on tensors are fake."""
    with contextlib.ExitStack() as modes:
        def move(*modules):
            modes.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            for part in [part for module in modules for part in module.modules()]:
                for tensors, kind in ((part._parameters, torch.nn.Parameter),
                                      (part._buffers, torch.Tensor)):
                    tensors.update({name: kind(torch.empty_like(x, device=CUDA))
                                    for name, x in tensors.items() if x is not None})
        for name in ("rand", "randn"):                       # without the generator
            draw = getattr(torch, name)
            monkeypatch.setattr(torch, name, lambda *size, draw=draw, generator=None, **options:
                                draw(*size, **options))
        monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
        monkeypatch.setattr(sl, "index_batches", lambda count: [(0, list(range(count)))])
        monkeypatch.setattr(sl, "generator_for", lambda *purpose, device: type(
            "Generator", (), {"device": device}))
        yield move


@pytest.mark.parametrize("method", ["sphere-latent", "sphere-encoder", "dinov2-b"])
def test_an_update_waits_for_nothing_and_images_stay_on_the_gpu(to_cuda, monkeypatch, method):
    size, encoder, loss_of = 16, sl.TinyRAE(16, 8, 8), sl.sphere_losses
    if method == "dinov2-b":
        size, encoder = 256, SmallRAE()
    config = dataclasses.replace(CONFIG, image_size=size)
    model = sl.Denoiser(encoder.latent_shape, 3, 64, 1, 2)
    if method == "sphere-encoder":
        config = dataclasses.replace(config, **sl.SPHERE_ENCODER)            # other angles
        model, distance = sl.SphereEncoder(config, 3), torch.nn.MSELoss()
        loss_of = lambda network, *rest: network(*rest, distance)
    average, features = copy.deepcopy(model), sl.UntrainedFeatures()
    to_cuda(model, average, encoder, features)
    loaded = torch.zeros(5, 3, size, size, dtype=torch.uint8), torch.zeros(5, dtype=torch.long)
    monkeypatch.setattr(sl, "make_loader", lambda *arguments: [loaded])
    optimizer = torch.optim.SGD(model.parameters())
    with Waits() as waits:
        [(x, labels)] = sl.random_batches([], 5, range(1), config, "update", CUDA)
        z = x if method == "sphere-encoder" else encoder.encode(x)
        batch = list(zip(z.split(3), labels.split(3)))
        log = sl.training_step(model, average, optimizer, batch, config,
                               sl.generator_for(device=CUDA), loss_of)
    log.pop("gradient_norm")                                 # there are no gradients
    assert waits.count == 0 and {loss.device for loss in log.values()} == {CUDA}
    run = (config, model, None) if method == "sphere-encoder" else (config, encoder, model)
    [(_, images)] = sl.sample_batches(run, torch.zeros(5, dtype=torch.long), 3)
    rebuilt, psnr = sl.rebuild(run, x)
    for result in (images, rebuilt):
        assert result.shape == x.shape and result.device == CUDA
    assert psnr.device == CUDA
    mean, covariance = sl.feature_statistics(features, [images, x])
    assert mean.shape == (256,) and covariance.device.type == "cpu"


def test_each_process_of_torchrun_has_a_gpu_of_its_own(monkeypatch):
    chosen = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    monkeypatch.setattr(torch, "zeros", lambda size, device: torch.ones(size))
    assert sl.find_device("cuda") == torch.device("cuda", 1)
    assert chosen == ["cuda:1", "high"]
