"""Language models of random weights, small and far from uniform: their choices depend on everything before."""

import torch

from model.text_tokenizer import TextTokenizer, TinyBpe
from model.transformer import Transformer, TransformerConfig
from model.weights import LanguageModel
from schemas.vocabulary import Vocabulary


def random_lm(
    vocabulary: Vocabulary,
    *,
    seed: int = 3,
    std: float = 0.3,
    text: TextTokenizer | None = None,
    **numbers: float,
) -> LanguageModel:
    """A vocabulary, and numbers of the config that differ from the ones here -> a model in eval mode."""
    torch.manual_seed(seed)
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
    }
    config = TransformerConfig.model_validate({"vocab_size": vocabulary.size, **small, **numbers})
    transformer = Transformer(config).eval()
    for tensor in transformer.state_dict().values():
        if tensor.ndim > 1:
            tensor.normal_(std=std)
    return LanguageModel(transformer, vocabulary, text or TinyBpe.train([], 256))
