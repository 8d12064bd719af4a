"""The benchmark of the package beside others, in parts: ``benchmarks/bench/run PART...``."""
