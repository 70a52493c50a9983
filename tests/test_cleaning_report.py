"""The page about a cleaning: bars and limits where they belong, samples with what changed, nothing of a text alive."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from maxlm.config import Files
from maxlm.config.cleaning.cleaning_job import CleaningJob
from maxlm.config.cleaning.cleaning_pipeline import CleaningPipeline
from maxlm.config.cleaning.rule_steps import GopherQuality
from maxlm.config.cleaning.text_steps import C4Lines
from maxlm.data.cleaning.cleaning_work import CleaningWork, plan_cleaning
from maxlm.data.cleaning.findings import Finding, Limit, Page
from maxlm.data.cleaning.report_charts import histogram
from maxlm.data.cleaning.tallies import StepTally
from maxlm.data.documents import Unreadable
from tests.test_cleaning import NoModels

FACTORS = {"k": 1e3, "M": 1e6, "": 1.0}


def drawing(limit: Limit, values: dict[str, int]) -> ET.Element:
    found = re.search("<svg.*</svg>", histogram(limit, values, dropped=3))
    assert found
    return ET.fromstring(found[0])


def number(text: str) -> float:
    digits, letter = re.fullmatch(r"([-\d.]+)([kM]?)", text).groups()  # type: ignore[union-attr]
    return float(digits) * FACTORS[letter]


def scale(svg: ET.Element, across: bool, logarithmic: bool) -> tuple[float, float]:
    """What one pixel is and what pixel 0 is, as two labels of that axis say."""
    labels = [one for one in svg.iter("text") if re.fullmatch(r"[-\d.]+[kM]?", one.text or "")]
    bottom = max(float(one.attrib["y"]) for one in labels)
    mine = [one for one in labels if (float(one.attrib["y"]) == bottom) == across]
    at = [float(one.attrib["x"]) if across else float(one.attrib["y"]) - 4 for one in mine]
    values = [math.log(max(number(one.text or ""), 1e-9)) if logarithmic else number(one.text or "") for one in mine]
    step = (values[-1] - values[-2]) / (at[-1] - at[-2])
    return step, values[-1] - step * at[-1]


def bars(svg: ET.Element, kind: str) -> list[tuple[float, float, float]]:
    """x of both sides, and y of the top."""
    found = [one.attrib for one in svg.iter("rect") if one.get("class") == kind]
    return [(float(a["x"]), float(a["x"]) + float(a["width"]), float(a["y"])) for a in found]


@pytest.mark.parametrize(
    ("limit", "values", "across_log", "up_log"),
    [
        (Limit("words with a letter", 0.8), {"0.5": 10, "0.81": 30, "0.99": 44}, False, False),
        (Limit("words", 50, 1e5, "words"), {"7": 3, "60": 5, "9e+02": 40_000, "1.2e+05": 2}, True, True),
        (Limit("# to words", most=0.1, unit="a word"), {"0": 90, "0.05": 3, "0.3": 1}, False, False),
        (Limit("curly brackets", most=0, unit="times"), {"0": 4000, "2": 30, "4e+02": 7}, True, True),
        (Limit("kept documents like it", most=0, unit="documents"), {"0": 9, "1": 5}, False, False),
        (Limit("line ends to words", unit="a word"), {"0.25": 6}, False, False),
    ],
)
def test_bars_stand_where_the_axes_say(limit: Limit, values: dict[str, int], across_log: bool, up_log: bool) -> None:
    svg = drawing(limit, values)
    right, up = scale(svg, True, across_log), scale(svg, False, up_log)
    whole, kept = bars(svg, "gone"), bars(svg, "kept")
    assert len(whole) == len(values)
    for (value, count), (left, end, top) in zip(values.items(), whole, strict=True):
        if float(value) > 0 or not across_log:
            x = ((math.log(float(value)) if across_log else float(value)) - right[1]) / right[0]
            assert left - 2 < x < end + 2
        read = up[0] * top + up[1]
        assert (math.exp(read) if up_log else read) == pytest.approx(count, rel=0.03, abs=0.5)
    assert [bar[:2] for bar in kept] == [
        bar[:2] for value, bar in zip(values, whole, strict=True) if limit.allows(float(value))
    ]
    texts = [one.text or "" for one in svg.iter("text")]
    assert f"{limit.unit}{' (log)' * across_log}" in texts and f"documents{' (log)' * up_log}" in texts
    lines = [one for one in svg.iter("line") if one.get("class") == "limit"]
    bounds = [bound for bound in (limit.least, limit.most) if math.isfinite(bound)]
    assert len(lines) == len(bounds)
    for line, bound in zip(lines, bounds, strict=True):
        if bound > 0:
            x = ((math.log(bound) if across_log else bound) - right[1]) / right[0]
            assert float(line.attrib["x1"]) == pytest.approx(x, abs=1.5)


def test_nothing_leaves_the_picture() -> None:
    for low in (-3.0, 0.0, 1e-7, 2.0):
        for high in (2.0, 17.0, 1e4, 1e9):
            svg = drawing(Limit("x", high / 3, high / 2), {str(low): 1, str(high): 100_000})
            _, _, width, height = map(float, svg.attrib["viewBox"].split())
            for one in (*svg.iter("rect"), *svg.iter("text")):
                x, y = float(one.attrib["x"]), float(one.attrib["y"])
                assert 0 <= x <= x + float(one.get("width", 0)) <= width
                assert 0 <= y <= y + float(one.get("height", 0)) <= height
    assert histogram(Limit("x"), {"inf": 3, "nan": 1}, 0) == ""


class Seen(HTMLParser):
    """Tags of a page, and the texts of its samples."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(data: Path, out: Path) -> str:
    pipeline = CleaningPipeline(
        steps=(C4Lines(least_sentences=0), GopherQuality(least_words=4, most_words=10**7, least_stop_words=0))
    )
    job = CleaningJob(pipeline=pipeline, documents=Files(paths=(str(data),)))
    out.mkdir()
    plan = plan_cleaning(job, out, Unreadable())
    plan.put_down()
    work = CleaningWork(out, job, plan.parts, NoModels())
    for number, stage in enumerate(work.stages):
        for task in range(stage.tasks):
            work.do(number, task)
    return (out / "report.html").read_text()


