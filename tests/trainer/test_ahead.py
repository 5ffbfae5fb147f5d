"""Completions sampled ahead by another process: which weights wrote which token, the bound on their age, and deaths."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from trainer.test_resume import lines
from trainer.tiny import in_step, tiny_config

from fastrl.model.load import load_model
from fastrl.progress import Unwatched
from fastrl.rewards import RewardFailure
from fastrl.rollout.base import SamplingParams
from fastrl.rollout.cache import passed_as
from fastrl.rollout.prepack import can_prepack
from fastrl.rollout.transformers_sampler import TransformersSampler
from fastrl.sources import Ahead
from fastrl.sources.ahead import GeneratorDied, Spool
from fastrl.trainer.build import build_algorithm
from fastrl.trainer.config import AheadConfig, PolicyGradientConfig, RewardConfig, TrainConfig
from fastrl.trainer.generator import Generator
from fastrl.trainer.setup import train
from fastrl.trainer.trainer import Trainer
from fastrl.types import Batch

TIMES = ("time", "seconds", "ahead/", "tokens_per_second", "wait")
PROMPTS = [(3, 4), (5, 6, 7), (8, 9)]


def ahead_config(tmp_path, staleness=2, **changes):
    settings = {"source": "ahead", "ahead": AheadConfig(max_staleness=staleness, threads=1), "threads": 1}
    return tiny_config(tmp_path, **settings | {"algorithm": "cispo", "steps": 6} | changes)


def shifted(model):
    return {
        name: one.detach() + 0.3 * torch.sin(torch.arange(one.numel()).view_as(one))
        for name, one in model.named_parameters()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_completions_in_flight_go_on_under_new_weights_and_say_which_wrote_each_token(tmp_path, dtype):
    """Before the update they are those of the old weights, after it those of the new ones on the old keys and values.

    A third sampler recomputes the latter from the keys and values, by hand.
    """
    if dtype == torch.bfloat16 and not can_prepack(torch.ones(1, dtype=dtype)):
        pytest.skip("oneDNN packs no bfloat16 weights here")
    folder = tiny_config(tmp_path).model
    params = SamplingParams(max_new_tokens=6, seed=3)
    untouched = TransformersSampler(load_model(folder, dtype)[0]).sample(PROMPTS, 2, params)
    model = load_model(folder, dtype)[0]
    sampler, new = TransformersSampler(model), shifted(model)

    def update(done, total):
        if done == 3 and sampler.version == 0:
            sampler.update_weights(new, 7)

    got = sampler.sample(PROMPTS, 2, params, update)
    assert all(torch.equal(one, new[name].to(dtype)) for name, one in model.named_parameters())
    for group, others in zip(got, untouched, strict=True):
        for sample, other in zip(group, others, strict=True):
            # The logits of token 3 are there before its progress is reported.
            assert sample.versions == ([0] * 4 + [7] * 2)[: len(sample.token_ids)]
            assert sample.token_ids[:4] == other.token_ids[:4]
            assert sample.sampling_logps[:4] == other.sampling_logps[:4]
    assert [[s.token_ids for s in group] for group in got] != [[s.token_ids for s in group] for group in untouched]
    check_stale_cache(folder, dtype, new, got)


def check_stale_cache(folder, dtype, new, got):
    """The log-probabilities of tokens 4 and 5, from transformers' own cache with the weights changed under it."""
    for prompt, group in zip(PROMPTS, got, strict=True):
        for sample in (one for one in group if len(one.token_ids) == 6):
            model = load_model(folder, dtype)[0].eval()
            with torch.no_grad():
                before = torch.tensor([[*prompt, *sample.token_ids[:3]]])
                cache = model(before, use_cache=True).past_key_values
                for name, one in model.named_parameters():
                    one.copy_(new[name])
                for token in (3, 4):
                    out = model(torch.tensor([[sample.token_ids[token]]]), use_cache=True, **passed_as(model, cache))
                    expected = out.logits[0, -1].float().log_softmax(-1)[sample.token_ids[token + 1]]
                    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
                    assert abs(float(expected) - sample.sampling_logps[token + 1]) < tolerance


def test_weights_that_do_not_fit_are_refused(tmp_path):
    model = load_model(tiny_config(tmp_path).model, torch.float32)[0]
    sampler = TransformersSampler(model)
    name, one = next(iter(model.named_parameters()))
    for wrong in ({"of another model": one}, {name: one[1:]}):
        with pytest.raises(ValueError, match="expected a parameter of the model"):
            sampler.update_weights(wrong, 1)
    assert sampler.version == 0


class Counted:
    """A source whose batches say which step they are of."""

    sampling = SimpleNamespace(engine=SimpleNamespace(version=0))

    def __init__(self, started):
        self.started = started

    def next(self, learner, watch):
        self.started.append(learner.steps + 1)
        watch.warn(f"warned of {learner.steps + 1}")
        return Batch([], seed=learner.steps)

    def state_dict(self):
        return {"drawn": len(self.started)}


