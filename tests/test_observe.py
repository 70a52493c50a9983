"""What a run writes: rows that survive kills and resumes, figures that add up, and pages that stand alone."""

import dataclasses
import html.parser
import io
import json
import math
import re
import signal
import subprocess
import sys
import types
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import rich.console
from train_runs import scalars

from maxlm.config import (
    DataConfig,
    Dataset,
    Experts,
    ObserveConfig,
    RunConfig,
    ShardingConfig,
    StepRange,
    TopKRouter,
    TrainConfig,
    UserError,
    llama,
    serialize,
    with_experts,
)
from maxlm.observe.console import Console
from maxlm.observe.metrics import Row, RowLog, Throughput, read_rows
from maxlm.observe.plots import loss_curve, smooth
from maxlm.observe.profiler import ProfileWindow
from maxlm.observe.report import SavedCheckpoint, report_step, write_report
from maxlm.observe.run_log import RunLog
from maxlm.observe.svg import Line, chart
from maxlm.observe.text import duration, gibibytes, short
from maxlm.observe.writers import TensorBoardWriter, WandbWriter

ROOT = Path(__file__).parent.parent
KEYS = ["step", "time", "loss", "tokens", "tokens_per_s", "step_time_s", "mfu", "learning_rate", "grad_norm"]


class FakeDevice:
    process_index = 0

    def __init__(self, kind: str) -> None:
        self.device_kind = kind

    def memory_stats(self):
        return None if self.device_kind == "cpu" else {"bytes_in_use": 2 << 30, "bytes_limit": 16 << 30}


EVALUATION = {
    "tokens": 1280, "eval_loss": 2.0, "eval_perplexity": math.exp(2.0), "eval_bits_per_byte": 0.72, "eval_tokens": 100,
}  # fmt: skip


def run_config(**observe) -> RunConfig:
    return RunConfig(
        model=llama(vocab_size=64, d_model=32, n_layers=2, n_heads=4, d_ff=48, max_seq_len=16),
        data=DataConfig(datasets=(Dataset(path="data/x"),)),
        train=TrainConfig(steps=20, batch_size=4, seq_len=16, log_every=2),
        observe=ObserveConfig(**observe),
    )


def open_log(run_dir: Path, *, resume_step=0, is_main=True, kind="cpu", config=None, n=4, output=None) -> RunLog:
    stream = rich.console.Console(file=output or io.StringIO(), width=120)
    return RunLog(
        config or run_config(), run_dir, resume_step=resume_step, is_main=is_main,
        devices=[FakeDevice(kind)] * n, console=Console(enabled=is_main, output=stream),
    )  # fmt: skip


def train(log: RunLog, first: int, last: int, loss=lambda step: 5 - step / 10) -> list[Row]:
    log.start_clock(first, first * 64)
    return [
        log.step(step, step * 64, {"loss": loss(step), "learning_rate": 1e-3, "grad_norm": 1.0})
        for step in range(first + 2, last + 1, 2)
    ]


# Rows


def test_rows_have_the_promised_keys_first_and_no_mfu_on_cpu(tmp_path):
    with open_log(tmp_path) as log:
        train(log, 0, 6)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 6]
    for row in rows:
        assert list(row)[:9] == KEYS
        assert abs((datetime.now(UTC) - datetime.fromisoformat(row["time"])).total_seconds()) < 60
        assert row["mfu"] is None and row["tokens_per_s"] > 0 and row["memory_bytes"] > 0


def test_mfu_row_is_the_stated_rule(tmp_path):
    output = io.StringIO()
    with open_log(tmp_path, kind="TPU v5 lite", output=output) as log:
        row = train(log, 0, 2)[0]
    n = 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32 + 64 * 32  # blocks, final norm, head; no input table
    flops = 6 * n + 12 * 2 * 32 * 16
    assert row["mfu"] == pytest.approx(flops * row["tokens_per_s"] / (4 * 197e12))
    assert "12·L·N_heads·H·T" in output.getvalue() and "197 TFLOP/s" in output.getvalue()


