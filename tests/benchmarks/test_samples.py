"""The index of samples is small, and quicker than a walk; its own bound of time is for the benchmark alone."""

from pathlib import Path

from benchmarks import samples


def test_an_index_is_read_in_a_part_of_a_walks_time(tmp_path: Path) -> None:
    found = {result.name.removeprefix("a sample is known by "): result for result in samples.measure(tmp_path, 1000)}
    assert found["its index: memory"].ok
    assert found["its index: time"].value < found["a walk: time"].value / 4