class Weights:
    version = 0

    def update_weights(self, tensors, version):
        self.version = version


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_a_batch_is_begun_only_once_its_tokens_cannot_become_too_old(tmp_path, bound):
    spool, started = Spool(tmp_path), []
    spool.put_weights({"w": torch.zeros(1)}, 0, 0)
    generator = Generator(Counted(started), Weights(), spool)
    thread = threading.Thread(target=generator.run, args=(1, 6, bound))
    thread.start()
    for published in range(7):
        if published:
            spool.put_weights({"w": torch.full((1,), float(published))}, published, 2 * published)
        wanted = min(6, published + bound + 1)  # step s trains at version s - 1
        deadline = time.time() + 20
        while len(started) < wanted and time.time() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
        assert started == list(range(1, wanted + 1))
    thread.join(20)
    assert generator.updates == 2 * (5 - bound)  # the last batch began as soon as it might
    assert spool.take(4)["source"] == {"drawn": 4}
    assert spool.take(4) is None
    assert spool.peek(5)["warnings"] == ["warned of 5"]


def numbers(run):
    kept = [{k: v for k, v in one.items() if not any(t in k for t in TIMES)} for one in lines(run / "metrics.jsonl")]
    assert len(kept) > 3
    return kept


def test_with_no_staleness_allowed_it_is_the_run_that_samples_and_trains_in_turn(tmp_path):
    ratio = PolicyGradientConfig(ratio_to_sampler=True)
    # With linear: auto, each process would take what its own benchmark found faster.
    config = ahead_config(tmp_path, staleness=0, policy_gradient=ratio, steps=4, linear="torch")
    assert train(config).status == "finished"
    plain = replace(config, source="rollouts", ahead=AheadConfig(), run_dir=str(tmp_path / "plain"))
    assert train(plain).status == "finished"
    assert numbers(tmp_path / "run") == numbers(tmp_path / "plain")
    assert all(one["ahead/lag_0"] == 1.0 for one in lines(tmp_path / "run" / "metrics.jsonl") if "reward" in one)


def test_a_generator_that_is_killed_is_started_again_and_no_token_is_older_than_allowed(tmp_path, monkeypatch, capsys):
    def kill(run):
        run.source._process.send_signal(signal.SIGKILL)
        run.source._process.wait()
        run.source._spool.clear()  # as if it had not got far

    in_step(monkeypatch, 3, kill)
    # Rewards that always differ: a step whose groups all agree makes no update, and staleness counts updates.
    config = ahead_config(tmp_path, rewards=(RewardConfig("trainer.tiny:noisy_words"),))
    assert train(config).status == "finished"
    warnings = [one["message"] for one in lines(tmp_path / "run" / "warnings.jsonl")]
    assert [one for one in warnings if "SIGKILL. Started again" in one] != []
    steps = [one for one in lines(tmp_path / "run" / "metrics.jsonl") if "reward" in one]
    assert [one["step"] for one in steps] == [1, 2, 3, 4, 5, 6]
    for one in steps:
        lags = {name: share for name, share in one.items() if name.startswith("ahead/lag_")}
        assert set(lags) <= {"ahead/lag_0", "ahead/lag_1", "ahead/lag_2"}
        assert sum(lags.values()) == pytest.approx(1.0)
        mean = sum(int(name[-1]) * share for name, share in lags.items())
        assert one.get("sampling/staleness", 0.0) == pytest.approx(mean)  # one update a step


def test_a_trainer_that_is_killed_takes_the_generator_with_it_and_is_resumed(tmp_path):
    config = ahead_config(tmp_path, steps=5, save_every=2)
    code = (
        "import os, signal, sys\n"
        "sys.path[:0] = sys.argv[1:]\n"
        "from pathlib import Path\n"
        "from trainer.test_ahead import ahead_config\n"
        "from fastrl.sources import Ahead\n"
        "from fastrl.trainer.setup import train\n"
        "publish = Ahead.publish\n"
        "def once(source, learner, steps=None):\n"
        "    publish(source, learner, steps)\n"
        "    if learner.steps == 3:\n"
        "        print(source._process.pid, source._spool.folder, flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "Ahead.publish = once\n"
        f"train(ahead_config(Path({str(tmp_path)!r}), steps=5, save_every=2))\n"
    )
    paths = [str(Path(__file__).resolve().parents[1])]
    killed = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    pid, folder = killed.stdout.split()[-2:]
    deadline = time.time() + 20
    while (Path(folder).exists() or Path(f"/proc/{pid}").exists()) and time.time() < deadline:
        time.sleep(0.05)
    assert not Path(folder).exists()
    assert not Path(f"/proc/{pid}").exists()
    done = train(replace(config, resume=str(tmp_path / "run")))
    assert (done.status, done.steps) == ("finished", 5)
    steps = [one["step"] for one in lines(tmp_path / "run" / "metrics.jsonl") if "reward" in one]
    assert steps == [1, 2, 3, 4, 5]


