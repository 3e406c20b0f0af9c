"""One file per question. Each prints a table and writes JSON; RESULTS.md holds what was measured, where and when."""
