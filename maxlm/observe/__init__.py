"""What a run did: metrics, FLOPs and MFU accounting, writers, profiler, plots and the report. `RunLog` is the way in."""
