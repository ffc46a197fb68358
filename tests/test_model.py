"""The transformer, the denoiser and TinyRAE."""
import contextlib

import pytest
import torch
import torch.nn.functional as F

import sphere_latent as sl


def small_denoiser(shape=(16, 8), classes=3):
    torch.manual_seed(0)
    denoiser = sl.Denoiser(shape, classes, 64, 2, 2)
    for p in denoiser.parameters():                                  # away from the zero start
        if p.requires_grad and p.dim() > 1:
            torch.nn.init.normal_(p, std=0.1)
    return denoiser.eval()


def test_xl_has_the_published_number_of_parameters_and_tensors():
    with torch.device("meta"):
        model = sl.denoiser_for(sl.Config(model_size="XL"), (256, 768), 1000)
    assert sum(p.numel() for p in model.parameters()) == 675_160_896
    assert len(model.state_dict()) == 401


def test_a_new_denoiser_is_zero_and_its_blocks_are_the_identity():
    model = sl.Denoiser((16, 8), 3, 64, 2, 2)
    x = torch.randn(2, 16, 64)
    assert model(torch.randn(2, 16, 8), torch.tensor([0, 3])).abs().max() == 0
    assert torch.equal(model.blocks[0](x, torch.randn(2, 64)), x)


def test_labels_matter_and_a_larger_one_is_refused():
    model, v = small_denoiser(), torch.randn(1, 16, 8)
    outputs = [model(v, torch.tensor([y])) for y in range(4)]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(outputs) for b in outputs[:i])
    for wrong in (4, -1):
        with pytest.raises(ValueError, match="labels"):
            model(v, torch.tensor([wrong]))


def test_attention_of_training_equals_the_fused_one():
    block, x = small_denoiser().blocks[0], torch.randn(2, 16, 64)
    by_hand = block.attention(x)
    with torch.no_grad():
        torch.testing.assert_close(by_hand, block.attention(x), rtol=1e-4, atol=1e-5)


def test_block_against_torch_modules():
    """The same weights in torch's own multi-head attention, with q/k-norm made neutral."""
    block, x = small_denoiser().blocks[0], torch.randn(2, 16, 64)
    q, k, v = block.q(x), block.k(x), block.v(x)
    heads = [F.rms_norm(t.view(2, 16, 2, 32), (32,), eps=1e-6).transpose(1, 2) for t in (q, k)]
    y = F.scaled_dot_product_attention(*heads, v.view(2, 16, 2, 32).transpose(1, 2))
    torch.testing.assert_close(block.attention(x), block.out(y.transpose(1, 2).reshape(2, 16, 64)),
                               rtol=1e-4, atol=1e-5)


def test_positions_tell_every_token_apart():
    positions = sl.sincos_positions(64, 32)
    distances = torch.cdist(positions, positions) + 10 * torch.eye(64)
    assert positions.shape == (64, 32) and distances.min() > 0.1


def test_tiny_rae_starts_as_pca_and_comes_back():
    """With as many channels as a patch has numbers, the linear start loses nothing."""
    config = sl.Config(image_size=16, patch_size=4, latent_channels=48, autoencoder_width=32, autoencoder_depth=1)
    torch.manual_seed(0)
    autoencoder, images = sl.load_autoencoder("tiny", config), torch.rand(64, 3, 16, 16)
    assert autoencoder.latent_shape == (16, 48) and autoencoder.latent_mean.shape == (1, 48)
    autoencoder.start_from_pca(images)
    z = autoencoder.encode_raw(images)
    torch.testing.assert_close(z.square().mean((1, 2)), torch.ones(64), rtol=1e-3, atol=0)    # on the sphere
    scale = (images.mean((1, 2, 3)) - images.mean()).abs().max()
    assert (autoencoder.decode_raw(z) - images).abs().mean() < 0.1 * images.std() + scale


