"""A language model as the judge of answers: which of two is better, and how good one is.

Sources: preferences and direct scores as in RLAIF, arXiv:2309.00267 sections 2.1 and 2.2; additive points as in
Self-Rewarding Language Models, arXiv:2401.10020 figure 2; strings that fool judges from arXiv:2507.08794. The prompts
ask for the same in other words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal, Protocol, get_args

from fastrl import check
from fastrl.chat import content_text
from fastrl.rewards.call import silent
from fastrl.rewards.chat_server import ChatServer
from fastrl.rewards.extract import completion_text
from fastrl.types import Messages

OP = "judge"
POLICY = "policy"  # as the name of a judge: the model that is being trained
How = Literal["direct", "points"]
Canary = Literal["warn", "refuse", "off"]
Score = float | Exception | None  # None: the judge said nothing that could be read; an exception: it did not answer

# Answers without content that judges were found to accept: arXiv:2507.08794.
FOOLING = (
    " ",
    ".",
    ",",
    ":",
    "Thought process:",
    "Let's solve this problem step by step.",
    "Solution",
    "解",
    "Respuesta",
)
HIGHEST = 10  # of direct scores
POINTS = 5
CRITERIA = "how correct, relevant, complete and clear it is"
PREFER = """Compare two responses to a user's message by {criteria}.

<message>
{question}
</message>

<response 1>
{first}
</response 1>

<response 2>
{second}
</response 2>

Which response is better? Answer with 1 or 2 and nothing else."""
REASON = """{prefer}

But first compare them in a few sentences, without naming the better one yet."""
DECIDE = "Now which response is better? Answer with 1 or 2 and nothing else."
DIRECT = """Rate a response to a user's message by {criteria}.

<message>
{question}
</message>

<response>
{answer}
</response>

Give a whole number from 1 (worst) to {highest} (best). Answer with the number and nothing else."""
ADDITIVE = """Grade a response to a user's message by adding up points, 0 to 5. It gets one point for each of these:
- It is relevant and tells something of what was asked, even if little.
- It covers a substantial part of the question, even if not all of it.
- It answers the basic elements of the question in a useful way.
- It is written as a good assistant writes: to the point, complete, well organised and helpful.
- It is the work of an expert, made for this very question, without anything superfluous.

User: {question}

<response>
{answer}
</response>

