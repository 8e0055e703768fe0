"""The bench: correctness first, then speed as a share of what the machine can do, beside what people would
use instead.

Installed as `minilm.benchmarks`; the command is ``minilm bench``. Reading order:

    stats, harness    how a time is taken: interleaved, rotated inputs, medians, and when no ratio is given
    limits            what the machine can do, measured in the same run (limits.cpp, cuda_timing.py)
    costs, shapes     bytes and operations of each op by formula; the shapes of real models
    check             an implementation is right before it is timed
    ops, layers, end_to_end    the three levels; run puts them in one frame
    workers, worker, peers/    the other engines, each in a process of its own, each one small file
    corpus, models    the workloads, made without a download
    results, report, compare       JSON, tables, what changed beyond the noise
    standing          like with like: what was won and lost
    course            where a run is, how long it will take, what its limit leaves out
    drawing, roofline, curves    what plots is made of
    plots, page, markdown    pictures, the HTML page, tables for a README
    waterfall         ``minilm bench --explain MODEL``
    gpu_check         ``make gpu-check``
"""
