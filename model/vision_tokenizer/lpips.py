"""LPIPS, how different two pictures look: distances of an ImageNet network's features, weighed by learnt heads.

Paper: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", version 0.1 of the heads.
Weights are read from files and never fetched: torchvision's own state dict of AlexNet or VGG-16, and the heads as the lpips
package publishes them.

Shapes: N pictures, C channels, H W pixels.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal, Self

import torch
from pydantic import model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from model.weights import load_tensors
from schemas.errors import ConfigError
from schemas.recipe import Config

# Where to look: after these ReLUs of the network's `features`, with that many channels.
TAPS: Mapping[str, Mapping[int, int]] = MappingProxyType(
    {
        "alex": MappingProxyType({1: 64, 4: 192, 7: 384, 9: 256, 11: 256}),
        "vgg": MappingProxyType({3: 64, 8: 128, 15: 256, 22: 512, 29: 512}),
    }
)
# ImageNet's mean and deviation, moved from [0, 1] to [-1, 1] and rounded as published.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
NORM_EPS = 1e-10


class LpipsConfig(Config):
    """Which features, and the files of weights (.safetensors, or .pth without code in it); without files there is no LPIPS.

    `features` is torchvision's state dict of the whole network, `heads` the lpips package's `weights/v0.1/<net>.pth`.
    MoVQGAN trains with `vgg`; the Emu3 report's table 2 measures with `alex`.
    """

    net: Literal["alex", "vgg"] = "vgg"
    features: str | None = None
    heads: str | None = None

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        if (self.features is None) != (self.heads is None):
            raise ValueError(f"found features {self.features} and heads {self.heads}, expected both files or neither")
        return self

    def absolute(self) -> Self:
        """The same files for a process in another folder."""
        files = {name: str(Path(file).absolute()) for name in ("features", "heads") if (file := getattr(self, name))}
        return self.model_copy(update=files)


class Lpips(nn.Module):
    """Two sets of pictures -> how different each pair looks, from 0 for equal ones. Its weights are `load_lpips`'s to give."""

    shift: Tensor
    scale: Tensor

    def __init__(self, net: Literal["alex", "vgg"]) -> None:
        super().__init__()
        from torchvision.models import alexnet, vgg16  # costs a second, which only those pay who use it

        self.taps = tuple(TAPS[net])
        with torch.device("meta"):  # weights come from files; none are drawn, which would move torch's generator
            network = alexnet() if net == "alex" else vgg16()
            self.features = nn.Sequential(*list(network.features)[: self.taps[-1] + 1])
            self.heads = nn.ModuleList(nn.Conv2d(channels, 1, 1, bias=False) for channels in TAPS[net].values())
        for module in self.features.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # what was tapped stays as it was
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels_NCHW: Tensor, other_NCHW: Tensor) -> Tensor:
        """Pixels in [-1, 1], twice -> (N,)."""
        pairs = zip(self.heads, self._tapped(pixels_NCHW), self._tapped(other_NCHW), strict=True)
        return torch.stack([head((mine - other).square()).mean(dim=(1, 2, 3)) for head, mine, other in pairs]).sum(0)

    def _tapped(self, pixels_NCHW: Tensor) -> list[Tensor]:
        """Pixels -> features of unit length at each tap."""
        found = []
        x_NCHW = (pixels_NCHW - self.shift) / self.scale
        for index, layer in enumerate(self.features):
            x_NCHW = layer(x_NCHW)
            if index in self.taps:
                length_N1HW = torch.linalg.vector_norm(x_NCHW, dim=1, keepdim=True)
                found.append(x_NCHW / (length_N1HW + NORM_EPS))
        return found


def load_lpips(config: LpipsConfig, device: torch.device | str = "cpu") -> Lpips:
    """The network with the weights of the files.

    Raises: ConfigError if a file cannot be read, or holds other tensors than the network has.
    """
    assert config.features is not None
    assert config.heads is not None
    lpips = Lpips(config.net)
    whole, published = _read(config.features), _read(config.heads)
    body = {key.removeprefix("features."): whole[key] for key in whole if not key.startswith("classifier.")}
    load_tensors(lpips.features, body, config.features)
    ours = {f"lin{index}.model.1.weight": f"{index}.weight" for index in range(len(lpips.heads))}
    load_tensors(lpips.heads, {ours.get(key, key): tensor for key, tensor in published.items()}, config.heads)
    return lpips.eval().requires_grad_(False).to(device)


def _read(file: str) -> dict[str, Tensor]:
    try:
        if file.endswith(".safetensors"):
            return load_file(file)
        found = torch.load(Path(file), map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ConfigError(f"the weights {file} cannot be read: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ConfigError(f"{file} holds a {type(found).__name__}, expected a state dict: names and tensors")
    return dict(found)
