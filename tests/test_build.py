"""`python -m maxlm.data build`: records from records, texts and threads."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest

from maxlm.config import Purpose, UserError
from maxlm.data import ghost, mixing, raw_tasks, reply_trees, sharegpt
from maxlm.data.__main__ import EXIT_UNREADABLE, main
from maxlm.data.chat_templates import choose_template
from maxlm.data.conversation_formats import BadRecord
from maxlm.data.conversations import encode
from maxlm.data.tokenizers import Bytes
from maxlm.data.wordings import read_wordings, worded

BYTES = Bytes()
PLAIN = choose_template("plain", BYTES)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def write(file: Path, *records: Any) -> str:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def answers(record: dict[str, Any]) -> list[str]:
    """What of a record is learned."""
    [text] = encode(record, PLAIN, BYTES)
    return BYTES.decode([i if counts else 10 for i, counts in zip(text.ids, text.counts, strict=True)]).split()


class TestMixing:
    """FLAN's shares."""

    def test_shares(self) -> None:
        assert mixing.shares([100, 300], [1, 1]) == [0.25, 0.75]
        assert mixing.shares([100, 300, 9000], [1, 1, 1], 300) == pytest.approx([1 / 7, 3 / 7, 3 / 7])
        assert mixing.shares([100, 100, 0], [3, 1, 5]) == [0.75, 0.25, 0]
        with pytest.raises(UserError, match="must all be positive"):
            mixing.shares([1, 1], [1, 0])
        with pytest.raises(UserError, match="no records"):
            mixing.shares([0], [1])

    def test_each_beginning_has_the_shares_and_each_epoch_every_record(self) -> None:
        sizes, parts = [7, 40, 3], [0.2, 0.7, 0.1]
        found = list(mixing.mixed(sizes, parts, 500, seed=3))
        for count in range(1, 501, 7):
            taken = Counter(n for n, _ in found[:count])
            assert all(abs(taken[n] - part * count) < len(sizes) for n, part in enumerate(parts))
        for n, size in enumerate(sizes):
            own = [i for which, i in found if which == n]
            epochs = [own[at : at + size] for at in range(0, len(own) - size + 1, size)]
            assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
            assert len({tuple(epoch) for epoch in epochs}) > 1
        assert found == list(mixing.mixed(sizes, parts, 500, seed=3)) != list(mixing.mixed(sizes, parts, 500, seed=4))

    def test_the_command(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        large = write(tmp_path / "large.jsonl", *({"prompt": "a", "completion": f"l{n}"} for n in range(50)))
        small = write(tmp_path / "small.jsonl", *({"prompt": "a", "completion": f"s{n}"} for n in range(5)))
        words = ["build", "mix", large, f"{small}=2", "--cap", "20", "--rate_cap", "10", "--count", "40"]
        for name in ("a", "b"):
            assert main([*words, "--out", str(tmp_path / name)]) == 0
        assert f"{small}: 5 records, 50.0%, 4.00 times each" in capsys.readouterr().out
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        found = Counter(record["completion"] for record in lines(tmp_path / "a"))
        assert {found[f"s{n}"] for n in range(5)} == {4} and sum(name.startswith("l") for name in found) == 20
        with pytest.raises(UserError, match="is there already"):
            main([*words, "--out", str(tmp_path / "a")])
        with pytest.raises(UserError, match="'x' is no number"):
            main(["build", "mix", f"{small}=x", "--out", str(tmp_path / "c")])
        with pytest.raises(UserError, match="unknown build 'mixx'; use one of mix"):
            main(["build", "mixx"])


class TestWordings:
    """Tasks in words."""

    FILE: ClassVar[dict[str, Any]] = {
        "wordings": [
            {"input": "{{P}} {premise}? {options}", "output": "{label}"},
            {"input": "Is it {premise}?", "output": "{label}"},
        ],
        "thoughts": [{"input": "{premise}? Think.", "output": "{why} So {label}."}],
        "inverted": [{"input": "What is {label}?", "output": "{premise}"}],
        "values": {"label": {"0": "yes", "true": "no"}},
        "demonstration": "Q {input}\nA {output}\n",
    }
    RECORDS: ClassVar[list[dict[str, Any]]] = [
        {"premise": "p0 {x}", "label": 0, "why": "w0", "options": ["yes", "no"]},
        {"premise": "p1", "label": True, "why": None, "options": ["yes", "no"]},
        {"premise": "p2", "label": "maybe", "why": "w2", "options": []},
    ]

    def file(self, tmp_path: Path, **changes: Any) -> Path:
        file = tmp_path / "wordings.json"
        file.write_text(json.dumps({**self.FILE, **changes}))
        return file

    def test_kinds(self, tmp_path: Path) -> None:
        wordings = read_wordings(self.file(tmp_path))
        found = list(worded(self.RECORDS, wordings, every=True))
        assert found[0] == [
            {"prompt": "{P} p0 {x}? - yes\n- no", "completion": "yes"},
            {"prompt": "Is it p0 {x}?", "completion": "yes"},
        ]
        assert isinstance(found[1], list) and found[1][1] == {"prompt": "Is it p1?", "completion": "no"}
        assert isinstance(found[2], list) and found[2][1]["completion"] == "maybe"
        found = list(worded(self.RECORDS, wordings, thoughts=1.0))
        assert found[0] == [{"prompt": "p0 {x}? Think.", "completion": "w0 So yes."}]
        assert isinstance(found[1], BadRecord) and "has no key 'why'" in str(found[1])
        found = list(worded(self.RECORDS, wordings, inverted=1.0))
        assert found[0] == [{"prompt": "What is yes?", "completion": "p0 {x}"}]

    def test_demonstrations_are_other_records_of_the_same_wording(self, tmp_path: Path) -> None:
        wordings = read_wordings(self.file(tmp_path, wordings=self.FILE["wordings"][1:]))
        for n, made in enumerate(worded(self.RECORDS, wordings, shots=2)):
            assert isinstance(made, list)
            *shown, asked = [*made[0]["prompt"].split("Q ")[1:], made[0]["prompt"].split("\n")[-1]]
            assert asked == f"Is it {self.RECORDS[n]['premise']}?" and len(shown) == 2
            others = {f"Is it {record['premise']}?" for m, record in enumerate(self.RECORDS) if m != n}
            assert {one.split("\nA ")[0] for one in shown} == others
        with pytest.raises(UserError, match="only 3 records; use fewer"):
            next(worded(self.RECORDS, wordings, shots=3))

    def test_shares_are_drawn_by_place(self, tmp_path: Path) -> None:
        wordings = read_wordings(self.file(tmp_path))
        records = [self.RECORDS[0]] * 400
        kinds = Counter[str]()
        for made in worded(records, wordings, thoughts=0.25, inverted=0.25):
            assert isinstance(made, list)
            kinds[made[0]["prompt"]] += 1
        assert len(kinds) == 4 and all(70 <= count <= 130 for count in kinds.values())
        assert list(worded(records[:9], wordings, thoughts=0.5)) == list(worded(records, wordings, thoughts=0.5))[:9]

    def test_wrong_files(self, tmp_path: Path) -> None:
        for changes, words in [
            ({"wording": []}, "unknown key 'wording'"),
            ({"wordings": []}, "wordings is empty"),
            ({"inverted": [{"input": "a"}]}, "inverted must be a list of objects with input and output"),
            ({"values": {"a": {"b": 1}}}, "values must be an object of objects with texts"),
            ({"demonstration": "x"}, "must be a text with {input} and {output}"),
        ]:
            with pytest.raises(UserError, match=words):
                read_wordings(self.file(tmp_path, **changes))
        wordings = read_wordings(self.file(tmp_path, thoughts=[]))
        with pytest.raises(UserError, match="the file has no thoughts"):
            next(worded(self.RECORDS, wordings, thoughts=0.5))

    def test_the_command(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        records = write(tmp_path / "r.jsonl", *self.RECORDS, {"premise": {"x": 1}, "label": 0, "options": []})
        words = ["build", "tasks", records, "--wordings", str(self.file(tmp_path)), "--every"]
        assert main([*words, "--out", str(tmp_path / "out.jsonl")]) == EXIT_UNREADABLE
        said = capsys.readouterr().out
        assert "6 records from 3" in said and f"{records}:4: premise: holds an object" in said
        assert len(lines(tmp_path / "out.jsonl")) == 6
        with pytest.raises(UserError, match="more than 1 together"):
            main([*words, "--thoughts", "0.6", "--inverted", "0.6", "--out", "x"])


def test_tasks_out_of_raw_text(tmp_path: Path) -> None:
    text = """Why ice floats

Water expands when it freezes, unlike nearly every other liquid. Therefore, ice has a lower density than the water.
Lakes stay liquid at their bottom because the ice on top keeps the cold away.

Many fish survive the winter in such lakes without any trouble. However, a shallow lake may freeze to its very bottom.
"""
    found = list(raw_tasks.tasks(text))
    assert {task["completion"] for task in found[2:5]} == {
        "Ice has a lower density than the water.",
        "A shallow lake may freeze to its very bottom.",
        "Because the ice on top keeps the cold away.",
    }
    assert found[0]["completion"] == "Why ice floats" and "Water expands" in found[0]["prompt"]
    assert "Why ice floats" in found[1]["prompt"] and found[1]["completion"].startswith("Water expands")
    assert "Water expands when it freezes, unlike nearly every other liquid." in found[2]["prompt"]
    assert "density" not in found[2]["prompt"] and "shallow" not in found[3]["prompt"]
    assert "Lakes stay liquid at their bottom." in found[4]["prompt"]
    going_on = found[5]
    assert text.strip().endswith(going_on["completion"]) and going_on["completion"][:30] not in going_on["prompt"]
    assert len(found) == 6 and found == list(raw_tasks.tasks(text))
    assert list(raw_tasks.tasks("Nothing here.")) == []
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("x")
    assert main(["build", "texts", str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), "--out", str(tmp_path / "o")]) == 0
    assert len(lines(tmp_path / "o")) == 6


class TestPages:
    """Conversations from web pages."""

    @pytest.mark.parametrize(
        "html, markdown",
        [
            ("<p>a <b>b</b> <em>c</em></p><p>d<br>e &lt; f</p>", "a **b** *c*\n\nd\ne < f"),
            ("<ol start='3'><li>a</li><li><p>b</p><ul><li>c</li></ul></li></ol>", "3. a\n4. b\n   - c"),
            (
                '<pre><div>python<button>Copy code</button></div><code class="hljs language-python">if a:\n    b\n'
                "</code></pre>",
                "```python\nif a:\n    b\n```",
            ),
            ("<p>use <code>a  *b*</code></p>", "use `a  *b*`"),
            ("<h2>T</h2><blockquote><p>a</p><p>b</p></blockquote><hr>", "## T\n\n> a\n>\n> b\n\n---"),
            ("<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>",
             "| a | b |\n| --- | --- |\n| 1 | 2 |"),
            ('<p><a href="https://x.y">z</a><!-- no --><script>no</script></p>', "[z](https://x.y)"),
            ("<div><div><p>a</p></div>b</div>", "a\n\nb"),
        ],
    )  # fmt: skip
    def test_markdown(self, html: str, markdown: str) -> None:
        assert sharegpt.markdown(html) == markdown

    def test_cleaning(self) -> None:
        record = {"conversations": [
            {"from": "gpt", "value": "Hello"}, {"from": "human", "value": " Hi <div>? "},
            {"from": "gpt", "value": "<div><p>a</p></div>"}, {"from": "gpt", "value": "<div><p>a</p></div>"},
            {"from": "human", "value": "b"}, {"from": "gpt", "value": "use `<p>`\nCopy code\n</p>"},
            {"from": "human", "value": "bye"},
        ]}  # fmt: skip
        [found] = sharegpt.cleaned(record)
        assert found["messages"] == [user("Hi <div>?"), assistant("a"), user("b"), assistant("use `<p>`\n</p>")]
        assert sharegpt.cleaned({"conversations": record["conversations"][:1]}) == []
        with pytest.raises(BadRecord, match="is empty when it is clean"):
            sharegpt.cleaned({"messages": [user("a"), assistant("<p> </p>")]})
        with pytest.raises(BadRecord, match="message 1 is of user after user"):
            sharegpt.cleaned({"messages": [user("a"), user("b"), assistant("c")]})
        with pytest.raises(BadRecord, match="neither messages nor conversations"):
            sharegpt.cleaned({"prompt": "a"})

    def test_long_ones_are_split_between_exchanges(self) -> None:
        system = {"role": "system", "content": "12"}
        turns = [turn for n in range(4) for turn in (user(f"{n}" * 3), assistant("x" * (5 if n != 2 else 30)))]
        pieces = [found["messages"] for found in sharegpt.cleaned({"messages": [system, *turns]}, 20)]
        assert pieces == [[system, *turns[:4]], [system, *turns[6:]]]  # the third exchange alone is too long
        pieces = [found["messages"] for found in sharegpt.cleaned({"messages": [system, *turns]}, 17)]
        assert pieces == [[system, *turns[:2]], [system, *turns[2:4]], [system, *turns[6:]]]

    def test_the_command(self, tmp_path: Path) -> None:
        file = write(tmp_path / "in.jsonl", {"messages": [user("a"), assistant("<p>b</p>")]}, {"x": 1})
        words = ["build", "clean", file, "--limit", "2", "--tokenizer", "bytes", "--out", str(tmp_path / "out")]
        assert main(words) == EXIT_UNREADABLE
        assert lines(tmp_path / "out") == [{"messages": [user("a"), assistant("b")]}]


TREE = {
    "message_tree_id": "1",
    "prompt": {"text": "q", "role": "prompter", "replies": [
        {"text": "a1", "role": "assistant", "rank": 1, "replies": [
            {"text": "q2", "role": "prompter", "replies": [{"text": "a3", "role": "assistant", "replies": []}]}]},
        {"text": "a2", "role": "assistant", "rank": 0, "replies": [{"text": "thanks", "role": "prompter"}]},
        {"text": "bad", "role": "assistant", "rank": 2, "deleted": True, "replies": [
            {"text": "why", "role": "prompter", "replies": [{"text": "no", "role": "assistant"}]}]},
    ]},
}  # fmt: skip


class TestThreads:
    """Trees of replies."""

    def test_a_tree_of_openassistant(self) -> None:
        [root] = reply_trees.roots([TREE])
        assert [found["messages"] for found in reply_trees.conversations(root)] == [
            [user("q"), assistant("a1"), user("q2"), assistant("a3")],
            [user("q"), assistant("a2")],
        ]
        assert [found["messages"] for found in reply_trees.conversations(root, best=True)] == [
            [user("q"), assistant("a2")]
        ]
        [ranking] = reply_trees.rankings(root)
        assert ranking == {"prompt": [user("q")], "completions": ["a1", "a2"], "ranks": [2, 1]}
        assert [text.value for text in encode(ranking, PLAIN, BYTES, purpose=Purpose.PREFERENCE)] == [-2, -1]

    def test_messages_of_openassistant_are_learned_once(self) -> None:
        flat = [
            ("4", "2", "a4", "assistant"), ("1", None, "q", "prompter"), ("2", "3", "q2", "prompter"),
            ("3", "1", "a1", "assistant"), ("5", "2", "a5", "assistant"), ("6", "gone", "x", "prompter"),
        ]  # fmt: skip
        keys = ("message_id", "parent_id", "text", "role")
        [root] = reply_trees.roots([dict(zip(keys, row, strict=True)) for row in flat])
        two = list(reply_trees.conversations(root))
        assert [answers(record) for record in two] == [["a1", "a4"], ["a5"]]
        two = list(reply_trees.conversations(root, once=False))
        assert [answers(record) for record in two] == [["a1", "a4"], ["a1", "a5"]]

    def test_reddit(self) -> None:
        records = [
            {"id": "p", "title": "T", "selftext": "S", "score": 9},
            {"id": "c1", "parent_id": "t3_p", "body": "one", "score": 2},
            {"id": "c2", "parent_id": "t3_p", "body": "two", "score": 5},
            {"id": "c3", "parent_id": "t1_c1", "body": "[deleted]", "score": 5},
            {"id": "c4", "parent_id": "t1_c3", "body": "lost", "score": 5},
            {"id": "c5", "parent_id": "t1_c2", "body": "reply", "score": 5},
            {"id": "c6", "parent_id": "t1_c5", "body": "three", "score": 5},
        ]
        [root] = reply_trees.roots(records)
        assert [found["messages"] for found in reply_trees.conversations(root)] == [
            [user("T\n\nS"), assistant("one")],
            [user("T\n\nS"), assistant("two"), user("reply"), assistant("three")],
        ]
        [ranking] = reply_trees.rankings(root)
        assert ranking["completions"] == ["one", "two"] and ranking["ranks"] == [2, 1]
        deep = [{"id": str(n), "parent_id": f"t1_{n - 1}" if n else None, "body": f"b{n}"} for n in range(3000)]
        [root] = reply_trees.roots(deep)
        assert len(next(reply_trees.conversations(root))["messages"]) == 3000

    def test_what_is_wrong(self) -> None:
        for records, words in [
            ([{"x": 1}], "record 1 is no tree"),
            ([{"id": "a", "body": "b"}, {"id": "a", "body": "c"}], "record 2: message a comes twice"),
            ([{"message_id": "a", "text": "b", "role": "boss"}], "role = 'boss' is unknown"),
        ]:
            with pytest.raises(BadRecord, match=words):
                list(reply_trees.roots(records))

    def test_the_command(self, tmp_path: Path) -> None:
        file = write(tmp_path / "in.jsonl", TREE)
        assert main(["build", "threads", file, "--out", str(tmp_path / "a")]) == 0
        assert main(["build", "threads", file, "--rankings", "--out", str(tmp_path / "b")]) == 0
        assert len(lines(tmp_path / "a")) == 2 and lines(tmp_path / "b")[0]["ranks"] == [2, 1]


class TestGhost:
    """Ghost attention."""

    TALK: ClassVar[list[dict[str, Any]]] = [user("a"), assistant("b"), user("c"), assistant("d")]

    def test_there_and_back(self) -> None:
        found = ghost.asked(self.TALK, ["Be a cat."])
        assert [turn["content"] for turn in found["messages"]] == ["Be a cat.\n\na", "b", "Be a cat.\n\nc", "d"]
        back = ghost.learned(found)
        assert back == {"messages": [user("Be a cat.\n\na"), assistant("b", weight=0), user("c"), assistant("d")]}
        assert answers(back) == ["d"]

    def test_several_instructions(self) -> None:
        many = [f"I{n}." for n in range(5)]
        found = {ghost.asked(self.TALK, many, seed, at_most=2)["ghost"] for seed in range(40)}
        assert {len(one.split()) for one in found} == {1, 2} and all(
            len(set(one.split())) == len(one.split()) for one in found
        )

    def test_what_is_wrong(self) -> None:
        with pytest.raises(BadRecord, match="has a turn of the system"):
            ghost.asked([{"role": "system", "content": "s"}, *self.TALK], ["x"])
        with pytest.raises(BadRecord, match="has no ghost"):
            ghost.learned({"messages": self.TALK})
        with pytest.raises(BadRecord, match="message 0: does not begin"):
            ghost.learned({"messages": self.TALK, "ghost": "x"})

    def test_the_command(self, tmp_path: Path) -> None:
        file = write(tmp_path / "in.jsonl", {"messages": self.TALK}, {"messages": self.TALK[:1]})
        (tmp_path / "i.txt").write_text("Be a cat.\n\n")
        words = ["build", "ghost", file, "--instructions", str(tmp_path / "i.txt"), "--out", str(tmp_path / "a.jsonl")]
        assert main(words) == EXIT_UNREADABLE
        assert main(["build", "ghost", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "b.jsonl")]) == 0
        assert answers(lines(tmp_path / "b.jsonl")[0]) == ["d"]


