"""Conversations with an environment: what is trained on, what the sampler sees, and what happens when one fails."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from trainer.test_resume import everything, run_until_crash
from trainer.tiny import WORDS, wanted_words
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastrl.algorithms import ALGORITHMS
from fastrl.data.prompts import load_prompts
from fastrl.environments import ReasoningGymEnvironment, ToolEnvironment, calculator, resolve_environment
from fastrl.environments.tools import hermes, plain
from fastrl.progress import Unwatched
from fastrl.rewards import RewardFailure, RewardSuite
from fastrl.rewards.environment import environment
from fastrl.rollout.base import SamplingParams
from fastrl.rollout.turns import Turns, continuation, play
from fastrl.sources.collect import Judge, Sampling, judged
from fastrl.trainer.config import (
    AheadConfig,
    EnvironmentConfig,
    EvalConfig,
    OptimizerConfig,
    PolicyGradientConfig,
    RewardConfig,
    RolloutConfig,
    TaskConfig,
    TrainConfig,
)
from fastrl.trainer.setup import prepare, train
from fastrl.trainer.trainer import Trainer
from fastrl.types import Prompt, Sample

CHATML = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
VOCABULARY = [*WORDS, "<|im_start|>", "<|im_end|>", "user", "assistant", "tool", "system", "gymnast"]
ID = {word: place for place, word in enumerate(VOCABULARY)}
START, END = ID["<|im_start|>"], ID["<|im_end|>"]


def chat_tokenizer(template=CHATML):
    words = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|im_end|>", unk_token="<unk>", pad_token="<eos>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = template
    return tokenizer


def ids(text):
    return [ID[word] for word in text.split()]


class Scripted:
    """A sampler that says what it is told to, and notes what it was asked."""

    def __init__(self, *turns):
        self.turns, self.asked = list(turns), []

    def sample(self, prompts, num_samples, params, progress=None):
        self.asked.append(([list(prompt) for prompt in prompts], num_samples, params))
        said = self.turns.pop(0)
        count = len(prompts) * num_samples
        said = said if isinstance(said[0], list) else [said] * count
        samples = [
            Sample(one, [-float(i + 1) for i in range(len(one))], one[-1] == END, versions=[3] * len(one))
            for one in (one[: params.max_new_tokens] for one in said)
        ]
        return [samples[i : i + num_samples] for i in range(0, count, num_samples)]


class Echo:
    """Says w9 after each turn, and ends when the policy says w5; the reward is the turn's number."""

    def reset(self, row):
        self.turn = 0

    def step(self, completion):
        self.turn += 1
        done = "w5" in completion
        return [] if done else [{"role": "tool", "content": "w9"}], float(self.turn), done


PROMPT = Prompt(
    0, [{"role": "user", "content": "w1"}], tuple(ids("<|im_start|> user w1 <|im_end|> <|im_start|> assistant"))
)
PARAMS = SamplingParams(max_new_tokens=24, stop_token_ids=(END,))
HEARD = ids("<|im_start|> tool w9 <|im_end|> <|im_start|> assistant")


def talk(*turns, factory=Echo, number=1, params=PARAMS, **settings):
    sampler = Scripted(*turns)
    groups = play([PROMPT], sampler, chat_tokenizer(), number, params, Turns(factory, **settings))
    return groups[0].samples, sampler


def test_a_sample_is_the_sampled_ids_and_what_the_template_adds_between_them():
    first, second = [*ids("w2 w3"), END], [*ids("w5"), END]
    (sample,), sampler = talk(first, second)
    assert sample.token_ids == [*first, *HEARD, *second]
    assert sample.own == [True] * 3 + [False] * len(HEARD) + [True] * 2
    assert sample.sampling_logps == [-1.0, -2.0, -3.0, *[0.0] * len(HEARD), -1.0, -2.0]
    assert sample.versions == [3] * len(sample.token_ids)
    assert sample.finished
    assert sample.extra["turn_rewards"] == [1.0, 2.0]
    assert sampler.asked[1][0] == [[*PROMPT.token_ids, *first, *HEARD]]
    # Here, where the tokenizer is a bijection, the whole is what the template makes of the conversation.
    tokenizer, messages = chat_tokenizer(), [*PROMPT.content, *sample.extra["messages"]]
    whole = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
    assert whole == [*PROMPT.token_ids, *sample.token_ids]


