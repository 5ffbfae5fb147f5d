"""Tiny models, tokenizers and rows for real trainers."""

from __future__ import annotations

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(60)]


def tokenizer():
    """One token per word; with pad, bos and eos, and a chat template of two markers."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(" "), behavior="removed")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def model(seed=0, vocabulary=64, dtype=torch.float32, kind=LlamaForCausalLM, config=LlamaConfig, **options):
    """A random causal model of two layers, whose logits are a few units large."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    made = kind(config(**sizes | options)).to(dtype)
    with torch.no_grad():
        made.get_output_embeddings().weight.normal_(std=0.5)
    return made


def texts(count=8, length=6, seed=0):
    """Sentences of different lengths."""
    g = torch.Generator().manual_seed(seed)
    return [
        " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (2 + n % length,), generator=g)) for n in range(count)
    ]


def saved(folder, **options):
    """A model and its tokenizer in a folder, as a path: TRL loads a reference model from there."""
    model(**options).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)