def test_preferences_become_single_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "in.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a"})
    assert main(["build", "unpair", file, "--out", str(tmp_path / "o")]) == EXIT_UNREADABLE
    one, two = lines(tmp_path / "o")
    assert one == {"prompt": "a", "completion": "b", "label": True}
    assert two == {"prompt": "a", "completion": "c", "label": False}
    found = encode(two, PLAIN, BYTES, purpose=Purpose.KTO, before=one)
    assert [text.value for text in found] == [-1, 0]
    assert "1 refused:" in capsys.readouterr().out


RATED = {"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "q"}], "completions": ["a", "b"]}


@pytest.mark.parametrize(
    ("record", "words", "said"),
    [
        ({"prompt": "q", "completion": "a", "label": True}, [], ["CORRECT SOLUTION\n\nq -> a"]),
        ({"prompt": "q", "completion": "a", "label": 0}, ["--bad", "NO"], ["NO\n\nq -> a"]),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            ["--place", "system"],
            ["CORRECT SOLUTION | q -> a", "INCORRECT SOLUTION | q -> b"],
        ),
        (RATED | {"ratings": [4, 4.5]}, [], ["S | RATING: 4\n\nq -> a", "S | RATING: 4.5\n\nq -> b"]),
        (RATED | {"ratings": [1, 1]}, ["--place", "system"], ["RATING: 1\n\nS | q -> a", "RATING: 1\n\nS | q -> b"]),
        ({"prompt": "q", "completion": "a", "rating": -2}, ["--rating", "R"], ["R -2\n\nq -> a"]),
    ],
)
def test_answers_say_how_good_they_are(record: Any, words: list[str], said: list[str], tmp_path: Path) -> None:
    file = write(tmp_path / "in.jsonl", record)
    assert not main(["build", "tags", file, "--out", str(tmp_path / "o"), *words])
    made = lines(tmp_path / "o")
    texts = [[turn["content"] for turn in one["messages"]] for one in made]
    assert [f"{' | '.join(before)} -> {answer}" for *before, answer in texts] == said
    for one in made:  # what counts is the answer, of bad ones too
        [text] = encode(one, PLAIN, BYTES)
        counted = bytes(i for i, yes in zip(text.ids, text.counts, strict=True) if yes and i < 256)
        assert counted.decode().strip() == one["messages"][-1]["content"]


