"""The transformers sampler against plain forwards and `model.generate`, on tiny random models."""

from __future__ import annotations

import math

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from tolerance import assert_no_worse
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastrl import linear_logprob
from fastrl.data.groups import group_from_json, group_to_json
from fastrl.rollout import SamplingParams
from fastrl.rollout import draw as draw_module
from fastrl.rollout import transformers_sampler as module
from fastrl.rollout.cache import decode_attention, passed_as
from fastrl.rollout.draw import inverse_cdf, truncate, uniforms
from fastrl.rollout.prepack import can_prepack, prepacked
from fastrl.rollout.transformers_sampler import TransformersSampler
from fastrl.types import Group, Prompt

VOCAB = 61
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # what the native attention takes
    "max_position_embeddings": 64,
    "pad_token_id": 2,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "initializer_range": 0.25,
}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **COMMON)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=2, **COMMON)),
    "mistral_window": lambda: MistralForCausalLM(MistralConfig(num_hidden_layers=2, sliding_window=5, **COMMON)),
    "gemma3_window": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            num_hidden_layers=3,
            layer_types=SLIDING,
            sliding_window=5,
            query_pre_attn_scalar=16,
            final_logit_softcapping=7.0,
            **COMMON,
        )
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            num_hidden_layers=3, layer_types=SLIDING, sliding_window=64, query_pre_attn_scalar=16, **COMMON
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.25)
    ),
}
SHARED = [[7, 3, 9, 5], [7, 3, 9], [7, 3, 9, 11, 13], [7, 3, 9, 5, 2]]  # all begin with 7, 3; the second ends there
PROMPTS = [[5, 9, 2, 7], [11], [3, 4, 2, 2, 8, 13, 21, 34, 55], [17, 18, 19, 20, 21, 22], [11]]


def build(name):
    torch.manual_seed(0)
    return MODELS[name]().float().eval()


@pytest.fixture(params=sorted(MODELS))
def model(request):
    return build(request.param)


@pytest.fixture
def llama():
    return build("llama")


