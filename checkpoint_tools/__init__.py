"""Every way from one checkpoint to another: inspect, split, convert, export, verify. One operation per file."""
