import psutil
import pytest

from service.operations import memory


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Write a fake control-group file system: a mapping from each folder to its files."""
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "OWN", tmp_path / "own")

    def groups(own, **folders):
        (tmp_path / "own").write_text(own)
        for name, files in folders.items():
            folder = tmp_path / "cgroup" / name.replace("__", "/")
            folder.mkdir(parents=True)
            for file, text in files.items():
                (folder / file).write_text(text)

    return groups


def test_without_a_limit_it_is_what_the_machine_has_left(groups):
    groups("0::/\n")
    assert 0 < memory.available_bytes() <= psutil.virtual_memory().total


def test_the_tightest_group_around_the_process_counts_and_cached_files_do_not(groups):
    inner = {"memory.max": "max\n", "memory.current": "5\n", "memory.stat": "inactive_file 1\n"}
    outer = {"memory.max": "1000\n", "memory.current": "900\n", "memory.stat": "anon 700\ninactive_file 150\n"}
    groups("0::/pods/one\n", pods=outer, pods__one=inner)
    assert memory.available_bytes() == 250


def test_in_the_first_version_of_control_groups_a_containers_own_group_is_at_the_root(groups):
    root = {
        "memory.limit_in_bytes": "1000\n",
        "memory.usage_in_bytes": "400\n",
        "memory.stat": "total_inactive_file 50\n",
    }
    groups("7:cpu:/x\n4:memory:/docker/of-the-host\n0::/\n", memory=root)
    assert memory.available_bytes() == 650
