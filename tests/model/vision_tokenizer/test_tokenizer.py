"""The vision tokenizer against transformers' Emu3, the published counts, and its own promises."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.published import transformers_vision_tensors, vision_tokenizer_tensors
from model.vision_tokenizer.config import VISION_TOKENIZER_SIZES, VisionTokenizerConfig
from model.vision_tokenizer.tokenizer import VisionTokenizer
from schemas.errors import RowError

CONFIG_A = VisionTokenizerConfig(codebook_size=64, ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1)
CONFIG_B = VisionTokenizerConfig(
    codebook_size=64,
    embed_dim=8,
    z_channels=8,
    ch=32,
    ch_mult=(1, 2),
    num_res_blocks=2,
    attn_resolutions=(1,),
    temporal_downsample_factor=2,
)


def random_config(seed: int) -> VisionTokenizerConfig:
    """A config of any shape that both sides know: transformers' attention has one width, that of the last level."""
    rng = random.Random(seed)
    ch_mult = (*(rng.choice([1, 2]) for _ in range(rng.choice([1, 2, 2, 3]))), rng.choice([1, 2]))
    levels = [level for level, multiple in enumerate(ch_mult) if multiple == ch_mult[-1]]
    channels = rng.choice([2, 4, 8])
    return VisionTokenizerConfig(
        codebook_size=rng.choice([16, 64, 300]),
        embed_dim=channels,
        z_channels=channels,
        temporal_downsample_factor=rng.choice([2, 4, 8]),
        ch=32,
        ch_mult=ch_mult,
        num_res_blocks=rng.choice([1, 2]),
        attn_resolutions=tuple(rng.sample(levels, rng.randint(0, len(levels)))),
    )


def random_tokenizer(config: VisionTokenizerConfig, seed: int = 0) -> VisionTokenizer:
    """A tokenizer whose norms and codebook are spread out enough that a wrong layer would show."""
    torch.manual_seed(seed)
    tokenizer = VisionTokenizer(config).eval()
    for name, tensor in tokenizer.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2.0)
        elif name.endswith("running_mean") or "norm" in name:
            tensor.add_(0.1 * torch.randn(tensor.shape))
    tokenizer.quantize.embedding.weight.data.normal_()
    tokenizer.decoder.conv_out.weight.data.div_(20)  # pixels around [-1, 1], as after training
    return tokenizer


def reference_of(tokenizer: VisionTokenizer) -> Any:
    emu3 = pytest.importorskip("transformers.models.emu3.modeling_emu3")
    config = tokenizer.config
    reference = emu3.Emu3VQVAE(
        emu3.Emu3VQVAEConfig(
            codebook_size=config.codebook_size,
            embed_dim=config.embed_dim,
            latent_channels=config.z_channels,
            base_channels=config.ch,
            channel_multiplier=config.ch_mult,
            num_res_blocks=config.num_res_blocks,
            attn_resolutions=config.attn_resolutions,
            temporal_downsample_factor=config.temporal_downsample_factor,
            hidden_size=config.ch * config.ch_mult[-1],
        )
    )
    reference.load_state_dict(transformers_vision_tensors(tokenizer.state_dict()), strict=True)
    return reference.eval()


def reference_video_codes(reference: Any, pixels: Tensor) -> Tensor:
    # Its own `encode` crops clips along the wrong axes, so its parts are called one by one.
    latents = reference.quant_conv(reference.encoder(pixels).transpose(1, 2)).transpose(1, 2)
    codes: Tensor = reference.quantize(latents)
    return codes