def test_a_turn_that_a_stop_string_ended_gets_the_end_of_turn_from_the_template_untrained():
    class Stops(Scripted):
        def sample(self, *args):
            groups = super().sample(*args)
            for sample in groups[0]:
                sample.finished = True
            return groups

    sampler = Stops(ids("w2"), ids("w5"))
    (sample,) = play([PROMPT], sampler, chat_tokenizer(), 1, PARAMS, Turns(Echo))[0].samples
    assert sample.token_ids == [*ids("w2"), END, *HEARD, *ids("w5")]
    assert sample.own == [True, *[False] * (1 + len(HEARD)), True]


def test_turns_are_sampled_with_other_random_numbers_and_only_for_those_that_go_on():
    done, more = [*ids("w5"), END], [*ids("w2"), END]
    samples, sampler = talk([done, more, more], done, number=3)
    assert [number for _, number, _ in sampler.asked] == [3, 1]
    assert len(sampler.asked[1][0]) == 2
    assert len({params.seed for _, _, params in sampler.asked}) == 2
    assert [sample.extra["metrics"]["turns"] for sample in samples] == [1.0, 2.0, 2.0]


def test_a_turn_that_is_cut_off_is_not_shown_to_the_environment():
    """Half a tool call must never run."""
    seen = []

    class Watching(Echo):
        def step(self, completion):
            seen.append(completion)
            return super().step(completion)

    (sample,), _ = talk([*ids("w2"), END], ids("w2 w3 w4"), factory=Watching, turn_tokens=3)
    assert seen == ["w2"]
    assert not sample.finished
    assert sample.own[-3:] == [True] * 3


@pytest.mark.parametrize(("limit", "length"), [(10, 10), (9, 9), (8, 2), (7, 2)])
def test_a_conversation_keeps_its_limit_and_ends_with_a_token_of_the_policy(limit, length):
    params = replace(PARAMS, max_new_tokens=limit)
    (sample,), _ = talk([*ids("w2"), END], ids("w2 w3 w4 w6 w7"), params=params)
    assert len(sample.token_ids) == length
    assert sample.own[-1]
    assert not sample.finished


def test_the_last_turn_is_rewarded_but_not_finished_if_the_environment_was_not_done():
    more = [*ids("w2"), END]
    (sample,), _ = talk(more, more, max_turns=2)
    assert sample.extra["turn_rewards"] == [1.0, 2.0]
    assert not sample.finished
    assert sample.token_ids == [*more, *HEARD, *more]


class Broken(Echo):
    """Fails for every second conversation."""

    made = 0

    def __init__(self):
        Broken.made += 1
        self.bad = Broken.made % 2 == 0

    def step(self, completion):
        if self.bad:
            raise ConnectionError("no sandbox")
        return super().step(completion)


def score(factory, *, share=0.5, number=4, **settings):
    said = []

    class Heard(Unwatched):
        def warn(self, message):
            said.append(message)

    done = [*ids("w5"), END]
    sampling = Sampling(Scripted(done), chat_tokenizer(), PARAMS, Turns(factory, **settings))
    judge = Judge(RewardSuite([environment], max_failure_fraction=share), 1, 1, {})
    return judged([PROMPT], number, 0, sampling, judge, Heard())[0].samples, judge.numbers, said


def test_a_conversation_whose_environment_failed_has_no_reward_and_is_counted_and_said():
    samples, numbers, said = score(Broken)
    assert [sample.reward for sample in samples] == [1.0, None, 1.0, None]
    assert numbers["environment/failures"] == 2.0
    assert "2 of 4 conversations; first with ConnectionError: no sandbox" in said[0]
    with pytest.raises(RewardFailure, match="environment failed in 2 of 4 conversations"):
        score(Broken, share=0.25)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, r"expected \(messages, reward or None, done\)"),
        (([], 1.0, False), "expected a message, or done"),
        (([], float("nan"), True), "expected a finite number"),
        (([], "1", True), "expected a finite number"),
        (([{"role": "assistant", "content": "w1"}], None, False), "others than the assistant"),
        (([{"role": "tool"}], None, False), "expected chat messages"),
    ],
)
def test_an_environment_that_answers_wrongly_fails_by_name(answer, message):
    class Wrong(Echo):
        def step(self, completion):
            return answer

    with pytest.raises(RewardFailure, match=message):
        score(Wrong)


