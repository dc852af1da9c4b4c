"""The preference loss and its gradients against TRL's own trainer, on the same weights as transformers' Llama."""

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.export import export_language_model
from model.transformer import Transformer
from model.weights import LanguageModel, load_language_model
from tests.train.small_data import ALONE, VOCABULARY, dpo_config, pair_data, start_weights
from train.batches import SequenceFile
from train.preference import DpoObjective

pytest.importorskip("trl")

ROWS = np.array([1, 7, 4, 3, 8])  # pictures of 2 x 3, 2 x 3, 1 x 3, 2 x 2 and 1 x 4, with three prompts
EQUAL_ROWS = np.array([1, 7])  # of one size: where a mean over tokens is a mean over pairs
CPU = torch.device("cpu")


def as_llama(folder: Path, lm: LanguageModel) -> nn.Module:
    from transformers import LlamaForCausalLM

    export_language_model(folder, lm, "llama")
    model: nn.Module = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def their_trainer(model: nn.Module, reference: nn.Module, loss_types: dict[str, float], beta: float) -> Any:
    """TRL's trainer with all that its loss looks at, and without data, tokenizer and optimizer."""
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    add_fused_lm_head(reference)
    trainer = DPOTrainer.__new__(DPOTrainer)
    same = SimpleNamespace(device=CPU, gather=lambda x: x, gather_for_metrics=lambda x: x)
    facts = {
        "model": model,
        "ref_model": reference,
        "accelerator": same,
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None),
        "beta": beta,
        "loss_types": list(loss_types),
        "loss_weights": list(loss_types.values()),
        "ld_alpha": None,
        "precompute_ref_logps": False,
        "f_divergence_type": "reverse_kl",
        "label_smoothing": 0.0,
        "use_weighting": False,
        "aux_loss_enabled": False,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    for name, value in facts.items():
        setattr(trainer, name, value)
    return trainer


def their_batch(file: SequenceFile, rows: np.ndarray, counted: str) -> dict[str, Tensor]:
    """Pairs as TRL takes them: all chosen documents, then all rejected ones, padded on the right."""
    documents: list[list[Tensor]] = [[], []]
    for row in rows.tolist():
        tokens, start = torch.from_numpy(file.tokens(row).astype(np.int64)), 0
        for side, length in enumerate(file.document_lengths(row).tolist()):
            documents[side].append(tokens[start : start + length])
            start += length
    padded = nn.utils.rnn.pad_sequence([*documents[0], *documents[1]], batch_first=True, padding_value=VOCABULARY.pad)
    is_token = padded != VOCABULARY.pad
    is_drawn = (padded == VOCABULARY.img).long().cumsum(1).bool() & (padded != VOCABULARY.img) & is_token
    is_counted = padded >= VOCABULARY.vision_offset if counted == "codes" else is_drawn
    return {"input_ids": padded, "attention_mask": is_token.long(), "completion_mask": is_counted.long()}


@pytest.mark.parametrize(
    ("rows", "options", "loss_types"),
    [
        (ROWS, {"sft_weight": 0.0}, {"sigmoid": 1.0}),
        (ROWS, {"sft_weight": 0.0, "beta": 0.7, "counted": "completion"}, {"sigmoid": 1.0}),
        (ROWS, {"sft_weight": 0.0, "beta": 2.0, "normalise_length": True}, {"sigmoid_norm": 1.0}),
        (EQUAL_ROWS, {}, {"sigmoid": 1.0, "sft": 1.0}),
        (EQUAL_ROWS, {"sft_weight": 0.3, "counted": "completion"}, {"sigmoid": 1.0, "sft": 0.3}),
    ],
    ids=["dpo", "completion", "normalised", "with next token", "completion with next token"],
)
def test_loss_margins_and_gradients_are_trls(
    tmp_path: Path, rows: np.ndarray, options: dict[str, Any], loss_types: dict[str, float]
) -> None:
    config = dpo_config(**options)
    objective = DpoObjective(config, pair_data(tmp_path), start_weights(tmp_path), tmp_path)
    model = objective.build_model(ALONE)
    assert isinstance(model, Transformer)
    objective.start(model, ALONE)
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=noise))
    ours = objective.loss(model, rows, 0, ALONE, {})
    ours["loss"].mean.backward()

    start = load_language_model(objective.begin.folder)
    reference = as_llama(tmp_path / "reference", start)
    theirs = as_llama(tmp_path / "theirs", LanguageModel(model, start.vocabulary, start.text)).train()
    trainer = their_trainer(theirs, reference, loss_types, config.beta)
    batch = their_batch(SequenceFile(objective.data.path), rows, config.counted)
    loss = trainer._compute_loss(theirs, batch, return_outputs=False)
    loss.backward()

    assert float(ours["loss"].mean.detach()) == pytest.approx(float(loss.detach()), abs=1e-5)
    figures = {name: float(values[-1]) for name, values in trainer._metrics["train"].items() if name != "num_tokens"}
    assert float(ours["accuracy"].mean) == pytest.approx(figures["rewards/accuracies"])
    for side in ("chosen", "rejected"):
        drift = config.beta * float(ours[f"{side}_drift"].mean.detach())
        assert drift == pytest.approx(figures[f"rewards/{side}"], abs=1e-5)
    if not config.normalise_length:  # TRL's margin is that of sums of log-probabilities, whatever the loss
        assert float(ours["margin"].mean.detach()) == pytest.approx(figures["rewards/margins"], abs=1e-5)
        assert abs(figures["rewards/margins"]) > 0.01
    expected = dict(theirs.named_parameters())
    assert expected.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-5, atol=1e-5, msg=name)
    assert max(float(parameter.grad.abs().max()) for parameter in expected.values()) > 0.01
