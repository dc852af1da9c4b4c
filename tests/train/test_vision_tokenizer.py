from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from model.vision_tokenizer.lpips import load_lpips
from model.vision_tokenizer.pixels import pixels_from_rgb
from model.vision_tokenizer.tokenizer import VisionTokenizer
from model.weights import digest, load_vision_tokenizer
from schemas.errors import ConfigError
from tests.model.vision_tokenizer.test_lpips import config as lpips_files
from tests.train.small_data import ALONE, DISCRIMINATOR, frame_data, tokenizer_config
from tests.train.small_runs import run
from train.batches import FrameFile
from train.launch import training_identity
from train.progress import read_losses
from train.vision_tokenizer import CODE_USES, TokenizerObjective, train_vision_tokenizer


def _started(objective: TokenizerObjective) -> tuple[VisionTokenizer, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = objective.build_model(ALONE).train()
    assert isinstance(model, VisionTokenizer)
    objective.start(model, ALONE)
    return model, objective.initial_state(model)


def test_the_codebook_starts_on_latents_of_the_data(tmp_path: Path) -> None:
    data = frame_data(tmp_path)
    objective = TokenizerObjective(tokenizer_config(crop_px=None, latent_batch=6), data)
    model, _ = _started(objective)
    with torch.no_grad():
        latents = model.latents(pixels_from_rgb(FrameFile(data.path).read(np.arange(6))))
    points = latents.movedim(1, -1).flatten(0, 3)
    distances = torch.cdist(model.quantize.embedding.weight, points).min(dim=1).values
    assert float(distances.max()) < 0.1 * float(points.std(dim=0).norm())


def test_uses_are_counted_and_unused_codes_moved(tmp_path: Path) -> None:
    objective = TokenizerObjective(tokenizer_config(reset_every=2, steps=8), frame_data(tmp_path))
    model, state = _started(objective)
    with torch.no_grad():
        model.quantize.embedding.weight[3] = 1e3  # far from everything: nothing chooses it
    objective.loss(model, np.arange(4), 0, ALONE, state)
    codes_per_chunk = 4 * 4  # an 8 px crop at two pixels per code
    assert int(state[CODE_USES].sum()) == 4 * codes_per_chunk
    assert int(state[CODE_USES][3]) == 0
    objective.finish_step(model, 0, ALONE.device, state)
    assert float(model.quantize.embedding.weight[3, 0]) == 1e3  # not yet
    objective.finish_step(model, 1, ALONE.device, state)
    assert float(model.quantize.embedding.weight[3].abs().max()) < 1e2
    assert int(state[CODE_USES].sum()) == 0
    assert model.training


def test_codes_stay_where_they_are_near_the_end(tmp_path: Path) -> None:
    objective = TokenizerObjective(
        tokenizer_config(reset_every=2, steps=8, reset_until_ratio=0.5), frame_data(tmp_path)
    )
    model, state = _started(objective)
    before = model.quantize.embedding.weight.clone()
    objective.finish_step(model, 5, ALONE.device, state)  # nothing was used, but step 6 of 8 is past the half
    assert torch.equal(model.quantize.embedding.weight, before)


def test_a_crop_depends_on_seed_step_and_row_alone(tmp_path: Path) -> None:
    data = frame_data(tmp_path, size_px=32)
    objective = TokenizerObjective(tokenizer_config(crop_px=8), data)
    together = objective._pixels(np.array([0, 3, 5]), 4, ALONE.device)
    assert together.shape == (3, 4, 3, 8, 8)
    for place, row in enumerate((0, 3, 5)):
        assert torch.equal(objective._pixels(np.array([row]), 4, ALONE.device)[0], together[place])
    other_step = objective._pixels(np.array([0, 3, 5]), 5, ALONE.device)
    assert not torch.equal(other_step, together)
    whole = pixels_from_rgb(FrameFile(data.path).read(np.array([3])))
    places = whole.unfold(3, 8, 1).unfold(4, 8, 1)[0, 0, 0].flatten(2, 3).flatten(0, 1)
    assert (places == together[1, 0, 0].flatten()).all(dim=1).any()


def test_crops_larger_than_the_frames_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="crop_px 16"):
        train_vision_tokenizer(tokenizer_config(crop_px=16), frame_data(tmp_path), tmp_path / "run")


def test_wrong_models_are_refused() -> None:
    with pytest.raises(ValidationError, match="expected one of"):
        tokenizer_config(size="huge")
    with pytest.raises(ValidationError, match="ch_multiplier"):
        tokenizer_config(model={"ch_multiplier": [1, 2]})


def test_free_steps_pass_latents_and_place_the_codebook_at_their_end(tmp_path: Path) -> None:
    objective = TokenizerObjective(tokenizer_config(free_steps=2, reset_every=100), frame_data(tmp_path))
    model, state = _started(objective)
    fresh = model.quantize.embedding.weight.detach().clone()
    free = objective.loss(model, np.arange(4), 0, ALONE, state)
    assert float(free["commitment"].total) == 0
    assert float(free["loss"].mean) == pytest.approx(float(free["pixels"].mean))
    free["loss"].total.backward()
    assert not model.quantize.embedding.weight.grad.any()
    assert all(
        p.grad is not None and p.grad.any() for p in (model.encoder.conv_in.weight, model.decoder.conv_out.weight)
    )
    objective.finish_step(model, 0, ALONE.device, state)
    assert torch.equal(model.quantize.embedding.weight, fresh)
    objective.finish_step(model, 1, ALONE.device, state)
    assert not torch.equal(model.quantize.embedding.weight, fresh)
    assert int(state[CODE_USES].sum()) == 0
    assert float(objective.loss(model, np.arange(4), 2, ALONE, state)["commitment"].total) > 0


