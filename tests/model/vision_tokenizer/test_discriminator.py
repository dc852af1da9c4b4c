"""The patch discriminator: the patches of the pix2pix paper, and frames that are judged one by one."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from model.vision_tokenizer.discriminator import DiscriminatorConfig, PatchDiscriminator

SMALL = DiscriminatorConfig(channels=4, norm_groups=2)


@pytest.mark.parametrize(("num_layers", "patch_px"), [(1, 16), (2, 34), (3, 70)])  # pix2pix, section 6.2: 16, 70
def test_a_logit_sees_the_published_patch(num_layers: int, patch_px: int) -> None:
    torch.manual_seed(0)
    judge = PatchDiscriminator(SMALL.model_copy(update={"num_layers": num_layers})).double()
    for index, layer in enumerate(judge.layers):
        if isinstance(layer, nn.GroupNorm):
            judge.layers[index] = nn.Identity()  # its statistics see the whole frame
    pixels = torch.randn(1, 3, 128, 128, dtype=torch.float64, requires_grad=True)
    logits = judge(pixels)
    middle = logits.shape[-1] // 2
    (gradient,) = torch.autograd.grad(logits[0, 0, middle, middle], pixels)
    rows = gradient.abs().sum(dim=(0, 1, 3)).nonzero().flatten()
    assert int(rows[-1] - rows[0]) + 1 == patch_px


def test_the_default_has_movqgans_channels() -> None:
    shapes = [tuple(p.shape) for p in PatchDiscriminator(DiscriminatorConfig()).parameters() if p.ndim == 4]
    assert shapes == [(64, 3, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (1, 256, 4, 4)]


def test_a_frame_is_judged_by_itself() -> None:
    torch.manual_seed(0)
    judge = PatchDiscriminator(SMALL)
    frames = torch.randn(5, 3, 24, 32)
    together = judge(frames)
    for index in range(5):
        torch.testing.assert_close(judge(frames[index : index + 1]), together[index : index + 1])


def test_channels_that_groups_do_not_divide_are_refused() -> None:
    with pytest.raises(ValidationError, match="multiple of norm_groups, 32"):
        DiscriminatorConfig(channels=40)
