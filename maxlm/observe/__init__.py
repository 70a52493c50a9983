"""What a run did: metrics, FLOPs and MFU accounting, writers, profiler, plots, report. `RunLog` is the way in.

run_log.py: the one object that the loop tells what happens
metrics.py: rows of metrics.jsonl, throughput
held_out.py: perplexity and bits per byte of a loss
console.py: live status
guard.py: what fails or hangs is switched off, and the run goes on
writers.py: TensorBoard, Weights & Biases
devices.py: peak FLOP/s of each device kind
profiler.py: a window of profiled steps
kernel_choices.py: which kernels run, said once
plots.py: loss.png
svg.py: curves of the report
page.py: tables and sections of pages
report.py: report.html
comparison.py: several runs on one page
text.py: numbers for people
"""