def source(command, state=None):
    inner = SimpleNamespace(state_dict=lambda: state or {}, load_state_dict=lambda new: None)
    return Ahead(inner, {}, [sys.executable, "-c", command])


def learner():
    weights = SimpleNamespace(named_parameters=lambda: [("w", torch.nn.Parameter(torch.zeros(2)))])
    return SimpleNamespace(steps=0, updates=0, policy=SimpleNamespace(model=weights))


class Heard(Unwatched):
    def __init__(self):
        self.heard = []

    def warn(self, message):
        self.heard.append(message)


def test_weights_published_within_one_tick_of_the_clock_are_told_apart(tmp_path):
    spool, seen = Spool(tmp_path), 0
    for version in range(200):
        spool.put_weights({"w": torch.full((1,), float(version))}, version, version)
        new = spool.weights_if_newer(seen)
        assert (new.steps, float(new.tensors["w"])) == (version, version)
        seen = new.number
        assert spool.weights_if_newer(seen) is None
    assert len(list(tmp_path.iterdir())) == 1


def test_weights_go_where_there_is_room_or_are_refused(tmp_path, monkeypatch):
    free = {"/dev/shm": 10, str(tmp_path): 100}
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=free[str(place)]))
    assert Spool.make(50).folder.parent == tmp_path
    with pytest.raises(ValueError, match="Ahead: weights: expected room for"):
        Spool.make(200)


def test_a_batch_that_comes_while_the_trainer_looks_is_not_lost(tmp_path, monkeypatch):
    spool, peek = Spool(tmp_path), Spool.peek

    def put_just_after(self, step):
        found = peek(self, step)
        if found is None:
            self.put(step, {"batch": "the only one"})
        return found

    monkeypatch.setattr(Spool, "peek", put_just_after)
    assert spool.take(1) is None
    assert spool.take(1) == {"batch": "the only one"}
    assert not list(tmp_path.iterdir())


def test_a_generator_that_dies_at_once_ends_the_run_with_its_last_words():
    watch = Heard()
    with pytest.raises(GeneratorDied, match=r"exit status 3, the last of 3 times .* no model here"):
        source("print('no model here'); raise SystemExit(3)").next(learner(), watch)
    assert [one.split(".")[0] for one in watch.heard] == ["The generator process ended with exit status 3"] * 2


@pytest.mark.parametrize("raised", [RewardFailure("no judge at home"), FloatingPointError("logits are NaN")])
def test_what_ends_a_run_without_a_generator_ends_it_with_one(tmp_path, raised):
    spool = Spool(tmp_path)
    spool.put_weights({"w": torch.zeros(1)}, 0, 0)

    class Failing(Counted):
        def next(self, learner, watch):
            raise raised

    Generator(Failing([]), Weights(), spool).run(1, 5, 2)
    ahead = source("import sys; sys.stdin.read()")
    ahead._process, ahead._spool = SimpleNamespace(poll=lambda: None), spool
    with pytest.raises(type(raised), match=str(raised)):
        ahead.next(learner(), Unwatched())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "rloo"}, "a loss that corrects for older weights"),
        ({"policy_gradient": PolicyGradientConfig(ratio_to_sampler=False)}, "a loss that corrects for older weights"),
        ({"ahead": AheadConfig(max_staleness=-1)}, "ahead.max_staleness: expected 0 or more"),
        ({"source": "rollouts", "ahead": AheadConfig(max_staleness=1)}, "its defaults without source: ahead"),
    ],
)
def test_what_would_train_on_older_weights_in_silence_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build_algorithm(TrainConfig(**{"source": "ahead", "algorithm": "grpo"} | changes))


def test_losses_with_a_ratio_take_it_to_the_sampler():
    assert build_algorithm(TrainConfig(source="ahead", algorithm="grpo")).ratio_to_sampler
    assert not build_algorithm(TrainConfig(source="rollouts", algorithm="grpo")).ratio_to_sampler
    fresh = TrainConfig(source="ahead", algorithm="rloo", ahead=AheadConfig(max_staleness=0))
    assert build_algorithm(fresh).kind == "rewarded"


def test_objects_that_the_other_process_cannot_have_are_refused(tmp_path):
    config = tiny_config(tmp_path)
    with pytest.raises(ValueError, match=r"Trainer: rewards: expected names with source: ahead"):
        Trainer(
            config.model,
            rewards=lambda completions, **_: [0.0] * len(completions),
            source="ahead",
            algorithm="cispo",
            task={"source": config.task.source, "held_out": 2, "chat": False},
            rollout={"max_new_tokens": 4},
            run_dir=tmp_path / "run",
        )