def test_pca_start_is_the_best_linear_code():
    config = sl.Config(image_size=16, patch_size=8, latent_channels=12, autoencoder_width=32, autoencoder_depth=1)
    torch.manual_seed(0)
    autoencoder, images = sl.load_autoencoder("tiny", config), sl.drawn_images("test", 16).pixels[:400] / 255
    autoencoder.start_from_pca(images)
    patches = autoencoder.patches(images).flatten(0, 1)
    u, s, v = torch.linalg.svd(patches - patches.mean(0), full_matrices=False)
    best = ((patches - patches.mean(0)) - u[:, :12] * s[:12] @ v[:12]).square().mean()
    z = (autoencoder.patches(images) - autoencoder.patch_mean) @ autoencoder.whiten @ autoencoder.mix
    torch.testing.assert_close((autoencoder.decode_raw(z) - images).square().mean(), best, rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("shape", [(16, 64), (4, 8), (4, 5), (3, 1)])
def test_noise_of_the_first_step_is_the_same_whatever_the_number_of_steps_and_images(shape):
    one, six = sl.seeded_noise(3, shape, 0, draws=1), sl.seeded_noise(5, shape, 0, draws=6)
    assert six.shape == (6, 5, *shape) and torch.equal(one[0], six[0, :3]) and not torch.equal(six[0], six[1])


def test_an_image_does_not_depend_on_how_many_are_drawn_at_a_time(run, monkeypatch):
    config, autoencoder, _ = sl.load_run(run)
    monkeypatch.setattr(sl, "autocast", lambda device: contextlib.nullcontext())      # bf16 rounds by batch
    denoiser = small_denoiser(shape=autoencoder.latent_shape, classes=12)
    for fresh in (False, True):
        config = sl.dataclasses.replace(config, fresh_noise=fresh)
        whole = sl.sample_images(denoiser, autoencoder, torch.arange(10), config, batch=10)
        parts = sl.sample_images(denoiser, autoencoder, torch.arange(10), config, batch=3)
        fewer = sl.sample_images(denoiser, autoencoder, torch.arange(4), config)
        torch.testing.assert_close(whole, parts, rtol=0, atol=1e-4)
        torch.testing.assert_close(whole[:4], fewer, rtol=0, atol=1e-4)
        assert (whole[0] - whole[1]).abs().max() > 0.05
    assert torch.equal(sl.seeded_noise(4, (4, 8), 3, 1)[0], sl.seeded_noise(9, (4, 8), 3, 2)[0, :4])


def test_sampler_follows_its_description():
    model, labels = small_denoiser(), torch.tensor([0, 2])
    e = torch.randn(2, 16, 8)
    z, path = sl.sample(model, labels, steps=3, noise=e, return_path=True)
    assert len(path) == 6 and torch.equal(path[-1], z)
    torch.testing.assert_close(path[0], sl.spherify(e))
    torch.testing.assert_close(path[1], model(path[0], labels))
    torch.testing.assert_close(path[2], sl.noisy_spherify(sl.spherify(path[1]), e, torch.pi / 2 * 2 / 3))
    assert torch.equal(sl.sample(model, labels, steps=1, noise=e), path[1])
    fixed = sl.sample(model, labels, steps=3, noise=e, schedule="fixed", angle=0.5, return_path=True)[1]
    torch.testing.assert_close(fixed[4], sl.noisy_spherify(sl.spherify(fixed[3]), e, 0.5))


def test_fresh_noise_and_generators():
    model, labels = small_denoiser(), torch.tensor([0, 2])
    draw = lambda **how: sl.sample(model, labels, generator=torch.Generator().manual_seed(0), **how)
    assert torch.equal(draw(), draw()) and torch.equal(draw(fresh_noise=False), draw(fresh_noise=False))
    path, same = (draw(fresh_noise=fresh, return_path=True)[1] for fresh in (True, False))
    assert torch.equal(same[1], draw(fresh_noise=False, steps=1)) and not torch.equal(path[2], same[2])


def test_guidance_is_linear():
    model, labels, e = small_denoiser(), torch.tensor([0, 2]), torch.randn(2, 16, 8)
    at = lambda scale: sl.sample(model, labels, steps=1, cfg_scale=scale, noise=e)
    null = sl.sample(model, torch.tensor([3, 3]), steps=1, noise=e)
    torch.testing.assert_close(at(0.0), null)
    torch.testing.assert_close(at(2.0), null + 2 * (at(1.0) - null), rtol=1e-4, atol=1e-5)
