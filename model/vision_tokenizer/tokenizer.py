"""The vision tokenizer: pixels to codes and back. One code stands for 4 frames of 8 x 8 pixels.

Shapes: B clips, T frames, t latent frames (T / 4), C channels, H W pixels, h w code grid (H / 8, W / 8).
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from model.vision_tokenizer.blocks import CausalConv3d
from model.vision_tokenizer.config import VisionTokenizerConfig
from model.vision_tokenizer.decoder import Decoder
from model.vision_tokenizer.encoder import Encoder
from model.vision_tokenizer.quantizer import Quantizer
from schemas.errors import RowError

PIXELS_PER_PASS = 1 << 20  # four frames of 512 x 512, which the published size encodes in a few GB

TEMPORAL_NOISE = 0.1  # of the random start, what is left beside the identity


@dataclass(frozen=True)
class TokenizerOutput:
    """What one training forward gives: the losses are scalars, unweighted."""

    reconstruction_BTCHW: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor
    codes_BThw: Tensor


class VisionTokenizer(nn.Module):
    """Emu3's vision tokenizer at any size. State-dict keys are those of the published weights.

    Clips: the layers are causal over latent frames, but a clip encoded whole and the same clip encoded four frames at a
    time give different codes after the first latent frame. The published weights want `encode_chunks`.
    """

    def __init__(self, config: VisionTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Quantizer(config.codebook_size, config.embed_dim)
        self.quant_conv = CausalConv3d(config.z_channels, config.embed_dim, kernel=(3, 1, 1))
        self.post_quant_conv = CausalConv3d(config.embed_dim, config.z_channels, kernel=(3, 1, 1))
        self.init_weights()

    def init_weights(self) -> None:
        """Fresh parameters as published: Kaiming-normal convolutions, codebook uniform in +-1/K."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                module.reset_parameters()  # the bias rule
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.GroupNorm | nn.BatchNorm3d):
                module.reset_parameters()
        bound = 1.0 / self.config.codebook_size
        nn.init.uniform_(self.quantize.embedding.weight, -bound, bound)

    @torch.no_grad()
    def pass_through_time(self) -> None:
        """Start the temporal layers near the identity: ours, for training from scratch.

        They act on four channels only. Drawn at random they smear a latent over its neighbours and let SiLU cut half of
        it away, and a short training spends itself on undoing that. The published tokenizer had no such start to make:
        its spatial part came trained.
        """
        stages = [*self.encoder.time_conv, *self.decoder.time_conv]
        for conv in [*(stage.conv for stage in stages), self.quant_conv, self.post_quant_conv]:
            conv.near_identity(TEMPORAL_NOISE)
        for block in [*self.encoder.time_res_stack, *self.decoder.time_res_stack]:
            block.conv2.conv.weight.mul_(TEMPORAL_NOISE)
        # Latents on the positive side, which SiLU lets through.
        self.encoder.conv_out.weight.mul_(0.3)
        nn.init.ones_(cast(Tensor, self.encoder.conv_out.bias))

    @torch.no_grad()
    def encode(self, pixels_BTCHW: Tensor) -> Tensor:
        """Pixels in [-1, 1], T a multiple of 4, H and W of 8 -> codes (B, t, h, w) int64.

        An image (B, C, H, W) is repeated to four frames and gives codes (B, h, w).

        Raises: RowError if the size does not divide; RuntimeError in train mode.
        """
        self._check_eval()
        codes_Bthw: Tensor = self.quantize(self.latents(pixels_BTCHW))
        return codes_Bthw.squeeze(1) if pixels_BTCHW.ndim == 4 else codes_Bthw

    @torch.no_grad()
    def decode(self, codes_Bthw: Tensor) -> Tensor:
        """Codes (B, t, h, w) -> pixels (B, T, C, H, W) around [-1, 1], not clipped.

        Codes of images (B, h, w) give pixels (B, C, H, W): the first of the four decoded frames, as published.
        """
        self._check_eval()
        is_image = codes_Bthw.ndim == 3
        vectors_BCthw = self.quantize.lookup(codes_Bthw.unsqueeze(1) if is_image else codes_Bthw)
        num_frames = 1 if is_image else None
        pixels_BTCHW: Tensor = self.decoder(self.post_quant_conv(vectors_BCthw), vectors_BCthw, num_frames)
        return pixels_BTCHW[:, 0] if is_image else pixels_BTCHW

    def encode_chunks(self, pixels_BTCHW: Tensor) -> Tensor:
        """Like `encode` of a clip, each four frames on their own: the use that the published weights were made for.

        Chunks go through the network a few at a time, so a long clip needs no more memory than a short one.
        """
        self._check_size(pixels_BTCHW)
        chunks = torch.unflatten(pixels_BTCHW, 1, (-1, self.config.temporal_downsample_factor)).flatten(0, 1)
        parts = torch.split(chunks, self._chunks_per_pass(*chunks.shape[-2:]))
        return torch.unflatten(torch.cat([self.encode(part).squeeze(1) for part in parts]), 0, (len(pixels_BTCHW), -1))

    def decode_chunks(self, codes_Bthw: Tensor) -> Tensor:
        """Like `decode` of a clip, each latent frame on its own, a few at a time."""
        side = self.config.spatial_factor
        num_chunks = self._chunks_per_pass(codes_Bthw.shape[-2] * side, codes_Bthw.shape[-1] * side)
        parts = torch.split(codes_Bthw.flatten(0, 1).unsqueeze(1), num_chunks)
        pixels_BTCHW = torch.cat([self.decode(part).flatten(0, 1) for part in parts])
        return torch.unflatten(pixels_BTCHW, 0, (len(codes_Bthw), -1))

    def _chunks_per_pass(self, height: int, width: int) -> int:
        return max(1, PIXELS_PER_PASS // (self.config.temporal_downsample_factor * height * width))

    def latents(self, pixels_BTCHW: Tensor) -> Tensor:
        """Pixels -> latents before quantising, (B, embed_dim, t, h, w), with gradients. Images are repeated.

        Raises: RowError if the size does not divide.
        """
        repeats = self.config.temporal_downsample_factor if pixels_BTCHW.ndim == 4 else 1
        if pixels_BTCHW.ndim == 4:
            pixels_BTCHW = pixels_BTCHW.unsqueeze(1)
        self._check_size(pixels_BTCHW, repeats)
        latents_BCthw: Tensor = self.quant_conv(self.encoder(pixels_BTCHW, repeats))
        return latents_BCthw

    def forward(self, pixels_BTCHW: Tensor, quantize: bool = True) -> TokenizerOutput:
        """The same as `forward_train`, so that wrappers that hook `forward` see the training pass."""
        return self.forward_train(pixels_BTCHW, quantize)

    def forward_train(self, pixels_BTCHW: Tensor, quantize: bool = True) -> TokenizerOutput:
        """Pixels in [-1, 1] -> reconstruction, losses and codes; gradients pass the codebook straight through.

        An image (B, C, H, W) is repeated to four frames, and all four are reconstructed. Without `quantize` the decoder sees
        the latents themselves, and both losses are zero: an autoencoder, as a start.
        """
        latents_BCthw = self.latents(pixels_BTCHW)
        vectors_BCthw, codes_Bthw, codebook_loss, commitment_loss = self.quantize.quantize(latents_BCthw)
        if not quantize:
            vectors_BCthw, codebook_loss, commitment_loss = latents_BCthw, 0 * codebook_loss, 0 * commitment_loss
        reconstruction_BTCHW = self.decoder(self.post_quant_conv(vectors_BCthw), vectors_BCthw)
        return TokenizerOutput(reconstruction_BTCHW, codebook_loss, commitment_loss, codes_Bthw)

    def _check_size(self, pixels_BTCHW: Tensor, repeats: int = 1) -> None:
        found = tuple(pixels_BTCHW.shape)
        frames, side = self.config.temporal_downsample_factor, self.config.spatial_factor
        if len(found) != 5 or found[2] != self.config.in_channels:
            raise RowError(
                "pixels_shape", f"found pixels of shape {found}, expected (B, T, {self.config.in_channels}, H, W)"
            )
        if 0 in found or found[1] * repeats % frames or found[3] % side or found[4] % side:
            raise RowError(
                "pixels_size",
                f"found {found[1]} frames of {found[3]} x {found[4]} pixels, expected multiples of {frames} frames "
                f"and of {side} pixels: resize, and cut or repeat frames, before encoding",
            )

    def _check_eval(self) -> None:
        # In train mode BatchNorm would use, and change, statistics of whatever else is in the batch.
        if self.training:
            raise RuntimeError("the vision tokenizer is in train mode, expected eval mode: call .eval() first")
