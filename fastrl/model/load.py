"""A model and its tokenizer, from a folder, a hub id, or a model file that ships inside a Python package."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from fastrl import check
from fastrl.chat import end_of_turn
from fastrl.hub import or_cache
from fastrl.model.packaged import PACKAGED, converted

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Quantize = Literal["none", "nf4"]
PIECE = 1 << 22  # weights summed at a time for a fingerprint


def load_model(
    name_or_path: str | Path,
    dtype: torch.dtype = torch.float32,
    *,
    quantize: Quantize = "none",
    device: torch.device | str = "cpu",
    tokenizer: str | Path = "",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in evaluation mode and its tokenizer, which always has a padding token.

    `name_or_path` is a folder, a hub id, or a name in `fastrl.model.packaged.PACKAGED`: a model file inside an
    installed Python package, converted once into `fastrl.env.cache_dir()`. Code from a model's repository is never run.

    Args:
        dtype: dtype of weights and activations; 4-bit weights are dequantised to it for use.
        quantize: `nf4` stores every linear layer but the head in 4 bits, at quantiles of a normal distribution, with an
            8-bit scale per 64 weights: QLoRA, arXiv:2305.14314, by bitsandbytes.
        device: where the model is placed.
        tokenizer: the folder of the tokenizer, if it is not the model's.

    Raises:
        ValueError: there is no such model.
        ModuleNotFoundError: the package that ships the model is not installed, or bitsandbytes is not.
    """
    from transformers import AutoModelForCausalLM

    options = _in_4_bits(dtype, device) if quantize == "nf4" else {}
    model, its_tokenizer, _ = load_pretrained(AutoModelForCausalLM, name_or_path, dtype, tokenizer, **options)
    for module in model.modules() if options else ():
        # On processors with AVX-512 BF16, the first call without a gradient makes bitsandbytes round a layer's weights
        # again and repack them for inference; after that no gradient passes through the layer.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.to(device), its_tokenizer


def _in_4_bits(dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
    """Arguments that make `from_pretrained` quantise weights as it reads them; it skips the head by itself."""
    for package in ("bitsandbytes", "accelerate"):
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"load_model: quantize: {package} is not installed: pip install {package}")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": config, "device_map": {"": str(device)}}


def load_pretrained(
    kind: Any, name_or_path: str | Path, dtype: torch.dtype, tokenizer: str | Path = "", **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    """(model of the transformers class `kind`, tokenizer, names of weights missing from the checkpoint)."""
    from huggingface_hub.errors import HFValidationError
    from transformers import AutoTokenizer

    name = str(name_or_path)
    with quiet_progress():
        source = str(converted(PACKAGED[name])) if name in PACKAGED else name
    with quiet_progress(), or_cache(source):
        try:
            model, loading = kind.from_pretrained(
                source, dtype=dtype, trust_remote_code=False, output_loading_info=True, **options
            )
            read = AutoTokenizer.from_pretrained(str(tokenizer) or source, trust_remote_code=False)
        except (OSError, HFValidationError) as error:  # the second of a path that is no folder, before transformers 5
            raise ValueError(_no_such_model(name, error)) from error
        except ValueError as error:
            _refuse_other_kind(name, kind, error)
            raise
    if read.pad_token_id is None:
        read.pad_token = read.eos_token
    return model.eval(), read, sorted(loading["missing_keys"])


def _refuse_other_kind(name: str, kind: Any, error: ValueError) -> None:
    """In place of transformers' message, which lists every model that there is."""
    other = re.search(r"Unrecognized configuration class <class '[\w.]*?(\w+)'>", str(error))
    if other is not None:
        do = "fastrl trains decoder-only models, not those with an encoder and a decoder."
        expected = f"a model of which transformers has an {kind.__name__}"
        raise ValueError(check.sentence("load_model", name, expected, f"one with a {other[1]}", do)) from error


def linear_shapes(name_or_path: str | Path) -> Counter[tuple[int, int]]:
    """(outputs, width) of a model's linear layers -> their number, from its configuration alone.

    Empty if there is no such model or its configuration is not a causal language model's.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    name = str(name_or_path)
    try:
        source = str(converted(PACKAGED[name])) if name in PACKAGED else name
        with quiet_progress(), or_cache(source), torch.device("meta"):
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError):  # loading the model gives a better message
        return Counter()
    linears = (module for module in model.modules() if isinstance(module, torch.nn.Linear))
    return Counter((linear.weight.shape[0], linear.weight.shape[1]) for linear in linears)


def stop_token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, also: Sequence[str] = (), **template_options: Any
) -> tuple[int, ...]:
    """The ids that end a completion: from the model's generation config, the tokenizer's end of sequence, the end of an
    answer in its chat template, and the tokens `also`.

    Raises:
        ValueError: there are none, so no completion would ever end; or one of `also` is not a single token.
    """
    ids = _ends(model, tokenizer, **template_options)
    for text in also:
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        got = f"{text!r}, which is {len(found)}"
        check.require(len(found) == 1, "stop_token_ids", "also", "texts that are one token each", got)
        ids = tuple(dict.fromkeys((*ids, *found)))
    check.require(
        len(ids) > 0,
        "stop_token_ids",
        "model",
        "an end-of-sequence token in the generation config or the tokenizer",
        "neither",
        "Set model.generation_config.eos_token_id.",
    )
    return ids


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **template_options: Any) -> tuple[int, ...]:
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = configured if isinstance(configured, list | tuple) else [configured]
    ends = (*listed, tokenizer.eos_token_id, end_of_turn(tokenizer, **template_options))
    return tuple(dict.fromkeys(token for token in ends if token is not None))


def vocab_size(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The number of head rows that are tokens; None if all are. The rest is padding and stands for no text."""
    tokens = max(*tokenizer.get_vocab().values(), *_ends(model, tokenizer)) + 1
    weight = getattr(model.get_output_embeddings(), "weight", None)  # `split_head` refuses a head without one
    return tokens if weight is not None and tokens < weight.shape[0] else None


def embedding_rows(model: PreTrainedModel) -> int:
    """The number of token ids that a model can read; looks inside an adapter around the embeddings."""
    layer = model.get_input_embeddings()
    while hasattr(layer, "base_layer"):
        layer = layer.base_layer
    return layer.weight.shape[0]


def fingerprint(model: torch.nn.Module) -> str:
    """A fingerprint of the weights: SHA-256 over name, dtype, shape and sum of bit patterns of each tensor.

    It distinguishes models and their checkpoints at the cost of reading the weights once; it does not resist a
    deliberate collision.
    """
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        bits = tensor.view(integers[tensor.element_size()]).flatten()
        # torch widens what it sums; in pieces, the wide copy stays small.
        total = sum(piece.sum(dtype=torch.int64).item() for piece in bits.split(PIECE))
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {total}\n".encode())
    return digest.hexdigest()


def _no_such_model(name: str, cause: Exception) -> str:
    near = get_close_matches(name.lower(), PACKAGED, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"transformers: {' '.join(str(cause).split())}"
    return check.sentence(
        "load_model",
        "name_or_path",
        f"a folder with a model and its tokenizer, a hub id that can be reached, or one of {', '.join(PACKAGED)}",
        repr(name),
        hint,
    )


@contextmanager
def quiet_progress() -> Generator[None]:
    """Hides transformers' progress bars inside the block."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
