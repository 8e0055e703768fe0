"""The bench: checks results, then measures speed, in comparison with the machine's limits and with other
libraries.

Installed as `minilm.benchmarks`; the command is ``minilm bench``. Reading order:

    stats, harness    timing: interleaved rounds, rotated inputs, medians, and when no ratio is given
    limits            the machine's limits, measured in the same run (limits.cpp, cuda_timing.py)
    costs, shapes     bytes and operations of each op by formula; the shapes of real models
    check             results are checked before anything is timed
    ops, layers, end_to_end    the three levels; run calls them
    workers, worker, peers/    the other engines, each in a separate process and a small file
    corpus, models    the workloads, made without a download
    results, report, compare       JSON, tables, changes beyond the noise
    standing          which engines are compared, and which comparisons minilm wins or loses
    course            progress of a run, estimated remaining time, steps skipped by a time limit
    drawing, roofline, curves    parts of plots
    plots, page, markdown    pictures, the HTML page, tables for a README
    waterfall         ``minilm bench --explain MODEL``
    gpu_check         ``make gpu-check``
"""
