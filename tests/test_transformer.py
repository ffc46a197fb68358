"""The one transformer, and the denoiser that is made of it."""
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import sphere_latent as sl


def random_denoiser(**options):
    """16 tokens of 8 channels, 3 classes; no weight is zero, so that every part has an effect."""
    torch.manual_seed(0)
    denoiser = sl.Denoiser((16, 8), 3, 64, 2, 2, **options)
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return denoiser


def test_xl_has_the_published_number_of_parameters():
    with torch.device("meta"):
        denoiser = sl.denoiser_for(sl.Config(model_size="XL"), (256, 768), num_classes=1000)
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == 675_160_896
    assert len(denoiser.state_dict()) == 401


def test_a_new_transformer_is_the_zero_function_and_its_blocks_the_identity():
    model = sl.Transformer(16, 8, 5, 64, 2, 2, num_classes=3)
    assert torch.equal(model(torch.randn(2, 16, 8), torch.tensor([0, 3])), torch.zeros(2, 16, 5))
    x = torch.randn(2, 16, 64)
    assert torch.equal(model.blocks[0](x, torch.randn(2, 64)), x)


def test_every_label_gives_another_output():
    outputs = random_denoiser()(torch.ones(4, 16, 8), torch.arange(4))
    assert (torch.cdist(outputs.flatten(1), outputs.flatten(1)) + torch.eye(4)).min() > 1e-2


def test_no_labels_mean_the_null_label():
    model, x = random_denoiser(), torch.randn(2, 16, 8)
    assert torch.equal(model(x), model(x, torch.tensor([3, 3])))


@pytest.mark.parametrize("training", [True, False])
def test_attention_against_a_loop_over_heads(training):
    """Both ways to compute it: softmax in training on a CPU, the fused kernel otherwise."""
    block, x = random_denoiser().blocks[0], torch.randn(2, 16, 64)
    heads = []
    for columns in torch.arange(64).chunk(2):                                # K = 32
        q, k, v = [project(x)[..., columns] for project in (block.q, block.k, block.v)]
        q, k = [F.rms_norm(a, (32,), norm.weight, 1e-6)
                for a, norm in ((q, block.q_norm), (k, block.k_norm))]
        heads.append((q @ k.mT / 32 ** 0.5).softmax(-1) @ v)
    with torch.set_grad_enabled(training):
        found = block.attention(x)
    torch.testing.assert_close(found, torch.cat(heads, -1) @ block.out.weight.T)


def test_checkpointed_blocks_run_twice_and_give_the_same_output_and_gradient():
    results, calls = [], []
    for checkpoint_blocks in (False, True):
        model = random_denoiser(checkpoint_blocks=checkpoint_blocks)
        model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(checkpoint_blocks))
        output = model(torch.ones(2, 16, 8), torch.tensor([0, 1]))
        output.square().sum().backward()
        results.append([output, *[p.grad for p in model.parameters() if p.requires_grad]])
    assert calls == [False, True, True]
    torch.testing.assert_close(*results)


def test_positions_are_sines_and_cosines_of_column_then_row():
    positions = sl.sincos_positions(tokens=9, width=8)       # frequencies 1 and 1/100
    row, column = 1, 2
    expected = torch.tensor([[f * n for f in (1, 0.01)] for n in (column, row)])
    expected = torch.cat([expected.sin(), expected.cos()], dim=1).flatten()
    torch.testing.assert_close(positions[3 * row + column], expected)


def teraflops(network, *inputs):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*inputs)
    return counter.get_total_flops() / 1e12


def test_latents_are_about_seven_times_cheaper_than_pixels():
    """The XL models for an image of 256 pixels, 4 steps, guidance: 2.13 and 15.2 TFLOPs."""
    with torch.device("meta"):
        label = torch.zeros(1, dtype=torch.long)
        size = (*sl.MODEL_SIZES["XL"], 1000)
        denoiser = teraflops(sl.Transformer(256, 768, 768, *size), torch.empty(1, 256, 768), label)
        decoder = teraflops(sl.RAEDecoder(), torch.empty(1, 256, 768))
        # Sphere Encoder's half: 1,024 tokens. It decodes in four steps, encodes before three.
        half = teraflops(sl.Transformer(1024, 64, 192, *size), torch.empty(1, 1024, 64), label)
    latent, pixels = 2 * 4 * denoiser + decoder, 2 * (4 + 3) * half
    assert latent == pytest.approx(2.13, rel=0.01)
    assert pixels == pytest.approx(15.2, rel=0.1)            # as its public code