@pytest.mark.parametrize("kind", ["sync", "async", "reset", "exit"])
def test_an_environment_that_hangs_or_exits_costs_its_conversation(kind):
    class Slow(Echo):
        def step(self, completion):
            time.sleep(3)

    class AsyncSlow(Echo):
        async def step(self, completion):
            await asyncio.sleep(3)

    class ResetSlow(Echo):
        def reset(self, row):
            time.sleep(3)

    class Exits(Echo):
        def step(self, completion):
            raise SystemExit(0)

    factory = {"sync": Slow, "async": AsyncSlow, "reset": ResetSlow, "exit": Exits}[kind]
    began = time.monotonic()
    samples, numbers, _ = score(factory, share=1.0, number=1, timeout=0.2)
    assert time.monotonic() - began < 2
    assert samples[0].reward is None
    assert numbers["environment/failures"] == 1.0


def test_async_environments_of_a_turn_run_concurrently():
    class Waits(Echo):
        async def step(self, completion):
            await asyncio.sleep(0.2)
            return Echo.step(self, completion)

    began = time.monotonic()
    samples, _, _ = score(Waits, number=10)
    assert time.monotonic() - began < 1.5
    assert [sample.reward for sample in samples] == [1.0] * 10


# Chat templates


def test_a_template_that_leaves_out_what_the_environment_says_is_refused():
    silent = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
    with pytest.raises(ValueError, match="'tool' messages, which it leaves out"):
        continuation(chat_tokenizer(silent), [{"role": "tool", "content": "w9"}])
    raising = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match="not tool, got no tools"):
        continuation(chat_tokenizer(raising), [{"role": "tool", "content": "w9"}])


def test_a_template_that_rewrites_earlier_answers_changes_nothing_that_was_sampled():
    """As Qwen3's, which drops the reasoning of earlier turns."""
    rewriting = CHATML.replace("{{ m.content }}", "{% if loop.last %}w8{% endif %} {{ m.content }}")
    sampler = Scripted([*ids("w8 w2"), END], [*ids("w8 w5"), END])
    (sample,) = play([PROMPT], sampler, chat_tokenizer(rewriting), 1, PARAMS, Turns(Echo))[0].samples
    assert sample.token_ids[:3] == [*ids("w8 w2"), END]
    assert sample.own.count(True) == 6


def test_examples_stand_between_the_system_message_and_the_question():
    shown = [{"role": "user", "content": "w2"}, {"role": "assistant", "content": "w3"}]
    (prompt,) = load_prompts([{"prompt": "w4"}], chat_tokenizer(), system="w1", examples=shown)
    assert [message["content"] for message in prompt.content] == ["w1", "w2", "w3", "w4"]
    with pytest.raises(ValueError, match="examples: expected chat messages"):
        load_prompts([{"prompt": "w4"}], chat_tokenizer(), examples=[{"role": "user"}])


# Tools


def add(a: int, b: int = 1) -> int:
    """Adds two numbers.

    Args:
        a: One.
        b: The other.
    """
    return a + b


async def divide(a: int, b: int) -> float:
    """Divides.

    Args:
        a: What.
        b: By what.
    """
    return a / b


def step(environment, text):
    return asyncio.run(environment.step(text))


def test_calls_of_hermes_models_are_run_in_order_and_their_errors_go_back_to_the_policy():
    tools = ToolEnvironment([add, divide])
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
    assert step(tools, f"Let me see.{call}{call}") == ([{"role": "tool", "content": "5"}] * 2, None, False)
    as_text = '<tool_call>{"name": "add", "arguments": "{\\"a\\": 4}"}</tool_call>'
    assert step(tools, as_text)[0][0]["content"] == "5"
    for text, error in (
        ("<tool_call>{'name': 1}</tool_call>", "the call is not JSON"),
        ("<tool_call>[1]</tool_call>", '"name" and "arguments"'),
        ('<tool_call>{"name": "add", "arguments": [1]}</tool_call>', '"name" and "arguments"'),
        ('<tool_call>{"name": "sub", "arguments": {}}</tool_call>', "expected one of add, divide, got 'sub'"),
        ('<tool_call>{"name": "add", "arguments": {"c": 1}}</tool_call>', "unexpected keyword argument"),
        ('<tool_call>{"name": "divide", "arguments": {"a": 1, "b": 0}}</tool_call>', "division by zero"),
        ("<tool_call>" + "[" * 100_000, "the call is not JSON"),
    ):
        messages, reward, done = step(tools, text)
        assert messages[0]["content"].startswith("Error: "), text
        assert error in messages[0]["content"]
        assert (reward, done) == (None, False)
    assert tools.metrics == {"calls": 10.0, "call_failures": 7.0}
    assert step(tools, "no call") == ([], None, True)