def test_resume_drops_later_rows_of_all_files(tmp_path):
    with open_log(tmp_path) as log:
        train(log, 0, 10)
        for step in (5, 10):
            log.measured("eval", step, {"eval_loss": 3.0}, "a line")
            log.measured("sample", step, {"text": "b"}, "a line")
    with open_log(tmp_path, resume_step=6) as log:
        train(log, 6, 8, loss=lambda step: 1.0)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"] == 1.0) for row in rows] == [(2, False), (4, False), (6, False), (8, True)]
    assert [row["step"] for row in read_rows(tmp_path / "evals.jsonl")] == [5]
    assert [row["step"] for row in read_rows(tmp_path / "samples.jsonl")] == [5]
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_torn_last_line_is_left_out_and_mended(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + '{"step": 2, "loss": 3.25}\n'[:-cut])
    assert read_rows(path) == [{"step": 1}]
    log = RowLog(path, resume_step=9)
    log.append({"step": 2})
    log.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("line", ["", "nonsense", "[1]", '{"loss": 1}', '{"step": "1"}', "NaN"])
def test_damage_elsewhere_is_refused_with_its_place(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: .*remove that line"):
        read_rows(path)


def test_rows_outlive_kill_9(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from maxlm.observe.metrics import RowLog\n"
        "log = RowLog(Path(sys.argv[1]), resume_step=0)\n"
        "for step in range(1, 51): log.append({'step': step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = tmp_path / "metrics.jsonl"
    result = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=False)
    assert result.returncode == -signal.SIGKILL
    assert [row["step"] for row in read_rows(path)] == list(range(1, 51))


def test_not_finite_figures_stay_json(tmp_path):
    with open_log(tmp_path) as log:
        log.step(1, 64, {"loss": math.nan, "learning_rate": 0.0, "grad_norm": math.inf})
        log.measured("eval", 1, {"eval_perplexity": math.inf}, "a line")
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()

    def refuse(word: str):
        raise AssertionError(word)

    row = json.loads(line, parse_constant=refuse)
    assert row["loss"] is None and row["grad_norm"] is None
    (line,) = (tmp_path / "evals.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse)["eval_perplexity"] is None


def test_other_processes_write_and_print_nothing(tmp_path):
    output = io.StringIO()
    with open_log(tmp_path / "run", is_main=False, output=output) as log:
        rows = train(log, 0, 4)
        log.measured("eval", 4, {"eval_loss": 1.0}, "a line")
        log.say("x")
        log.warning("x")
        assert log.finish() is None
    assert rows[-1]["tokens_per_s"] > 0
    assert not (tmp_path / "run").exists() and output.getvalue() == ""


# Experts and pipelines


def moe_config(**changes) -> RunConfig:
    """Four layers, of which the second and the fourth have experts."""
    config = run_config()
    model = dataclasses.replace(config.model, n_layers=4)
    experts = Experts(n_experts=4, d_ff=24, router=TopKRouter(top_k=2))
    return dataclasses.replace(config, model=with_experts(model, experts, every=2), **changes)


def expert_figures(**changes) -> dict[str, Any]:
    return {
        "loss": 1.5, "learning_rate": 1e-3, "grad_norm": 1.0, "auxiliary_loss": 0.04, "moe_load_entropy": [0.9, 0.7],
        "moe_dropped_share": [0.0, 0.05], "moe_max_over_mean_load": [1.5, 2.5], **changes,
    }  # fmt: skip


def test_figures_of_experts_go_everywhere(tmp_path):
    output = io.StringIO()
    with open_log(tmp_path, config=moe_config(), output=output) as log:
        for step in (2, 4):
            log.step(step, 64, expert_figures())
        log.finish()
    row = read_rows(tmp_path / "metrics.jsonl")[0]
    assert row["auxiliary_loss"] == 0.04 and row["moe_load_entropy"] == [0.9, 0.7]
    assert row["moe_dropped_share"] == [0.0, 0.05] and row["moe_max_over_mean_load"] == [1.5, 2.5]
    assert "experts" not in row
    assert "dropped 2.5 %  grad 1  entropy 0.800" in output.getvalue()
    found = {(tag, step): value for tag, step, value in scalars(tmp_path / "tensorboard")}
    assert found["train/moe_load_entropy/layer_1", 2] == pytest.approx(0.9)
    assert found["train/moe_max_over_mean_load/layer_3", 4] == 2.5
    assert found["train/auxiliary_loss", 2] == pytest.approx(0.04)
    assert not any("layer_0" in tag or "layer_2" in tag for tag, _ in found)
    titles = re.findall("<figcaption>([^<]*)", (tmp_path / "report.html").read_text())
    assert sum("mean over layers" in title for title in titles) == 3
    assert sum("Auxiliary loss of the routers" in title for title in titles) == 1
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["parameters"]["active"] < facts["parameters"]["total"]
    assert f"({facts['parameters']['active']:,})" in output.getvalue()


def test_a_dense_model_has_no_such_figures(tmp_path):
    output = io.StringIO()
    with open_log(tmp_path, output=output) as log:
        train(log, 0, 4)
        log.finish()
    assert not [key for key in read_rows(tmp_path / "metrics.jsonl")[0] if "moe" in key or "aux" in key]
    assert "active" not in output.getvalue() and "pipeline" not in output.getvalue()
    assert "mean over layers" not in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "run.json").read_text())["pipeline_bubble"] is None