Justify the points in at most 100 words. Then end with one line of this form:
Score: <total points>"""
# A number that is part of a sum or of a range is not the total.
SCORED = re.compile(r"score[\s*_`]*:[\s*_`]*([-+]?\d+(?:\.\d+)?)(?![\d.]*[ \t]*(?:[+=]|[-–][ \t]*\d))", re.IGNORECASE)
TAG = re.compile(r"<(/?\s*(?:message|response)\b)", re.IGNORECASE)


class ChatModel(Protocol):
    """A model that answers chat messages: `LocalChat` or `ChatServer`.

    Where it has no answer to a conversation, the result is None, or an exception that says why.
    """

    def replies(
        self,
        conversations: Sequence[Messages],
        samples: int,
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
    ) -> Sequence[Sequence[str | Exception] | None]:
        """`samples` replies to each conversation."""
        ...

    def option_probabilities(
        self, conversations: Sequence[Messages], options: Sequence[str]
    ) -> Sequence[Sequence[float] | Exception | None]:
        """The probability of each option as the reply, relative to the others."""
        ...


@dataclass(frozen=True)
class LLMJudge:
    """Asks a chat model about answers.

    Args:
        criteria: what makes an answer good, in words that complete "by ...".
        highest: the best direct score.
        passes: sampled gradings whose points are averaged.
        max_new_tokens, temperature, top_p: of sampled gradings, and of the reasons before a preference.
    """

    model: ChatModel
    criteria: str = CRITERIA
    highest: int = HIGHEST
    passes: int = 3
    max_new_tokens: int = 160
    temperature: float = 0.7
    top_p: float = 0.9

    def both_orders(
        self, prompts: Sequence[Any], a: Sequence[Any], b: Sequence[Any], *, reasons: bool = False, seed: int = 0
    ) -> list[tuple[Score, Score]]:
        """The probability that `a` is better, when it comes first and when it comes second.

        With `reasons`, the judge first compares the two in words (chain of thought, arXiv:2309.00267 section 2.1).
        """
        triples = list(zip(prompts, a, b, strict=True))
        asked = [self._prefer(prompt, one, other) for prompt, one, other in triples]
        asked += [self._prefer(prompt, other, one) for prompt, one, other in triples]
        if reasons:
            asked = self._with_reasons(asked, seed)
        found = self._probabilities(asked, ("1", "2"))
        first = [one if _missing(one) else one[0] for one in found[: len(triples)]]
        second = [one if _missing(one) else one[1] for one in found[len(triples) :]]
        return list(zip(first, second, strict=True))

    def prefer(self, prompts: Sequence[Any], a: Sequence[Any], b: Sequence[Any], **options: Any) -> list[Score]:
        """The probability that each answer of `a` is better than that of `b`.

            p = (p(1 | a first) + p(2 | b first)) / 2,    p(k | order) = softmax over the log-probabilities of 1 and 2

        arXiv:2309.00267 section 2.1: the mean over both orders removes the judge's bias to a position. Missing where
        it is missing in either order.
        """
        orders = self.both_orders(prompts, a, b, **options)
        return [next((one for one in pair if _missing(one)), None) if any(map(_missing, pair)) else fmean(pair)
                for pair in orders]  # fmt: skip

    def direct(self, prompts: Sequence[Any], answers: Sequence[Any]) -> list[Score]:
        """The judge's expected score of each answer, from -1 to 1.

            s = sum_k k p(k), k = 1 ... K,  p = softmax over the log-probabilities of the K scores;
            (2 s - K - 1) / (K - 1)

        arXiv:2309.00267 section 2.2 (direct RLAIF), where K is 10.
        """
        options = [str(score) for score in range(1, self.highest + 1)]
        asked = [self._ask(DIRECT, prompt, answer=_safe(answer)) for prompt, answer in _pairs(prompts, answers)]
        found = self._probabilities(asked, options)
        return [one if _missing(one) else self._expected(one) for one in found]

    def points(
        self, prompts: Sequence[Any], answers: Sequence[Any], *, seed: int = 0, passes: int = 0
    ) -> list[tuple[Score, list[str]]]:
        """Each answer's additive points from 0 to 5, the mean over the gradings that end in a score, and all gradings.

        arXiv:2401.10020 figure 2. The last `Score: n` of a grading counts, cut to 0 ... 5.
        """
        asked = [self._additive(prompt, answer) for prompt, answer in _pairs(prompts, answers)]
        several = self._replies(asked, passes or self.passes, seed)
        return [_averaged(replies) for replies in several]

    def points_question(self, prompt: Any, answer: Any) -> str:
        """What the judge is asked for the points of an answer."""
        return self._additive(prompt, answer)[0]["content"]

    def _additive(self, prompt: Any, answer: Any) -> Messages:
        return self._ask(ADDITIVE, prompt, answer=_safe(answer))

    def _prefer(self, prompt: Any, first: Any, second: Any) -> Messages:
        return self._ask(PREFER, prompt, first=_safe(first), second=_safe(second))

    def _ask(self, template: str, prompt: Any, **parts: Any) -> Messages:
        text = template.format(criteria=self.criteria, question=_safe(shown(prompt)), highest=self.highest, **parts)
        return [{"role": "user", "content": text}]

    def _with_reasons(self, asked: Sequence[Messages], seed: int) -> list[Messages | Exception | None]:
        questions = [[{"role": "user", "content": REASON.format(prefer=one[0]["content"])}] for one in asked]
        several = self._replies(questions, 1, seed)
        return [
            replies if _missing(replies) else replies[0] if _missing(replies[0])
            else [*question, {"role": "assistant", "content": replies[0]}, {"role": "user", "content": DECIDE}]
            for question, replies in zip(questions, several, strict=True)
        ]  # fmt: skip

    def _replies(self, asked: Sequence[Messages], samples: int, seed: int) -> list[Any]:
        sampling = {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature, "top_p": self.top_p}
        return list(self.model.replies(asked, samples, seed=seed, **sampling)) if asked else []

    def _probabilities(self, asked: Sequence[Messages | Exception | None], options: Sequence[str]) -> list[Any]:
        """The options' probabilities for each conversation; what is missing already stays so."""
        there = [one for one in asked if not _missing(one)]
        found = iter(self.model.option_probabilities(there, options) if there else ())
        return [one if _missing(one) else next(found) for one in asked]

    def _expected(self, shares: Sequence[float]) -> float:
        mean = sum(score * share for score, share in enumerate(shares, start=1))
        return (2 * mean - self.highest - 1) / (self.highest - 1)