def test_plain_calls_are_those_of_known_tools():
    calls = plain("So calculator(2 * (3 + 4)) and print(1) and my_calculator(3), calculator(5", ["calculator"])
    assert [(call.name, call.arguments) for call in calls] == [("calculator", "2 * (3 + 4)")]
    assert hermes("calculator(2)", ["calculator"]) == []


@pytest.mark.parametrize(
    ("expression", "value"),
    [("123 + 456", "579"), ("12 * (3 + 4)", "84"), ("7 / 2", "3.5"), ("-7 // 2", "-4"), ("0.1 + 0.2", "0.3")],
)
def test_the_calculator_computes(expression, value):
    assert calculator(expression) == value


@pytest.mark.parametrize(
    "expression", ["9**9**9", "9^9^9", "__import__('os')", "a + 1", "1 +", "", "(" * 150, "1" * 300]
)
def test_the_calculator_reads_and_never_runs(expression):
    tools = ToolEnvironment([calculator], "plain")
    (message,), _, _ = (
        step(tools, f"calculator({expression})") if "(" * 9 not in expression else ([{"content": "Error"}], 0, 0)
    )
    assert message["content"].startswith("Error")
    with pytest.raises((ValueError, SyntaxError, MemoryError)):
        calculator(expression)


def test_tools_without_type_hints_are_refused_and_schemas_are_of_their_docstrings():
    schema = ToolEnvironment([add]).schemas()[0]["function"]
    assert schema["parameters"]["required"] == ["a"]
    assert schema["parameters"]["properties"]["b"]["description"] == "The other."

    def bare(x):
        return x

    with pytest.raises(ValueError, match="expected type hints and a docstring"):
        ToolEnvironment([bare]).schemas()


def test_an_unknown_environment_or_option_is_refused():
    with pytest.raises(ValueError, match="Did you mean 'calculator'"):
        resolve_environment("calculater")
    with pytest.raises(ValueError, match="expected some of"):
        resolve_environment("calculator", parse="plain")
    with pytest.raises(ValueError, match="cannot be imported"):
        resolve_environment("nowhere:factory")


def test_a_wrong_answer_to_a_reasoning_gym_task_may_be_tried_again_and_the_rewards_add_up_to_the_best():
    import reasoning_gym

    options = {"min_terms": 2, "max_terms": 2, "size": 1, "seed": 3}
    entry = reasoning_gym.create_dataset("chain_sum", **options)[0]
    environment = ReasoningGymEnvironment(extract="last_number", strict=True)
    environment.reset({"entry": entry, "task": "chain_sum", "task_options": options})
    messages, reward, done = environment.step("It is 1.")
    assert ([message["role"] for message in messages], reward, done) == (["user"], 0.0, False)
    assert environment.step(f"It is {entry['answer']}.") == ([], 1.0, True)


# In training


def rewards_of_turns(completions, **_):
    """The share of w7 among the words of the last turn."""
    texts = [messages[-1]["content"] if messages[-1]["role"] == "assistant" else "" for messages in completions]
    return wanted_words(texts, ["w7"] * len(texts))


class Twice:
    """Ends after the second turn; its answer is a word that depends on the first."""

    def __init__(self):
        self.metrics = {"words": 0.0}

    def reset(self, row):
        self.turn = 0

    def step(self, completion):
        self.turn += 1
        self.metrics["words"] += len(completion.split())
        word = (completion.split() or ["w1"])[0]
        return (
            [{"role": "user", "content": word}] if self.turn == 1 else [],
            0.5 if self.turn == 1 else None,
            self.turn == 2,
        )