def test_figures_of_experts_that_are_not_finite_stay_json(tmp_path):
    with open_log(tmp_path, config=moe_config()) as log:
        log.step(2, 64, expert_figures(moe_load_entropy=[math.nan, 0.5], auxiliary_loss=math.inf))
        log.finish()
    row = read_rows(tmp_path / "metrics.jsonl")[0]
    assert row["moe_load_entropy"] == [None, 0.5] and row["auxiliary_loss"] is None
    assert not any(tag == "train/moe_load_entropy/layer_1" for tag, _, _ in scalars(tmp_path / "tensorboard"))


def test_a_pipeline_says_its_bubble_once(tmp_path):
    """GPipe with 4 stages and 4 micro-batches: 3 of 7 turns idle (arXiv:1811.06965, section 2.3)."""
    output = io.StringIO()
    config = moe_config(sharding=ShardingConfig(stage=4))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batches=4))
    with open_log(tmp_path, config=config, output=output) as log:
        train(log, 0, 4)
    assert output.getvalue().count("pipeline of 4 stages, 4 micro-batches: each stage idles 42.9 %") == 1
    assert json.loads((tmp_path / "run.json").read_text())["pipeline_bubble"] == pytest.approx(3 / 7)


# Throughput


def test_throughput_leaves_out_what_came_before_and_pauses():
    now = [100.0]
    speed = Throughput(clock=lambda: now[0])
    assert speed.read(1, 64) is None  # nothing was timed: the first step holds compilation
    now[0] += 2.0
    with speed.pause():
        now[0] += 50.0
    now[0] += 2.0
    assert speed.read(5, 320) == (pytest.approx(64.0), pytest.approx(1.0))
    now[0] += 3.0
    assert speed.read(6, 384) == (pytest.approx(64 / 3), pytest.approx(3.0))
    with pytest.raises(KeyError), speed.pause():
        now[0] += 7.0
        raise KeyError
    now[0] += 1.0
    assert speed.read(7, 448) == (pytest.approx(64.0), pytest.approx(1.0))


# Console


def test_a_pipe_gets_one_whole_line_a_row_without_control_codes(tmp_path):
    output = io.StringIO()
    with open_log(tmp_path / ("long" * 40), output=output) as log:
        train(log, 0, 4, loss=lambda step: 1.25)
        log.warning("careful [bold]not markup[/bold]")
        log.finish()
    text = output.getvalue()
    assert "\x1b" not in text and "\r" not in text
    assert len(re.findall(r"^ *[24]/20  loss 1\.2500 .* left$", text, re.MULTILINE)) == 2
    assert "MFU not reported: no bfloat16 peak FLOP/s known for 'cpu'\n" in text
    assert "warning: careful [bold]not markup[/bold]\n" in text
    assert f"wrote {tmp_path / ('long' * 40) / 'report.html'}\n" in text