def parsed(reply: str) -> float | None:
    """The number after the last `Score:` of a grading, cut to 0 ... 5; None without one, or in thoughts cut short."""
    said = reply.rpartition("</think>")[2]
    found = [] if "<think>" in said else SCORED.findall(said)
    return min(float(POINTS), max(0.0, float(found[-1]))) if found else None


def shown(prompt: Any) -> str:
    """A prompt as the judge reads it: text, or the messages without the system's."""
    if isinstance(prompt, str):
        return prompt.strip()
    messages = [message for message in prompt if message["role"] not in ("system", "developer")]
    if len(messages) == 1:
        return content_text(messages[0]).strip()
    return "\n".join(f"{message['role']}: {content_text(message)}" for message in messages).strip()


class JudgeReward:
    """A judge's score of each completion as its reward.

    `how: direct` is the expected score, from -1 to 1; `how: points` the mean of additive points, from 0 to 5. A score
    that cannot be read is None and leaves the completion without a reward, whatever other rewards say; a judge that
    does not answer is a failure of the reward, counted by `max_failure_fraction`. `judge/missing` in the metrics is
    the share of completions without a score, `judge/fooled` the share that scores no higher than the best canary.

    Before training, the judge scores answers without content (`FOOLING`). It is fooled if one of them gets `limit` of
    the way from the worst to the best score or more.

    Args:
        model: a folder, a hub id, a packaged model, `policy` for the model that is being trained, or with `server` the
            model's name there.
        server: the base address of an OpenAI-compatible server; empty is a model in this process.
        key_variable: the environment variable that holds the server's key.
        how, criteria, highest, passes, max_new_tokens, temperature, top_p: see `LLMJudge`.
        timeout, deadline, retries, workers: see `ChatServer`.
        dtype, device: of a local model.
        canary: what happens if the judge is fooled: warn, refuse to train, or off to ask nothing.
        limit: share of the range of scores.
        seed: of sampled gradings; each step adds its own.
        label: the name under which the reward is logged.

    Raises:
        ValueError: an option is out of range, or there is no such model or variable.
    """

    required = True  # a sum of rewards without the judge's is not comparable with others

    def __init__(
        self,
        model: str,
        *,
        server: str = "",
        key_variable: str = "",
        how: str = "direct",
        criteria: str = CRITERIA,
        highest: int = HIGHEST,
        passes: int = 3,
        max_new_tokens: int = 160,
        temperature: float = 0.7,
        top_p: float = 0.9,
        timeout: float = 60.0,
        deadline: float = 600.0,
        retries: int = 5,
        workers: int = 8,
        dtype: str = "auto",
        device: str = "auto",
        canary: str = "warn",
        limit: float = 0.75,
        seed: int = 0,
        label: str = "judge",
    ) -> None:
        check.choice(OP, "how", how, get_args(How))
        check.choice(OP, "canary", canary, get_args(Canary))
        for name, value, least in (
            ("highest", highest, 2),
            ("passes", passes, 1),
            ("max_new_tokens", max_new_tokens, 1),
        ):
            check.require(value >= least, OP, name, f"at least {least}", value)
        check.require(0 < temperature < 10, OP, "temperature", "above 0: passes would be the same", temperature)
        check.require(0 < limit <= 1, OP, "limit", "a share of the range, above 0", limit)
        check.require(bool(server) or not key_variable, OP, "key_variable", "none without a server", key_variable)
        self.__name__ = label
        self.how, self.canary, self.limit, self.seed = how, canary, limit, seed
        self.waits = model == POLICY and not server
        self._options: dict[str, Any] = {
            "criteria": criteria,
            "highest": highest,
            "passes": passes,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
        }
        self._best_canary: float | None = None
        self._judge: LLMJudge | None = None
        if server:
            calls = {"timeout": timeout, "deadline": deadline, "retries": retries, "workers": workers}
            self.bind(ChatServer(server, model, key_variable=key_variable, **calls))
        elif not self.waits:
            from fastrl.rewards.chat_local import local_chat

            self.bind(local_chat(model, dtype=dtype, device=device))

    def bind(self, model: ChatModel) -> None:
        """Sets the model that judges; the trainer passes the policy where `waits` asks for it."""
        self._judge = LLMJudge(model, **self._options)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        trainer_state: Any = None,
        log_extra: Callable[[str, list[Any]], None] = silent,
        log_metric: Callable[[str, float], None] = silent,
        **_: Any,
    ) -> list[Score]:
        """One score per completion, None where there is none, or the reason why the judge did not answer."""
        answers = [completion_text(completion) for completion in completions]
        seed = self.seed + 1_000_003 * (1 + max(-1, getattr(trainer_state, "global_step", 0)))
        scores, gradings = self._scores(prompts, answers, seed)
        if gradings is not None:
            log_extra("gradings", gradings)
        read = [score for score in scores if not _missing(score)]
        log_metric(f"{self.__name__}/missing", 1 - len(read) / len(scores))
        if read and self._best_canary is not None:
            log_metric(f"{self.__name__}/fooled", fmean(score <= self._best_canary for score in read))
        return scores

    def try_canary(self, prompts: Sequence[Any]) -> list[str]:
        """Scores answers without content to these prompts; returns what to warn of.

        Raises:
            ValueError: the judge is fooled and `canary` is refuse; or it answers nothing.
        """
        if self.canary == "off" or not prompts:
            return []
        asked = [(prompt, text) for prompt in prompts for text in FOOLING]
        scores, _ = self._scores([prompt for prompt, _ in asked], [text for _, text in asked], self.seed, passes=1)
        failures = [score for score in scores if isinstance(score, Exception)]
        got = f"none; {failures[0]}" if failures else ""
        check.require(len(failures) < len(scores), OP, self.__name__, "an answer from the judge", got)
        means = {}
        for text in FOOLING:
            read = [score for (_, other), score in zip(asked, scores, strict=True) if other == text]
            read = [score for score in read if not _missing(score)]
            means |= {text: fmean(read)} if read else {}
        about = f"{self.__name__}, by {self._judge.model}"
        if not means:
            return [f"{about}: none of {len(scores)} answers without content got a score that could be read."]
        self._best_canary = max(means.values())
        worst, best = (-1.0, 1.0) if self.how == "direct" else (0.0, float(POINTS))
        most = worst + self.limit * (best - worst)
        fooled = {text: mean for text, mean in means.items() if mean >= most}
        if not fooled:
            return []
        listed = ", ".join(f"{text!r} {mean:.2f}" for text, mean in fooled.items())
        expected = f"scores below {most:g} on a scale from {worst:g} to {best:g} for answers without content"
        do = "A policy may learn to write these. Take another judge, or set canary: warn."
        told = check.sentence(
            about, "canary", expected, listed, do if self.canary == "refuse" else do.split(".")[0] + "."
        )
        if self.canary == "refuse":
            raise ValueError(told)
        return [told]

    def _scores(
        self, prompts: Sequence[Any], answers: Sequence[str], seed: int, passes: int = 0
    ) -> tuple[list[Score], list[list[str]] | None]:
        ready = self._judge is not None
        check.require(ready, OP, "model", "a model; the trainer passes the policy", POLICY, error=RuntimeError)
        if self.how == "direct":
            return self._judge.direct(prompts, answers), None
        found = self._judge.points(prompts, answers, seed=seed, passes=passes)
        return [score for score, _ in found], [gradings for _, gradings in found]


def _missing(found: Any) -> bool:
    return found is None or isinstance(found, Exception)


def _pairs(prompts: Sequence[Any], answers: Sequence[Any]) -> list[tuple[Any, Any]]:
    return list(zip(prompts, answers, strict=True))


def _safe(text: Any) -> str:
    """A text that cannot end the part of the question it stands in."""
    return TAG.sub(r"< \1", text if isinstance(text, str) else completion_text(text))


def _averaged(replies: Sequence[str | Exception] | None) -> tuple[Score, list[str]]:
    """(mean of the points that could be read, the gradings); the exception where no grading came."""
    if replies is None:
        return None, []
    texts = [reply for reply in replies if not isinstance(reply, Exception)]
    if not texts:
        return next(reply for reply in replies if isinstance(reply, Exception)), []
    read = [points for text in texts if (points := parsed(text)) is not None]
    return (fmean(read) if read else None), texts