def config_for(tmp_path, **changes):
    folder = tmp_path / "model"
    if not folder.exists():
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(
            vocab_size=len(VOCABULARY), **shape, num_key_value_heads=2, max_position_embeddings=128,
            tie_word_embeddings=True, eos_token_id=END, bos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        model.save_pretrained(folder)
        chat_tokenizer().save_pretrained(folder)
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"w{i}"}) + "\n" for i in range(24)))
    fields = {
        "model": str(folder),
        "dtype": "float32",
        "device": "cpu",
        "steps": 7,
        "run_dir": str(tmp_path / "run"),
        "max_tokens_per_microbatch": 256,
        "task": TaskConfig(source=str(path), held_out=4),
        "environment": EnvironmentConfig("rollout.test_turns:Twice", turn_tokens=12),
        "rewards": (RewardConfig("rollout.test_turns:rewards_of_turns"), RewardConfig("environment")),
        "rollout": RolloutConfig(prompts_per_step=6, group_size=4, max_new_tokens=40, stop=("w3", "w4", "w5", "w6")),
        "optimizer": OptimizerConfig(lr=1e-2),
        "eval": EvalConfig(samples=1),
        "show_every": 0,
    }
    return TrainConfig(**(fields | changes))


@pytest.fixture
def _no_pictures(monkeypatch):
    monkeypatch.setattr("fastrl.monitor.report.charts", lambda run: [])


@pytest.mark.usefixtures("_no_pictures")
def test_a_run_with_an_environment_learns_and_logs_its_turns(tmp_path):
    outcome = train(config_for(tmp_path, steps=25))
    assert outcome.status == "finished"
    assert outcome.after["sampled"] > outcome.before["sampled"] + 0.2
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(1.0 <= line["environment/turns"] <= 2.0 for line in lines)
    assert 0.0 < lines[0]["environment/own_fraction"] < 1.0
    assert lines[0]["environment/words"] > 0.0
    assert 0.0 < lines[0]["rewards/environment/mean"] <= 0.5  # less where a first turn was cut
    logged = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    assert any(len(line["extra"]["messages"]) == 3 for line in logged)


class Tooled(Twice):
    """An environment that tells the chat template of a tool."""

    def schemas(self):
        return [{"type": "function", "function": {"name": "w7", "description": "", "parameters": {}}}]


@pytest.mark.usefixtures("_no_pictures")
def test_conversations_that_another_process_samples_ahead_are_those_that_this_one_would_sample(tmp_path):
    task = replace(config_for(tmp_path).task, system="w7")
    environment = EnvironmentConfig("rollout.test_turns:Tooled", turn_tokens=12)
    ratio = PolicyGradientConfig(ratio_to_sampler=True)
    fields = {"task": task, "environment": environment, "policy_gradient": ratio, "steps": 3, "threads": 1}
    fields["linear"] = "torch"  # with auto, each process would take what its own benchmark found faster
    plain = config_for(tmp_path, run_dir=str(tmp_path / "plain"), **fields)
    ahead = AheadConfig(max_staleness=0, threads=1)
    for config in (plain, replace(plain, source="ahead", ahead=ahead, run_dir=str(tmp_path / "ahead"))):
        assert train(config).status == "finished"

    def untimed(run):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        timed = ("time", "seconds", "wait", "tokens_per_second", "ahead/")
        return [{name: v for name, v in line.items() if not any(t in name for t in timed)} for line in lines]

    assert untimed(tmp_path / "plain") == untimed(tmp_path / "ahead")
    assert untimed(tmp_path / "ahead")[1]["environment/turns"] > 1.0


@pytest.mark.usefixtures("_no_pictures")
def test_a_resumed_run_with_an_environment_is_bit_for_bit_the_run_that_never_stopped(tmp_path):
    config = config_for(tmp_path, save_every=5, run_dir=str(tmp_path / "whole"), eval=EvalConfig(every=2))
    train(config)
    stopped = replace(config, run_dir=str(tmp_path / "stopped"))
    run_until_crash(stopped, 7)
    train(replace(stopped, resume=stopped.run_dir))
    assert everything(tmp_path / "stopped") == everything(tmp_path / "whole")


