"""What a run did: metrics, FLOPs and MFU accounting, writers, profiler, plots, report. `RunLog` is the way in."""