def test_more_free_steps_than_steps_are_refused() -> None:
    with pytest.raises(ValidationError, match="free_steps 8"):
        tokenizer_config(free_steps=8, steps=8)


def test_the_perceptual_term_is_lpips_of_the_frames_by_its_weight(tmp_path: Path) -> None:
    data, lpips = frame_data(tmp_path, size_px=64), lpips_files(tmp_path, "alex")
    plain = TokenizerObjective(tokenizer_config(crop_px=None), data)
    judged = TokenizerObjective(tokenizer_config(crop_px=None, lpips=lpips, lpips_weight=0.7), data)
    model, state = _started(plain)
    with_term = judged.loss(model, np.arange(2), 0, ALONE, state)
    without = plain.loss(model, np.arange(2), 0, ALONE, state)
    pixels = pixels_from_rgb(FrameFile(data.path).read(np.arange(2)))
    drawn = model(pixels).reconstruction_BTCHW.detach()
    expected = load_lpips(lpips)(drawn.flatten(0, 1), pixels.flatten(0, 1)).mean().item()
    assert float(with_term["perceptual"].mean) == pytest.approx(expected, rel=1e-4)
    more = float((with_term["loss"].mean - without["loss"].mean).detach())
    assert more == pytest.approx(0.7 * expected, rel=1e-3)
    assert "perceptual" not in without
    with_term["loss"].total.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_a_training_is_known_by_what_is_in_its_files(tmp_path: Path) -> None:
    def hashed(folder: Path, **changes: torch.Tensor) -> str:
        folder.mkdir()
        config = tokenizer_config(lpips=lpips_files(folder, "alex", "safetensors", **changes))
        return training_identity("vision_tokenizer", config.by_content(), "data", "sha").config_hash

    first = hashed(tmp_path / "here")
    assert hashed(tmp_path / "there") == first
    assert hashed(tmp_path / "other", **{"lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}) != first
    assert training_identity("vision_tokenizer", tokenizer_config(), "data", "sha").config_hash != first


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    assert set(tokenizer_config().left_out()) == {"perceptual", "adversarial"}
    everything = tokenizer_config(lpips=lpips_files(tmp_path, "alex"), adversarial=DISCRIMINATOR)
    assert everything.left_out() == {}


def test_options_at_their_defaults_leave_the_identity_as_it_was() -> None:
    dumped = tokenizer_config().model_dump(mode="json")
    assert not dumped.keys() & {"lpips", "lpips_weight", "adversarial", "ema_decay"}
    assert not dumped["optim"].keys() & {"max_grad_value", "schedule"}


def test_the_discriminator_is_not_exported(tmp_path: Path) -> None:
    objective = TokenizerObjective(tokenizer_config(adversarial=DISCRIMINATOR), frame_data(tmp_path))
    model = objective.build_model(ALONE)
    objective.export(model.eval(), tmp_path / "weights")
    (tokenizer, _), _ = objective.networks(model)
    assert digest(load_vision_tokenizer(tmp_path / "weights")) == digest(tokenizer)


def test_figures_out_of_training_leave_the_counts_alone(tmp_path: Path) -> None:
    objective = TokenizerObjective(tokenizer_config(), frame_data(tmp_path))
    model, state = _started(objective)
    trained = objective.loss(model, np.arange(4), 0, ALONE, state)
    counted = state[CODE_USES].clone()
    assert float(trained["codes_used"].mean) == pytest.approx(int((counted > 0).sum()) / 8)
    objective.loss(model.eval(), np.arange(2), 0, ALONE, state)
    assert torch.equal(state[CODE_USES], counted)


def test_what_is_held_out_is_reconstructed_and_not_learnt(tmp_path: Path) -> None:
    (tmp_path / "held").mkdir()
    data, held_out = frame_data(tmp_path), frame_data(tmp_path / "held", num_chunks=5)
    config = tokenizer_config(execution={"evaluate_every": 4, "held_out_rows": 3})
    weights = {}
    for name, kept in (("with", held_out), ("without", None)):
        run(TokenizerObjective(config, data, kept), tmp_path / name)
        weights[name] = digest(tmp_path / name / "weights")
    assert weights["with"] == weights["without"]
    lines = read_losses(tmp_path / "with" / "progress.jsonl")
    assert [line["step"] for line in lines if "held_out_psnr" in line] == [4, 8]
    tokenizer = load_vision_tokenizer(tmp_path / "with" / "weights")
    pixels = pixels_from_rgb(FrameFile(held_out.path).read(np.arange(3)))
    with torch.no_grad():
        output = tokenizer(pixels)
    errors = (output.reconstruction_BTCHW.clamp(-1, 1) - pixels).square().flatten(1).mean(1)
    assert lines[-1]["held_out_psnr"] == pytest.approx(float((10 * torch.log10(4 / errors)).mean()), rel=1e-4)
    used = len(output.codes_BThw.unique()) / tokenizer.config.codebook_size
    assert lines[-1]["held_out_codes_used"] == pytest.approx(used)