def completion_logits(model, prompt, completion):
    """Logits that predict each completion token, from a plain forward without padding or cache."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].double()


def ids(groups):
    return [[sample.token_ids for sample in group] for group in groups]


def flat(groups):
    return [member for group in groups for member in group]


def logps(groups):
    return [sample.sampling_logps for sample in flat(groups)]


@pytest.mark.parametrize("prompts", [PROMPTS, SHARED], ids=["distinct prompts", "a shared prefix"])
def test_greedy_equals_generate_of_each_unpadded_prompt(model, prompts):
    groups = TransformersSampler(model).sample(prompts, 2, SamplingParams(12, temperature=0.0))
    for prompt, group in zip(prompts, groups, strict=True):
        prompt = torch.tensor([prompt])
        expected = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12, eos_token_id=None
        )
        assert [s.token_ids for s in group] == [expected[0, prompt.shape[1] :].tolist()] * 2


@pytest.mark.parametrize("changes", [{}, {"top_k": 5}, {"stop_token_ids": (3, 7)}], ids=["", "top-k", "stops"])
@pytest.mark.parametrize("at_once", [1, 4, 5, 100])
def test_how_many_are_decoded_at_once_changes_no_completion(llama, at_once, changes):
    params = SamplingParams(8, seed=6, **changes)
    whole = TransformersSampler(llama, record_support=True).sample(PROMPTS, 3, params)
    seen, rows, wrapped = [], [], llama.forward

    def forward(*args, **kwargs):
        out = wrapped(*args, **kwargs)
        rows.append(len(out.logits))
        return out

    llama.forward = forward
    try:
        sampler = TransformersSampler(llama, max_num_seqs=at_once, record_support=True)
        parts = sampler.sample(PROMPTS, 3, params, lambda done, of: seen.append((done, of)))
    finally:
        del llama.forward
    assert ids(parts) == ids(whole)
    assert [one.support for one in flat(parts)] == [one.support for one in flat(whole)]
    assert logps(parts) == [pytest.approx(values, abs=1e-5) for values in logps(whole)]
    assert max(rows) == -(-len(PROMPTS) * 3 // -(-len(PROMPTS) * 3 // at_once))
    assert seen == sorted(seen)
    assert {of for _, of in seen} == {8}


def test_fewer_than_no_completions_at_once_are_refused(llama):
    with pytest.raises(ValueError, match="max_num_seqs: expected at least 0, got -1"):
        TransformersSampler(llama, max_num_seqs=-1)


class OldName(LlamaForCausalLM):
    """What a model that brings its own code may look like, whatever transformers is installed."""

    def forward(self, input_ids=None, past_key_values=None, **kwargs):
        return super().forward(input_ids, **passed_as(build("llama"), past_key_values), **kwargs)


class NewName(LlamaForCausalLM):
    def forward(self, input_ids=None, cache=None, **kwargs):
        return super().forward(input_ids, **passed_as(build("llama"), cache), **kwargs)


class NoName(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("kind", [OldName, NewName, NoName])
def test_the_cache_is_passed_by_the_name_that_the_models_forward_takes(llama, kind):
    other = kind(llama.config).eval()
    other.load_state_dict(llama.state_dict())
    results = [TransformersSampler(model).sample(SHARED, 2, SamplingParams(8, seed=6)) for model in (llama, other)]
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.6, 0, 1.0), (0.6, 7, 1.0), (1.3, 20, 0.8)]
)
def test_sampling_logps_are_those_of_a_plain_forward_under_the_sampled_distribution(model, temperature, top_k, top_p):
    params = SamplingParams(8, temperature=temperature, top_k=top_k, top_p=top_p, seed=3)
    groups = TransformersSampler(model).sample(PROMPTS, 3, params)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for sample in group:
            z = completion_logits(model, prompt, sample.token_ids) / (temperature or 1.0)
            kept = z.softmax(-1)
            if top_k:
                kept[z < z.topk(top_k).values[:, -1:]] = 0.0
            kept = kept / kept.sum(-1, keepdim=True)
            ordered = kept.sort(descending=True).values
            edge = ordered.gather(-1, (ordered.cumsum(-1) < top_p - 1e-12).sum(-1, keepdim=True).clamp(max=VOCAB - 1))
            kept[kept < edge] = 0.0
            kept = kept / kept.sum(-1, keepdim=True)
            expected = kept.gather(-1, torch.tensor(sample.token_ids)[:, None])[:, 0].log()
            torch.testing.assert_close(
                torch.tensor(sample.sampling_logps, dtype=torch.float64), expected, rtol=0, atol=1e-5
            )


@pytest.mark.parametrize("temperature", [0.0, 0.6])
@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_sampling_logps_are_those_of_transformers_penalised_and_truncated_logits(model, temperature, penalty):
    """Rows end and leave between, so that each has to take what it has seen along."""
    stops = (2, 7, 11, 30)
    params = SamplingParams(
        12,
        temperature=temperature,
        min_p=0.05,
        repetition_penalty=penalty,
        min_new_tokens=3,
        stop_token_ids=stops,
        seed=3,
    )
    groups = TransformersSampler(model, compact_after=0.0).sample(PROMPTS, 6, params)
    repetition, min_p = RepetitionPenaltyLogitsProcessor(penalty), MinPLogitsWarper(0.05)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        minimum = MinNewTokensLengthLogitsProcessor(len(prompt), 3, list(stops))
        for sample in group:
            for i, z in enumerate(completion_logits(model, prompt, sample.token_ids)):
                before = torch.tensor([[*prompt, *sample.token_ids[:i]]])
                z = minimum(before, repetition(before, z[None])) / (temperature or 1.0)
                z = min_p(before, z) if temperature else z
                expected = z.log_softmax(-1)[0, sample.token_ids[i]].item()
                assert sample.sampling_logps[i] == pytest.approx(expected, abs=1e-5)
    assert len({len(sample.token_ids) for sample in flat(groups)}) > 1 or not temperature


@pytest.mark.parametrize("minimum", [0, 5])
def test_greedy_with_a_penalty_and_a_minimum_length_equals_generate(model, minimum):
    stops = [2, 7, 11, 30]
    params = SamplingParams(
        12, temperature=0.0, repetition_penalty=1.4, min_new_tokens=minimum, stop_token_ids=tuple(stops)
    )
    for prompt, (sample,) in zip(PROMPTS, TransformersSampler(model).sample(PROMPTS, 1, params), strict=True):
        prompt = torch.tensor([prompt])
        expected = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=12,
            min_new_tokens=minimum,
            repetition_penalty=1.4,
            eos_token_id=stops,
        )
        assert sample.token_ids == expected[0, prompt.shape[1] :].tolist()


def test_no_stop_token_is_drawn_before_the_minimum_and_some_right_after_it(llama):
    params = SamplingParams(12, stop_token_ids=tuple(range(0, VOCAB, 2)), min_new_tokens=6, seed=0)
    samples = flat(TransformersSampler(llama).sample(PROMPTS, 8, params))
    assert {len(sample.token_ids) for sample in samples} >= {7, 8}
    assert all(token % 2 for sample in samples for token in sample.token_ids[:6])
    longest = SamplingParams(4, stop_token_ids=tuple(range(0, VOCAB, 2)), min_new_tokens=4, seed=0)
    assert not any(sample.finished for sample in flat(TransformersSampler(llama).sample(PROMPTS, 8, longest)))


def test_a_repetition_penalty_makes_completions_repeat_less(llama):
    repeats = []
    for penalty in (1.0, 1.5):
        params = SamplingParams(20, temperature=0.7, repetition_penalty=penalty, seed=1)
        samples = flat(TransformersSampler(llama).sample(PROMPTS, 8, params))
        repeats.append(sum(20 - len(set(sample.token_ids)) for sample in samples))
    assert repeats[1] < 0.5 * repeats[0]


def test_ids_that_have_no_logit_may_stand_in_the_prompt_and_among_the_stops(llama):
    params = SamplingParams(6, vocab_size=20, repetition_penalty=1.5, min_new_tokens=2, stop_token_ids=(3, 40), seed=0)
    for sample in flat(TransformersSampler(llama).sample([[5, 55, 3], [33]], 4, params)):
        assert max(sample.token_ids) < 20
        assert 3 not in sample.token_ids[:2]


# Pieces of letters, so that texts are short and stop strings span tokens; the stop strings below occur in most.
PIECES = ["<pad>", "<bos>", "<eos>", *"abcdefgh", *(a + b for a in "abcdefg" for b in "abcdefgh")][:VOCAB]
STOP_STRINGS = ("ab", "cd", "gh", "ff")


@pytest.fixture
def letters():
    """A tokenizer of one or two letters a token."""
    words = Tokenizer(tokenizer_models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")  # generate splits a text of its own
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>")


def contains(text):
    return any(stop in text for stop in STOP_STRINGS)


@pytest.mark.parametrize("compact_after", [math.inf, 0.0])
@pytest.mark.parametrize("stop_token_ids", [(), (7, 11)])
@pytest.mark.parametrize("every", [1, 4])  # as on a CPU, and like an accelerator
def test_a_completion_ends_with_the_token_that_completes_a_stop_string(
    llama, letters, compact_after, stop_token_ids, every, monkeypatch
):
    monkeypatch.setattr(module, "_steps_between_checks", lambda device: every)
    sampler = TransformersSampler(llama, letters, compact_after=compact_after)
    free, cut = (
        flat(
            sampler.sample(PROMPTS, 8, SamplingParams(10, seed=1, stop_token_ids=stop_token_ids, stop_strings=strings))
        )
        for strings in ((), STOP_STRINGS)
    )
    ends = {"string": 0, "token": 0, "length": 0, "spanning": 0}
    for whole, sample in zip(free, cut, strict=True):
        length = len(sample.token_ids)
        assert sample.token_ids == whole.token_ids[:length]  # the draws are the same
        assert sample.sampling_logps == pytest.approx(whole.sampling_logps[:length], abs=1e-5)
        assert not contains(letters.decode(sample.token_ids[:-1]))
        by_string = contains(letters.decode(sample.token_ids))
        by_token = sample.token_ids[-1] in stop_token_ids
        assert sample.finished == (by_string or by_token)
        assert sample.finished or length == 10
        ends["string" if by_string else "token" if by_token else "length"] += 1
        ends["spanning"] += by_string and not contains(letters.decode(sample.token_ids[-1:]))
    assert ends["string"] > 5
    assert ends["spanning"] > 0
    assert bool(ends["token"]) == bool(stop_token_ids)


def test_decoding_ends_when_every_text_has_a_stop_string_and_the_last_token_is_read_too(llama, letters, monkeypatch):
    steps, plain = [], TransformersSampler._step
    monkeypatch.setattr(TransformersSampler, "_step", lambda self, *args: steps.append(1) or plain(self, *args))
    params = SamplingParams(50, stop_strings=tuple("abcdefgh"), seed=0)
    samples = flat(TransformersSampler(llama, letters).sample(PROMPTS, 4, params))
    longest = max(len(sample.token_ids) for sample in samples)
    assert len(steps) == longest - 1 < 10
    assert all(sample.finished for sample in samples)
    once = SamplingParams(1, stop_strings=tuple("abcdefgh"), seed=0)
    found = [sample.finished for sample in flat(TransformersSampler(llama, letters).sample(PROMPTS, 8, once))]
    assert sum(found) > 20


def test_a_stop_string_in_the_prompt_does_not_end_a_completion(llama, letters):
    prompt = letters.convert_tokens_to_ids(["ab", "cd", "g"])
    assert contains(letters.decode(prompt))
    params = SamplingParams(6, stop_strings=STOP_STRINGS, seed=3)
    lengths = [
        len(sample.token_ids) for sample in flat(TransformersSampler(llama, letters).sample([prompt], 20, params))
    ]
    assert min(lengths) >= 1
    assert max(lengths) == 6


def test_a_stop_string_among_the_minimum_of_tokens_does_not_end_a_completion(llama, letters):
    params = SamplingParams(10, stop_strings=STOP_STRINGS, min_new_tokens=5, seed=1)
    samples = flat(TransformersSampler(llama, letters).sample(PROMPTS, 8, params))
    assert min(len(sample.token_ids) for sample in samples) > 5
    early = [sample for sample in samples if contains(letters.decode(sample.token_ids[:5]))]
    assert len(early) > 3
    assert any(not sample.finished for sample in early)
    assert any(sample.finished for sample in samples)


def test_greedy_with_stop_strings_equals_generate(llama, letters):
    params = SamplingParams(12, temperature=0.0, repetition_penalty=1.4, stop_strings=STOP_STRINGS)
    samples = flat(TransformersSampler(llama, letters).sample(PROMPTS, 1, params))
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        prompt = torch.tensor([prompt])
        expected = llama.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=12,
            repetition_penalty=1.4,
            eos_token_id=None,
            stop_strings=list(STOP_STRINGS),
            tokenizer=letters,
        )
        assert sample.token_ids == expected[0, prompt.shape[1] :].tolist()
    assert any(sample.finished for sample in samples)


def test_stop_strings_without_a_tokenizer_are_refused(llama):
    with pytest.raises(ValueError, match="tokenizer: expected one, to read stop_strings with, got none"):
        TransformersSampler(llama).sample(PROMPTS, 1, SamplingParams(4, stop_strings=("a",)))


def test_first_token_frequencies_pass_a_chi_square_test():
    torch.manual_seed(1)
    config = LlamaConfig(**{**COMMON, "vocab_size": 8, "initializer_range": 0.15}, num_hidden_layers=1)
    model = LlamaForCausalLM(config).eval()
    prompt, count = [1, 5, 3], 20_000
    (group,) = TransformersSampler(model).sample([prompt], count, SamplingParams(1, temperature=0.7, seed=5))
    expected = (completion_logits(model, prompt, [0])[0] / 0.7).softmax(-1) * count
    observed = torch.bincount(torch.tensor([s.token_ids[0] for s in group]), minlength=8).double()
    assert expected.min() > 20
    assert ((observed - expected) ** 2 / expected).sum() < 24.3  # 99.9 % point with 7 degrees of freedom


@pytest.mark.parametrize("max_len", [10, 40])
def test_nothing_follows_the_stop_token_and_compaction_changes_nothing(model, max_len):
    params = SamplingParams(max_len, temperature=1.5, stop_token_ids=(2, 7, 11, 30), seed=1)
    never, eager = (
        TransformersSampler(model, compact_after=steps).sample(PROMPTS, 6, params) for steps in (math.inf, 0.0)
    )
    assert ids(never) == ids(eager)
    for a, b in zip(logps(never), logps(eager), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    finished = 0
    for sample in flat(eager):
        stops = [i for i, token in enumerate(sample.token_ids) if token in params.stop_token_ids]
        assert stops == ([len(sample.token_ids) - 1] if sample.finished else [])
        assert len(sample.sampling_logps) == len(sample.token_ids)
        assert sample.finished or len(sample.token_ids) == max_len
        finished += sample.finished
    assert finished > len(PROMPTS)


def test_decoding_ends_when_every_row_has_stopped(llama, monkeypatch):
    steps = []
    plain = TransformersSampler._step
    monkeypatch.setattr(
        TransformersSampler, "_step", lambda self, *args: steps.append(len(args[1].done)) or plain(self, *args)
    )
    params = SamplingParams(50, stop_token_ids=tuple(range(0, VOCAB, 2)), seed=0)
    groups = TransformersSampler(llama).sample(PROMPTS, 4, params)
    longest = max(len(sample.token_ids) for sample in flat(groups))
    assert longest < 50
    assert len(steps) == longest - 1
    assert steps[-1] < steps[0]  # finished rows left


def test_same_seed_same_samples_other_seed_other_samples(llama):
    sampler = TransformersSampler(llama)
    first, again, other = (sampler.sample(PROMPTS, 2, SamplingParams(10, seed=seed)) for seed in (4, 4, 5))
    assert first == again
    assert all(a != b for a, b in zip(flat(ids(first)), flat(ids(other)), strict=True))


def test_samples_of_one_prompt_differ_even_when_the_prompt_is_repeated(llama):
    groups = TransformersSampler(llama).sample([[11], [11]], 3, SamplingParams(10, seed=0))
    assert len({tuple(sample.token_ids) for sample in flat(groups)}) == 6


def test_a_row_depends_neither_on_the_other_prompts_nor_on_the_number_of_samples(model):
    sampler, params = TransformersSampler(model), SamplingParams(10, seed=9)
    together = ids(sampler.sample(PROMPTS, 3, params))
    assert ids(sampler.sample(PROMPTS[:1], 3, params)) == together[:1]
    assert [group[:2] for group in together] == ids(sampler.sample(PROMPTS, 2, params))


def test_each_distinct_prompt_is_prefilled_once_in_batches_within_the_budget(llama, monkeypatch):
    monkeypatch.setattr(module, "_PREFILL_TOKENS", 12)
    seen = []
    plain = TransformersSampler._forward_prompts
    monkeypatch.setattr(
        TransformersSampler,
        "_forward_prompts",
        lambda self, prompts, _: seen.append(prompts) or plain(self, prompts, _),
    )
    params = SamplingParams(6, seed=2)
    small = TransformersSampler(llama).sample(PROMPTS, 3, params)
    assert sorted(flat(seen)) == sorted({tuple(prompt) for prompt in PROMPTS})
    assert len(seen) > 1
    assert all(len(batch) * max(map(len, batch)) <= 12 for batch in seen)
    monkeypatch.setattr(module, "_PREFILL_TOKENS", 10_000)
    assert ids(TransformersSampler(llama).sample(PROMPTS, 3, params)) == ids(small)


def test_what_all_prompts_begin_with_is_prefilled_once(llama):
    lengths = []
    hook = llama.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    try:
        TransformersSampler(llama).sample(SHARED, 2, SamplingParams(1, seed=0))
    finally:
        hook.remove()
    assert lengths == [(1, 2), (4, 3)]  # every prompt keeps a token of its own, so the prefix ends before the second 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "head_dim", "seen"), [(2, 16, 1), (6, 64, 37), (4, 80, 130)])
@pytest.mark.parametrize("masked", [False, True])
def test_native_decode_attention_is_no_worse_than_torch(native_isa, dtype, heads, head_dim, seen, masked):
    keys, values = (torch.randn(5, 2, seen + 3, head_dim).to(dtype)[:, :, :seen] for _ in range(2))
    query = torch.randn(5, heads, 1, head_dim).to(dtype)
    mask = torch.zeros(5, 1, 1, seen + 1, dtype=dtype)
    mask[:2, ..., : seen // 2 + 1] = -math.inf
    mask = mask if masked else None
    got, _ = decode_attention(torch.nn.Module(), query, keys, values, mask, scaling=0.2)

    def torch_attention(cast):
        q, k, v = (x.to(cast) for x in (query.view(5, 2, heads // 2, head_dim), keys, values))
        bias = None if mask is None else mask[..., 1:].to(cast)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.2)
        return out.reshape(5, 1, heads, head_dim)

    assert_no_worse(got, torch_attention(dtype), torch_attention(torch.float64))


def test_updated_weights_are_seen_by_the_next_call(llama):
    sampler, params = TransformersSampler(llama), SamplingParams(4, seed=0)
    before = sampler.sample(PROMPTS, 1, params)
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.mul_(1.1)
    after = sampler.sample(PROMPTS, 1, params)
    assert logps(before) != logps(after)
    for prompt, (sample,) in zip(PROMPTS, after, strict=True):
        z = completion_logits(llama, prompt, sample.token_ids)
        expected = z.log_softmax(-1)[0, sample.token_ids[0]].item()
        assert sample.sampling_logps[0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_modes_attention_and_gradients_are_as_before_also_after_an_exception(llama, attention, monkeypatch):
    llama.set_attn_implementation(attention)
    llama.train()
    llama.model.layers[0].eval()  # a frozen part keeps its own mode
    modes = [part.training for part in llama.modules()]
    sampler, params = TransformersSampler(llama), SamplingParams(4)

    def unchanged():
        assert [part.training for part in llama.modules()] == modes
        assert llama.config._attn_implementation == attention
        assert all(p.requires_grad and p.grad is None for p in llama.parameters())
        assert torch.is_grad_enabled()

    during = []
    hook = llama.register_forward_hook(
        lambda *_: during.append((llama.training, torch.is_grad_enabled(), llama.config._attn_implementation))
    )
    sampler.sample(PROMPTS, 1, params)
    unchanged()
    hook.remove()
    assert set(during) == {(False, False, attention), (False, False, "fastrl_decode")}
    loss = llama(torch.tensor([PROMPTS[0]])).logits.logsumexp(-1).sum()
    loss.backward()  # buffers touched while sampling still take part in autograd
    llama.zero_grad()

    for phase in (attention, "fastrl_decode"):

        def broken(hidden, phase=phase):
            if llama.config._attn_implementation == phase:
                raise RuntimeError("broken")
            return hidden

        with monkeypatch.context() as patch:
            patch.setattr(llama.model.layers[-1].mlp, "forward", broken)
            with pytest.raises(RuntimeError, match="broken"):
                sampler.sample(PROMPTS, 1, params)
        unchanged()


def test_bfloat16_weights_sample_and_report_float32_logps(llama):
    model = llama.to(torch.bfloat16)
    groups = TransformersSampler(model).sample(PROMPTS, 2, SamplingParams(6, seed=0))
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for sample in group:
            z = completion_logits(model, prompt, sample.token_ids).log_softmax(-1)
            expected = z.gather(-1, torch.tensor(sample.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(sample.sampling_logps).double(), expected, rtol=0.05, atol=0.15)


@pytest.mark.skipif(not can_prepack(torch.zeros(1, dtype=torch.bfloat16)), reason="no packed bfloat16 on this CPU")
def test_prepacked_linears_compute_the_same_and_forget_the_copy_afterwards():
    model = torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.Linear(64, 300, bias=False)).to(torch.bfloat16)
    x = torch.randn(5, 3, 96, dtype=torch.bfloat16)
    with torch.no_grad():
        plain = model(x)
        with prepacked(model):
            assert all("forward" in vars(linear) for linear in model)
            torch.testing.assert_close(model(x), plain, rtol=2**-7, atol=2**-7)
        assert not any("forward" in vars(linear) for linear in model)
        model[1].weight.zero_()
        with prepacked(model):
            assert model(x).abs().max() == 0.0  # each entry packs the current weights


def test_top_k_and_top_p_keep_the_sets_worked_out_by_hand():
    weights = torch.tensor([[0.05, 0.4, 0.1, 0.25, 0.2], [0.2, 0.2, 0.2, 0.2, 0.2]])
    kept = lambda top_k, top_p: (truncate(weights.clone(), top_k, top_p) > 0).int().tolist()  # noqa: E731
    assert kept(0, 1.0) == [[1, 1, 1, 1, 1]] * 2
    assert kept(2, 1.0) == [[0, 1, 0, 1, 0], [1, 1, 1, 1, 1]]  # ties with the last one kept stay
    assert kept(9, 1.0) == [[1, 1, 1, 1, 1]] * 2
    assert kept(0, 0.4)[0] == [0, 1, 0, 0, 0]  # 0.4 reaches 0.4
    assert kept(0, 0.41)[0] == [0, 1, 0, 1, 0]
    assert kept(0, 0.86)[0] == [0, 1, 1, 1, 1]
    assert kept(0, 1e-9)[0] == [0, 1, 0, 0, 0]  # at least one token stays
    assert kept(3, 0.7)[0] == [0, 1, 0, 1, 0]  # of 0.4 + 0.25 + 0.2, the mass 0.65 / 0.85 reaches 0.7
    assert kept(3, 0.77)[0] == [0, 1, 0, 1, 1]


def test_min_p_keeps_the_sets_worked_out_by_hand():
    weights = torch.tensor([[0.05, 0.4, 0.1, 0.25, 0.2], [0.2, 0.2, 0.2, 0.2, 0.2]])
    kept = lambda top_k, top_p, min_p: (truncate(weights.clone(), top_k, top_p, min_p) > 0).int().tolist()  # noqa: E731
    assert kept(0, 1.0, 0.0) == [[1, 1, 1, 1, 1]] * 2
    assert kept(0, 1.0, 0.49) == [[0, 1, 0, 1, 1], [1, 1, 1, 1, 1]]  # 0.196 and more
    assert kept(0, 1.0, 0.6)[0] == [0, 1, 0, 1, 0]
    assert kept(0, 1.0, 1.0) == [[0, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert kept(0, 0.86, 0.3)[0] == [0, 1, 0, 1, 1]  # of 0.4, 0.25, 0.2 and 0.1, which top_p keeps
    assert kept(2, 1.0, 0.3)[0] == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("min_p", [0.02, 0.2, 0.9])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (30, 1.0), (0, 0.8), (30, 0.8)])
def test_min_p_after_top_k_and_top_p_keeps_what_transformers_keeps(min_p, top_k, top_p):
    z = 2.0 * torch.randn(200, 500, generator=torch.Generator().manual_seed(0))
    kept = truncate(z.softmax(-1), top_k, top_p, min_p) > 0
    for warper in (TopKLogitsWarper(top_k) if top_k else None, TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)):
        z = warper(None, z) if warper else z
    assert kept.equal(z.isfinite())
    assert kept.sum() > 200 or min_p == 0.9


def test_a_nucleus_wider_than_the_first_guess_is_found_whole():
    weights = torch.rand(3, 5000, generator=torch.Generator().manual_seed(0))
    kept = truncate(weights.clone(), 0, 0.9) > 0
    for row, mask in zip(weights.double(), kept, strict=True):
        assert mask.sum() > 1024
        assert row[mask].sum() >= 0.9 * row.sum()
        assert row[mask].sum() - row[mask].min() < 0.9 * row.sum()
        assert row[mask].min() >= row[~mask].max()


@pytest.mark.parametrize("vocabulary", [3, 256, 1000, 262_144])
@pytest.mark.parametrize("u", [0.0, 1e-300, 0.5, 1 - 2**-24, 1 - 2**-53, 1.0])
def test_no_uniform_number_selects_a_zero_weight_token(vocabulary, u):
    generator = torch.Generator().manual_seed(vocabulary)
    weights = torch.rand(64, vocabulary, generator=generator)
    weights[torch.rand(64, vocabulary, generator=generator) < 0.7] = 0.0
    weights[::2, 0] = weights[::2, -1] = 0.0
    weights[0] = 0.0
    weights[:, vocabulary // 2] += 1e-30  # at least one token is possible
    tokens, total = inverse_cdf(weights, torch.full((64,), u, dtype=torch.float64))
    assert (weights.gather(-1, tokens[:, None]) > 0).all()
    torch.testing.assert_close(total, weights.double().sum(-1), rtol=1e-6, atol=0)


def test_the_drawn_token_is_where_an_exact_cumulative_sum_crosses_u():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(0, 8, (512, 700), generator=generator).float()  # sums are exact
    u = torch.rand(512, generator=generator, dtype=torch.float64)
    tokens, total = inverse_cdf(weights, u)
    cdf = weights.double().cumsum(-1)
    above = cdf.gather(-1, tokens[:, None])[:, 0]
    below = above - weights.double().gather(-1, tokens[:, None])[:, 0]
    assert (below <= u * total).all()
    assert (u * total < above).all()


def test_every_stream_of_uniforms_is_its_own_and_does_not_depend_on_the_others():
    streams = [(0, 0), (0, 1), (1, 0), (3, 2)]
    u = uniforms(7, streams, 5)
    assert u.dtype == torch.float64
    assert len(u.flatten().unique()) == 20
    assert ((u >= 0) & (u < 1)).all()
    assert uniforms(7, [(3, 2)], 9)[0, :5].tolist() == u[3].tolist()
    assert uniforms(8, streams, 5).tolist() != u.tolist()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"seed": -1}, "seed"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids"),
        ({"min_p": 1.1}, "min_p: expected a number in"),
        ({"min_p": math.nan}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected above 0, got 0.0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty"),
        ({"min_new_tokens": -1}, "min_new_tokens"),
        ({"min_new_tokens": 5}, "min_new_tokens: expected 0 to max_new_tokens = 4, got 5"),
        ({"stop_strings": ("a", "")}, "stop_strings: expected a tuple of texts, none of them empty"),
        ({"stop_strings": "stop"}, "stop_strings: expected a tuple of texts"),
    ],
)
def test_bad_params_are_refused_with_the_field_named(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**{"max_new_tokens": 4, **fields})


@pytest.mark.parametrize(
    ("prompts", "num_samples", "message"),
    [
        ([], 1, "at least one prompt"),
        ([[1], []], 1, "empty prompt at index 1"),
        ([[1]], 0, "num_samples"),
        ([[1] * 61], 1, "64 positions, got 61 \\+ 4"),
        ([[1, VOCAB]], 1, "token ids"),
    ],
)
def test_bad_prompts_are_refused_with_the_reason(llama, prompts, num_samples, message):
    with pytest.raises(ValueError, match=message):
        TransformersSampler(llama).sample(prompts, num_samples, SamplingParams(4))


def test_a_model_without_pluggable_attention_is_refused():
    with pytest.raises(ValueError, match="pluggable attention"):
        TransformersSampler(torch.nn.Linear(2, 2))


def test_logits_that_are_not_finite_raise(llama):
    with torch.no_grad():
        llama.lm_head.weight[3] = math.nan
    with pytest.raises(FloatingPointError, match="finite logits"):
        TransformersSampler(llama).sample(PROMPTS, 1, SamplingParams(4))


# The sets that tokens were drawn from.

CUTS = [{"top_p": 0.8}, {"top_k": 20}, {"min_p": 0.1}, {"top_p": 0.8, "top_k": 20, "min_p": 0.1}]


def score(model, prompt, sample, support):
    """Log-probabilities of the completion from a plain forward's hidden states."""
    backbone = model.get_decoder()
    ids = torch.tensor([[*prompt, *sample.token_ids]])
    softcap = getattr(model.config, "final_logit_softcapping", None)
    with torch.no_grad():
        hidden = backbone(ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
        targets, weight = torch.tensor(sample.token_ids), model.get_output_embeddings().weight
        return linear_logprob(hidden, weight, targets, temperature=0.7, softcap=softcap, support=support).logps


def csr(sets):
    offsets = torch.tensor([0, *map(len, sets)]).cumsum(0)
    return torch.tensor([one for kept in sets for one in kept]), offsets


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3_window"])
def test_scoring_under_the_recorded_support_gives_the_sampling_logps_and_scoring_under_all_does_not(name, cut):
    model = build(name)
    params = SamplingParams(8, temperature=0.7, seed=3, stop_token_ids=(2, 7, 11, 30), **cut)
    groups = TransformersSampler(model, compact_after=0.0, record_support=True).sample(PROMPTS, 4, params)
    apart = 0.0
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for sample in group:
            assert len(sample.support) == len(sample.token_ids)
            expected = torch.tensor(sample.sampling_logps)
            under = score(model, prompt, sample, csr(sample.support))
            torch.testing.assert_close(under, expected, rtol=0, atol=1e-4)
            apart = max(apart, (score(model, prompt, sample, None) - expected).abs().max().item())
    assert apart > 0.05
    assert len({len(sample.token_ids) for sample in flat(groups)}) > 1  # rows left while others were drawn


def test_recording_the_support_changes_nothing_else(llama):
    params = SamplingParams(8, temperature=0.7, top_p=0.8, seed=3, stop_token_ids=(2, 7))
    plain = TransformersSampler(llama).sample(PROMPTS, 3, params)
    recorded = TransformersSampler(llama, record_support=True).sample(PROMPTS, 3, params)
    assert all(sample.support is None for sample in flat(plain))
    assert all(sample.support is not None for sample in flat(recorded))
    assert (ids(plain), logps(plain)) == (ids(recorded), logps(recorded))


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.0, "top_p": 0.5}], ids=["nothing cut", "greedy"])
def test_there_is_no_support_where_tokens_are_drawn_from_the_whole_vocabulary_or_not_at_all(llama, fields):
    groups = TransformersSampler(llama, record_support=True).sample(PROMPTS, 2, SamplingParams(4, **fields))
    assert all(sample.support is None for sample in flat(groups))