@pytest.mark.parametrize("algorithm", ["dapo", "ppo"])
@pytest.mark.parametrize("layout", ["padded", "shared", "varlen"])
def test_the_gradient_is_that_of_the_policys_own_tokens_in_every_layout(tmp_path, layout, algorithm):
    """Against -sum_t own_t A log p_t / sum_t own_t of plain forwards, one conversation at a time. PPO without a critic
    has another advantage for each token, which comes from the algorithm's own estimate."""
    ppo = {"critic": "none", "kl_coef": 0.0, "gamma": 0.9, "value_coef": 0.1} if algorithm == "ppo" else {}
    settings = {} if algorithm == "dapo" else {"ppo": type(TrainConfig().ppo)(**ppo)}
    run = prepare(config_for(tmp_path, layout=layout, algorithm=algorithm, **settings))
    batch = run.source.next(run.learner, Unwatched())
    samples = [sample for group in batch.groups for sample in group.samples]
    assert any(not all(sample.own) for sample in samples)
    parts = list(run.algorithm.updates(run.learner, batch, Unwatched()))
    run.algorithm.accumulate(run.learner, parts[0])
    model = run.learner.policy.model
    found = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()

    advantages = {}
    for micro in parts[0].batches:
        flat = micro.advantages
        flat = flat if len(flat) == len(micro.targets) else flat.repeat_interleave(micro.cu_seqlens.diff())
        for sample, part in zip(micro.samples, flat.split(micro.cu_seqlens.diff().tolist()), strict=True):
            advantages[id(sample)] = part
    total = sum(sum(sample.own) for sample in samples)
    model.eval()
    for group in batch.groups:
        for sample in group.samples:
            if id(sample) not in advantages:
                continue
            prompt = len(group.prompt.token_ids)
            row = torch.tensor([[*group.prompt.token_ids, *sample.token_ids]])
            logps = model(row).logits[0].log_softmax(-1)[prompt - 1 : -1]
            taken = logps.gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
            own = torch.tensor(sample.own)
            (-(taken * advantages[id(sample)] * own).sum() / total).backward()
    for name, value in model.named_parameters():
        torch.testing.assert_close(found[name], value.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_tokens_of_the_environment_have_exactly_no_gradient(tmp_path):
    """Another log-probability of theirs changes neither loss nor gradient, to the bit."""
    run = prepare(config_for(tmp_path))
    batch = run.source.next(run.learner, Unwatched())
    algorithm = replace(run.algorithm, spec=ALGORITHMS["dapo"].spec, ratio_to_sampler=True)

    def gradient():
        run.learner.policy.model.zero_grad()
        part = next(iter(algorithm.updates(run.learner, batch, Unwatched())))
        loss, _ = algorithm.accumulate(run.learner, part)
        return float(loss), [value.grad.clone() for value in run.learner.policy.model.parameters()]

    loss, grads = gradient()
    for group in batch.groups:
        for sample in group.samples:
            sample.sampling_logps = [
                logp if own else -7.0 for logp, own in zip(sample.sampling_logps, sample.own, strict=True)
            ]
    again, other = gradient()
    assert loss == again
    assert all(map(torch.equal, grads, other))
    assert any(bool(grad.any()) for grad in grads)


@pytest.mark.usefixtures("_no_pictures")
def test_a_trainer_takes_the_class_of_an_environment(tmp_path):
    config = config_for(tmp_path)
    trainer = Trainer(
        config.model,
        [{"prompt": f"w{i}"} for i in range(12)],
        rewards=rewards_of_turns,
        environment=Twice,
        steps=1,
        dtype="float32",
        run_dir=tmp_path / "given",
        rollout={"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 30, "stop": ["w3", "w4", "w5", "w6"]},
    )
    assert trainer.train().status == "finished"
    line = json.loads((tmp_path / "given" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["environment/turns"] >= 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"environment": EnvironmentConfig(max_turns=2)}, "a name with its other settings"),
        ({"environment": EnvironmentConfig("calculator")}, "names calculator, as this chat template shows no tools"),
        ({"environment": EnvironmentConfig("calculator", turn_tokens=99)}, "0 to rollout.max_new_tokens"),
        ({"algorithm": "dpo"}, "none for written rows"),
        ({"rollout": RolloutConfig(max_new_tokens=112)}, "within the model's 128 positions"),
    ],
)
def test_settings_that_make_no_conversation_are_refused(tmp_path, changes, message):
    base = config_for(tmp_path)
    with pytest.raises(ValueError, match=message):
        prepare(replace(base, **({"task": TaskConfig()} if "algorithm" in changes else {}), **changes))


def test_a_recipe_without_a_chat_template_has_no_environment(tmp_path):
    config = config_for(tmp_path)
    with pytest.raises(ValueError, match="none without a chat template"):
        prepare(replace(config, task=replace(config.task, chat=False)))
