"""LPIPS against the lpips package with the same weights, and what becomes of wrong files. No real weights: none are here."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from model.vision_tokenizer.lpips import TAPS, LpipsConfig, load_lpips
from schemas.errors import ConfigError

KERNELS = {  # torchvision's: index of each convolution, its shape
    "alex": {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)},
    "vgg": {
        0: (64, 3, 3), 2: (64, 64, 3), 5: (128, 64, 3), 7: (128, 128, 3), 10: (256, 128, 3), 12: (256, 256, 3),
        14: (256, 256, 3), 17: (512, 256, 3), 19: (512, 512, 3), 21: (512, 512, 3), 24: (512, 512, 3),
        26: (512, 512, 3), 28: (512, 512, 3),
    },
}  # fmt: skip
Net = Literal["alex", "vgg"]


def random_weights(net: Net) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State dicts as torchvision and the lpips package publish them: the whole network, and the heads."""
    generator = torch.Generator().manual_seed(0)
    body = {"classifier.1.weight": torch.zeros(3, 3)}
    for index, (out, into, side) in KERNELS[net].items():
        body[f"features.{index}.weight"] = torch.randn(out, into, side, side, generator=generator) / (into**0.5 * side)
        body[f"features.{index}.bias"] = 0.1 * torch.randn(out, generator=generator)
    heads = {
        f"lin{index}.model.1.weight": torch.rand(1, channels, 1, 1, generator=generator)
        for index, channels in enumerate(TAPS[net].values())
    }
    return body, heads


def config(folder: Path, net: Net, form: str = "pth", **changes: Tensor) -> LpipsConfig:
    body, heads = random_weights(net)
    heads.update(changes)
    files = {"features": body, "heads": heads}
    for name, tensors in files.items():
        path = folder / f"{name}.{form}"
        torch.save(tensors, path) if form == "pth" else save_file(tensors, path)
    return LpipsConfig(net=net, **{name: str(folder / f"{name}.{form}") for name in files})


def pictures() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(3, 3, 72, 64, generator=generator) * 2 - 1, torch.rand(3, 3, 72, 64, generator=generator) * 2 - 1


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_it_is_the_lpips_packages(tmp_path: Path, net: Net) -> None:
    package = pytest.importorskip("lpips", reason="the lpips package is a dependency of the development extra")
    theirs = package.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    body, heads = random_weights(net)
    state = theirs.state_dict()
    for name in state:
        first, place, *rest = name.split(".")
        if first == "net":  # net.slice1.0.weight
            state[name] = body[".".join(["features", *rest])]
        elif not first.startswith("scaling"):  # each head is there twice
            state[name] = heads[name if name in heads else f"lin{place}.model.1.weight"]
    theirs.load_state_dict(state)
    ours = load_lpips(config(tmp_path, net))
    mine, other = (pixels.requires_grad_() for pixels in pictures())
    expected = theirs(mine, other).flatten()
    found = ours(mine, other)
    assert float(expected.min()) > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    gradients = [torch.autograd.grad(value.sum(), mine)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_the_packages_own_heads_load() -> None:
    package = pytest.importorskip("lpips", reason="the lpips package is a dependency of the development extra")
    heads = Path(package.__file__).parent / "weights" / "v0.1" / "alex.pth"
    found = torch.load(heads, map_location="cpu", weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        name: tuple(tensor.shape) for name, tensor in random_weights("alex")[1].items()
    }


def test_both_kinds_of_file_are_read_and_torchs_generator_stays(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    distances = [load_lpips(config(tmp_path, "alex", form))(*pictures()) for form in ("pth", "safetensors")]
    assert torch.equal(*distances)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_equal_pictures_have_no_distance_and_frozen_weights(tmp_path: Path) -> None:
    lpips = load_lpips(config(tmp_path, "alex"))
    mine, _ = pictures()
    assert lpips(mine, mine).abs().max() == 0
    assert not any(parameter.requires_grad for parameter in lpips.parameters())


def test_wrong_files_are_named(tmp_path: Path) -> None:
    good = config(tmp_path, "alex")
    with pytest.raises(ConfigError, match=r"features\.pth do not fit"):
        load_lpips(good.model_copy(update={"net": "vgg"}))
    with pytest.raises(ConfigError, match=r"lin2\.model\.1\.weight|2\.weight: shape"):
        load_lpips(config(tmp_path, "alex", **{"lin2.model.1.weight": torch.zeros(1, 3, 1, 1)}))
    with pytest.raises(ConfigError, match=r"nowhere\.pth cannot be read"):
        load_lpips(good.model_copy(update={"heads": str(tmp_path / "nowhere.pth")}))
    (tmp_path / "code.pth").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(ConfigError, match=r"code\.pth cannot be read"):
        load_lpips(good.model_copy(update={"heads": str(tmp_path / "code.pth")}))
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ConfigError, match="holds a list, expected a state dict"):
        load_lpips(good.model_copy(update={"heads": str(tmp_path / "list.pth")}))


def test_one_file_alone_is_refused() -> None:
    with pytest.raises(ValidationError, match="expected both files or neither"):
        LpipsConfig(features="somewhere.pth")
