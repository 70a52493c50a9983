"""Steps of cleaning that change text, and lists: what stays of each kind of source, and one line for each mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ftfy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.config import UserError
from maxlm.config.cleaning.cleaning_pipeline import CleaningStep
from maxlm.config.cleaning.rule_steps import GopherQuality, GopherRepetition, UrlList, UrlPart, WordList
from maxlm.config.cleaning.source_steps import AnswersByScore, CodeHeader, GutenbergText, LatexToText, WikiText
from maxlm.config.cleaning.text_steps import C4Lines, HtmlToText, NormaliseUnicode, RepairUnicode, WebLines
from maxlm.data.cleaning import word_lists
from maxlm.data.cleaning.findings import DocumentStep, Finding, Page, broken
from maxlm.data.cleaning.html_text import depth
from maxlm.data.cleaning.making import make_step


class NoneAtAll:
    """No step here asks a model."""

    def scorer(self, run: str) -> Any:
        raise AssertionError(run)

    embedder = scorer


def step_of(config: CleaningStep) -> DocumentStep:
    return make_step(config, NoneAtAll())  # type: ignore[return-value]


def found(config: CleaningStep, text: str, **tags: Any) -> Finding:
    return step_of(config)(Page("a", text, tags))


def rule_of(config: CleaningStep, text: str, **tags: Any) -> str | None:
    limit = broken(step_of(config).limits, found(config, text, **tags))
    return limit.rule if limit else None


# Unicode


def misread(text: str, encoding: str = "windows-1252") -> str:
    return text.encode().decode(encoding)


@pytest.mark.parametrize("encoding", ["windows-1252", "latin-1", "macroman", "cp437"])
def test_misread_text_is_read_again(encoding: str) -> None:
    text = "\u00e9t\u00e9, na\u00efve, d\u00e9j\u00e0 vu"
    finding = found(RepairUnicode(), f"good line\n{misread(text, encoding)}\nother \u00e9t\u00e9")
    assert finding.text == f"good line\n{text}\nother \u00e9t\u00e9" and finding.changes == {"mojibake": 1}
    assert found(RepairUnicode(mojibake=False), misread(text)).text is None


def test_text_that_is_right_stays() -> None:
    for text in (
        "",
        "plain",
        "\u00e9t\u00e9 \u2014 \u201cquoted\u201d",
        "\u4f60\u597d\u3002",
        "\t\n",
        "caf\u00e9 \u2122",
    ):
        assert found(RepairUnicode(), text) == Finding()


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cc",)), max_size=40))
def test_lines_are_repaired_as_ftfy_does_each(text: str) -> None:
    expected = "\n".join(ftfy.fix_encoding(line) for line in text.split("\n"))
    finding = found(RepairUnicode(controls=False), text)
    assert (text if finding.text is None else finding.text) == expected


def test_control_characters_go_and_ends_of_pages_end_lines() -> None:
    finding = found(RepairUnicode(), "\ufeffone\x00 two\x07\ttabs\x0cnext\u2028page\ud800")
    assert finding.text == "one two\ttabs\nnext\npage"
    assert finding.changes == {"control characters": 4, "end of page": 2}


# HTML

PAGE = """<!DOCTYPE html><html><head><title>t</title><style>p {color: red}</style></head><body>
<nav><ul><li>Home</li><li>About us</li></ul></nav>
<main><article><h1>The sea</h1><p>The ship sails over the <b>wide</b> sea.</p>
<p>The wind &amp; the weather are fair.</p></article></main>
<script>var x = 1;</script><footer>Copyright</footer></body></html>"""


def test_of_html_the_main_text_stays() -> None:
    finding = found(HtmlToText(), PAGE)
    assert finding.text == "The sea\n\nThe ship sails over the wide sea.\n\nThe wind & the weather are fair."
    whole = found(HtmlToText(main_content=False), PAGE).text
    assert whole and "About us" in whole and "var x" not in whole


def test_what_is_html_is_said_by_the_tag_or_the_beginning() -> None:
    assert found(HtmlToText(), "<p>hi</p>").text is None
    assert found(HtmlToText(), "<p>hi</p>", content_type="text/html; charset=utf-8").text == "hi"
    assert found(HtmlToText(), PAGE, content_type="text/plain").text is None
    assert found(HtmlToText(), " <!-- x --> <HTML><p>hi").text == "hi"
    assert found(HtmlToText(), "a page about <html>").text is None


def test_broken_html_is_read_and_what_would_take_for_ever_is_dropped() -> None:
    assert found(HtmlToText(), "<html><p>one<div>\ud800two</p><b>three").text
    assert found(HtmlToText(), "<html><").text is not None
    longest = HtmlToText(most_characters=len(PAGE))
    assert rule_of(longest, PAGE) is None and rule_of(longest, PAGE + " ") == "characters of HTML"
    deep = "<html>" + "<div>" * 512 + "hello"
    assert rule_of(HtmlToText(), deep) is None
    assert rule_of(HtmlToText(), deep + "<span>") == "elements inside one another"


def test_depth_counts_elements_that_must_be_closed() -> None:
    assert depth("<div><p>a<p>b<p>c<br><img><div></div><i></i></div>") == 2
    assert depth("</div></div><div>") == 1


# Papers

PAPER = r"""\documentclass{article} % a comment
\newcommand{\R}{\mathbb{R}}
\newcommand\norm[1]{\lVert #1 \rVert}
\newcommand{\pair}[2][x]{(#1, #2)}
\def\sq#1{#1^2}
\def\chain{\norm{\R}}
% \newcommand{\R}{wrong}
\begin{document}
\title{T}
\begin{abstract} Abs. \end{abstract}
\section{First}
% gone
In $\R$ and $\norm{a_{1}}$, 50\% of \pair{b} and \pair[c]{d}. % gone too
\begin{comment}
also gone
\end{comment}
$\sq{y}$, $\chain$, \R{}-valued.
\bibliographystyle{plain}
\bibliography{refs}
\begin{thebibliography}{9} \bibitem{a} A. \end{thebibliography}
\end{document}
trailing"""

READ = r"""\section{First}
In $\mathbb{R}$ and $\lVert a_{1} \rVert$, 50\% of (x, b) and (c, d).

$y^2$, $\lVert \mathbb{R} \rVert$, \mathbb{R}-valued."""


def test_of_a_paper_remains_what_a_reader_reads() -> None:
    text = found(LatexToText(), PAPER).text
    assert text is not None
    assert [line.rstrip() for line in text.split("\n")] == READ.split("\n")


def test_macros_can_stay() -> None:
    text = found(LatexToText(macros=False), PAPER).text
    assert text and r"$\norm{a_{1}}$" in text


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (r"no section at all", None),
        (r"before \section{A} after", r"\section{A} after"),
        (r"\begin{document}no section", "no section"),
        (r"\section{A} a \\% comment", r"\section{A} a \\"),
        (r"\section{A} a \% no comment", None),
        (r"\section{A} \newcommand{\open}{never closed \open", None),
        (r"\section{A} \newcommand{\two}[2]{#1#2}\two{a}", r"\section{A} \two{a}"),
        (r"\renewcommand{\section}[1]{\textbf{#1}}\section{A} a", None),
    ],
)
def test_papers_that_are_not_like_others(text: str, read: str | None) -> None:
    finding = found(LatexToText(), text)
    if read is None and "renewcommand" in text:
        assert finding.text and r"\section" in finding.text
    else:
        assert finding.text == read


def test_macros_that_explode_drop_the_paper() -> None:
    bomb = r"\def\a{\b\b\b\b}\def\b{\c\c\c\c}\def\c{dddddddddd}\section{A} " + r"\a" * 20
    assert rule_of(LatexToText(), bomb) == "growth by macros"
    assert rule_of(LatexToText(most_growth=100), bomb) is None
    assert found(LatexToText(), r"\def\a{\a}\section{A} \a").text == r"\section{A} \a"


# Answers, books, articles, headers


def test_answers_stand_below_their_question_the_best_first() -> None:
    answers = [
        {"text": "<p>Low</p>", "score": 1},
        {"text": "High &amp; dry", "score": 7},
        {"text": "Also 1", "score": 1},
    ]
    finding = found(AnswersByScore(), "<p>Why?</p>", answers=answers)
    assert finding.text == "Why?\n\nHigh & dry\n\nLow\n\nAlso 1" and finding.changes == {"answers": 3}
    assert found(AnswersByScore(), "<p>Why?</p>", answers=json.dumps(answers)) == finding
    assert found(AnswersByScore(least_score=2), "Why?", answers=answers).text == "Why?\n\nHigh & dry"


@pytest.mark.parametrize(
    "given_", ["[", "3", [3], [{"text": "a"}], [{"text": "a", "score": "b"}], [{"text": 3, "score": 1}]]
)
def test_answers_that_cannot_be_read_drop_the_document(given_: Any) -> None:
    assert rule_of(AnswersByScore(), "Why?", answers=given_) == "answers that can be read"
    assert found(AnswersByScore(), "Why?").text is None


def test_of_a_book_stays_what_its_author_wrote() -> None:
    mark = "*** {} OF THE PROJECT GUTENBERG EBOOK X ***"
    book = f"Title\n{mark.format('START')}\n\nCall me.\n\n{mark.format('END')}\nLicence"
    assert found(GutenbergText(), book).text == "Call me."
    assert found(GutenbergText(), "Call me.").text is None


def test_of_an_article_stay_the_words() -> None:
    markup = (
        "{{Infobox|a={{b|c}}}}'''Sea''' is [[water|salt water]]<ref name=x>See [http://x y]</ref> and [[ship]]s."
        "<!-- no --><ref name=x/>\n[[File:a.png|thumb|The [[sea]] now]]\n== Life ==\n{| class=x\n| 1 {{y}}\n|}\n"
        "See [https://a.b the page] &amp; more.\n[[Category:Seas]]"
    )
    assert found(WikiText(), markup).text == "Sea is salt water and ships.\n\nLife\n\nSee the page & more."
    assert found(WikiText(), "Plain text, it's so: a[1] = 2").text is None


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("# Copyright 2020 A\n# Licensed to all\n\nimport os\n", "import os\n"),
        ("#!/bin/sh\n# SPDX-License-Identifier: MIT\necho", "#!/bin/sh\necho"),
        ("/*\n * All rights reserved\n */\n#include <a.h>", "#include <a.h>"),
        ("// Copyright\n// more\nint x; // copyright", "int x; // copyright"),
        ("# What this file does\nimport os\n", None),
        ("x = 1\n# Copyright\n", None),
        ("#include <copyright.h>\n", None),
        ("", None),
    ],
)
def test_a_comment_about_rights_goes_from_the_beginning(text: str, left: str | None) -> None:
    assert found(CodeHeader(), text).text == left


def test_a_long_header_stays() -> None:
    text = "# copyright\n" * 3 + "x"
    assert found(CodeHeader(most_lines=3), text).text == "x" and found(CodeHeader(most_lines=2), text).text is None


# Lists


def listed(folder: Path, *entries: str) -> str:
    file = folder / "list.txt"
    file.write_text("\n".join(entries) + "\n")
    return str(file)


def test_words_of_a_list(tmp_path: Path) -> None:
    file = listed(tmp_path, "# words", "", "Spam", "free money", "\u8d4c\u535a")
    assert rule_of(WordList(file=file), "no such words, spammer") is None
    assert rule_of(WordList(file=file), "SPAM!") == "words of list.txt"
    assert found(WordList(file=file), "get Free, MONEY now").values == (0.5,)
    assert found(WordList(file=file), "get Free, MONEY now").seen == "free money"
    assert rule_of(WordList(file=file), "money for free") is None
    assert found(WordList(file=file), "\u4eca\u5929\u8d4c\u535a\u5427\u5427").values == (2 / 6,)
    assert rule_of(WordList(file=file, most=0.1), "spam " + "word " * 9) is None
    assert rule_of(WordList(file=file, most=0.1), "spam " + "word " * 8) == "words of list.txt"
    assert rule_of(WordList(file=file), "") is None


@pytest.mark.parametrize(
    ("part", "entry", "hit", "miss"),
    [
        (UrlPart.DOMAIN, "bad.org", "https://www.BAD.org:80/x", "https://notbad.org/bad.org"),
        (UrlPart.DOMAIN, "bad.org", "user:pw@bad.org.", "http://bad.org.uk/"),
        (UrlPart.WORD, "casino", "http://a.b/best-casino/1", "http://casinos.b/"),
        (UrlPart.SUBSTRING, "casino", "http://casinos.b/", "http://a.b/cas-ino"),
    ],
)
def test_addresses_of_a_list(tmp_path: Path, part: UrlPart, entry: str, hit: str, miss: str) -> None:
    step = UrlList(file=listed(tmp_path, entry), part=part)
    assert rule_of(step, "x", url=hit) == "entries of list.txt" and rule_of(step, "x", url=miss) is None
    assert found(step, "x", url=hit).seen == entry
    assert rule_of(step, "x") is None and rule_of(step, "x", url=3) is None


def test_an_address_may_have_as_many_entries_as_the_step_says(tmp_path: Path) -> None:
    step = UrlList(file=listed(tmp_path, "poker", "casino"), part=UrlPart.WORD, most=1)
    assert rule_of(step, "x", url="http://a/poker/poker") is None
    assert rule_of(step, "x", url="http://a/poker/casino") == "entries of list.txt"


@pytest.mark.parametrize(
    ("config", "content", "message"),
    [
        (WordList, b"# only this\n\n", "{}: has no entry; write one a line, or leave the step out"),
        (WordList, b"good\n--- \n", "{}:2: '---' has no letter or figure, so that it is no word; remove the line"),
        (
            WordList,
            b"good\n\xe9t\xe9\n",
            "{}:2: byte 0xe9 is not UTF-8; convert it: iconv -f latin1 -t UTF-8 FILE > NEW",
        ),
        (
            UrlList,
            b"https://a.b/",
            "{}:1: 'https://a.b/' is not a domain; write it like example.org, without https:// and path",
        ),
    ],
)
def test_lists_that_cannot_be_meant_are_refused(tmp_path: Path, config: Any, content: bytes, message: str) -> None:
    file = tmp_path / "list.txt"
    file.write_bytes(content)
    with pytest.raises(UserError) as raised:
        step_of(config(file=str(file)))
    assert str(raised.value) == message.format(file)


def test_a_list_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.txt: cannot be read \(No such file or directory\); name a list"):
        step_of(UrlList(file=str(tmp_path / "none.txt")))
    assert word_lists.read_list(listed(tmp_path, "\ufeffB", "a"), lambda entry: None) == ("b", "a")


# All of them

EVERY: tuple[CleaningStep, ...] = (
    NormaliseUnicode(),
    RepairUnicode(),
    HtmlToText(),
    C4Lines(),
    C4Lines(terminal_punctuation=True),
    WebLines(),
    LatexToText(),
    AnswersByScore(),
    GutenbergText(),
    WikiText(),
    CodeHeader(),
)


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("ab \n\\{}[]<>|'=%#*.!\u00e9\u4f60\ud800\ufeff1/;-"), max_size=60))
def test_any_text_is_taken_and_what_is_reported_as_changed_is(text: str) -> None:
    for config in EVERY:
        finding = found(config, text)
        assert finding.text != text and bool(finding.changes) == (finding.text is not None)
        assert found(config, text) == finding


HARD = (
    "{{",
    "[[",
    "<ref>",
    "<!--",
    "\\def\\a{",
    "\\newcommand{\\a}[1]{#1#1}\\a{\\a{",
    "<div>",
    "{|",
    "\n",
    "a' ",
    "no likes ",
    ". ",
)


@pytest.mark.nightly
@pytest.mark.parametrize("unit", HARD)
def test_twenty_megabytes_of_one_thing_end(unit: str) -> None:
    """What is quadratic takes days here."""
    text = unit * (20_000_000 // len(unit))
    for config in (*EVERY, GopherQuality(), GopherRepetition()):
        found(config, text)