# Writers


def test_tensorboard_gets_finite_figures_and_purges_on_resume(tmp_path):
    with open_log(tmp_path) as log:
        log.step(2, 64, {"loss": 1.5, "learning_rate": 1e-3, "grad_norm": math.nan})
        log.measured("eval", 2, {"eval_loss": 2.5, "eval_perplexity": math.inf}, "a line")
    found = scalars(tmp_path / "tensorboard")
    assert ("train/loss", 2, 1.5) in found and ("eval/loss", 2, 2.5) in found
    assert not any(tag in ("train/grad_norm", "train/mfu", "train/step") for tag, _, _ in found)
    TensorBoardWriter(tmp_path / "again", resume_step=2).close()
    assert scalars(tmp_path / "again" / "tensorboard")[0][:2] == ("restart", 3)


def test_wandb_run_continues_under_its_id(tmp_path):
    calls, logged = [], []
    run = types.SimpleNamespace(define_metric=lambda *a, **k: None, log=logged.append, finish=lambda: None)
    wandb = types.SimpleNamespace(init=lambda **k: calls.append(k) or run)
    for _ in range(2):
        writer = WandbWriter(wandb, "project", tmp_path, {"a": 1})
        writer.write(3, {"train/loss": 1.0})
        writer.close()
    assert calls[0]["id"] == calls[1]["id"] == (tmp_path / "wandb_id").read_text().strip()
    assert calls[0]["project"] == "project" and calls[0]["resume"] == "allow"
    assert logged[0] == {"step": 3, "train/loss": 1.0}


def test_absent_wandb_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"observe\.wandb_project = 'p' .*pip install wandb"):
        open_log(tmp_path, config=run_config(wandb_project="p"))


# Profiler