@torch.no_grad()
@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(6, 20))])
def test_any_config_matches_transformers(seed: int) -> None:
    config = random_config(seed)
    tokenizer = random_tokenizer(config, seed)
    others = tokenizer.latents(torch.rand(8, 3, 4 * config.spatial_factor, 4 * config.spatial_factor) * 2 - 1)
    tokenizer.quantize.init_codebook_from_latents(others, torch.Generator().manual_seed(seed))
    reference = reference_of(tokenizer)
    rng, side = random.Random(seed), config.spatial_factor
    height, width = (side * rng.randint(2, max(2, 24 // side)) for _ in range(2))
    images = torch.rand(2, 3, height, width) * 2 - 1
    codes = tokenizer.encode(images)
    expected = torch.stack(list(reference.encode(images, image_sizes=torch.tensor([[height, width]] * 2)).image_tokens))
    assert torch.equal(codes, expected)
    assert len(codes.unique()) > codes.numel() / 8
    torch.testing.assert_close(tokenizer.decode(codes), reference.decode(codes), atol=1e-4, rtol=0)
    clips = torch.rand(1, 3 * config.temporal_downsample_factor, 3, height, width) * 2 - 1
    codes = tokenizer.encode(clips)
    assert codes.shape == (1, 3, height // side, width // side)
    assert torch.equal(codes, reference_video_codes(reference, clips))
    torch.testing.assert_close(tokenizer.decode(codes), reference.decode(codes), atol=1e-4, rtol=0)
    # In float64 nothing but a different formula could differ.
    found, expected = tokenizer.double().decode(codes), reference.double().decode(codes)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def test_published_size_has_the_published_parameters() -> None:
    with torch.device("meta"):
        tokenizer = VisionTokenizer(VISION_TOKENIZER_SIZES["emu3"])

    def count(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(tokenizer) == 270_740_287
    assert count(tokenizer.encoder) == 109_488_252
    assert count(tokenizer.decoder) == 161_120_859
    assert count(tokenizer.quantize) == 131_072
    assert count(tokenizer.quant_conv) == count(tokenizer.post_quant_conv) == 52
    assert sum(buffer.numel() for buffer in tokenizer.buffers()) == 72
    keys = tokenizer.state_dict().keys()
    assert len(keys) == 495
    assert {
        "encoder.down.3.attn.1.norm.weight",
        "encoder.down.1.block.0.nin_shortcut.bias",
        "encoder.mid.attn_1.proj_out.weight",
        "encoder.time_conv.1.conv.conv.weight",
        "encoder.time_res_stack.0.norm1.num_batches_tracked",
        "encoder.time_res_stack.1.conv2.conv.bias",
        "decoder.up.3.attn.2.norm.norm_layer.weight",
        "decoder.up.0.block.2.norm1.conv_y.weight",
        "decoder.up.1.upsample.conv.weight",
        "decoder.norm_out.conv_b.bias",
        "quantize.embedding.weight",
        "quant_conv.conv.weight",
    } <= keys


def test_names_of_transformers_translate_back() -> None:
    tensors = random_tokenizer(CONFIG_A).state_dict()
    theirs = transformers_vision_tensors(tensors)
    for prefix in ("", "model.vqmodel.", "vqmodel."):
        found = vision_tokenizer_tensors({prefix + name: tensor for name, tensor in theirs.items()})
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_an_image_is_a_clip_of_four_equal_frames() -> None:
    tokenizer = random_tokenizer(CONFIG_A)
    image = torch.rand(2, 3, 32, 24) * 2 - 1
    codes = tokenizer.encode(image)
    assert codes.dtype == torch.int64
    assert torch.equal(codes, tokenizer.encode(image.unsqueeze(1).repeat(1, 4, 1, 1, 1)).squeeze(1))
    assert torch.equal(tokenizer.decode(codes), tokenizer.decode(codes.unsqueeze(1))[:, 0])


def test_latent_frames_are_causal() -> None:
    tokenizer = random_tokenizer(CONFIG_A)
    clip = torch.rand(1, 12, 3, 16, 16) * 2 - 1
    changed = clip.clone()
    changed[:, 8:] = torch.rand(1, 4, 3, 16, 16) * 2 - 1
    codes, other = tokenizer.encode(clip), tokenizer.encode(changed)
    assert torch.equal(codes[:, :2], other[:, :2])
    assert not torch.equal(codes[:, 2], other[:, 2])
    codes_changed = codes.clone()
    codes_changed[:, 2] = (codes_changed[:, 2] + 1) % 64
    pixels, other_pixels = tokenizer.decode(codes), tokenizer.decode(codes_changed)
    torch.testing.assert_close(pixels[:, :8], other_pixels[:, :8])
    assert not torch.allclose(pixels[:, 8:], other_pixels[:, 8:])


@pytest.mark.parametrize("pixels_per_pass", [1 << 20, 3 * 4 * 16 * 24, 1])
def test_chunks_are_clips_of_four_frames(monkeypatch: pytest.MonkeyPatch, pixels_per_pass: int) -> None:
    monkeypatch.setattr("model.vision_tokenizer.tokenizer.PIXELS_PER_PASS", pixels_per_pass)
    tokenizer = random_tokenizer(CONFIG_A)
    clips = torch.rand(2, 8, 3, 16, 24) * 2 - 1
    codes = tokenizer.encode_chunks(clips)
    assert torch.equal(codes[:, 0], tokenizer.encode(clips)[:, 0])
    assert torch.equal(codes[:, 1], tokenizer.encode(clips[:, 4:])[:, 0])
    pixels = tokenizer.decode_chunks(codes)
    assert pixels.shape == clips.shape
    torch.testing.assert_close(pixels[:, 4:], tokenizer.decode(codes[:, 1:]), atol=1e-5, rtol=0)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 20), st.integers(1, 20))
def test_sizes_that_do_not_divide_are_refused(num_frames: int, height: int, width: int) -> None:
    tokenizer = VisionTokenizer(CONFIG_A).eval()
    pixels = torch.zeros(1, num_frames, 3, height, width)
    if num_frames % 4 or height % 8 or width % 8:
        with pytest.raises(RowError, match=f"{height} x {width}"):
            tokenizer.encode(pixels)
    else:
        assert tokenizer.encode(pixels).shape == (1, num_frames // 4, height // 8, width // 8)


def test_encoding_in_train_mode_is_refused() -> None:
    with pytest.raises(RuntimeError, match="eval"):
        VisionTokenizer(CONFIG_A).encode(torch.zeros(1, 3, 8, 8))


def test_training_gradients_reach_encoder_codebook_and_decoder() -> None:
    torch.manual_seed(0)
    tokenizer = VisionTokenizer(CONFIG_A)
    pixels = torch.rand(2, 4, 3, 16, 16) * 2 - 1
    output = tokenizer.forward_train(pixels)
    assert output.reconstruction_BTCHW.shape == pixels.shape
    assert output.codes_BThw.shape == (2, 1, 2, 2)
    reconstruction_loss = (output.reconstruction_BTCHW - pixels).square().mean()
    encoder_weight, codebook = tokenizer.encoder.conv_in.weight, tokenizer.quantize.embedding.weight
    straight_through = torch.autograd.grad(reconstruction_loss, encoder_weight, retain_graph=True)[0]
    assert straight_through.abs().sum() > 0
    both = [codebook, encoder_weight]
    to_codebook, to_encoder = torch.autograd.grad(output.codebook_loss, both, retain_graph=True, materialize_grads=True)
    assert to_codebook.abs().sum() > 0
    assert to_encoder.abs().sum() == 0
    to_codebook, to_encoder = torch.autograd.grad(output.commitment_loss, both, materialize_grads=True)
    assert to_codebook.abs().sum() == 0
    assert to_encoder.abs().sum() > 0