def test_stop_tokens_before_the_minimum_and_ids_past_vocab_size_are_in_no_support(llama):
    stops = (2, 7, 11, 30)
    params = SamplingParams(6, top_k=40, min_new_tokens=3, stop_token_ids=stops, vocab_size=50, seed=1)
    for sample in flat(TransformersSampler(llama, record_support=True).sample(PROMPTS, 3, params)):
        assert not {*stops} & {one for kept in sample.support[:3] for one in kept}
        assert max(one for kept in sample.support for one in kept) < 50


def test_more_kept_ids_than_a_call_may_record_are_refused(llama, monkeypatch):
    params = SamplingParams(4, top_k=5, seed=0)
    sampler = TransformersSampler(llama, record_support=True)
    monkeypatch.setattr(draw_module, "_SUPPORT_IDS", 2 * 5 * 4)
    assert sum(len(kept) for one in flat(sampler.sample([[5, 9]], 2, params)) for kept in one.support) == 40
    monkeypatch.setattr(draw_module, "_SUPPORT_IDS", 2 * 5 * 4 - 1)
    with pytest.raises(ValueError, match="expected at most 39 kept ids in a call, got 40 or more"):
        sampler.sample([[5, 9]], 2, params)


def test_the_support_survives_a_file(llama):
    (samples,) = TransformersSampler(llama, record_support=True).sample([[5, 9]], 2, SamplingParams(3, top_k=5, seed=0))
    group = Group(Prompt(0, "", (5, 9)), samples)
    assert [one.support for one in group_from_json(group_to_json(group)).samples] == [one.support for one in samples]