def test_a_tag_is_of_the_last_answer_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    talk = {"messages": [{"role": role, "content": text} for role, text in turns], "label": False}
    without = {"prompt": "q", "completion": "a"}
    broken = [without, without | {"rating": "x"}, {"prompt": "q", "completions": ["a"], "ratings": [1, 2]}]
    file = write(tmp_path / "in.jsonl", talk, *broken)
    assert main(["build", "tags", file, "--out", str(tmp_path / "o")]) == EXIT_UNREADABLE
    [made] = lines(tmp_path / "o")
    assert [turn["content"] for turn in made["messages"]] == ["a", "b", "INCORRECT SOLUTION\n\nc", "d"]
    [text] = encode(made, PLAIN, BYTES)
    assert bytes(i for i, yes in zip(text.ids, text.counts, strict=True) if yes and i < 256) == b" d"
    printed = capsys.readouterr().out
    for reason in ("nothing to tag answers by", "rating = 'x' must be a number", "two lists of the same length"):
        assert reason in printed


def test_a_disk_that_fills_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "in.jsonl", {"prompt": "q", "completion": "a", "label": True})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match=r"--out .*o: cannot be written \(No space left on device\); make room"):
        main(["build", "tags", file, "--out", str(tmp_path / "o")])
    assert [one.name for one in tmp_path.iterdir()] == ["in.jsonl"]