def test_documents_are_shown_and_never_run(tmp_path: Path) -> None:
    data = tmp_path / "in"
    data.mkdir()
    script = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    name = "<script>alert(3)<&script>\n['\"].txt"
    policy = "we use cookies here today"
    (data / name).write_text(f"{script} is what we write about here\n{policy}\nit goes on with &lt; too")
    (data / "dropped.txt").write_text(f"</pre>{script} one two")
    (data / "long.txt").write_text("many words go on and on here\n" * 700_000 + f"{policy}\nthe end of it")
    page = page_of(data, tmp_path / "<u>out")
    seen = Seen()
    seen.feed(page)
    assert not {"script", "img", "u"} & {tag for tag, _ in seen.tags}
    assert not any(name.startswith("on") or name in ("src", "href") for _, attrs in seen.tags for name in attrs)
    assert "http" not in page and script in seen.text and name in seen.text
    assert "<u>out" in seen.text and "&lt; too" in seen.text
    assert re.findall("<del>(.*?)</del>", page, re.DOTALL) == [f"{policy}\n"] * 2
    assert "<ins>" not in page
    assert len(page) < 60_000  # of 20 MB


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [
        ("one two three", "one three", ("one two three", "one three")),
        ("a" * 5000 + " old end", "a" * 5000 + " new end", ("…" + "a" * 79 + " old end", "…" + "a" * 79 + " new end")),
        ("x" * 5000, "y", ("x" * 600 + "…", "y")),
    ],
)
def test_a_change_is_shown_where_it_is(before: str, after: str, shown: tuple[str, str]) -> None:
    tally = StepTally()
    tally.note(Page("a", before), 1, (), Finding(text=after, changes={"r": 2}), 1)
    (sample,) = tally.changed_samples
    assert (sample.text, sample.after, sample.why) == (*shown, "r: 2")


def test_samples_of_changes_are_those_of_any_parts() -> None:
    pages = [Page(f"d{i}", f"text {i} old") for i in range(60)]
    whole, parts = StepTally(), [StepTally(), StepTally()]
    for i, page in enumerate(pages):
        for tally in (whole, parts[i % 2]):
            tally.note(page, 1, (), Finding(text=f"text {i} new"), 1)
    parts[1].add(parts[0])
    assert parts[1].changed_samples == whole.changed_samples and len(whole.changed_samples) == 8
