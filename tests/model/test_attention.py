from __future__ import annotations

import pytest
import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention

from fastrl.data.pack import pack
from fastrl.model.attention import attention_inputs, prepare_attention, varlen_attention, varlen_attention_backend
from fastrl.model.head import split_head
from fastrl.types import Group, Prompt, Sample

VOCABULARY, EOS = 31, 0
LAYOUTS = ("padded", "shared", "varlen")
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": EOS, "eos_token_id": EOS,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other on a busy machine make models of this size a hundred times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(family, **changes):
    torch.manual_seed(0)
    if family == "gpt2":  # learned positions, and no more of them than the longest sequence has
        config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=15)
        return transformers.GPT2LMHeadModel(config).double().eval()
    name = {"llama": "Llama", "qwen3": "Qwen3", "mistral": "Mistral"}[family]
    config = getattr(transformers, f"{name}Config")(**SIZES, **changes)
    return in_float64(getattr(transformers, f"{name}ForCausalLM")(config)).eval()


def in_float64(model):
    """transformers' RMSNorm computes in float32 whatever its input; torch's keeps float64."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon))
    return model.double()


@pytest.fixture
def groups():
    """G = 3, 1, 4 with unequal lengths. `sampling_logps` number the completion tokens; the id EOS, also the padding's,
    stands inside and at the end of completions."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda length: torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()  # noqa: E731
    made, first = [], 0
    for prompt_length, lengths in ((5, [3, 1, 7]), (2, [4]), (9, [2, 6, 6, 1])):
        samples = []
        for length in lengths:
            ids = draw(length)
            ids[length // 2] = ids[-1] = EOS
            samples.append(Sample(ids, [float(first + token) for token in range(length)], True, reward=1.0))
            first += length
        made.append(Group(Prompt(0, "", tuple(draw(prompt_length))), samples))
    return made


def coefficients(n):
    return torch.randn(n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def gradients(model):
    grads = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    return grads


def score_one_at_a_time(model, groups):
    """Each sequence alone through the whole model: logits at position i - 1 score token i."""
    logps = []
    for group in groups:
        prompt = list(group.prompt.token_ids)
        for sample in group.samples:
            logits = model(input_ids=torch.tensor([prompt + sample.token_ids])).logits[0]
            logps += [logits[len(prompt) + j - 1].log_softmax(-1)[token] for j, token in enumerate(sample.token_ids)]
    logps = torch.stack(logps)
    (logps * coefficients(len(logps))).sum().backward()
    return logps.detach(), gradients(model)


def score_packed(model, groups, layout, max_tokens=64):
    layout = prepare_attention(model, layout, dtype=torch.float64)
    halves = split_head(model)
    logps = torch.full((sum(len(s.token_ids) for g in groups for s in g.samples),), torch.nan, dtype=torch.float64)
    for batch in pack(groups, layout=layout, max_tokens=max_tokens):
        hidden = halves.backbone(batch.input_ids, position_ids=batch.position_ids, **attention_inputs(batch))
        assert hidden.isfinite().all()
        logits = halves.logits(hidden.flatten(0, 1)[batch.hidden_index])
        got = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
        numbers = batch.sampling_logps.long()
        (got * coefficients(len(logps))[numbers]).sum().backward()
        logps[numbers] = got.detach()
    return logps, gradients(model)


def assert_same(got, want):
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=1e-10)
    for name, grad in want[1].items():
        assert grad.abs().max() > 0 or name == "transformer.wpe.weight"
        torch.testing.assert_close(
            got[1][name], grad, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("max_tokens", [24, 64, 1000])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_logps_and_gradients_equal_those_of_one_sequence_at_a_time(family, layout, max_tokens, groups):
    model = make_model(family)
    assert_same(score_packed(model, groups, layout, max_tokens), score_one_at_a_time(model, groups))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_checkpointing_recomputes_with_the_same_attention(layout, groups):
    model = make_model("llama")
    want = score_one_at_a_time(model, groups)
    model.train()
    model.gradient_checkpointing_enable()
    assert_same(score_packed(model, groups, layout), want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sliding_window_is_kept(layout, groups):
    model = make_model("mistral", sliding_window=4)
    assert_same(score_packed(model, groups, layout), score_one_at_a_time(model, groups))


def test_the_mask_of_a_padded_batch_changes_nothing_when_it_is_passed_all_the_same(groups):
    model = make_model("llama")
    (batch,) = pack(groups, layout="padded", max_tokens=1000)
    masked, bare = (
        model.model(input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=mask)[0]
        for mask in (batch.attention_mask, attention_inputs(batch)["attention_mask"])
    )
    assert not batch.attention_mask.all()
    torch.testing.assert_close(masked[batch.attention_mask], bare[batch.attention_mask], rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", ["padded", "varlen"])
def test_padded_and_varlen_build_no_dense_mask(layout, groups, monkeypatch):
    if layout == "padded" and int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 4 builds a dense mask in every training step that comes without one")
    model, seen = make_model("llama"), []
    halves = split_head(model)

    def record(*args, attn_mask=None, **kwargs):
        seen.append(attn_mask)
        return scaled_dot_product_attention(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    monkeypatch.setattr("fastrl.model.attention.scaled_dot_product_attention", record)
    monkeypatch.setitem(globals(), "split_head", lambda _: halves)  # the four tokens it compares on are no batch
    score_packed(model, groups, layout)
    assert seen
    assert all(mask is None for mask in seen)


def test_a_prepared_model_still_generates_and_scores_left_padded_batches_as_before():
    model = make_model("llama")
    ids, mask = torch.tensor([[EOS, EOS, 5, 6], [7, 8, 9, 4]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])

    def run():
        tokens = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        return tokens, model(input_ids=ids, attention_mask=mask).logits

    tokens, logits = run()
    assert prepare_attention(model, "varlen", dtype=torch.float64) == "varlen"
    tokens_after, logits_after = run()
    assert torch.equal(tokens_after, tokens)
    assert torch.equal(logits_after, logits)


def test_a_varlen_batch_on_a_model_that_was_not_prepared_fails_instead_of_mixing_sequences(groups):
    model = make_model("llama")
    (batch,) = pack(groups, layout="varlen", max_tokens=1000)
    with pytest.raises(RuntimeError):
        model.model(input_ids=batch.input_ids, position_ids=batch.position_ids, **attention_inputs(batch))


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_varlen_attention_is_attention_under_a_block_diagonal_mask(window, key_heads):
    torch.manual_seed(0)
    query = torch.randn(12, 4, 8, dtype=torch.float64)
    key, value = torch.randn(2, 12, key_heads, 8, dtype=torch.float64)
    bounds = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    got = varlen_attention(query, key, value, bounds, 6, scale=0.3, window=window)

    owner, at = torch.tensor([0] * 5 + [1] + [2] * 6), torch.arange(12)
    distance = at[:, None] - at[None, :]
    allowed = (owner[:, None] == owner[None, :]) & (distance >= 0) & (distance < (window or 12))
    keys, values = (tensor.repeat_interleave(4 // key_heads, dim=1) for tensor in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, keys) * 0.3
    want = torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), values)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_prepare_attention_on_a_cpu_leaves_auto_to_the_cost_model():
    assert varlen_attention_backend("cpu") is None
    model = make_model("llama")
    assert prepare_attention(model, "auto", dtype=torch.bfloat16) == "auto"
    assert model.config._attn_implementation == "sdpa"


def test_models_that_cannot_keep_sequences_of_one_row_apart_are_padded_or_refused():
    eager = make_model("llama")
    eager.set_attn_implementation("eager")
    recurrent = make_model("qwen3")
    recurrent.config.layer_types = ["full_attention", "linear_attention"]
    for model, reason in ((eager, "expected SDPA attention .* got 'eager'"), (recurrent, "got linear_attention")):
        assert prepare_attention(model, "auto", dtype=torch.float64) == "padded"
        for layout in ("shared", "varlen"):
            with pytest.raises(ValueError, match=rf"{reason}\. Use layout='padded'\."):
                prepare_attention(model, layout, dtype=torch.float64)


def test_attention_dropout_is_refused_by_varlen(groups):
    model = make_model("llama", attention_dropout=0.1).train()
    with pytest.raises(ValueError, match=r"attention dropout: expected 0, got 0\.1"):
        score_packed(model, groups, "varlen")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_kernel_is_as_close_to_float64_as_one_sdpa_call_per_sequence():
    torch.manual_seed(0)
    bounds = torch.tensor([0, 700, 701, 1024], dtype=torch.int32, device="cuda")
    exact = [torch.randn(1024, heads, 64, dtype=torch.float64, device="cuda") for heads in (8, 2, 2)]
    exact = [tensor.bfloat16().double().requires_grad_() for tensor in exact]
    out_grad = torch.randn(1024, 8, 64, dtype=torch.float64, device="cuda").bfloat16()

    def run(inputs, attend):
        output = attend(*inputs)
        return output.detach(), *torch.autograd.grad(output, inputs, out_grad.to(output.dtype))

    from fastrl.model.attention import _loop

    truth = run(exact, lambda q, k, v: _loop(q, k, v, bounds, None, None))
    halves = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    plain = run(halves, lambda q, k, v: _loop(q, k, v, bounds, None, None))
    got = run(halves, lambda q, k, v: varlen_attention(q, k, v, bounds, 700))
    for a, b, t in zip(got, plain, truth, strict=True):
        assert (a - t).abs().max() <= 2 * (b - t).abs().max() + 1e-5
