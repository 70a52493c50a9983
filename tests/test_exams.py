"""Questions, scores and marks, against formulas in float64 and models whose answers are known."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import math
import re
import warnings
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from helpers import plainly, run_decoder
from run_folder import BYTE_MODEL, make_run

from maxlm import evaluate
from maxlm.config import UserError
from maxlm.data.tokenizers import HuggingFace
from maxlm.evaluation import marking
from maxlm.evaluation.examining import Asking, examine
from maxlm.evaluation.exams import ChoiceExam, Exam, OpenExam, human_eval, human_eval_file, read_exam
from maxlm.evaluation.scoring import GREEDY, Likelihood, Pair, RunExaminee, windows
from maxlm.evaluation.suite import parses, suite
from maxlm.inference.generator import Generation
from maxlm.inference.load import LoadedRun, load_run
from maxlm.inference.request import Request
from maxlm.models import Tokens

pytestmark = pytest.mark.usefixtures("programs_kept")

LIMIT = 40
"""Tokens that the model takes: no power of two, so that the last shape is not one either."""


@pytest.fixture(scope="module", autouse=True)
def private_cache() -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr("maxlm.compile_cache.enable_compilation_cache", lambda: None)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run")
    return make_run(folder, model=dataclasses.replace(BYTE_MODEL, max_seq_len=LIMIT), batch_size=4).run_dir


@pytest.fixture(scope="module")
def run(run_dir: str) -> LoadedRun:
    return load_run(run_dir)


class Fake:
    """Scores by a function of texts, and writes by another; ids are characters."""

    def __init__(self, score: Any, write: Any = lambda prompt: "") -> None:
        self._score, self._write = score, write

    def split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return [0, *map(ord, context)], list(map(ord, continuation))

    def scores(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        text = lambda ids: "".join(chr(i) for i in ids if i)
        return [Likelihood(np.array([self._score(text(a), text(b))]), False) for a, b in pairs]

    def texts(self, prompts: Sequence[str], **how: Any) -> list[str]:
        return [re.split("|".join(map(re.escape, how["stop"])), self._write(prompt))[0] for prompt in prompts]

    def embeddings(self, texts: Sequence[str]) -> Any:
        raise NotImplementedError


# Scores


def test_scores_are_those_of_each_token_after_all_before_it(run: LoadedRun) -> None:
    """Every case of lengths, in one batch: each token's distribution is computed alone, and in float64."""
    rng = np.random.default_rng(0)
    sizes = [(1, 0), (1, 1), (3, 5), (16, 1), (1, 16), (30, 10), (30, 11), (30, 12), (60, 7), (1, 40), (1, 41), (9, 90)]
    pairs = [tuple(rng.integers(0, 256, n).tolist() for n in size) for size in sizes]

    # One program for all: a row may have any padding at its end, which no token sees.
    def log_probs(ids: list[int]) -> np.ndarray:
        logits = np.asarray(run.model.logits([ids + [7] * (LIMIT - len(ids))]), np.float64)[0, len(ids) - 1]
        return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()

    for (context, continuation), found in zip(pairs, RunExaminee(run).scores(pairs), strict=True):
        ids, first = context + continuation, len(context)
        want, greedy = [], True
        for j in range(first, len(ids)):
            # The window that holds the token: all that ends at a multiple of LIMIT, or at the end.
            end = min(len(ids), first + ((j - first) // LIMIT + 1) * LIMIT)
            distribution = log_probs(ids[max(0, end - 1 - LIMIT) : j])
            want.append(distribution[ids[j]])
            greedy &= int(distribution.argmax()) == ids[j]
        assert found.log_probs == pytest.approx(want, abs=2e-5) and found.log_probs.dtype == np.float64
        assert found.greedy is greedy and found.total == pytest.approx(sum(want), abs=1e-4)


def test_the_likeliest_continuation_is_known_as_such(run: LoadedRun) -> None:
    ids = [1, 2, 3]
    for _ in range(6):
        ids.append(int(run.model.logits([ids + [7] * (LIMIT - len(ids))])[0, len(ids) - 1].argmax()))
    right, wrong = (ids[:3], ids[3:]), (ids[:3], [*ids[3:-1], (ids[-1] + 1) % 256])
    assert [one.greedy for one in RunExaminee(run).scores([right, wrong])] == [True, False]


def test_every_token_is_a_target_once() -> None:
    for n, m, limit in itertools.product((1, 2, 5, 9), range(12), (1, 2, 4)):
        context, continuation = list(range(n)), list(range(n, n + m))
        found = list(windows(context, continuation, limit))
        assert [one for _, targets in found for one in targets] == continuation
        for inputs, targets in found:
            # Each input is the token before its target, without a gap.
            assert len(targets) <= len(inputs) <= limit and inputs[-1] == targets[-1] - 1
            assert inputs == list(range(inputs[0], inputs[-1] + 1))
        if found:
            assert len(found[-1][0]) == min(limit, n + m - 1)
    with pytest.raises(UserError, match="the context has no token"):
        list(windows([], [1], 4))


def words_tokenizer(file: Path) -> HuggingFace:
    """Letters, a blank, `ab` and ` b` as one token, and a beginning of texts that it writes itself."""
    letters = ["<bos>", "<eos>", "a", "b", "c", "Ġ", "ab", "Ġb"]
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE({one: i for i, one in enumerate(letters)}, [("a", "b"), ("Ġ", "b")])
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<bos>", "<eos>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    made.save(str(file))
    return HuggingFace(file)


@pytest.mark.parametrize(
    ("context", "continuation", "want"),
    [
        ("c", "a", ([0, 4], [2])),
        ("c ", "b", ([0, 4], [7])),  # the blank belongs to the word after it
        ("ca", "b", ([0, 4], [6])),  # one token spans the border
        ("", "cb", ([0], [4, 3])),
        (" ", "b", ([0], [7])),
        ("c", "", ([0, 4], [])),
    ],
)
def test_two_texts_are_tokenized_as_one(
    context: str, continuation: str, want: Any, run: LoadedRun, tmp_path: Path
) -> None:
    changed = dataclasses.replace(run, tokenizer=words_tokenizer(tmp_path / "tokenizer.json"))
    assert RunExaminee(changed).split(context, continuation) == want


class Listener:
    """In the place of a generator: keeps what it is asked."""

    def answer(self, requests: Sequence[Request]) -> list[Generation]:
        self.requests = requests
        return [Generation(text=f"text {i}", tokens=[], tokens_per_s=None) for i in range(len(requests))]


def test_prompts_lose_their_beginning_but_not_what_texts_begin_with(run: LoadedRun) -> None:
    changed, listener = dataclasses.replace(run), Listener()
    changed.__dict__["generator"] = listener
    examinee, how = RunExaminee(changed), {"max_new_tokens": 8, "stop": ("x", ""), "sampling": GREEDY, "seed": 3}
    long = "a long text about nothing, " * 4
    assert examinee.texts(["ab", long, ""], **how) == ["text 0", "text 1", "text 2"]
    asked = listener.requests
    assert [one.prompt for one in asked] == [(256, 97, 98), (256, *long.encode()[-(LIMIT - 8 - 1) :]), (256,)]
    assert all((one.stop, one.ends, one.max_new_tokens, one.sampling) == (("x",), (257,), 8, GREEDY) for one in asked)
    assert asked[0].seed == 3 and len({one.seed for one in asked}) == 3
    with pytest.raises(UserError, match=r"max_new_tokens = 39 leaves no room in model.max_seq_len = 40"):
        examinee.texts(["a"], **how | {"max_new_tokens": 39})


def test_embeddings_are_means_of_what_the_output_table_sees(run: LoadedRun) -> None:
    texts = ["ab", "a longer one " * 5, ""]
    found = RunExaminee(run).embeddings(texts)
    rows = [[256, *text.encode()][-LIMIT:] for text in texts]
    ids = jnp.array([row + [0] * (LIMIT - len(row)) for row in rows])
    tokens = Tokens(jnp.broadcast_to(jnp.arange(LIMIT), ids.shape))
    hidden = jax.jit(lambda: run_decoder(run.config.model, run.parameters, plainly(), ids, tokens).hidden)()
    for row, states, vector in zip(rows, hidden, found, strict=True):
        assert vector == pytest.approx(np.asarray(states, np.float64)[: len(row)].mean(0), abs=1e-5)


# Marks


def test_pass_at_k_is_the_share_of_subsets_that_pass() -> None:
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            passed = [i < c for i in range(n)]
            subsets = [any(one) for one in itertools.combinations(passed, k)]
            assert marking.pass_at_k(n, c, k) == pytest.approx(Fraction(sum(subsets), len(subsets)))
    assert marking.pass_at_k(10_000, 1, 100) == pytest.approx(0.01)  # C(10000, 100) is no float64
    with pytest.raises(ValueError, match="k = 3 must be from 1 to 2"):
        marking.pass_at_k(2, 1, 3)
    assert marking.passes_at([False, True, True], [-1.0, -3.0, -2.0], 1) == 0
    assert marking.passes_at([False, True, True], [-1.0, -3.0, -2.0], 2) == 1


def test_words_in_common() -> None:
    assert marking.normalized(" The  cat's, a Hat! ") == "cats hat"
    assert marking.token_f1("the cat sat", ["a cat sat down"]) == pytest.approx(2 * (2 / 2) * (2 / 3) / (2 / 2 + 2 / 3))
    assert marking.token_f1("b b c", ["b c c", "z"]) == pytest.approx(2 / 3)  # bags: each word as often as in both
    assert (marking.token_f1("A.", ["a"]), marking.token_f1("A", ["the"]), marking.token_f1("", ["x"])) == (1, 0, 0)
    assert marking.exact_match(" x\n", ["x"]) == 1 and marking.exact_match("X.", ["x"]) == 0
    assert marking.normalized_match("X.", ["x"]) == 1


def test_intervals_are_as_wide_as_theory_says_and_always_the_same() -> None:
    values = [0.9] * 120 + [0.1] * 280
    found = marking.mean(values, seed=3, resamples=4000)
    error = 1.96 * 0.8 * math.sqrt(0.3 * 0.7 / 400)
    assert found.value == pytest.approx(0.34)
    assert found.high - 0.34 == pytest.approx(error, rel=0.12) and 0.34 - found.low == pytest.approx(error, rel=0.12)
    assert found == marking.mean(values, seed=3, resamples=4000) != marking.mean(values, seed=4)


@pytest.mark.parametrize(
    ("right", "questions", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_intervals_of_proportions(right: int, questions: int, low: float, high: float) -> None:
    """Those of Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3."""
    found = marking.mean([1.0] * right + [0.0] * (questions - right))
    assert found == (right / questions, pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    other = marking.mean([0.0] * right + [1.0] * (questions - right))
    assert other == pytest.approx((1 - found.value, 1 - found.high, 1 - found.low), abs=1e-12)
    assert found.low <= found.value <= found.high and other.low <= other.value <= other.high


# Exams


def solver(exam: Exam) -> Fake:
    """Knows the answers of the suite by computing them."""

    def right(context: str, choice: str) -> bool:
        last = context.splitlines()[-1] if context else ""
        match exam.name:
            case "arithmetic":
                return sum(map(int, re.findall(r"\d+", last))) == int(choice)
            case "sorting":
                return choice.split() == sorted(re.findall(r"\d", last))
            case "linear":
                (a, x), (b, y) = [tuple(map(int, re.findall(r"\d+", line))) for line in context.splitlines()[:2]]
                return x + (int(re.findall(r"\d+", last)[0]) - a) * (y - x) // (b - a) == int(choice)
            case _:
                with warnings.catch_warnings(action="ignore"):
                    return parses(choice)

    return Fake(lambda context, choice: float(right(context, choice)))


def test_who_computes_has_all_marks_in_the_suite_and_who_guesses_has_those_of_chance() -> None:
    for name, exam in suite(seed=1, size=300).items():
        assert exam == suite(seed=1, size=300)[name] != suite(seed=2, size=300)[name]
        if isinstance(exam, OpenExam):
            copy = Fake(None, lambda prompt: f" {prompt.splitlines()[-1][len('copy ') :].rstrip(':')}\nx")
            marks = examine(copy, exam, Asking()).measures
            assert [one.value for one in marks] == [1, 1, 1] and marks[0].chance == pytest.approx(26**-4)
            continue
        assert isinstance(exam, ChoiceExam)
        best = examine(solver(exam), exam, Asking()).measures[0]
        assert (best.value, best.high) == (1, 1) and best.questions == 300
        assert best.low == pytest.approx(300 / (300 + 1.96**2), abs=1e-5)
        rng = np.random.default_rng(5)
        strategies = {
            "at random": lambda context, choice, rng=rng: rng.random(),
            "the first": lambda context, choice: 0.0,
            "the largest": lambda context, choice: float("".join(re.findall(r"\d", choice)) or 0),
            "the longest": lambda context, choice: float(len(choice)),
        }
        for strategy, score in strategies.items():
            if (name, strategy) in {("sorting", "the largest")}:  # a sorted row is the smallest number
                continue
            mark = examine(Fake(score), exam, Asking()).measures[0]
            assert mark.chance is not None and mark.chance == {"python": 0.5}.get(name, 0.25)
            error = math.sqrt(mark.chance * (1 - mark.chance) / 300)
            assert abs(mark.value - mark.chance) < 4 * error, (name, strategy, mark)


def test_lengths_of_choices_are_made_up_for(tmp_path: Path) -> None:
    file = tmp_path / "one.jsonl"
    file.write_text('{"exam": "choices"}\n{"prompt": "", "choices": ["éé", "aaaaaa"], "answer": 1}\n')

    class Bytes(Fake):
        def split(self, context: str, continuation: str) -> Any:
            return [0], ["éé", "aa", "aa", "aa"][: 1 if continuation == "éé" else 3]

        def scores(self, pairs: Any) -> Any:
            return [Likelihood(np.full(len(b), -4.0 if len(b) == 1 else -1.7), False) for _, b in pairs]

    # In all -4 against -5.1; a token -4 against -1.7; a byte -4/4 against -5.1/6.
    marks = {one.measure: one.value for one in examine(Bytes(None), read_exam(file), Asking()).measures}
    assert marks == {"acc": 0, "acc_per_token": 1, "acc_per_byte": 1}


HEAD = '{"exam": "choices"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", '"exam" is missing, must be one of choices, answers, programs'),
        ('{"exam": "essay"}\n', "line 1: \"exam\" is 'essay', must be one of"),
        (HEAD, "has no question; write one a line"),
        (HEAD + "\n\n{\n", "line 4: not JSON"),
        (HEAD + '{"prompt": "a", "choices": ["b"]}\n', "line 2: answer is missing; the keys of a ChoiceQuestion are"),
        (HEAD + '{"prompt": "a", "choices": ["b"], "answer": 1}\n', "line 2: answer = 1 must be less than 1"),
        (HEAD + '{"prompt": "a", "choices": [], "answer": 0}\n', "line 2: choices = .* must not be empty"),
        (HEAD + '{"prompt": "a", "choices": ["b", ""], "answer": 0}\n', "line 2: choices holds an empty string"),
        (HEAD + '{"prompt": 1, "choices": ["b"], "answer": 0}\n', "line 2: prompt = 1 must be a string"),
        (HEAD + '{"prompt": "a", "choices": ["b"], "answer": 0, "x": 1}\n', "line 2: x is unknown"),
        (HEAD + '{"prompt": "a", "choices": "b", "answer": 0}\n', r'choices = "b" must be a list, such as \["b"\]'),
        (HEAD + '{"prompt": "\\ud800", "choices": ["b"], "answer": 0}\n', r"line 2: has half a character, '.ud800'"),
        ('{"exam": ["choices"]}\n', r"line 1: \"exam\" is \['choices'\], must be one of"),
        ('{"exam": "answers", "stop": "x"}\n{"prompt": "a", "answers": ["b"]}\n', 'line 1: stop = "x" must be a list'),
        ('{"exam": "answers", "max_new_tokens": 0}\n{"prompt": "a", "answers": ["b"]}\n', "line 1: max_new_tokens = 0"),
    ],
)
def test_mistakes_in_a_file_name_its_line(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "exam.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_exam(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"none.jsonl: cannot be read"):
        read_exam(tmp_path / "none.jsonl")


def test_human_eval_as_its_package_has_it(tmp_path: Path) -> None:
    exam = human_eval(human_eval_file())
    assert len(exam.questions) == 164 and exam.settings.stop[0] == "\nclass"
    assert all("def check(candidate)" in one.test and "\ncheck(" in one.test for one in exam.questions)
    bad = tmp_path / "bad.jsonl.gz"
    bad.write_bytes(gzip.compress(b'{"prompt": "a", "test": "b"}\n'))
    with pytest.raises(UserError, match=r"bad.jsonl.gz, line 1: has no text under entry_point"):
        human_eval(bad)


# The command


def test_the_command_gives_figures_a_picture_and_every_answer(
    run_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoadedRun, "generator", Listener())
    file = tmp_path / "capitals.jsonl.gz"
    questions = [{"prompt": f"{i} is", "choices": [" one", " two"], "answer": i % 2} for i in range(5)]
    file.write_bytes(gzip.compress("\n".join([HEAD, *map(json.dumps, questions)]).encode()))
    tasks = ["--tasks", str(file), "suite:copying", "--few_shot", "1", "--limit", "4"]
    evaluate.main(["--run", run_dir, *tasks, "--out", str(tmp_path / "out"), "--json"])
    said = json.loads(capsys.readouterr().out)
    assert (said["model"], said["step"], said["few_shot"], said["limit"]) == (run_dir, 2, 1, 4)
    assert said["prompting"]["demonstrations"] == {"kind": "RandomDemonstrations", "count": 1}
    assert [(one["exam"], one["measure"]) for one in said["results"][::3]] == [
        ("capitals", "acc"), ("copying", "exact_match"),
    ]  # fmt: skip
    assert all(one["questions"] == 4 and 0 <= one["low"] <= one["value"] <= one["high"] for one in said["results"])
    assert json.loads((tmp_path / "out/results.json").read_text()) == said
    picture = (tmp_path / "out/results.svg").read_text()
    assert picture.startswith("<svg ") and picture.count('class="bar"') == 6 and picture.count('class="mark"') == 5
    lines = [json.loads(line) for line in (tmp_path / "out/capitals.jsonl").read_text().splitlines()]
    assert [one["answer"] for one in lines] == [0, 1, 0, 1]
    # The likeliest choice is the mark.
    assert [one["acc"] for one in lines] == [float(np.argmax(one["log_probs"]) == one["answer"]) for one in lines]
    how = tmp_path / "how.json"
    how.write_text('{"demonstrations": {"kind": "NearestDemonstrations", "count": 1}, "confidence": {}}')
    evaluate.main(["--run", run_dir, "--tasks", str(file), "--prompting", str(how)])
    assert "capitals" in (out := capsys.readouterr().out) and "95 % interval" in out and "ece" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "suite:x"], "--tasks suite:x: the suite has arithmetic, .*, not 'x'"),
        (["--tasks", "suite", "--whole"], "leave them out with --tasks"),
        (["--tasks", "humaneval"], "humaneval: runs programs that the model writes; allow it with --allow_code"),
        (["--tasks", "none.jsonl"], "none.jsonl: cannot be read"),
        (["--tasks", "suite", "--prompting", "none.json"], "none.json: cannot be read"),
        (["--tasks", "suite", "--prompting", "x", "--few_shot", "1"], "both choose demonstrations"),
        (["--tasks", "suite:python", "suite"], "two exams have one name"),
        (["--hf", "x"], "name one model"),
        (["--out", "x"], "--out is of exams; name some"),
        (["--limit", "3"], "--limit is of exams; name some"),
    ],
)
def test_mistakes(options: list[str], message: str, run_dir: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate.main(["--run", run_dir, *options])


def test_what_needs_no_model_is_said_before_one_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    options = ["--run", "none", "--tasks", "suite:copying"]
    for more, message in (
        (["humaneval"], "humaneval: runs programs"),
        (["--out", str(tmp_path / "file")], f"--out {tmp_path}/file: cannot be written"),
        (["--out", str(tmp_path / "out")], "none"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.main([*options, *more])


def test_a_published_model_has_no_held_out_data() -> None:
    with pytest.raises(
        UserError, match="a published model has no held-out data; name prepared data with --data DIR, or exams"
    ):
        evaluate.main(["--hf", "x"])