def test_profile_window_records_its_steps_only(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: events.append(("start", folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append(("stop",)))
    said = []
    window = ProfileWindow(StepRange(2, 4), tmp_path, said.append)
    for i in range(6):
        with window.step(i, wait_for=jnp.zeros(2)):
            events.append((i,))
    window.close()
    assert events == [(0,), (1,), ("start", str(tmp_path / "profile")), (2,), (3,), ("stop",), (4,), (5,)]
    assert len(said) == 1 and str(tmp_path / "profile") in said[0]

    events.clear()
    resumed = ProfileWindow(StepRange(2, 9), tmp_path, said.append)
    with resumed.step(3, wait_for=None):
        pass
    resumed.close()
    assert [event[0] for event in events] == ["start", "stop"]

    events.clear()
    with ProfileWindow(None, tmp_path, said.append).step(0, wait_for=None):
        pass
    assert events == []


# Plots and report


def test_smoothing_keeps_a_constant_and_calms_noise():
    assert smooth([(x, 2.0) for x in range(50)]) == [(x, pytest.approx(2.0)) for x in range(50)]
    noisy = [(x, float(x % 2)) for x in range(400)]
    assert all(0.4 < y < 0.6 for _, y in smooth(noisy)[6:-6])
    line = [(x, 3.0 - x) for x in range(50)]
    assert smooth(line) == [(x, pytest.approx(y)) for x, y in line]  # no lag
    assert smooth([]) == []


def test_loss_curve_is_a_png_of_what_there_is(tmp_path):
    assert loss_curve([{"step": 1, "tokens": 1, "loss": None}], [], tmp_path / "loss.png") is None
    rows = [{"step": s, "tokens": s, "loss": 1 / s, "learning_rate": 0.1} for s in range(1, 30)]
    path = loss_curve(rows, [{"step": 3, "tokens": 3, "eval_loss": 0.5}], tmp_path / "loss.png")
    assert path is not None and path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "matplotlib.pyplot" not in sys.modules


def test_absent_matplotlib_is_named_and_the_report_still_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    output = io.StringIO()
    with open_log(tmp_path, output=output) as log:
        train(log, 0, 4)
        finished = log.finish()
    assert finished is not None and finished.loss_png is None and finished.report.exists()
    assert "pip install 'maxlm[viz]'" in output.getvalue()


class _Page(html.parser.HTMLParser):
    """Checks that tags nest, and collects text and outside references."""

    VOID = ("meta", "line", "circle", "polyline")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("href", "src", "srcset", "xlink:href")]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_report_stands_alone_and_escapes_what_a_model_writes(tmp_path):
    config = run_config(sample_prompt="<img src=x onerror=alert(1)>")
    serialize.save(config, tmp_path / "config.json")
    with open_log(tmp_path, config=config, kind="NVIDIA H200") as log:
        train(log, 0, 20)
        log.measured("eval", 20, EVALUATION, "a line")
        log.measured("sample", 20, {"prompt": "<b>prompt", "text": "</pre><script>alert(1)</script>"}, "a line")
        finished = log.finish([SavedCheckpoint(step=20, n_bytes=5 << 20, saved=datetime(2026, 1, 2, 3, 4, 5))])
    page = finished.report.read_text()
    parsed = _Page(page)
    assert parsed.links == [] and "url(" not in page and "@import" not in page
    assert "script" not in parsed.tags and "img" not in parsed.tags
    assert parsed.tags.count("svg") == 4
    for text in (
        "</pre><script>alert(1)</script>", "step 20 of 20", "5.0 MiB", "2026-01-02 03:04:05", "7.389",
        "model.blocks.0.attention.n_heads", "<img src=x onerror=alert(1)>", "4 x NVIDIA H200", jax.__version__,
    ):  # fmt: skip
        assert text in parsed.text, text


def test_report_of_an_empty_or_damaged_folder(tmp_path):
    _Page(write_report(tmp_path).read_text())
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "run.json").mkdir()
    (tmp_path / "metrics.jsonl").write_text("nonsense\n")
    page = _Page(write_report(tmp_path, complete=3).read_text())
    for words in ("not JSON", "Is a directory", "metrics.jsonl:1: 'nonsense' is not a row"):
        assert words in page.text
    assert report_step(tmp_path) == 3


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [1e-9, 1e-9], [5.0, -3.0], [1e12, 2e12]])
def test_charts_of_awkward_ranges(values):
    svg = chart("t & t", [Line(label="a", style="raw", points=list(enumerate(values)))], x_label="x")
    _Page(svg)
    heights = [float(pair.split(",")[1]) for pair in re.search(r'points="([^"]*)"', svg).group(1).split()]
    assert all(0 <= height <= 260 for height in heights) and "nan" not in svg
    assert svg.count('class="grid"') >= 3


def test_a_long_chart_is_thinned_but_ends_where_the_run_ends():
    svg = chart("t", [Line(label="a", style="raw", points=[(x, float(x)) for x in range(10_001)])], x_label="x")
    drawn = re.search(r'points="([^"]*)"', svg).group(1).split()
    assert len(drawn) <= 1500 and drawn[-1].startswith("628.0,")


def test_numbers_for_people():
    assert [short(v) for v in (0, 950, 1e3, 12_345, 999_999, 6_738_415_616)] == [
        "0", "950", "1.00k", "12.3k", "1000k", "6.74B",
    ]  # fmt: skip
    assert [duration(s) for s in (0.2, 59.6, 158, 3720, 100_000)] == [
        "0 s", "1 min 00 s", "2 min 38 s", "1 h 02 min", "1 d 3 h",
    ]  # fmt: skip
    assert gibibytes(3 << 30) == "3.00 GiB" and gibibytes(5 << 20) == "5.0 MiB"


def test_importing_the_room_does_not_import_jax():
    code = (
        "import sys; import maxlm.observe.run_log, maxlm.shapes\n"
        "print([m for m in ('jax', 'matplotlib', 'wandb') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert out.stdout.strip() == "[]", out.stderr
