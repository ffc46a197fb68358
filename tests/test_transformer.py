"""The one transformer, and the denoiser that is made of it."""
import pytest
import torch
from conftest import points

import sphere_latent as sl


def random_denoiser():
    """16 tokens of 8 channels, 3 classes; no weight is zero, so that every part has an effect."""
    torch.manual_seed(0)
    denoiser = sl.Denoiser((16, 8), 3, 64, 2, 2)
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return denoiser


@pytest.mark.parametrize("size, depth, count", [("B", 12, 130_851_840), ("XL", 28, 675_160_896)])
def test_number_of_parameters(size, depth, count):
    """That of XL, and of its tensors, is published; that of B is what these rules make of DiT-B."""
    with torch.device("meta"):
        denoiser = sl.denoiser_for(sl.Config(model_size=size), (256, 768), num_classes=1000)
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == count
    assert len(denoiser.state_dict()) == 401 - 14 * (28 - depth)


def test_a_new_transformer_is_the_zero_function_and_its_blocks_the_identity():
    model, x = sl.Transformer(16, 8, 5, 64, 2, 2, num_classes=3), torch.randn(2, 16, 64)
    assert torch.equal(model(torch.randn(2, 16, 8), torch.tensor([0, 3])), torch.zeros(2, 16, 5))
    assert torch.equal(model.blocks[0](x, torch.randn(2, 64)), x)
    assert sl.modulate(3, shift=1, scale=0.5) == 5.5         # 3 (1 + 0.5) + 1


def test_every_label_and_every_position_gives_another_output():
    model, x = random_denoiser(), points(0, 1, 1, 8).expand(4, 16, 8)        # all tokens are equal
    outputs = model(x, torch.tensor([0, 1, 2, 3]))
    tokens = outputs.flatten(0, 1)
    assert (torch.cdist(tokens, tokens) + torch.eye(64)).min() > 1e-2
    torch.testing.assert_close(model(x), outputs[3:].expand(4, -1, -1))      # the null label's
